"""Collect trials on the corpus `majority`: which models have sinks, and what quantization costs.

python experiments/majority/results.py STUDY [STUDY ...]

STUDY is a folder that `oasis study run` made, finished or not.  Writes `trials.jsonl` (one compact
record a line) and `results.md` (the table) beside this file.  Without STUDY, only the table is made
again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from oasis_attn.files import write_text
from oasis_attn.records import TrialRecord
from oasis_attn.report import Table, number
from oasis_attn.report.markdown import markdown
from oasis_attn.study.storage import TRIALS, StudyFolder

HERE = Path(__file__).parent
SCHEMES = ("w8a8-static-full", "w4a4")
TRAINING = {
    "steps": "steps", "batch_size": "batch", "learning_rate": "learning rate",
    "weight_decay": "weight decay",
}  # fmt: skip


def _cost(scheme: str) -> Callable[[TrialRecord], float]:
    return lambda record: record[f"loss.windowed@{scheme}"] - record["loss.windowed"]


def _metric(name: str) -> Callable[[TrialRecord], float]:
    return lambda record: record[name]


COLUMNS: dict[str, Callable[[TrialRecord], float]] = {
    "perplexity": _metric("perplexity.windowed"),
    "accuracy": _metric("majority.accuracy"),
    "largest sink": _metric("sink.max_mass"),
    "mean sink": _metric("sink.mass"),
    "max inf-norm": _metric("outlier.max_inf_norm"),
    "massive values": _metric("outlier.massive"),
    "max kurtosis": _metric("outlier.max_kurtosis"),
    **{f"cost of {scheme} (nats)": _cost(scheme) for scheme in SCHEMES},
    **{f"accuracy, {scheme}": _metric(f"majority.accuracy@{scheme}") for scheme in SCHEMES},
}


def recipe(record: TrialRecord) -> tuple[str, ...]:
    """What the rows of the table are grouped by: all but the seed."""
    trial = record.trial
    training = (str(trial["training"][name]) for name in TRAINING)
    return trial["corpus"], Path(trial["size"]).stem, *training, trial["variant"]


def spread(values: list[float]) -> str:
    """The mean, and for several values the smallest and the largest."""
    if len(values) == 1:
        return number(values[0])
    return f"{number(mean(values))} ({number(min(values))} to {number(max(values))})"


def table(records: Iterable[TrialRecord]) -> Table:
    """One row per recipe and variant, over the seeds."""
    groups: dict[tuple[str, ...], list[TrialRecord]] = {}
    for record in records:
        groups.setdefault(recipe(record), []).append(record)
    rows = tuple(
        (*key, str(len(group)), *(spread([value(r) for r in group]) for value in COLUMNS.values()))
        for key, group in sorted(groups.items(), key=lambda item: item[0][:-1])
    )
    columns = "corpus", "size", *TRAINING.values(), "variant", "seeds", *COLUMNS
    return Table(columns=columns, rows=rows, text_columns=2)


def read(path: Path) -> list[TrialRecord]:
    """The records in a .jsonl file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [TrialRecord.from_json(line, str(path)) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("studies", type=Path, nargs="*", metavar="STUDY")
    lines: list[str] = []
    for study in (studies := parser.parse_args().studies):
        with TemporaryDirectory() as folder:
            StudyFolder.open(study).publish(folder)
            lines += Path(folder, TRIALS).read_text(encoding="utf-8").splitlines()
    if studies:
        write_text(HERE / TRIALS, "".join(f"{line}\n" for line in lines))
    write_text(HERE / "results.md", markdown(table(read(HERE / TRIALS))))


if __name__ == "__main__":
    main()
