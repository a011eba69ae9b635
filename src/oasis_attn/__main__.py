"""`python -m oasis_attn` is the command `oasis`; it also works with a distributed launcher."""

from __future__ import annotations

import os
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

from oasis_attn.cli import main

_EXIT_DELAY = 5.0  # seconds


def _silent() -> int:
    """Run `main` without output; only the first process of a launcher prints."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        code = main()
    if code:
        # The launcher stops all processes when one fails.  Let the first process report the error.
        time.sleep(_EXIT_DELAY)
    return code


if __name__ == "__main__":
    sys.exit(_silent() if int(os.environ.get("RANK", "0")) else main())
