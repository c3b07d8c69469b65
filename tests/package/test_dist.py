"""`make dist` names what a wheel or an sdist lacks, and what it has too much."""

from __future__ import annotations

import io
import runpy
import tarfile
import zipfile
from pathlib import Path

import pytest

DIST = runpy.run_path(str(Path(__file__).with_name("dist.py")))
BUILT = [
    "fastema/_kernels.so",
    "fastema/_torch_2_13.cpython-311-x86_64-linux-gnu.so",
    "fastema/_build_record.json",
]


def test_a_wheel_is_held_to_the_package(tmp_path: Path) -> None:
    root = DIST["ROOT"]
    files = [str(path.relative_to(root)) for path in (root / "fastema").rglob("*.py")]
    files += [f"fastema/{path.relative_to(root)}" for path in (root / "triton_kernels").rglob("*.py")]
    files += [f"fastema/{path.relative_to(root)}" for path in (root / "csrc").rglob("*") if path.is_file()]
    path = tmp_path / "fastema.whl"

    def faults(*names: str) -> list[str]:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, "")
        return DIST["wheel_faults"](path)

    assert faults(*files, *BUILT, "fastema/py.typed", "fastema/_C.pyi", "fastema-1.dist-info/METADATA") == []
    assert faults(*files, *BUILT, "fastema/_C.pyi", "tests/x.py") == [
        "fastema.whl lacks fastema/py.typed",
        "fastema.whl has tests/x.py",
    ]
    assert "expected kernels" in faults(*files, "fastema/py.typed", "fastema/_C.pyi")[0]


def test_an_sdist_is_held_to_the_repository(tmp_path: Path) -> None:
    if not (DIST["ROOT"] / ".git").exists():
        pytest.skip("not a git checkout")
    path = tmp_path / "fastema.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("fastema-1/PKG-INFO", "fastema-1/setup.py", "fastema-1/secret.txt"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    faults = DIST["sdist_faults"](path)
    assert "fastema.tar.gz has secret.txt" in faults and "fastema.tar.gz lacks pyproject.toml" in faults
    assert "fastema.tar.gz lacks setup.py" not in faults
