"""`python -m bench.all [--quick] [--json FILE] [--device cpu|cuda]`

Run every benchmark into one file: under ten minutes on two cores, `--quick` under one. Then print where a peer is
ahead.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench import instructions, memory, scale, swap, train_step, update
from bench.harness.console import print_table
from bench.harness.session import Benchmark, Session, run_benchmarks
from bench.pages.losses import LOSS_COLUMNS, loss_rows, losses


def print_losses(session: Session) -> None:
    """Print where another implementation takes less time than ours, or as much."""
    print_table("where ours is not ahead", LOSS_COLUMNS, loss_rows(losses(session.run)), left=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    benchmarks: dict[str, Benchmark] = {
        "update": update.run,
        "swap": swap.run,
        "scale": scale.run,
        "memory": memory.run,
        "train_step": train_step.run,
    }
    if "--quick" not in given:  # valgrind is slow
        benchmarks["instructions"] = instructions.run
    benchmarks["losses"] = print_losses
    return run_benchmarks("bench.all", "Every benchmark in one run.", benchmarks, arguments, update.measure_copy)


if __name__ == "__main__":
    sys.exit(main())
