"""Find a GPU toolkit and compile csrc/cuda_kernels.cu with it. Called by setup.py.

Not through torch's CUDAExtension: that ties the toolkit's version to torch's, and knows one folder layout.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent
SOURCE = ROOT / "csrc/cuda_kernels.cu"
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
HIPCC_FLAGS = [
    "-x",
    "hip",
    f"-I{SOURCE.parent}/hip",
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fPIC",
    "-fvisibility=hidden",
]
# Without a CUDA build of torch to follow: what its wheels of CUDA 13 are built for.
DEFAULT_ARCHITECTURES = ("75", "80", "86", "90", "100", "120")
# As torch.utils.cpp_extension has them.
NAMED_ARCHITECTURES = {
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


def _building() -> ModuleType:
    """Return fastema.backends.building; by path, as its package needs torch."""
    spec = importlib.util.spec_from_file_location("building", ROOT / "fastema/backends/building.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


building = _building()


class NoGpuCode(Exception):
    """Why the GPU kernels are left out."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: where its parts are, which no two packagers agree on.

    Args:
        nvcc: the compiler.
        include: the folder of cuda_runtime.h.
        runtime: libcudart_static.a, or the libcudart.so.N that torch has loaded.
    """

    nvcc: Path
    include: Path
    runtime: Path


@dataclass(frozen=True)
class GpuCode:
    """What fastema/_cuda.so is linked from."""

    objects: list[str]
    libraries: list[str]
    library_dirs: list[str] = field(default_factory=list)


def build_gpu_kernels(target: Path, build_folder: Path) -> None:
    """Compile and link the kernels for the kind of GPU that torch was built for.

    Raises:
        NoGpuCode: it cannot be done here, or FASTEMA_CUDA=0.
    """
    gpu = compile_gpu_code(build_folder)
    table = building.compile_all([ROOT / "csrc/gpu_table.cpp"], ["-std=c++17"], build_folder)
    libraries = [f"-l{name}" for name in gpu.libraries]
    building.link(target, [*table, *gpu.objects], [*(f"-L{path}" for path in gpu.library_dirs), *libraries])


def compile_gpu_code(build_folder: Path) -> GpuCode:
    """Compile the kernels for the kind of GPU that torch was built for.

    Raises:
        NoGpuCode: it cannot be done here, or FASTEMA_CUDA=0.
    """
    import torch

    wanted = os.environ.get("FASTEMA_CUDA", "")
    if wanted == "0":
        raise NoGpuCode("FASTEMA_CUDA=0")
    build_folder.mkdir(parents=True, exist_ok=True)
    target = build_folder / "cuda_kernels.o"
    if torch.version.hip is not None:
        return _compile_hip(target)
    if wanted != "1" and torch.version.cuda is None:
        raise NoGpuCode("torch is a CPU build (FASTEMA_CUDA=1 builds them all the same)")
    return _compile_cuda(target)


# ---- CUDA ----


def _compile_cuda(target: Path) -> GpuCode:
    import torch

    toolkit = find_toolkit(toolkit_homes(os.environ), _major(torch.version.cuda))
    known = _output([str(toolkit.nvcc), "--list-gpu-code"]).split()
    flags = gencode_flags(
        os.environ.get("TORCH_CUDA_ARCH_LIST"),
        known=[name.removeprefix("sm_") for name in known],
        built_for=[name.removeprefix("sm_") for name in _torch_architectures() if name.startswith("sm_")],
        at_hand=[f"{major}{minor}" for major, minor in _capabilities()],
    )
    threads = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    # nvcc knows its own folder; wheels of CUDA 12 and conda have the headers elsewhere.
    own = toolkit.include in (toolkit.nvcc.parent.parent / "include", Path("/usr/include"))
    options = [*NVCC_FLAGS, *([] if own else ["-I", str(toolkit.include)]), "--threads", threads, *flags]
    _run([str(toolkit.nvcc), "-c", str(SOURCE), "-o", str(target), *options])
    return GpuCode([str(target), str(toolkit.runtime)], ["dl", "rt", "pthread"])


def toolkit_homes(environment: Mapping[str, str], root: Path = Path("/")) -> Iterator[Path]:
    """Yield the folders that may hold bin/nvcc, what the user named first; `root` is for tests."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(variable):
            yield Path(environment[variable])
    nvcc = shutil.which("nvcc", path=environment.get("PATH", ""))
    if nvcc:
        # Often a script that starts the real one. A dry run names the folder of that.
        here = re.search(r"_HERE_=(\S+)", _output([nvcc, "--dryrun", "-x", "cu", os.devnull]))
        yield Path(here.group(1)).parent if here else Path(nvcc).resolve().parent.parent
    if environment.get("CONDA_PREFIX"):
        yield Path(environment["CONDA_PREFIX"])
    yield Path(sys.prefix)
    for folder in map(Path, sys.path):  # pip's wheels: all of CUDA 13 in one folder, of CUDA 12 one folder a wheel
        yield from sorted((folder / "nvidia").glob("cu[0-9]*"), reverse=True)
        yield folder / "nvidia/cuda_nvcc"
    local = root / "usr/local"
    yield local / "cuda"
    yield from sorted(local.glob("cuda-*"), key=_version_in_name, reverse=True)
    yield root / "opt/cuda"
    yield root / "usr/lib/nvidia-cuda-toolkit"


