"""Tiny random decoders in float64, large enough in scale to have peaked attention and outliers."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from oasis_attn import OasisConfig, OasisForCausalLM, variants

VOCABULARY = 50
_SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZE),
    "qwen3": Qwen3Config(**_SIZE),
    "gemma2": Gemma2Config(**_SIZE, sliding_window=16, query_pre_attn_scalar=8),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2,
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=3,
        num_attention_heads=4, word_embed_proj_dim=32, init_std=0.3, max_position_embeddings=256,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **_SIZE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}  # fmt: skip


def native(family: str, attention: str | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation=attention)
    if family == "qwen3_moe":
        model.set_experts_implementation("eager")  # the fused one has no float64
    return model.double().eval()


def ours(variant: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = OasisConfig(text_config=CONFIGS["llama"], **variants()[variant])
    model = OasisForCausalLM(config).double().eval()
    if config.residual == "depth":
        torch.nn.init.normal_(model.model.depth.queries)
    return model


def tokens(windows: int = 3, length: int = 70) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, VOCABULARY, (windows, length))
