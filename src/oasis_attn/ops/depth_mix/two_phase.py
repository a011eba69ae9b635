"""Mixes over depth without gradients, in two phases and a few operations a sublayer.

Routers are taken in groups: those of a block, or eight where every sublayer is a source of its own.
When a group begins, one pass over the finished sources gives its routers' mixes and log-sum-exps
(phase one).  Each router then merges its own mix with the sources that have come since, by the
online softmax (phase two).  This is the two-phase inference of Attention Residuals
(arXiv 2603.15031), for any block size.

A decoded token passes here twice a layer, so the number of tensor operations counts: what is known
when a forward pass or a group begins is computed there, for all routers at once.

Axes: B batch, T tokens, D width, S sources, R routers, G those of a group; C the logits that do not
come from a recent source: the folded sources' together and, for Softmax1, the depth null's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from oasis_attn.ops.depth_mix.routers import Routers, rms_scale
from oasis_attn.ops.torch_compat import tree_map_only

GROUP = 8


class TwoPhaseMix:
    """Every router's mix in turn.

    psi is not centered here: for Softmax1 that moves the null's logit from 0 to -beta mean psi, and
    for the softmax it changes nothing.
    """

    def __init__(self, embedding_BTD: Tensor, routers: Routers):
        size = self.size = routers.block_size
        self.group = size if size > 1 else GROUP
        self.softmax1 = routers.normalizer == "softmax1"
        self.signal = routers.beta_R is not None
        self.R, D = routers.queries_RD.shape
        self.dtype = torch.promote_types(embedding_BTD.dtype, torch.float32)
        table = partial(torch.tensor, dtype=self.dtype, device=embedding_BTD.device)

        # g = <v, w> (mean v^2 + eps)^-1/2 = <v, sqrt(D) w> / hypot(|v|, sqrt(D eps))
        self.queries_RD = routers.queries_RD.to(self.dtype) * D**0.5
        self.queries_ahead = self._ahead(self.queries_RD)
        self.floor = table((D * routers.eps) ** 0.5)
        counts = [1 + (router + size - 1) // size for router in range(self.R)]
        self.unit = routers.mix_scale == "rms"
        self.scales = [routers.scale(count) for count in counts]
        self.scales_R = table(self.scales)
        if routers.beta_R is not None:
            # What psi adds to a folded source's logit and to the null's; what it adds to a recent
            # one's, and all since the group began to the null's.  A running block's is a sum.
            members = table([router % size or 1 for router in range(self.R)])
            self.by_psi_R = -routers.beta_R.to(self.dtype)
            self.null_by_psi_R = self.by_psi_R / table(counts)
            self.by_psi_ahead = self._ahead(self.by_psi_R / members)
            null_by_since_R = self.null_by_psi_R / members
            by_since_RC = torch.stack([torch.zeros_like(members), null_by_since_R], -1)
            self.by_since = by_since_RC.unbind()

        S, shape = counts[-1], embedding_BTD.shape[:-1]
        self.sources_SBTD = embedding_BTD.new_empty(S, *shape, D)
        self.rms_SBT1 = self.queries_RD.new_empty(S, *shape, 1)
        self.psi_SBT1 = self.queries_RD.new_zeros(S, *shape, 1)
        self.no_psi_BT1 = self.psi_since_BT1 = self.psi_sum_BT1 = self.psi_SBT1[0]
        self.sublayer = self.folded = 0
        self.recent, self.recent_psi = [embedding_BTD], [self.no_psi_BT1]
        self.logits: list[tuple[Tensor, ...]] = []

    def update(self, branch_BTD: Tensor, psi_BT: Tensor | None, sublayer: int) -> Tensor:
        """See `AutogradMix.update`."""
        if sublayer == 0:
            self._fold()
            return self._mix()
        if self.signal:
            psi_BT1 = self.no_psi_BT1 if psi_BT is None else psi_BT.unsqueeze(-1)
            since_BT1 = self.psi_since_BT1 + psi_BT1 if self.recent else psi_BT1
            self.psi_since_BT1 = since_BT1
        else:
            psi_BT1 = self.no_psi_BT1
        if self.size == 1:
            self.recent.append(branch_BTD)
            self.recent_psi.append(psi_BT1)
        else:  # all that is recent is the running block
            source_BTD = self.recent[0] + branch_BTD if self.recent else branch_BTD
            self.recent, self.recent_psi, self.logits = [source_BTD], [self.psi_since_BT1], []
        self.sublayer = sublayer
        if sublayer % self.group:
            self._score()
        else:
            self._fold()
        return self._mix()

    def to(self, device: torch.device) -> None:
        """Move the whole state to `device`."""
        moved = tree_map_only(Tensor, lambda tensor: tensor.to(device), vars(self))
        vars(self).update(moved)

    def _ahead(self, table_R: Tensor) -> list[Tensor]:
        """Of each router: the rows of those that will read the source before it as a recent one."""
        if self.size > 1:
            return list(table_R.split(1))
        ends = [(router // GROUP + 1) * GROUP for router in range(self.R)]
        return [table_R[router:end] for router, end in enumerate(ends)]

    def _rms(self, sources: Tensor) -> Tensor:
        return torch.hypot(torch.linalg.vector_norm(sources, dim=-1, keepdim=True), self.floor)

    def _score(self) -> None:
        """Logits of the newest source, for the routers ahead in its group."""
        source_BTD = self.recent[-1].to(self.dtype)
        logits_BTG = F.linear(source_BTD, self.queries_ahead[self.sublayer])
        rms_BT1 = self._rms(source_BTD)
        if self.signal:
            by_psi_BTG = self.recent_psi[-1] * self.by_psi_ahead[self.sublayer]
            logits_BTG = torch.addcdiv(by_psi_BTG, logits_BTG, rms_BT1)
        else:
            logits_BTG = logits_BTG / rms_BT1
        self.logits.append(logits_BTG.split(1, -1))

    def _fold(self) -> None:
        """Phase one, for the group that begins: the recent sources join the folded ones."""
        fresh = slice(self.folded, self.folded + len(self.recent))
        self.folded = fresh.stop
        self.sources_SBTD[fresh] = torch.stack(self.recent)
        sources_SBTD = self.sources_SBTD[: self.folded]
        precise_SBTD = sources_SBTD.to(self.dtype)
        self.rms_SBT1[fresh] = self._rms(precise_SBTD[fresh])
        group = slice(self.sublayer, self.sublayer + self.group)
        logits_SBTG = F.linear(precise_SBTD, self.queries_RD[group])
        logits_SBTG.div_(self.rms_SBT1[: self.folded])
        if self.signal:
            self.psi_SBT1[fresh] = torch.stack(self.recent_psi) / self.size
            self.psi_sum_BT1 = self.psi_sum_BT1 + self.psi_since_BT1 / self.size
            logits_SBTG.addcmul_(self.psi_SBT1[: self.folded], self.by_psi_R[group])
        mixes_BTGD, lse_BTG = fold_sources(sources_SBTD, logits_SBTG, self.scales_R[group])
        self.mixes, self.folded_logits = mixes_BTGD.unbind(2), lse_BTG.split(1, -1)
        if self.softmax1:
            by_psi_G = self.null_by_psi_R[group] if self.signal else torch.zeros_like(lse_BTG)
            null_BTG = self.psi_sum_BT1 * by_psi_G
            self.folded_logits = torch.stack([lse_BTG, null_BTG], -1).unbind(2)
        self.recent, self.recent_psi, self.logits = [], [], []

    def _mix(self) -> Tensor:
        """Phase two: h_l."""
        router, place = self.sublayer, self.sublayer % self.group
        mixed_BTD, logits_BTC = self.mixes[place], self.folded_logits[place]
        if self.recent or self.softmax1:
            if self.recent and self.softmax1 and self.signal:
                by_since_C = self.by_since[router]
                logits_BTC = torch.addcmul(logits_BTC, self.psi_since_BT1, by_since_C)
            ahead = len(self.logits[-1]) if self.recent else 0
            logits_BTN = torch.cat([logits_BTC, *(logits[-ahead] for logits in self.logits)], -1)
            mixed_BTD = merge_recent(mixed_BTD, self.recent, logits_BTN, self.scales[router])
        return rms_scale(mixed_BTD) if self.unit else mixed_BTD


def fold_sources(
    sources_SBTD: Tensor, logits_SBTR: Tensor, scales_R: Tensor
) -> tuple[Tensor, Tensor]:
    """First phase of inference: R routers read the sources that all of them see, in one pass.

    Returns the softmax mixes, each times its router's scale, `[B, T, R, D]`, and the log-sum-exps
    `[B, T, R]`: to `merge_recent`, a mix is one source with one logit.
    """
    lse_BTR = logits_SBTR.logsumexp(0)
    weights_SBTR = (logits_SBTR - lse_BTR).exp_().mul_(scales_R).to(sources_SBTD.dtype)
    mixes_BTRD = weights_SBTR.permute(1, 2, 3, 0) @ sources_SBTD.permute(1, 2, 0, 3)
    return mixes_BTRD, lse_BTR


def merge_recent(
    mixed_BTD: Tensor, recent: Sequence[Tensor], logits_BTN: Tensor, scale: float
) -> Tensor:
    """Second phase: one router's mix of folded sources joined by recent ones, times `scale`.

    `mixed_BTD` has that scale already.  `logits_BTN` are the log-sum-exp of the folded sources, the
    null's logit for Softmax1, and those of the recent sources.
    """
    weights = logits_BTN.softmax(-1).split(1, -1)
    total = mixed_BTD * weights[0]
    for source_BTD, weight_BT1 in zip(recent, weights[len(weights) - len(recent) :], strict=True):
        total.addcmul_(source_BTD, weight_BT1, value=scale)
    merged: Tensor = total.to(mixed_BTD.dtype)
    return merged
