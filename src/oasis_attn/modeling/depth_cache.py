"""The residual of one forward pass: a plain sum, or attention over depth (arXiv 2603.15031).

A cache is made for each forward pass and handed to the layers as a keyword argument; layers take
and return plain hidden states `[B, T, D]`.  Before a sublayer's norm, `read` gives its input; after
the sublayer, `update` takes its output and returns what the next sublayer reads.

Axes: B batch, T tokens, D width, S sources so far, R routers (two a layer, and the output's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.hf_compat import initialization as init
from oasis_attn.ops.depth_mix import AutogradMix, Mix, inference_mix, needs_autograd_mix
from oasis_attn.ops.depth_mix.autograd import null_shift
from oasis_attn.ops.depth_mix.autograd_mix import RouterWeights
from oasis_attn.ops.depth_mix.routers import Routers

BETA_MAX = 10.0
Norm = Callable[[Tensor], Tensor]


def beta_of(raw: Tensor) -> Tensor:
    """beta from its raw parameter: softplus, at most `BETA_MAX` (OASIS section 3)."""
    return F.softplus(raw).clamp(max=BETA_MAX)


class RouterCall(NamedTuple):
    """What one router computed in one forward pass, for measuring.

    `weights_BTS` are alpha before any `mix_scale`; source 0 is the embedding, and a partial block
    comes last.  `null_BT` is 0 where the depth normalizer has no null.  `signal_BTS` is what the
    null signal added to the logits; None without it.
    """

    router: int
    weights_BTS: Tensor
    null_BT: Tensor
    signal_BTS: Tensor | None

    @classmethod
    def of(cls, router: int, found: RouterWeights, beta: Tensor | None) -> RouterCall:
        psi_BTS, signal_BTS = found.psi_BTS, None
        if beta is not None and psi_BTS is not None:
            with torch.no_grad():  # a checkpointed layer must keep as much as without observers
                signal_BTS = null_shift(psi_BTS, beta)
        return cls(router, found.weights_BTS, found.null_BT, signal_BTS)


class Router(nn.Module):
    """Parameters that weigh sources; `observers` are called with each `RouterCall`."""

    def __init__(self) -> None:
        super().__init__()
        self.observers: list[Callable[[RouterCall], None]] = []

    def observed(self, call: RouterCall) -> None:
        for observer in tuple(self.observers):
            observer(call)


class DepthRouter(Router):
    """All routers of a model: router r reads the sources before sublayer r + 1, the last one gives
    the output.

    They are in one module, not in their layers, so that a source is scored for all of them in one
    matrix product, and so that sharding keeps them whole during a forward pass.

    Attributes:
        queries: pseudo-queries w, `[R, D]`, initially zero: equal weights.
        key_norm: gain of each router's RMSNorm on its keys, `[R, D]`.
        beta_raw: beta before softplus, `[R]`; absent without the null signal.
    """

    def __init__(self, config: OasisConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # see OasisPreTrainedModel.recompute_mixes
        self.dropped: int | None = None  # see drop_source
        routers, width = 2 * config.num_hidden_layers + 1, config.hidden_size
        self.queries = nn.Parameter(torch.empty(routers, width))
        self.key_norm = nn.Parameter(torch.empty(routers, width))
        signal = config.null_signal != "off"
        self.beta_raw = nn.Parameter(torch.empty(routers)) if signal else None
        self.eps = getattr(config.text_config, "rms_norm_eps", 1e-6)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Equal weights, and beta at its initial value."""
        init.zeros_(self.queries)
        init.ones_(self.key_norm)
        if self.beta_raw is not None:
            init.constant_(self.beta_raw, self.config.beta_init)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """The tensors of `Routers`: in `forward`, so that hooks for device placement see them."""
        beta_R = None if self.beta_raw is None else beta_of(self.beta_raw)
        return self.queries * self.key_norm, beta_R


