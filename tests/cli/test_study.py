from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from oasis_attn.records import TrialRecord
from oasis_attn.study.lookup import shipped_plans
from oasis_attn.study.plan import Plan
from oasis_attn.study.plan_file import load_plan
from oasis_attn.study.run import run_study
from oasis_attn.study.trial import reproduction
from study import factories
from study.test_run import Here

SUBCOMMANDS = ("plans", "run", "status", "table", "report", "trial")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oasis_attn.study.run.prepare", lambda *_: None)
        run_study(factories.plan(), folder, launcher=Here(), show=False)
    return str(folder)


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_every_command_has_help_with_an_example(oasis, command):
    code, (out, _) = oasis("study", command, "--help")
    assert code == 0
    assert f"Example: oasis study {command}" in " ".join(out.split())
    assert "--json" in out
    assert "--exit-with-parent" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bogus"], "'bogus'"),
        (["run", "smokey", "--out", "x"], "did you mean 'smoke'"),
        (["plans", "smokey"], "did you mean 'smoke'"),
        (["run", "absent.yaml", "--out", "x"], "absent.yaml"),
        (["run", "smoke"], "--out"),
        (["run", "smoke", "--out", "x", "--workers", "0"], "--workers: 0"),
        (
            ["run", "smoke", "--out", "x", "--executor-option", "timeout_min=3"],
            "requires --cluster",
        ),
        (["run", "smoke", "--out", "x", "--cluster", "slrum"], "did you mean 'slurm'"),
        (["status", "absent"], "'absent' contains no plan.yaml"),
        (["table", "absent"], "'absent' contains no plan.yaml"),
        (["report", "absent"], "'absent' contains no plan.yaml"),
        (["trial", "smoke", "x"], "'smoke' is a plan"),
        (["trial", "smoke", "x", "--out", "y.json"], "'x' is not one of"),
        (["trial", "smoke", "x", "--check", "absent.json"], "absent.json"),
    ],
)
def test_bad_input_is_one_line_and_code_2_and_writes_nothing(
    oasis, monkeypatch, tmp_path, words, message
):
    monkeypatch.chdir(tmp_path)
    code, (out, err) = oasis("study", *words)
    assert (code, out) == (2, "")
    assert err.startswith("oasis: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_plans_as_json_are_the_library_s(oasis):
    code, (out, _) = oasis("study", "plans", "--json")
    assert code == 0
    plans = {name: Plan.from_dict(plan) for name, plan in json.loads(out).items()}
    assert plans == {name: load_plan(name) for name in shipped_plans()}


def test_a_plan_is_printed_as_a_file_of_its_own(oasis, tmp_path):
    code, (out, _) = oasis("study", "plans", "beyond")
    (tmp_path / "mine.yaml").write_text(out)
    assert (code, load_plan(tmp_path / "mine.yaml")) == (0, load_plan("beyond"))
    code, (out, _) = oasis("study", "plans", "beyond", "--json")
    assert (code, Plan.from_dict(json.loads(out))) == (0, load_plan("beyond"))


def test_status_table_and_report(oasis, out, tmp_path):
    code, (said, _) = oasis("study", "status", out, "--json")
    assert (code, json.loads(said)["left"]) == (0, 0)
    code, (said, _) = oasis("study", "status", out)
    assert (code, "38" in said) == (0, True)
    code, (said, _) = oasis("study", "table", out, "--json")
    assert code == 0
    assert json.loads(said)["verdicts"][0]["results"][0]["comparison"]["n"] == 6
    code, (said, _) = oasis("study", "table", out)
    assert (code, "Claims" in said) == (0, True)
    page = tmp_path / "page.html"
    code, (said, _) = oasis("study", "report", out, "--page", str(page), "--json")
    assert (code, str(page) in json.loads(said)) == (0, True)
    assert page.is_file()


def test_a_record_is_not_compared_with_itself(oasis, out):
    record = next(Path(out, "trials").glob("*.json"))
    code, (_, err) = oasis("study", "trial", out, record.stem, "--check", record)
    assert (code, err.count("\n")) == (2, 1)
    assert "--out: required with check" in err
    code, (_, err) = oasis("study", "report", out, "--page", Path(out, "trials"))
    assert (code, err.count("\n")) == (2, 1)
    assert "is a folder" in err


def test_a_comparison_is_in_the_json(oasis, out, monkeypatch):
    path = next(Path(out, "trials").glob("*.json"))
    record = TrialRecord.load(path)
    other = replace(record, metrics=(replace(record.metrics[0], value=7.0), *record.metrics[1:]))
    for rerun, code in ((record, 0), (other, 1)):
        found = rerun, reproduction(record, rerun)
        monkeypatch.setattr("oasis_attn.study.worker.run_alone", Mock(return_value=found))
        words = ("trial", out, path.stem, "--out", "x.json", "--check", path, "--json")
        got, (said, _) = oasis("study", *words)
        parts = json.loads(said)
        assert (got, parts["comparison"]["reproduced"]) == (code, code == 0)
        assert parts["record"]["trial"] == record.trial


def test_a_study_with_unfinished_trials_ends_with_code_1(oasis, monkeypatch, tmp_path):
    monkeypatch.setattr("oasis_attn.study.run.prepare", lambda *_: None)
    monkeypatch.setattr("oasis_attn.study.run.ProcessLauncher", lambda: Here(bad=("oasis",)))
    code, (said, _) = oasis("study", "run", "smoke", "--out", str(tmp_path / "o"), "--json")
    assert code == 1
    assert json.loads(said)["left"] == 2
