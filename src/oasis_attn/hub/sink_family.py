"""Conversion of a model with a plain null to `granite_swa`, a family of transformers with sinks.

A null with only a logit c per head is one more column of the softmax that adds nothing to the
output.  transformers and inference engines call it a sink (gpt-oss, arXiv 2508.10925).
`granite_swa` is the Llama layer with sinks, multipliers, and a sliding window and RoPE base per
layer, so that the families in `CONVERTIBLE` convert exactly.  The other families with sinks are no
Llama layers: gpt_oss has clamped experts with biases, flint normalizes queries and keys and rotates
only layers with a sliding window, and mimo_v2_flash has sinks only in such layers, which also have
more key heads than the others.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GraniteSWAConfig,
    GraniteSWAForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from oasis_attn.errors import UserError
from oasis_attn.files import write_text
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.families import family_of
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from oasis_attn.modeling.weight_names import is_ours
from oasis_attn.ops.normalizers import LEARNED_NULL_KEY, LEARNED_NULL_VALUE

CONVERTIBLE = ("cwm", "granite", "llama", "ministral", "mistral", "qwen2", "seed_oss", "smollm3")
"""Families whose layers `granite_swa` can express."""

_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_PLAIN_NULL = ("softmax1", "learned_sink")
_COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *("initializer_range", "attention_dropout", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
_MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier")  # of granite

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [oasis-attn, granite_swa]
---

# {family} with attention sinks

A `{family}` decoder with {parameters:,} parameters and the null option `{normalizer}` of
[OASIS](https://arxiv.org/abs/2605.17887). It is stored as `granite_swa`, whose sinks are the logits
of the null, so that transformers loads it without oasis-attn:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(path_or_name)
```
"""


def check_sinks(config: PreTrainedConfig) -> None:
    """Raise `UserError` with the reason if `to_sinks` cannot convert a model with this config."""
    if not isinstance(config, OasisConfig):
        raise _refusal(f"model: family {config.model_type!r} is not an OASIS model and has no null")
    text: Any = config.text_config
    if any(getattr(part, "quantization_config", None) for part in (config, text)):
        raise _refusal(
            "model: it is quantized or has a prefix, which a family of transformers does not read;"
            " convert the model before you quantize it or add a prefix"
        )
    if config.residual != "sum":
        raise _refusal(
            f"residual: {config.residual!r} is depth routing, which no family of transformers"
            " computes; import oasis_attn where the model is loaded"
        )
    name = config.normalizer.name
    if name in LEARNED_NULL_VALUE:
        exported = "`oasis export` writes them for peft, or " if name in LEARNED_NULL_KEY else ""
        raise _refusal(
            f"token_normalizer: {name!r} has null values, and a sink has none; {exported}train the"
            " model with --null-to-logit first"
        )
    if name == "softmax":
        raise _refusal("token_normalizer: 'softmax' has no null; use to_vanilla")
    allowed = " or ".join(map(repr, _PLAIN_NULL))
    if name in LEARNED_NULL_KEY:
        raise _refusal(
            f"token_normalizer: {name!r} has a null logit that depends on the query, and that of a"
            f" sink does not; use {allowed}"
        )
    if name not in _PLAIN_NULL:
        raise _refusal(f"token_normalizer: {name!r} is not a softmax with a null; use {allowed}")
    if config.null_logit == -torch.inf:
        raise _refusal("null_logit: -inf switches the null off; use to_vanilla")
    for setting in ("output_gate", "branch_norm"):
        if (value := getattr(config, setting)) != "none":
            raise _refusal(f"{setting}: {value!r} is in no family with sinks; only 'none' is")
    _check_family(text)


def _check_family(text: Any) -> None:
    kind = text.model_type
    if family_of(text).sinks:
        raise _refusal(f"model: family {kind!r} has its own sinks; use to_vanilla")
    if kind not in CONVERTIBLE:
        raise _refusal(
            f"model: family {kind!r} has parts that granite_swa, the Llama layer with sinks, does"
            " not have (other norms, projections, rotations or experts, or a soft cap);"
            f" {', '.join(CONVERTIBLE)} can be converted"
        )
    rope = text.rope_parameters
    if rope["rope_type"] not in _ROPE_TYPES:
        raise _refusal(
            f"rope_parameters: rope_type {rope['rope_type']!r} is not one of"
            f" {', '.join(_ROPE_TYPES)}"
        )
    if (rotated := rope.get("partial_rotary_factor") or 1) != 1:
        raise _refusal(
            f"rope_parameters: partial_rotary_factor {rotated!r} is not 1, but granite_swa rotates"
            " all channels"
        )


