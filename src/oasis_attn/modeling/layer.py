"""The family's decoder layer, with its residual connection replaced by the depth cache.

`OasisModel.forward` passes `depth_cache` and `layer_args` as keyword arguments to the family's own
model, which passes them on to each layer.  With activation checkpointing, transformers runs
`RoutedLayer.forward` a second time in backward.

Axes: B batch, H heads, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oasis_attn.errors import UserError, check_flag
from oasis_attn.modeling.attach import Attached
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.decoder_map import output_projection_name
from oasis_attn.modeling.depth_cache import SumCache
from oasis_attn.modeling.extensions import BranchNorm, NullSignal, null_evidence
from oasis_attn.modeling.families import Family, check_fits
from oasis_attn.modeling.hf_compat import initialization as init
from oasis_attn.modeling.official import OfficialRouter
from oasis_attn.ops.normalizers import LEARNED_NULL_KEY, LEARNED_NULL_LOGIT, LEARNED_NULL_VALUE

OUTPUT_BIAS = "attention_output_bias"
"""In `text_config`: add a bias to the output projection of attention, in a family without one.

Training that removes the value of a null replaces its mean contribution by this bias.
"""
_NULL_STD = 0.02  # of null keys and values, for families without an initializer_range


class LayerArgs(NamedTuple):
    """Settings of all layers, read once per forward pass, because transformers' configs are slow.

    Attributes:
        attention: keyword arguments for `oasis_attention`.
        null_signal: the function or module that computes psi; None if the null signal is off.
        branch_norm: None without one.
    """

    attention: dict[str, Any]
    null_signal: NullSignal | None
    branch_norm: BranchNorm | None


class RoutedLayer(Attached):
    """Mixin over the family's layer class: `depth_cache` combines attention and MLP outputs."""

    oasis_config: OasisConfig
    family: Family
    index: int
    self_attn: nn.Module
    mlp: nn.Module

    def attach(self, config: OasisConfig, index: int) -> None:
        """Set the configuration, and add the parameters that it needs."""
        text, attention = config.text_config, self.self_attn
        self.oasis_config, self.index, self.family = config, index, check_fits(config)
        heads = getattr(attention, "num_heads", None) or text.num_attention_heads
        usual = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width = getattr(attention, "v_head_dim", None) or usual
        self.null_logit = self.null_key = self.null_value = self.output_gate = None
        name, nulls = config.normalizer.name, int(config.normalizer.arguments.get("nulls", 1))
        own_sinks = getattr(attention, "sinks", None)  # gpt-oss has learned null logits
        if name in LEARNED_NULL_LOGIT and own_sinks is None:
            self.null_logit = nn.Parameter(torch.empty(heads))
        if name in LEARNED_NULL_VALUE:
            self.null_value = nn.Parameter(torch.empty(heads, nulls, width))
        if name in LEARNED_NULL_KEY:
            key_width = getattr(attention, "qk_head_dim", None) or usual
            self.null_key = nn.Parameter(torch.empty(heads, nulls, key_width))
        self.reset_null()
        if config.output_gate != "none":
            head_wise = config.output_gate == "head"
            gates = heads if head_wise else heads * width
            self.output_gate = nn.Linear(text.hidden_size, gates, bias=head_wise)
        output_bias = getattr(text, OUTPUT_BIAS, False)
        check_flag(OUTPUT_BIAS, output_bias)
        if output_bias:
            self.add_output_bias()
        if config.residual == "official":
            self.attn_res_sa, self.attn_res_mlp = OfficialRouter(config), OfficialRouter(config)

    @property
    def output_projection(self) -> nn.Linear:
        """The linear layer whose output is that of the attention.

        Raises:
            UserError: it was not found.
        """
        name = output_projection_name(self.self_attn)
        found = None if name is None else self.self_attn.get_submodule(name)
        if not isinstance(found, nn.Linear):
            kind = self.oasis_config.text_config.model_type
            raise UserError(
                f"{OUTPUT_BIAS}: no linear output projection found in the attention of {kind!r}"
            )
        return found

    def add_output_bias(self) -> None:
        """Add a bias of zeros to the output projection of attention.

        Raises:
            UserError: it has one.
        """
        linear = self.output_projection
        if linear.bias is not None:
            kind = self.oasis_config.text_config.model_type
            raise UserError(
                f"{OUTPUT_BIAS}: True has no effect with {kind!r}, whose attention has its own bias"
            )
        linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))

    def reset_null(self) -> None:
        """Initialize the parameters of the null: keys and values as in arXiv 2402.17762."""
        config = self.oasis_config
        std = getattr(config.text_config, "initializer_range", None) or _NULL_STD
        if self.null_logit is not None:
            init.constant_(self.null_logit, config.null_logit)
        for parameter in (self.null_key, self.null_value):
            if parameter is not None:
                init.normal_(parameter, std=std)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        depth_cache: SumCache,
        layer_args: LayerArgs,
        **kwargs: Any,
    ) -> Tensor:
        family, cache, norm = self.family, depth_cache, layer_args.branch_norm
        attention_args, router = layer_args.attention, 2 * self.index  # see depth_cache.py
        cache.to(hidden_states.device)
        if self.index == 0:
            if norm:
                hidden_states = norm(hidden_states, "embedding")
            hidden_states = cache.start(hidden_states)

        normed = cache.read(hidden_states, self._named(family.pre_attention), router)
        attention_args = attention_args | self._null_parameters()
        if self.output_gate is not None:
            attention_args = attention_args | {"output_gate": self.output_gate(normed)}
        branch, null_BHT = self.self_attn(
            hidden_states=normed, attention_mask=attention_mask, **attention_args, **kwargs
        )
        branch = self._finish(branch, family.post_attention, family.attention_dropout)
        psi_BT, mlp_psi_BT = null_evidence(layer_args.null_signal, null_BHT, self.index)
        if norm:
            branch = norm(branch, "attention")
        hidden_states = cache.update(hidden_states, branch, psi_BT, router + 1)

        normed_mlp = cache.read(hidden_states, self._named(family.pre_mlp), router + 1)
        branch = self._named(family.mlp)(normed_mlp)
        if isinstance(branch, tuple):  # a mixture of experts may return [B * T, D], and scores
            branch = branch[0].view_as(normed)
        branch = self._finish(branch, family.post_mlp, family.mlp_dropout)
        if norm:
            branch = norm(branch, "mlp")
        return cache.update(hidden_states, branch, mlp_psi_BT, router + 2)

    def _null_parameters(self) -> dict[str, Tensor]:
        names = ("null_logit", "null_key", "null_value")
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    def _named(self, name: str | None) -> Callable[[Tensor], Tensor]:
        """The family's module of this name; the identity if the family has none."""
        return getattr(self, name) if name else _identity

    def _finish(self, branch_BTD: Tensor, norm: str | None, dropout: str | None) -> Tensor:
        """Apply the family's post-norm, dropout and residual multiplier, if it has them."""
        if norm:
            branch_BTD = getattr(self, norm)(branch_BTD)
        if dropout:
            branch_BTD = getattr(self, dropout)(branch_BTD)
        if self.family.multiplier:
            branch_BTD = branch_BTD * getattr(self, self.family.multiplier)
        return branch_BTD


def _identity(x_BTD: Tensor) -> Tensor:
    return x_BTD
