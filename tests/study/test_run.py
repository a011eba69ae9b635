"""Scheduling with synthetic trials in this process, and with real trials that are killed or run on
a cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from oasis_attn.data import load_corpus
from oasis_attn.errors import UserError
from oasis_attn.extension_files import load_extensions
from oasis_attn.files import lock
from oasis_attn.records import Record
from oasis_attn.study import run as runs
from oasis_attn.study.launch import ClusterLauncher
from oasis_attn.study.run import run_study
from oasis_attn.study.storage import StudyFolder, check_texts
from oasis_attn.study.study_report import write_report
from oasis_attn.study.trial import reproduction
from oasis_attn.study.worker import run_alone
from study import factories


class Here:
    """Writes a synthetic record at once; `bad` variants fail, and at most `most` trials may run."""

    def __init__(self, bad=(), most=1):
        self.bad, self.most, self.ran, self.open = bad, most, [], 0

    def begin(self, folder):
        pass

    def start(self, folder, trial):
        self.open += 1
        assert self.open <= self.most
        self.ran.append(trial)
        if trial.variant in self.bad:
            path = folder.failure_path(trial)
            path.parent.mkdir(exist_ok=True)
            path.write_text("Traceback\nsome reason\n\n")
        else:
            factories.record(trial, {"outlier.max_inf_norm": 1.0 + trial.seed}).save(
                folder.record_path(trial)
            )
        return self

    def ended(self):
        self.open -= 1
        return True

    def close(self):
        pass

    def stop(self):
        pass


@pytest.fixture(autouse=True)
def _no_preparing(monkeypatch, request):
    if "real" not in request.node.name:
        for name in ("prepare", "check_texts"):
            monkeypatch.setattr(f"oasis_attn.study.run.{name}", lambda *_: None)


def test_every_trial_is_run_once_and_a_rerun_runs_none(tiny, tmp_path, capfd):
    plan, here = tiny(seeds=[0, 1, 2]), Here(most=2)
    status = run_study(plan, tmp_path / "out", workers=2, launcher=here)
    assert here.ran == list(plan.trials)
    assert (len(status.done), status.left, status.failed) == (6, 0, {})
    assert status.seconds_per_trial == 10.0
    assert not (tmp_path / "out" / "work").exists()
    assert capfd.readouterr().err.count("\n") == 6  # one per trial; not a terminal
    again = Here()
    assert run_study(plan, tmp_path / "out", launcher=again, show=False) == status
    assert again.ran == []


def test_trials_of_another_study_are_reused(tiny, tmp_path):
    run_study(tiny(seeds=[0, 1]), tmp_path / "one", launcher=Here(), show=False)
    here, plan = Here(), tiny(name="two", seeds=[1, 2])
    with pytest.raises(UserError, match=r"absent' contains no plan\.yaml"):
        run_study(
            plan, tmp_path / "two", reuse_from=[tmp_path / "absent"], launcher=here, show=False
        )
    assert not (tmp_path / "two").exists()
    other = tiny(name="three", seeds=[7])
    with pytest.raises(UserError, match=r"reuse_from: .*one' has no trial that is identical"):
        run_study(other, tmp_path / "three", reuse_from=[tmp_path / "one"], launcher=here)
    assert not (tmp_path / "three").exists()
    status = run_study(
        plan, tmp_path / "two", reuse_from=[tmp_path / "one"], launcher=here, show=False
    )
    assert [trial.seed for trial in here.ran] == [2, 2]
    assert status.left == 0
    name = f"{plan.trials[0].id}.json"
    taken, theirs = (tmp_path / study / "trials" / name for study in ("two", "one"))
    assert taken.read_bytes() == theirs.read_bytes()


def test_a_failed_trial_does_not_stop_others_and_is_run_again(tiny, tmp_path):
    plan, here = tiny(seeds=[0, 1]), Here(bad=("oasis",))
    status = run_study(plan, tmp_path / "out", launcher=here, show=False)
    assert (len(here.ran), len(status.done), status.left) == (4, 2, 2)
    assert set(status.failed.values()) == {"some reason"}
    again = Here()
    status = run_study(plan, tmp_path / "out", launcher=again, show=False)
    assert {trial.variant for trial in again.ran} == {"oasis"}
    assert (status.left, status.failed) == (0, {})


def test_a_resumed_trial_does_not_count_for_the_remaining_time(tiny, tmp_path, capfd):
    class Slow(Here):
        def ended(self):
            time.sleep(0.3)
            return super().ended()

    plan = tiny(seeds=[0, 1])
    folder = StudyFolder.begin(tmp_path, plan)
    folder.work_path(plan.trials[0]).mkdir(parents=True)
    run_study(plan, tmp_path, launcher=Slow())
    first, second, *_ = capfd.readouterr().err.splitlines()
    assert "left" not in first  # no whole trial yet
    assert "about 0 h 00 min left" in second


def test_an_interruption_stops_running_trials(tiny, tmp_path):
    class Interrupted(Here):
        stopped = 0

        def ended(self):
            raise KeyboardInterrupt

        def stop(self):
            self.stopped += 1

    launcher = Interrupted(most=2)
    with pytest.raises(KeyboardInterrupt):
        run_study(tiny(), tmp_path / "out", workers=2, launcher=launcher, show=False)
    assert launcher.stopped == 2


def test_a_folder_accepts_only_its_plan(tiny, tmp_path):
    run_study(tiny(), tmp_path / "out", launcher=Here(), show=False)
    with pytest.raises(UserError, match="whose windows is different: 3"):
        run_study(tiny(windows=4), tmp_path / "out", launcher=Here(), show=False)


def test_a_folder_with_other_files_is_refused(tiny, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="exists"):
        run_study(tiny(), tmp_path, launcher=Here())
    with pytest.raises(UserError, match=r"no plan\.yaml"):
        StudyFolder.open(tmp_path)


def test_a_partly_written_plan_is_written_again(tiny, tmp_path):
    (tmp_path / ".plan.yaml.half").write_text("name:")
    assert run_study(tiny(), tmp_path, launcher=Here(), show=False).left == 0


def test_a_study_cannot_run_twice_at_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "LOCK_TIMEOUT", 0.0)
    StudyFolder.begin(tmp_path, tiny())
    place = tmp_path / "work" / "study.lock"
    with lock(place, "it"), pytest.raises(UserError, match="another process"):
        run_study(tiny(), tmp_path, launcher=Here())


def test_a_record_of_another_trial_is_refused(tiny, tmp_path):
    plan = tiny()
    run_study(plan, tmp_path / "out", launcher=Here(), show=False)
    folder = StudyFolder.open(tmp_path / "out")
    one, other = (folder.record_path(trial) for trial in plan.trials)
    one.write_text(other.read_text())
    with pytest.raises(UserError, match="belongs to another trial"):
        folder.records()


def test_the_real_text_of_a_corpus_must_not_change(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some words.\n\nMore words.\n")
    plan = tiny(corpora=[str(text)], evaluation={})
    folder = StudyFolder.begin(tmp_path / "out", plan)
    done, missing = plan.trials
    digest = load_corpus(str(text)).sha256
    record = replace(factories.record(done, {}), train_corpus_sha256=digest)
    folder.add({done: record})
    check_texts([missing], folder.records())
    text.write_text("Other words.\n")
    changed = r"corpora: the text of .*text\.txt' is not the one"
    with pytest.raises(UserError, match=changed):
        run_study(plan, tmp_path / "out", launcher=Here(), show=False)
    with pytest.raises(UserError, match=changed):
        run_alone(str(tmp_path / "out"), missing.id)
    with pytest.raises(UserError, match=changed):
        run_study(plan, tmp_path / "new", reuse_from=[folder.path], launcher=Here(), show=False)
    assert not (tmp_path / "new").exists()
    folder.add({missing: replace(factories.record(missing, {}), train_corpus_sha256="other")})
    with pytest.raises(UserError, match="were trained on different texts"):
        folder.records()


def test_a_rerun_is_not_compared_with_another_trial(tiny, tmp_path):
    plan = tiny()
    run_study(plan, tmp_path / "out", launcher=Here(), show=False)
    one, other = plan.trials
    record = StudyFolder.open(tmp_path / "out").record_path(other)
    with pytest.raises(UserError, match=f"is the record of another trial than '{one.id}'"):
        run_alone(str(tmp_path / "out"), one.id, out=tmp_path / "x.json", check=record)


def test_a_report_requires_a_finished_trial(tiny, tmp_path):
    folder = StudyFolder.begin(tmp_path / "out", tiny())
    with pytest.raises(UserError, match="no finished trial"):
        write_report(folder, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_an_unknown_trial_and_an_existing_record(tiny, tmp_path):
    StudyFolder.begin(tmp_path, tiny())
    with pytest.raises(UserError, match="did you mean 'sums-tiny-vanilla-s0"):
        run_alone(str(tmp_path), "sums-tiny-vanila-s0", out=tmp_path / "x.json")
    with pytest.raises(UserError, match=r"out: .* exists"):
        run_alone(str(tmp_path), "x", out=tmp_path / "plan.yaml")
    with pytest.raises(UserError, match="out: required"):
        run_alone("smoke", "x")


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["oasis_attn.training.run", "oasis_attn.modeling.modeling_oasis"])


def _run_study(plan, out: Path) -> None:
    run_study(plan, out, show=False)


@pytest.mark.usefixtures("own_extensions")
def test_real_trials_end_with_their_parent_and_are_resumed(tiny, tmp_path):
    """Kill the study with SIGKILL while a trial trains; then finish the study on a cluster."""
    training = dict(tiny().training) | {"steps": 150, "save_every": 25}
    plan = tiny(training=training, variants=["vanilla"], compare={}, corpora=list(tiny().corpora))
    (trial,) = plan.trials
    out = tmp_path / "out"
    parent = _context.Process(target=_run_study, args=(plan, out))
    parent.start()
    work = out / "work" / trial.id
    wait(lambda: any(work.glob("checkpoints/checkpoint-*")), parent)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert children
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    wait(lambda: not any(map(alive, children)))
    folder = StudyFolder.open(out)
    assert folder.missing() == [trial]

    extension = tmp_path / "signals.py"
    extension.write_text("")
    load_extensions([extension])
    cluster = ClusterLauncher("local", {"timeout_min": 10})
    status = run_study(plan, out, launcher=cluster, show=False)
    assert (status.left, status.failed) == (0, {})

    assert list(folder.records()[trial].environment.extensions) == ["signals.py"]

    # The recorded command in this process has the same results as the resumed trial.
    again, compared = run_alone(
        str(out), trial.id, out=tmp_path / "trial.json", check=folder.record_path(trial)
    )
    assert compared.reproduced
    assert compared.compared > 50
    assert Record.load(tmp_path / "trial.json").to_json() == again.to_json()
    assert reproduction(folder.records()[trial], again).reproduced


def test_an_unknown_option_of_the_cluster_is_an_error(tiny, tmp_path):
    launcher = ClusterLauncher("local", {"nodez": 1})
    with pytest.raises(UserError, match="cluster:"):
        run_study(tiny(), tmp_path / "out", launcher=launcher, show=False)
    with pytest.raises(UserError, match="did you mean 'slurm'"):
        ClusterLauncher("slrum")


def alive(process: str) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def wait(condition, process=None) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process is None or process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.01)
