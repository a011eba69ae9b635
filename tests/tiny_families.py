"""Tiny configs of every family of causal language models in transformers, by the names of fields.

`python tests/tiny_families.py > docs/families.md` writes the page about them.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings
from collections import defaultdict

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from oasis_attn.errors import UserError
from oasis_attn.measure import diagnose
from oasis_attn.quantization import quantize
from oasis_attn.quantization.schemes import get_scheme

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 97
LARGEST = 3_000_000  # parameters
W4A16 = get_scheme("w4a16").with_options({"weight.group_size": 8})

_SIZES = {  # the first pattern that matches the name of a field gives its value
    r"index_head_dim": 16,
    r"pad_token_id": 0,
    r"bos_token_id|decoder_start_token_id|cls_token_id": 1,
    r"eos_token_id|sep_token_id": 2,
    r".*_token_(id|index)": 3,
    r".*ngram_vocab_size_base|.*_group_vocab": 101,
    r"make_ngram_vocab_size_divisible_by": 8,
    r"(.*_)?vocab_size(_per_layer_input)?": VOCABULARY,
    r"num_kv_shared_layers": 0,
    r"first_k_dense_replace|num_dense_layers|n_group|topk_group|n_shared_experts": 1,
    r"num_key_value_heads|swa_num_key_value_heads|linear_num_key_heads|n_mamba_heads|o_groups": 2,
    r"n_groups|mamba_n_groups|index_n_heads|heads_per_ngram|interleave_moe_layer_step": 2,
    r"num_experts_per_tok|moe_k|moe_topk|moe_top_k|max_window_layers": 2,
    r"(num_|n_)?(hidden_)?(encoder_|decoder_)?layers?": 4,
    r"(.*_)?(num_attention_heads|n_heads?|num_heads|attention_heads|num_value_heads)": 4,
    r"(n_routed|num|num_local|moe_num)_experts|zero_expert_num|split_ngram_parts": 4,
    r"index_topk(_blocks)?|index_block_size|centroid_intermediate_top_k": 4,
    r"(.*_)?sliding_window(_size)?|attention_chunk_size|.*window_size|local_attention": 6,
    r"keep_window_size": 6,
    r"(.*_)?(head_dim|dim_head|head_size|kv_channels|state_size|d_state)|d_rel|rotary_dim": 8,
    r"(mamba_)?chunk_size|block_size|rel_extent|.*_n_floor|floor_scale|block_multiple_of": 8,
    r"gated_norm_rank|laurel_rank|hidden_size_per_layer_input|num_centroids|num_mel_bins": 8,
    r"prompt_(types|length)|segment_types|position_bias_.*|num_buckets|relative_max_distance": 8,
    r"patch_size": 14,
    r"(kv|q|o)_lora_rank|adapter_rank|hc_lowrank|mamba_d_head": 16,
    r"moe_intermediate_size|expert_ffn_hidden_size|.*shared.*intermediate_size": 16,
    r"router_hidden_size": 16,
    r"image_size": 28,
    r"(.*_)?hidden_size(_global)?|d_model|n_embd|mamba_d_ssm": 32,
    r"(.*_)?emb(ed)?_dim|(.*_)?embedding_size": 32,
    r"(dense_)?intermediate_size(_mlp)?|d_inner|dff|dim_ff|.*ffn_dim|ffn_hidden_size": 48,
    r"feed_forward_size|prompt_mid_dim": 48,
    r"(.*_)?(max_position_embeddings|positions|n_ctx|max_seq_len|context_length)": 64,
}
_NEEDED = re.compile(  # fields that are None by default, and needed
    "head_dim|num_key_value_heads|intermediate_size|kv_lora_rank|(num|n_routed|n_shared)_experts"
    "|num_experts_per_tok"
)
_HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_SHAPES = {  # what the families' own checks demand
    "bailing_hybrid": _HYBRID,
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _HYBRID,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"qk_head_dim": 16},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16), "num_buckets": 2,
        "attn_layers": ("local", "lsh") * 2, "local_attn_chunk_length": 10,
        "lsh_attn_chunk_length": 10,
    },
    "xlstm": {"num_heads": 4, "chunk_size": 16, "hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": 64},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 4, "mamba_headdim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
_SHAPES["qwen4_exp"] = {"text_config": _SHAPES["qwen4_exp_text"]}


def family_config(family):
    """A tiny config; the family's own error if it cannot be built so."""
    config = CONFIG_MAPPING[family](**_sizes(CONFIG_MAPPING[family], _SHAPES.get(family, {})))
    config.is_decoder = True
    return config


