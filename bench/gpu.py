"""`python -m bench.gpu test|sanitize|bench|build [--dry-run] [--fresh] [--results FOLDER]`

What only a GPU can show (and `build`: what only a CUDA build of torch can), in stages of at most 8 minutes each. A
stage is a list of commands with a limit each. Its outcome is written to FOLDER/<device>.json after every command; a
stage that is started again goes on where it was cut short, as long as the sources are the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.gpu_results import ROOT, read_results, sources_digest, write_part

STAGE_SECONDS = 480.0
GPU_TESTS = (
    *("backends/test_gpu", "backends/test_gpu_claims"),
    *("core/shadow/test_offload_gpu", "swa_utils/test_swa_utils_gpu"),
)
CORE_TESTS = (
    *("core/test_ema", "core/swap/test_exchange", "core/shadow/test_update", "core/decay/test_several_decays"),
    "swa_utils/test_swa_utils",
    "backends/test_backends",
)
# Memory that is freed and then read by an update: a sanitizer that does not report it sees nothing.
_PLANTED = (
    "import torch; from fastema.backends import native; a, b = torch.ones(2, 1 << 16, device='cuda').unbind(); "
    "a, b = a.clone(), b.clone(); plan = native.Plan([[a]], [b], [False], []); b.untyped_storage().resize_(0); "
    "plan.update([0.5], False); torch.cuda.synchronize()"
)
_IMPORTS_WITH_CUDA = "from fastema.backends import native; assert native._C.has_cuda(), native._build_record()"


@dataclass(frozen=True)
class Step:
    """One command of a stage.

    Args:
        command: what runs, in the repository's folder.
        seconds: its limit.
        environment: beside the process's own.
        fails_with: the exit status that it must have.
        again: run also where it passed before.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    fails_with: int = 0
    again: bool = False


