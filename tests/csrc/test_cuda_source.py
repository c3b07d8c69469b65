"""The CUDA kernels without a GPU: compiled, disassembled, and held to what saturates the memory of a chip.

One architecture in the ordinary tests; all of them with FASTEMA_ALL_ARCHITECTURES=1.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from sass import Kernel, Loop, kernels

SOURCE = Path(__file__).parents[2] / "csrc/cuda_kernels.cu"
# As in setup.py; with the lines of the source in the binary, which leave the code as it is.
FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-lineinfo", "-Xptxas", "-v", "-I", str(SOURCE.parent)]
ARCHITECTURES = ("sm_90", "sm_75", "sm_80", "sm_100", "sm_120")
DTYPES = ("float", "double", "BFloat16", "Float16")
BYTES = {"float": 4, "double": 8, "BFloat16": 2, "Float16": 2, "Planes": 2}  # of each plane
PAIRS = [*((shadow, live) for shadow in DTYPES for live in DTYPES), ("Planes", "BFloat16")]
KERNELS = 4  # update with and without skip_nonfinite, exchange, clock
THREADS_IN_FLIGHT_BYTES = 128

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH: the CUDA source is not compiled")


def architectures() -> list[str]:
    """Those of ARCHITECTURES that are asked for and that this nvcc knows."""
    if shutil.which("nvcc") is None:
        return []
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    wanted = ARCHITECTURES if os.environ.get("FASTEMA_ALL_ARCHITECTURES") == "1" else ARCHITECTURES[:1]
    return [name for name in wanted if name in known]


def disassembler() -> str:
    """nvdisasm from the CUDA toolkit, or from Triton's wheel."""
    found = shutil.which("nvdisasm")
    if found is None:
        triton = importlib.util.find_spec("triton")
        candidate = Path(triton.origin or "").parent / "backends/nvidia/bin/nvdisasm" if triton else Path()
        found = str(candidate) if candidate.is_file() else None
    if found is None:
        pytest.skip("no nvdisasm, neither from a CUDA toolkit nor from Triton")
    return found


