"""OASIS on Hugging Face, attached to a family's own decoder (arXiv 2605.17887).

    layer:   h = read(stream)                         the sum so far, or a mix over depth
             a, null = attention(norm(h))             null: the mass each head left unspent
             stream += a, psi = mean-head null
             h = read(stream)
             stream += mlp(norm(h)), psi              an MLP carries its own layer's psi
    output:  logits = head(norm(read(stream)))

The decoder loop, the rotary embeddings, the masks, the cache, the norms, the attention projections
and the MLPs are the family's own.  `RoutedLayer` replaces only what a layer does between its
branches; `RoutedModel` only hands the routers' parameters down.  Names on disk are the family's
names, plus `model.depth.*` and, per layer, `output_gate`, `null_logit` and `attn_res_*`, each where
a setting asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from oasis_attn.errors import UserError
from oasis_attn.modeling.attention import oasis_attention  # noqa: F401  (registers the function)
from oasis_attn.modeling.configuration import ATTENTION, OasisConfig
from oasis_attn.modeling.families import Family, check_scaled, family_of
from oasis_attn.modeling.residual import (
    AuthorsRouter,
    AuthorsStream,
    DepthRouter,
    DepthStream,
    Routing,
    SumStream,
)


class RoutedLayer:
    """Mixed into a family's decoder layer: the same branches around another residual stream."""

    settings: OasisConfig
    family: Family
    index: int
    self_attn: nn.Module
    mlp: nn.Module

    def attach(self, config: OasisConfig, index: int) -> None:
        """Take up the settings, and the parameters that they ask for."""
        text = config.text_config
        self.settings, self.index, self.family = config, index, family_of(text)
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        self.null_logit = self.output_gate = None
        if config.token_normalizer == "learned_sink":
            self.null_logit = nn.Parameter(torch.zeros(heads))
        if config.output_gate != "none":
            head_wise = config.output_gate == "head"
            gates = heads if head_wise else heads * width
            self.output_gate = nn.Linear(text.hidden_size, gates, bias=head_wise)
        if config.residual == "authors":
            self.attn_res_sa, self.attn_res_mlp = AuthorsRouter(config), AuthorsRouter(config)

    def forward(
        self,
        hidden_states: Tensor | tuple[Tensor, ...],
        attention_mask: Tensor | None = None,
        routing: Routing | None = None,
        **kwargs,
    ) -> Tensor | tuple[Tensor, ...]:
        family, settings = self.family, self.settings
        stream: SumStream | DepthStream | AuthorsStream
        if settings.residual == "depth":
            stream = DepthStream(hidden_states, 2 * self.index, cast(Routing, routing))
        elif settings.residual == "authors":
            routers = (self.attn_res_sa, self.attn_res_mlp)
            stream = AuthorsStream(hidden_states, 2 * self.index, routers)
        else:
            stream = SumStream(cast(Tensor, hidden_states))

        normed = stream.read(self._named(family.pre_attention))
        branch, null_BHT = self.self_attn(
            hidden_states=normed,
            attention_mask=attention_mask,
            normalizer=settings.token_normalizer,
            null_logit=settings.null_logit if self.null_logit is None else self.null_logit,
            clip_gamma=settings.clip_gamma,
            output_gate=None if self.output_gate is None else self.output_gate(normed),
            **kwargs,
        )
        stream.add(self._finish(branch, family.post_attention, family.attention_dropout), null_BHT)

        branch = self.mlp(stream.read(self._named(family.pre_mlp)))
        if isinstance(branch, tuple):  # a mixture of experts may return its router's scores too
            branch = branch[0]
        stream.add(self._finish(branch, family.post_mlp, family.mlp_dropout), null_BHT)
        return stream.packed()

    def _named(self, name: str | None) -> Callable[[Tensor], Tensor]:
        return getattr(self, name) if name else lambda x_BTD: x_BTD

    def _finish(self, branch_BTD: Tensor, norm: str | None, dropout: str | None) -> Tensor:
        branch_BTD = self._named(dropout)(self._named(norm)(branch_BTD))
        if self.family.multiplier is None:
            return branch_BTD
        return branch_BTD * getattr(self, self.family.multiplier)


