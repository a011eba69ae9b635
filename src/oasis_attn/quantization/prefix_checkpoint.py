"""Load a model, find a prefix that makes it easier to quantize, and save both with a record."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.data import calibration_corpora, read_windows
from oasis_attn.files import check_free, staged_folder
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.model_card import write_card
from oasis_attn.hub.model_info import check_lengths, describe_model
from oasis_attn.hub.prefix import check_can_have_prefix, compute_prefix, with_prefix
from oasis_attn.hub.tokenizer_prefix import check_no_prefix_in_tokenizer
from oasis_attn.progress import Progress, Steps, no_progress
from oasis_attn.quantization.options import check_prefix
from oasis_attn.quantization.prefix_search import (
    find_prefix,
    max_activations,
    range_noise,
    tune_prefix,
)
from oasis_attn.quantization.schemes import Scheme, get_scheme
from oasis_attn.quantization.sensitivity import perplexity
from oasis_attn.quantization.simulate import check_unquantized_config, quantize
from oasis_attn.records import Metric, PrefixRecord, current_environment

_SEARCH_WINDOWS, _SEARCH_TOKENS = 4, 48
_MEASUREMENTS = 4  # steps of `_measure`


def prefix_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "greedy",
    length: int = 4,
    tune_steps: int = 0,
    scheme: str | Scheme = "w8a8-static-linear",
    calibration: str = "stdlib",
    calibration_split: str = "train",
    evaluation: str | None = None,
    evaluation_split: str = "test",
    window: int = 512,
    windows: int = 16,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> PrefixRecord:
    """Find a prefix for `model`, optionally tune it, and write model, prefix and record to `out`.

    Args:
        model: see `load_model`.
        out: a new folder.  `from_pretrained` restores the model with its prefix from it, and raises
            an error if `oasis_attn` was not imported.
        method, length: see `find_prefix`.
        tune_steps: steps of `tune_prefix`, one window each; with 0, keys and values stay as the
            model computed them.
        scheme: a static scheme, to measure how much the prefix helps; the saved model is not
            quantized.
        calibration, calibration_split: corpus and split for search, tuning and calibration.
        evaluation, evaluation_split: corpus and split for the measurements; the default corpus is
            that of `calibration`.
        window: tokens per window.
        windows: maximum number of windows for calibration, and for the measurements; they are
            spread over the split.
        device: see `load_model`.
        trust_remote_code: see `load_model`.
        progress: see `Progress`.

    Returns:
        The record.  It has each metric `before` (without prefix) and `after` (with prefix):
        `perplexity.windowed`, `perplexity.quantized` (of the model quantized with `scheme`),
        `prefix.noise` (see `range_noise`), and `prefix.max_linear` and `prefix.max_hidden` (see
        `max_activations`).

    Raises:
        UserError: unusable arguments, or no prefix helps this model.  Nothing is written then.
    """
    scheme = get_scheme(scheme)
    check_prefix(
        scheme, method=method, length=length, tune_steps=tune_steps, window=window, windows=windows
    )
    check_free(out)
    corpora = calibration_corpora(calibration, calibration_split, evaluation, evaluation_split)

    steps = Steps(progress, 1 + length + tune_steps + 2 * _MEASUREMENTS + 1)
    steps.start("loading the model")
    loaded, tokenizer = load_model(
        model,
        device=device,
        trust_remote_code=trust_remote_code,
        check=check_unquantized_config,
    )
    check_no_prefix_in_tokenizer(tokenizer, model)
    check_can_have_prefix(loaded)
    check_lengths(loaded, [window + length], "window with the prefix")
    seen, held_out = (
        read_windows(corpus, tokenizer, window=window, windows=windows) for corpus in corpora
    )
    search_BT = search_rows(seen.ids_NT)
    searching = partial(steps.start, "searching for a prefix")
    tokens = find_prefix(loaded, search_BT, method=method, length=length, on_round=searching)
    steps.skip_to(1 + length)
    prefix = compute_prefix(loaded, tokens)
    if tune_steps:
        tuning = partial(steps.start, "tuning the prefix")
        prefix = tune_prefix(loaded, prefix, seen.ids_NT.split(1), steps=tune_steps, on_step=tuning)
    prefixed = with_prefix(loaded, prefix)
    metrics: list[Metric] = []
    for where, measured in (("before", loaded), ("after", prefixed)):
        noise = float(range_noise(measured, search_BT, [()]))
        metrics.append(Metric(name="prefix.noise", value=noise, where=where, n=len(search_BT)))
        metrics += _measure(measured, seen.ids_NT, held_out.ids_NT, scheme, where, steps)

    record = PrefixRecord(
        environment=current_environment(loaded.device),
        model=describe_model(loaded),
        tokens=tuple(tokens),
        text=str(tokenizer.decode(list(tokens))),
        method=method,
        tune_steps=tune_steps,
        scheme=scheme.to_dict(),
        data=held_out.info,
        calibration=seen.info,
        metrics=tuple(metrics),
    )
    steps.start("writing")
    with staged_folder(out) as stage:
        prefixed.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        record.save(stage / "record.json")
        write_card(prefixed, stage)  # again, because the card shows metrics of the record
    return record


def search_rows(ids_NT: Tensor) -> Tensor:
    """The beginnings of the first calibration windows, [B, T], for the search of a prefix."""
    return ids_NT[:_SEARCH_WINDOWS, :_SEARCH_TOKENS].contiguous()


def _measure(
    model: PreTrainedModel,
    seen_NT: Tensor,
    held_out_NT: Tensor,
    scheme: Scheme,
    where: str,
    steps: Steps,
) -> list[Metric]:
    steps.start(f"largest activations {where}")
    maxima = max_activations(model, held_out_NT.split(1))
    steps.start(f"perplexity {where}")
    unquantized = perplexity(model, held_out_NT)
    steps.start(f"calibration {where}")
    quantized = quantize(model, scheme, calibration=seen_NT.split(1))
    steps.start(f"quantized perplexity {where}")
    values = {
        "perplexity.windowed": unquantized,
        "perplexity.quantized": perplexity(quantized, held_out_NT),
        "prefix.max_linear": maxima["linear"],
        "prefix.max_hidden": maxima["hidden"],
    }
    count = len(held_out_NT)
    return [Metric(name=name, value=value, where=where, n=count) for name, value in values.items()]
