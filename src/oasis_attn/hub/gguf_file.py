"""Read a GGUF file as a transformers model: exactly, or with an error that names what is not read.

transformers reads some keys and tensors of a GGUF file and silently ignores others: scaled rotary
embeddings, biases, head widths.  Here every key of the architecture and every tensor is either read
by transformers, read below, known to have no effect, or an error.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from oasis_attn.errors import UserError, one_line
from oasis_attn.hub.checkpoint import MOST_COUNTED, parameter_limit
from oasis_attn.modeling.hf_compat import (
    GGUF_CONFIG_ARCHS,
    GGUF_CONFIG_MAPPING,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_config,
    get_gguf_hf_weights_map,
    read_gguf_metadata,
)

_FAMILIES = {  # architectures that have another name in the mapping of transformers
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "minimax-m2": "minimax_m2",
}
_SHAPES = {  # redundant with the shapes of the tensors, which must match the model
    *("feed_forward_length", "expert_feed_forward_length", "expert_shared_feed_forward_length"),
    *("expert_shared_count", "vocab_size", "embedding_length", "block_count"),
}
_SOFTCAPS = {"attn_logit_softcapping", "final_logit_softcapping"}
_ROPE_BASE = 10_000.0  # default if the file has no rope.freq_base
_NOT_SCALING = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
_NUMBERS = ("head_count", "_length", "dimension_count", "freq_base", ".factor")
_ONLY = {  # rope.scaling keys -> the value with which they change nothing
    "attn_factor": 1.0,
    "yarn_attn_factor": 1.0,
    "yarn_ext_factor": 1.0,
    # llama.cpp computes these in the architectures that transformers reads, whatever a file says.
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
}
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3 = {  # the values that Llama 3.1, 3.2 and 3.3 share
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_BIASES = {"attention_bias": "attn_{}.bias", "mlp_bias": "ffn_{}.bias"}


def read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, dequantized to float32, and its tokenizer.

    Raises:
        UserError: the file is not a complete GGUF file, transformers does not support its
            architecture, or a key or tensor would not be read; the message names it.
    """
    with _foreign(path):
        file = _File.open(path)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _foreign(path):
        config = AutoConfig.from_pretrained(**where, trust_remote_code=False)
    _apply(file, config)
    too_large = f"model: {str(path)!r} describes a larger model than the file can hold"
    with _foreign(path), parameter_limit(8 * path.stat().st_size, too_large):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **where,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # check_loading_info reports them in one line
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    model, info = loaded
    info["missing_keys"] = _without_zero_biases(model, info["missing_keys"])
    check_loading_info(info, str(path))
    _check_tensors(file, model)
    # The weights are plain floats now; with the quantization config they could not be saved.
    model.hf_quantizer.remove_quantization_config(model)
    return model, tokenizer


@contextmanager
def _foreign(path: Path) -> Iterator[None]:
    """Context in which other libraries read the file; any exception becomes one `UserError`."""
    try:
        with redirect_stderr(io.StringIO()):  # hides a progress bar that cannot be switched off
            yield
    except UserError:
        raise
    except Exception as error:  # the libraries may raise any type on a broken file
        raise _error(path, one_line(error)) from error


def _error(path: Path, reason: str) -> UserError:
    return UserError(f"model: the GGUF file {str(path)!r} cannot be read: {reason}")


