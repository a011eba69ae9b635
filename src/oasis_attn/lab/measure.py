"""Measure a decoder on a task: errors, sinks, outliers, depth routing and the null signal.

The numbers come from one pass over all sequences, with the observers and hook points of
`oasis_attn.measure`.

Axes: B sequences, T tokens, N coordinates of a token, L layers, H heads, S depth sources, R routers
with at least two sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from oasis_attn.data.trigger import TriggerBatch
from oasis_attn.hub.model_info import eval_mode
from oasis_attn.lab.decoder import embed, predict
from oasis_attn.measure.depth import Depth
from oasis_attn.measure.hooks import HookPoint, find_hook_points
from oasis_attn.measure.outliers import Outliers
from oasis_attn.measure.statistics import mean_metric
from oasis_attn.modeling.attention import AttentionCall, observe_attention
from oasis_attn.modeling.depth_cache import RouterCall, null_signal_off, observe_depth
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from oasis_attn.quantization import quantize, quantized_modules, schemes
from oasis_attn.records import Metric

_CALIBRATION_BATCHES = 16


class TaskAttention:
    """First-token and null probabilities at idle and at trigger queries.

    Args:
        batch: the sequences of the pass.
    """

    def __init__(self, batch: TriggerBatch) -> None:
        self._masks = {"idle": batch.idle_BT, "trigger": batch.trigger_BT}
        self._n = len(batch.x_BTN)
        self._means: dict[str, dict[int, Tensor]] = {}

    def update(self, call: AttentionCall) -> None:
        """Add one attention call."""
        for name, p_BHT in (("sink", call.column(0)), ("null", call.null_BHT)):
            for kind, mask_BT in self._masks.items():
                p_HQ = p_BHT.transpose(0, 1)[:, mask_BT]
                layers = self._means.setdefault(f"{name}.{kind}", {})
                layers[call.layer] = p_HQ.mean(-1, dtype=torch.float64)

    def _tables(self) -> dict[str, Tensor]:
        """Means over queries, [L, H]; the null's only if attention has one."""
        tables = {
            name: torch.stack([layers[index] for index in sorted(layers)])
            for name, layers in self._means.items()
        }
        has_null = any(bool(tables[f"null.{kind}"].any()) for kind in self._masks)
        return {name: table for name, table in tables.items() if has_null or name[:4] == "sink"}

    def metrics(self) -> list[Metric]:
        """`sink.idle`, `sink.trigger`, `null.idle`, `null.trigger`: means over layers and heads.
        `sink.idle_largest`: the largest of any head."""
        tables = self._tables()
        values = {name: table.mean() for name, table in tables.items()}
        values["sink.idle_largest"] = tables["sink.idle"].max()
        return [Metric(name=name, value=float(value), n=self._n) for name, value in values.items()]

    def tables(self) -> dict[str, Any]:
        """The same by layer and head, [L][H]."""
        return {name: table.tolist() for name, table in self._tables().items()}


@torch.no_grad()
def measure_decoder(
    model: OasisForCausalLM, batch: TriggerBatch
) -> tuple[list[Metric], dict[str, Any]]:
    """The metrics and tables of a decoder on the sequences of `batch`.

    Returns:
        Metrics: `task.*`, `sink.*`, `null.*` if attention has a null, `outlier.*`, and with depth
        routing `depth.*` and, with a null signal, `signal.*`.
        Tables: those of `TaskAttention`, `Outliers`, `Depth`, and `signal.beta` [R].
    """
    points = find_hook_points(model)
    attention, outliers, depth = TaskAttention(batch), Outliers(points), Depth()
    ratios: list[Metric] = []
    kinds_BT = batch.trigger_BT.long() + 1  # the id of a token: 0 the first, 1 idle, 2 a trigger
    kinds_BT[:, 0] = 0

    def hook(point: HookPoint) -> Any:
        def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
            x_BTD = output[0] if isinstance(output, tuple) else output
            outliers.update(point, x_BTD, kinds_BT)
            if point.kind == "layer":
                ratios.append(_over_median(x_BTD))

        return point.module.register_forward_hook(see)

    with eval_mode(model), _fixed_random_state(), ExitStack() as stack:
        stack.enter_context(observe_attention(model, attention.update))
        stack.enter_context(observe_depth(model, depth.update))
        for point in points:
            stack.callback(hook(point).remove)
        output_BTN = predict(model, batch.x_BTN)
    signal_metrics, signal_tables = _signal(model, batch)
    metrics = [
        *_errors(output_BTN, batch),
        *attention.metrics(),
        *outliers.metrics(),
        max(ratios, key=lambda metric: metric.value),
        *depth.metrics(),
        *signal_metrics,
    ]
    return metrics, attention.tables() | outliers.tables() | depth.tables() | signal_tables


def _over_median(x_BTD: Tensor) -> Metric:
    """`outlier.max_over_median` of one layer's output."""
    sizes_BM = x_BTD.flatten(1).abs()
    return mean_metric("outlier.max_over_median", sizes_BM.amax(1) / sizes_BM.median(1).values)