def to_sinks(model: OasisForCausalLM) -> PreTrainedModel:
    """The `granite_swa` model that computes the same function; it shares the weights of `model`.

    Its own attention computes the softmax in float32, whatever the dtype of the weights.  The sinks
    have the dtype of the weights, to which the fixed null logit of `softmax1` is rounded.
    `granite_swa` has biases in all projections of attention or in none; those that `model` lacks
    are 0, as are those of the MLP.

    Raises:
        UserError: see `check_sinks`.
    """
    check_sinks(model.config)
    weights = {name: x for name, x in model.state_dict().items() if not is_ours(name)}
    config = _config(model, weights)
    with torch.device("meta"):
        target: PreTrainedModel = GraniteSWAForCausalLM(config)
    for name, parameter in target.named_parameters():
        if name.endswith(".bias") and name not in weights:
            weights[name] = torch.zeros(parameter.shape, dtype=model.dtype, device=model.device)
    for index, layer in enumerate(model.model.layers):
        weights[f"model.layers.{index}.self_attn.sinks"] = _null_logit(layer, model)
    target.load_state_dict(weights, assign=True)
    decoder: Any = target.model
    rotary = type(decoder.rotary_emb)  # its buffers are not in the state dict
    decoder.rotary_emb = rotary(config).to(model.device)
    decoder.rotary_embs = nn.ModuleList(
        rotary(part.config).to(model.device) for part in decoder.rotary_embs
    )
    target.tie_weights()
    target.generation_config = copy.deepcopy(model.generation_config)
    target.config.name_or_path = model.config.name_or_path
    target.train(model.training)
    return target


def write_sinks_card(model: PreTrainedModel, source: OasisConfig, folder: Path) -> None:
    """Write the README.md of the converted `model` in `folder`."""
    family, normalizer = source.text_config.model_type, source.normalizer.name
    card = _CARD.format(family=family, normalizer=normalizer, parameters=model.num_parameters())
    write_text(folder / "README.md", card)


def _config(model: OasisForCausalLM, weights: dict[str, Tensor]) -> GraniteSWAConfig:
    text: Any = model.config.text_config
    attention: Any = model.model.layers[0].self_attn
    layers = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * layers
    theta = text.rope_parameters["rope_theta"]
    rotated = getattr(text, "no_rope_layers", None) or [True] * layers  # smollm3: 0 is without
    fields = {name: getattr(text, name) for name in _COPIED}
    fields |= {name: getattr(text, name) for name in _MULTIPLIERS if hasattr(text, name)}
    if attention.head_dim * text.num_attention_heads != text.hidden_size:
        fields["head_dim"] = attention.head_dim
    return GraniteSWAConfig(
        **fields,
        attention_multiplier=attention.scaling,
        attention_bias=_has_bias(weights, ".self_attn."),
        mlp_bias=_has_bias(weights, ".mlp."),
        tie_word_embeddings=bool(model.config.tie_word_embeddings),
        rope_parameters=dict(text.rope_parameters),
        layer_rope_theta=[theta if each else 0 for each in rotated],
        layer_types=list(kinds),
        # Required without such layers too; an engine that applied it would not change the outputs.
        sliding_window=window or text.max_position_embeddings,
    )


def _has_bias(weights: dict[str, Tensor], part: str) -> bool:
    return any(part in name and name.endswith(".bias") for name in weights)


def _null_logit(layer: Any, model: OasisForCausalLM) -> Tensor:
    """The null logits `[H]` of a layer."""
    if layer.null_logit is not None:
        learned: Tensor = layer.null_logit
        return learned
    heads, most = model.config.text_config.num_attention_heads, torch.finfo(model.dtype).max
    fixed = min(max(model.config.null_logit, -most), most)
    return torch.full((heads,), fixed, dtype=model.dtype, device=model.device)


def _refusal(reason: str) -> UserError:
    return UserError(f"to_sinks: {reason}")