def family_model(family):
    """A tiny model in eval mode, with random weights."""
    config = family_config(family)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > LARGEST:
        raise ValueError(f"{parameters} parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def _sizes(kind, shapes, depth=0):
    keywords = {}
    for field in dataclasses.fields(kind):
        if isinstance(field.default, bool | list | tuple | dict | str):
            continue
        if field.default is None and not _NEEDED.search(field.name):
            continue
        if field.default == 0 and field.name != "pad_token_id":
            continue
        for pattern, size in _SIZES.items():
            if re.fullmatch(pattern, field.name):
                keywords[field.name] = size
                break
    if "kv_lora_rank" in keywords and "num_key_value_heads" in keywords:
        keywords["num_key_value_heads"] = keywords["num_attention_heads"]
    for name, part in _parts(kind).items():
        if part.__name__ == "AutoConfig":
            part = type(getattr(kind(), name))
        if depth < 3 and issubclass(part, PreTrainedConfig):
            keywords[name] = part(**_sizes(part, shapes.get(name, {}), depth + 1))
    return keywords | {name: x for name, x in shapes.items() if name not in _parts(kind)}


def _parts(kind):
    return getattr(kind, "sub_configs", None) or {}


def tokens():
    """One window of 20 tokens."""
    return torch.randint(3, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(0))


def attempt(function):
    """What `function` returns, and "" or the message of a `UserError`."""
    try:
        return function(), ""
    except UserError as error:
        return None, str(error)


def outcomes(model):
    """What `diagnose` and `quantize` do with a model: results and lines for the page."""
    record, refusal = attempt(lambda: diagnose(model, tokens()))
    lines = {"diagnose": _reason(refusal) or "measured"}
    if record and "sink.no_map" in record.tables:
        lines["diagnose"] += "; some layers have no attention map"
    if record and "sink.mass" not in record.tables:
        lines["diagnose"] = "measured; no layer has an attention map"
    static, refusal = attempt(lambda: quantize(model, "w8a8-static-full", calibration=[tokens()]))
    lines["quantize, static, all tensors"] = _reason(refusal) or "quantized"
    if static is None:
        static, refusal = attempt(
            lambda: quantize(model, "w8a8-static-linear", calibration=[tokens()])
        )
    lines["quantize, static, linear layers"] = _reason(refusal) or "quantized"
    weights, refusal = attempt(lambda: quantize(model, W4A16))
    lines["quantize, weights"] = _reason(refusal) or "quantized"
    return lines, record, static, weights


def _reason(refusal):
    return re.sub(r"^\w+: .*?family '[^']+'( is not supported| cannot be \w+)?[^:]*: ", "", refusal)


_HEAD = f"""\
# Families of decoders

What `diagnose` and `quantize` do with each family of `AutoModelForCausalLM` in transformers
{transformers.__version__}, tried with a tiny model with random weights. Families that are not
listed could not be built so. This page is generated by
`python tests/tiny_families.py > docs/families.md`.

Vision-language models that only `AutoModelForImageTextToText` loads (llava, qwen3_vl, smolvlm, ...)
are loaded whole, and their text decoder is measured and quantized, if they can read text without
an image. A saved model comes with its tokenizer, not with its image processor: copy that from the
original folder.
"""


def page(lines):
    """The page: for each operation, its outcomes and their families."""
    text = [_HEAD]
    for operation in next(iter(lines.values())):
        groups = defaultdict(list)
        for family, outcome in lines.items():
            groups[outcome[operation]].append(family)
        text += [f"## {operation}\n", "| outcome | families |", "| --- | --- |"]
        for outcome in sorted(groups, key=lambda each: -len(groups[each])):
            text.append(f"| {outcome} | {', '.join(groups[outcome])} |")
        text.append("")
    return "\n".join(text)


def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    lines = {}
    for family in sys.argv[1:] or FAMILIES:
        try:
            model = family_model(family)
        except Exception as error:
            print(family, type(error).__name__, error, file=sys.stderr)
            continue
        lines[family] = outcomes(model)[0]
    print(page(lines), end="")


if __name__ == "__main__":
    main()
