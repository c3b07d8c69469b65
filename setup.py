"""Builds csrc/ into three libraries in fastema/. The metadata is in pyproject.toml.

    _kernels.so            the CPU kernels: no torch, no Python
    _cuda.so               the GPU kernels: no torch, no Python
    _torch_X_Y.*.so        what reads the structures of torch X.Y, for one Python

The install never fails for want of a compiler or of CUDA: it builds less, and records why in
`fastema/_build_record.json`, which `fastema info` shows. Environment:

    FASTEMA_CUDA=0|1       leave the GPU kernels out, or fail if they cannot be built (default: when torch is a CUDA or
                           ROCm build and a toolkit is found; a GPU need not be present)
    TORCH_CUDA_ARCH_LIST   as for every torch extension, e.g. "8.0;9.0+PTX" or "Hopper"; default: what torch was built
                           for, the GPU at hand, and PTX of the newest. PYTORCH_ROCM_ARCH on ROCm
    CXX                    the C++ compiler (default: c++)
    FASTEMA_LIBRARIES      for `make wheel`: a folder of libraries that are packed, for whichever torch and Python
    MAX_JOBS               how many files, or architectures, are compiled at once (default: the number of cores)
    FASTEMA_SANITIZE       for `make sanitize`: a value of the compiler's -fsanitize, e.g. "address,undefined"
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import sysconfig
from pathlib import Path

import setuptools

from build_support.gpu import NoGpuCode, build_gpu_kernels, building

ROOT = Path(__file__).resolve().parent


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


def build_arguments() -> dict:
    """The libraries and their build command; nothing where torch is missing."""
    try:
        import torch
        from setuptools.command.bdist_wheel import bdist_wheel
        from setuptools.command.build_ext import build_ext
    except ImportError as error:
        if os.environ.get("FASTEMA_CUDA") == "1":
            raise
        warn(f"torch could not be imported while building ({error}); install torch first, then fastema again")
        return {}
    names = ["_kernels", building.extension_name(torch.__version__), "_cuda"]
    extensions = [setuptools.Extension(f"fastema.{name}", sources=[], optional=True) for name in names]

    class Build(build_ext):
        """A failure leaves a pure Python package and the reason instead of an error."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.parallel = len(names)  # `building` limits the compilers that run at once

        def run(self) -> None:
            self.record: dict[str, str | None] = {"extension": None, "cuda": None}
            clear(Path(self.build_lib))
            if self.inplace:
                clear(ROOT)
            super().run()
            path = (ROOT if self.inplace else Path(self.build_lib)) / "fastema/_build_record.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.record, indent=1) + "\n")

        def get_ext_filename(self, fullname: str) -> str:
            name = super().get_ext_filename(fullname)
            return name if "_torch_" in name else name.replace(sysconfig.get_config_var("EXT_SUFFIX"), ".so")

        def build_extension(self, extension: setuptools.Extension) -> None:
            target = Path(self.get_ext_fullpath(extension.name))
            work = Path(self.build_temp).resolve() / extension.name
            version, include = self.distribution.get_version(), Path(sysconfig.get_path("include"))
            kind = "cuda" if extension.name == "fastema._cuda" else "extension"
            try:
                if kind == "cuda":
                    build_gpu_kernels(target, work)
                elif extension.name == "fastema._kernels":
                    building.build_kernels(target, ROOT / "csrc", work, version)
                else:
                    folder = Path(torch.__file__).parent
                    building.build_extension(target, ROOT / "csrc", work, folder, include, version)
            except (NoGpuCode, building.BuildError) as reason:
                if os.environ.get("FASTEMA_CUDA") == "1":
                    raise SystemExit(f"fastema: FASTEMA_CUDA=1, but {reason}") from None
                self.record[kind] = str(reason)
                if kind == "extension":
                    warn(f"{target.name} was not built ({reason}); the torch backend takes its place")

    class Pack(build_ext):
        """Takes libraries that are built."""

        def run(self) -> None:
            clear(Path(self.build_lib))
            for library in Path(os.environ["FASTEMA_LIBRARIES"]).glob("*.so"):
                self.copy_file(str(library), str(Path(self.build_lib, "fastema", library.name)))

    class WheelForAll(bdist_wheel):
        """Names no Python."""

        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    if "FASTEMA_LIBRARIES" in os.environ:
        return {"ext_modules": extensions, "cmdclass": {"build_ext": Pack, "bdist_wheel": WheelForAll}}
    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build}}


def clear(folder: Path) -> None:
    """Delete what an earlier build left: what is not built now must not be found."""
    for stale in (*folder.glob("fastema/_*.so"), folder / "fastema/_build_record.json"):
        stale.unlink(missing_ok=True)


def warn(message: str) -> None:
    """To stderr, where `pip install -v` shows it; the record is for everyone else."""
    print(f"fastema: {message}", file=sys.stderr)


check_setuptools()
find_torch()
# The last two lie outside fastema/ (package-dir in pyproject.toml), where find_packages does not look.
packages = [*setuptools.find_packages(include=["fastema", "fastema.*"]), "fastema.triton_kernels", "fastema.csrc"]
setuptools.setup(packages=packages, **build_arguments())
