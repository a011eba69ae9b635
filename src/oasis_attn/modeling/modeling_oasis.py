"""OASIS on Hugging Face, attached to a family's own decoder (arXiv 2605.17887).

    layer:   a, null = attention(norm(h))            null: the null probability of each head
             h = cache.update(h, a, psi)             the sum so far, or a mix over depth
             m = mlp(norm(h))
             h = cache.update(h, m, psi)             an MLP has its own layer's psi
    output:  logits = head(norm(h))

The decoder loop, the rotary embeddings, the masks, the key-value cache, the norms, the attention
projections and the MLPs are the family's own.  `RoutedLayer` (layer.py) replaces only the residual
connection of a layer, and `oasis_attention` (attention.py) its attention function.  `OasisModel`
creates the depth cache (depth_cache.py) for each forward pass and passes it to the layers.
docs/method.md follows a forward pass through these files.

Saved parameters have the family's names.  If a setting needs them, there are also `model.depth.*`,
`model.null_signal.*` and, in each layer, `output_gate`, `null_logit`, `null_key`, `null_value` and
`attn_res_*`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from oasis_attn.errors import UserError
from oasis_attn.modeling.attach import Attached, attached_layer, attached_model
from oasis_attn.modeling.attention import MapObserver  # this registers our attention function
from oasis_attn.modeling.attention_call import AttentionCall
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.depth_cache import DepthCache, DepthRouter, SumCache
from oasis_attn.modeling.extensions import BRANCH_NORMS, NULL_SIGNALS, null_signal_module
from oasis_attn.modeling.families import check_fits
from oasis_attn.modeling.hf_compat import can_return_tuple, no_split_modules
from oasis_attn.modeling.hf_compat import initialization as init
from oasis_attn.modeling.layer import LayerArgs, RoutedLayer
from oasis_attn.modeling.official import OfficialCache, OfficialRouter
from oasis_attn.modeling.packing import (
    check_no_padding,
    input_of,
    padded_positions,
    with_packed_masks,
)
from oasis_attn.modeling.pretrained import OasisPreTrainedModel, check_cache
from oasis_attn.modeling.settings import refuse_unknown


class OasisModel(Attached, OasisPreTrainedModel):
    """A family's base model, without a head, with layers that use the depth cache.

    `OasisModel(config)` creates an object of a subclass of this and of the family's class.
    Its `config` is the family's config; `oasis_config` has the settings of the method.
    """

    layers: nn.ModuleList
    _keep_in_fp32_modules_strict: set[str]

    def __new__(cls, config: OasisConfig | None = None) -> Self:
        if cls is OasisModel:
            family: Any = type(checked(config).text_config)
            cls = attached_model(OasisModel, family)
        return super().__new__(cls)

    def __init__(self, config: OasisConfig):
        super().__init__(config.text_config)
        native: Any = type(self.layers[0])
        layer_class = attached_layer(RoutedLayer, native)
        for index, layer in enumerate(self.layers):
            layer.__class__ = layer_class
            cast(RoutedLayer, layer).attach(config, index)
        self.depth = DepthRouter(config) if config.residual == "depth" else None
        self.null_signal = null_signal_module(config)
        ours = {"depth": self.depth, "null_signal": self.null_signal}
        self._keep_in_fp32_modules_strict |= {
            name for name, part in ours.items() if part is not None
        }
        self._no_split_modules = [layer_class.__name__]

    @property
    def oasis_config(self) -> OasisConfig:
        """The settings of all layers."""
        return cast(RoutedLayer, self.layers[0]).oasis_config

    @classmethod
    def _from_config(cls, config: OasisConfig, **kwargs: Any) -> Self:
        model: Self = super()._from_config(config, **kwargs)  # type: ignore[no-untyped-call]
        model.init_weights()  # type: ignore[no-untyped-call]  # of what the family's own constructor did not see
        return model

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the family's forward; `OasisForCausalLM.forward` describes further arguments."""
        config = self.oasis_config
        given = input_of((input_ids,), kwargs)
        if kwargs.get("past_key_values") is not None:
            check_cache(kwargs["past_key_values"], self.layers, len(given))
        kwargs = with_packed_masks(self, (input_ids,), kwargs)
        kwargs = self._with_positions(kwargs, given.shape[1])
        if self.training and getattr(self.layers[0], "gradient_checkpointing", False):
            if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
                raise UserError(
                    "use_cache: activation checkpointing does not support a cache in training; call"
                    " model.eval() to generate, or pass use_cache=False"
                )
            kwargs["use_cache"] = False
        if output_attentions is None:
            output_attentions = config.output_attentions
        if kwargs.get("output_hidden_states") is None:
            kwargs["output_hidden_states"] = config.output_hidden_states
        kwargs["depth_cache"] = self._depth_cache()
        calls: list[AttentionCall] = []
        kwargs["layer_args"] = self._layer_args(calls.append if output_attentions else None)
        if not output_attentions:
            return super().forward(input_ids, **kwargs)
        outputs = super().forward(input_ids, output_attentions=True, **kwargs)
        outputs["attentions"] = tuple(call.weights_BHTS for call in calls)
        return outputs

    def _with_positions(self, kwargs: dict[str, Any], length: int) -> dict[str, Any]:
        """`kwargs` with positions, if padding on the left would change those relative to null keys.

        Between two tokens only the distance counts, but a null key has a fixed position.
        """
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        keyed = cast(RoutedLayer, self.layers[0]).null_key is not None
        if mask is None or not keyed or kwargs.get("position_ids") is not None:
            return kwargs
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            check_no_padding(mask)
            return kwargs
        past = 0 if cache is None else cache.get_seq_length()
        return kwargs | {"position_ids": padded_positions(mask, past, length)}

    def _depth_cache(self) -> SumCache:
        if self.depth is not None:
            return DepthCache(self.depth, one_device=not self._on_accelerator())
        if self.oasis_config.residual == "official":
            layers = [cast(Any, layer) for layer in self.layers]
            return OfficialCache([(layer.attn_res_sa, layer.attn_res_mlp) for layer in layers])
        return SumCache()

    def _on_accelerator(self) -> bool:
        """Whether a layer's weights are on an accelerator."""
        if not torch.accelerator.is_available():
            return False
        devices = (next(layer.parameters()).device.type for layer in self.layers)
        return any(device not in ("cpu", "meta") for device in devices)

    def _layer_args(self, map_observer: MapObserver | None) -> LayerArgs:
        config = self.oasis_config
        signal: Any = None
        if config.null_signal != "off":
            signal = self.null_signal
            if signal is None:
                signal = NULL_SIGNALS[config.null_signal]
        # Not `output_attentions`, which the attention modules of some families do not pass on.
        attention = {
            "normalizer": config.normalizer,
            "null_logit": config.null_logit,
            "map_observer": map_observer,
        }
        norm = None if config.branch_norm == "none" else BRANCH_NORMS[config.branch_norm]
        return LayerArgs(attention, signal, norm)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but `config.json` contains `oasis_config`, not only the family's."""
        text_config, self.config = self.config, self.oasis_config
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config = text_config

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, DepthRouter | OfficialRouter):
            module.reset_parameters()
        elif isinstance(module, RoutedLayer):
            module.reset_null()
        elif module is getattr(self, "null_signal", None):
            initial: Any = null_signal_module(self.oasis_config)  # has the constructor's values
            for tensors in zip(_tensors(module), _tensors(initial), strict=True):
                init.copy_(*tensors)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of a module."""
    yield from module.parameters()
    yield from module.buffers()


def checked(config: OasisConfig | None) -> OasisConfig:
    """Return `config` if it is a valid `OasisConfig`; otherwise raise `UserError`."""
    if not isinstance(config, OasisConfig):
        raise UserError(f"config: {type(config).__name__} is not OasisConfig; wrap it in one")
    config.check()
    return config


@dataclass
class OasisOutput(CausalLMOutputWithPast):
    """`null_probability` is `[B, H, T]` for each layer; None without a null option."""

    null_probability: tuple[Tensor, ...] | None = None


class OasisForCausalLM(OasisPreTrainedModel, GenerationMixin):
    """A decoder of any family in `families.py` with OASIS and a language-model head.

    Args:
        config: `OasisConfig`; its `text_config` selects the family.

    Raises:
        UserError: a setting is unknown or not valid with the others, or the family has no row in
            `families.py`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: OasisConfig, **unknown: Any):
        refuse_unknown(unknown)  # arguments of from_pretrained that no config has
        check_fits(checked(config))
        super().__init__(config)
        self.model = OasisModel(config)
        self.vocab_size = config.vocab_size
        bias = getattr(config.text_config, "lm_head_bias", False)  # phimoe
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=bias)
        self.post_init()  # type: ignore[no-untyped-call]
        self._no_split_modules = no_split_modules(self.model)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> OasisOutput:
        """Next-token logits `[B, T, V]`, and the loss in nats with `labels` (-100: ignored).

        The arguments are those of every causal model in transformers.  `attention_mask` marks
        padding; `position_ids` that restart within a row separate packed sequences, and then no
        cache is returned.  Without `position_ids`, padding on the left changes no other output,
        also if nulls have keys.  With `output_attentions=True`, attention computes and stores the
        maps `attentions`, `[B, H, T, S]` per layer, whose rows sum to 1 - null.  With
        `output_null_probability=True`, the output has `null_probability`, `[B, H, T]` per layer.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._scale_logits(self.lm_head(outputs.last_hidden_state[:, kept]))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return OasisOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            null_probability=outputs.get("null_probability") or None,
        )

    def _scale_logits(self, logits: Tensor) -> Tensor:
        text = self.config.text_config
        scaling = getattr(text, "logits_scaling", None)  # granite
        if scaling is not None:
            logits = logits / scaling
        cap = getattr(text, "final_logit_softcapping", None)  # gemma
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits


AutoModel.register(OasisConfig, OasisModel)
AutoModelForCausalLM.register(OasisConfig, OasisForCausalLM)
