"""The attention-only models of arXiv 2603.11487, and ways to give their attention a null.

A model has one or more layers of heads, and each head has the full width.  There is no norm, no
MLP, and no scale on the logits:

    s = (x W_Q)(x W_K)^T        out = sum over heads of (p x W_V) W_O,  p = normalize(s)

One layer returns `out`.  Several layers have a residual stream, x + out.

Models that differ only in their seed and null logit are stacked along a leading axis, so that one
process trains them together.  No operation mixes stacked models.

Axes: M stacked models, B sequences, T queries, S keys, H heads, N width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from oasis_attn.data.trigger import TriggerBatch
from oasis_attn.errors import UserError, check_choice, check_flag, check_whole
from oasis_attn.ops.normalizers import WITH_NULL_LOGIT, normalize, resolve_normalizer
from oasis_attn.ops.null_attention import null_attention

RELU = "relu"
"""Attention weights relu(s) / max(row index, 1): the arm without a sink in arXiv 2603.11487."""
NULL_TERMS = ("none", "query", "log_visible")
_SUPPORTED_NULL_LOGIT = ("softmax1", "learned_sink")
_INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class AttentionOnlyConfig:
    """The shape of an attention-only model, and its attention.

    Args:
        layers, heads: how many; at least 1.
        width: N, of the model and of each head.
        normalizer: `relu`, or a token normalizer of `oasis_attn.ops.normalizers`.  The null logit
            is constant with `softmax1` and learned per head with `learned_sink`.
        null_term: what is added to the null logit of a query: nothing (`none`); a learned linear
            function of the query's token, which starts at 0 (`query`); or the log of the number of
            keys that the query can attend to (`log_visible`).
        null_value: gives the null of each head a learned value, which starts at 0.

    Raises:
        UserError: a value is not valid, or a null option is given to a normalizer without a null
            logit.
    """

    layers: int = 1
    heads: int = 1
    width: int = 16
    normalizer: str | dict[str, Any] = "softmax"
    null_term: str = "none"
    null_value: bool = False

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "width"):
            check_whole(name, getattr(self, name), 1)
        if self.name in WITH_NULL_LOGIT and not self.has_null_logit:
            raise UserError(
                f"normalizer: {self.normalizer!r} is not supported; use null_value=True with"
                f" {' or '.join(_SUPPORTED_NULL_LOGIT)}"
            )
        check_choice("null_term", self.null_term, NULL_TERMS)
        check_flag("null_value", self.null_value)
        with_option = self.null_term != "none" or self.null_value
        if with_option and not self.has_null_logit:
            raise UserError(
                f"normalizer: {self.normalizer!r} has no null logit; null_term and null_value need "
                f"{' or '.join(_SUPPORTED_NULL_LOGIT)}"
            )

    @property
    def name(self) -> str:
        """Name of the normalizer, without its arguments."""
        if self.normalizer == RELU:
            return RELU
        return resolve_normalizer("token_normalizer", self.normalizer).name

    @property
    def has_null_logit(self) -> bool:
        """Whether the null has a logit of its own, constant or learned."""
        return self.name in _SUPPORTED_NULL_LOGIT

    @property
    def has_residual(self) -> bool:
        """Whether layers add their output to their input; a single layer does not."""
        return self.layers > 1

    @property
    def is_fused(self) -> bool:
        """Whether `null_attention` computes the attention."""
        has_kernel = self.name == "softmax" or self.has_null_logit
        return has_kernel and self.null_term == "none"


@dataclass(frozen=True)
class Start:
    """The start of one model: the seed of its weights and data, and its null logit."""

    seed: int
    null_logit: float = 0.0


class LayerAttention(NamedTuple):
    """The attention of one layer.

    Attributes:
        weights_MBHTS: the attention weights.
        null_MBHT: the null probability.
        value_norm_MBHS: norm of (x W_V) W_O, which a weight of 1 on this key adds to the output.
    """

    weights_MBHTS: Tensor
    null_MBHT: Tensor
    value_norm_MBHS: Tensor


class AttentionOnlyModels(nn.Module):
    """Stacked attention-only models.

    Args:
        config: shared by all models.
        tensors: parameters by name, each with the leading axis M.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    null_logit: Tensor
    null_query: Tensor
    null_value: Tensor

    def __init__(self, config: AttentionOnlyConfig, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        for name, tensor in tensors.items():
            trained = name != "null_logit" or config.name == "learned_sink"
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=trained))

    @classmethod
    def initial(
        cls,
        config: AttentionOnlyConfig,
        starts: Sequence[Start],
        generators: Mapping[int, torch.Generator],
    ) -> Self:
        """Untrained models; the weights of a model depend on its seed only.

        Args:
            config: shared by all models.
            starts: one per model.
            generators: by seed; each draws one set of weights.
        """
        L, H, N, M = config.layers, config.heads, config.width, len(starts)
        shapes = dict.fromkeys(("query", "key", "value"), (L, N, H * N))
        shapes["output"] = (L, H * N, N)
        drawn = {
            seed: {
                name: torch.randn(shape, generator=generator) * _INIT_STD
                for name, shape in shapes.items()
            }
            for seed, generator in generators.items()
        }
        tensors = {name: torch.stack([drawn[s.seed][name] for s in starts]) for name in shapes}
        null_logit_M = torch.tensor(
            [s.null_logit if config.has_null_logit else -math.inf for s in starts]
        )
        tensors["null_logit"] = null_logit_M[:, None, None].repeat(1, L, H)
        if config.null_term == "query":
            tensors["null_query"] = torch.zeros(M, L, N, H)
        if config.null_value:
            tensors["null_value"] = torch.zeros(M, L, H, N)
        return cls(config, tensors)

    def select(self, kept: Sequence[int]) -> Self:
        """A copy of some of the stacked models."""
        tensors = {name: tensor.detach()[list(kept)] for name, tensor in self.named_parameters()}
        return type(self)(self.config, tensors)

    def forward(self, x_MBTN: Tensor, layers: list[LayerAttention] | None = None) -> Tensor:
        """The outputs `[M, B, T, N]`; the attention of each layer is appended to `layers`."""
        M, B, T, N = x_MBTN.shape
        H = self.config.heads
        for layer in range(self.config.layers):
            query, key, value = (
                (x_MBTN.flatten(1, 2) @ weight[:, layer]).view(M, B, T, H, N).transpose(2, 3)
                for weight in (self.query, self.key, self.value)
            )
            if self.config.is_fused and layers is None:
                mixed_MBHTN, null_MBHT = self._fused(query, key, value, layer)
            else:
                weights_MBHTS, null_MBHT = self._weights(query @ key.mT, x_MBTN, layer)
                mixed_MBHTN = weights_MBHTS @ value
            if self.config.null_value:
                null_value = self.null_value[:, layer, None, :, None]
                mixed_MBHTN = mixed_MBHTN + null_MBHT.unsqueeze(-1) * null_value
            output = self.output[:, layer]
            mixed = mixed_MBHTN.transpose(2, 3).reshape(M, B * T, H * N)
            out_MBTN = (mixed @ output).view(M, B, T, N)
            if layers is not None:
                value_norm_MBHS = (value @ output.view(M, 1, H, N, N)).norm(dim=-1)
                layers.append(LayerAttention(weights_MBHTS, null_MBHT, value_norm_MBHS))
            x_MBTN = x_MBTN + out_MBTN if self.config.has_residual else out_MBTN
        return x_MBTN

    def target(self, batch: TriggerBatch) -> Tensor:
        """The outputs `[B, T, N]` that solve the task."""
        return batch.x_BTN + batch.y_BTN if self.config.has_residual else batch.y_BTN

    def _fused(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int
    ) -> tuple[Tensor, Tensor]:
        """The mixed values `[M, B, H, T, N]` and the null probability.

        `null_attention` has one null logit per head, so stacked models become heads.
        """
        M, _, H = query.shape[:3]
        query, key, value = (x.transpose(0, 1).flatten(1, 2) for x in (query, key, value))
        null_logit = self.null_logit[:, layer].flatten()
        mixed, null = null_attention(
            query, key, value, is_causal=True, scale=1.0, null_logit=null_logit
        )
        mixed, null = (x.unflatten(1, (M, H)).transpose(0, 1) for x in (mixed, null))
        return mixed, null

    def _weights(self, scores_MBHTS: Tensor, x_MBTN: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        T = scores_MBHTS.shape[-1]
        causal_TS = torch.ones(T, T, dtype=torch.bool, device=scores_MBHTS.device).tril()
        position_T = torch.arange(T, dtype=scores_MBHTS.dtype, device=scores_MBHTS.device)
        if self.config.normalizer == RELU:
            positive = scores_MBHTS.relu().masked_fill(~causal_TS, 0)
            weights_MBHTS = positive / position_T.clamp(min=1).unsqueeze(-1)
            return weights_MBHTS, torch.zeros_like(weights_MBHTS[..., 0])
        null_logit = self.null_logit[:, None, layer, :, None]
        if self.config.null_term == "query":
            null_logit = null_logit + (x_MBTN @ self.null_query[:, None, layer]).transpose(2, 3)
        elif self.config.null_term == "log_visible":
            null_logit = null_logit + (position_T + 1).log()
        return normalize(
            scores_MBHTS, self.config.normalizer, mask=causal_TS, null_logit=null_logit
        )
