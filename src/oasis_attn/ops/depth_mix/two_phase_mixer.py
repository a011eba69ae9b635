"""Mixes over depth without gradients, in two phases and with few operations per router.

This is the two-phase inference of Attention Residuals (arXiv 2603.15031), for any block size.
Routers are processed in groups: those of a block, or eight if every sublayer is a source of its
own.  The sources that exist when a group begins are its earlier sources; those that are added
while it runs are its recent sources.

    phase one    when a group begins, one pass over its earlier sources computes a partial mix and
                 a log-sum-exp for each of its routers
    phase two    each router merges its partial mix with the recent sources, by the online softmax

A decoded token needs two mixes per layer, so the number of tensor operations determines the time.
Everything that is known at the start of a forward pass or of a group is computed there, for all
routers at once.

Axes: B batch, T tokens, D width, S sources, R routers, G routers of a group; C logits that do not
belong to a recent source: the log-sum-exp of phase one and, for Softmax1, the depth null's logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from oasis_attn.ops.depth_mix.routers import Routers, rms_scale
from oasis_attn.ops.torch_compat import tree_map_only


class TwoPhaseMixer:
    """Computes the mix of each router in turn.

    The mean of psi over the sources is not subtracted from the logits.  For a softmax it has no
    effect; for Softmax1, -beta mean psi is added to the null's logit instead.
    """

    def __init__(self, embedding_BTD: Tensor, routers: Routers):
        size = self.block_size = routers.block_size
        self.group_size = routers.group_size
        self.softmax1 = routers.normalizer == "softmax1"
        self.signal = routers.beta_R is not None
        self.R, D = routers.queries_RD.shape
        self.dtype = torch.promote_types(embedding_BTD.dtype, torch.float32)
        table = partial(torch.tensor, dtype=self.dtype, device=embedding_BTD.device)

        # g = <v, w> (mean v^2 + eps)^-1/2 = <v, sqrt(D) w> / hypot(|v|, sqrt(D eps))
        self.scaled_queries_RD = routers.queries_RD.to(self.dtype) * D**0.5
        self.queries_of_readers = self._readers(self.scaled_queries_RD)
        self.sqrt_D_eps = table((D * routers.eps) ** 0.5)
        counts = [routers.newest_source(router)[0] + 1 for router in range(self.R)]
        self.rms = routers.mix_scale == "rms"
        self.scales = [routers.scale(count) for count in counts]
        self.scales_R = table(self.scales)
        if routers.beta_R is not None:
            # Factors of psi in the logits of an earlier source, of the null, and of a recent
            # source.  psi_since sums psi over the sublayers since the group began; of an unfinished
            # block, psi is such a sum too, so its factors are divided by the number of members.
            members = table([router % size or 1 for router in range(self.R)])
            self.psi_factor_R = -routers.beta_R.to(self.dtype)
            self.null_factor_R = self.psi_factor_R / table(counts)
            self.psi_factors_of_readers = self._readers(self.psi_factor_R / members)
            null_factor_since_R = self.null_factor_R / members
            factors_RC = torch.stack([torch.zeros_like(members), null_factor_since_R], -1)
            self.since_factors = factors_RC.unbind()

        S, shape = counts[-1], embedding_BTD.shape[:-1]
        self.sources_SBTD = embedding_BTD.new_empty(S, *shape, D)
        self.norms_SBT1 = self.scaled_queries_RD.new_empty(S, *shape, 1)
        self.psi_SBT1 = self.scaled_queries_RD.new_zeros(S, *shape, 1)
        self.no_psi_BT1 = self.psi_since_BT1 = self.psi_sum_BT1 = self.psi_SBT1[0]
        self.router = self.earlier = 0  # the latest router; the number of earlier sources
        self.recent, self.recent_psi = [embedding_BTD], [self.no_psi_BT1]
        self.recent_logits: list[tuple[Tensor, ...]] = []

    def update(self, branch_BTD: Tensor, psi_BT: Tensor | None, router: int) -> Tensor:
        """See `Mixer.update`."""
        if router == 0:
            self._begin_group()
            return self._mix()
        if self.signal:
            psi_BT1 = self.no_psi_BT1 if psi_BT is None else psi_BT.unsqueeze(-1)
            since_BT1 = self.psi_since_BT1 + psi_BT1 if self.recent else psi_BT1
            self.psi_since_BT1 = since_BT1
        else:
            psi_BT1 = self.no_psi_BT1
        if self.block_size == 1:
            self.recent.append(branch_BTD)
            self.recent_psi.append(psi_BT1)
        else:  # the unfinished block is the only recent source
            source_BTD = self.recent[0] + branch_BTD if self.recent else branch_BTD
            self.recent, self.recent_psi = [source_BTD], [self.psi_since_BT1]
            self.recent_logits = []
        self.router = router
        if router % self.group_size:
            self._score_newest()
        else:
            self._begin_group()
        return self._mix()

    def to(self, device: torch.device) -> None:
        """See `Mixer.to`."""
        moved = tree_map_only(Tensor, lambda tensor: tensor.to(device), vars(self))
        vars(self).update(moved)

    def _readers(self, table_R: Tensor) -> list[Tensor]:
        """For each router: the rows of the routers that read its newest source as a recent one."""
        if self.block_size > 1:
            return list(table_R.split(1))
        size = self.group_size
        ends = [(router // size + 1) * size for router in range(self.R)]
        return [table_R[router:end] for router, end in enumerate(ends)]

    def _norms(self, sources: Tensor) -> Tensor:
        """sqrt(D (mean v^2 + eps)), `[..., 1]`."""
        norms = torch.linalg.vector_norm(sources, dim=-1, keepdim=True)
        return torch.hypot(norms, self.sqrt_D_eps)

    def _score_newest(self) -> None:
        """Compute the logits of the newest source, for the routers of this group that read it."""
        source_BTD = self.recent[-1].to(self.dtype)
        logits_BTG = F.linear(source_BTD, self.queries_of_readers[self.router])
        norms_BT1 = self._norms(source_BTD)
        if self.signal:
            by_psi_BTG = self.recent_psi[-1] * self.psi_factors_of_readers[self.router]
            logits_BTG = torch.addcdiv(by_psi_BTG, logits_BTG, norms_BT1)
        else:
            logits_BTG = logits_BTG / norms_BT1
        self.recent_logits.append(logits_BTG.split(1, -1))

    def _begin_group(self) -> None:
        """Phase one: the recent sources become earlier ones, and the group's mixes begin."""
        fresh = slice(self.earlier, self.earlier + len(self.recent))
        self.earlier = fresh.stop
        self.sources_SBTD[fresh] = torch.stack(self.recent)
        sources_SBTD = self.sources_SBTD[: self.earlier]
        precise_SBTD = sources_SBTD.to(self.dtype)
        self.norms_SBT1[fresh] = self._norms(precise_SBTD[fresh])
        group = slice(self.router, self.router + self.group_size)
        logits_SBTG = F.linear(precise_SBTD, self.scaled_queries_RD[group])
        logits_SBTG.div_(self.norms_SBT1[: self.earlier])
        if self.signal:
            self.psi_SBT1[fresh] = torch.stack(self.recent_psi) / self.block_size
            self.psi_sum_BT1 = self.psi_sum_BT1 + self.psi_since_BT1 / self.block_size
            logits_SBTG.addcmul_(self.psi_SBT1[: self.earlier], self.psi_factor_R[group])
        mixes_BTGD, lse_BTG = mix_earlier(sources_SBTD, logits_SBTG, self.scales_R[group])
        self.partial_mixes, self.earlier_logits = mixes_BTGD.unbind(2), lse_BTG.split(1, -1)
        if self.softmax1:
            factor_G = self.null_factor_R[group] if self.signal else torch.zeros_like(lse_BTG)
            null_BTG = self.psi_sum_BT1 * factor_G
            self.earlier_logits = torch.stack([lse_BTG, null_BTG], -1).unbind(2)
        self.recent, self.recent_psi, self.recent_logits = [], [], []

    def _mix(self) -> Tensor:
        """Phase two: the mix of the latest router."""
        router, place = self.router, self.router % self.group_size
        mixed_BTD, logits_BTC = self.partial_mixes[place], self.earlier_logits[place]
        if self.recent or self.softmax1:
            if self.recent and self.softmax1 and self.signal:
                factors_C = self.since_factors[router]
                logits_BTC = torch.addcmul(logits_BTC, self.psi_since_BT1, factors_C)
            # The newest source has logits for this router and the later ones of the group; of an
            # older source, too, this router's logit is so many places before the end.
            readers = len(self.recent_logits[-1]) if self.recent else 0
            recent_logits = (logits[-readers] for logits in self.recent_logits)
            logits_BTN = torch.cat([logits_BTC, *recent_logits], -1)
            mixed_BTD = merge_recent(mixed_BTD, self.recent, logits_BTN, self.scales[router])
        return rms_scale(mixed_BTD) if self.rms else mixed_BTD


