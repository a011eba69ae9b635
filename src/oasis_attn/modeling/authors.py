"""The form of the OASIS authors' own code: sources are states, and routers project them.

Each layer has two routers.  Both read the states x_0 (the embedding), x_1, ... after each layer,
and those within the layer; the last state gives the query.  Names and shapes are those of the
authors' checkpoints.

Axes: B batch, T tokens, D width, A width of the routers' keys, S states so far.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from oasis_attn.modeling.configuration import OasisConfig
from oasis_attn.modeling.residual import Norm, append, coupling, evidence, observed, observers
from oasis_attn.ops.depth_mix import depth_weights, null_shift, row_products, weighted_sum


class KeyProjection(nn.Module):
    """The authors' `k_proj`, `[A, D]`, applied to the query: q . (K y) = (K^T q) . y.

    So the query is projected once, not every state.  It is no `nn.Linear`, for what wraps those
    (adapters, quantisers) would compute K y.
    """

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rank, width))

    def forward(self, query_BTA: Tensor) -> Tensor:
        """K^T q, `[B, T, D]`."""
        return query_BTA @ self.weight


class AuthorsRouter(nn.Module):
    """A router of OASIS's own form: low-rank queries and keys over states, the last one asking.

        score_i = (q_proj(y_last) . k_proj(y_i)) A^-1/2 + recency_bias i / (S - 1) - beta dpsi_i

    Names and shapes are those of the authors' checkpoints.
    """

    def __init__(self, config: OasisConfig):
        super().__init__()
        self.settings = config
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
        for projection in (self.q_proj, self.k_proj):
            init.normal_(projection.weight, std=0.02 / self.rank**0.5)
        init.constant_(self.recency_bias, self.settings.recency_init)
        if self.oasis_beta_raw is not None:
            init.constant_(self.oasis_beta_raw, self.settings.coupling_init)

    @property
    def beta(self) -> Tensor | None:
        """The coupling `[1]`; None without the null signal."""
        return None if self.oasis_beta_raw is None else coupling(self.oasis_beta_raw)

    def forward(self, states: list[Tensor], evidence_BTS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mixed state `[B, T, D]`, its weights `[B, T, S]` and the depth null `[B, T]`."""
        query_BTD = self.k_proj(self.q_proj(states[-1])).to(evidence_BTS.dtype)
        scores = row_products(states, query_BTD) * self.rank**-0.5
        recency = torch.linspace(0, 1, len(states), device=scores.device, dtype=scores.dtype)
        scores = scores + self.recency_bias * recency
        beta = self.beta
        if beta is not None:
            scores = scores + null_shift(evidence_BTS, beta)
        normalizer = self.settings.depth_normalizer
        weights, null_BT = depth_weights(scores.clamp(-50, 50), None, 0.0, normalizer)
        return weighted_sum(states, weights), weights, null_BT


class AuthorsStream:
    """States x_0 (embedding), x_1, ... after each layer; both routers of a layer read them all."""

    def __init__(
        self,
        state: Tensor | tuple[Tensor, ...],
        sublayer: int,
        routers: tuple[AuthorsRouter, AuthorsRouter],
    ):
        self.routers, self.sublayer = routers, sublayer
        self.settings = routers[0].settings
        self.within: list[Tensor] = []  # x + a, while the layer's MLP is awaited
        if isinstance(state, Tensor):
            psi = torch.float64 if state.dtype == torch.float64 else torch.float32
            self.hidden, self.states = state, [state]
            self.evidence_BTS = state.new_zeros(*state.shape[:-1], 1, dtype=psi)
        else:
            self.hidden, self.evidence_BTS, *earlier = state
            self.states = [*earlier, self.hidden]

    def read(self, norm: Norm) -> Tensor:
        return norm(self.hidden)

    def add(self, branch_BTD: Tensor, null_BHT: Tensor | None) -> None:
        """Mix the states so far and those within the layer, each with its layer's psi."""
        after_mlp = bool(self.within)
        if not after_mlp:
            psi_BT = evidence(null_BHT, branch_BTD)
            self.evidence_BTS = append(self.evidence_BTS, psi_BT.to(self.evidence_BTS.dtype))
        self.within = [*self.within, self.hidden + branch_BTD]
        evidence_BTS = self.evidence_BTS
        if after_mlp:
            evidence_BTS = append(evidence_BTS, evidence_BTS[..., -1])
        router = self.routers[after_mlp]
        self.hidden, weights_BTS, null_BT = router([*self.states, *self.within], evidence_BTS)
        if observers:
            place = self.sublayer + after_mlp
            observed(router, place, weights_BTS, null_BT, evidence_BTS, router.beta)
        if after_mlp:
            self.states = [*self.states, self.hidden]

    def packed(self) -> Tensor | tuple[Tensor, ...]:
        if self.sublayer == 2 * (self.settings.num_hidden_layers - 1):
            return self.hidden
        return self.hidden, self.evidence_BTS, *self.states[:-1]
