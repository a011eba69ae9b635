"""Load a model, move its attention sink into a null, measure the effect, and save it.

Axes: N windows, B windows in a batch, T tokens, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.data import Windows, calibration_corpora, read_windows
from oasis_attn.data.blocks import Packing
from oasis_attn.errors import UserError
from oasis_attn.files import check_free, staged_folder
from oasis_attn.hub.loading import load_model, quiet
from oasis_attn.hub.model_card import write_card
from oasis_attn.hub.model_info import check_lengths, describe_model, eval_mode
from oasis_attn.hub.null_from_sink import CANDIDATES, null_from_sink
from oasis_attn.hub.null_options import check_null_from_sink
from oasis_attn.hub.prefix import prefix_of
from oasis_attn.hub.tokenizer_bos import without_bos
from oasis_attn.hub.tokenizer_prefix import check_no_prefix_in_tokenizer
from oasis_attn.measure.hooks import HookPoint, check_output, find_hook_points
from oasis_attn.measure.loss import loss_metrics
from oasis_attn.measure.sinks import Sinks
from oasis_attn.modeling.attention import observe_attention
from oasis_attn.ops.token_losses import token_losses
from oasis_attn.progress import Progress, Steps, no_progress
from oasis_attn.records import ConversionRecord, Metric, current_environment


def null_from_sink_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    variant: str | None = None,
    overrides: dict[str, Any] | None = None,
    nulls: int = 1,
    prune_neurons: int = 0,
    null_from_bos: bool = False,
    dtype: str = "auto",
    calibration: str = "stdlib",
    calibration_split: str = "train",
    evaluation: str | None = None,
    evaluation_split: str = "test",
    window: int = 512,
    windows: int = 16,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> ConversionRecord:
    """Convert `model` with `null_from_sink`, and write model, tokenizer and record to `out`.

    Args:
        model: a name or path for `load_model`.
        out: a new folder; `from_pretrained` loads the converted model from it.
        variant: see `null_from_sink`; default `kv_null`.
        overrides: settings of `OasisConfig` that replace those of the variant.
        nulls, prune_neurons: see `null_from_sink`.
        null_from_bos: make the first null from BOS, for a model that was trained with BOS in front
            of every text.  The saved tokenizer does not put BOS in front of texts, and the model is
            measured without BOS after the conversion; the losses before and after are those of all
            tokens of the text but the first, which nothing predicts without BOS.
        dtype: dtype in which the model is measured and saved; `auto` is that of the checkpoint.
        calibration, calibration_split: corpus and split that the nulls are computed from.  The BOS
            tokens in front of its windows are left out.
        evaluation, evaluation_split: corpus and split for the measurements; the default corpus is
            that of `calibration`.
        window: tokens per window.
        windows: maximum number of windows for calibration, and for the measurements; they are
            spread over the split.
        device: see `load_model`.
        trust_remote_code: see `load_model`.
        progress: see `Progress`.

    Returns:
        The record.  It has each metric `before` and `after` the conversion: `loss.windowed`,
        `perplexity.windowed`, `outlier.max_activation` and `sink.*`; and `null.mass` after it.  Its
        tables `before` and `after` are those of `measure_sink`.

    Raises:
        UserError: unusable arguments, an error of `null_from_sink`, or `null_from_bos` with a
            tokenizer that has no BOS or cannot be saved without it.  Nothing is written then.
    """
    check_null_from_sink(
        overrides or {}, nulls=nulls, prune_neurons=prune_neurons, window=window, windows=windows
    )
    check_free(out)
    corpora = calibration_corpora(calibration, calibration_split, evaluation, evaluation_split)
    steps = Steps(progress, 5 + CANDIDATES * nulls + 2 * prune_neurons)
    steps.start("loading the model")
    loaded, tokenizer = load_model(
        model, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    check_no_prefix_in_tokenizer(tokenizer, model)
    check_lengths(loaded, [window], "window")
    bos = _bos(tokenizer) if null_from_bos else None
    saved_tokenizer = tokenizer if bos is None else without_bos(tokenizer, bos)
    seen, held_out = (
        read_windows(corpus, tokenizer, window=window, windows=windows) for corpus in corpora
    )
    begin = 0 if seen.info.bos is None else 1
    steps.start("computing the null")
    converted, layer_0, tokens, neurons = null_from_sink(
        loaded,
        seen.ids_NT[:, begin:],
        variant=variant or "kv_null",
        nulls=nulls,
        prune_neurons=prune_neurons,
        first_token=bos,
        on_try=partial(steps.start, "trying tokens and neurons"),
        **overrides or {},
    )
    windows_before, windows_after = _scored_alike(held_out) if null_from_bos else (held_out,) * 2
    measured = {"before": (loaded, windows_before), "after": (converted, windows_after)}
    metrics: list[Metric] = []
    tables: dict[str, Any] = {}
    for where, (each, texts) in measured.items():
        steps.start(f"measuring {where}")
        found, tables[where] = measure_sink(each, texts)
        metrics += [replace(metric, where=where) for metric in found]
        for row in tables[where]["largest"]:
            row["text"] = tokenizer.decode([row["token"]])
    record = ConversionRecord(
        environment=current_environment(loaded.device),
        model=describe_model(loaded),
        config=converted.config.settings,
        nulls=1 + len(tokens),
        bos=None if bos is None else str(tokenizer.decode([bos])),
        layer_0=None if layer_0 is None else str(tokenizer.decode([layer_0])),
        tokens=tokens,
        texts=tuple(str(tokenizer.decode([token])) for token in tokens),
        neurons=tuple((each.layer, each.unit) for each in neurons),
        data=windows_before.info,
        calibration=seen.info,
        metrics=tuple(metrics),
        tables=tables,
    )
    steps.start("writing")
    with quiet(), staged_folder(out) as stage:
        converted.save_pretrained(stage)
        saved_tokenizer.save_pretrained(stage)
        record.save(stage / "record.json")
        write_card(converted, stage)  # again, because the card shows metrics of the record
    if null_from_bos and _chats_begin_with_bos(tokenizer):
        warnings.warn(
            "tokenizer: its chat template writes BOS, which then takes attention from the null;"
            " remove it from the template",
            stacklevel=2,
        )
    return record


def _bos(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token in front of windows."""
    bos = Packing.of(tokenizer).bos
    if bos is None:
        raise UserError("null_from_bos: the tokenizer puts no BOS in front of texts")
    return bos


