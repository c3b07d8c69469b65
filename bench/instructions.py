"""`python -m bench.instructions [--quick] [--json FILE]`

Count the instructions that the host executes for an update and for a swap, with valgrind's callgrind: a number that
other load on the machine does not change. 1,000 small tensors, one thread, so nearly all of it is the walk through the
model. valgrind does not know AVX-512: the kernels run as AVX2.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from bench.contenders.peers import FOREACH, MULTI_FN, OURS, OURS_SWA_UTILS
from bench.harness import cases
from bench.harness.cases import Unavailable, build_model
from bench.harness.console import print_table
from bench.harness.contender import built
from bench.harness.session import Session, run_benchmarks

#: No other packages: importing one under valgrind takes minutes.
ENTRANTS = (OURS, OURS_SWA_UTILS, FOREACH, MULTI_FN)
CALLS = 5
_LIMIT_S = 300
#: Requests to valgrind; without valgrind they do nothing.
_REQUESTS = r"""
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; }
void start(void) { CALLGRIND_ZERO_STATS; }
void stop(const char *name) { CALLGRIND_DUMP_STATS_AT(name); }
"""
_ENVIRONMENT = {
    "FASTEMA_CPU_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "MALLOC_ARENA_MAX": "1",
}


def run(session: Session) -> None:
    """Count all entrants in one process under valgrind; record why where that is impossible."""
    try:
        counted = count()
    except Unavailable as error:
        session.miss("instructions", cases.small_tensors().name, "", error)
        print(f"instructions: not counted: {error}\n")
        return
    ours = counted.get(f"update: {OURS.name}")
    rows = []
    for title, instructions in counted.items():
        what, _, impl = title.partition(": ")
        backend = "native" if impl.startswith("fastema") else "torch"
        session.count(f"{what}, {cases.small_tensors().name}", impl, backend, instructions)
        share = "" if not ours else f"{instructions / ours:.1f} x"
        rows.append([impl, what, f"{instructions:,}", f"{instructions / 1000:,.0f}", share])
    for name in (peer.name for peer in ENTRANTS):
        if f"update: {name}" not in counted:
            session.miss("instructions", cases.small_tensors().name, name, "missing, or failed under valgrind")
            print(f"  not counted: {name}")
    columns = ["", "", "instructions", "a tensor", "/ ours"]
    print_table("instructions on the host, 1,000 x 256, float32, one thread, AVX2", columns, rows, left=2)


def count() -> dict[str, int]:
    """Return instructions per call, by "update: impl" or "swap: impl".

    Raises:
        Unavailable: valgrind, its headers or a C compiler is missing, or it failed.
    """
    for tool in ("valgrind", "cc"):
        if shutil.which(tool) is None:
            raise Unavailable(f"{tool} is not installed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "requests.c").write_text(_REQUESTS)
        library = folder / "requests.so"
        compiled = subprocess.run(
            ["cc", "-O1", "-shared", "-fPIC", "-o", library, folder / "requests.c"], capture_output=True, text=True
        )
        if compiled.returncode:
            raise Unavailable(f"valgrind's headers are not installed: {compiled.stderr.strip().splitlines()[0]}")
        command = [
            *("valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/counts"),
            *(sys.executable, "-m", "bench.instructions", "--counted-by", str(library)),
        ]
        environment = {**os.environ, **_ENVIRONMENT}
        root = Path(__file__).parent.parent
        try:
            done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"valgrind took more than {_LIMIT_S} s") from None
        counted = totals(path.read_text(errors="replace") for path in sorted(folder.glob("counts*")))
        if not counted:
            raise Unavailable(f"valgrind failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        return {title: round(total / CALLS) for title, total in counted.items()}


def totals(dumps: Iterable[str]) -> dict[str, int]:
    """Return the instruction counts in callgrind's files, by the name that the program gave each.

    Example:
        >>> totals(["desc: Trigger: Client Request: update: fastema\\nevents: Ir\\nsummary: 1234\\n"])
        {'update: fastema': 1234}
    """
    found = {}
    for dump in dumps:
        title = re.search(r"^desc: Trigger: Client Request: (.*)$", dump, re.MULTILINE)
        total = re.search(r"^summary: (\d+)", dump, re.MULTILINE)
        if title and total:
            found[title.group(1)] = int(total.group(1))
    return found


# ---- the process that valgrind runs ----


def _be_counted(library: str) -> None:
    requests = ctypes.CDLL(library)
    torch.set_num_threads(1)
    case = cases.small_tensors()
    calls: dict[str, Callable[[], object]] = {}
    for peer in ENTRANTS:
        try:
            contender = built(peer, build_model(case, torch.device("cpu")), case)
        except Unavailable:
            continue
        calls[f"update: {peer.name}"] = contender.run
        if peer is OURS:
            calls[f"swap: {peer.name}"] = contender.swap
    requests.begin()  # after the imports, which would take minutes
    for title, call in calls.items():
        for _ in range(2):
            call()
        requests.start()
        for _ in range(CALLS):
            call()
        requests.stop(title.encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["--counted-by"]:
        _be_counted(given[1])
        return 0
    return run_benchmarks("bench.instructions", "Instructions of the host's part.", {"instructions": run}, arguments)


if __name__ == "__main__":
    sys.exit(main())
