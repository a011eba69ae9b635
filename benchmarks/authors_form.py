"""Depth routing as the code of the OASIS authors computes it: the baseline for speed.

Every router stacks all earlier states and projects each of them to keys; token attention is eager
Softmax1 with a stored map.  Written from the equations in arXiv 2605.17887, for the same Llama
backbone, without grouped-query attention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def softmax1(scores: Tensor) -> Tensor:
    shift = scores.amax(-1, keepdim=True).clamp(min=0)
    exponentials = (scores - shift).exp()
    return exponentials / (exponentials.sum(-1, keepdim=True) + (-shift).exp())


class Router(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        inner = max(width // 4, 64)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.recency_bias = nn.Parameter(torch.zeros(1))
        self.oasis_beta_raw = nn.Parameter(torch.full((1,), -5.0))

    def forward(self, states: list[Tensor], evidence: list[Tensor]) -> Tensor:
        stacked = torch.stack(states, 2)
        query = self.q_proj(states[-1]).unsqueeze(2)
        scores = (query * self.k_proj(stacked)).sum(-1) / math.sqrt(query.shape[-1])
        psi = torch.stack(evidence, -1)
        beta = nn.functional.softplus(self.oasis_beta_raw).clamp(0, 10)
        position = torch.linspace(0, 1, len(states), dtype=stacked.dtype)
        scores = scores + self.recency_bias * position - beta * (psi - psi.mean(-1, keepdim=True))
        weights = softmax1(scores.clamp(-50, 50))
        return (weights.unsqueeze(-1) * stacked).sum(2)


class AuthorsForm(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.backbone = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for layer in self.backbone.layers:
            layer.attn_res_sa = Router(config.hidden_size)
            layer.attn_res_mlp = Router(config.hidden_size)

    def attention(self, layer, x: Tensor, rope) -> tuple[Tensor, Tensor]:
        B, T, _ = x.shape
        module = layer.self_attn
        heads = [p(x).view(B, T, -1, module.head_dim).transpose(1, 2)
                 for p in (module.q_proj, module.k_proj, module.v_proj)]  # fmt: skip
        query, key = apply_rotary_pos_emb(*heads[:2], *rope)
        scores = query @ key.transpose(-1, -2) * module.scaling
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = softmax1(scores.masked_fill(hidden, -torch.inf))
        null = (1 - weights.sum(-1)).mean(1)
        out = (weights @ heads[2]).transpose(1, 2).reshape(B, T, -1)
        return module.o_proj(out), null

    def forward(self, ids: Tensor) -> Tensor:
        x = self.backbone.embed_tokens(ids)
        rope = self.backbone.rotary_emb(x, position_ids=torch.arange(ids.shape[1])[None])
        states, evidence = [x], [torch.zeros(ids.shape)]
        for layer in self.backbone.layers:
            branch, null = self.attention(layer, layer.input_layernorm(x), rope)
            after = x + branch
            x = layer.attn_res_sa([*states, after], [*evidence, null])
            branch = layer.mlp(layer.post_attention_layernorm(x))
            x = layer.attn_res_mlp([*states, after, x + branch], [*evidence, null, null])
            states, evidence = [*states, x], [*evidence, null]
        return self.lm_head(self.backbone.norm(x))
