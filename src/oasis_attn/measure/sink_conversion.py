"""Load a model, move its attention sink into a null, measure the effect, and save it.

Axes: N windows, B windows in a batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from oasis_attn.data import Windows, load_corpus, read_windows
from oasis_attn.files import check_free, staged_folder
from oasis_attn.hub.loading import load_model, quiet
from oasis_attn.hub.model_card import write_card
from oasis_attn.hub.model_info import check_lengths, describe_model, eval_mode
from oasis_attn.hub.null_from_sink import CANDIDATES, null_from_sink
from oasis_attn.hub.null_options import check_null_from_sink
from oasis_attn.measure.hooks import HookPoint, check_output, find_hook_points
from oasis_attn.measure.loss import loss_metrics, window_losses
from oasis_attn.measure.sinks import Sinks
from oasis_attn.modeling.attention import observe_attention
from oasis_attn.progress import Progress, Steps, no_progress
from oasis_attn.records import ConversionRecord, Metric


def null_from_sink_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    variant: str | None = None,
    overrides: dict[str, Any] | None = None,
    nulls: int = 1,
    dtype: str = "auto",
    calibration: str = "stdlib",
    calibration_split: str = "train",
    evaluation: str | None = None,
    evaluation_split: str = "test",
    window: int = 512,
    windows: int = 16,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> ConversionRecord:
    """Convert `model` with `null_from_sink`, and write model, tokenizer and record to `out`.

    Args:
        model: a name or path for `load_model`.
        out: a new folder; `from_pretrained` loads the converted model from it.
        variant: see `null_from_sink`; default `kv_null`.
        overrides: settings of `OasisConfig` that replace those of the variant.
        nulls: see `null_from_sink`.
        dtype: dtype in which the model is measured and saved; `auto` is that of the checkpoint.
        calibration, calibration_split: corpus and split that the nulls are computed from.  The BOS
            tokens in front of its windows are left out.
        evaluation, evaluation_split: corpus and split for the measurements; the default corpus is
            that of `calibration`.
        window: tokens per window.
        windows: maximum number of windows for calibration, and for the measurements; they are
            spread over the split.
        trust_remote_code: see `load_model`.
        progress: see `Progress`.

    Returns:
        The record.  It has each metric `before` and `after` the conversion: `loss.windowed`,
        `perplexity.windowed`, `outlier.max_activation` and `sink.*`; and `null.mass` after it.  Its
        tables `before` and `after` are those of `measure_sink`.

    Raises:
        UserError: unusable arguments, or an error of `null_from_sink`.  Nothing is written then.
    """
    check_null_from_sink(overrides or {}, nulls=nulls, window=window, windows=windows)
    check_free(out)
    corpora = [
        load_corpus(calibration, calibration_split),
        load_corpus(evaluation or calibration, evaluation_split),
    ]
    steps = Steps(progress, 5 + CANDIDATES * nulls)
    steps.start("loading the model")
    loaded, tokenizer = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
    check_lengths(loaded, [window], "window")
    seen, held_out = (
        read_windows(corpus, tokenizer, window=window, windows=windows) for corpus in corpora
    )
    begin = 0 if seen.info.bos is None else 1
    steps.start("computing the null")
    converted, layer_0, tokens = null_from_sink(
        loaded,
        seen.ids_NT[:, begin:],
        variant=variant or "kv_null",
        nulls=nulls,
        on_try=partial(steps.start, "trying tokens for the null"),
        **overrides or {},
    )
    measured = {"before": loaded, "after": converted}
    metrics: list[Metric] = []
    tables: dict[str, Any] = {}
    for where, each in measured.items():
        steps.start(f"measuring {where}")
        found, tables[where] = measure_sink(each, held_out)
        metrics += [replace(metric, where=where) for metric in found]
        for row in tables[where]["largest"]:
            row["text"] = tokenizer.decode([row["token"]])
    record = ConversionRecord(
        model=describe_model(loaded),
        config=converted.config.settings,
        nulls=1 + len(tokens),
        layer_0=None if layer_0 is None else str(tokenizer.decode([layer_0])),
        tokens=tokens,
        texts=tuple(str(tokenizer.decode([token])) for token in tokens),
        data=held_out.info,
        calibration=seen.info,
        metrics=tuple(metrics),
        tables=tables,
    )
    steps.start("writing")
    with quiet(), staged_folder(out) as stage:
        converted.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        record.save(stage / "record.json")
        write_card(converted, stage)  # again, because the card shows metrics of the record
    return record


@torch.no_grad()
def measure_sink(model: PreTrainedModel, windows: Windows) -> tuple[list[Metric], dict[str, Any]]:
    """Perplexity, largest activations and sinks of a model, in one pass over all windows.

    Returns:
        The metrics `loss.windowed`, `perplexity.windowed`, `outlier.max_activation` and those of
        `Sinks`.  The tables of `Sinks`, and `largest`: for each layer the `value`, `channel`,
        `token` and `position` of the output with the largest |x|.

    Raises:
        UserError: the layers of the model were not found, or a window is longer than the model has
            positions.
    """
    check_lengths(model, windows.ids_NT.shape[1:], "window")
    points = find_hook_points(model)
    layers = [point for point in points if point.kind == "layer"]
    sinks, losses = Sinks(points), []
    largest: list[Any] = [None] * len(layers)

    def see(point: HookPoint, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        x_BTD = check_output(model, point, x, ids_BT)
        place = x_BTD.abs().argmax()
        row, position, channel = map(int, torch.unravel_index(place, x_BTD.shape))
        value = float(x_BTD[row, position, channel])
        assert point.layer is not None
        before = largest[point.layer]
        if before is None or not abs(value) <= abs(before["value"]):
            token = int(ids_BT[row, position])
            found = {"value": value, "channel": channel, "token": token, "position": position}
            largest[point.layer] = found

    with eval_mode(model), ExitStack() as stack:
        stack.enter_context(observe_attention(model, sinks.update))
        for point in layers:
            hook = partial(_see_output, see, point)
            stack.callback(point.module.register_forward_hook(hook).remove)
        for ids_BT in windows.ids_NT.to(model.device).split(1):
            losses.append(window_losses(model, ids_BT))
            sinks.check(model)
    largest_activation = max(abs(row["value"]) for row in largest)
    metrics = [
        *loss_metrics(torch.cat(losses)),
        Metric(name="outlier.max_activation", value=largest_activation, n=len(windows)),
        *sinks.metrics(),
    ]
    return metrics, {"largest": largest} | sinks.tables()


def _see_output(
    see: Callable[[HookPoint, Any], None], point: HookPoint, _module: Any, _args: Any, output: Any
) -> None:
    see(point, output)
