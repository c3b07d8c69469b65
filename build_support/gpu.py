"""Find a GPU toolkit and compile csrc/cuda_kernels.cu with it. Called by setup.py.

Not through torch's CUDAExtension: that ties the toolkit's version to torch's, and knows one folder layout.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "csrc/cuda_kernels.cu"
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
HIPCC_FLAGS = ["-x", "hip", f"-I{SOURCE.parent}/hip", "-std=c++17", "-O3", "-ffp-contract=off", "-fPIC"]
HIPCC_FLAGS += ["-fvisibility=hidden"]
# Where no CUDA build of torch says more. Machine code runs on later chips of its major too; 75: T4s are what people
# are lent.
ARCHITECTURES = ("75", "80", "90", "100", "120")

# By path: the package itself needs torch.
building = SimpleNamespace(**runpy.run_path(str(ROOT / "fastema/backends/building.py")))


class NoGpuCode(Exception):
    """Why the GPU kernels are left out."""


class Toolkit(NamedTuple):
    """The places of a CUDA toolkit's parts, on which no two packagers agree."""

    nvcc: Path
    include: Path  # the folder of cuda_runtime.h
    runtime: Path  # libcudart_static.a, or the libcudart.so.N that torch has loaded


def build_gpu_kernels(target: Path, work: Path) -> None:
    """Compile the kernels for the kind of GPU that torch was built for, and link them; `work` takes the objects.

    Raises:
        NoGpuCode: it cannot be done here, or FASTEMA_CUDA=0.
    """
    link_gpu_kernels(target, compile_gpu_code(work), work)


def link_gpu_kernels(target: Path, parts: Sequence[str], work: Path) -> None:
    """Link what `compile_gpu_code` returned."""
    table = building.compile_all([ROOT / "csrc/gpu_table.cpp"], ["-std=c++17"], work)
    building.link(target, table, parts)


def compile_gpu_code(work: Path) -> list[str]:
    """Compile the kernels, and return what to link: the object, and the libraries that it needs.

    Raises:
        NoGpuCode: it cannot be done here, or FASTEMA_CUDA=0.
    """
    import torch

    wanted = os.environ.get("FASTEMA_CUDA", "")
    if wanted == "0":
        raise NoGpuCode("FASTEMA_CUDA=0")
    if torch.version.hip is None and torch.version.cuda is None and wanted != "1":
        raise NoGpuCode("torch is a CPU build (FASTEMA_CUDA=1 builds them all the same)")
    work.mkdir(parents=True, exist_ok=True)
    try:
        return (_compile_cuda if torch.version.hip is None else _compile_hip)(work / "cuda_kernels.o")
    except building.BuildError as error:
        raise NoGpuCode(str(error)) from None


# ---- CUDA ----


def _compile_cuda(target: Path) -> list[str]:
    import torch

    major = int(torch.version.cuda.partition(".")[0]) if torch.version.cuda else None
    toolkit = find_toolkit(toolkit_homes(os.environ), major)
    visible = range(torch.cuda.device_count() if torch.version.cuda else 0)
    flags = gencode_flags(
        known=_numbers(_output([str(toolkit.nvcc), "--list-gpu-code"]).split()),
        built_for=_numbers(_torch_architectures()),
        at_hand=["{}{}".format(*torch.cuda.get_device_capability(index)) for index in visible],
    )
    # nvcc knows its own folder; wheels of CUDA 12 and conda have the headers elsewhere.
    own = toolkit.include in (toolkit.nvcc.parent.parent / "include", Path("/usr/include"))
    options = [*NVCC_FLAGS, *([] if own else ["-I", str(toolkit.include)]), *flags]
    options += ["--threads", os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)]
    building.run([str(toolkit.nvcc), "-c", str(SOURCE), "-o", str(target), *options])
    return [str(target), str(toolkit.runtime), "-ldl", "-lrt", "-lpthread"]


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
    yield from sorted(local.glob("cuda-*"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])[::-1]
    yield root / "opt/cuda"
    yield root / "usr/lib/nvidia-cuda-toolkit"


def find_toolkit(homes: Iterable[Path], torch_major: int | None) -> Toolkit:
    """Return the first complete toolkit.

    Raises:
        NoGpuCode: there is none; says what each folder with an nvcc lacks.
    """
    # The static one shares streams and contexts with torch's own, whatever the version of either.
    runtimes = ["libcudart_static.a", *([f"libcudart.so.{torch_major}"] if torch_major else [])]
    incomplete = []
    for home in dict.fromkeys(homes):
        nvcc = home / "bin/nvcc"
        if not nvcc.is_file():
            continue
        header = next((file for file in _parts(home, "include", "cuda_runtime.h") if file.is_file()), None)
        files = (file for name in runtimes for file in _parts(home, "lib", name) if file.is_file())
        runtime = next(files, None)
        if header is not None and runtime is not None:
            return Toolkit(nvcc, header.parent, runtime)
        incomplete.append(f"{nvcc} has no {'cuda_runtime.h' if header is None else runtimes[0]} beside it")
    raise NoGpuCode("; ".join(["no CUDA toolkit found", *incomplete, "set CUDA_HOME to one"]))


