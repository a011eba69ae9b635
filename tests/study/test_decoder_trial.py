"""Studies of decoders on generated tasks: the same folders, records, tables and reports."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from experiments.embedding_weights import embedding_weights
from experiments.first_token_vector import first_token_vector

from oasis_attn.errors import UserError
from oasis_attn.records import TrialRecord
from oasis_attn.study import decoder_trial
from oasis_attn.study.launch import ProcessLauncher
from oasis_attn.study.plan import Plan
from oasis_attn.study.results import Results
from oasis_attn.study.run import run_study
from oasis_attn.study.storage import StudyFolder
from oasis_attn.study.study_report import write_report
from oasis_attn.study.trial import reproduction, run_trial


@pytest.fixture
def plain():
    """A function that returns the values of a tiny plan on a task, with changes."""

    def plan(**changes):
        small = {
            "name": "tiny",
            "about": "Nothing.",
            "variants": ["vanilla", "oasis"],
            "corpora": ["trigger-every-8"],
            "seeds": [0],
            "sizes": ["lab-1"],
            "compare": {"oasis": ["vanilla"]},
            "training": {"steps": 4, "batch_size": 2, "warmup_steps": 1},
            "windows": 3,
            "schemes": ["w8a8-static-full", "w4a4"],
        }
        return {name: value for name, value in (small | changes).items() if value is not None}

    return plan


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def record(tiny, finished) -> TrialRecord:
    """The record of one trial, which runs once for all tests of this file."""
    (_, trial) = tiny().trials
    return run_trial(trial, finished / "trial.json", finished / "work", command="again")


def test_a_record_has_all_metrics_and_where_they_come_from(record, tiny, finished):
    names = {metric.name for metric in record.metrics}
    errors = {f"task.error@{scheme}" for scheme in ("w8a8-static-full", "w4a4")}
    assert {"task.error", "sink.idle", "null.idle", "outlier.max_inf_norm", *errors} <= names
    assert {"depth.entropy", "signal.beta", "trial.seconds"} <= names
    assert "perplexity.windowed" not in names
    (_, trial) = tiny().trials
    assert record.trial == trial.to_dict()
    assert record.train.blocks == 8
    assert (record.data.windows, record.data.window, record.calibration_windows) == (3, 8, 3)
    assert record.data.choice == "generated"
    assert len(record.tables["sink.idle"]) == 1
    assert TrialRecord.load(finished / "trial.json").to_json() == record.to_json()
    assert not (finished / "work").exists()


def test_a_killed_trial_starts_again_with_the_same_results(record, tiny, tmp_path, monkeypatch):
    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    (_, trial) = tiny().trials
    path, work = tmp_path / "trial.json", tmp_path / "work"
    with monkeypatch.context() as patch:
        patch.setattr(decoder_trial, "quantized_errors", killed)
        with pytest.raises(KeyboardInterrupt):
            run_trial(trial, path, work, command="again")
    assert not path.exists()
    again = run_trial(trial, path, work, command="again")
    assert not reproduction(record, again, 0.0).differences
    assert (again.train, again.data) == (record.train, record.data)
    assert again.tables == record.tables


@pytest.mark.parametrize("signal", ["shuffled", "averaged"])
def test_controls_have_the_same_results_in_each_process(tiny, tmp_path, signal):
    variants = {"control": {"base": "official", "overrides": {"null_signal": signal}}}
    (trial,) = tiny(variants=variants, compare={}).trials
    records = [
        run_trial(trial, tmp_path / f"{n}.json", tmp_path / f"work{n}", command="")
        for n in range(2)
    ]
    assert not reproduction(*records, 0.0).differences


def test_a_real_study_runs_in_processes_and_is_published(record, tiny, tmp_path):
    plan = tiny()
    status = run_study(plan, tmp_path / "out", launcher=ProcessLauncher(), show=False)
    assert (len(status.done), status.failed) == (2, {})
    folder = StudyFolder.open(tmp_path / "out")
    assert not reproduction(record, folder.records()[plan.trials[1]], 0.0).differences
    results = Results(plan, folder.records())
    labels = [metric.label for metric in results.metrics]
    assert {"task error", "idle sink", "w8a8-static-full error ratio"} <= set(labels)
    assert "perplexity" not in labels
    write_report(folder, tmp_path / "page.html")
    assert "relative task error" in (tmp_path / "tables.md").read_text()
    folder.publish(tmp_path / "published")
    published = StudyFolder.open(tmp_path / "published").records()[plan.trials[1]]
    assert published.tables["sink.idle"] == record.tables["sink.idle"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpora": ["trigger", "stdlib"]}, "corpora: trigger, stdlib are corpora of text and"),
        ({"corpora": {"trigger": ["arith"]}}, "tasks of 'trigger': a generated task has none"),
        ({"corpora": ["trigger-3"]}, "length: 3"),
        ({"corpora": ["triger-every-8"]}, "; did you mean the task trigger-every-LENGTH?"),
        ({"sizes": ["nano"]}, "sizes: 'nano' is not one of lab-1"),
        ({"training": {"block_length": 8}}, "training: 'block_length' is not one of steps"),
        ({"training": {"steps": 0}}, "steps: 0"),
        ({"training": {"trainable": ["rooter"]}}, "trainable: 'rooter' matches no parameter"),
        ({"evaluation": {"limit": 2}}, "evaluation: a study of generated tasks has no problems"),
        (
            {"variants": {"a": {"base": "oasis", "training": {"outlier_penalty": 1.0}}}},
            "training: 'outlier_penalty' is not one of steps",
        ),
        (
            {"variants": {"a": {"base": "vanilla", "overrides": {"null_signal": "on"}}}},
            "null_signal: 'on' needs residual",
        ),
    ],
)
def test_a_plan_that_cannot_run_is_refused(plain, changes, message):
    with pytest.raises(UserError, match=message):
        Plan.from_dict(plain(compare={}, **changes)).check()


def test_wrong_names_are_refused_without_the_heavy_libraries(plain, tmp_path):
    """Also another plan in the folder, and a wrong name of the last variant only."""
    StudyFolder.begin(tmp_path / "started", Plan.from_dict(plain(windows=4)))
    wrong = [
        {"sizes": ["lba-1"]},
        {"corpora": ["trigger-evry-8"]},
        {"schemes": ["w8a9"]},
        {"training": {"stepz": 3}},
        {"training": {"steps": 0}},
        {"variants": ["vanilla", "oasys"]},
        {"variants": {"vanilla": None, "a": {"base": "oasis", "overrides": {"nul_logit": 1}}}},
        {"variants": {"vanilla": None, "a": {"base": "oasis", "training": {"steps": 1}}}},
        {},
    ]
    for index, changes in enumerate(wrong):
        (tmp_path / f"{index}.yaml").write_text(json.dumps(plain(compare={}, **changes)))
    code = f"""
