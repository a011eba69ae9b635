"""Mixes over depth with gradients: the mixer for training.

Axes: B batch, T tokens, D width, S sources, R routers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from oasis_attn.ops.depth_mix.autograd import (
    chained_sum,
    depth_scores,
    depth_weights,
    weighted_sum,
)
from oasis_attn.ops.depth_mix.routers import Routers, rms_scale
from oasis_attn.ops.torch_compat import tensor_version, tree_map_only


class RouterWeights(NamedTuple):
    """The results of one router.

    Attributes:
        weights_BTS: alpha, before `mix_scale`.
        null_BT: the depth null probability; 0 if the depth normalizer has no null.
        psi_BTS: psi of each source; None without the null signal.
    """

    weights_BTS: Tensor
    null_BT: Tensor
    psi_BTS: Tensor | None


class AutogradMixer:
    """Computes the mix of each router in turn, with gradients.

    With activation checkpointing, a layer runs a second time in backward.  Its second run must read
    the same sources as its first run, although `sources` has grown since: it reads the first ones.
    """

    def __init__(self, routers: Routers, *, recompute: bool = False):
        """With `recompute`, `read` computes mixes again in backward instead of storing them."""
        self.routers, self.recompute = routers, recompute
        self.betas = None if routers.beta_R is None else routers.beta_R.unbind()
        self.sources: list[Tensor] = []  # the embedding, then the finished blocks
        # For each source: its scores [B, T] for the routers that read it, earliest router first.
        self.scores: list[tuple[Tensor, ...]] = []
        self.psi_BTS: Tensor | None = None  # psi of each source; None without the null signal
        self.latest = -1  # the latest router so far
        self.latest_weights: RouterWeights | None = None  # its results, in its first run
        # By router: the sum and psi of the unfinished block that is its newest source.
        self._unfinished: dict[int, tuple[Tensor, Tensor | None]] = {}
        # By router, with `recompute`: what its mix is computed from; the mix and its version
        # counter; and whether the first run read the mix unchanged.
        self._saved: dict[int, tuple[list[Tensor], Tensor]] = {}
        self._mixes: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._unchanged: dict[int, bool] = {}

    def update(self, branch_BTD: Tensor, psi_BT: Tensor | None, router: int) -> Tensor:
        """See `Mixer.update`."""
        first_run = router > self.latest
        sources, results = self.weigh(branch_BTD, psi_BT, router)
        weights_BTS = results.weights_BTS
        self.latest_weights = results if first_run else None  # release the graph of a second run
        if self.routers.mix_scale == "sum":
            dropped = self.routers.dropped is not None and self.routers.dropped < len(sources) > 1
            weights_BTS = weights_BTS * self.routers.scale(len(sources) - dropped)
        # An unfinished block is not part of the chain: the addition of the next sublayer reads it
        # too, and only `chained_sum` may read what `chained_sum` returns.
        finished = len(sources) - bool(router % self.routers.block_size)
        mixed_BTD, chained = chained_sum(sources, weights_BTS, finished)
        is_last = router == len(self.routers.queries_RD) - 1  # `read` does not read its mix
        if first_run:
            self.sources = chained
            if self.recompute and not is_last:
                self._saved[router] = [*chained, *sources[finished:]], weights_BTS
        if self.routers.mix_scale == "rms":
            mixed_BTD = rms_scale(mixed_BTD)
        if self.recompute and first_run and not is_last and not torch.compiler.is_compiling():
            self._mixes[router] = weakref.ref(mixed_BTD), tensor_version(mixed_BTD)
        return mixed_BTD

    def weigh(
        self, branch_BTD: Tensor, psi_BT: Tensor | None, router: int
    ) -> tuple[list[Tensor], RouterWeights]:
        """The first half of `update`: the sources that the router reads, and their weights.

        The weights are alpha of Attention Residuals, with g' of OASIS in place of g if the null
        signal is on.
        """
        routers, first_run = self.routers, router > self.latest
        self.latest = max(router, self.latest)
        earlier, members = routers.newest_source(router)  # its index is the number before it
        if routers.beta_R is None:
            psi_BT = None
        elif psi_BT is None:
            psi_BT = branch_BTD.new_zeros(branch_BTD.shape[:-1], dtype=torch.float32)
        if members > 1:
            # Each run of a layer reads the sum inside the layer once; every run reads the sum
            # before the layer.
            take = self._unfinished.__getitem__ if router % 2 else self._unfinished.pop
            sum_BTD, psi_sum_BT = take(router - 1)
            branch_BTD = sum_BTD + branch_BTD
            psi_BT = None if psi_BT is None or psi_sum_BT is None else psi_sum_BT + psi_BT

        # Score a finished source for all routers that will read it, and an unfinished one only for
        # this router.
        finished = router % routers.block_size == 0
        readers = slice(router, None if finished else router + 1)
        scores = depth_scores(branch_BTD, routers.queries_RD[readers], routers.eps).unbind(-1)
        earlier_scores = [
            source_scores[router - source * routers.block_size]
            for source, source_scores in enumerate(self.scores[:earlier])
        ]
        scores_BTS = torch.stack([*earlier_scores, scores[0]], -1)
        psi_BTS = None
        if psi_BT is not None:
            psi_BTS = (psi_BT / members if members > 1 else psi_BT).unsqueeze(-1)
            if self.psi_BTS is not None and earlier:
                # In a second run `self.psi_BTS` has more sources.  `narrow` runs in both, because
                # a checkpointed layer must run the same operations.
                psi_BTS = torch.cat([self.psi_BTS.narrow(-1, 0, earlier), psi_BTS], -1)
        sources = [*self.sources[:earlier], branch_BTD]
        if not finished:
            if first_run or router % 2:
                self._unfinished[router] = branch_BTD, psi_BT
        elif first_run:
            self.sources.append(branch_BTD)
            self.scores.append(scores)
            self.psi_BTS = psi_BTS

        dropped = routers.dropped
        if dropped is not None and dropped < len(sources) > 1:
            is_dropped = torch.arange(len(sources), device=scores_BTS.device) == dropped
            scores_BTS = scores_BTS.masked_fill(is_dropped, -torch.inf)
        beta = 0.0 if self.betas is None else self.betas[router]
        weights_BTS, null_BT = depth_weights(scores_BTS, psi_BTS, beta, routers.normalizer)
        return sources, RouterWeights(weights_BTS, null_BT, psi_BTS)

    def read(self, hidden_BTD: Tensor, norm: Callable[[Tensor], Tensor], router: int) -> Tensor:
        """`norm(hidden)`, without storing the mix and the intermediate results of the norm.

        Backward computes both again from the sources, which are stored in any case.  This needs the
        mix that `update` returned for `router`.  If a hook has replaced or changed it,
        `norm(hidden)` is computed and stored as usual.
        """
        if router not in self._unchanged:
            self._unchanged[router] = self._is_mix(hidden_BTD, router)
        if not self._unchanged[router]:
            return norm(hidden_BTD)
        sources, weights_BTS = self._saved[router]
        rms = self.routers.mix_scale == "rms"
        known = [] if rms else [hidden_BTD.detach()]  # forward takes it, so backward finds none

        def normed(weights_BTS: Tensor, *sources: Tensor) -> Tensor:
            mixed_BTD = weighted_sum(sources, weights_BTS, known.pop() if known else None)
            return norm(rms_scale(mixed_BTD) if rms else mixed_BTD)

        result: Tensor = checkpoint(
            normed, weights_BTS, *sources, use_reentrant=False, preserve_rng_state=False
        )
        return result

    def _is_mix(self, hidden_BTD: Tensor, router: int) -> bool:
        """Whether `hidden_BTD` is the mix of `router`, unchanged and with its gradient."""
        if torch.compiler.is_compiling():
            return router in self._saved
        if router not in self._mixes or not hidden_BTD.requires_grad:
            return False
        mix, version = self._mixes[router]
        return mix() is hidden_BTD and version == tensor_version(hidden_BTD)

    def to(self, device: torch.device) -> None:
        """See `Mixer.to`."""
        self.routers = self.routers.to(device)
        moved = tree_map_only(Tensor, lambda tensor: tensor.to(device), vars(self))
        vars(self).update(moved)
