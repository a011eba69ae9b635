"""Quantization errors of each tensor, and how sensitive a model's quality is to each of them.

Axes: B windows, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oasis_attn.errors import check_choice
from oasis_attn.ops.token_losses import token_losses
from oasis_attn.progress import Progress, no_progress
from oasis_attn.quantization.linear import QuantizedLinear, replace_linear
from oasis_attn.quantization.linearize import expert_of
from oasis_attn.quantization.options import SENSITIVITY_GROUPS
from oasis_attn.quantization.quantizers import DynamicQuantizer, StaticQuantizer
from oasis_attn.quantization.schemes import Scheme
from oasis_attn.quantization.simulate import quantize, quantized_modules, transformed_copy
from oasis_attn.records import Metric


@torch.no_grad()
def target_metrics(model: PreTrainedModel, batches: Iterable[Tensor]) -> tuple[Metric, ...]:
    """Measure the ranges and the quantization errors of a simulated model, target by target.

    Args:
        model: a model that `quantize` returned.
        batches: token ids, int64 [B, T], to measure the errors of activations on.

    Returns:
        Per target: `quantization.weight_error` of weights; `quantization.activation_error` of
        activations (|x^ - x|^2 / |x|^2 over all batches; missing for an expert that no token
        reached); and `quantization.low`, `.high` and `.scale` of static ranges.
    """
    metrics: list[Metric] = []
    errors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in quantized_modules(model).items():
            quantizer: Any = module
            if isinstance(module, QuantizedLinear):
                error = module.weight_error
                metrics.append(Metric(name="quantization.weight_error", value=error, where=name))
                quantizer = module.input_quantizer
            if isinstance(quantizer, StaticQuantizer):
                low, high = quantizer.range
                values = {"low": low, "high": high, "scale": float(quantizer.scale)}
                metrics += [
                    Metric(name=f"quantization.{key}", value=value, where=name)
                    for key, value in values.items()
                ]
            if isinstance(quantizer, StaticQuantizer | DynamicQuantizer):
                handle = quantizer.register_forward_hook(_error_hook(errors, name))
                stack.callback(handle.remove)
        count = 0
        for ids_BT in batches:
            model(input_ids=ids_BT.to(model.device), use_cache=False)
            count += len(ids_BT)
    for name, (error, power) in errors.items():
        value = float(error / power) if power else 0.0
        metrics.append(
            Metric(name="quantization.activation_error", value=value, where=name, n=count)
        )
    return tuple(metrics)


def _error_hook(
    sums: dict[str, Tensor], name: str
) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
    """A forward hook of a quantizer that adds |x^ - x|^2 and |x|^2 to `sums[name]`."""

    def add(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        (x,) = args
        error, power = (output - x).double().square().sum(), x.double().square().sum()
        sums[name] = sums.get(name, 0) + torch.stack([error, power]).cpu()

    return add


def measure_sensitivity(
    model: PreTrainedModel,
    scheme: Scheme,
    score: Callable[[PreTrainedModel], float],
    *,
    calibration: Collection[Tensor] | None = None,
    targets: Collection[str] | None = None,
    by: str = "kind",
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Score the model with all groups of tensors quantized but one, and with only that one.

    Static ranges are those of the model in which everything is quantized.

    Args:
        model, scheme, calibration, targets, seed: see `quantize`.
        score: computes the score of a model, such as its perplexity on held-out windows.
        by: how tensors are grouped: one group per `kind` (the same tensor in all layers and
            experts), per `layer` or per `target`.

    Returns:
        The two scores by group.  The first groups are `all` and `none`, whose two scores are equal.
    """
    check_choice("by", by, SENSITIVITY_GROUPS)
    batches = None if calibration is None else list(calibration)
    quantized = quantize(model, scheme, calibration=batches, targets=targets, seed=seed)
    modules = quantized_modules(quantized)
    unquantized = transformed_copy(model, scheme, batches, modules, seed)
    groups: dict[str, set[str]] = {}
    for name in modules:
        groups.setdefault(_group(quantized, name, by), set()).add(name)
    everything = score(quantized)
    with _quantization_disabled(quantized, unquantized, modules):
        nothing = score(quantized)
    scores = {"all": (everything, everything), "none": (nothing, nothing)}
    for group, names in groups.items():
        with _quantization_disabled(quantized, unquantized, names):
            without = score(quantized)
        with _quantization_disabled(quantized, unquantized, modules.keys() - names):
            scores[group] = without, score(quantized)
    return scores


def sensitivity_table(
    model: PreTrainedModel,
    scheme: Scheme,
    ids_NT: Tensor,
    calibration: list[Tensor] | None,
    *,
    progress: Progress = no_progress,
    **options: Any,
) -> dict[str, list[Any]]:
    """The table `sensitivity` of records, from `measure_sensitivity`.

    Its columns are the `group`, and the perplexity on the windows `ids_NT` with `all_but` this
    group and with `only` this group quantized.
    """
    passes = 0

    def score(partly_quantized: PreTrainedModel) -> float:
        nonlocal passes
        passes += 1
        progress(f"measuring the sensitivity to each tensor: pass {passes}")
        return perplexity(partly_quantized, ids_NT)

    scores = measure_sensitivity(model, scheme, score, calibration=calibration, **options)
    return {
        "group": list(scores),
        "all_but": [value for value, _ in scores.values()],
        "only": [value for _, value in scores.values()],
    }


def _group(model: PreTrainedModel, name: str, by: str) -> str:
    """`model.layers.3.mlp.down_proj` is of kind `mlp.down_proj`, and of layer `model.layers.3`."""
    experts = expert_of(model, name) if by == "kind" else None
    name = ".".join(experts) if experts else name
    layer = re.match(r"(.*?\.\d+)(?:\.(.+)|(:.+))$", name)
    if by == "target" or layer is None:
        return name
    return layer[1] if by == "layer" else layer[2] or f"layer{layer[3]}"


@contextmanager
def _quantization_disabled(
    quantized: PreTrainedModel, unquantized: PreTrainedModel, names: Iterable[str]
) -> Iterator[None]:
    """Inside the context, the targets `names` of `quantized` compute as in `unquantized`."""
    found = quantized_modules(quantized)
    disabled = {name: found[name] for name in names}
    try:
        for name, module in disabled.items():
            if isinstance(module, StaticQuantizer):
                module.enabled = False
            else:
                replace_linear(quantized, name, unquantized.get_submodule(name))
        yield
    finally:
        for name, module in disabled.items():
            if isinstance(module, StaticQuantizer):
                module.enabled = True
            else:
                replace_linear(quantized, name, module)


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids_NT: Tensor) -> float:
    """exp of the mean next-token loss over windows of token ids, int64 [N, T]."""
    losses = [
        token_losses(model(input_ids=ids_BT, use_cache=False).logits, ids_BT).mean()
        for ids_BT in ids_NT.to(model.device).split(1)
    ]
    return float(torch.stack(losses).mean().exp())
