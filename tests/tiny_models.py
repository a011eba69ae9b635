"""Tiny models of every family and variant, with random weights, and a tokenizer for them."""

import dataclasses

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from oasis_attn import OasisConfig, OasisForCausalLM
from oasis_attn.modeling.variants import settings_of

VOCABULARY = 97
_NULL = (".null_logit", ".null_key", ".null_value", ".sinks")
_OPTIONAL = {  # only for families that have these fields
    "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 16,
    "n_shared_experts": 1, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "interleave_moe_layer_step": 2,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 12, "sliding_window": 6, "attention_chunk_size": 6,
}  # fmt: skip


def tiny_config(family="llama", **changes):
    """A config of `family`, just large enough that every feature acts on a dozen tokens."""
    keywords = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    kind = CONFIG_MAPPING[family]
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    keywords |= {name: value for name, value in _OPTIONAL.items() if name in known}
    if "kv_lora_rank" in known:
        keywords["num_key_value_heads"] = 4
    if family == "gpt_oss":
        keywords["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    return kind(**keywords | changes)


def tiny_wrapper_config(family):
    """A vision-language model whose vision tower has as many layers as its text decoder."""
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    if family == "llama4":
        vision |= {"vision_output_dim": 16, "projector_input_dim": 16}
        vision |= {"projector_output_dim": 16, "pixel_shuffle_ratio": 0.5}
    text = tiny_config(f"{family}_text")
    return CONFIG_MAPPING[family](text_config=text, vision_config=vision)


def tiny_model(variant="oasis", family="llama", seed=0, dtype=torch.float32, text=None, **settings):
    """An OASIS model whose routers, sinks and betas are not at their initial values."""
    torch.manual_seed(seed)
    text = text or tiny_config(family, initializer_range=0.2)
    model = OasisForCausalLM(OasisConfig(text_config=text, **settings_of(variant) | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "model.depth.beta_raw":
                parameter.fill_(1.0)
            elif ".depth." in name or name.endswith(_NULL):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return cast(model, dtype).eval()


def cast(model, dtype):
    """`model` in `dtype`; in float64 with eager experts, because the default has no float64."""
    if dtype == torch.float64:
        model.set_experts_implementation("eager")
    return model.to(dtype)


def greedy(model, ids, **how):
    """The input with 6 generated tokens after it."""
    return model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, **how)


def word_tokenizer():
    """Maps the words w0, w1, ... to the tokens 0, 1, ...; w1 is BOS and w2 is EOS."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2")