import sys
from oasis_attn.cli import main
for index in range({len(wrong)}):
    sys.argv = ["oasis", "study", "run", f"{{index}}.yaml", "--out", "started"]
    code = main()
    heavy = {{"torch", "transformers"}} & set(sys.modules)
    if code != 2 or heavy:
        sys.exit(f"plan {{index}}: code {{code}}, imports {{heavy or 'nothing'}}")
"""
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == len(wrong)
    assert [path.name for path in (tmp_path / "started").iterdir()] == ["plan.yaml"]


def test_the_first_token_is_measured_in_the_layer_output_with_the_largest_value(tiny) -> None:
    trial, *_ = tiny(corpora=["trigger-words-8"]).trials
    found = first_token_vector(trial)
    assert 1 / 64 < found["share_of_one"] < found["share_of_four"] < 1
    assert found["largest_over_median"] > 1
    assert found["largest"] / found["norm"] == pytest.approx(found["share_of_one"] ** 0.5, rel=0.5)


def test_embedding_weights_are_of_each_router_with_several_sources(tiny) -> None:
    changes = {"variants": ["attn_residual", "vanilla"], "corpora": ["trigger-content-8"]}
    trial, _ = tiny(**changes, compare={"attn_residual": ["vanilla"]}).trials
    means = embedding_weights(trial)
    assert len(means) == 2  # the MLP and the output; attention has one source
    assert all(0 < weight < 1 for pair in means for weight in pair)
    read = decoder_trial._info(trial.corpus, decoder_trial.measured_batch(trial))
    assert (read.window, read.tokens_scored) == (8, 7 * trial.windows)  # the first has no target
