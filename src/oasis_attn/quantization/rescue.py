"""A model that cannot be retrained, from its name to a folder that holds it with a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.data import load_corpus, token_blocks
from oasis_attn.errors import UserError, check_at_least, check_choice
from oasis_attn.files import check_free, staged_folder
from oasis_attn.modeling.loading import load_model
from oasis_attn.modeling.prefix import compute_prefix, with_prefix
from oasis_attn.quantization.prefix import (
    METHODS,
    find_prefix,
    peaks,
    range_noise,
    tune_prefix,
)
from oasis_attn.quantization.schemes import schemes
from oasis_attn.quantization.simulate import quantize
from oasis_attn.records import Metric, Record

SEARCH_WINDOWS, SEARCH_TOKENS = 4, 48


def rescue(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "greedy",
    length: int = 4,
    tune_steps: int = 0,
    corpus: str = "stdlib",
    split: str = "validation",
    window: int = 512,
    windows: int = 8,
    scheme: str = "w8a8-static-linear",
) -> Record:
    """Find a prefix for `model`, tune it where asked, and write both, and the record, to `out`.

    Windows are spread over the split, in turn to calibrate, search and tune on, and to measure on.

    Args:
        model: as `load_model` takes it.
        out: a new folder; `load_model` returns the model with its prefix from there.
        method, length: see `find_prefix`.
        tune_steps: of `tune_prefix`; 0 leaves the keys and values as the model computed them.
        corpus, split: the text.
        window: tokens per window.
        windows: how many to calibrate on, and how many to measure on, at most.
        scheme: that the prefix is judged by, a static one in `schemes()`.

    Returns:
        A record of kind `quantization`; each metric is there at `before` and at `after`:
        `perplexity.windowed`, the same of the quantised model as `perplexity.quantized`,
        `prefix.noise` (see `range_noise`), `prefix.max_linear` and `prefix.max_hidden` (`peaks`).

    Raises:
        UserError: unusable arguments, or a model that no prefix helps; nothing is written then.
    """
    check_choice("method", method, METHODS)
    check_choice("scheme", scheme, [name for name, row in schemes().items() if row.static])
    for name, value, lowest in (
        ("length", length, 1),
        ("tune_steps", tune_steps, 0),
        ("window", window, 2),
        ("windows", windows, 1),
    ):
        check_at_least(name, value, lowest)
    check_free(out)
    source = load_corpus(corpus, split)
    loaded, tokenizer = load_model(model)
    reach = getattr(loaded.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if reach is not None and window + length > reach:
        raise UserError(f"window: {window} and a prefix of {length} are over the model's {reach}")
    blocks = token_blocks(source, tokenizer, window)
    count = min(2 * windows, len(blocks))
    check_at_least(f"{corpus}: windows of {window} tokens", count, 2)
    spread = [blocks[index * len(blocks) // count][None] for index in range(count)]
    calibration, measured = spread[::2], spread[1::2]

    search_BT = torch.cat(calibration[:SEARCH_WINDOWS])[:, :SEARCH_TOKENS].contiguous()
    tokens = find_prefix(loaded, search_BT, method=method, length=length)
    prefix = compute_prefix(loaded, tokens)
    if tune_steps:
        prefix = tune_prefix(loaded, prefix, calibration, steps=tune_steps)
    rescued = with_prefix(loaded, prefix)

    metrics = [
        metric
        for where, twin in (("before", loaded), ("after", rescued))
        for metric in _measure(twin, calibration, measured, scheme, where)
    ]
    noise = range_noise(loaded, search_BT, [()]), range_noise(rescued, search_BT, [()])
    metrics += [
        Metric(name="prefix.noise", value=float(value), where=where, n=len(search_BT))
        for where, value in zip(("before", "after"), noise, strict=True)
    ]
    record = Record(
        kind="quantization",
        subject={
            "name": str(model),
            "family": loaded.config.get_text_config(decoder=True).model_type,
            "scheme": scheme,
            "prefix": list(tokens),
            "prefix_text": tokenizer.decode(list(tokens)),
            "method": method,
            "tune_steps": tune_steps,
        },
        data={
            "corpus": source.name,
            "split": source.split,
            "sha256": source.sha256,
            "window": window,
            "windows": len(measured),
            "calibration_windows": len(calibration),
        },
        metrics=tuple(metrics),
    )
    with staged_folder(out) as stage:
        rescued.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        record.save(stage / "record.json")
    return record


def _measure(
    model: PreTrainedModel,
    calibration: Sequence[Tensor],
    measured: Sequence[Tensor],
    scheme: str,
    where: str,
) -> list[Metric]:
    largest = peaks(model, measured)
    quantized = quantize(model, scheme, calibration=calibration)
    values = {
        "perplexity.windowed": _perplexity(model, measured),
        "perplexity.quantized": _perplexity(quantized, measured),
        "prefix.max_linear": largest["linear"],
        "prefix.max_hidden": largest["hidden"],
    }
    return [
        Metric(name=name, value=value, where=where, n=len(measured))
        for name, value in values.items()
    ]


@torch.no_grad()
def _perplexity(model: PreTrainedModel, batches: Sequence[Tensor]) -> float:
    """exp of the mean loss of the model's own; batches are of one shape."""
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss.double() for ids in batches]
    return float(torch.stack(losses).mean().exp())