def _build() -> Step:
    environment = {"FASTEMA_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "native"}  # of this GPU alone: a fraction of the time
    return Step("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 200, environment)


def _pytest(name: str, arguments: Sequence[str], seconds: float) -> Step:
    return Step(name, [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *arguments], seconds)


def test_steps(_: Path) -> list[Step]:
    """Build for the GPU at hand, then the tests marked gpu, a file at a time."""
    info = Step("info", [sys.executable, "-m", "fastema", "info"], 60, again=True)
    steps = [_build(), info, *(_pytest(name, [f"tests/{name}.py"], 240) for name in GPU_TESTS)]
    if importlib.util.find_spec("sybil") is not None:  # it runs the blocks of the pages, those of a GPU among them
        steps.append(Step("docs", [sys.executable, "-m", "pytest", "-q", "docs/recipes"], 240))
    return steps


def sanitize_steps(_: Path) -> list[Step]:
    """Run the kernels under compute-sanitizer, first of all on a fault that it must see."""
    tool = _sanitizer() or "compute-sanitizer"
    # torch's caching allocator hands out pieces of large blocks, and beyond a piece is no error.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def check(name: str, kind: str, command: Sequence[str], fails_with: int = 0) -> Step:
        options = ["--tool", kind, "--error-exitcode", "9"]
        return Step(name, [tool, *options, sys.executable, *command], 110, uncached, fails_with)

    steps = [_build(), check("planted fault", "memcheck", ["-c", _PLANTED], fails_with=9)]
    for name, kind, chosen in (
        ("memcheck native", "memcheck", "matrix and native"),
        ("memcheck exchange", "memcheck", "exchange_in_place"),
        ("memcheck triton", "memcheck", "matrix and triton and skipping"),
        ("initcheck native", "initcheck", "matrix and native and skipping"),
    ):
        steps.append(check(name, kind, ["-m", "pytest", "-q", "-m", "gpu", "tests/backends/test_gpu.py", "-k", chosen]))
    return steps


def bench_steps(results: Path) -> list[Step]:
    """Measure our own cases beside their predictions, then everybody in the time that is left."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [sys.executable, "-m", "bench.gpu_cases", "--device", device, "--results", str(results)]
    peers = [sys.executable, "-m", "bench.all", "--device", device, "--seconds", "0.2"]
    peers += ["--json", str(results.with_name(f"{results.stem}-peers.json"))]
    return [_build(), Step("cases", cases, 240), Step("peers", peers, 240)]


def build_steps(_: Path) -> list[Step]:
    """Build a wheel against this CUDA torch, import it, run the core tests on the CPU, list what is in the binary."""
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "--force-reinstall",
        ".",
    ]
    # The installed package, not the sources beside the tests: hence no "." on the path.
    tests = ["-c", "import sys, pytest; sys.path.pop(0); sys.exit(pytest.main(sys.argv[1:]))"]
    tests += ["-q", "-o", "pythonpath=tests", *(f"tests/{name}.py" for name in CORE_TESTS)]
    return [
        Step("install", install, 480, {"FASTEMA_CUDA": "1"}),
        Step("import", [sys.executable, "-P", "-c", _IMPORTS_WITH_CUDA], 60, again=True),
        Step("architectures", [sys.executable, "-P", str(ROOT / "bench/gpu_binary.py")], 60, again=True),
        Step("core tests", [sys.executable, *tests], 420),
    ]


STAGES: dict[str, Callable[[Path], list[Step]]] = {
    "test": test_steps,
    "sanitize": sanitize_steps,
    "bench": bench_steps,
    "build": build_steps,
}
_NEEDS_GPU = ("test", "sanitize", "bench")


def device_slug() -> str:
    """Return the name of the file of results: the GPU's, or "no-gpu"."""
    if not torch.cuda.is_available():
        return "no-gpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def run_stage(stage: str, steps: Sequence[Step], results: Path, fresh: bool, seconds: float = STAGE_SECONDS) -> bool:
    """Run what is not done yet; return whether every step passed.

    Args:
        results: the file of this device.
        fresh: forget what was done.
        seconds: of the whole stage; what does not fit is left for the next call.
    """
    sources = sources_digest()
    part = read_results(results).get(stage, {})
    if fresh or part.get("sources") != sources:
        part = {"sources": sources, "torch": torch.__version__, "steps": {}}
    deadline = time.monotonic() + seconds
    for step in steps:
        done = part["steps"].get(step.name, {})
        if done.get("passed") and not step.again:
            print(f"== {stage}: {step.name}: passed before, in {done['seconds']} s")
            continue
        left = deadline - time.monotonic()
        if left < 5:
            print(f"== {stage}: the time is up before {step.name}: run it again to go on")
            return False
        print(f"== {stage}: {step.name}: {' '.join(step.command)}", flush=True)
        begin = time.monotonic()
        status, output = _run(step, min(step.seconds, left))
        taken = round(time.monotonic() - begin, 1)
        passed = status == step.fails_with
        part["steps"][step.name] = {"passed": passed, "status": status, "seconds": taken, "output": output[-2000:]}
        if stage == "bench" and results.is_file():  # bench.gpu_cases has written its own part meanwhile
            part = read_results(results).get(stage, {}) | {key: part[key] for key in ("sources", "torch", "steps")}
        write_part(results, stage, part)
        print(f"== {stage}: {step.name}: {'passed' if passed else f'FAILED with status {status}'} in {taken} s")
        if not passed and step.name in ("build", "install"):
            return False  # nothing after it means anything
    failed = [step.name for step in steps if not part["steps"].get(step.name, {}).get("passed")]
    print(f"{stage}: " + (f"failed: {', '.join(failed)}" if failed else "all steps passed") + f"; written: {results}")
    return not failed


def _run(step: Step, seconds: float) -> tuple[int | None, str]:
    """Return the exit status, None where the time was up, and the output, which is shown as it comes."""
    command = ["timeout", "--kill-after=10", str(max(1, int(seconds))), *step.command]
    environment = {**os.environ, **step.environment}
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    status = process.returncode
    return None if status in (124, 137) else status, "".join(lines)


def _sanitizer() -> str | None:
    found = shutil.which("compute-sanitizer")
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin", Path("/usr/local/cuda/compute-sanitizer")]
    return found or next((str(place / "compute-sanitizer") for place in places if place.is_dir()), None)


def print_dry_run(stage: str, steps: Sequence[Step]) -> None:
    """Print what would run, in which limits, and what it needs that is not here."""
    for step in steps:
        settings = "".join(f"{name}={value} " for name, value in step.environment.items())
        print(f"{stage}: {step.name} (at most {step.seconds:g} s): {settings}{' '.join(step.command)}")
    tools = {"test": ["nvcc"], "sanitize": ["nvcc", "compute-sanitizer"], "bench": ["nvcc"], "build": ["nvcc"]}[stage]
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if stage in _NEEDS_GPU and not torch.cuda.is_available():
        missing.append("a CUDA device")
    print(f"missing here: {', '.join(missing) or 'nothing'}")
    if stage == "bench":
        from bench.gpu_cases import print_predictions

        print_predictions()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="What only a GPU can show, in stages.")
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--dry-run", action="store_true", help="print the commands and what is missing; run nothing")
    parser.add_argument("--fresh", action="store_true", help="forget what was done")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results", metavar="FOLDER")
    parsed = parser.parse_args(arguments)
    results = parsed.results.resolve() / f"{device_slug()}.json"
    steps = STAGES[parsed.stage](results)
    if parsed.dry_run:
        print_dry_run(parsed.stage, steps)
        return 0
    if parsed.stage in _NEEDS_GPU and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry-run shows what would run")
    return 0 if run_stage(parsed.stage, steps, results, parsed.fresh) else 1


if __name__ == "__main__":
    sys.exit(main())
