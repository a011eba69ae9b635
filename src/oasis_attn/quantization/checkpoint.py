"""A model from its name to a folder that holds it quantised, with a record of what that cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.data import load_corpus, spread_windows, token_blocks
from oasis_attn.errors import UserError, check_choice, check_seed, check_whole
from oasis_attn.files import check_free, staged_folder
from oasis_attn.modeling.card import write_card
from oasis_attn.modeling.loading import load_model
from oasis_attn.modeling.subject import check_lengths
from oasis_attn.ops.token_losses import token_losses
from oasis_attn.quantization.costs import GROUPINGS, perplexity, sensitivity, site_metrics
from oasis_attn.quantization.coverage import quantized_share
from oasis_attn.quantization.integers import check_kernels, to_integers
from oasis_attn.quantization.record import quantization_record
from oasis_attn.quantization.schemes import Scheme, schemes
from oasis_attn.quantization.simulate import quantize, scheme_sites
from oasis_attn.records import Metric, QuantizationRecord, TextInfo


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    scheme: str | Scheme = "w8a8-dynamic",
    simulate: bool = False,
    skip: Sequence[str] = (),
    calibration: str = "stdlib",
    calibration_split: str = "train",
    evaluation: str | None = None,
    evaluation_split: str = "test",
    window: int = 512,
    windows: int = 16,
    costs: str | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> QuantizationRecord:
    """Quantise a model, measure what that did, and write model, tokenizer and record to `out`.

    Args:
        model: as `load_model` takes it.
        out: a new folder; `from_pretrained` restores the quantised model from it.
        scheme: see `quantize`.
        simulate: compute in floating point on the scheme's grids, at any width; otherwise in
            integers, which only some schemes can.
        skip: patterns of site names (`*.down_proj`) that are left as they are.
        calibration, calibration_split: a corpus; windows are spread over its split.  The errors of
            activations are measured on them whatever the scheme.
        evaluation, evaluation_split: the same to measure perplexity on; default, that corpus.
        window: tokens per window.
        windows: how many to calibrate on, and how many to measure on, at most.
        costs: measure the perplexity with all but one group of tensors quantised, and with only
            that one; groups are by `kind`, `layer` or `site`.  Each is a pass over the windows.
        seed: of a rotation.
        trust_remote_code: of `load_model`.
        tell: is told what is going on.

    Returns:
        Metrics: `size.quantized_share` (see `coverage`), `perplexity.windowed` and `size.bytes` at
        `before` and `after`, `speed.over_unquantized` (tokens per second of the two, window by
        window in turn, the median of the ratios), and `site_metrics` of the simulated model; with
        `costs`, the table `sensitivity`.

    Raises:
        UserError: unusable arguments, a scheme without integer kernels, or what `quantize` finds;
            nothing is written then.
    """
    if isinstance(scheme, str):
        check_choice("scheme", scheme, schemes())
        scheme = schemes()[scheme]
    if costs is not None:
        check_choice("costs", costs, GROUPINGS)
    check_whole("window", window, 2)
    check_whole("windows", windows, 1)
    check_seed("seed", seed)
    check_free(out)
    if not simulate:
        check_kernels(scheme, torch.device("cpu"))
    corpora = [
        load_corpus(calibration, calibration_split),
        load_corpus(evaluation or calibration, evaluation_split),
    ]

    tell("loading the model")
    loaded, tokenizer = load_model(model, trust_remote_code=trust_remote_code)
    check_lengths(loaded, [window], "window")
    seen_NT, held_out_NT = (
        spread_windows(token_blocks(c, tokenizer, window), windows) for c in corpora
    )
    sites = _kept(scheme_sites(loaded, scheme), skip)
    batches = list(seen_NT.split(1))
    given = batches if scheme.needs_calibration else None
    tell("quantising")
    twin = quantize(loaded, scheme, calibration=given, sites=sites, seed=seed)
    tell("measuring the errors of each tensor")
    metrics = site_metrics(twin, batches)
    tables: dict[str, Any] = {}
    if costs is not None:
        tables["sensitivity"] = _sensitivity(
            loaded, scheme, held_out_NT, given, sites=sites, by=costs, seed=seed, tell=tell
        )
    if not simulate:
        to_integers(twin)
    tell("measuring perplexity and speed")
    share = Metric(name="size.quantized_share", value=quantized_share(twin))
    metrics = share, *_compared(loaded, twin, held_out_NT), *metrics
    tell("writing")
    with staged_folder(out) as stage:
        twin.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        sizes = {
            "before": sum(p.numel() * p.element_size() for p in loaded.parameters()),
            "after": sum(path.stat().st_size for path in stage.glob("*.safetensors")),
        }
        metrics = *(Metric(name="size.bytes", value=v, where=k) for k, v in sizes.items()), *metrics
        calibration_text, evaluation_text = (
            TextInfo.of(ids_NT, {"corpus": c.name, "split": c.split, "sha256": c.sha256})
            for c, ids_NT in zip(corpora, (seen_NT, held_out_NT), strict=True)
        )
        record = quantization_record(
            loaded,
            twin,
            data=evaluation_text,
            calibration=calibration_text,
            seed=seed,
            metrics=metrics,
            tables=tables,
        )
        record.save(stage / "record.json")
        write_card(twin, stage)  # again, now with what was measured
    return record


def _kept(sites: Sequence[str], skip: Sequence[str]) -> list[str]:
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in sites):
            some = f", as {sites[0]!r}" if sites else "; it has none in this model"
            raise UserError(f"skip: {pattern!r} matches none of the scheme's sites{some}")
    return [name for name in sites if not any(fnmatchcase(name, p) for p in skip)]


def _sensitivity(
    model: PreTrainedModel,
    scheme: Scheme,
    ids_NT: Tensor,
    calibration: list[Tensor] | None,
    *,
    tell: Callable[[str], None],
    **options: Any,
) -> dict[str, list[Any]]:
    """Columns: group, perplexity with all but it quantised, perplexity with it alone."""
    passes = 0

    def score(twin: PreTrainedModel) -> float:
        nonlocal passes
        passes += 1
        tell(f"measuring what each tensor costs: pass {passes}")
        return perplexity(twin, ids_NT)

    scores = sensitivity(model, scheme, score, calibration=calibration, **options)
    return {
        "group": list(scores),
        "all_but": [value for value, _ in scores.values()],
        "only": [value for _, value in scores.values()],
    }


@torch.no_grad()
def _compared(before: PreTrainedModel, after: PreTrainedModel, ids_NT: Tensor) -> list[Metric]:
    """Perplexity of both, and the speed of one over that of the other."""
    models = {"before": before, "after": after}
    losses: dict[str, list[Tensor]] = {where: [] for where in models}
    seconds: dict[str, list[float]] = {where: [] for where in models}
    for ids_BT in ids_NT.split(1):
        for where, model in models.items():
            start = time.perf_counter()
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
            seconds[where].append(time.perf_counter() - start)
            losses[where].append(token_losses(logits_BTV, ids_BT).mean())
    count = len(ids_NT)
    metrics = [
        Metric(
            name="perplexity.windowed",
            value=float(torch.stack(losses[where]).mean().exp()),
            where=where,
            n=count,
        )
        for where in models
    ]
    ratios = [b / a for b, a in zip(seconds["before"], seconds["after"], strict=True)]
    speed = Metric(name="speed.over_unquantized", value=statistics.median(ratios), n=count)
    return [*metrics, speed]
