"""What every implementation of the mix over depth is made from."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RMS_EPS = 1e-12
"""Of mixes brought to unit scale: far below the mean square of any mix that is not zero."""


class Routers(NamedTuple):
    """The routers of a model in one forward pass.

    Router r reads the sources before sublayer r + 1; the last one gives the output.

    Attributes:
        queries_RD: pseudo-queries, the gains of the key norms folded in.
        beta_R: strength of the null signal; None switches it off.
        eps: of the RMSNorm on the keys.
        block_size: sublayers per source.
        normalizer: over depth: `softmax`, `softmax1` or `sigmoid`.
        mix_scale: `none`; `sum` multiplies a mix by the number of its sources (plus 1 for
            `softmax1`; by 2 for `sigmoid`), so that zero queries give the residual sum; `rms`
            divides it by its root mean square.
        dropped: a source that no router reads, save those that have no other; None for none.
    """

    queries_RD: Tensor
    beta_R: Tensor | None
    eps: float
    block_size: int = 1
    normalizer: str = "softmax"
    mix_scale: str = "none"
    dropped: int | None = None

    def to(self, device: torch.device) -> Routers:
        """With its tensors on `device`."""
        beta_R = None if self.beta_R is None else self.beta_R.to(device)
        return self._replace(queries_RD=self.queries_RD.to(device), beta_R=beta_R)

    def scale(self, sources: int) -> int:
        """The factor on a mix of `sources` sources."""
        if self.mix_scale != "sum":
            return 1
        return {"softmax": sources, "softmax1": sources + 1, "sigmoid": 2}[self.normalizer]


def rms_scale(x_BTD: Tensor, eps: float = RMS_EPS) -> Tensor:
    """x / sqrt(mean x^2 + eps) over the width."""
    return F.rms_norm(x_BTD, x_BTD.shape[-1:], eps=eps)
