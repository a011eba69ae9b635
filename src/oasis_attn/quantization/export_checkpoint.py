"""Load a model and write it in a format that other programs read, without this library."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.errors import UserError
from oasis_attn.files import staged_folder
from oasis_attn.hub.export_options import check_export
from oasis_attn.hub.gguf_export import BLOCK, Codes, check_gguf, write_gguf
from oasis_attn.hub.loading import load_model, quiet
from oasis_attn.hub.model_code import AUTO_MAP, check_code
from oasis_attn.hub.null_export import NORMALIZER, check_nulls, nulls_as_prefix
from oasis_attn.hub.peft_adapter import export_adapter
from oasis_attn.hub.prefix import prefix_of, without_prefix
from oasis_attn.hub.prefix_export import (
    is_computed,
    save_tokenizer_with_prefix,
    write_prefix_card,
)
from oasis_attn.hub.prefix_storage import METHOD as PREFIX_METHOD
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from oasis_attn.progress import Progress, no_progress
from oasis_attn.quantization.hf_quantizer import (
    METHOD,
    OasisQuantizationConfig,
    get_quantization_config,
)
from oasis_attn.quantization.linear import QuantizedLinear
from oasis_attn.quantization.primitives import to_blocks
from oasis_attn.quantization.schemes import Scheme

PEFT_ADAPTER = "a PEFT adapter"
"""What becomes of a tuned prefix, and of nulls."""
_TUNED_PREFIX = """\
The keys and values of the prefix were tuned. They are a PEFT adapter for the model in
`base_model`:"""
_NULLS = """\
A model with {nulls} of [oasis-attn](https://arxiv.org/abs/2605.17887): further keys and values of
every attention head. They belong to no tokens and were not tuned as a prefix: they are the nulls of
a converted model. Here they are a prefix of length {count}, a PEFT adapter for the model in
`base_model`, which is incomplete without it. With the adapter, it computes what the OASIS model
computes, but positions are shifted: the first token of a text has position {count}, and the longest
text is shorter by {count}."""


def export_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    weights: str | None = None,
    with_code: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write a model as a GGUF file, or as a folder for transformers.

    A folder has a prefix in its tokenizer or, if the prefix was tuned, as a PEFT adapter, which is
    also the form of nulls with keys and values.

    Args:
        model: see `load_model`.
        out: a new file or folder; it is written completely or not at all.
        format: `gguf` or `transformers`; by default, `gguf` if `out` ends in `.gguf`.
        weights: type of the weights.  In `gguf`: see `write_gguf`; the default is `q8_0`.  In
            `transformers`: a dtype, or `auto` for that of the checkpoint, the default.  A quantized
            model keeps its codes, which determine the type.
        with_code: for an OASIS model: write its code too, see `hub.model_code`.
        device: see `load_model`.
        trust_remote_code: see `load_model`.
        progress: see `Progress`.

    Returns:
        Facts about the result, by name.

    Raises:
        UserError: unusable arguments, or the format cannot hold the model; the message says why.
    """
    format = check_export(out, format, weights, with_code)
    progress("loading the model")
    loaded, tokenizer = load_model(
        model,
        dtype="auto" if format == "gguf" else weights or "auto",
        device=device,
        trust_remote_code=trust_remote_code,
        check=partial(_check_config, format=format, weights=weights, with_code=with_code),
    )
    progress("writing")
    if with_code:
        loaded.config.auto_map = dict(AUTO_MAP)
    if format == "transformers":
        stored = isinstance(loaded, OasisForCausalLM) and not with_code
        write: Any = _write_nulls if stored else _write_folder
        with quiet():
            return {"folder": str(out)} | write(loaded, tokenizer, Path(out))
    codes = _codes(loaded)
    kind = next(iter(codes.values())).type if codes else weights or "q8_0"
    counts = write_gguf(loaded, tokenizer, Path(out), weights=kind, codes=codes)
    size = Path(out).stat().st_size
    return {"file": str(out), "weights": kind, "tensors": counts, "bytes": size}


def _check_config(
    config: PreTrainedConfig, *, format: str, weights: str | None, with_code: bool
) -> None:
    """Raise `UserError` if the format cannot hold a model with this config."""
    if format == "gguf":
        check_gguf(config)
    elif with_code:
        check_code(config)
    elif isinstance(config, OasisConfig):
        if config.normalizer.name != NORMALIZER:
            raise UserError(
                "model: an OASIS model needs this library; --with-code writes its code with it, and"
                " `oasis convert` makes a model of transformers: with --to-sinks if it has a plain"
                " null and no depth routing, with --to-vanilla if the null is off"
            )
        check_nulls(config)
    stored = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if stored is None:
        return
    method = stored["quant_method"]
    if method not in (METHOD, PREFIX_METHOD):
        other = " or one that `oasis quantize --format oasis` wrote" if format == "gguf" else ""
        raise UserError(f"model: it is quantized by {method}; export the original model{other}")
    if format == "transformers" and method == METHOD:
        raise UserError(
            "model: it is quantized in the format of this library; quantize the original model with"
            " --format compressed-tensors"
        )
    if format == "gguf":
        if method == PREFIX_METHOD or stored.get("prefix"):
            raise UserError(
                "model: it has a prefix, which a GGUF file cannot hold, and which quantization of"
                " weights alone does not need; export the original model"
            )
        fields = OasisQuantizationConfig.from_dict(stored)
        kind = _block_type(Scheme.from_dict(fields.scheme), fields.transforms)
        if weights not in (None, kind):
            raise UserError(f"weights: {weights!r} is not {kind!r}, the type of the model's codes")


def _block_type(scheme: Scheme, transforms: Mapping[str, str]) -> str:
    """The type in GGUF that holds the codes of a scheme; `UserError` if there is none."""
    weight, reason = scheme.weight, ""
    if scheme.activation is not None:
        reason = "it quantizes activations"
    elif transforms:
        reason = "it transforms the inputs of layers, which rotation='folded' does not"
    elif weight.element_type != "int":
        reason = "its codes are floating-point numbers"
    elif not weight.symmetric:
        reason = "its codes are not symmetric"
    elif (weight.group_size or BLOCK) % BLOCK:
        reason = f"its groups of {weight.group_size} are not multiples of {BLOCK}"
    if reason:
        raise UserError(
            f"scheme: a GGUF file cannot hold {scheme.name!r}: {reason}; export the original model"
        )
    return "q4_0" if weight.bits <= 4 else "q8_0"


def _codes(model: PreTrainedModel) -> dict[str, Codes]:
    """The quantized weights by parameter name."""
    codes = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            if layer.in_features % BLOCK:
                raise UserError(
                    f"model: {name} has {layer.in_features} inputs, which are not a multiple of"
                    f" {BLOCK}, so that GGUF cannot hold its codes"
                )
            values = layer.codes()
            scale = layer.weight_scale.expand_as(to_blocks(values, layer.scheme.weight))
            kind = _block_type(layer.scheme, get_quantization_config(model).transforms)
            codes[f"{name}.weight"] = Codes(values, scale.reshape(values.shape)[:, ::BLOCK], kind)
    return codes


def _write_folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path
) -> dict[str, Any]:
    prefix = prefix_of(model)
    if prefix is None:
        with staged_folder(out) as stage:
            model.save_pretrained(stage)
            tokenizer.save_pretrained(stage)
        return {"prefix": "none"}
    tokens, plain = list(prefix.tokens), without_prefix(model)
    family = model.config.get_text_config(decoder=True).model_type
    if is_computed(model):
        with staged_folder(out) as stage:
            plain.save_pretrained(stage)
            chats = save_tokenizer_with_prefix(tokenizer, prefix.tokens, stage)
            write_prefix_card(prefix, stage, family)
        had_template = bool(getattr(tokenizer, "chat_template", None))
        chat = "with the prefix" if chats else "left out" if had_template else "none"
        return {"prefix": "in the tokenizer", "tokens": tokens, "chat template": chat}
    export_adapter(
        model,
        plain,
        tokenizer,
        prefix.adapter,
        out,
        title=f"{family} with a prefix of {len(prefix)} tokens",
        text=_TUNED_PREFIX,
    )
    return {"prefix": PEFT_ADAPTER, "tokens": tokens}


def _write_nulls(
    model: OasisForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path
) -> dict[str, Any]:
    native, adapter = nulls_as_prefix(model)
    count, family = adapter.keys_LGPd.shape[2], native.config.model_type
    nulls = "1 null" if count == 1 else f"{count} nulls"
    export_adapter(
        model,
        native,
        tokenizer,
        adapter,
        out,
        title=f"{family} with {nulls}",
        text=_NULLS.format(nulls=nulls, count=count),
    )
    return {"nulls": PEFT_ADAPTER, "count": count, "position of the first token": count}
