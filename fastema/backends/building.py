"""Compile csrc/: the kernels, which need no torch, and the extension, which is for one torch minor and one Python.

Of the standard library alone: setup.py runs it before torch is there.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KERNELS = ("cpu_kernels.cpp", "cpu_table.cpp", "sharing.cpp")
#: The first is most of the file, pybind11's templates, and is compiled for size; its copies of what others have count.
EXTENSION = ("bindings.cpp", "layout.cpp", "older_libraries.cpp", "plan.cpp", "storage_exchange.cpp", "watch.cpp")
CPP_FLAGS = [
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-unswitch-loops",  # gcc 12 leaves some of the copies scalar: float16 <- float32 took four times as long
    "-Wno-ignored-optimization-argument",  # for clang, of the flag above; gcc is silent on what it does not know
    "-DNDEBUG",  # else torch's headers check on every access what is for torch's own developers: 5 % of a swap
    "-ffunction-sections",  # of which `link` drops what nothing calls
    "-g0",
]
_SANITIZE = os.environ.get("FASTEMA_SANITIZE")
# -O1: optimised fully, pybind11's templates take minutes to compile with the checks in them.
_SANITIZERS = ["-g1", "-O1", "-fno-omit-frame-pointer", f"-fsanitize={_SANITIZE}"] if _SANITIZE else []
_JOBS = threading.BoundedSemaphore(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))


class BuildError(Exception):
    """Why something was not compiled."""


def extension_name(torch_version: str) -> str:
    """Return the module's file name, without the Python's suffix.

    >>> extension_name("2.13.0+cpu")
    '_torch_2_13'
    """
    return "_torch_" + "_".join(torch_version.split(".")[:2])


def compiler() -> list[str]:
    """Return the C++ compiler, with its first arguments."""
    return shlex.split(os.environ.get("CXX") or "c++")


def build_kernels(target: Path, sources: Path, work: Path, version: str) -> None:
    """Compile the CPU kernels, with all instruction sets.

    Args:
        target: the library to write.
        sources: the folder of csrc/.
        work: where the object files go.
        version: of fastema; an extension takes only kernels of its own.

    Raises:
        BuildError: no compiler, or it failed.
    """
    own_threads = ["-pthread"]  # where torch's are not used, under ThreadSanitizer
    objects = compile_all(
        [sources / name for name in KERNELS], ["-std=c++17", f'-DFASTEMA_VERSION="{version}"', *own_threads], work
    )
    link(target, objects, own_threads)


def build_extension(target: Path, sources: Path, work: Path, torch: Path, python_include: Path, version: str) -> None:
    """Compile what reads torch's structures, for one torch and one Python; arguments as for `build_kernels`.

    Args:
        torch: the package's folder, with include/ and lib/; or with empty libraries of the names in lib/.
        python_include: the folder of Python.h.

    Raises:
        BuildError: no compiler, or it failed.
    """
    flags = ["-std=c++20", "-Wno-invalid-offsetof", f'-DFASTEMA_VERSION="{version}"', f"-I{torch / 'include'}"]
    flags.append(f"-I{python_include}")
    if _SANITIZE == "thread":
        flags.append("-DFASTEMA_OWN_THREADS")
    objects = compile_all([sources / name for name in EXTENSION], flags, work)
    libraries = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    if sys.platform == "darwin":
        libraries += ["-undefined", "dynamic_lookup"]  # Python's own
    else:  # an empty library gives no symbol, and is named all the same
        libraries.insert(0, "-Wl,--no-as-needed")
    link(target, objects, libraries)


def link(target: Path, objects: Sequence[Path | str], arguments: Sequence[str]) -> None:
    """Link a library.

    Raises:
        BuildError: it failed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    stripped = [] if sys.platform == "darwin" or _SANITIZE else ["-s", "-Wl,--gc-sections"]
    run([*compiler(), "-shared", *stripped, "-o", str(target), *map(str, objects), *arguments, *_SANITIZERS])


def compile_all(sources: Sequence[Path], flags: Sequence[str], work: Path) -> list[Path]:
    """Compile the files side by side, and return their objects in `work`.

    Raises:
        BuildError: no compiler, or it failed.
    """
    work.mkdir(parents=True, exist_ok=True)
    objects = [work / f"{source.name}.o" for source in sources]
    commands = []
    for source, target in zip(sources, objects, strict=True):
        size = ["-Os"] if source.name == EXTENSION[0] else []
        commands.append([*compiler(), *CPP_FLAGS, *flags, *size, *_SANITIZERS, "-c", str(source), "-o", str(target)])
    with ThreadPoolExecutor(len(sources)) as pool:
        list(pool.map(run, commands))
    return objects


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a compiler, whose output goes to stderr; `environment`: beside the process's own.

    Raises:
        BuildError: with its first error.
    """
    print(" ".join(command), file=sys.stderr)
    merged = {**os.environ, **(environment or {})}
    pipe = subprocess.PIPE
    try:
        with _JOBS:
            result = subprocess.run(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, check=False, env=merged)
    except OSError:
        raise BuildError(f"no C++ compiler: {command[0]!r} is not on PATH") from None
    print(result.stdout, end="", file=sys.stderr)
    if result.returncode != 0:
        errors = [line.strip() for line in result.stdout.splitlines() if "error" in line.lower()]
        detail = f": {errors[0][:200]}" if errors else ""
        raise BuildError(f"{Path(command[0]).name} failed with status {result.returncode}{detail}")
