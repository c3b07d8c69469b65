"""Run the `fastema` command as `python -m fastema`, which is how torchrun starts it."""

from __future__ import annotations

import sys

from fastema.cli import main

if __name__ == "__main__":
    sys.exit(main())
