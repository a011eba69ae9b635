"""What quantisation costs, tensor by tensor: ranges and errors, and the loss of quality each makes.

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
from oasis_attn.quantization.linear import QuantizedLinear, replace_linear
from oasis_attn.quantization.linearize import expert_of
from oasis_attn.quantization.quantizers import DynamicQuantizer, StaticQuantizer
from oasis_attn.quantization.schemes import Scheme
from oasis_attn.quantization.simulate import quantize, quantized_sites, transformed
from oasis_attn.records import Metric

GROUPINGS = ("kind", "layer", "site")


@torch.no_grad()
def site_metrics(model: PreTrainedModel, batches: Iterable[Tensor]) -> tuple[Metric, ...]:
    """Where each grid of a simulated model lies, and how far values move to it.

    Args:
        model: from `quantize`.
        batches: token ids, int64 [B, T], for the errors of activations.

    Returns:
        By site: of weights `quantization.weight_error`, of what is computed
        `quantization.activation_error` (|x^ - x|^2 / |x|^2, over all batches; none for an expert
        that no token of them reached), and, where ranges are static, `quantization.low`, `.high`
        and `.scale`.
    """
    metrics: list[Metric] = []
    errors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in quantized_sites(model).items():
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
                handle = quantizer.register_forward_hook(_adder(errors, name))
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


def _adder(
    sums: dict[str, Tensor], name: str
) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
    def add(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        (x,) = args
        moved, power = (output - x).double().square().sum(), x.double().square().sum()
        sums[name] = sums.get(name, 0) + torch.stack([moved, power]).cpu()

    return add


def sensitivity(
    model: PreTrainedModel,
    scheme: Scheme,
    score: Callable[[PreTrainedModel], float],
    *,
    calibration: Collection[Tensor] | None = None,
    sites: Collection[str] | None = None,
    by: str = "kind",
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Which tensors cost what: the score with all quantised but a group, and with only that group.

    Ranges are those found with everything quantised.

    Args:
        model, scheme, calibration, sites, seed: see `quantize`; what is to be quantised.
        score: of a model, such as its perplexity on held-out windows.
        by: groups are the tensors of one `kind` over all layers and experts, of one `layer`, or
            single `site`s.

    Returns:
        by group, the two scores; `all` and `none` come first, (score, score) each.
    """
    check_choice("by", by, GROUPINGS)
    batches = None if calibration is None else list(calibration)
    twin = quantize(model, scheme, calibration=batches, sites=sites, seed=seed)
    found = quantized_sites(twin)
    plain = transformed(model, scheme, batches, found, seed)
    groups: dict[str, set[str]] = {}
    for name in found:
        groups.setdefault(_group(twin, name, by), set()).add(name)
    everything = score(twin)
    with _left_exact(twin, plain, found):
        nothing = score(twin)
    scores = {"all": (everything, everything), "none": (nothing, nothing)}
    for group, names in groups.items():
        with _left_exact(twin, plain, names):
            without = score(twin)
        with _left_exact(twin, plain, found.keys() - names):
            scores[group] = without, score(twin)
    return scores


def _group(model: PreTrainedModel, name: str, by: str) -> str:
    """`model.layers.3.mlp.down_proj` is of kind `mlp.down_proj`, and of layer `model.layers.3`."""
    experts = expert_of(model, name) if by == "kind" else None
    name = ".".join(experts) if experts else name
    layer = re.match(r"(.*?\.\d+)(?:\.(.+)|(:.+))$", name)
    if by == "site" or layer is None:
        return name
    return layer[1] if by == "layer" else layer[2] or f"layer{layer[3]}"


@contextmanager
def _left_exact(
    twin: PreTrainedModel, plain: PreTrainedModel, names: Iterable[str]
) -> Iterator[None]:
    """While open, the sites `names` of `twin` compute as in `plain`, unquantised."""
    found = quantized_sites(twin)
    left = {name: found[name] for name in names}
    try:
        for name, module in left.items():
            if isinstance(module, StaticQuantizer):
                module.enabled = False
            else:
                replace_linear(twin, name, plain.get_submodule(name))
        yield
    finally:
        for name, module in left.items():
            if isinstance(module, StaticQuantizer):
                module.enabled = True
            else:
                replace_linear(twin, name, module)


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids_NT: Tensor) -> float:
    """exp of the mean next-token loss over windows, one at a time."""
    losses = [
        token_losses(model(input_ids=ids_BT, use_cache=False).logits, ids_BT).mean()
        for ids_BT in ids_NT.to(model.device).split(1)
    ]
    return float(torch.stack(losses).mean().exp())
