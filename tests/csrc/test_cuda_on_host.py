"""The CUDA kernels' own source on the host, under AddressSanitizer and UBSan, against the CPU kernels bit for bit."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastema.core.counters import DeviceCounter
from fastema.core.decays import Decays

ROOT = Path(__file__).parents[2]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++17", "-O1", "-g1", *SANITIZED, "-fno-strict-aliasing", "-ffp-contract=off", "-Wno-unknown-pragmas"]
FOLDERS = ["-I", str(ROOT / "tests/csrc/cuda_on_host/include"), "-I", str(ROOT / "csrc")]
SHARED = ["csrc/cpu_kernels.cpp", "csrc/sharing.cpp", "tests/csrc/cuda_on_host/matrix.cpp"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to run the CUDA source on the host")


def run_compiler(*arguments: object) -> None:
    result = subprocess.run(["g++", *FLAGS, *FOLDERS, *map(str, arguments)], capture_output=True, text=True)
    if "cannot find" in result.stderr and "san" in result.stderr:
        pytest.skip("this g++ comes without the sanitizers' runtime")
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Everything but the kernels, compiled."""
    folder = tmp_path_factory.mktemp("objects")
    compiled = [folder / Path(name).with_suffix(".o").name for name in SHARED]
    for name, target in zip(SHARED, compiled, strict=True):
        run_compiler("-c", ROOT / name, "-o", target)
    return compiled


def built(kernels: Path, objects: list[Path], program: Path) -> Path:
    run_compiler("-x", "c++", kernels, "-x", "none", *objects, "-o", program)
    return program


@pytest.fixture(scope="module")
def program(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(ROOT / "csrc/cuda_kernels.cu", objects, tmp_path_factory.mktemp("host") / "matrix")


def test_matrix_is_bit_equal_to_the_cpu_kernels(program: Path) -> None:
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    cases, elements = (int(word) for word in result.stdout.split() if word.isdigit() and word != "0")
    assert cases > 300 and elements > 1_000_000, result.stdout


def test_a_planted_access_beyond_the_end_is_caught(objects: list[Path], tmp_path: Path) -> None:
    source = (ROOT / "csrc/cuda_kernels.cu").read_text()
    right = "begin = head + packs * kCount, end = elements;"
    assert source.count(right) == 1
    planted = tmp_path / "planted.cu"
    planted.write_text(source.replace(right, right.replace("elements", "elements + 1")))
    result = subprocess.run([built(planted, objects, tmp_path / "planted")], capture_output=True, text=True)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize(
    "decays",
    [Decays(0.99, "exp", 40, 2, {}), Decays([0.9, 0.99, 0.9999], "linear", 12, 0, {})],
    ids=["one decay", "three decays"],
)
def test_the_clock_is_bit_equal_to_the_one_in_torch(program: Path, decays: Decays, update_every: int) -> None:
    counter = DeviceCounter(decays, update_every, True, torch.device("cpu"))
    found = ["1", "none", "0", "0", "inf", "nan", "0", *["none"] * 20, "-1", *["0"] * 5]
    expected = []
    for word in found:
        args = counter.begin(None, None if word == "none" else torch.tensor(float(word)), None)
        assert args is not None and args.skip is not None
        expected.append([int(counter.step), int(counter.num_updates), float(args.skip), *counter.weights.tolist()])
    rows, shadows = counter._table.shape
    numbers = [shadows, rows, update_every, *(weight.hex() for weight in counter._table.flatten().tolist()), *found]
    given = " ".join(map(str, numbers))
    result = subprocess.run([program, "clock"], input=given, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    found_numbers = [[*map(int, line[:2]), float(line[2]), *map(float.fromhex, line[3:])] for line in lines]
    assert found_numbers == expected