def mix_earlier(
    sources_SBTD: Tensor, logits_SBTR: Tensor, scales_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Phase one: the partial mixes of R routers over the same sources, in one pass.

    Returns the softmax mixes, each multiplied by its router's scale, `[B, T, R, D]`, and the
    log-sum-exps `[B, T, R]`.  `merge_recent` treats a partial mix as one source with this logit.
    """
    lse_BTR = logits_SBTR.logsumexp(0)
    weights_SBTR = (logits_SBTR - lse_BTR).exp_().mul_(scales_R).to(sources_SBTD.dtype)
    mixes_BTRD = weights_SBTR.permute(1, 2, 3, 0) @ sources_SBTD.permute(1, 2, 0, 3)
    return mixes_BTRD, lse_BTR


def merge_recent(
    mixed_BTD: Tensor, recent: Sequence[Tensor], logits_BTN: Tensor, scale: float
) -> Tensor:
    """Phase two: the mix of one router, from its partial mix and the recent sources.

    Args:
        mixed_BTD: the partial mix, already multiplied by `scale`.
        recent: the recent sources, `[B, T, D]` each.
        logits_BTN: the log-sum-exp of phase one, the null's logit for Softmax1, and the logit of
            each recent source.
        scale: the router's factor on its mix.
    """
    weights = logits_BTN.softmax(-1).split(1, -1)
    total = mixed_BTD * weights[0]
    for source_BTD, weight_BT1 in zip(recent, weights[len(weights) - len(recent) :], strict=True):
        total.addcmul_(source_BTD, weight_BT1, value=scale)
    merged: Tensor = total.to(mixed_BTD.dtype)
    return merged