def _scored_alike(windows: Windows) -> tuple[Windows, Windows]:
    """The windows with BOS and without it, with the loss of the same tokens."""
    count, length = windows.ids_NT.shape
    info = replace(windows.info, tokens_scored=count * (length - 2))
    with_bos = replace(windows, scored=(length - 2,) * count, info=info)
    return with_bos, replace(with_bos, ids_NT=windows.ids_NT[:, 1:])


def _chats_begin_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    template = str(getattr(tokenizer, "chat_template", None) or "")
    bos = tokenizer.bos_token
    return "bos_token" in template or (bos is not None and str(bos) in template)


@torch.no_grad()
def measure_sink(model: PreTrainedModel, windows: Windows) -> tuple[list[Metric], dict[str, Any]]:
    """Perplexity, largest activations and sinks of a model, in one pass over all windows.

    Returns:
        The metrics `loss.windowed` and `perplexity.windowed` (of the tokens that are `scored`),
        `outlier.max_activation` and those of
        `Sinks`.  The tables of `Sinks`, and `largest`: for each layer the `value`, `channel`,
        `token` and `position` of the output with the largest |x|.

    Raises:
        UserError: the layers of the model were not found, or a window is longer than the model has
            positions.
    """
    check_lengths(model, windows.ids_NT.shape[1:], "window")
    points = find_hook_points(model)
    layers = [point for point in points if point.kind == "layer"]
    sinks, losses = Sinks(points, prefixed=prefix_of(model) is not None), []
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
        rows = windows.ids_NT.to(model.device).split(1)
        for ids_BT, scored in zip(rows, windows.scored, strict=True):
            losses_BT = token_losses(model(input_ids=ids_BT, use_cache=False).logits, ids_BT)
            losses.append(losses_BT[:, -scored:].mean(-1))
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
