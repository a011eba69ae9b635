"""Measure a model's sinks, outliers and depth routing in one pass over windows of text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oasis_attn.data import Corpus, Windows, as_windows
from oasis_attn.errors import check_flag, check_loaded, check_seed, check_tokenizer, check_whole
from oasis_attn.hub.model_info import check_lengths, describe_model, eval_mode
from oasis_attn.hub.prefix import prefix_of
from oasis_attn.measure.depth import Depth, causal_importance, causal_sources
from oasis_attn.measure.head_outputs import HeadOutputs
from oasis_attn.measure.hooks import HookPoint, find_hook_points
from oasis_attn.measure.joint_distribution import Joint
from oasis_attn.measure.loss import loss_metrics, window_losses
from oasis_attn.measure.outliers import Outliers
from oasis_attn.measure.range_noise import RangeNoise
from oasis_attn.measure.secondary_sinks import SecondarySinks
from oasis_attn.measure.sink_tokens import SinkTokens
from oasis_attn.measure.sinks import Sinks
from oasis_attn.measure.stream import stream
from oasis_attn.modeling.attention import AttentionCall
from oasis_attn.records import DiagnosisRecord, current_environment


def diagnose(
    model: PreTrainedModel,
    texts_or_tokens: Windows | Corpus | str | Iterable[Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    window: int | None = None,
    windows: int = 16,
    batch_size: int = 1,
    data: Mapping[str, str | None] | None = None,
    seed: int | None = None,
    joint: bool = False,
    causal: bool | Sequence[int] = False,
) -> DiagnosisRecord:
    """Measure perplexity, outliers, attention sinks, null probability and depth routing.

    Args:
        model: a decoder of this library, or of a family of transformers that uses its attention
            interface.  It runs in eval mode and is not changed.
        texts_or_tokens: a corpus, a text, or an iterable of texts, cut by `read_windows`; rows of
            token ids ([N, T] or a sequence of [T]), each a window; or `Windows`, all of which are
            read.
        tokenizer: reads the texts, and names the tokens of tables.
        window: tokens in a window; by default, 512 (or all of a shorter text) for texts, and the
            rows' own length for tokens.
        windows: maximum number of windows; they are spread over a text, and the first of rows.
        batch_size: windows in one forward pass; it changes the speed and not the numbers.
        data: where texts or rows come from, for the record: `corpus`, `split`, `sha256`.  A corpus
            and `Windows` have their own.
        seed: the random seed with which the text was chosen, for the record.
        joint: also measure joint.*, the joint distribution over depth and positions; this computes
            each attention map a second time, for some queries at a time.
        causal: also measure depth.causal, the loss without a depth source: for all sources if True,
            or for the given ones.  Each source needs one more pass over the windows.

    Returns:
        Metrics: `perplexity.windowed`, the exponential of `loss.windowed` (nats per token, disjoint
        windows), `outlier.*`, `range.*`, `sink.*`, `null.mass` if attention has a null option,
        `depth.*` if the model has depth routing, and `joint.*`.  Numbers and counts of windows in
        which values are NaN are NaN; `outlier.non_finite` counts these values.
        Tables per layer, head and token: see `Outliers.tables`, `RangeNoise.tables`,
        `Sinks.tables`, `HeadOutputs.tables`, `SinkTokens.tables`, `SecondarySinks.tables`,
        `Depth.tables` and `Joint.tables`.  With a tokenizer, rows about a token have its `text`.

    Raises:
        UserError: text or tokens that make no window (see `as_windows`) or a longer one than the
            model has positions; a model whose layers, attention, MLPs or norms were not found;
            `joint` for a family without a row in `modeling.families`; `causal` for a model without
            depth routing, or a source that the model does not have.
    """
    check_loaded(model)
    check_whole("batch_size", batch_size, 1)
    check_flag("joint", joint)
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    if seed is not None:
        check_seed("seed", seed)
    points, dropped = find_hook_points(model), causal_sources(model, causal)
    joint_measures = Joint(model) if joint else None
    embedding: Any = model.get_input_embeddings()
    read = as_windows(
        texts_or_tokens,
        tokenizer=tokenizer,
        window=window,
        windows=windows,
        vocab_size=embedding.weight.shape[0],
        source=data,
    )
    ids_NT = read.ids_NT
    check_lengths(model, ids_NT.shape[1:], "window")
    layers = sum(point.kind == "layer" for point in points)
    # The state after the last layer is taken after the final norm, if there is one.
    last_state = [point for point in points if point.kind in ("layer", "final_norm")][-1]
    outliers, ranges, depth = Outliers(points), RangeNoise(points), Depth()
    sinks, secondary = Sinks(points, prefixed=prefix_of(model) is not None), SecondarySinks(layers)
    sink_tokens, heads = SinkTokens(model), HeadOutputs(points)

    def on_attention(call: AttentionCall) -> None:
        sinks.update(call)
        sink_tokens.update(call)
        heads.update(call)

    def on_output(point: HookPoint, x: Tensor, ids_BT: Tensor) -> None:
        outliers.update(point, x, ids_BT)
        ranges.update(point, x)
        if point is last_state or (point.kind == "layer" and point.layer != layers - 1):
            secondary.update(x, ids_BT)

    def after(ids_BT: Tensor) -> None:
        sinks.check(model)
        sink_tokens.classify(ids_BT)
        ranges.classify(ids_BT)

    batches = ids_NT.to(model.device).split(batch_size)
    with eval_mode(model), torch.no_grad():
        with heads.observe(), joint_measures.observe() if joint_measures else nullcontext():
            losses_N = stream(
                model,
                points,
                batches,
                attention=on_attention,
                output=on_output,
                depth=depth.update,
                after=after,
            )
        secondary.score(model, torch.cat(batches))
        importance = causal_importance(
            model,
            dropped,
            lambda: torch.cat([window_losses(model, ids_BT) for ids_BT in batches]),
        )
    joint_metrics = joint_measures.metrics() if joint_measures else []
    joint_tables = joint_measures.tables() if joint_measures else {}

    return DiagnosisRecord(
        environment=current_environment(model.device),
        model=describe_model(model),
        data=read.info,
        seed=seed,
        metrics=(
            *loss_metrics(losses_N),
            *outliers.metrics(),
            *ranges.metrics(),
            *sinks.metrics(),
            *heads.metrics(),
            *sink_tokens.metrics(),
            *secondary.metrics(),
            *depth.metrics(),
            *importance,
            *joint_metrics,
        ),
        tables=_with_texts(
            outliers.tables()
            | ranges.tables()
            | sinks.tables()
            | heads.tables()
            | sink_tokens.tables()
            | secondary.tables()
            | depth.tables()
            | joint_tables,
            tokenizer,
        ),
    )


def _with_texts(
    tables: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """The tables, with the text of the token in each row about a token."""
    if tokenizer is not None:
        for rows in tables.values():
            for row in rows:
                if isinstance(row, dict) and "token" in row:
                    row["text"] = str(tokenizer.decode([row["token"]]))
    return tables
