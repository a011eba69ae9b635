"""The table in experiments/majority, against its records."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from oasis_attn.report.markdown import markdown

FOLDER = Path(__file__).parents[2] / "experiments" / "majority"


def test_the_table_is_that_of_the_records_which_have_sinks():
    spec = importlib.util.spec_from_file_location("results", FOLDER / "results.py")
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    records = results.read(FOLDER / "trials.jsonl")
    assert markdown(results.table(records)) == (FOLDER / "results.md").read_text(encoding="utf-8")
    vanilla = [record for record in records if record.trial["variant"] == "vanilla"]
    assert all(record["sink.max_mass"] > 0.6 for record in vanilla)
