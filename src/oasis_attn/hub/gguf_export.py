"""Write a model as a GGUF file, which llama.cpp and programs that are built on it run.

The names of keys and tensors are those of the `gguf` library, and the layout is that of llama.cpp's
own conversion: it rotates neighboring channels in the family `llama`, so that the rows of queries
and keys change places.  `gguf_file.read_gguf` reads the file again.  Everything that the file could
not say about a model is refused, before the weights are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.errors import UserError
from oasis_attn.files import staged_file
from oasis_attn.hub.gguf_tokenizer import GGUFTokenizer
from oasis_attn.modeling.configuration_oasis import OasisConfig

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Families that can be exported -> their architecture in GGUF."""

BLOCK = 32
"""Entries of a row that share a scale in Q8_0 and Q4_0."""

_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
_EMBEDDINGS = ("token_embd.weight", "output.weight")
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0}  # llama.cpp reads no others in these architectures
_KNOWN_YARN = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings")


@dataclass(frozen=True, eq=False)
class Codes:
    """A quantized weight, in blocks of `BLOCK` entries: code * scale.

    Attributes:
        codes: int8 [out, in], -8 .. 7 in Q4_0.
        scale: floating point [out, in / BLOCK]; the file has it in float16.
        type: `q4_0` or `q8_0`.
    """

    codes: Tensor
    scale: Tensor
    type: str


def check_gguf(config: PreTrainedConfig) -> None:
    """Raise `UserError` with the reason if no GGUF file can hold a model with this config."""
    if isinstance(config, OasisConfig):
        raise _error(
            "no GGUF architecture computes what an OASIS model does; export the original model, or"
            " the result of `oasis convert --to-vanilla` if the null is off; a folder holds nulls"
            " with keys and values for peft, and other OASIS models with --with-code"
        )
    kind, fields = config.model_type, config.to_dict()
    if kind not in ARCHITECTURES:
        raise _error(f"family {kind!r} is not one of {', '.join(ARCHITECTURES)}")
    window = fields.get("sliding_window")
    kinds = fields.get("layer_types") or ["sliding_attention" if window else "full_attention"]
    if "sliding_attention" in kinds and (window or 0) < config.max_position_embeddings:
        raise _error(f"sliding_window: {window} is shorter than the context, but {kind!r} has none")
    if fields["hidden_act"] != "silu":
        raise _error(f"hidden_act: {fields['hidden_act']!r} is not 'silu'")
    if kind == "qwen3" and fields.get("attention_bias"):
        raise _error("attention_bias: qwen3 has none in GGUF")
    width, heads, head_dim = fields["hidden_size"], fields["num_attention_heads"], _head_dim(config)
    if kind == "qwen2" and heads * head_dim != width:
        raise _error(
            f"head_dim: {head_dim} x {heads} heads is not hidden_size, {width}, which"
            " llama.cpp takes for granted in qwen2"
        )
    _check_rope(config.rope_parameters, ARCHITECTURES[kind])


def _head_dim(config: Any) -> int:
    found: int = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return found


def _check_rope(rope: Mapping[str, Any], architecture: str) -> None:
    kind = rope["rope_type"]
    allowed = ("default", "linear", "yarn", *(["llama3"] if architecture == "llama" else []))
    if kind not in allowed:
        raise _error(f"rope_parameters: rope_type {kind!r} is not one of {', '.join(allowed)}")
    if (rotated := rope.get("partial_rotary_factor") or 1) != 1:
        raise _error(f"rope_parameters: partial_rotary_factor {rotated!r} is not 1")
    factor = rope.get("factor")
    if kind in ("linear", "yarn") and not (isinstance(factor, int | float) and factor >= 1):
        raise _error(f"rope_parameters: factor {factor!r} is not a number of at least 1")
    others = {
        name: value
        for name, value in rope.items()
        if name not in (*_KNOWN_YARN, "partial_rotary_factor") and value is not None
    }
    if kind == "yarn":
        for name, value in others.items():
            if name not in _YARN:
                raise _error(f"rope_parameters: {name} {value!r} has no key in GGUF")
            if value != _YARN[name]:
                raise _error(
                    f"rope_parameters: {name} {value!r} is not {_YARN[name]:g}, which llama.cpp"
                    f" uses for {architecture} whatever the file says"
                )


