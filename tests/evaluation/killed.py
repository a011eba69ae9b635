"""An evaluation that kills its own process, forked from one that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import signal

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["oasis_attn.training.run", "oasis_attn.modeling.modeling_oasis"])


def evaluate_until_killed(*arguments, **options) -> int:
    """The exit code of `evaluate(...)`, killed after its sixth batch in the middle of a write."""
    process = _context.Process(target=_run, args=(arguments, options, dict(os.environ)))
    process.start()
    process.join(600)
    process.kill()
    return process.exitcode


def _run(arguments, options, environment) -> None:
    os.environ.clear()
    os.environ.update(environment)
    from oasis_attn.evaluation import evaluate
    from oasis_attn.evaluation.samples import SampleLog

    add, calls = SampleLog.add, []

    def add_or_die(self, samples):
        add(self, samples)
        calls.append(self)
        if len(calls) == 6:
            with self.path.open("a") as file:
                file.write('{"protocol": "half a li')
            os.kill(os.getpid(), signal.SIGKILL)

    SampleLog.add = add_or_die
    evaluate(*arguments, **options)
