"""`python -m bench.gpu CALL [--results FOLDER] [--dry-run] [--fresh]`

What only a GPU can show (and `build`: what only a CUDA build of torch can), in calls of at most nine minutes. What
came out of each step is in FOLDER as soon as it is known, in at most eight files; the same call again goes on where it
was cut, and does again what other sources make due. The reply is short: all that the commands printed is in
FOLDER/logs.txt.gz, and what the command that runs now has printed in FOLDER/running.log.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.gpu.results import FILES, ROOT
from bench.gpu.runner import CALL_SECONDS, Runner, print_dry_run
from bench.gpu.steps import CALLS, NEEDS_GPU, steps_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="What only a GPU can show, in calls.")
    parser.add_argument("call", choices=[*CALLS, "rehearse"], metavar="CALL", help=", ".join([*CALLS, "rehearse"]))
    parser.add_argument("--results", type=Path, default=ROOT / "build/gpu", metavar="FOLDER", help="default: build/gpu")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and what is missing; run nothing")
    parser.add_argument("--fresh", action="store_true", help="forget what was done")
    parser.add_argument("--seconds", type=float, default=CALL_SECONDS, help="of the whole call (default: %(default)g)")
    parser.add_argument("--without-gpu", action="store_true", help=argparse.SUPPRESS)  # of the rehearsal
    parsed = parser.parse_args(arguments)
    if parsed.call == "rehearse":
        from bench.gpu.rehearse import rehearse

        return rehearse()
    folder = parsed.results.resolve()
    steps = steps_of(parsed.call, folder, "cpu" if parsed.without_gpu else "cuda")
    if parsed.dry_run:
        print_dry_run(steps, folder)
        return 0
    if parsed.call in NEEDS_GPU and not torch.cuda.is_available() and not parsed.without_gpu:
        parser.error("torch sees no CUDA device; --dry-run shows what would run")
    try:
        _make_writable(folder, parsed.fresh)
    except OSError as error:
        parser.error(f"--results: nothing can be written to {folder} ({error})")
    return 0 if Runner(folder, parsed.without_gpu, parsed.seconds).run(steps) else 1


def _make_writable(folder: Path, fresh: bool) -> None:
    """Make the folder, without what was done where it is to be `fresh`, and write to it: before minutes are spent."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES if fresh else ():
        (folder / name).unlink(missing_ok=True)
    probe = folder / "probe.tmp"
    probe.write_bytes(b"x" * 4096)
    probe.unlink()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the command that runs ends too
    sys.exit(main())
