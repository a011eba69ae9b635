"""Synthetic plans and records: no study is run, and the numbers are invented."""

from __future__ import annotations

from pathlib import Path

from example_records import ENVIRONMENT, TEXT, model_info
from oasis_attn.modeling.variants import settings_of
from oasis_attn.records import BlocksInfo, Metric, TrialRecord
from oasis_attn.study.plan import Plan, Trial
from oasis_attn.study.results import Results
from oasis_attn.study.storage import StudyFolder
from oasis_attn.study.trial import TIMES


def plan(**changes) -> Plan:
    """Five baselines and OASIS, on two corpora, with claims on activations and perplexity."""
    rows = ("vanilla", "clipped_softmax", "gated_attention", "softmax1", "attn_residual", "oasis")
    fields = {
        "name": "synthetic",
        "about": "Synthetic.",
        "variants": list(rows),
        "corpora": ["stdlib", "pydoc"],
        "seeds": [0, 1, 2],
        "noise_seeds": [3],
        "compare": {"oasis": list(rows[:-1])},
        "schemes": ["w8a8-static-full"],
        "claims": ["paper/largest_activation", "paper/w8a8"],
    }
    if set(changes) & {"variants", "schemes"}:
        del fields["claims"]
    return Plan.from_dict(fields | changes)


def record(trial: Trial, values: dict[str, float]) -> TrialRecord:
    settings = {"depth_normalizer": "softmax1"} | settings_of(trial.base)
    return TrialRecord(
        model=model_info(trial.id, variant=trial.variant, config=settings),
        trial=trial.to_dict(),
        command="again",
        trained_parameters=1,
        targets={},
        tokenizer_sha256="0",
        train=BlocksInfo(split="train", blocks=1, sha256="0"),
        train_corpus_sha256="0",
        data=TEXT,
        calibration_windows=2,
        seed=trial.seed,
        metrics=tuple(
            Metric(name=name, value=value)
            for name, value in (values | dict.fromkeys(TIMES, 10.0)).items()
        ),
        environment=ENVIRONMENT,
        created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip


def results(plan: Plan, value, names=("outlier.max_inf_norm",)) -> Results:
    """Results in which every measure of `names` has the value `value(trial)`."""
    records = {trial: record(trial, dict.fromkeys(names, value(trial))) for trial in plan.trials}
    return Results(plan, records)


def saved(path: Path, results: Results) -> StudyFolder:
    """The folder of a study with these results."""
    folder = StudyFolder.begin(path, results.plan)
    for trial, each in results.records.items():
        each.save(folder.record_path(trial))
    return folder
