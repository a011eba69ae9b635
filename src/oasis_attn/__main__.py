"""`python -m oasis_attn` is the command `oasis`."""

from __future__ import annotations

import sys

from oasis_attn.cli import main

if __name__ == "__main__":
    sys.exit(main())