@dataclass(frozen=True)
class _File:
    """The metadata and tensors of a file.

    Attributes:
        path: the file.
        architecture: the value of `general.architecture`.
        keys: the hyperparameters of the architecture; names without the architecture's prefix.
        mapped: the keys that transformers copies to the config.
        tensors: the tensors by name.
    """

    path: Path
    architecture: str
    keys: dict[str, Any]
    mapped: set[str]
    tensors: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> _File:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        if fields.get("general.type", "model") != "model":
            raise _error(path, f"general.type is {fields['general.type']!r}, not 'model'")
        if fields.get("split.count", 1) > 1:
            raise _error(
                path, f"split.count: it is one of {fields['split.count']} parts; merge them first"
            )
        architecture = fields["general.architecture"]
        prefix = f"{architecture}."
        for name, value in fields.items():
            number = type(value) in (int, float) and 0 < value < math.inf
            if name.startswith(prefix) and name.endswith(_NUMBERS) and not number:
                raise _error(path, f"{name}: {value!r} is not a number above 0")
        if (layers := fields.get(f"{prefix}block_count", 1)) > MOST_COUNTED:
            raise _error(path, f"{prefix}block_count: {layers!r} is more than {MOST_COUNTED}")
        return cls(
            path=path,
            architecture=architecture,
            keys={
                name.removeprefix(prefix): value
                for name, value in fields.items()
                if name.startswith(prefix)
            },
            mapped=_mapped_keys(path, architecture),
            tensors={tensor.name: tensor for tensor in reader.tensors},
        )

    def unread(self, name: str, value: Any) -> UserError:
        return _error(self.path, f"{name} = {str(value)[:60]} is not supported")

    def unread_key(self, key: str) -> UserError:
        return self.unread(f"{self.architecture}.{key}", self.keys[key])

    def factors(self) -> np.ndarray | None:
        """The divisors of the rotary frequencies; None if the file has none."""
        tensor = self.tensors.get(_ROPE_FACTORS)
        return None if tensor is None else dequantize(tensor.data, tensor.tensor_type).reshape(-1)


def _mapped_keys(path: Path, architecture: str) -> set[str]:
    if architecture not in GGUF_CONFIG_ARCHS:
        mapping: Any = GGUF_CONFIG_MAPPING.get(_FAMILIES.get(architecture, architecture), {})
        return {key for key, field in mapping.items() if field is not None}
    metadata, names = read_gguf_metadata(str(path))
    recorded = _RecordReads(metadata)
    get_gguf_config(recorded, names)
    return {key.removeprefix(f"{architecture}.") for key in recorded.read}


class _RecordReads(dict[str, Any]):
    """A dict that records in `read` which keys were read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def _apply(file: _File, config: Any) -> None:
    """Add to `config` the keys that transformers ignores; `UserError` if one is not supported."""
    left = {key: value for key, value in file.keys.items() if key not in file.mapped | _SHAPES}
    _apply_heads(file, config, left)
    _apply_biases(file, config)
    _apply_rope(file, config, left)
    for key in _SOFTCAPS & left.keys():
        if hasattr(config, key):
            setattr(config, key, left.pop(key))
    same = {
        "attention.causal": True,
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "use_parallel_residual": getattr(config, "use_parallel_residual", None),
    }
    if file.architecture == "llama":  # the layout of queries and keys in every llama file
        same["tensor_data_layout"] = "Meta AI original pth"
    for key, value in left.items():
        if key == "attention.sliding_window" and value == file.keys.get("context_length"):
            continue  # the window covers the whole context
        if key not in same or same[key] != value:
            raise file.unread_key(key)


def _apply_heads(file: _File, config: Any, left: dict[str, Any]) -> None:
    for key in ("attention.key_length", "attention.value_length"):
        left.pop(key, None)
    if not hasattr(config, "num_attention_heads"):
        return
    plain = config.hidden_size // config.num_attention_heads
    width = file.keys.get("attention.key_length", plain)
    if file.keys.get("attention.value_length", plain) != width:
        raise file.unread_key(
            "attention.value_length"
            if "attention.value_length" in file.keys
            else "attention.key_length"
        )
    if _head_width(config) != width:
        config.head_dim = width  # if the family ignores it, the tensor shapes do not match


def _head_width(config: Any) -> int:
    width: int | None = getattr(config, "head_dim", None)
    return width or int(config.hidden_size // config.num_attention_heads)


def _apply_biases(file: _File, config: Any) -> None:
    for field, pattern in _BIASES.items():
        parts = ("q", "k", "v", "output") if field == "attention_bias" else ("gate", "up", "down")
        names = {f"blk.0.{pattern.format(part)}" for part in parts}
        if names & file.tensors.keys() and hasattr(config, field):
            setattr(config, field, True)


def _apply_rope(file: _File, config: Any, left: dict[str, Any]) -> None:
    """Rotary embeddings: the base, the fraction of the head that is rotated, and the scaling."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return  # no rotary embedding, or several; their keys stay in `left`
    rotated = int(_head_width(config) * rope.get("partial_rotary_factor", 1.0))
    if file.keys.get("rope.dimension_count", rotated) != rotated:
        raise file.unread_key("rope.dimension_count")
    for key in ("rope.dimension_count", "rope.freq_base"):
        left.pop(key, None)
    scaling = {
        key.removeprefix("rope.scaling."): left.pop(key)
        for key in list(left)
        if key.startswith("rope.scaling.")
    }
    base = file.keys.get("rope.freq_base", _ROPE_BASE)
    scaled = _scaled_rope(file, scaling, config)
    factors = file.factors()
    if factors is not None:
        if scaled["rope_type"] != "default" or len(factors) != rotated // 2:
            raise file.unread(_ROPE_FACTORS, f"{len(factors)} factors")
        scaled = _rope_of_factors(factors, base, config.max_position_embeddings)
    kept = {key: value for key, value in rope.items() if key in _NOT_SCALING}
    config.rope_parameters = kept | {"rope_theta": base} | scaled


