"""Mixes over depth without gradients on CUDA, with one kernel call per router.

A decoded token needs two mixes per layer.  PyTorch takes longer to launch one step of
`TwoPhaseMixer` than a GPU takes to compute it.

Axes: B batch, T tokens, D width, S sources, R routers.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from oasis_attn.ops.depth_mix.routers import Routers
from oasis_attn.ops.torch_compat import tree_map_only


class TritonMixer:
    """Computes the mix of each router in turn; `kernels` is the package `triton_kernels`.

    It stores all sources and, for each source, its inverse RMS and the sum of psi over its
    sublayers.
    """

    def __init__(self, embedding_BTD: Tensor, routers: Routers, kernels: ModuleType):
        self.routers, self.kernels = routers, kernels
        wide = torch.promote_types(embedding_BTD.dtype, torch.float32)
        self.queries = routers.queries_RD.to(wide).contiguous().unbind()
        self.betas = None if routers.beta_R is None else routers.beta_R.to(wide).unbind()
        B, T, D = embedding_BTD.shape
        S = routers.newest_source(len(self.queries) - 1)[0] + 1
        self.sources_SBTD = embedding_BTD.new_empty(S, B, T, D)
        self.inverse_rms_SBT = embedding_BTD.new_empty(S, B, T, dtype=wide)
        self.psi_SBT = None if self.betas is None else torch.empty_like(self.inverse_rms_SBT)

    def update(self, branch_BTD: Tensor, psi_BT: Tensor | None, router: int) -> Tensor:
        """See `Mixer.update`."""
        source, members = self.routers.newest_source(router)
        mixed_BTD: Tensor = self.kernels.mix(
            branch_BTD,
            psi_BT,
            (self.sources_SBTD, self.inverse_rms_SBT, self.psi_SBT),
            self.queries[router],
            None if self.betas is None else self.betas[router],
            source=source,
            members=members,
            routers=self.routers,
        )
        return mixed_BTD

    def to(self, device: torch.device) -> None:
        """See `Mixer.to`."""
        moved = tree_map_only(Tensor, lambda tensor: tensor.to(device), vars(self))
        vars(self).update(moved)
