"""`python -m oasis_attn` is the command `oasis`, under a distributed launcher too."""

from __future__ import annotations

import os
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

from oasis_attn.cli import main

_HEAD_START = 5.0  # seconds


def _silent() -> int:
    """`main` in a process that is not the launcher's first: only the first one talks."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        code = main()
    if code:
        # At the first failure the launcher ends all: let that be the process that says why.
        time.sleep(_HEAD_START)
    return code


if __name__ == "__main__":
    sys.exit(_silent() if int(os.environ.get("RANK", "0")) else main())