class Compiled:
    """The machine code of one architecture and what the compiler reports."""

    def __init__(self, source: Path, architecture: str, folder: Path) -> None:
        cubin = folder / f"{source.stem}.{architecture}.cubin"
        command = ["nvcc", *FLAGS, f"-arch={architecture}", "-cubin", "-o", str(cubin), str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        listing = subprocess.run(
            [disassembler(), "-gi", "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
        self.architecture = architecture
        self.report = result.stdout + result.stderr
        self.lines = source.read_text().splitlines()
        rare = (number for number, line in enumerate(self.lines, 1) if "rule.template settle<" in line)
        self.kernels = list(kernels(listing, rare))

    def kernel(self, name: str) -> Kernel:
        (found,) = [kernel for kernel in self.kernels if name in kernel.name]
        return found

    def update_loops(self, skip_nonfinite: bool) -> dict[tuple[str, ...], dict[str, Loop]]:
        """Dtype pair -> its loop over vectors and its loop over scalars."""
        found: dict[tuple[str, ...], dict[tuple[str, ...], Loop]] = {}
        pair: tuple[str, ...] | None = None
        for loop in self.kernel(f"update_kernelILb{int(skip_nonfinite)}E").loops:
            kind = self.mostly(loop, r"run_tiles<(kCount|1), \w+, \w+>\(rows")
            if kind == ("1",):
                pair = self.mostly(loop, r"average<kSkipNonfinite, (\w+), (\w+)>\(rows")
            if pair and kind:
                # A loop over vectors comes behind that over scalars: its lines may name the calls of another pair.
                assert kind not in found.setdefault(pair, {})
                found[pair][kind] = loop
        return {pair: {"vectors": loops["kCount",], "scalars": loops["1",]} for pair, loops in found.items()}

    def mostly(self, loop: Loop, pattern: str) -> tuple[str, ...] | None:
        """Return what a pattern finds in the lines of nearly all instructions of a loop that have it at all.

        ptxas may share the end of a loop, and what a chunk's row says, with the code of another dtype.
        """
        found: Counter[tuple[str, ...]] = Counter()
        for instruction in loop.instructions:
            lines = (self.lines[line - 1] for line in instruction.lines)
            found.update({match.groups() for line in lines for match in re.finditer(pattern, line)})
        most, count = (found.most_common(1) or [(None, 0)])[0]
        return most if count >= 0.9 * found.total() else None


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    """Filled by `binary` below, so that each architecture is compiled once."""
    return {"": tmp_path_factory.mktemp("cubins")}  # type: ignore[dict-item]


@pytest.fixture(params=architectures())
def binary(request: pytest.FixtureRequest, compiled: dict[str, Compiled]) -> Compiled:
    if request.param not in compiled:
        compiled[request.param] = Compiled(SOURCE, request.param, compiled[""])  # type: ignore[arg-type]
    return compiled[request.param]


def complaints(loop: Loop, shadow: str, live: str) -> list[str]:
    """What keeps a loop over vectors from saturating the memory."""
    wide = max(BYTES[shadow], BYTES[live])
    widths = {16 * BYTES[dtype] // wide for dtype in (shadow, live)}  # bytes of an access
    # Beside the tile, a loop loads the address of the next shadow, or of its two planes, and a weight in device memory.
    loads, first = loop.widths(is_load=True), loop.loads_before_first_use
    beside = Counter([8, 16 if shadow == "Planes" else 8])
    tile = Counter({width: loads[width] - beside[width] for width in widths})
    found = []
    if loads != tile + beside:
        found.append(f"loads {dict(loads)} where {sorted(widths)} bytes are due")
    if first != loads:
        found.append(f"only {dict(first)} of {dict(loads)} are issued before the first use")
    if (in_flight := sum(width * count for width, count in tile.items())) < THREADS_IN_FLIGHT_BYTES:
        found.append(f"{in_flight} bytes in flight")
    if loop.spaces != {"global"}:
        found.append(f"accesses to {sorted(loop.spaces)} memory")
    width = 16 * BYTES[shadow] // wide
    if set(loop.widths(is_load=False)) != {width} or loop.store_stride != width:
        found.append(f"stores of {dict(loop.widths(is_load=False))} bytes, {loop.store_stride} apart")
    return found


def test_nothing_is_spilled(binary: Compiled) -> None:
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", binary.report)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", binary.report)]
    print(f"registers {registers}")
    assert len(frames) == len(registers) == len(binary.kernels) == KERNELS, binary.report
    assert not any(int(size) for frame in frames for size in frame), binary.report
    assert max(registers) <= 80, "more than 80 registers do not fit the launch bounds"


@pytest.mark.parametrize("skip_nonfinite", [False, True], ids=["plain", "skip_nonfinite"])
def test_every_dtype_pair_has_its_loads_in_flight_before_the_first_use(binary: Compiled, skip_nonfinite: bool) -> None:
    loops = binary.update_loops(skip_nonfinite)
    assert set(loops) == set(PAIRS)
    found = {pair: complaints(loops[pair]["vectors"], *pair) for pair in PAIRS}
    assert not any(found.values()), {pair: reasons for pair, reasons in found.items() if reasons}


@pytest.mark.parametrize("skip_nonfinite", [False, True], ids=["plain", "skip_nonfinite"])
def test_unaligned_chunks_have_their_loads_in_flight_before_the_first_use(
    binary: Compiled, skip_nonfinite: bool
) -> None:
    for (shadow, live), loops in binary.update_loops(skip_nonfinite).items():
        if live == "double" and BYTES[shadow] == 2:
            continue  # for sm_100 and sm_120 ptxas converts between the loads; pairs that are not found in training
        loop = loops["scalars"]
        first = loop.loads_before_first_use
        if BYTES[shadow] == BYTES[live]:
            assert first[BYTES[shadow]] >= 16, (shadow, live, first)
        else:
            assert first[BYTES[shadow]] >= 8 <= first[BYTES[live]], (shadow, live, first)
        assert loop.spaces == {"global"} and loop.store_stride == BYTES[shadow]


# Instructions of a loop an element, without and with skip_nonfinite, at most. Those of 16-bit averages are shares of
# what they were when arithmetic, not the memory, was their bound (bench/NOTES.md).
INSTRUCTIONS = {
    ("float", "float"): (8.2, 11.6),
    ("float", "BFloat16"): (8.6, 11.6),
    ("BFloat16", "BFloat16"): (0.65 * 16.84, 0.65 * 23.56),
    ("BFloat16", "float"): (0.65 * 16.72, 0.65 * 21.72),
    ("Planes", "BFloat16"): (0.75 * 23.33, 0.75 * 29.67),
}


@pytest.mark.parametrize("skip_nonfinite", [False, True], ids=["plain", "skip_nonfinite"])
def test_arithmetic_leaves_the_memory_the_bound(binary: Compiled, skip_nonfinite: bool) -> None:
    if binary.architecture == "sm_75":
        pytest.skip("no conversion to bfloat16 in the chip")
    loops = binary.update_loops(skip_nonfinite)
    found = {}
    for (shadow, live), limits in INSTRUCTIONS.items():
        loop = loops[shadow, live]["vectors"]
        stored = sum(width * count for width, count in loop.widths(is_load=False).items())
        elements = stored / (2 * BYTES[shadow] if shadow == "Planes" else BYTES[shadow])
        found[shadow, live] = round(len(loop.instructions) / elements, 2), round(limits[skip_nonfinite], 2)
    slack = 1.01 if binary.architecture == "sm_100" else 1.0  # the limits are of sm_90
    assert all(count <= slack * limit for count, limit in found.values()), found


def test_an_exchange_loads_four_pairs_before_the_first_store(binary: Compiled) -> None:
    vectors, scalars = sorted(binary.kernel("exchange_kernel").loops, key=lambda loop: -max(loop.widths(True)))
    for loop, width in ((vectors, 16), (scalars, 1)):
        assert loop.loads_before_first_use == loop.widths(True) == loop.widths(False) == {width: 8}
        assert loop.spaces == {"global"} and loop.store_stride == width


def planted(folder: Path, *changes: tuple[str, str]) -> Loop:
    """The loop of float32 <- float32 with skip_nonfinite, of the source with a fault in it, for one architecture."""
    text = SOURCE.read_text()
    for right, wrong in changes:
        assert right in text
        text = text.replace(right, wrong)
    # The other pairs are left out, to compile in a second.
    text = re.sub(r" *case kPair<(?!float, float>).*\n.*\n", "", text)
    source = folder / "planted.cu"
    source.write_text(text)
    return Compiled(source, "sm_90", folder).update_loops(True)["float", "float"]["vectors"]


needs_sm_90 = pytest.mark.skipif("sm_90" not in architectures(), reason="this nvcc does not know sm_90")


@needs_sm_90
def test_what_is_sound_has_no_complaint(tmp_path: Path) -> None:
    assert complaints(planted(tmp_path), "float", "float") == []


@needs_sm_90
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ([("(tile, shadow + offset, left",
           "(tile, shadow + offset, is_finite(lives[0].values[0]) ? left : 0")],
         "before the first use"),
        ([("(at) + n * kThreads", "(at) + n / 2 * (2 * kThreads) + n % 2")], "stores of {16: 4} bytes, 32 apart"),
        ([("st.global.", "st.")], "accesses to ['generic', 'global'] memory"),
        ([("kShadowBytes == sizeof(Live) ? 4", "kShadowBytes == sizeof(Live) ? 2")], "64 bytes in flight"),
        ([("constexpr uint32_t kCount = 16 /", "constexpr uint32_t kCount = 8 /")], "where [16] bytes are due"),
    ],
    ids=["skip_nonfinite is hoisted", "a stride of 32 bytes", "generic stores", "two packs", "8-byte accesses"],
)  # fmt: skip
def test_a_planted_fault_is_found(tmp_path: Path, changes: list[tuple[str, str]], complaint: str) -> None:
    found = complaints(planted(tmp_path, *changes), "float", "float")
    assert any(complaint in reason for reason in found), found
