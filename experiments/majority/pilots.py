"""Collect pilots on the corpus `majority`: which recipe makes sinks and massive activations?

python experiments/majority/pilots.py STUDY [STUDY ...]

STUDY is a folder that `oasis study run experiments/majority/NAME.yaml --out STUDY` made.  Writes
`pilots.jsonl` (one compact record a line) and `pilots.md` (the table) beside this file.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from oasis_attn.files import write_text
from oasis_attn.records import TrialRecord
from oasis_attn.report import Table, number
from oasis_attn.report.markdown import markdown
from oasis_attn.study.storage import TRIALS, StudyFolder

HERE = Path(__file__).parent
SCHEMES = ("w8a8-static-full", "w4a4")
COLUMNS = (
    "corpus", "size", "steps", "batch", "learning rate", "weight decay", "variant", "seed",
    "accuracy", "other loss", "largest sink", "mean sink", "max inf-norm", "massive values",
    "max kurtosis", *(f"cost of {scheme} (nats)" for scheme in SCHEMES), "core minutes",
)  # fmt: skip
METRICS = (
    "majority.accuracy", "majority.other_loss", "sink.max_mass", "sink.mass",
    "outlier.max_inf_norm", "outlier.massive", "outlier.max_kurtosis",
)  # fmt: skip


def row(record: TrialRecord) -> tuple[str, ...]:
    """The recipe of a trial and what came out."""
    trial = record.trial
    training = trial["training"]
    recipe = [training[name] for name in ("steps", "batch_size", "learning_rate", "weight_decay")]
    loss = record["loss.windowed"]
    return (
        trial["corpus"],
        Path(trial["size"]).stem,
        *map(str, recipe),
        trial["variant"],
        str(trial["seed"]),
        *(number(record[name]) for name in METRICS),
        *(number(record[f"loss.windowed@{scheme}"] - loss) for scheme in SCHEMES),
        number(record["trial.processor_seconds"] / 60),
    )


def table(records: list[TrialRecord]) -> Table:
    """One row per pilot."""
    return Table(columns=COLUMNS, rows=tuple(map(row, records)), text_columns=2)


def read(path: Path) -> list[TrialRecord]:
    """The records in a .jsonl file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [TrialRecord.from_json(line, str(path)) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("studies", type=Path, nargs="+", metavar="STUDY")
    studies = parser.parse_args().studies
    lines: list[str] = []
    for study in studies:
        with TemporaryDirectory() as folder:
            StudyFolder.open(study).publish(folder)
            lines += Path(folder, TRIALS).read_text(encoding="utf-8").splitlines()
    write_text(HERE / "pilots.jsonl", "".join(f"{line}\n" for line in lines))
    write_text(HERE / "pilots.md", markdown(table(read(HERE / "pilots.jsonl"))))


if __name__ == "__main__":
    main()
