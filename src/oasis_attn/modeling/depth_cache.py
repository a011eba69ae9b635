"""The residual of one forward pass: a plain sum, or attention over depth (arXiv 2603.15031).

`OasisModel` creates a depth cache for each forward pass and passes it to its layers, as
transformers passes its key-value cache (`past_key_values`, which this module does not concern).
A layer uses it twice, for attention and for the MLP:

    hidden = cache.start(embedding)                    in the first layer: the mix of router 0
    normed = cache.read(hidden, norm, r)               the input of sublayer r + 1: norm(hidden)
    hidden = cache.update(hidden, branch, psi, r + 1)  its output is added: the mix of router r + 1

The 2L sublayers are numbered from 1: attention of layer 0, MLP of layer 0, attention of layer 1,
and so on; "sublayer 0" is the embedding.  Router r follows sublayer r: it reads the outputs of
sublayers 0 ... r, and its mix is the input of sublayer r + 1.  Router 2L gives the output of the
decoder.  All code counts routers in this way; `oasis_attn.ops.depth_mix` explains the other words.

Axes: B batch, T tokens, D width, S sources so far, R = 2L + 1 routers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import UserError
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.hf_compat import initialization as init
from oasis_attn.ops.depth_mix import (
    AutogradMixer,
    Mixer,
    Routers,
    inference_mixer,
    needs_autograd_mixer,
)
from oasis_attn.ops.depth_mix.autograd import null_shift
from oasis_attn.ops.depth_mix.autograd_mixer import RouterWeights

BETA_MAX = 10.0
Norm = Callable[[Tensor], Tensor]


def beta_of(raw: Tensor) -> Tensor:
    """beta = softplus(raw), at most `BETA_MAX` (OASIS section 3)."""
    return F.softplus(raw).clamp(max=BETA_MAX)


class RouterCall(NamedTuple):
    """The results of one router in one forward pass, for measurements.

    Attributes:
        router: its index r: it reads the outputs of sublayers 0 (the embedding) to r.  With
            `residual="official"` there is no router 0.
        weights_BTS: alpha, before `mix_scale`; source 0 is the embedding, and an unfinished block
            is the last source.
        null_BT: the depth null probability; 0 if the depth normalizer has no null.
        signal_BTS: what the null signal added to the logits; None without the signal.
    """

    router: int
    weights_BTS: Tensor
    null_BT: Tensor
    signal_BTS: Tensor | None

    @classmethod
    def of(cls, router: int, results: RouterWeights, beta: Tensor | None) -> RouterCall:
        """The call of `router`, which has strength `beta` (None without the null signal)."""
        psi_BTS, signal_BTS = results.psi_BTS, None
        if beta is not None and psi_BTS is not None:
            with torch.no_grad():  # a checkpointed layer must not save more than without observers
                signal_BTS = null_shift(psi_BTS, beta)
        return cls(router, results.weights_BTS, results.null_BT, signal_BTS)


class Router(nn.Module):
    """Base class of modules with router parameters; calls `observers` with each `RouterCall`."""

    def __init__(self) -> None:
        super().__init__()
        self.observers: list[Callable[[RouterCall], None]] = []

    def observed(self, call: RouterCall) -> None:
        for observer in tuple(self.observers):
            observer(call)


class DepthRouter(Router):
    """The parameters of all routers of a model.

    They are in one module, not in the layers, for two reasons: one matrix product scores a source
    for all routers, and sharding (FSDP2) keeps them gathered during the whole forward pass.

    Attributes:
        queries: pseudo-queries w, `[R, D]`; initially zero, so that all weights are equal.
        key_norm: gain of each router's RMSNorm on its keys, `[R, D]`.
        beta_raw: beta before the softplus, `[R]`; None without the null signal.
    """

    def __init__(self, config: OasisConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # see OasisPreTrainedModel.recompute_mixes
        self.dropped: int | None = None  # see drop_source
        routers, width = 2 * config.num_hidden_layers + 1, config.hidden_size
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.queries = nn.Parameter(torch.empty(routers, width, dtype=dtype))
        self.key_norm = nn.Parameter(torch.empty(routers, width, dtype=dtype))
        signal = config.null_signal != "off"
        self.beta_raw = nn.Parameter(torch.empty(routers, dtype=dtype)) if signal else None
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
    """The residual sum x + f_1 + f_2 + ...; it has no state."""

    def to(self, device: torch.device) -> None:
        """Nothing to move."""

    def start(self, embedding_BTD: Tensor) -> Tensor:
        """The hidden state that sublayer 1 reads, from the embedding (router 0)."""
        return embedding_BTD

    def read(self, hidden_BTD: Tensor, norm: Norm, router: int) -> Tensor:  # noqa: ARG002
        """`norm(hidden)`, the input of sublayer `router + 1`; `hidden` is the mix of `router`."""
        return norm(hidden_BTD)

    def update(
        self,
        hidden_BTD: Tensor,
        branch_BTD: Tensor,
        psi_BT: Tensor | None,  # noqa: ARG002
        router: int,  # noqa: ARG002
    ) -> Tensor:
        """Add the output of sublayer `router` (1 to 2L), and return the mix of `router`.

        Args:
            hidden_BTD: the hidden state that the sublayer read, before its norm.
            branch_BTD: the output of the sublayer.
            psi_BT: its null evidence, float32; None for 0.
            router: the index of the router, which is that of the sublayer.

        Returns:
            `[B, T, D]`: the hidden state that sublayer `router + 1` reads before its norm, or the
            output of the last layer.
        """
        return hidden_BTD + branch_BTD


class DepthCache(SumCache):
    """Attention over depth: stores the outputs of the sublayers, and each router mixes them.

    The mixer, which computes the mixes, is chosen once per forward pass: see
    `oasis_attn.ops.depth_mix`.  Observers change neither this choice nor the result.
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
        self.recompute = router.recompute and torch.is_grad_enabled()
        # `AutogradMixer` is created here, not in `start`: torch.compile cannot track an object that
        # is created inside a checkpointed layer.
        self.mixer: Mixer | None = None
        if needs_autograd_mixer(self.routers):
            self.mixer = AutogradMixer(self.routers, recompute=self.recompute)
        # Computes the weights for observers if `mixer` does not return them.
        self.observer_mixer: AutogradMixer | None = None

    def to(self, device: torch.device) -> None:
        """Move the state to a layer's device."""
        if self.routers.queries_RD.device != device:
            self.routers = self.routers.to(device)
            for mixer in (self.mixer, self.observer_mixer):
                if mixer is not None:
                    mixer.to(device)

    def start(self, embedding_BTD: Tensor) -> Tensor:
        if self.mixer is None:
            self.mixer = inference_mixer(embedding_BTD, self.routers, one_device=self.one_device)
            if self.observers:
                self.observer_mixer = AutogradMixer(self.routers)
        return self.update(embedding_BTD, embedding_BTD, None, 0)

    def read(self, hidden_BTD: Tensor, norm: Norm, router: int) -> Tensor:
        if self.recompute and isinstance(self.mixer, AutogradMixer):
            return self.mixer.read(hidden_BTD, norm, router)
        return norm(hidden_BTD)

    def update(
        self,
        hidden_BTD: Tensor,  # noqa: ARG002
        branch_BTD: Tensor,
        psi_BT: Tensor | None,
        router: int,
    ) -> Tensor:
        assert self.mixer is not None, "update before start"
        mixed_BTD = self.mixer.update(branch_BTD, psi_BT, router)
        if self.observers or self.observer_mixer is not None:
            self._observe(branch_BTD, psi_BT, router)
        return mixed_BTD

    def _observe(self, branch_BTD: Tensor, psi_BT: Tensor | None, router: int) -> None:
        results = None
        if isinstance(self.mixer, AutogradMixer):
            results = self.mixer.latest_weights
        elif self.observer_mixer is not None:
            _, results = self.observer_mixer.weigh(branch_BTD, psi_BT, router)
        else:
            raise UserError(
                "model: observe_depth was opened in the middle of a forward pass without gradients;"
                " open it before the pass"
            )
        if results is not None:
            beta_R = self.routers.beta_R
            beta = None if beta_R is None else beta_R[router]
            self.observed(RouterCall.of(router, results, beta))


@contextmanager
def observe_depth(model: nn.Module, callback: Callable[[RouterCall], None]) -> Iterator[None]:
    """Context in which `callback` receives every router call of `model`.

    Raises:
        UserError: by a forward pass without gradients that was already running, because its earlier
            sources are unknown.
    """
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
    """Context in which no router of `model` reads `source`, except routers with no other source.

    The logit of the source is -inf, whether its block is finished or not, and the depth normalizer
    weighs the remaining sources; the mean of psi is still over all sources.  None drops nothing,
    but uses the same mixer, so that results can be compared.  It has an effect with residual
    `depth` only.
    """
    routers = [module for module in model.modules() if isinstance(module, DepthRouter)]
    for router in routers:
        router.dropped = len(router.queries) if source is None else source  # no such source
    try:
        yield
    finally:
        for router in routers:
            router.dropped = None


@contextmanager
def null_signal_off(model: PreTrainedModel) -> Iterator[None]:
    """Context in which the OASIS model computes with psi = 0 for every source."""
    config: Any = model.config
    signal, config.null_signal = config.null_signal, "off"
    try:
        yield
    finally:
        config.null_signal = signal