def find_toolkit(homes: Iterable[Path], torch_major: int | None) -> Toolkit:
    """Return the first complete toolkit.

    Raises:
        NoGpuCode: there is none; says what each folder with an nvcc lacks.
    """
    incomplete = []
    for home in dict.fromkeys(homes):
        nvcc = home / "bin/nvcc"
        if not nvcc.is_file():
            continue
        include, runtime = _header_folder(home), _runtime(home, torch_major)
        if include is not None and runtime is not None:
            return Toolkit(nvcc, include, runtime)
        missing = "cuda_runtime.h" if include is None else "libcudart_static.a"
        incomplete.append(f"{nvcc} has no {missing} beside it")
    raise NoGpuCode("; ".join(["no CUDA toolkit found", *incomplete, "set CUDA_HOME to one"]))


def _parts(home: Path, name: str) -> Iterator[Path]:
    """Yield the folders `name` ("lib" or "include") of a toolkit whose nvcc is in home/bin."""
    yield from (home / f"{name}64", home / name)
    yield from sorted((home / "targets").glob(f"*/{name}"))  # conda
    yield home.parent / "cuda_runtime" / name  # pip, CUDA 12
    yield from sorted((home / name).glob("*-linux-gnu"))
    if home.name == "nvidia-cuda-toolkit":  # Debian: /usr/lib/nvidia-cuda-toolkit, its parts all over /usr
        yield from sorted(home.parent.glob("*-linux-gnu"))
        yield home.parent.parent / name


def _header_folder(home: Path) -> Path | None:
    return next((folder for folder in _parts(home, "include") if (folder / "cuda_runtime.h").is_file()), None)


def _runtime(home: Path, torch_major: int | None) -> Path | None:
    # The static one shares streams and contexts with torch's own, whatever the version of either.
    names = ["libcudart_static.a", *([f"libcudart.so.{torch_major}"] if torch_major else [])]
    files = (folder / name for name in names for folder in _parts(home, "lib"))
    return next((file for file in files if file.is_file()), None)


def gencode_flags(
    listed: str | None, known: Sequence[str], built_for: Sequence[str] = (), at_hand: Sequence[str] = ()
) -> list[str]:
    """Return nvcc's -gencode flags. Architectures are digits and at most a letter: "75", "90a".

    Args:
        listed: TORCH_CUDA_ARCH_LIST, e.g. "8.0;9.0+PTX", "Ampere;Hopper" or "native"; None or empty: the others count.
        known: to this nvcc.
        built_for: what torch was built for; empty: the default.
        at_hand: of this machine's GPUs.

    Raises:
        NoGpuCode: a name that nobody knows, or an architecture that this nvcc does not compile for.
    """
    if listed and listed != "native":
        wanted = list(_listed_architectures(listed))
        unknown = [name for name, _ in wanted if name not in known and name.rstrip("af") not in known]
        if unknown:
            names = ", ".join(f"sm_{name}" for name in unknown)
            raise NoGpuCode(f"this nvcc does not compile for {names} (TORCH_CUDA_ARCH_LIST={listed!r})")
    else:
        candidates = at_hand if listed and at_hand else [*(built_for or DEFAULT_ARCHITECTURES), *at_hand]
        # Features of one chip ("90a") do not run on others, and the kernels use none.
        numbers = sorted({int(name.rstrip("af")) for name in candidates} & {int(n) for n in known if n.isdigit()})
        if not numbers:
            raise NoGpuCode(f"this nvcc compiles for none of sm_{', sm_'.join(candidates)}")
        if listed and not at_hand:
            names = ", ".join(f"sm_{number}" for number in numbers)
            print(f"fastema: TORCH_CUDA_ARCH_LIST=native, and torch sees no GPU: compiled for {names}", file=sys.stderr)
        wanted = [(str(number), number == numbers[-1]) for number in numbers]  # chips to come compile the newest's PTX
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name, _ in wanted]
    flags += [f"-gencode=arch=compute_{name},code=compute_{name}" for name, has_ptx in wanted if has_ptx]
    return list(dict.fromkeys(flags))


