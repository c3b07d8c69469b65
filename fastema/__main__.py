"""`python -m fastema` is the `fastema` command; torchrun starts it so: `torchrun --nproc-per-node 2 -m fastema …`."""

from __future__ import annotations

import sys

from fastema.cli import main

if __name__ == "__main__":
    sys.exit(main())
