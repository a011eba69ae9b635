"""One call of an attention module, as measurements see it.

Axes: B batch, H query heads, G key heads, T queries, S keys, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionCall:
    """The inputs and results of one attention module in one forward pass, for measurements.

    The attention matrix is not stored, unless the forward pass computed it; `column` and `rows`
    recompute the probabilities that they return.  `null_output_BHTd` is what the null adds to the
    output, if it has a value and the attention matrix was computed.
    """

    module: nn.Module
    query_BHTd: Tensor
    key_BGSd: Tensor
    value_BGSd: Tensor
    null_BHT: Tensor
    _mask: Tensor | None
    _scale: float
    _softcap: float | None
    _lse_BHT: Tensor
    weights_BHTS: Tensor | None
    null_output_BHTd: Tensor | None
    layer_index: int | None = None

    @classmethod
    def of_map(cls, module: nn.Module, weights_BHTS: Tensor, value_BHd: Tensor) -> AttentionCall:
        """A call of which only the attention matrix and the value of the first key are known."""
        empty_BHT0, null_BHT = weights_BHTS[..., :0], weights_BHTS.new_zeros(weights_BHTS.shape[:3])
        return cls(
            module, empty_BHT0, empty_BHT0, value_BHd.unsqueeze(2), null_BHT, None, 1.0, None,
            null_BHT, weights_BHTS, None,
        )  # fmt: skip

    def in_layer(self, layer: int) -> AttentionCall:
        """The same call, of the decoder layer with this index."""
        return replace(self, layer_index=layer)

    @property
    def layer(self) -> int:
        """Index of the decoder layer."""
        return int(self.module.layer_idx) if self.layer_index is None else self.layer_index  # type: ignore[arg-type]

    @property
    def null_logit_BHT(self) -> Tensor:
        """The logit of the null for every query, `[B, H, T]`; of several, their log-sum-exp."""
        smallest = torch.finfo(self.null_BHT.dtype).tiny
        return self.null_BHT.clamp(min=smallest).log() + self._lse_BHT

    def logits(self, key_BHSd: Tensor, queries: slice = slice(None)) -> Tensor:
        """The logits of any keys, `[B, H, S, d]` or `[H, S, d]`, for the given queries.

        Without mask and position bias.
        """
        precise = self._lse_BHT.dtype
        query_BHTd = self.query_BHTd[:, :, queries].to(precise)
        logits_BHTS = (query_BHTd @ key_BHSd.to(precise).mT).mul_(self._scale)
        if self._softcap is not None:
            logits_BHTS = self._softcap * torch.tanh(logits_BHTS / self._softcap)
        return logits_BHTS

    def column(self, position: int) -> Tensor:
        """Probability of key `position` for every query, `[B, H, T]`, float32; 0 where masked."""
        if self.weights_BHTS is not None:
            return self.weights_BHTS[..., position]
        all_queries = slice(0, self.query_BHTd.shape[2])
        return self._probabilities(all_queries, slice(position, position + 1)).squeeze(-1)

    def rows(self, start: int, stop: int, step: int = 1) -> Tensor:
        """Probabilities of the queries in `range(start, stop, step)`, `[B, H, queries, S']`,
        float32.  S' counts the keys up to the last one that a query before `stop` attends to."""
        if self.weights_BHTS is not None:
            return self.weights_BHTS[:, :, start:stop:step]
        T, S = self.query_BHTd.shape[2], self.key_BGSd.shape[2]
        end = S if self._mask is not None else S - T + stop
        return self._probabilities(slice(start, stop, step), slice(0, end))

    def _probabilities(self, queries: slice, keys: slice) -> Tensor:
        """Probabilities of the given queries and keys, recomputed from the log-sum-exps."""
        T, S = self.query_BHTd.shape[2], self.key_BGSd.shape[2]
        groups = self.query_BHTd.shape[1] // self.key_BGSd.shape[1]
        key_BGSd = self.key_BGSd[:, :, keys].to(self._lse_BHT.dtype)
        scores_BHTS = self.logits(key_BGSd.repeat_interleave(groups, 1), queries)
        if self._mask is None:
            positions = torch.arange(S, device=scores_BHTS.device)
            future = positions[keys] > positions[S - T :][queries].unsqueeze(-1)
            scores_BHTS = scores_BHTS.masked_fill_(future, -torch.inf)
        elif self._mask.dtype == torch.bool:
            scores_BHTS = scores_BHTS.masked_fill_(~self._mask[..., queries, keys], -torch.inf)
        else:
            scores_BHTS = scores_BHTS + self._mask[..., queries, keys]
        return scores_BHTS.sub_(self._lse_BHT[..., queries, None]).exp_()