def _listed_architectures(listed: str) -> Iterator[tuple[str, bool]]:
    """Yield the architectures of TORCH_CUDA_ARCH_LIST, each with whether its PTX is wanted."""
    for item in listed.replace(",", ";").replace(" ", ";").split(";"):
        name, has_ptx = item.removesuffix("+PTX"), item.endswith("+PTX")
        for number in NAMED_ARCHITECTURES.get(name, name).split(";"):
            found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", number)
            if found:
                yield found.group(1) + found.group(2), has_ptx or found.group(3) is not None
            elif item:
                names = ", ".join(NAMED_ARCHITECTURES)
                raise NoGpuCode(
                    f"TORCH_CUDA_ARCH_LIST has {item!r}, which is no architecture: write 9.0 or 9.0+PTX, or {names}"
                )


def _torch_architectures() -> list[str]:
    """Return what torch was built for, e.g. ["sm_80", "sm_90"] or ["gfx942"]; a GPU need not be present."""
    import torch

    flags = getattr(torch._C, "_cuda_getArchFlags", None)  # get_arch_list() of older versions wants a GPU
    return (flags() or "").split() if flags is not None else []


def _capabilities() -> list[tuple[int, int]]:
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


# ---- ROCm: compiled in the tests where hipcc is installed; not run on a GPU ----


def _compile_hip(target: Path) -> GpuCode:
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        raise NoGpuCode("on ROCm the kernels need torch 2.11: streams of older ones need headers that hipify makes")
    home = find_rocm(os.environ)
    names = (os.environ.get("PYTORCH_ROCM_ARCH") or ";".join(_torch_architectures())).replace(" ", ";").split(";")
    architectures = [f"--offload-arch={name.split(':')[0]}" for name in dict.fromkeys(names) if name]
    command = [str(home / "bin/hipcc"), *HIPCC_FLAGS, *architectures, "-c", str(SOURCE), "-o", str(target)]
    _run(command, {"HIP_PLATFORM": "amd"})  # beside an nvcc, hipcc takes that one
    return GpuCode([str(target)], ["amdhip64"], [str(home / "lib")])


def find_rocm(environment: Mapping[str, str]) -> Path:
    """Return the folder with bin/hipcc.

    Raises:
        NoGpuCode: there is none.
    """
    hipcc = shutil.which("hipcc", path=environment.get("PATH", ""))
    homes = [environment.get("ROCM_HOME"), environment.get("ROCM_PATH"), "/opt/rocm"]
    homes += [str(Path(hipcc).parent.parent)] if hipcc else []
    for home in filter(None, homes):
        if (Path(home) / "bin/hipcc").is_file():
            return Path(home)
    raise NoGpuCode("torch is a ROCm build, and there is no hipcc; set ROCM_HOME")


# ---- both ----


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> None:
    try:
        building.run(command, environment)
    except building.BuildError as error:
        raise NoGpuCode(str(error)) from None


def _output(command: list[str]) -> str:
    """Return stdout and stderr; nothing where the program cannot be started."""
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError:
        return ""
    return result.stdout


def _major(version: str | None) -> int | None:
    return int(version.split(".")[0]) if version else None


def _version_in_name(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]
