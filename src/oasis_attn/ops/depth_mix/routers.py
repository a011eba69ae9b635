"""The parameters of all routers of a model, as every mixer receives them, and what a mixer is."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

RMS_EPS = 1e-12
"""The eps of `mix_scale="rms"`: far below the mean square of any mix that is not zero."""

GROUP = 8
"""Routers in one group of the two-phase mixers, if each sublayer is a source of its own."""


class Routers(NamedTuple):
    """The routers of a model in one forward pass.

    Router r = 0 ... R - 1 reads the sources that exist after sublayer r; sublayer 0 is the
    embedding.  Its mix is the input of sublayer r + 1, and that of the last router is the output of
    the decoder.

    Attributes:
        queries_RD: pseudo-queries, multiplied by the gains of the key norms.
        beta_R: strength of the null signal; None switches the signal off.
        eps: of the RMSNorm on the keys.
        block_size: sublayers per source.
        normalizer: over depth: `softmax`, `softmax1` or `sigmoid`.
        mix_scale: `none`; `sum` multiplies a mix by the number of its sources (plus 1 for
            `softmax1`; by 2 for `sigmoid`), so that zero queries give the residual sum; `rms`
            divides it by its root mean square.
        dropped: a source that no router reads, except routers that have no other source; None drops
            nothing.
    """

    queries_RD: Tensor
    beta_R: Tensor | None
    eps: float
    block_size: int = 1
    normalizer: str = "softmax"
    mix_scale: str = "none"
    dropped: int | None = None

    def to(self, device: torch.device) -> Routers:
        """Return a copy with its tensors on `device`."""
        beta_R = None if self.beta_R is None else self.beta_R.to(device)
        return self._replace(queries_RD=self.queries_RD.to(device), beta_R=beta_R)

    @property
    def group_size(self) -> int:
        """How many routers a two-phase mixer prepares at once: those of a block, or `GROUP`."""
        return self.block_size if self.block_size > 1 else GROUP

    def newest_source(self, router: int) -> tuple[int, int]:
        """Index of the newest source that `router` reads, and the number of sublayers in it."""
        if router == 0:
            return 0, 1
        block, place = divmod(router - 1, self.block_size)
        return 1 + block, 1 + place

    def scale(self, sources: int) -> int:
        """The factor on a mix of `sources` sources."""
        if self.mix_scale != "sum":
            return 1
        return {"softmax": sources, "softmax1": sources + 1, "sigmoid": 2}[self.normalizer]


class Mixer(Protocol):
    """Holds the sources of one forward pass and computes the mix of each router in turn."""

    def update(self, branch_BTD: Tensor, psi_BT: Tensor | None, router: int) -> Tensor:
        """Add the output of sublayer `router` to the sources, and return the mix of the router.

        Args:
            branch_BTD: output of sublayer `router`; sublayer 0 is the embedding.
            psi_BT: its null evidence, float32; None for 0.
            router: 0 to R - 1, in this order.

        Returns:
            `[B, T, D]`: the input of sublayer `router + 1`, or the output of the decoder.
        """

    def to(self, device: torch.device) -> None:
        """Move the whole state to `device`."""


def rms_scale(x_BTD: Tensor, eps: float = RMS_EPS) -> Tensor:
    """x / sqrt(mean x^2 + eps) over the width."""
    return F.rms_norm(x_BTD, x_BTD.shape[-1:], eps=eps)
