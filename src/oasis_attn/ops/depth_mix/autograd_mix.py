"""The mixes over depth of one forward pass, differentiable.

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
    carried_sum,
    depth_scores,
    depth_weights,
    weighted_sum,
)
from oasis_attn.ops.depth_mix.routers import Routers, rms_scale
from oasis_attn.ops.torch_compat import tensor_version, tree_map_only


class RouterWeights(NamedTuple):
    """What one router computed: alpha before any `mix_scale`, the depth null probability, psi.

    `psi_BTS` is None without the null signal.
    """

    weights_BTS: Tensor
    null_BT: Tensor
    psi_BTS: Tensor | None


class AutogradMix:
    """The mix of each router in turn, differentiable.

    A layer may run again in backward (activation checkpointing).  What its sublayers gave the first
    time is kept, and the second run reads what the first run read.
    """

    def __init__(self, routers: Routers, *, recompute: bool = False):
        """`recompute` remembers what was mixed, for `read`."""
        self.routers, self.recompute = routers, recompute
        self.betas = None if routers.beta_R is None else routers.beta_R.unbind()
        self.sources: list[Tensor] = []  # the embedding, then the finished blocks
        # Of each source under the routers that read it, the earliest first, [B, T] each.
        self.scores: list[tuple[Tensor, ...]] = []
        self.psi_BTS: Tensor | None = None  # of each source; None without the null signal
        self.sublayer = -1  # the last one so far
        self.last: RouterWeights | None = None  # of the last router, in its first run
        self._running: dict[int, tuple[Tensor, Tensor | None]] = {}  # of unfinished blocks
        self._kept: dict[int, tuple[list[Tensor], Tensor]] = {}  # see `read`
        self._mixed: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # and the version of each
        self._is_read: dict[int, bool] = {}  # whether a mix was read as it was, in the first run

    def update(self, branch_BTD: Tensor, psi_BT: Tensor | None, sublayer: int) -> Tensor:
        """Take a sublayer's output as a source, and return what the next sublayer reads.

        Args:
            branch_BTD: the output of `sublayer`; of sublayer 0, the embedding.
            psi_BT: its null evidence, float32; None for 0.
            sublayer: 0 to R - 1, in this order.
        """
        first = sublayer > self.sublayer
        sources, found = self.weigh(branch_BTD, psi_BT, sublayer)
        weights_BTS = found.weights_BTS
        self.last = found if first else None  # a second run must not keep its graph alive
        if self.routers.mix_scale == "sum":
            dropped = self.routers.dropped is not None and self.routers.dropped < len(sources) > 1
            weights_BTS = weights_BTS * self.routers.scale(len(sources) - dropped)
        # The running block is not carried: the sum that continues it shares its gradient.
        finished = len(sources) - bool(sublayer % self.routers.block_size)
        mixed_BTD, carried = carried_sum(sources, weights_BTS, finished)
        if first:
            self.sources = carried
            if self.recompute:
                self._kept[sublayer] = [*carried, *sources[finished:]], weights_BTS
        if self.routers.mix_scale == "rms":
            mixed_BTD = rms_scale(mixed_BTD)
        if self.recompute and first and not torch.compiler.is_compiling():
            self._mixed[sublayer] = weakref.ref(mixed_BTD), tensor_version(mixed_BTD)
        return mixed_BTD

    def weigh(
        self, branch_BTD: Tensor, psi_BT: Tensor | None, sublayer: int
    ) -> tuple[list[Tensor], RouterWeights]:
        """The first half of `update`: the sources that the next sublayer reads, and their weights.

        alpha of Attention Residuals, with g' of OASIS for g where the null signal is on.
        """
        routers, first = self.routers, sublayer > self.sublayer
        self.sublayer = max(sublayer, self.sublayer)
        earlier, members = 0, 1
        if sublayer:
            earlier = 1 + (sublayer - 1) // routers.block_size
            members = 1 + (sublayer - 1) % routers.block_size
        signal = routers.beta_R is not None
        if not signal:
            psi_BT = None
        elif psi_BT is None:
            psi_BT = branch_BTD.new_zeros(branch_BTD.shape[:-1], dtype=torch.float32)
        if members > 1:
            # The sum inside a layer is read once a run; the one before a layer, by every run.
            take = self._running.__getitem__ if sublayer % 2 else self._running.pop
            sum_BTD, psi_sum_BT = take(sublayer - 1)
            branch_BTD = sum_BTD + branch_BTD
            psi_BT = None if psi_BT is None or psi_sum_BT is None else psi_sum_BT + psi_BT

        # A finished source is scored for all routers that will read it, an unfinished one for one.
        finished = sublayer % routers.block_size == 0
        ahead = slice(sublayer, None if finished else sublayer + 1)
        scores = depth_scores(branch_BTD, routers.queries_RD[ahead], routers.eps).unbind(-1)
        before = [
            known[sublayer - source * routers.block_size]
            for source, known in enumerate(self.scores[:earlier])
        ]
        scores_BTS = torch.stack([*before, scores[0]], -1)
        psi_BTS = None
        if psi_BT is not None:
            psi_BTS = (psi_BT / members if members > 1 else psi_BT).unsqueeze(-1)
            if self.psi_BTS is not None and earlier:
                # In a layer that runs again there are more, and it must run the same operations.
                psi_BTS = torch.cat([self.psi_BTS.narrow(-1, 0, earlier), psi_BTS], -1)
        sources = [*self.sources[:earlier], branch_BTD]
        if sublayer % routers.block_size:
            if first or sublayer % 2:
                self._running[sublayer] = branch_BTD, psi_BT
        elif first:
            self.sources.append(branch_BTD)
            self.scores.append(scores)
            self.psi_BTS = psi_BTS

        dropped = routers.dropped
        if dropped is not None and dropped < len(sources) > 1:
            is_dropped = torch.arange(len(sources), device=scores_BTS.device) == dropped
            scores_BTS = scores_BTS.masked_fill(is_dropped, -torch.inf)
        beta = 0.0 if self.betas is None else self.betas[sublayer]
        weights = depth_weights(scores_BTS, psi_BTS, beta, routers.normalizer)
        return sources, RouterWeights(*weights, psi_BTS)

    def read(self, hidden_BTD: Tensor, norm: Callable[[Tensor], Tensor], sublayer: int) -> Tensor:
        """`norm(hidden)`; for the mix that `update` returned, nothing in between is kept for
        backward, where the mix and the norm are computed again.

        A hidden state that a hook has replaced or changed is an ordinary input of the norm.
        """
        if sublayer not in self._is_read:
            self._is_read[sublayer] = self._is_mix(hidden_BTD, sublayer)
        if not self._is_read[sublayer]:
            return norm(hidden_BTD)
        sources, weights_BTS = self._kept[sublayer]
        unit = self.routers.mix_scale == "rms"
        known = [] if unit else [hidden_BTD.detach()]  # not in backward

        def normed(weights_BTS: Tensor, *sources: Tensor) -> Tensor:
            mixed_BTD = weighted_sum(sources, weights_BTS, known.pop() if known else None)
            return norm(rms_scale(mixed_BTD) if unit else mixed_BTD)

        result: Tensor = checkpoint(
            normed, weights_BTS, *sources, use_reentrant=False, preserve_rng_state=False
        )
        return result

    def _is_mix(self, hidden_BTD: Tensor, sublayer: int) -> bool:
        """Whether `hidden_BTD` is what `update` returned, as it was and with its gradient."""
        if torch.compiler.is_compiling():
            return sublayer in self._kept
        if sublayer not in self._mixed or not hidden_BTD.requires_grad:
            return False
        mixed, version = self._mixed[sublayer]
        return mixed() is hidden_BTD and version == tensor_version(hidden_BTD)

    def to(self, device: torch.device) -> None:
        """Move the whole state to `device`."""
        self.routers = self.routers.to(device)
        moved = tree_map_only(Tensor, lambda tensor: tensor.to(device), vars(self))
        vars(self).update(moved)