def _parts(home: Path, kind: str, name: str) -> Iterator[Path]:
    """Yield where a file of the `kind` "lib" or "include" may be, of the toolkit whose nvcc is in home/bin."""
    folders = [home / f"{kind}64", home / kind]
    folders += sorted((home / "targets").glob(f"*/{kind}"))  # conda
    folders += [home.parent / "cuda_runtime" / kind]  # pip, CUDA 12
    folders += sorted((home / kind).glob("*-linux-gnu"))
    if home.name == "nvidia-cuda-toolkit":  # Debian: /usr/lib/nvidia-cuda-toolkit, its parts all over /usr
        folders += [*sorted(home.parent.glob("*-linux-gnu")), home.parent.parent / kind]
    return (folder / name for folder in folders)


def gencode_flags(known: Sequence[str], built_for: Sequence[str] = (), at_hand: Sequence[str] = ()) -> list[str]:
    """Return nvcc's -gencode flags: for what TORCH_CUDA_ARCH_LIST has, as torch reads it, or else for the arguments.

    Architectures are digits and at most a letter: "75", "90a".

    Args:
        known: to this nvcc.
        built_for: what torch was built for; empty: the default.
        at_hand: of this machine's GPUs.

    Raises:
        NoGpuCode: a name that torch does not know, or an architecture that this nvcc does not compile for.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if listed not in ("", "native"):
        from torch.utils.cpp_extension import _get_cuda_arch_flags

        try:
            flags = _get_cuda_arch_flags()
        except ValueError as error:
            raise NoGpuCode(f"TORCH_CUDA_ARCH_LIST={listed!r}: {error}") from None
        unknown = [name for name in re.findall(r"code=(sm_\w+)", " ".join(flags)) if name[3:].rstrip("a") not in known]
        if unknown:
            raise NoGpuCode(f"this nvcc does not compile for {', '.join(unknown)} (TORCH_CUDA_ARCH_LIST={listed!r})")
        return flags
    candidates = at_hand if listed and at_hand else [*(built_for or ARCHITECTURES), *at_hand]
    # Features of one chip ("90a") do not run on others, and the kernels use none.
    numbers = sorted({int(name.rstrip("af")) for name in candidates} & {int(n) for n in known if n.isdigit()})
    if not numbers:
        raise NoGpuCode(f"this nvcc compiles for none of sm_{', sm_'.join(candidates)}")
    if listed and not at_hand:
        names = ", ".join(f"sm_{number}" for number in numbers)
        print(f"fastema: TORCH_CUDA_ARCH_LIST=native, and torch sees no GPU: compiled for {names}", file=sys.stderr)
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [*flags, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]  # PTX, for chips to come


def _torch_architectures() -> list[str]:
    """Return what torch was built for, e.g. ["sm_80", "sm_90"] or ["gfx942"]; a GPU need not be present."""
    import torch

    flags = getattr(torch._C, "_cuda_getArchFlags", None)  # get_arch_list() wants a GPU
    return (flags() or "").split() if flags is not None else []


def _numbers(names: Sequence[str]) -> list[str]:
    return [name[3:] for name in names if name.startswith("sm_")]


# ---- ROCm: compiled in the tests where hipcc is installed; not run on a GPU ----


def _compile_hip(target: Path) -> list[str]:
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        raise NoGpuCode("on ROCm the kernels need torch 2.11: streams of older ones need headers that hipify makes")
    home = find_rocm(os.environ)
    names = (os.environ.get("PYTORCH_ROCM_ARCH") or ";".join(_torch_architectures())).replace(" ", ";").split(";")
    architectures = [f"--offload-arch={name.split(':')[0]}" for name in dict.fromkeys(names) if name]
    command = [str(home / "bin/hipcc"), *HIPCC_FLAGS, *architectures, "-c", str(SOURCE), "-o", str(target)]
    building.run(command, {"HIP_PLATFORM": "amd"})  # beside an nvcc, hipcc takes that one
    return [str(target), f"-L{home / 'lib'}", "-lamdhip64"]


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


def _output(command: list[str]) -> str:
    """Return stdout and stderr; nothing where the program cannot be started."""
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError:
        return ""
    return result.stdout
