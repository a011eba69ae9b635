"""The residual stream: a plain sum, or attention over depth that listens to the null signal.

A decoder layer of ours opens the stream it is handed, adds its two branches, and passes it on.  In
depth form (arXiv 2603.15031) the stream is a flat tuple of tensors whose first is the hidden state,
so that any family's own decoder loop carries it from layer to layer, and activation checkpointing,
sharding and device placement treat it as they treat a hidden state.  The last layer hands on the
output router's mix alone.

Axes: B batch, T tokens, D width, S sources so far, R routers (two a layer, and the output's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from oasis_attn.modeling.configuration import OasisConfig
from oasis_attn.ops.depth_mix import (
    carried_sum,
    depth_scores,
    depth_weights,
    null_shift,
    weighted_sum,
)

COUPLING_MAX = 10.0
EVIDENCE_FLOOR = 1e-3
"""The null mass from which on `evidence` "log" grows with its logarithm."""
UNIT_EPS = 1e-12
"""Of `depth_scale` "unit": far below the mean square of any mix that is not zero."""
BRANCH_EPS = {"unit": 1e-6, "bounded": 0.1, "mlp": 1e-6}
"""Of the norm after a branch, by `branch_scale`; as large as families' own, to bound gradients."""
Norm = Callable[[Tensor], Tensor]
observers: list[Callable[[nn.Module, RouterCall], None]] = []


def coupling(raw: Tensor) -> Tensor:
    """beta, positive and bounded, from its raw parameter."""
    return F.softplus(raw).clamp(max=COUPLING_MAX)


class RouterCall(NamedTuple):
    """What one router computed in one forward pass, for measuring.

    `weights_BTS` are alpha as normalised, before any `depth_scale`; source 0 is the embedding, and
    a partial block comes last.  `null_BT` is 0 where the depth normaliser has no null.
    `signal_BTS` is what the null signal added to the logits, None without it.
    """

    router: int
    weights_BTS: Tensor
    null_BT: Tensor
    signal_BTS: Tensor | None


class Routing(NamedTuple):
    """The routers' parameters as layers use them: `queries_RD` has the key-norm gains folded in."""

    queries_RD: Tensor
    couplings_R: Tensor | None
    head_couplings_LH: Tensor | None
    router: DepthRouter

    @classmethod
    def of(cls, router: DepthRouter) -> Routing:
        queries_RD, couplings_R, head_couplings_LH = router()
        return cls(queries_RD, couplings_R, head_couplings_LH, router)

    def on(self, device: torch.device) -> Routing:
        """With its tensors on `device`: layers may be on other devices than the routers."""
        if self.queries_RD.device == device:
            return self
        couplings_R, heads_LH = self.couplings_R, self.head_couplings_LH
        return self._replace(
            queries_RD=self.queries_RD.to(device),
            couplings_R=None if couplings_R is None else couplings_R.to(device),
            head_couplings_LH=None if heads_LH is None else heads_LH.to(device),
        )


class DepthRouter(nn.Module):
    """All routers of a model: router r reads the state before sublayer r, the last one the output.

    They stand together, not in their layers, so that a source is scored for all of them in one
    matrix product, and so that sharding keeps them whole during a forward pass.

    Attributes:
        queries: pseudo-queries w, `[R, D]`, zero at the start.
        key_norm: gain of each router's RMSNorm on its keys, `[R, D]`.
        coupling: beta before softplus, `[R]`; absent without the null signal.
        head_coupling: what psi's heads count for, `[L, H]`, one at the start; where asked for.
    """

    def __init__(self, config: OasisConfig):
        super().__init__()
        self.settings = config
        self.recompute = False  # see OasisPreTrainedModel.recompute_mixes
        self.dropped: int | None = None  # see drop_source
        routers, width = 2 * config.num_hidden_layers + 1, config.hidden_size
        self.queries = nn.Parameter(torch.empty(routers, width))
        self.key_norm = nn.Parameter(torch.empty(routers, width))
        signal = config.null_signal != "off"
        self.coupling = nn.Parameter(torch.empty(routers)) if signal else None
        heads = config.num_hidden_layers, config.num_attention_heads
        by_head = config.coupling == "head"
        self.head_coupling = nn.Parameter(torch.empty(heads)) if by_head else None
        self.eps = getattr(config.text_config, "rms_norm_eps", 1e-6)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero queries: every router starts with equal weights."""
        init.zeros_(self.queries)
        init.ones_(self.key_norm)
        if self.coupling is not None:
            init.constant_(self.coupling, self.settings.coupling_init)
        if self.head_coupling is not None:
            init.ones_(self.head_coupling)

    def forward(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The tensors of a `Routing`; alone, so that hooks for device placement can pass them."""
        couplings = None if self.coupling is None else coupling(self.coupling)
        return self.queries * self.key_norm, couplings, self.head_coupling


