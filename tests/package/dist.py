"""`make dist`: build dist/*.tar.gz, and from that the wheel; check that each holds what it should and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
# In the repository, but of no use in an sdist.
LEFT_OUT = {".ci/run", ".github/workflows/release.yml", ".clang-format", ".gitignore"}
# Made by setuptools.
MADE = {"PKG-INFO", "setup.cfg"}
# Compiled, or written by the build: see setup.py.
BUILT = re.compile(r"fastema/(_kernels\.so|_cuda\.so|_torch_\d+_\d+\.[\w.-]+\.so|_build_record\.json)")


def main() -> int:
    """Build both; return 1 if a file is missing or too many."""
    folder = ROOT / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    sdist, wheel = build(folder)
    faults = [*sdist_faults(sdist), *wheel_faults(wheel)]
    print("\n".join(faults) or f"{sdist.name} and {wheel.name} hold what they should")
    return bool(faults)


def build(folder: Path, **environment: str) -> tuple[Path, Path]:
    """Write an sdist, and the wheel that is built of it alone."""
    backend = "import sys; from build_support import backend; print(backend.build_sdist(sys.argv[1]))"
    command = [sys.executable, "-c", backend, str(folder)]
    run = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    sdist = folder / run.stdout.strip().splitlines()[-1]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
    pip += ["--no-build-isolation", "-w", str(folder), str(sdist)]
    subprocess.run(pip, check=True, env={**os.environ, **environment})
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def sdist_faults(path: Path) -> list[str]:
    """Compare with what git tracks."""
    with tarfile.open(path) as archive:
        inside = {member.name.partition("/")[2] for member in archive if member.isfile()}
    inside = {name for name in inside if not name.startswith("fastema.egg-info/")} - MADE
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return _differences(path, inside, set(tracked.stdout.split()) - LEFT_OUT)


def wheel_faults(path: Path) -> list[str]:
    """Compare with the Python files, the stubs and what the build makes."""
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name and name[-1] != "/"}
    built = {name for name in names if BUILT.fullmatch(name)}
    wanted = {str(file.relative_to(ROOT)) for file in (ROOT / "fastema").rglob("*.py")}
    wanted |= {f"fastema/{file.relative_to(ROOT)}" for file in (ROOT / "triton_kernels").rglob("*.py")}
    wanted |= {f"fastema/{file.relative_to(ROOT)}" for file in (ROOT / "csrc").rglob("*") if file.is_file()}
    faults = _differences(path, names - built, wanted | {"fastema/py.typed", "fastema/_C.pyi"})
    if "fastema/_kernels.so" not in built or not any("_torch_" in name for name in built):
        faults.append(f"{path.name}: expected kernels and an extension, found {sorted(built)}")
    return faults


def _differences(path: Path, inside: set[str], wanted: set[str]) -> list[str]:
    missing = [f"{path.name} lacks {name}" for name in sorted(wanted - inside)]
    return missing + [f"{path.name} has {name}" for name in sorted(inside - wanted)]


if __name__ == "__main__":
    sys.exit(main())
