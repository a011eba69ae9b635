"""Mixes over depth without gradients on CUDA, one kernel a sublayer.

A decoded token passes here twice a layer, and PyTorch takes longer to launch a step of
`TwoPhaseMix` than a GPU to compute it.

Axes: B batch, T tokens, D width, S sources, R routers.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from oasis_attn.ops.depth_mix.routers import Routers
from oasis_attn.ops.torch_compat import tree_map_only


class TritonMix:
    """Every router's mix in turn; `kernels` is the package `triton_kernels`.

    The memory holds all sources, and of each its inverse RMS and the sum of its members' psi.
    """

    def __init__(self, embedding_BTD: Tensor, routers: Routers, kernels: ModuleType):
        self.routers, self.kernels = routers, kernels
        wide = torch.promote_types(embedding_BTD.dtype, torch.float32)
        self.queries = routers.queries_RD.to(wide).contiguous().unbind()
        self.betas = None if routers.beta_R is None else routers.beta_R.to(wide).unbind()
        B, T, D = embedding_BTD.shape
        S = self.source(len(self.queries) - 1)[0] + 1
        self.sources_SBTD = embedding_BTD.new_empty(S, B, T, D)
        self.inverse_rms_SBT = embedding_BTD.new_empty(S, B, T, dtype=wide)
        self.psi_SBT = None if self.betas is None else torch.empty_like(self.inverse_rms_SBT)

    def source(self, sublayer: int) -> tuple[int, int]:
        """The index of the source that `sublayer` adds to, and its members so far."""
        if sublayer == 0:
            return 0, 1
        block, place = divmod(sublayer - 1, self.routers.block_size)
        return 1 + block, 1 + place

    def update(self, branch_BTD: Tensor, psi_BT: Tensor | None, sublayer: int) -> Tensor:
        """See `AutogradMix.update`."""
        source, members = self.source(sublayer)
        mixed_BTD: Tensor = self.kernels.mix(
            branch_BTD,
            psi_BT,
            (self.sources_SBTD, self.inverse_rms_SBT, self.psi_SBT),
            self.queries[sublayer],
            None if self.betas is None else self.betas[sublayer],
            source=source,
            members=members,
            routers=self.routers,
        )
        return mixed_BTD

    def to(self, device: torch.device) -> None:
        """Move the whole state to `device`."""
        moved = tree_map_only(Tensor, lambda tensor: tensor.to(device), vars(self))
        vars(self).update(moved)