def _error(reason: str) -> UserError:
    return UserError(f"model: it cannot be a GGUF file: {reason}")


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    weights: str = "q8_0",
    codes: Mapping[str, Codes] | None = None,
) -> dict[str, int]:
    """Write `model` to the file `path`, completely or not at all.

    Vectors (gains of norms and biases) are float32.  In a row that has no whole number of blocks,
    numbers are float16 instead of Q8_0 or Q4_0.

    Args:
        weights: type of the matrices in `export_options.GGUF_TYPES`.  With `q4_0`, embedding and
            head are Q8_0.
        codes: weights, by parameter name, that are already quantized and stay as they are.  The
            other matrices, such as embedding and head, are then float16.

    Returns:
        The number of tensors of each type in GGUF.

    Raises:
        UserError: see `check_gguf` and `GGUFTokenizer`; or a number is too large for its type.
    """
    check_gguf(model.config)
    config: Any = model.config
    described = GGUFTokenizer.of(tokenizer, config.vocab_size)
    architecture = ARCHITECTURES[config.model_type]
    tensors = dict(_tensors(model, architecture, codes or {}, weights))
    with staged_file(path) as temporary:
        writer = GGUFWriter(temporary, architecture)
        _write_fields(writer, model, weights)
        described.write(writer)
        for name, (shape, kind, _) in tensors.items():
            block, size = gguf.GGML_QUANT_SIZES[kind]
            bytes_ = math.prod(shape) // block * size
            writer.add_tensor_info(name, shape, np.dtype(np.float32), bytes_, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (_, kind, source) in tensors.items():
            data = _encode(source, kind)
            if not _is_finite(data, kind):
                raise UserError(f"weights: {name} has numbers that are too large for {kind.name}")
            writer.write_tensor_data(np.ascontiguousarray(data))
        writer.close()
    kinds = [kind.name for _, kind, _ in tensors.values()]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _tensors(
    model: PreTrainedModel, architecture: str, codes: Mapping[str, Codes], weights: str
) -> Iterator[tuple[str, tuple[Sequence[int], GGMLQuantizationType, Tensor | Codes]]]:
    """Each tensor of the file: name, shape, type and numbers."""
    config: Any = model.config
    number = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    plain = "f16" if codes else weights
    for name, parameter in model.named_parameters():  # a tied head comes once, as the embedding
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise _error(f"{architecture} has no tensor for {name}")
        source: Tensor | Codes = codes.get(name, parameter.detach())
        if architecture == "llama":
            source = _rows_in_pairs(name, source, config)
        if isinstance(source, Codes):
            yield stored, (source.codes.shape, GGMLQuantizationType[source.type.upper()], source)
            continue
        wanted = "q8_0" if plain == "q4_0" and stored in _EMBEDDINGS else plain
        kind = GGMLQuantizationType[wanted.upper()]
        if source.ndim == 1:
            kind = GGMLQuantizationType.F32
        elif source.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = GGMLQuantizationType.F16
        yield stored, (source.shape, kind, source)
    rope: Any = config.rope_parameters
    if rope["rope_type"] == "llama3":
        decoder: Any = model.base_model
        frequencies = decoder.rotary_emb.inv_freq.double().cpu()
        count = len(frequencies)
        plain_frequencies = rope["rope_theta"] ** (-torch.arange(count).double() / count)
        factors = plain_frequencies / frequencies
        yield "rope_freqs.weight", (factors.shape, GGMLQuantizationType.F32, factors)


def _rows_in_pairs(name: str, source: Tensor | Codes, config: Any) -> Tensor | Codes:
    """Queries and keys with the two channels of each rotation beside each other."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return source
    codes = source.codes if isinstance(source, Codes) else source
    rows = torch.arange(len(codes)).view(count, 2, -1).transpose(1, 2).reshape(-1)
    if isinstance(source, Codes):
        return Codes(source.codes[rows], source.scale[rows], source.type)
    return source[rows]


def _encode(source: Tensor | Codes, kind: GGMLQuantizationType) -> np.ndarray:
    if isinstance(source, Tensor):
        numbers = source.to("cpu", torch.float32).numpy()
        with np.errstate(over="ignore"):
            encoded: np.ndarray = gguf.quantize(numbers, kind)
        return encoded
    codes = source.codes.cpu().numpy().reshape(*source.scale.shape, BLOCK)
    scale = source.scale.to("cpu", torch.float16).numpy()[..., None].view(np.uint8)
    if source.type == "q4_0":
        nibbles = (codes + 8).astype(np.uint8)
        packed = nibbles[..., : BLOCK // 2] | (nibbles[..., BLOCK // 2 :] << 4)
    else:
        packed = codes.view(np.uint8)
    return np.concatenate([scale, packed], -1).reshape(len(codes), -1)


def _is_finite(data: np.ndarray, kind: GGMLQuantizationType) -> bool:
    """Whether all numbers of an encoded tensor are finite; a block begins with its scale."""
    if kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0):
        _, size = gguf.GGML_QUANT_SIZES[kind]
        data = np.ascontiguousarray(data.reshape(-1, size)[:, :2]).view(np.float16)
    elif kind == GGMLQuantizationType.BF16:  # all exponent bits are set in infinity and NaN
        return bool((data.view(np.uint16) & 0x7F80 != 0x7F80).all())
    return bool(np.isfinite(data).all())


def _write_fields(writer: GGUFWriter, model: PreTrainedModel, weights: str) -> None:
    """Add the hyperparameters."""
    config: Any = model.config
    rope = config.rope_parameters
    head_dim = _head_dim(config)
    writer.add_type(gguf.GGUFType.MODEL)
    if (name := Path(config.name_or_path).name) != "mistral":  # transformers takes it for a family
        writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[weights])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_yarn_beta_fast(_YARN["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(_YARN["beta_slow"])
