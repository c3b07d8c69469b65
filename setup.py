"""Builds fastema._C. The metadata is in pyproject.toml; here is only what depends on the machine.

The install never fails for want of a compiler, of CUDA or of ninja: it builds less, and records why in
`fastema/_build_record.json`, which `fastema info` shows. Environment:

    FASTEMA_CUDA=0|1       leave the GPU kernels out, or fail if they cannot be built (default: when torch is a CUDA or
                           ROCm build and a toolkit is found; a GPU need not be present)
    TORCH_CUDA_ARCH_LIST   as for every torch extension, e.g. "8.0;9.0+PTX" or "Hopper"; default: what torch was built
                           for, the GPU at hand, and PTX of the newest. PYTORCH_ROCM_ARCH on ROCm
    MAX_JOBS               how many architectures nvcc compiles at once (default: the number of cores)
    FASTEMA_SANITIZE       for `make sanitize`: a value of the compiler's -fsanitize, e.g. "address,undefined"
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a build backend does not put it there
from setup_gpu import NoGpuCode, compile_gpu_code  # noqa: E402

CPP_FLAGS = [
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-unswitch-loops",  # gcc 12 leaves some of the copies scalar: float16 <- float32 took four times as long
    "-Wno-ignored-optimization-argument",  # for clang, of the flag above; gcc is silent on what it does not know
    "-g0",
]


def check_setuptools() -> None:
    """Raise, with what to install, where this setuptools is too old: its own error says nothing of it."""
    version = tuple(int(part) for part in re.findall(r"\d+", setuptools.__version__)[:2])
    if version < (77, 0):
        raise SystemExit(
            f"fastema: setuptools {setuptools.__version__} cannot read pyproject.toml as it is: "
            "pip install 'setuptools>=77', then install fastema again"
        )


def find_torch() -> None:
    """Let an isolated build (`pip install .`) see the torch of the environment that it installs into.

    pip hides that environment's packages from the build, and a torch of the build's own would be another one.
    """
    if importlib.util.find_spec("torch") is None:
        sys.path += dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))


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
        warn(f"torch could not be imported while building ({error}); install torch first, then fastema again")
        return {}

    kinds = os.environ.get("FASTEMA_SANITIZE")
    # -O1: optimised fully, pybind11's templates take minutes to compile with the checks in them.
    sanitize = ["-g1", "-O1", "-fno-omit-frame-pointer", f"-fsanitize={kinds}"] if kinds else []
    openmp = [] if kinds == "thread" or sys.platform == "darwin" else ["-fopenmp"]
    sources = ["bindings.cpp", "cpu_kernels.cpp", "plan.cpp", "sharing.cpp", "storage_exchange.cpp", "watch.cpp"]
    extension = CppExtension(
        "fastema._C",
        [f"csrc/{name}" for name in sources],
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()],
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
                gpu = compile_gpu_code(Path(self.build_temp).resolve())
                extension.define_macros.append(("FASTEMA_WITH_CUDA", None))
                extension.extra_objects += gpu.objects
                extension.library_dirs += gpu.library_dirs
                extension.libraries += gpu.libraries
                if torch_version() < (2, 11):  # its streams do not tell their handle without torch's CUDA headers
                    extension.define_macros.append(("FASTEMA_STREAM_FROM_C10_CUDA", None))
                    extension.include_dirs += gpu.include_dirs
                    extension.libraries.append("c10_cuda")
            except NoGpuCode as reason:
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


check_setuptools()
find_torch()
# fastema.triton_kernels lies outside fastema/ (package-dir in pyproject.toml), where find_packages does not look.
packages = [*setuptools.find_packages(include=["fastema", "fastema.*"]), "fastema.triton_kernels"]
setuptools.setup(packages=packages, **build_arguments())
