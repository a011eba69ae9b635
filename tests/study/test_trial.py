from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from example_records import ENVIRONMENT
from oasis_attn.data import as_windows
from oasis_attn.errors import UserError
from oasis_attn.files import is_locked, lock
from oasis_attn.measure import diagnose
from oasis_attn.measure.loss import measure_loss
from oasis_attn.modeling.configuration_oasis import OasisConfig
from oasis_attn.modeling.modeling_oasis import OasisForCausalLM
from oasis_attn.modeling.variants import settings_of
from oasis_attn.quantization import quantize, schemes
from oasis_attn.records import Metric, TrialRecord
from oasis_attn.study import trial as module
from oasis_attn.study.study_metrics import TIMES
from oasis_attn.study.trial import reproduction, run_trial
from study import factories
from tiny_models import tiny_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def trial(tiny):
    return tiny().trials[1]


@pytest.fixture
def record(finished, trial) -> TrialRecord:
    """The record of one trial, which runs once for all tests of this file."""
    return run_trial(trial, finished / "trial.json", finished / "work", command="again")


def test_a_record_has_all_metrics(record, trial, finished):
    names = {metric.name for metric in record.metrics}
    tasks = {"arith.pass@1.strict", "perplexity.windowed"}
    assert tasks | {f"{name}@{scheme}" for name in tasks for scheme in trial.schemes} <= names
    assert {"outlier.max_inf_norm", "sink.mass", "depth.entropy", "depth.causal"} <= names
    assert {"joint.leakage", "null.mass", *TIMES} <= names
    assert record.kind == "trial"
    assert record.seed == trial.seed
    assert record.trial == trial.to_dict()
    assert record.command == "again"
    assert record.data.windows == record.calibration_windows == 3
    assert str(finished) not in (finished / "trial.json").read_text()
    assert not (finished / "work").exists()


def test_a_finished_trial_is_not_run_again(record, trial, finished, monkeypatch):
    monkeypatch.setattr(module, "train", None)
    again = run_trial(trial, finished / "trial.json", finished / "work", command="other")
    assert again.to_json() == record.to_json()


@pytest.mark.parametrize("step", ["train", "quantize_and_measure"])
def test_an_interrupted_trial_leaves_no_record_and_resumes_to_the_same_results(
    record, trial, tmp_path, monkeypatch, step
):
    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    path, work = tmp_path / "trial.json", tmp_path / "work"
    with monkeypatch.context() as patch:
        if step == "train":
            patch.setattr("oasis_attn.training.run.training_record", killed)
        else:
            steps = [killed if s.__name__ == step else s for s in module.STEPS]
            patch.setattr(module, "STEPS", steps)
        with pytest.raises(KeyboardInterrupt):
            run_trial(trial, path, work, command="again")
    assert not path.exists()
    again = run_trial(trial, path, work, command="again")
    assert reproduction(record, again).reproduced
    assert again.data == record.data
    assert again.tables["loss"] == record.tables["loss"]


def test_a_shuffled_signal_has_the_same_results_after_a_kill(tiny, tmp_path, monkeypatch):
    trial = tiny(
        variants=["oasis_signal_shuffled"], compare={}, schemes=[], corpora=["pydoc"]
    ).trials[0]
    whole = run_trial(trial, tmp_path / "a.json", tmp_path / "a", command="")

    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    path, work = tmp_path / "b.json", tmp_path / "b"
    for where in (
        "oasis_attn.study.trial._restore_random_state",
        "oasis_attn.study.trial.held_out_windows",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, killed)
            with pytest.raises(KeyboardInterrupt):
                run_trial(trial, path, work, command="")
        torch.manual_seed(1)  # as in another process
    assert reproduction(whole, run_trial(trial, path, work, command=""), 0.0).reproduced


@pytest.mark.parametrize("variant", ["official", "oasis_block"])
def test_other_residual_forms_are_measured_too(tiny, tmp_path, variant):
    plan = tiny(variants=[variant, "vanilla"], compare={}, schemes=["w8a8-static-full"])
    record = run_trial(plan.trials[0], tmp_path / "trial.json", tmp_path / "work", command="again")
    names = {metric.name for metric in record.metrics}
    assert {"depth.entropy", "depth.signal", "joint.leakage"} <= names
    assert ("depth.causal" in names) == (variant != "official")


def test_files_that_cannot_be_resumed_from_are_removed(record, trial, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "run.json").write_text("{")
    again = run_trial(trial, tmp_path / "trial.json", work, command="again")
    assert reproduction(record, again).reproduced


def test_a_locked_trial_is_refused(trial, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOCK_TIMEOUT", 0.0)
    with lock(tmp_path / "work.lock", "this"):
        assert is_locked(tmp_path / "work.lock")
        with pytest.raises(UserError, match="another process"):
            run_trial(trial, tmp_path / "trial.json", tmp_path / "work", command="")
    assert not is_locked(tmp_path / "work.lock")
    assert not (tmp_path / "work").exists()


def test_differences_are_named_and_run_times_are_ignored(trial):
    other = replace(ENVIRONMENT, commit="a")
    nan = Metric(name="c", value=float("nan"))
    one = replace(
        factories.record(trial, {}),
        metrics=(Metric(name="a", value=1.0), Metric(name="b", value=2.0, where="x"), nan),
    )
    slow = Metric(name=TIMES[0], value=3.0)
    assert reproduction(one, replace(one, metrics=(*one.metrics, slow))).reproduced
    more = Metric(name="d", value=3.0)
    assert reproduction(one, replace(one, metrics=(*one.metrics, more))).reproduced
    close = replace(one.metrics[0], value=1.0 + 1e-9)
    assert reproduction(one, replace(one, metrics=(close, *one.metrics[1:]))).reproduced
    far = replace(one.metrics[1], value=2.1)
    found = reproduction(one, replace(one, metrics=(far,)))
    assert found.text.splitlines() == [
        "not reproduced: 3 metrics of the committed record, relative tolerance 1e-06; 3 differ",
        "a: committed 1.0, rerun None",
        "b x: committed 2.0, rerun 2.1",
        "c: committed nan, rerun None",
    ]
    old = replace(one, metrics=(far,), environment=other)
    last = reproduction(old, one).text.splitlines()[-1]
    assert last == "environment, commit: committed 'a', rerun None"
    same = reproduction(replace(one, environment=other), one)
    assert same.reproduced
    assert same.text == (
        "reproduced: 3 metrics of the committed record, relative tolerance 1e-06; none differs"
    )


@pytest.mark.parametrize("variant", ["vanilla", "oasis"])
@pytest.mark.parametrize("scheme", ["w8a8-static-full", "w4a4"])
def test_a_loss_pass_and_a_diagnosis_of_a_quantized_model_have_equal_numbers(variant, scheme):
    torch.manual_seed(0)
    model = OasisForCausalLM(OasisConfig(text_config=tiny_config("llama"), **settings_of(variant)))
    rows = torch.randint(model.config.vocab_size, (3, 24))
    windows = as_windows(
        rows, tokenizer=None, window=None, windows=3, vocab_size=model.config.vocab_size
    )
    batches = [windows.ids_NT[:1]] if schemes()[scheme].needs_calibration else None
    quantized = quantize(model.eval(), scheme, calibration=batches)
    record = diagnose(quantized, windows)
    for metric in measure_loss(quantized, windows):
        assert metric == record.metric(metric.name)
