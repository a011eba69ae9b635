"""A model that cannot be retrained, from its name to a folder that holds it with a prefix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.data import load_corpus, spread_windows, token_blocks
from oasis_attn.errors import UserError, check_choice, check_whole
from oasis_attn.files import check_free, staged_folder
from oasis_attn.modeling.card import write_card
from oasis_attn.modeling.loading import load_model
from oasis_attn.modeling.prefix import compute_prefix, with_prefix
from oasis_attn.modeling.subject import check_lengths, describe_model
from oasis_attn.quantization.costs import perplexity
from oasis_attn.quantization.prefix import (
    METHODS,
    find_prefix,
    peaks,
    range_noise,
    tune_prefix,
)
from oasis_attn.quantization.schemes import Scheme, schemes
from oasis_attn.quantization.simulate import check_unquantized, quantize
from oasis_attn.records import Metric, PrefixRecord, TextInfo

SEARCH_WINDOWS, SEARCH_TOKENS = 4, 48


def rescue(
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
    trust_remote_code: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> PrefixRecord:
    """Find a prefix for `model`, tune it where asked, and write both, and the record, to `out`.

    Args:
        model: as `load_model` takes it.
        out: a new folder; `from_pretrained` restores the model with its prefix from there, and
            raises in a process that has not imported `oasis_attn`.
        method, length: see `find_prefix`.
        tune_steps: of `tune_prefix`, a window each; 0 leaves keys and values as the model computed
            them.
        scheme: a static one, which the prefix is judged by; what is written is not quantised.
        calibration, calibration_split: a corpus to search, tune and calibrate on; windows are
            spread over its split.
        evaluation, evaluation_split: the same to measure on; default, that corpus.
        window: tokens per window.
        windows: how many to calibrate on, and how many to measure on, at most.
        trust_remote_code: of `load_model`.
        tell: is told what is going on.

    Returns:
        Each metric is there at `before` and at `after`:
        `perplexity.windowed`, `perplexity.quantized` (of the model quantised by `scheme`),
        `prefix.noise` (see `range_noise`), `prefix.max_linear` and `prefix.max_hidden` (`peaks`).

    Raises:
        UserError: unusable arguments, or a model that no prefix helps; nothing is written then.
    """
    check_choice("method", method, METHODS)
    if isinstance(scheme, str):
        check_choice("scheme", scheme, [name for name, row in schemes().items() if row.static])
        scheme = schemes()[scheme]
    elif not scheme.static:
        raise UserError(f"scheme: {scheme.name!r} is not static; no prefix is needed for it")
    for name, value, lowest in (
        ("length", length, 1),
        ("tune_steps", tune_steps, 0),
        ("window", window, 2),
        ("windows", windows, 1),
    ):
        check_whole(name, value, lowest)
    check_free(out)
    corpora = [
        load_corpus(calibration, calibration_split),
        load_corpus(evaluation or calibration, evaluation_split),
    ]

    tell("loading the model")
    loaded, tokenizer = load_model(model, trust_remote_code=trust_remote_code)
    check_unquantized(loaded)
    check_lengths(loaded, [window + length], "window with the prefix")
    seen_NT, held_out_NT = (
        spread_windows(token_blocks(c, tokenizer, window), windows) for c in corpora
    )
    search_BT = seen_NT[:SEARCH_WINDOWS, :SEARCH_TOKENS].contiguous()
    tell("looking for a prefix")
    tokens = find_prefix(loaded, search_BT, method=method, length=length)
    prefix = compute_prefix(loaded, tokens)
    if tune_steps:
        tell("tuning it")
        prefix = tune_prefix(loaded, prefix, seen_NT.split(1), steps=tune_steps)
    rescued = with_prefix(loaded, prefix)
    metrics: list[Metric] = []
    for where, twin in (("before", loaded), ("after", rescued)):
        tell(f"measuring {where}")
        noise = float(range_noise(twin, search_BT, [()]))
        metrics.append(Metric(name="prefix.noise", value=noise, where=where, n=len(search_BT)))
        metrics += _measure(twin, seen_NT, held_out_NT, scheme, where)

    calibration_text, evaluation_text = (
        TextInfo.of(ids_NT, {"corpus": c.name, "split": c.split, "sha256": c.sha256})
        for c, ids_NT in zip(corpora, (seen_NT, held_out_NT), strict=True)
    )
    record = PrefixRecord(
        model=describe_model(loaded),
        tokens=tuple(tokens),
        text=str(tokenizer.decode(list(tokens))),
        method=method,
        tune_steps=tune_steps,
        scheme=scheme.to_dict(),
        data=evaluation_text,
        calibration=calibration_text,
        metrics=tuple(metrics),
    )
    tell("writing")
    with staged_folder(out) as stage:
        rescued.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        record.save(stage / "record.json")
        write_card(rescued, stage)  # again, now with what was measured
    return record


def _measure(
    model: PreTrainedModel, seen_NT: Tensor, held_out_NT: Tensor, scheme: Scheme, where: str
) -> list[Metric]:
    largest = peaks(model, held_out_NT.split(1))
    quantized = quantize(model, scheme, calibration=seen_NT.split(1))
    values = {
        "perplexity.windowed": perplexity(model, held_out_NT),
        "perplexity.quantized": perplexity(quantized, held_out_NT),
        "prefix.max_linear": largest["linear"],
        "prefix.max_hidden": largest["hidden"],
    }
    count = len(held_out_NT)
    return [Metric(name=name, value=value, where=where, n=count) for name, value in values.items()]