@torch.no_grad()
def attention_maps(model: OasisForCausalLM, batch: TriggerBatch) -> Tensor:
    """All attention probabilities of a decoder, [L, B, H, T, 1 + T]; the first key is the null."""
    maps: dict[int, Tensor] = {}

    def update(call: AttentionCall) -> None:
        p_BHTS = call.rows(0, batch.x_BTN.shape[1])
        maps[call.layer] = torch.cat([call.null_BHT.unsqueeze(-1).to(p_BHTS.dtype), p_BHTS], -1)

    with eval_mode(model), _fixed_random_state(), observe_attention(model, update):
        predict(model, batch.x_BTN)
    return torch.stack([maps[layer] for layer in sorted(maps)])


def quantized_errors(
    model: OasisForCausalLM,
    batch: TriggerBatch,
    calibration: TriggerBatch,
    names: Sequence[str],
) -> tuple[list[Metric], dict[str, int]]:
    """The task error of the model quantized with each scheme, and the number of its targets.

    Args:
        model: the model, unquantized.
        batch: the sequences to measure on.
        calibration: the sequences that static ranges are calibrated on.
        names: names of quantization schemes.

    Returns:
        For each scheme, `task.error@SCHEME` and its increase and ratio over the unquantized model,
        `task.error_increase@SCHEME` and `task.error_ratio@SCHEME`; and the number of targets.
    """
    metrics, targets = [], {}
    plain = _error(model, batch)
    with torch.no_grad():
        embedded_BTD = embed(model, calibration.x_BTN)
    batches = embedded_BTD.split(-(-len(embedded_BTD) // _CALIBRATION_BATCHES))
    for name in names:
        needed = schemes()[name].needs_calibration
        quantized: Any = quantize(model, name, calibration=batches if needed else None)
        error = _error(quantized, batch)
        found = {
            "task.error": error,
            "task.error_increase": error - plain,
            "task.error_ratio": error / plain,
        }
        n = len(batch.x_BTN)
        metrics += [Metric(name=f"{key}@{name}", value=v, n=n) for key, v in found.items()]
        targets[name] = len(quantized_modules(quantized))
    return metrics, targets


@contextmanager
def _fixed_random_state() -> Iterator[None]:
    """Context with a random state of its own: the shuffled null signal draws from it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@torch.no_grad()
def _error(model: OasisForCausalLM, batch: TriggerBatch) -> float:
    with eval_mode(model), _fixed_random_state():
        return float(batch.mean_error(predict(model, batch.x_BTN).double()))


def _errors(output_BTN: Tensor, batch: TriggerBatch) -> list[Metric]:
    output_BTN = output_BTN.double()
    errors_BT = batch.errors(output_BTN)
    without_output = batch.mean_error(torch.zeros_like(output_BTN))
    trigger_BT, idle_BT = (
        mask_BT[:, batch.start :] for mask_BT in (batch.trigger_BT, batch.idle_BT)
    )
    error = mean_metric("task.error", errors_BT.mean(-1))
    values = {
        "task.relative_error": error.value / float(without_output),
        "task.error_trigger": float(errors_BT[trigger_BT].mean()),
        "task.error_idle": float(errors_BT[idle_BT].mean()),
        "task.largest_error": float((batch.values(output_BTN) - batch.targets).abs().max()),
    }
    return [error, *(Metric(name=name, value=v, n=error.n) for name, v in values.items())]


def _signal(
    model: OasisForCausalLM, batch: TriggerBatch
) -> tuple[list[Metric], dict[str, list[float]]]:
    """What the null signal does in the trained model: beta, and the effect of switching it off."""
    if model.config.null_signal == "off":
        return [], {}

    def run() -> tuple[Tensor, list[Tensor]]:
        shares: list[Tensor] = []

        def update(call: RouterCall) -> None:
            if call.weights_BTS.shape[-1] > 1:  # the next norm removes a common factor
                shares.append(call.weights_BTS / call.weights_BTS.sum(-1, keepdim=True))

        with observe_depth(model, update):
            return predict(model, batch.x_BTN), shares

    with eval_mode(model):
        with _fixed_random_state():
            output_BTN, shares = run()
        with null_signal_off(model):
            without_BTN, without = run()
    moved = [(a - b).abs().sum(-1).mean() / 2 for a, b in zip(shares, without, strict=True)]
    outputs = output_BTN.double(), without_BTN.double()
    errors = [batch.mean_error(each) for each in outputs]
    with_it, without_it = (batch.values(each) for each in outputs)
    change = (with_it - without_it).square().mean()
    beta_R = _betas(model)
    values = {
        "signal.beta": beta_R.mean(),
        "signal.beta_largest": beta_R.max(),
        "signal.weights_change": torch.stack(moved).mean(),
        "signal.output_change": change / batch.targets.double().square().mean(),
        "signal.error_change": errors[1] - errors[0],
    }
    n = len(batch.x_BTN)
    metrics = [Metric(name=name, value=float(value), n=n) for name, value in values.items()]
    return metrics, {"signal.beta": beta_R.tolist()}


def _betas(model: OasisForCausalLM) -> Tensor:
    """beta of each router with at least two sources, [R]."""
    if model.model.depth is not None:
        _, beta_R = model.model.depth()
        assert beta_R is not None
        return beta_R[1:]  # the first router reads the embedding only
    layers: list[Any] = list(model.model.layers)
    routers = [router for layer in layers for router in (layer.attn_res_sa, layer.attn_res_mlp)]
    return torch.cat([router.beta for router in routers])