def _scaled_rope(file: _File, scaling: dict[str, Any], config: Any) -> dict[str, Any]:
    """The keys `rope.scaling.*` as `rope_parameters` of transformers."""
    kind = scaling.pop("type", "none")
    factor = scaling.pop("factor", 1.0)
    original = scaling.pop("original_context_length", config.max_position_embeddings)
    scaling.pop("finetuned", None)  # informational, has no effect
    parameters: dict[str, Any] = {"rope_type": "default"}
    if kind == "linear":
        parameters = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        parameters = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    elif kind != "none":
        raise file.unread_key("rope.scaling.type")
    elif factor != 1.0:
        raise file.unread_key("rope.scaling.factor")
    for key, value in scaling.items():
        if value != _ONLY.get(key):
            raise file.unread_key(f"rope.scaling.{key}")
    return parameters


def _rope_of_factors(factors: np.ndarray, base: float, length: int) -> dict[str, Any]:
    """`rope_parameters` whose frequencies are the unscaled frequencies divided by `factors`."""
    llama3 = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    if np.allclose(_llama3_factors(base, len(factors), llama3), factors, rtol=1e-6, atol=0):
        return llama3
    each = [float(factor) for factor in factors]
    return {
        "rope_type": "longrope",
        "short_factor": each,
        "long_factor": each,
        "attention_factor": 1.0,
        "original_max_position_embeddings": length,
    }


def _llama3_factors(base: float, count: int, llama3: dict[str, Any]) -> np.ndarray:
    length, low, high = (
        llama3[name]
        for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    turns = length / (2 * math.pi * base ** (np.arange(count) / count))
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    factors: np.ndarray = 1 / ((1 - smooth) / llama3["factor"] + smooth)
    return factors


def _without_zero_biases(model: nn.Module, missing: set[str]) -> set[str]:
    """Set missing biases of projections to 0, their value by convention; return the other names."""
    biases = {name for name in missing if name.endswith("_proj.bias")}
    with torch.no_grad():
        for name in biases:
            model.get_parameter(name).zero_()
    return set(missing) - biases


def check_loading_info(info: Mapping[str, Any], name: str) -> None:
    """Raise `UserError` unless the weights found are exactly those that the config requires."""
    for problem in ("missing", "unexpected", "mismatched"):
        # A mismatched key is a tuple: the name and both shapes.
        keys = sorted(key if isinstance(key, str) else key[0] for key in info[f"{problem}_keys"])
        if keys:
            raise UserError(f"model: {name!r} has {len(keys)} {problem} weights, first {keys[0]}")


def _check_tensors(file: _File, model: Any) -> None:
    """Raise `UserError` for the first tensor that was not loaded into a parameter."""
    config = model.config
    if config.tie_word_embeddings and "output.weight" in file.tensors:
        tied = (file.tensors[name].data for name in ("output.weight", "token_embd.weight"))
        if not np.array_equal(*tied):
            raise file.unread("output.weight", "values that differ from token_embd.weight")
    if file.architecture in GGUF_CONFIG_ARCHS:
        return  # for these transformers reports unexpected tensors
    make_processor: Any = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)
    processor = make_processor(config=config.to_dict())
    read = set(get_gguf_hf_weights_map(model, processor)) | {_ROPE_FACTORS}
    for name, tensor in file.tensors.items():
        if name not in read and name.removesuffix(".weight") not in read:
            raise file.unread(name, f"a tensor of shape {tensor.shape.tolist()}")
