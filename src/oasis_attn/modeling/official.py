"""The form of the OASIS authors' public code: sources are hidden states, and routers project them.

Each layer has two routers.  Both read the states x_0 (the embedding), x_1, ... after each layer,
and those inside the layer; the last state gives the query.  Names and shapes are those of the
authors' checkpoints.

Axes: B batch, T tokens, D width, A width of the routers' keys, S states so far.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from oasis_attn.errors import UserError
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.depth_cache import Router, RouterCall, SumCache, beta_of
from oasis_attn.modeling.hf_compat import initialization as init
from oasis_attn.ops.depth_mix.autograd import (
    depth_weights,
    null_shift,
    row_products,
    weighted_sum,
)
from oasis_attn.ops.depth_mix.autograd_mix import RouterWeights


class KeyProjection(nn.Module):
    """The authors' `k_proj`, `[A, D]`, applied to the query: q . (K y) = (K^T q) . y.

    So the query is projected once, and not every state.  It is no `nn.Linear`, because what wraps
    those (adapters, quantizers) would compute K y.
    """

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rank, width))

    def forward(self, query_BTA: Tensor) -> Tensor:
        """K^T q, `[B, T, D]`."""
        return query_BTA @ self.weight


class OfficialRouter(Router):
    """A router with low-rank queries and keys over states, of which the last one gives the query.

    score_i = (q_proj(y_last) . k_proj(y_i)) A^-1/2 + recency_bias i / (S - 1) - beta dpsi_i
    """

    def __init__(self, config: OasisConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.rank = max(width // 4, 64)
        self.q_proj = nn.Linear(width, self.rank, bias=False)
        self.k_proj = KeyProjection(width, self.rank)
        self.recency_bias = nn.Parameter(torch.empty(1))
        signal = config.null_signal != "off"
        self.oasis_beta_raw = nn.Parameter(torch.empty(1)) if signal else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the authors' code: no bias towards late states (one of its two files has 8.0)."""
        for projection in (self.q_proj, self.k_proj):
            init.normal_(projection.weight, std=0.02 / self.rank**0.5)
        init.zeros_(self.recency_bias)
        if self.oasis_beta_raw is not None:
            init.constant_(self.oasis_beta_raw, self.config.beta_init)

    @property
    def beta(self) -> Tensor | None:
        """`[1]`; None without the null signal."""
        return None if self.oasis_beta_raw is None else beta_of(self.oasis_beta_raw)

    def forward(self, states: list[Tensor], psi_BTS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mixed state `[B, T, D]`, its weights `[B, T, S]` and the depth null `[B, T]`."""
        query_BTD = self.k_proj(self.q_proj(states[-1])).to(psi_BTS.dtype)
        scores = row_products(states, query_BTD) * self.rank**-0.5
        recency = torch.linspace(0, 1, len(states), device=scores.device, dtype=scores.dtype)
        scores = scores + self.recency_bias * recency
        beta = self.beta
        if beta is not None:
            scores = scores + null_shift(psi_BTS, beta)
        normalizer = self.config.depth_normalizer
        weights, null_BT = depth_weights(scores.clamp(-50, 50), None, 0.0, normalizer)
        return weighted_sum(states, weights), weights, null_BT


class OfficialCache(SumCache):
    """States x_0 (the embedding), x_1, ... after each layer; both routers of a layer read them all.

    A layer may run again in backward: what it reads of the layers before it stays as it was.
    """

    def __init__(self, routers: list[tuple[OfficialRouter, OfficialRouter]]):
        self.routers = routers  # of each layer: after attention, after the MLP
        self.states: dict[int, Tensor] = {}  # by layer: what it reads
        self.psi: dict[int, Tensor] = {}  # by layer
        self.sublayer = 0  # the last one so far
        self.given: Tensor | None = None  # psi of the layer's attention, as given
        self.inside: Tensor | None = None  # x + a, between attention and MLP

    def to(self, device: torch.device) -> None:
        if self.states and self.states[0].device != device:
            for tensors in (self.states, self.psi):
                tensors.update({layer: tensor.to(device) for layer, tensor in tensors.items()})

    def update(
        self, hidden_BTD: Tensor, branch_BTD: Tensor, psi_BT: Tensor | None, sublayer: int
    ) -> Tensor:
        """Mix the states so far and those inside the layer, each with its layer's psi."""
        layer, after_mlp = divmod(sublayer - 1, 2)
        first, self.sublayer = sublayer > self.sublayer, max(sublayer, self.sublayer)
        if not after_mlp:
            self.given = psi_BT
        elif psi_BT is not self.given:
            raise UserError(
                "null_signal: with residual 'official' the attention and the MLP of a layer share"
                " psi; it must return one tensor"
            )
        if layer not in self.states:
            precise = torch.float64 if hidden_BTD.dtype == torch.float64 else torch.float32
            zero_BT = hidden_BTD.new_zeros(hidden_BTD.shape[:-1], dtype=precise)
            self.psi[layer] = zero_BT if psi_BT is None else psi_BT.to(precise)
            self.states[layer] = hidden_BTD
        states = [self.states[earlier] for earlier in range(layer + 1)]
        psi = [torch.zeros_like(self.psi[layer]), *(self.psi[k] for k in range(layer + 1))]
        after_BTD = hidden_BTD + branch_BTD
        if after_mlp:
            assert self.inside is not None, "the MLP's update before the attention's"
            states, psi = [*states, self.inside], [*psi, self.psi[layer]]
            self.inside = None
        else:
            self.inside = after_BTD
        psi_BTS = torch.stack(psi, -1)
        router = self.routers[layer][after_mlp]
        mixed_BTD: Tensor
        mixed_BTD, weights_BTS, null_BT = router([*states, after_BTD], psi_BTS)
        if router.observers and first:
            found = RouterWeights(weights_BTS, null_BT, psi_BTS)
            with torch.no_grad():
                beta = router.beta
            router.observed(RouterCall.of(sublayer - 1, found, beta))
        return mixed_BTD
