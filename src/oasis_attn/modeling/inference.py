"""Depth routing without gradients: the same mixes in two phases, a few operations a sublayer.

Routers are taken in groups.  Before the first of a group, one pass over the sources so far gives
the mixes of them all and their log-sum-exps; each router then merges its own with the few sources
that have come since.  (Attention Residuals, arXiv 2603.15031, do so by blocks; here for any size.)

Axes: B batch, T tokens, D width, S sources, R routers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oasis_attn.modeling.residual import DepthStream, Norm, Routing, evidence, observers
from oasis_attn.ops.depth_mix import fold_sources, merge_recent

GROUP = 8


class InferenceStream:
    """Does what `DepthStream` does; layers hand on this object itself, beside the hidden state.

    Attributes:
        sources_SBTD: the finished sources, and after them the running block.
        logits_RBTS: their g - beta psi.  From a router's group on, the place of the last folded
            source holds the log-sum-exp of all folded ones.  The place after the newest source is
            the depth null's: psi is not centred here, which for Softmax1 moves the null's logit
            from 0 to -beta mean psi, and for the softmax changes nothing.
    """

    def __init__(self, embedding_BTD: Tensor, routing: Routing):
        self.queries_RD, self.couplings_R, self.router = routing
        self.settings = self.router.settings
        self.routers = self.queries_RD.shape[0]
        count = 2 + (self.routers - 1) // self.settings.depth_block_size
        B, T, D = embedding_BTD.shape
        self.dtype = torch.promote_types(embedding_BTD.dtype, torch.float32)
        self.sources_SBTD = embedding_BTD.new_empty(count, B, T, D)
        self.logits_RBTS = embedding_BTD.new_zeros(self.routers, B, T, count + 1, dtype=self.dtype)
        self.psi_BT = embedding_BTD.new_zeros(B, T, dtype=self.dtype)  # of the running block
        self.psi_finished_BT = torch.zeros_like(self.psi_BT)  # summed over finished sources
        self.sublayer, self.finished = 0, 1
        self.sources_SBTD[0] = embedding_BTD
        self._score(0)
        self._fold()
        self._mix()

    def read(self, norm: Norm) -> Tensor:
        return norm(self.hidden)

    def add(self, branch_BTD: Tensor, null_BHT: Tensor | None) -> None:
        """See `DepthStream.add`."""
        row, size = self.finished, self.settings.depth_block_size
        members = self.sublayer % size
        source_BTD = self.sources_SBTD[row]
        if members:
            source_BTD += branch_BTD
        else:
            source_BTD.copy_(branch_BTD)
        if self.couplings_R is not None:
            psi_BT = evidence(null_BHT, branch_BTD, self.settings)
            self.psi_BT = (self.psi_BT * members + psi_BT) / (members + 1) if members else psi_BT
        self.sublayer += 1
        self._score(row)
        if members + 1 == size:
            self.finished += 1
            self.psi_finished_BT = self.psi_finished_BT + self.psi_BT
        if self.sublayer % GROUP == 0:
            self._fold()
        self._mix()

    def packed(self) -> Tensor | tuple[Tensor, InferenceStream]:
        return self.hidden if self.sublayer == self.routers - 1 else (self.hidden, self)

    def resume(self, hidden: Tensor, routing: Routing) -> InferenceStream:
        """Go on in the next layer, which may stand on another device."""
        if hidden.device != self.sources_SBTD.device:
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    setattr(self, name, value.to(hidden.device))
        self.hidden = hidden
        self.queries_RD, self.couplings_R, self.router = routing
        return self

    def _score(self, row: int) -> None:
        """The source in `row`, for the routers to come."""
        source_BTD, start = self.sources_SBTD[row].to(self.dtype), self.sublayer
        # F.rms_norm would write the keys out, and on the CPU in many small operations.
        rms_BT1 = torch.linalg.vector_norm(source_BTD, dim=-1, keepdim=True).square_()
        rms_BT1.div_(source_BTD.shape[-1]).add_(self.router.eps).sqrt_()
        logits_BTR = F.linear(source_BTD, self.queries_RD[start:].to(self.dtype)).div_(rms_BT1)
        if self.couplings_R is not None:
            psi_BT1 = self.psi_BT.unsqueeze(-1)
            logits_BTR.addcmul_(psi_BT1, self.couplings_R[start:].to(self.dtype), value=-1)
        self.logits_RBTS[start:, :, :, row] = logits_BTR.movedim(-1, 0)

    def _fold(self) -> None:
        """Phase one, for the group of routers that begins here."""
        self.folded = self.finished
        group = slice(self.sublayer, self.sublayer + GROUP)
        logits = self.logits_RBTS[group, :, :, : self.folded]
        self.mixes_RBTD, lse_RBT = fold_sources(self.sources_SBTD[: self.folded], logits)
        logits[..., -1] = lse_RBT

    def _mix(self) -> None:
        """Phase two: h_l."""
        router = self.sublayer
        partial = router % self.settings.depth_block_size != 0
        rows = self.finished + partial
        softmax1 = self.settings.depth_normalizer == "softmax1"
        logits_BTS = self.logits_RBTS[router, :, :, self.folded - 1 : rows + softmax1]
        if softmax1 and self.couplings_R is not None:
            psi_BT = self.psi_finished_BT + self.psi_BT if partial else self.psi_finished_BT
            logits_BTS[..., -1] = psi_BT * (-self.couplings_R[router] / rows)
        self.hidden = merge_recent(
            self.mixes_RBTD[router % GROUP], self.sources_SBTD[self.folded : rows], logits_BTS
        )
        if self.settings.depth_scale == "sources":
            self.hidden *= rows + softmax1


def depth_stream(
    state: Tensor | tuple, sublayer: int, routing: Routing
) -> DepthStream | InferenceStream:
    """The stream in its form for the moment: differentiable, or in two phases."""
    if isinstance(state, tuple) and isinstance(state[1], InferenceStream):
        return state[1].resume(state[0], routing)
    mergeable = routing.router.settings.depth_normalizer != "sigmoid"
    if isinstance(state, Tensor) and mergeable and not torch.is_grad_enabled() and not observers:
        return InferenceStream(state, routing)
    return DepthStream(state, sublayer, routing)
