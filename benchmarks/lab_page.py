"""The tables of docs/lab.md, docs/null.md and docs/language_models.md, from their records.

`benchmarks/publish.py` writes the pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure
from scipy import stats

import null_law_tables
from oasis_attn.records import BenchmarkRecord
from oasis_attn.report.markdown import markdown
from oasis_attn.report.seed_values import seed_values_figure
from oasis_attn.report.tables import ABSENT, Table
from oasis_attn.study.criteria import (
    MET,
    MET_WHOLE_INTERVAL,
    NOT_MET,
    CriterionResult,
    check_criteria,
    fails_none,
)
from oasis_attn.study.criteria import rule as criteria_rule
from oasis_attn.study.reading_guide import progress_text
from oasis_attn.study.results import Results
from oasis_attn.study.study_metrics import StudyMetric, study_metrics
from oasis_attn.study.tables import percent, verdict_table
from oasis_attn.study.verdict import judge
from pages import DOCS, RESULTS, fill, short, value_range
from pages import published as published_studies

LAB, NULL, MODELS = DOCS / "lab.md", DOCS / "null.md", DOCS / "language_models.md"
PAGES = LAB, NULL, MODELS
UNPUBLISHED = "This study is not published yet.\n"
SHOWN = (  # of the variants of the plan `necessity`
    *("vanilla", "softmax1", "softmax1_c4.5", "softmax1_log_context", "softmax1_c8"),
    *("gated_attention", "softpick", "attn_residual", "attn_residual_unit"),
    *("oasis", "oasis_log", "strong", "strong_unit"),
)
DEPTH_WEIGHTS = "attn_residual", "oasis", "strong"  # variants of `necessity`
COLUMNS = {  # metric -> header and whether the range over seeds is shown
    "sink.idle_largest": ("idle sink, largest head", True),
    "sink.idle": ("idle sink, mean", False),
    "null.idle": ("idle null, mean", False),
    "task.error": ("task error", True),
    "outlier.max_inf_norm": ("max inf-norm", False),
    "outlier.mean_pearson_kurtosis": ("mean Pearson kurtosis", False),
    "task.error_ratio@w8a8-static-full": ("w8a8-static-full error ratio", True),
    "task.error_ratio@w4a4": ("w4a4 error ratio", False),
    "signal.output_change": ("output moved by the signal", False),
}
CONTENT_COLUMNS = {
    "sink.idle_largest": ("idle sink, largest head", True),
    "null.idle": ("idle null, mean", False),
    "task.error": ("task error", True),
    "outlier.max_inf_norm_layer": ("largest value in a layer's output", True),
    "outlier.massive": ("massive activations", False),
    **{
        f"task.error_ratio@{scheme}": (f"{scheme} error ratio", True)
        for scheme in ("w8a8-static-full", "w8a8-static-linear", "w4a4")
    },
}
WORDS_COLUMNS = {
    "sink.idle_largest": ("idle sink, largest head", True),
    "null.idle": ("idle null, mean", False),
    "outlier.max_inf_norm_layer": ("largest value in a layer's output", True),
    "outlier.max_over_median": ("largest value over the median", True),
    "outlier.massive": ("massive activations", False),
    "task.error": ("error", True),
    **{
        f"task.error@{scheme}": (f"error, {scheme}", scheme == "w8a8-static-full")
        for scheme in ("w8a8-dynamic", "w8a8-static-linear", "w8a8-static-full", "w4a4")
    },
}
FORMAT_COLUMNS = {
    "sink.idle_largest": ("idle sink, largest head", False),
    "task.error": ("task error", False),
    **{
        f"task.error_ratio@{scheme}": (scheme, True)
        for scheme in (
            *("w8a8-static-full", "w8a8-static-linear", "fp8-static", "fp8-dynamic", "mxfp8"),
            *("w4a4", "mxfp4", "nvfp4"),
        )
    },
}
LANGUAGE_COLUMNS = {
    "sink.max_mass": ("largest sink", True),
    "sink.mass": ("mean sink", False),
    "majority.accuracy": ("accuracy of answers", True),
    "perplexity.windowed": ("perplexity", True),
    "outlier.max_inf_norm": ("max inf-norm", False),
    "outlier.massive": ("massive activations", False),
    "outlier.mean_pearson_kurtosis": ("mean Pearson kurtosis", False),
    "perplexity.windowed@w8a8-static-full": ("perplexity, w8a8-static-full", True),
    "perplexity.windowed@w4a4": ("perplexity, w4a4", True),
}
TEXT_COLUMNS = {
    "sink.max_mass": ("largest sink", False),
    "null.mass": ("mean null", False),
    "outlier.max_inf_norm_layer": ("largest value in a layer's output", False),
    "majority.accuracy": ("accuracy of answers", False),
    "majority.accuracy@w8a8-static-full": ("accuracy, w8a8-static-full", False),
    "perplexity.windowed": ("perplexity", False),
    **{
        f"perplexity.windowed@{scheme}": (f"perplexity, {scheme}", False)
        for scheme in ("w8a8-dynamic", "w8a8-static-linear", "w8a8-static-full", "w4a4")
    },
}
MIXED_COLUMNS = {
    "sink.max_mass": ("largest sink", True),
    "null.mass": ("mean null", False),
    "outlier.max_inf_norm_layer": ("largest value in a layer's output", True),
    "majority.accuracy": ("accuracy of answers", True),
    "majority.accuracy@w8a8-static-full": ("accuracy, w8a8-static-full", False),
    "majority.accuracy@w4a4": ("accuracy, w4a4", False),
    "majority.answer_loss": ("loss of answers", True),
    "majority.answer_loss@w8a8-static-full": ("loss of answers, w8a8-static-full", True),
    "majority.answer_loss@w4a4": ("loss of answers, w4a4", False),
    "perplexity.windowed": ("perplexity", True),
    **{
        f"perplexity.windowed@{scheme}": (f"perplexity, {scheme}", True)
        for scheme in ("w8a8-static-linear", "w8a8-static-full", "w4a4")
    },
}
MODEL_COLUMNS = {
    "sink.mass": "mean sink",
    "sink.max_mass": "largest sink",
    "outlier.max_inf_norm_layer": "largest value in a layer's output",
    "outlier.max_kurtosis": "largest kurtosis",
    "perplexity.windowed": "perplexity",
    **{
        f"perplexity.windowed@{scheme}": f"perplexity, {scheme}"
        for scheme in ("w8a8-dynamic", "w8a8-static-linear", "w8a8-static-full", "w4a4")
    },
}
DRAWN = ("sink.idle_largest", "task.error", "task.error@w8a8-static-full")


def page(path: Path, text: str) -> str:
    """The text of one of `PAGES` with every table generated again."""
    tables: dict[Path, dict[str, Callable[[], str]]] = {
        LAB: {
            "source": null_law_tables.source,
            "rows": partial(rows, "necessity", only=SHOWN),
            "verdicts": partial(verdicts, "necessity"),
            "criteria": partial(criteria, "necessity", rule=True, only=SHOWN),
            "depth_weights": depth_weights,
            "growth": growth,
            "depth_verdicts": partial(verdicts, "necessity-depth"),
            "content_rows": partial(rows, "necessity-content", CONTENT_COLUMNS),
            "content_verdicts": partial(verdicts, "necessity-content"),
            "words_rows": partial(rows, "necessity-words", WORDS_COLUMNS),
            "words_verdicts": partial(verdicts, "necessity-words"),
            "embedding_weights": embedding_weights,
            "first_token_vector": first_token_vector,
            "massive_words_rows": partial(rows, "massive-words", WORDS_COLUMNS),
            "massive_words_verdicts": partial(verdicts, "massive-words"),
            "format_rows": partial(rows, "formats", FORMAT_COLUMNS),
        },
        NULL: {
            **{table.__name__: table for table in null_law_tables.NULL_PAGE},
            "key_null_rows": partial(rows, "necessity-key-null"),
            "key_null_verdicts": partial(verdicts, "necessity-key-null"),
            "key_null_criteria": partial(criteria, "necessity-key-null"),
            "signal_rows": partial(rows, "necessity-win"),
            "signal_verdicts": partial(verdicts, "necessity-win"),
            "signal_criteria": partial(criteria, "necessity-win"),
        },
        MODELS: {
            "language_rows": partial(rows, "majority", LANGUAGE_COLUMNS),
            "language_verdicts": partial(verdicts, "majority"),
            "language_criteria": partial(criteria, "majority"),
            "mixed_rows": partial(rows, "majority-text", MIXED_COLUMNS),
            "mixed_verdicts": partial(verdicts, "majority-text"),
            "mixed_criteria": partial(criteria, "majority-text", rule=True),
            "language_models": language_models,
            "text_rows": partial(rows, "language", TEXT_COLUMNS),
        },
    }
    return fill(path, text, "lab_page.py", tables[path])


@cache
def published(name: str) -> Results | None:
    """The results of a study; None if it is not under docs/results."""
    return published_studies([name]).get(name)


def rows(
    name: str,
    wanted: Mapping[str, tuple[str, bool]] = COLUMNS,
    *,
    only: Collection[str] | None = None,
) -> str:
    """The results of each variant of a study, or of some."""
    results = published(name)
    if results is None:
        return UNPUBLISHED
    known = {metric.name: metric for metric in results.metrics}
    chosen = {known[name]: column for name, column in wanted.items() if name in known}
    measured, missing = [], []
    assert not only or set(only) <= set(results.plan.variants)
    for variant in only or results.plan.variants:
        values = {metric: [*results.values(metric, variant).values()] for metric in chosen}
        if any(values.values()):
            cells = (_cell(m, values[m], spread=spread) for m, (_, spread) in chosen.items())
            seeds = max(map(len, values.values()))
            measured.append((variant, str(seeds), *cells))
        else:
            missing.append(variant)
    columns = "variant", "seeds", *(header for header, _ in chosen.values())
    lines = [f"[`{name}`](results/{name}/tables.md): {progress_text(results)}"]
    if len(results.records) < len(results.plan.trials):
        lines.append("The study is not finished; tables and verdicts are of the finished trials.")
    if only:
        lines.append(f"These are {len(only)} of the variants.")
    if missing:
        lines.append(f"These variants have no trials yet: {', '.join(missing)}.")
    text = " ".join(lines)
    return f"{text}\n\n{markdown(Table(columns=columns, rows=tuple(measured)))}"


def first_token_vector() -> str:
    """The hidden state of the first token, by seed."""
    record = BenchmarkRecord.load(RESULTS / "lab" / "first_token_vector" / "record.json")
    columns = {
        "norm_over_others": "norm over the median of other tokens",
        "share_of_one": "in the largest channel",
        "share_of_four": "in the largest four",
        "largest": "largest value",
        "largest_of_others": "largest value at other tokens",
        "largest_over_median": "largest value over the median",
    }
    rows = tuple(
        (run["plan"], str(run["seed"]), *(short(run[name]) for name in columns))
        for run in record.tables["runs"]
    )
    return markdown(Table(columns=("plan", "seed", *columns.values()), rows=rows))


def embedding_weights() -> str:
    """The depth weight of the embedding, at the first token and at the others, by router."""
    record = BenchmarkRecord.load(RESULTS / "lab" / "embedding_weights" / "record.json")
    runs = [run["weights"] for run in record.tables["runs"]]
    rows = tuple(
        (reader, *(value_range(values, mean=True) for values in zip(*weights, strict=True)))
        for reader, weights in zip(
            _readers(len(runs[0]) + 1)[1:], zip(*runs, strict=True), strict=True
        )
    )
    columns = "read by", "embedding, first token", "embedding, other tokens"
    return markdown(Table(columns=columns, rows=rows))


def depth_weights() -> str:
    """The depth weights of the plan `necessity`: those of the embedding by router, and sinks."""
    results = published("necessity")
    assert results is not None
    found: dict[str, list[list[list[float]]]] = {}
    for trial, record in results.records.items():
        if trial.variant in DEPTH_WEIGHTS:
            found.setdefault(trial.variant, []).append(record.tables["depth.weights"])
    rates = next(metric for metric in results.metrics if metric.name == "depth.sink_rate@0.3")
    routers = len(next(iter(found.values()))[0])
    rows = [
        (reader, *(short(fmean(run[router][0] for run in runs)) for runs in found.values()))
        for router, reader in enumerate(_readers(routers))
    ]
    shares = (short(fmean(results.values(rates, variant).values())) for variant in found)
    rows.append(("share above 0.3", *shares))
    return markdown(Table(columns=("read by", *found), rows=tuple(rows)))


def _readers(routers: int) -> list[str]:
    """What reads the mix of each router."""
    names = [f"layer {i // 2}, {('attention', 'MLP')[i % 2]}" for i in range(routers - 1)]
    return [*names, "output"]


def language_models() -> str:
    """Sinks, activations and quantization of language models of real text, by size."""
    record = BenchmarkRecord.load(RESULTS / "lab" / "language_models" / "record.json")
    found = {(metric.name, metric.where): metric.value for metric in record.metrics}
    rows = tuple(
        (
            name,
            short(run["steps"] * run["batch_size"] * run["block_length"] / 1e6),
            *(short(found[metric, name]) for metric in MODEL_COLUMNS),
        )
        for name, run in record.settings.items()
    )
    columns = "model", "million tokens", *MODEL_COLUMNS.values()
    return markdown(Table(columns=columns, rows=rows))


def figure(results: Results) -> Figure:
    """The metrics `DRAWN` of each variant that is measured."""
    known = {metric.name: metric for metric in results.metrics}
    panels = {
        known[name].label: {
            variant: [*results.values(known[name], variant).values()]
            for variant in dict.fromkeys(trial.variant for trial in results.records)
        }
        for name in DRAWN
    }
    ratios = [known[name].label for name in DRAWN if known[name].scale == "ratio"]
    return seed_values_figure(panels, logarithmic=ratios)


def criteria(study: str, *, rule: bool = False, only: Collection[str] | None = None) -> str:
    """The acceptance criteria of a study: one column per metric, the worst baseline named.

    With `rule`, the text says first how they are judged.  With `only`, the table has only those of
    the candidates.
    """
    results = published(study)
    if results is None:
        return UNPUBLISHED
    known = {metric.name: metric for metric in study_metrics(results.plan.schemes)}
    names = [each.metric for each in results.plan.criteria]
    labels = {name: known[name].label for name in names}
    table = []
    for variant in results.plan.candidates:
        if only is not None and variant not in only:
            continue
        found = check_criteria(results, variant)
        if any(each.n for each in found):
            groups = {
                name: [each for each, own in zip(found, names, strict=True) if own == name]
                for name in labels
            }
            table.append((variant, *map(_criteria_cell, groups.values())))
    columns = ("variant", *labels.values())
    shown = markdown(Table(columns=columns, rows=tuple(table), text_columns=len(columns)))
    none_failed = ", ".join(fails_none(results)) or "none"
    text = f"Variants that fail no criterion: {none_failed}.\n\n{shown}"
    return f"{criteria_rule(results.plan)}\n\n{text}" if rule else text


def growth() -> str:
    """The slopes of log metric against log layers of each variant of `necessity-depth`."""
    results = published("necessity-depth")
    if results is None:
        return UNPUBLISHED
    names = dict.fromkeys(t.metric for claim in results.plan.claims for t in claim.tests)
    metrics = [metric for metric in results.metrics if metric.name in names]
    table = []
    for variant in results.plan.variants:
        slopes = [[*results.slopes(metric, variant).values()] for metric in metrics]
        if any(slopes):
            table.append((variant, *map(_mean_interval, slopes)))
    columns = "variant", *(f"slope of {metric.label}" for metric in metrics)
    text = f"[`necessity-depth`](results/necessity-depth/tables.md): {progress_text(results)}"
    return f"{text}\n\n{markdown(Table(columns=columns, rows=tuple(table)))}"


def _mean_interval(values: Sequence[float]) -> str:
    """The mean, and its 95 % confidence interval by Student's t."""
    mean = fmean(values)
    margin = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return f"{short(mean)} [{short(mean - margin)}, {short(mean + margin)}]"


