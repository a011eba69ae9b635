"""Tiny models of every family, and variants whose routers have learned something."""

import torch
from transformers import CONFIG_MAPPING

from oasis_attn import OasisConfig, OasisForCausalLM
from oasis_attn.modeling.variants import settings_of

VOCABULARY = 97
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}


def tiny_config(family="llama", **changes):
    keywords = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family in ("mixtral", "qwen3_moe", "olmoe", "gpt_oss"):
        # The grouped kernel for experts has no float64 form.
        keywords |= _MOE | {"moe_intermediate_size": 16, "experts_implementation": "eager"}
    if family == "gpt_oss":
        keywords["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    return CONFIG_MAPPING[family](**keywords | changes)


def tiny_model(variant="oasis", family="llama", seed=0, dtype=torch.float32, text=None, **settings):
    """A model whose routers, sinks and couplings are off their start, so that all parts act."""
    torch.manual_seed(seed)
    text = text or tiny_config(family, initializer_range=0.2)
    model = OasisForCausalLM(OasisConfig(text_config=text, **settings_of(variant) | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "model.depth.coupling":
                parameter.fill_(1.0)
            elif ".depth." in name or "null_logit" in name or "sinks" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.to(dtype).eval()