class SumCache:
    """x + f_1 + f_2 + ...; it has no state."""

    def to(self, device: torch.device) -> None:
        """Nothing to move."""

    def start(self, embedding_BTD: Tensor) -> Tensor:
        """What the first sublayer reads."""
        return embedding_BTD

    def read(self, hidden_BTD: Tensor, norm: Norm, sublayer: int) -> Tensor:  # noqa: ARG002
        """`norm(hidden)`, the input of the sublayer after `sublayer`."""
        return norm(hidden_BTD)

    def update(
        self,
        hidden_BTD: Tensor,
        branch_BTD: Tensor,
        psi_BT: Tensor | None,  # noqa: ARG002
        sublayer: int,  # noqa: ARG002
    ) -> Tensor:
        """Take the output of `sublayer` (1 to 2L), and return what the next sublayer reads.

        Args:
            hidden_BTD: what the sublayer read, before its norm.
            branch_BTD: its output.
            psi_BT: its null evidence, float32; None for 0.
        """
        return hidden_BTD + branch_BTD


class DepthCache(SumCache):
    """The sublayers' outputs as sources; each router mixes those before it.

    How the mix is computed is chosen once: see `oasis_attn.ops.depth_mix`.  Observers change
    neither that choice nor the result.
    """

    def __init__(self, router: DepthRouter, *, one_device: bool = True):
        queries_RD, beta_R = router()
        config = router.config
        self.observed, self.observers = router.observed, router.observers
        self.one_device = one_device
        self.routers = Routers(
            queries_RD,
            beta_R,
            router.eps,
            config.depth_block_size,
            config.depth_normalizer,
            config.mix_scale,
            router.dropped,
        )
        # Created here, not in the first layer: torch.compile cannot track an object that is created
        # inside a checkpointed layer.
        autograd = needs_autograd_mix(self.routers)
        self.recompute = router.recompute and torch.is_grad_enabled()
        self.mix: Mix | None = None
        if autograd:
            self.mix = AutogradMix(self.routers, recompute=self.recompute)
        self.weights: AutogradMix | None = None  # for observers of a mix that shows no weights

    def to(self, device: torch.device) -> None:
        """Move the state to a layer's device."""
        if self.routers.queries_RD.device != device:
            self.routers = self.routers.to(device)
            for state in (self.mix, self.weights):
                if state is not None:
                    state.to(device)

    def start(self, embedding_BTD: Tensor) -> Tensor:
        if self.mix is None:
            self.mix = inference_mix(embedding_BTD, self.routers, one_device=self.one_device)
            if self.observers:
                self.weights = AutogradMix(self.routers)
        return self.update(embedding_BTD, embedding_BTD, None, 0)

    def read(self, hidden_BTD: Tensor, norm: Norm, sublayer: int) -> Tensor:
        if self.recompute and isinstance(self.mix, AutogradMix):
            return self.mix.read(hidden_BTD, norm, sublayer)
        return norm(hidden_BTD)

    def update(
        self,
        hidden_BTD: Tensor,  # noqa: ARG002
        branch_BTD: Tensor,
        psi_BT: Tensor | None,
        sublayer: int,
    ) -> Tensor:
        assert self.mix is not None, "update before start"
        mixed_BTD = self.mix.update(branch_BTD, psi_BT, sublayer)
        if self.observers:
            self._observe(branch_BTD, psi_BT, sublayer)
        return mixed_BTD

    def _observe(self, branch_BTD: Tensor, psi_BT: Tensor | None, sublayer: int) -> None:
        found = None
        if isinstance(self.mix, AutogradMix):
            found = self.mix.last
        elif self.weights is not None:
            _, found = self.weights.weigh(branch_BTD, psi_BT, sublayer)
        if found is not None:
            beta_R = self.routers.beta_R
            beta = None if beta_R is None else beta_R[sublayer]
            self.observed(RouterCall.of(sublayer, found, beta))


@contextmanager
def observe_depth(model: nn.Module, callback: Callable[[RouterCall], None]) -> Iterator[None]:
    """While open, each router of `model` hands what it computed to `callback`."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        router.observers.append(callback)
    try:
        yield
    finally:
        for router in routers:
            router.observers.remove(callback)


@contextmanager
def drop_source(model: nn.Module, source: int | None) -> Iterator[None]:
    """While open, no router of `model` reads `source`, save those that have no other.

    Its logit is -inf, whether its block is finished or not, so that the others share as the depth
    normalizer has it; psi stays centered over all sources.  None drops nothing, in the same
    implementation of the mix.  For residual `depth`.
    """
    routers = [module for module in model.modules() if isinstance(module, DepthRouter)]
    for router in routers:
        router.dropped = len(router.queries) if source is None else source  # no source has that
    try:
        yield
    finally:
        for router in routers:
            router.dropped = None
