"""`python -m bench.gpu rehearse`: every step of all calls on a bare copy of the tree, without GPU and network.

What needs a GPU must fail there, for its own reason: a step that passes without one would lie. What does not need one
must pass: the build, what measures (small, on the CPU), and what keeps the results. Ends with 1 where anything else
came out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from bench.gpu.results import FILES, ROOT, read

REPLY = 12_000  # characters that come back from some machines
FILES_AT_MOST = 8
LEAST_TESTS = 140  # that need a GPU, all skipped here
#: The beginning of a step's name -> what it must come to without a GPU, as "outcome: why".
EXPECTED = {
    "machine": "passed: ",
    "build": "passed: ",
    "usable": "passed: ",  # on the CPU, Triton in its interpreter: an install that has its kernels
    "tests": r"failed: no test passed \(\d+ skipped: .*no CUDA device",
    "docs": "failed: status 1",
    "lab": "passed: " if shutil.which("nvcc") else "failed: status 1",  # the kernel as it is, built and not run
    "cases": "passed: ",
    "overlap": "passed: ",
    "counters": "failed: status 1",
    "planted fault": "not run: |failed: its output lacks",
    "memcheck": "not run: |failed: its output lacks",
    "initcheck": "not run: |failed: its output lacks",
    "peers": "passed: ",
    "table of peers": "failed: status 1",  # its file has no update
}
_LEFT_OUT = shutil.ignore_patterns(
    *(".git", ".venv*", ".matrix", "build", "dist", "runs", "checkpoints*", "*.egg-info", "*.so", "*.o", "*.py[cod]"),
    *("__pycache__", ".*_cache", ".hypothesis", "_build_record.json"),
)


def offline() -> list[str]:
    """Return the command before one that shall have no network; nothing where this system does not allow it."""
    command = ["unshare", "-n"]
    allowed = shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else []


class Copy:
    """A bare copy of the tree, with an environment of its own that sees this one's packages."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        shutil.copytree(ROOT, self.tree, ignore=_LEFT_OUT, symlinks=True)
        venv.create(folder / "venv", with_pip=False)
        self._python = str(folder / "venv/bin/python")
        (site,) = (folder / "venv/lib").glob("python*/site-packages")
        paths = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (site / "of_this_environment.pth").write_text("\n".join(paths) + "\n")
        hidden = {name for name in os.environ if name.startswith(("GIT_", "PYTHON", "TRITON_", "FASTEMA_"))}
        self._environment = {name: value for name, value in os.environ.items() if name not in hidden}
        self._environment |= {"CUDA_VISIBLE_DEVICES": "", "PATH": f"{folder}/venv/bin:{os.environ['PATH']}"}
        self._offline = offline()

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run `python -m bench.gpu` in it; return the status and the reply."""
        command = [*self._offline, self._python, "-m", "bench.gpu", *arguments]
        process = subprocess.Popen(
            command, cwd=self.tree, env=self._environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            reply, _ = process.communicate()
        finally:
            process.terminate()  # nothing, where it has ended; else it ends the command that it runs
            process.wait()
        return process.returncode, reply


def unexpected(call: str, status: int, reply: str, folder: Path) -> list[str]:
    """Return what of a call without a GPU is not as it must be."""
    wrong = []
    if status != 1:
        wrong.append(f"{call} ended with {status}, where without a GPU it fails with 1")
    if len(reply) > REPLY:
        wrong.append(f"{call} replied with {len(reply)} characters, of which {REPLY} come back")
    left = sorted(path.name for path in folder.iterdir())
    if len(left) > FILES_AT_MOST or not set(left) <= set(FILES) or "running.log" in left:
        wrong.append(f"{call} left {left}")
    for name, result in read(folder / "results.json").get("steps", {}).items():
        begins = max((each for each in EXPECTED if name.startswith(each)), key=len, default=None)
        found = f"{result['outcome']}: {result.get('why', '')}"
        if begins is None or re.match(EXPECTED[begins], found) is None:
            wrong.append(f"{call}: {name}: {found}, where {EXPECTED.get(begins or '')!r} is expected")
    return wrong


def unexpected_tests(folder: Path) -> list[str]:
    """Return what is wrong with the tests that were skipped: their number is known from the steps' reasons."""
    steps = read(folder / "results.json").get("steps", {})
    counts = [re.search(r"(\d+) skipped", result.get("why", "")) for name, result in steps.items() if "tests:" in name]
    skipped = sum(int(found[1]) for found in counts if found)
    return [] if skipped >= LEAST_TESTS else [f"{skipped} tests skipped for want of a GPU, of {LEAST_TESTS} or more"]


def rehearse() -> int:
    """Rehearse; return the exit status."""
    with tempfile.TemporaryDirectory(prefix="fastema-rehearsal-") as name:
        copy = Copy(Path(name))
        print("a copy of the tree, " + ("without a network" if offline() else "with the network, for want of unshare"))
        folder = Path(name) / "results"
        begin = time.monotonic()
        status, reply = copy.run("all", "--results", str(folder), "--without-gpu", "--seconds", "1800")
        print(f"{reply}in {time.monotonic() - begin:.0f} s", flush=True)
        wrong = [*unexpected("all", status, reply, folder), *unexpected_tests(folder)]
        for arguments, words in (
            (["first", "--results", str(folder)], "torch sees no CUDA device"),
            (["first", "--results", f"{folder}/results.json/below", "--without-gpu"], "nothing can be written to"),
        ):
            status, reply = copy.run(*arguments)
            if status != 2 or words not in reply:
                wrong.append(f"{' '.join(arguments)} ended with {status}: {reply[-300:]}")
    print("\n".join(f"WRONG: {line}" for line in wrong) or "rehearsed: every step came to what it must without a GPU")
    return 1 if wrong else 0
