"""Running a study: cells handed out to processes or a cluster, until every one has its record."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from oasis_attn.data import corpus_tokenizer, load_corpus, token_blocks
from oasis_attn.errors import check_whole
from oasis_attn.files import lock
from oasis_attn.modeling.sizes import text_config
from oasis_attn.study.cell import PATIENCE
from oasis_attn.study.folder import Status, StudyFolder
from oasis_attn.study.launch import Job, Launcher, Processes
from oasis_attn.study.plan import Cell, Plan
from oasis_attn.study.progress import Board

_POLL = 0.1  # seconds


def run_study(
    plan: Plan,
    out: str | Path,
    *,
    reuse: Sequence[str | Path] = (),
    workers: int = 1,
    launcher: Launcher | None = None,
    show: bool = True,
) -> Status:
    """Run every cell of `plan` that has no record in `out` yet.

    A cell that ends badly is noted under `out`/failed and holds up no other; a later call tries it
    again.  An interruption ends the cells that run in processes of this one, and they have no
    record.

    Args:
        plan: what to run.
        out: a new folder, or one in which this plan was begun.
        reuse: folders of other studies, whose finished cells are taken over where this plan has
            the very same.
        workers: cells at once.
        launcher: what runs them; default, processes of this machine.
        show: a live table on standard error.

    Returns:
        Where the study stands at the end.

    Raises:
        UserError: `out` holds something else, another process runs this study; a folder of `reuse`
            that holds none; a corpus that cannot be read.
    """
    check_whole("workers", workers, 1)
    others = [StudyFolder.open(path) for path in reuse]
    folder = StudyFolder.begin(out, plan)
    launcher = launcher or Processes()
    held = lock(folder.path / "work" / "study.lock", f"study {str(out)!r}", patience=PATIENCE)
    with held:
        launcher.begin(folder)
        for other in others:
            folder.take_over(other)
        pending = folder.missing()
        board = Board(plan, folder.status(), workers=workers, show=show)
        with board:
            prepare(pending, board)
            _run(folder, pending, workers, launcher, board)
        if not folder.missing():
            shutil.rmtree(folder.path / "work")
    return folder.status()


def prepare(cells: Sequence[Cell], board: Board) -> None:
    """Train each tokenizer and cut each text once, before cells that share them begin."""
    done = set()
    for cell in cells:
        config = cell.training_config(Path(cell.id))
        vocabulary = text_config(cell.size, config.vocab_size).vocab_size
        if (cell.corpus, vocabulary) in done:
            continue
        done.add((cell.corpus, vocabulary))
        board.say(f"reading {cell.corpus}")
        corpus = load_corpus(cell.corpus)
        tokenizer = corpus_tokenizer(corpus, vocabulary)
        for part in (corpus, load_corpus(cell.corpus, config.eval_split)):
            token_blocks(part, tokenizer, config.block_length, vocab_size=vocabulary)
    board.say("")


def _run(
    folder: StudyFolder, pending: list[Cell], workers: int, launcher: Launcher, board: Board
) -> None:
    running: dict[Cell, tuple[Job, float, bool]] = {}
    waiting = list(pending)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                cell = waiting.pop(0)
                folder.failure_path(cell).unlink(missing_ok=True)
                resumed = folder.work_path(cell).exists()
                running[cell] = (launcher.start(folder, cell), time.monotonic(), resumed)
                board.started(cell)
            for cell, (job, since, resumed) in list(running.items()):
                if job.ended():
                    del running[cell]
                    job.close()
                    done = folder.record_path(cell).is_file()
                    reason = "" if done else folder.reason(cell) or "it left no record"
                    board.ended(cell, time.monotonic() - since, reason, resumed=resumed)
            board.update()
            time.sleep(_POLL)
    finally:
        for job, *_ in running.values():
            job.stop()
