"""The extension is chosen by torch's minor, checked before it is loaded, and tried after."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastema
from fastema.backends import building, loading, native

pytestmark = pytest.mark.skipif(native.why_unusable("cpu") is not None, reason="fastema._C is not built")
NAMES = ("object", "storage", "version", "dimensions", "offset", "count", "dtype", "data", "bytes")


def moved(extension: bytes, field: str, value: int) -> bytes:
    """Return the extension, but with one field of torch's structures elsewhere."""
    start = extension.index(loading._MARK) + len(loading._MARK) + 8 * NAMES.index(field)
    return extension[:start] + struct.pack("=q", value) + extension[start + 8 :]


def test_the_layout_of_this_torch_is_accepted() -> None:
    assert loading.layout_fault(loading.extension_file().read_bytes()) is None


@pytest.mark.parametrize("field", [name for name in NAMES if name != "version"])
@pytest.mark.parametrize("value", [0, 8, 32, 96, 168, -8, 1 << 40])
def test_another_layout_is_refused(field: str, value: int) -> None:
    right = loading.extension_file().read_bytes()
    if moved(right, field, value) != right:
        assert loading.layout_fault(moved(right, field, value)) is not None


@pytest.mark.parametrize("content", [b"", b"not an extension", loading._MARK, loading._MARK + b"short"])
def test_a_file_without_a_layout_is_refused(content: bytes) -> None:
    assert loading.layout_fault(content) == "it does not say which one"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A copy of the package, as a wheel installs it."""
    folder = tmp_path / "fastema"
    shutil.copytree(Path(fastema.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    root = Path(__file__).parents[2]
    for name in ("csrc", "triton_kernels"):
        if not (folder / name).is_dir() and (root / name).is_dir():
            shutil.copytree(root / name, folder / name)
    return folder


def info(installed: Path, command: str = "info", **environment: str) -> str:
    run = [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path[0] = {str(installed.parent)!r}; "
           f"import fastema; assert fastema.__file__.startswith({str(installed)!r}); "
           f"from fastema.cli import main; sys.exit(main([{command!r}]))"]  # fmt: skip
    result = subprocess.run(
        run,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(installed.parent), **environment},
    )
    return result.stdout + result.stderr


def test_a_wrong_extension_leaves_the_torch_backend_and_a_reason(installed: Path) -> None:
    name = loading.extension_file().name
    file = installed / name
    assert "native (cpu)   usable: C++ kernels" in info(installed)
    assert name in info(installed)
    right = file.read_bytes()
    file.write_bytes(moved(right, "dtype", 8))
    assert f"{name} is for a torch with another layout: the dtype of a tensor" in info(installed)
    file.rename(installed / name.replace(building.extension_name(torch.__version__), "_torch_2_9"))
    assert f"there is no {name}, but _torch_2_9." in info(installed)
    (installed / "_kernels.so").unlink()
    for left in installed.glob("_torch_*"):
        left.unlink()
    text = info(installed)
    assert f"there is no {name}, but no other" in text and "`python -m fastema build`" in text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_build_compiles_what_is_missing(installed: Path) -> None:
    for file in installed.glob("*.so"):
        file.unlink()
    assert "error: " in info(installed, "build", CXX="no-such-compiler")
    text = info(installed, "build")
    assert f"built {installed / loading.extension_file().name}" in text
    assert "native (cpu)   usable: C++ kernels" in text
