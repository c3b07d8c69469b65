"""The calls, each a list of steps. A step that two calls have in common, and that passed, is not run again."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bench.gpu.results import PACKAGE, ROOT
from bench.gpu.runner import Step

GPU_TESTS = (
    *("backends/test_gpu", "backends/test_gpu_claims"),
    *("core/shadow/test_offload_gpu", "swa_utils/test_swa_utils_gpu", "core/decay/test_capturable"),
)
CORE_TESTS = (
    *("core/test_ema", "core/swap/test_exchange", "core/shadow/test_update", "core/decay/test_several_decays"),
    "swa_utils/test_swa_utils",
    "backends/test_backends",
)
_TESTED = (*PACKAGE, "tests")
# Memory that is freed and then read by an update: a sanitizer that does not report it sees nothing. What torch says of
# it afterwards, and with which status the process ends, is another matter.
_PLANTED = (
    "import torch; from fastema.backends import native; from fastema.backends.contract import Segment, UpdateArgs; "
    "a, b = torch.ones(2, 1 << 16, device='cuda').unbind(); a, b = a.clone(), b.clone(); "
    "plan = native.Plan([Segment([a], b, False)], []); b.untyped_storage().resize_(0); "
    "plan.update(UpdateArgs([0.5], False)); torch.cuda.synchronize()"
)
_IMPORTS_WITH_CUDA = "from fastema.backends import native; assert native._C.has_cuda(), native._build_record()"
_PIP = {"PIP_ROOT_USER_ACTION": "ignore", "PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _install(*what: str) -> list[str]:
    return _python("-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", *what)


def _pytest(name: str, arguments: Sequence[str], seconds: float, before: Sequence[str] = ()) -> Step:
    options = ["-q", "--tb=short", "-rfE", "--maxfail=15", "-p", "bench.gpu.outcomes", "-o", "faulthandler_timeout=60"]
    command = [*before, *_python("-m", "pytest", *options, "-m", "gpu", *arguments)]
    environment = {"NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", "lo")}
    return Step(name, command, seconds, _TESTED, environment, tests=True)


def _prepared(device: str) -> list[Step]:
    """Run what every call begins with: the machine, a build of this checkout for its GPU, and whether that can run."""
    # Installed, not built in place: only an install gives fastema.triton_kernels its place in the package.
    built = {"FASTEMA_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "native"}
    if device != "cuda":  # for one architecture where it can be compiled for any
        built = {"FASTEMA_CUDA": "1" if shutil.which("nvcc") else "0", "TORCH_CUDA_ARCH_LIST": "9.0+PTX"}
    usable = _python("-m", "bench.gpu.usable", "--device", "cuda:0" if device == "cuda" else "cpu")
    interpreted = {} if device == "cuda" else {"TRITON_INTERPRET": "1"}
    return [
        Step("machine", _python("-m", "bench.gpu.machine"), 60, again=True, shows=900),
        Step("build", _install("-e", "."), 240, PACKAGE, built | _PIP, again=True, stops=True),
        Step("usable", usable, 120, environment=interpreted, again=True, stops=True, shows=900),
    ]


def _tests(_: Path, device: str) -> list[Step]:
    return [_pytest(f"tests: {name}", [f"tests/{name}.py"], 240) for name in GPU_TESTS]


def _docs(_: Path, device: str) -> list[Step]:
    return [Step("docs", _python("-m", "bench.gpu.blocks"), 120, (*PACKAGE, "docs", "conftest.py"), shows=300)]


def _lab(_: Path, device: str) -> list[Step]:
    lab = _python("-m", "bench.gpu_lab", *([] if device == "cuda" else ["--build-only", "--only", "base"]))
    return [Step("lab", lab, 300, ("csrc", "bench/gpu_lab"), shows=5000)]


def _counters(_: Path, device: str) -> list[Step]:
    counters = _python("-m", "bench.gpu_lab", "--counters")
    return [Step("counters", counters, 200, ("csrc", "bench/gpu_lab"), optional=True, shows=2000)]


def _cases(folder: Path, device: str) -> list[Step]:
    small = [] if device == "cuda" else ["--scale", "1e-4", "--seconds", "0.05"]
    cases = _python("-m", "bench.gpu.cases", "--device", device, "--results", str(folder / "cases.json"), *small)
    return [Step("cases", cases, 240, shows=4000)]


def _overlap(_: Path, device: str) -> list[Step]:
    return [Step("overlap", _python("-m", "bench.gpu.overlap", "--device", device), 90, optional=True, shows=900)]


def _peers(folder: Path, device: str) -> list[Step]:
    # In a rehearsal the quickest of them, which has no update for the table.
    what = ["bench.all", "--seconds", "0.2"] if device == "cuda" else ["bench.memory", "--quick"]
    file = str(folder / "peers.json")
    peers = _python("-m", *what, "--device", device, "--json", file, "--go-on")
    table = _python("-m", "bench.gpu.peers", file)
    return [Step("peers", peers, 330, writes="peers.json"), Step("table of peers", table, 30, again=True, shows=4000)]


def _sanitizer() -> str:
    found = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin", "/usr/local/cuda/compute-sanitizer"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *found])
    return shutil.which("compute-sanitizer", path=path) or "compute-sanitizer"


def _sanitized(_: Path, device: str) -> list[Step]:
    """Run the kernels under compute-sanitizer, first of all on a fault that it must see."""
    # torch's caching allocator hands out pieces of large blocks, and beyond a piece is no error.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def tool(kind: str) -> list[str]:
        return [_sanitizer(), "--tool", kind, "--error-exitcode", "9"]

    planted = Step(
        *("planted fault", [*tool("memcheck"), *_python("-c", _PLANTED)], 110, PACKAGE, uncached),
        sees="Invalid __global__ read",
        any_status=True,
    )
    steps = [planted]
    for name, kind, chosen, optional in (
        ("memcheck native", "memcheck", "matrix and native", False),
        ("memcheck exchange", "memcheck", "exchange_in_place", False),
        ("memcheck triton", "memcheck", "matrix and triton and skipping", False),
        ("initcheck native", "initcheck", "matrix and native and skipping", True),  # it may report torch's own kernels
    ):
        run = _pytest(name, ["tests/backends/test_gpu.py", "-k", chosen], 150, tool(kind))
        clean = "ERROR SUMMARY: 0 errors"
        steps.append(Step(name, run.command, run.seconds, _TESTED, uncached, optional=optional, tests=True, sees=clean))
    return steps


def _wheel(_: Path, device: str) -> list[Step]:
    """Build a wheel against this CUDA torch, import it, run the core tests on the CPU, list what is in the binary."""
    # The installed package, not the sources beside the tests: hence no "." on the path.
    tests = ["-c", "import sys, pytest; sys.path.pop(0); sys.exit(pytest.main(sys.argv[1:]))"]
    tests += ["-q", "-o", "pythonpath=tests", *(f"tests/{name}.py" for name in CORE_TESTS)]
    binary = str(ROOT / "bench/gpu/binary.py")
    return [
        Step("install", _install("--force-reinstall", "."), 480, PACKAGE, {"FASTEMA_CUDA": "1"} | _PIP, stops=True),
        Step("import", _python("-P", "-c", _IMPORTS_WITH_CUDA), 60, again=True),
        Step("architectures", _python("-P", binary), 60, again=True, shows=300),
        Step("core tests", _python(*tests), 420, _TESTED, sees=r"\d+ passed"),
    ]


Part = Callable[[Path, str], list[Step]]
#: A call -> what it does after `_prepared`; docs/devices.md says what to decide between them.
CALLS: dict[str, Sequence[Part]] = {
    "first": (_tests, _docs, _lab),
    "second": (_cases, _overlap, _counters, _sanitized),
    "third": (_tests, _cases, _peers),
    "test": (_tests, _docs),
    "sanitize": (_sanitized,),
    "bench": (_cases, _peers),
    "all": (_tests, _docs, _lab, _cases, _overlap, _counters, _sanitized, _peers),
    "build": (_wheel,),
}
NEEDS_GPU = tuple(name for name in CALLS if name != "build")


def steps_of(call: str, folder: Path, device: str = "cuda") -> list[Step]:
    """Return the steps of a call; `device`: "cpu" for a rehearsal, in which what measures runs small, on the CPU."""
    prepared = _prepared(device) if call in NEEDS_GPU else []
    found = [*prepared, *(step for part in CALLS[call] for step in part(folder, device))]
    # A rehearsal is about what the steps say, and a machine that runs it may be slow.
    return found if device == "cuda" else [replace(step, seconds=4 * step.seconds) for step in found]