def verdicts(name: str) -> str:
    """The verdict on each claim of a study."""
    results = published(name)
    if results is None:
        return UNPUBLISHED
    table = verdict_table(judge(results))
    return markdown(Table(columns=table.columns, rows=table.rows, text_columns=4))


def _criteria_cell(criteria: Sequence[CriterionResult]) -> str:
    """The outcome of criteria on one metric, with the change from the baseline that is worst."""
    tested = [each for each in criteria if each.outcome in (MET_WHOLE_INTERVAL, MET, NOT_MET)]
    if not tested:
        return criteria[0].outcome
    worst = max(tested, key=lambda each: each.change)  # less of every metric here is better
    outcome = next(
        o for o in (NOT_MET, MET, MET_WHOLE_INTERVAL) if o in {e.outcome for e in tested}
    )
    if worst.fixed:
        return f"{short(worst.change)}, {outcome}"
    against = worst.text.rpartition(" against ")[2]
    return f"{percent(worst.change)} ({against}), {outcome}"


def _cell(metric: StudyMetric, values: Sequence[float], *, spread: bool) -> str:
    if not values:
        return ABSENT
    mean = fmean(values)
    if metric.scale == "ratio":  # as in the tests of claims
        mean = math.exp(fmean(map(math.log, values)))
    return short(mean) + (f" [{value_range(values)}]" if spread else "")
