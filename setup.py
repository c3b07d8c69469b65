"""Builds fastema._C. The metadata is in pyproject.toml; here is only what depends on the machine.

The install never fails for want of a compiler, of CUDA or of ninja: it builds less, and records why in
`fastema/_build_record.json`, which `fastema info` shows. Environment:

    FASTEMA_CUDA=0|1       leave the CUDA kernels out, or fail if they cannot be built (default: when torch is a CUDA
                           build and a toolkit is found; a GPU need not be present)
    TORCH_CUDA_ARCH_LIST   as for every torch extension, e.g. "8.0;9.0+PTX"
    FASTEMA_SANITIZE       for `make sanitize`: a value of the compiler's -fsanitize, e.g. "address,undefined"
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
CPP_FLAGS = [
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-unswitch-loops",  # gcc 12 leaves some of the copies scalar: float16 <- float32 took four times as long
    "-g0",
]
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler", "-fPIC"]
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0")


class NoCuda(Exception):
    """Why the CUDA kernels are left out."""


def cuda_home() -> Path:
    """The CUDA toolkit: the folder with bin/nvcc and the static runtime."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), CUDA_HOME]
    candidates += [str(Path(nvcc).resolve().parent.parent)] if nvcc else []
    candidates += ["/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")), reverse=True)]
    for home in filter(None, candidates):
        if (Path(home) / "bin/nvcc").exists() and (Path(home) / "lib64/libcudart_static.a").exists():
            return Path(home)
    raise NoCuda("no CUDA toolkit found (nvcc with libcudart_static.a); set CUDA_HOME")


def architecture_flags(nvcc: Path) -> list[str]:
    """-gencode flags for TORCH_CUDA_ARCH_LIST, e.g. "8.0;9.0+PTX"; without it, for what this nvcc knows."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not wanted:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout.split()
        names = [name for name in DEFAULT_ARCHITECTURES if f"sm_{name.replace('.', '')}" in known]
        wanted = ";".join(names) + "+PTX"  # chips to come compile the newest
    flags = []
    for name in wanted.replace(" ", ";").split(";"):
        number = name.removesuffix("+PTX").replace(".", "")
        if number:
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def compile_cuda(build_folder: Path) -> tuple[Path, Path]:
    """Compiles csrc/cuda_kernels.cu, which knows nothing of torch, and returns the object and the toolkit's folder.

    Not through torch's CUDAExtension: that would tie the toolkit's version to torch's. The static runtime shares
    streams and contexts with torch's own, whatever its version.
    """
    import torch

    wanted = os.environ.get("FASTEMA_CUDA", "")
    if wanted == "0":
        raise NoCuda("FASTEMA_CUDA=0")
    if wanted != "1" and torch.version.cuda is None:
        raise NoCuda("torch is a CPU build (FASTEMA_CUDA=1 builds them all the same)")
    home = cuda_home()
    build_folder.mkdir(parents=True, exist_ok=True)
    target = build_folder / "cuda_kernels.o"
    source = ROOT / "csrc/cuda_kernels.cu"
    nvcc = home / "bin/nvcc"
    command = [str(nvcc), "-c", str(source), "-o", str(target), *NVCC_FLAGS, *architecture_flags(nvcc)]
    print(" ".join(command), file=sys.stderr)
    try:
        subprocess.run(command, check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        raise NoCuda(f"nvcc failed with status {error.returncode}") from error
    return target, home


def torch_version() -> tuple[int, int]:
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def build_arguments() -> dict:
    """The extension and its build command; nothing where torch is missing."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if os.environ.get("FASTEMA_CUDA") == "1":
            raise
        warn(f"torch could not be imported while building ({error}); install torch first, then --no-build-isolation")
        return {}

    kinds = os.environ.get("FASTEMA_SANITIZE")
    # -O1: optimised fully, pybind11's templates take minutes to compile with the checks in them.
    sanitize = ["-g1", "-O1", "-fno-omit-frame-pointer", f"-fsanitize={kinds}"] if kinds else []
    openmp = [] if kinds == "thread" or sys.platform == "darwin" else ["-fopenmp"]
    sources = ["bindings.cpp", "cpu_kernels.cpp", "plan.cpp", "sharing.cpp", "storage_exchange.cpp", "watch.cpp"]
    extension = CppExtension(
        "fastema._C",
        [f"csrc/{name}" for name in sources],
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").iterdir())],
        extra_compile_args=[*CPP_FLAGS, *openmp, *sanitize],
        extra_link_args=[*openmp, *sanitize],
    )

    class Build(BuildExtension):
        """torch's build, but a failure leaves a pure Python package and the reason instead of an error."""

        def run(self) -> None:
            self.record: dict[str, str | None] = {"extension": None, "cuda": None}
            super().run()
            folder = ROOT if self.inplace else Path(self.build_lib)
            path = folder / "fastema/_build_record.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.record, indent=1) + "\n")

        def build_extensions(self) -> None:
            forced = os.environ.get("FASTEMA_CUDA") == "1"
            try:
                target, home = compile_cuda(Path(self.build_temp).resolve())
                extension.define_macros.append(("FASTEMA_WITH_CUDA", None))
                extension.extra_objects.append(str(target))
                extension.library_dirs.append(str(home / "lib64"))
                extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
                if torch_version() < (2, 11):  # its streams do not tell their handle without torch's CUDA headers
                    extension.define_macros.append(("FASTEMA_STREAM_FROM_C10_CUDA", None))
                    extension.include_dirs.append(str(home / "include"))
                    extension.libraries.append("c10_cuda")
            except NoCuda as reason:
                if forced:
                    raise SystemExit(f"fastema: FASTEMA_CUDA=1, but {reason}") from None
                self.record["cuda"] = str(reason)
            try:
                super().build_extensions()
            except Exception as error:
                if forced:
                    raise
                compiler = os.environ.get("CXX", "c++")
                reason = f"the build failed: {type(error).__name__}: {str(error).splitlines()[0]}"
                found = shutil.which(compiler.split()[0]) is not None
                self.record["extension"] = reason if found else f"no C++ compiler: {compiler!r} is not on PATH"
                warn(f"fastema._C was not built ({self.record['extension']}); the torch backend takes its place")
                self.extensions = []  # nothing to copy or to list

    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


def warn(message: str) -> None:
    """To stderr, where `pip install -v` shows it; the record is for everyone else."""
    print(f"fastema: {message}", file=sys.stderr)


setup(**build_arguments())
