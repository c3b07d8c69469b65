"""`python -m bench.all [--quick] [--json FILE] [--device cpu|cuda]`

Every benchmark in one run and one file: under ten minutes on two cores, `--quick` under one. Then the verdict.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench import instructions, memory, scale, swap, train_step, update
from bench.losses import LOSS_COLUMNS, loss_rows, losses
from bench.session import Benchmark, Session, run_benchmarks
from bench.table import print_table
from bench.targets import NOT_MEASURED, TARGET_COLUMNS, target_rows, targets


def print_verdict(session: Session) -> None:
    """What was promised, and what this run measured; and where somebody else is ahead."""
    found = [target for target in targets(session.run) if target.measured != NOT_MEASURED or not session.quick]
    print_table("targets, from the medians above", TARGET_COLUMNS, target_rows(found), left=4)
    print_table("where ours is not ahead", LOSS_COLUMNS, loss_rows(losses(session.run)), left=4)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    benchmarks: dict[str, Benchmark] = {
        "update": update.run,
        "swap": swap.run,
        "scale": scale.run,
        "memory": memory.run,
        "train_step": train_step.run,
    }
    if "--quick" not in given:  # under valgrind everything takes its time
        benchmarks["instructions"] = instructions.run
    benchmarks["verdict"] = print_verdict
    return run_benchmarks("bench.all", "Every benchmark in one run.", benchmarks, arguments, update.measure_copy)


if __name__ == "__main__":
    sys.exit(main())
