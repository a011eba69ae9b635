"""Whether a quantized model can compute its own prefix, as it must in an inference engine.

Ranges that are calibrated behind a stored prefix do not contain the massive activations of the
prefix tokens.  This library never computes these tokens again.  An engine gets them as the first
tokens of every text, and static ranges clip them.  They act on the text only through the keys and
values of the prefix, and few layers make massive activations: if these stay in floating point, the
others can keep the ranges of the text.

Axes: N windows, T tokens, P prefix tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.hub.prefix import Prefix, compute_prefix, prefix_of, without_prefix
from oasis_attn.quantization.options import COMPRESSED_TENSORS
from oasis_attn.quantization.plain_model import refusal
from oasis_attn.quantization.quantizers import StaticQuantizer
from oasis_attn.quantization.simulate import quantized_modules

ALLOWED = 2.0
"""Largest divergence with the prefix as tokens, relative to that with the stored prefix."""
_ROUNDING = 1e-6  # a divergence below is rounding, and may be 0
_WINDOWS = 4  # windows of text to compare on
_MOST_LEFT_OUT = 8  # inputs of layers


def check_served_prefix(
    quantized: PreTrainedModel,
    unquantized: PreTrainedModel,
    ids_NT: Tensor,
    format: str = COMPRESSED_TENSORS,
) -> None:
    """Raise `Refusal` unless `quantized` also works if its prefix tokens precede the text.

    See `served_prefix`; the divergence may grow by `ALLOWED`.  The message names `format` and the
    layers that must not be quantized.
    """
    found = served_prefix(quantized, unquantized, ids_NT)
    if found.growth <= ALLOWED:
        return
    reason = (
        "an engine computes the prefix from its tokens inside the quantized model, which multiplies"
        f" the divergence from the unquantized model by {found.growth:.3g} (allowed: {ALLOWED:g})"
    )
    if found.left_out is None:
        raise refusal(format, f"{reason}; use a dynamic scheme", ", or --format oasis")
    options = " ".join(f"--ignore {name}" for name in found.left_out)
    reason += f"; leave out the layers whose ranges change the prefix most: {options}"
    raise refusal(format, reason)


@dataclass(frozen=True, kw_only=True)
class ServedPrefix:
    """What it costs that a quantized model computes its prefix from tokens.

    Attributes:
        growth: by how much this multiplies the divergence from the unquantized model: the mean over
            tokens of the Kullback-Leibler divergence of the next-token distributions.
        left_out: the fewest layers without whose quantization `growth` is at most `ALLOWED`; None
            if `_MOST_LEFT_OUT` inputs of layers are not enough.
    """

    growth: float
    left_out: list[str] | None


@torch.no_grad()
def served_prefix(
    quantized: PreTrainedModel, unquantized: PreTrainedModel, ids_NT: Tensor
) -> ServedPrefix:
    """Compare a quantized model that computes its prefix with one that stores it.

    Args:
        quantized: a model with a prefix that `quantize` returned.
        unquantized: the model with the same prefix that it was made from.
        ids_NT: windows of text; the first few are used.
    """
    prefix: Any = prefix_of(quantized)
    served = without_prefix(quantized)
    windows = ids_NT[:_WINDOWS].to(quantized.device).split(1)
    exact = [_log_probabilities(unquantized, ids_1T) for ids_1T in windows]

    def divergence(model: PreTrainedModel, tokens: Sequence[int] = ()) -> float:
        found = (_log_probabilities(model, ids_1T, tokens) for ids_1T in windows)
        pairs = zip(found, exact, strict=True)
        return sum(float(F.kl_div(x, y, log_target=True, reduction="batchmean")) for x, y in pairs)

    stored = max(divergence(quantized), _ROUNDING)
    growth = divergence(served, prefix.tokens) / stored
    left_out: list[str] = []
    if growth <= ALLOWED:
        return ServedPrefix(growth=growth, left_out=left_out)
    for names in clipped_layers(served, prefix)[:_MOST_LEFT_OUT]:
        left_out += names
        with _unquantized_inputs(served, left_out):
            if divergence(served, prefix.tokens) <= ALLOWED * stored:
                return ServedPrefix(growth=growth, left_out=left_out)
    return ServedPrefix(growth=growth, left_out=None)


def clipped_layers(model: PreTrainedModel, prefix: Prefix) -> list[list[str]]:
    """Linear layers whose static ranges change the prefix, those that change it most first.

    Layers that read the same tensor are one entry, because engines fuse them.

    Args:
        model: a quantized model without prefix.
        prefix: its prefix, computed without quantized activations.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, module in quantized_modules(model).items():
        quantizer = getattr(module, "input_quantizer", None)
        if isinstance(quantizer, StaticQuantizer):
            key = name.rpartition(".")[0], *quantizer.range  # equal for the same tensor
            groups.setdefault(key, []).append(name)
    everything = [name for names in groups.values() for name in names]
    with _unquantized_inputs(model, everything):
        exact = compute_prefix(model, prefix.tokens)
    change = {}
    for key, names in groups.items():
        with _unquantized_inputs(model, {*everything}.difference(names)):
            change[key] = _distance(compute_prefix(model, prefix.tokens), exact)
    return [groups[key] for key in sorted(groups, key=lambda key: -change[key])]


@contextmanager
def _unquantized_inputs(model: PreTrainedModel, names: Collection[str]) -> Iterator[None]:
    """Context in which the inputs of the layers `names` are not quantized."""
    quantizers: list[Any] = [model.get_submodule(name).input_quantizer for name in names]
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enabled = True


def _distance(found: Prefix, expected: Prefix) -> float:
    """The relative change of keys and values, a mean over layers."""
    pairs = (
        (found.keys_LGPd, expected.keys_LGPd),
        (found.values_LGPd, expected.values_LGPd),
    )
    return sum(
        float(((x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).mean()) for x, y in pairs
    )


def _log_probabilities(model: Any, ids_1T: Tensor, tokens: Sequence[int] = ()) -> Tensor:
    """Log probabilities [T, V] of the text behind `tokens`."""
    ids = torch.cat([ids_1T.new_tensor([list(tokens)]), ids_1T], 1)
    logits = model(input_ids=ids, use_cache=False).logits
    return logits[0, len(tokens) :].float().log_softmax(-1)