class SumStream:
    """x + f_1 + f_2 + ..."""

    def __init__(self, hidden_BTD: Tensor):
        self.hidden = hidden_BTD

    def read(self, norm: Norm) -> Tensor:
        return norm(self.hidden)

    def add(self, branch_BTD: Tensor, _null_BHT: Tensor | None) -> None:
        self.hidden = self.hidden + branch_BTD

    def packed(self) -> Tensor:
        return self.hidden


class DepthStream:
    """Sources (embedding, finished blocks, running block), their scores and their null evidence."""

    def __init__(self, state: Tensor | tuple[Tensor, ...], sublayer: int, routing: Routing):
        self.routing, self.settings = routing, routing.router.settings
        self.unit = self.settings.depth_scale == "unit"
        self.sublayer = sublayer
        self.running: list[Tensor] = []  # the unfinished block's sum and its summed evidence
        if isinstance(state, Tensor):  # the embedding: the first source, of evidence 0
            self.sources: list[Tensor] = []
            self.scores: list[Tensor] = []  # of each source, [R, B, T]
            self.evidence_BTS = state.new_empty(0)
            self._finish(state, state.new_zeros(state.shape[:-1], dtype=torch.float32))
            self._weigh()
            return
        hidden, self.weights_BTS, self.evidence_BTS, *rest = state
        self._hidden: Tensor | None = hidden
        if sublayer % self.settings.depth_block_size:
            self.running, rest = rest[:2], rest[2:]
        self.scores, self.sources = rest[: len(rest) // 2], rest[len(rest) // 2 :]

    @property
    def hidden(self) -> Tensor:
        """What the next sublayer reads: h_l of Attention Residuals."""
        if self._hidden is None:
            # The running block is not carried: the sum that continues it shares its gradient.
            mixed_BTD, self.sources = carried_sum(
                self._mixed(), self.weights_BTS, len(self.sources)
            )
            self._hidden = unit_scale(mixed_BTD) if self.unit else mixed_BTD
        return self._hidden

    def read(self, norm: Norm) -> Tensor:
        """`norm(hidden)`; when recomputing, nothing between the sources and its result is kept."""
        if not (self.routing.router.recompute and torch.is_grad_enabled()):
            return norm(self.hidden)

        def normed(weights_BTS: Tensor, *sources: Tensor) -> Tensor:
            mixed_BTD = weighted_sum(sources, weights_BTS)
            return norm(unit_scale(mixed_BTD) if self.unit else mixed_BTD)

        return checkpoint(
            normed, self.weights_BTS, *self._mixed(), use_reentrant=False, preserve_rng_state=False
        )

    def add(self, branch_BTD: Tensor, null_BHT: Tensor | None) -> None:
        """Append a sublayer's output v, with psi the mean of null over heads; mix anew."""
        evidence_BT = evidence(null_BHT, branch_BTD)
        if self.running:
            branch_BTD = self.running[0] + branch_BTD
            evidence_BT = self.running[1] + evidence_BT
        self.running = [branch_BTD, evidence_BT]
        self.sublayer += 1
        size = self.settings.depth_block_size
        if self.sublayer % size == 0:
            self._finish(branch_BTD, evidence_BT / size)
            self.running = []
        self._weigh()

    def packed(self) -> Tensor | tuple[Tensor, ...]:
        if self.sublayer == self.routing.queries_RD.shape[0] - 1:
            return self.hidden
        state = (self.hidden, self.weights_BTS, self.evidence_BTS, *self.running)
        return *state, *self.scores, *self.sources

    def _mixed(self) -> list[Tensor]:
        return [*self.sources, *self.running[:1]]

    def _finish(self, source_BTD: Tensor, evidence_BT: Tensor) -> None:
        """A source is complete: score it for every router at once."""
        self.sources = [*self.sources, source_BTD]
        scores = depth_scores(source_BTD, self.routing.queries_RD, self.routing.router.eps)
        self.scores = [*self.scores, scores.movedim(-1, 0)]
        self.evidence_BTS = append(self.evidence_BTS, evidence_BT)

    def _weigh(self) -> None:
        """alpha of Attention Residuals, with OASIS's g' for g where the signal is on."""
        router = self.sublayer
        queries_RD, couplings_R, _, module = self.routing
        scores = torch.stack([scores_RBT[router] for scores_RBT in self.scores], -1)
        evidence = self.evidence_BTS
        if self.running:
            running, evidence_BT = self.running
            score = depth_scores(running, queries_RD[router : router + 1], module.eps)
            scores = torch.cat([scores, score], -1)
            evidence = append(evidence, evidence_BT / (router % self.settings.depth_block_size))
        S = scores.shape[-1]
        if module.dropped is not None and module.dropped < S > 1:
            dropped = torch.arange(S, device=scores.device) == module.dropped
            scores, S = scores.masked_fill(dropped, -torch.inf), S - 1
        normalizer = self.settings.depth_normalizer
        beta = None if couplings_R is None else couplings_R[router]
        if beta is None:
            weights_BTS, null_BT = depth_weights(scores, None, 0.0, normalizer)
        else:
            weights_BTS, null_BT = depth_weights(scores, evidence, beta, normalizer)
        if observers:
            observed(module, router, weights_BTS, null_BT, evidence, beta)
        if self.settings.depth_scale == "sources":
            weights_BTS = weights_BTS * {"softmax": S, "softmax1": S + 1, "sigmoid": 2}[normalizer]
        self.weights_BTS, self._hidden = weights_BTS, None


def head_evidence(
    null_BHT: Tensor | None, kind: str, weights_H: Tensor | None, *, shuffled: bool
) -> Tensor | None:
    """What psi is the mean over heads of: see `evidence` and `coupling` of `OasisConfig`.

    `shuffled` permutes the tokens.  It is done once a layer, so that the attention and the MLP of
    a layer share psi as they do without it: only which token it belongs to is lost.
    """
    if null_BHT is None:
        return None
    if kind == "log":
        null_BHT = torch.log1p(null_BHT / EVIDENCE_FLOOR)
    if weights_H is not None:
        null_BHT = null_BHT * weights_H.unsqueeze(-1)
    if shuffled:
        B, _, T = null_BHT.shape
        order = torch.randperm(B * T, device=null_BHT.device)
        null_BHT = null_BHT.transpose(1, 2).flatten(0, 1)[order].unflatten(0, (B, T)).mT
    return null_BHT


def evidence(null_BHT: Tensor | None, branch_BTD: Tensor) -> Tensor:
    """psi `[B, T]` of a branch, the mean over heads; 0 where attention has no null."""
    if null_BHT is None:
        return branch_BTD.new_zeros(branch_BTD.shape[:-1], dtype=torch.float32)
    return null_BHT.mean(1)


def unit_scale(x_BTD: Tensor, eps: float = UNIT_EPS) -> Tensor:
    """x / sqrt(mean x^2 + eps): of a mix with `depth_scale` "unit", or a branch."""
    return F.rms_norm(x_BTD, x_BTD.shape[-1:], eps=eps)


def append(tensor: Tensor, last: Tensor) -> Tensor:
    """`last` as one more column of the last axis; an empty tensor is no columns yet."""
    last = last.unsqueeze(-1)
    return torch.cat([tensor, last], -1) if tensor.numel() else last


def observed(
    module: nn.Module,
    router: int,
    weights_BTS: Tensor,
    null_BT: Tensor,
    evidence_BTS: Tensor,
    beta: Tensor | None,
) -> None:
    signal_BTS = None if beta is None else null_shift(evidence_BTS, beta)
    call = RouterCall(router, weights_BTS, null_BT, signal_BTS)
    for observer in tuple(observers):
        observer(module, call)


@contextmanager
def observe_depth(model: nn.Module, callback: Callable[[RouterCall], None]) -> Iterator[None]:
    """While open, each router of `model` hands what it computed to `callback`."""
    modules = set(model.modules())

    def observer(module: nn.Module, call: RouterCall) -> None:
        if module in modules:
            callback(call)

    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)


@contextmanager
def drop_source(model: nn.Module, source: int | None) -> Iterator[None]:
    """While open, no router of `model` reads `source`, save those that have no other.

    Its logit is -inf, whether it is finished or still running, so that the others share as the
    depth normaliser has it; psi stays centred over all sources.  None drops nothing, in the same
    form of the forward pass.  For residual `depth`.
    """
    routers = [module for module in model.modules() if isinstance(module, DepthRouter)]
    for router in routers:
        router.dropped = source
    try:
        with observe_depth(model, lambda _: None):  # the two-phase form reads all sources
            yield
    finally:
        for router in routers:
            router.dropped = None
