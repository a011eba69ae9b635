"""Run a study: start trials in processes or on a cluster until every one has a record."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from oasis_attn.data import corpus_tokenizer, fixed_vocab_size, load_corpus, token_blocks
from oasis_attn.errors import check_whole
from oasis_attn.files import lock
from oasis_attn.hub.model_sizes import text_config
from oasis_attn.study.launch import Job, Launcher, ProcessLauncher
from oasis_attn.study.plan import Plan, Trial
from oasis_attn.study.progress import ProgressTable
from oasis_attn.study.storage import Status, StudyFolder, check_texts
from oasis_attn.study.trial import LOCK_TIMEOUT

_POLL = 0.1  # seconds


def run_study(
    plan: Plan,
    out: str | Path,
    *,
    reuse_from: Sequence[str | Path] = (),
    workers: int = 1,
    launcher: Launcher | None = None,
    show: bool = True,
) -> Status:
    """Run every trial of `plan` that has no record in `out` yet.

    A trial that fails leaves a log under `out`/failed and does not stop the others; the next call
    runs it again.  An interruption stops the trials in processes of this machine; the next call
    resumes them.

    Args:
        plan: the plan.
        out: a new folder, or one in which this plan was started.
        reuse_from: folders of other studies; records of identical trials are copied from them.
        workers: number of trials that run at once.
        launcher: starts the trials; by default, in processes of this machine.
        show: show the progress on standard error.

    Returns:
        The progress of the study at the end.

    Raises:
        UserError: `out` contains something else, another process runs this study, a folder of
            `reuse_from` contains no study or no trial of this plan, a corpus cannot be read or is
            not the text of the trials that are finished, or `plan.check` finds an error.
    """
    check_whole("workers", workers, 1)
    plan.check()
    others = [StudyFolder.open(path) for path in reuse_from]
    StudyFolder.check(Path(out), plan)
    folder = StudyFolder(Path(out), plan)
    reused = folder.reusable(others)
    check_texts(set(folder.missing()) - reused.keys(), folder.records() | reused)
    folder = StudyFolder.begin(out, plan)
    launcher = launcher or ProcessLauncher()
    held = lock(folder.path / "work" / "study.lock", f"study {str(out)!r}", patience=LOCK_TIMEOUT)
    with held:
        launcher.begin(folder)
        folder.add(reused)
        pending = folder.missing()
        progress = ProgressTable(plan, folder.status(), workers=workers, show=show)
        with progress:
            prepare(pending, progress)
            _run(folder, pending, workers, launcher, progress)
        if not folder.missing():
            # On a network file system, files that a cluster job still has open cannot be removed.
            shutil.rmtree(folder.path / "work", ignore_errors=True)
    return folder.status()


def prepare(trials: Sequence[Trial], progress: ProgressTable) -> None:
    """Train each tokenizer and tokenize each corpus once, before the trials that share them."""
    done = set()
    for trial in trials:
        if trial.on_task:
            continue
        config = trial.training_config(Path(trial.id))
        corpus = load_corpus(trial.corpus)
        asked = config.vocab_size or fixed_vocab_size(corpus)
        vocabulary = text_config(trial.size, asked).vocab_size
        if (trial.corpus, vocabulary) in done:
            continue
        done.add((trial.corpus, vocabulary))
        progress.set_message(f"reading {trial.corpus}")
        tokenizer = corpus_tokenizer(corpus, vocabulary)
        for part in (corpus, load_corpus(trial.corpus, config.eval_split)):
            token_blocks(part, tokenizer, config.block_length, vocab_size=vocabulary)
    progress.set_message("")


def _run(
    folder: StudyFolder,
    pending: list[Trial],
    workers: int,
    launcher: Launcher,
    progress: ProgressTable,
) -> None:
    running: dict[Trial, tuple[Job, float, bool]] = {}
    waiting = list(pending)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                trial = waiting.pop(0)
                folder.failure_path(trial).unlink(missing_ok=True)
                resumed = folder.work_path(trial).exists()
                running[trial] = (launcher.start(folder, trial), time.monotonic(), resumed)
                progress.trial_started(trial)
            for trial, (job, since, resumed) in list(running.items()):
                if job.ended():
                    del running[trial]
                    job.close()
                    seconds = folder.seconds(trial)
                    done = seconds is not None
                    progress.trial_ended(
                        trial,
                        time.monotonic() - since,
                        seconds=seconds,
                        reason="" if done else folder.reason(trial) or "no record was written",
                        resumed=resumed,
                    )
            progress.update()
            time.sleep(_POLL)
    finally:
        for job, *_ in running.values():
            job.stop()