class RoutedModel:
    """Mixed into a family's base model: layers that route, and the routers they share."""

    layers: nn.ModuleList

    def __init__(self, config: OasisConfig):
        super().__init__(config.text_config)  # type: ignore[call-arg]
        layer_class = _routed_layer(type(self.layers[0]))  # type: ignore[arg-type]
        for index, layer in enumerate(self.layers):
            layer.__class__ = layer_class
            cast(RoutedLayer, layer).attach(config, index)
        self.depth = DepthRouter(config) if config.residual == "depth" else None
        self._no_split_modules = [layer_class.__name__]

    def forward(self, *args, **kwargs):
        if self.depth is not None:
            kwargs["routing"] = self.depth()
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, DepthRouter | AuthorsRouter):
            module.reset_parameters()
        elif isinstance(module, RoutedLayer) and module.null_logit is not None:
            init.zeros_(module.null_logit)


@cache
def _routed_layer(native: type) -> type:
    return type(f"Routed{native.__name__}", (RoutedLayer, native), {})


@cache
def _routed_model(text_config_class: type[PreTrainedConfig]) -> type:
    native: Any = MODEL_MAPPING[text_config_class]
    recorded = dict(native._can_record_outputs or {})
    attention = recorded.pop("attentions", None)
    if attention is not None:  # our function returns the null mass where others return the map
        target = attention.target_class if isinstance(attention, OutputRecorder) else attention
        recorded["null_mass"] = OutputRecorder(target, index=1)
    return type(
        f"Routed{native.__name__}", (RoutedModel, native), {"_can_record_outputs": recorded}
    )


class OasisPreTrainedModel(PreTrainedModel):
    config_class = OasisConfig
    config: OasisConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = {"model.depth"}  # noqa: RUF012

    def set_attn_implementation(self, attn_implementation, allow_all_kernels=False) -> None:  # noqa: ARG002
        """Refused unless it is ours: no other function has a null option."""
        if attn_implementation != ATTENTION:
            raise UserError(
                f"attn_implementation: {attn_implementation!r} has no null option;"
                f" only {ATTENTION!r} has"
            )

    def recompute_mixes(self, enabled: bool = True) -> None:
        """Recompute each depth mix and the norm after it in backward instead of keeping them.

        What a sublayer keeps is then no more than with a residual sum, at the price of one more
        pass over the sources each way.
        """
        for module in self.modules():
            if isinstance(module, DepthRouter):
                module.recompute = enabled

    def _activation_checkpointing_enable(
        self, activation_checkpointing_kwargs=None, *args, **kwargs
    ):
        """As transformers', less the reentrant form, which loses the depth sources' gradients."""
        if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise UserError("use_reentrant: True drops the depth sources' gradients; set it False")
        super()._activation_checkpointing_enable(activation_checkpointing_kwargs, *args, **kwargs)


class OasisForCausalLM(OasisPreTrainedModel, GenerationMixin):
    """A decoder of any family in `families.py` with OASIS's settings and a language-model head.

    Args:
        config: `OasisConfig`; its `text_config` picks the family.

    Raises:
        UserError: if the family has no adapter.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: OasisConfig):
        super().__init__(config)
        check_scaled(config.text_config, config.residual, config.depth_scale)
        self.model = _routed_model(type(config.text_config))(config)  # type: ignore[arg-type]
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self._no_split_modules = self.model._no_split_modules

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Next-token logits `[B, T, V]`, and the loss in nats with `labels` (-100: ignored).

        Arguments are those of any transformers causal model; padding by `attention_mask`, packing
        by `position_ids` that restart at 0.
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
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
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


AutoModelForCausalLM.register(OasisConfig, OasisForCausalLM)
