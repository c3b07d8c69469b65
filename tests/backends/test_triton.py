"""The Triton kernels without a GPU: interpreted, bit for bit against the other backends, and compiled for two chips."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cases import values
from cases.plans import plan_of
from fastema import backends
from fastema.backends import native
from fastema.backends import triton as backend
from fastema.backends.contract import Segment

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

TESTS = Path(__file__).parents[1]
AVERAGE = {
    "f32": 0,
    "f32<-bf16": 2,
    "f32<-f16": 3,
    "f64": 5,
    "bf16": 10,
    "f16": 15,
    "planes<-bf16": 18,
}  # kinds, as in csrc/chunks.h
CONVERT_F32_BF16, COPY_BYTES = 34, 64


# ---- interpreted ----


def run(code: list[str], timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python program in this tree: whether Triton interprets is settled when it is imported."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "ignore", *code],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0", **environment},
    )


@pytest.fixture(scope="module")
def interpreted() -> dict[str, tuple[int, str]]:
    """Group -> how many cases ran, and what failed first."""
    result = run([str(TESTS / "backends/triton_cases.py")], TRITON_INTERPRET="1")
    if result.returncode == 77:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    return {name: (int(count), failure) for name, count, failure in lines}


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    ("group", "cases"),
    [
        ("small_updates", 32),
        ("large_updates", 10),
        ("updates_of_planes", 4),
        ("copies", 23),
        ("every_half", 2),
        ("mixed", 1),
        ("scalars", 11),
        ("counted_once", 3),
        ("exchanges", 6),
        ("refusals", 11),
        ("end_to_end", 5),
    ],
)
def test_interpreted(interpreted: dict[str, tuple[int, str]], group: str, cases: int) -> None:
    """Each group is a generator of cases in triton_cases.py."""
    assert interpreted[group] == (cases, "")


# ---- compiled ----


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", folder)
        module = importlib.import_module("fastema.triton_kernels.kernels")
        if module.INTERPRETED:
            pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
        yield module


def compiled(
    function: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    capability: int = 90,
    target: Any = None,
    **options: Any,
) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    for name in signature:
        signature[name] = "constexpr" if name in constants else signature[name]
    source = ASTSource(function, signature, constants, {(0,): [["tt.divisibility", 16]]})
    target = target or GPUTarget("cuda", capability, 32)
    return compile_kernel(source, target=target, options={**backend._OPTIONS, **options})


def update_source(
    kernels: ModuleType, kinds: list[int], aligned: list[int], shadows: int = 1, **constants: Any
) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The update kernel with its signature and constants, as `compiled` takes them."""
    variants = tuple(2 * kind + flag for kind in kinds for flag in aligned)
    signature = {"table": "*i64", "nonfinite_total": "*i64", "skip": "*fp32", "device_weights": "*fp64"}
    signature |= {f"bits{k}": "i64" for k in range(4)}
    defaults: dict[str, Any] = {
        "skip": None,
        "device_weights": None,
        "SKIP_NONFINITE": True,
        "COUNT_LIVE": True,
        "K": shadows,
    }
    defaults |= {"VARIANTS": variants, "TILES": tuple(map(kernels.tile_elements, variants)), **constants}
    given = {name: value for name, value in defaults.items() if value != "argument"}
    signature |= dict.fromkeys(given, "constexpr")
    order = kernels.update.arg_names
    return kernels.update, {name: signature[name] for name in order}, given


def compiled_update(
    kernels: ModuleType, kinds: list[int], aligned: list[int], capability: int, shadows: int = 1, **constants: Any
) -> Any:
    return compiled(*update_source(kernels, kinds, aligned, shadows, **constants), capability)


def accesses(ptx: str) -> Counter[str]:
    """ "ld.v4.b32" and the like -> how often; global memory only."""
    return Counter(f"{kind}{width}" for kind, width in re.findall(r"\b(ld|st)\.global(\S*?\.b\d+)\b", ptx))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("pair", AVERAGE)
def test_aligned_averages_move_16_bytes_at_once(kernels: ModuleType, capability: int, pair: str) -> None:
    ptx = compiled_update(kernels, [AVERAGE[pair]], [1], capability).asm["ptx"]
    seen = accesses(ptx)
    wide = ".v2.b64" if pair == "f64" else ".v4.b32"
    assert seen["ld" + wide] >= 2 and seen["st" + wide] >= 2, seen
    # Beside them: the chunk's row (four of 64 bits; five with a low plane), and the last elements, each operand once.
    narrow = Counter({access: n for access, n in seen.items() if wide not in access})
    assert narrow.pop("ld.b64") == {"f64": 6, "planes<-bf16": 5}.get(pair, 4)
    assert narrow.total() == {"f64": 1, "planes<-bf16": 5}.get(pair, 3), narrow


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_copies_and_conversions_move_16_bytes_at_once(kernels: ModuleType, capability: int) -> None:
    for kind in (COPY_BYTES, CONVERT_F32_BF16):
        seen = accesses(compiled_update(kernels, [kind], [1], capability).asm["ptx"])
        assert seen["ld.v4.b32"] >= 2 and seen["st.v4.b32"] >= 2, seen


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_exchange_moves_16_bytes_at_once(kernels: ModuleType, capability: int) -> None:
    signature = {"table": "*i64", "which": "i64", "K": "constexpr"}
    seen = accesses(compiled(kernels.exchange, signature, {"K": 2}, capability).asm["ptx"])
    assert seen["ld.v4.b32"] == seen["st.v4.b32"] >= 4, seen


@pytest.mark.slow
def test_without_the_hint_no_access_is_wider_than_an_element(kernels: ModuleType) -> None:
    """A vector at an address that is no multiple of its size is a fault."""
    for kind, widest in ((AVERAGE["f32"], 32), (AVERAGE["f32<-bf16"], 32), (AVERAGE["bf16"], 16), (COPY_BYTES, 8)):
        seen = accesses(compiled_update(kernels, [kind], [0], 90).asm["ptx"])
        assert seen.pop("ld.b64") == 4  # the chunk's row
        assert not [access for access in seen if ".v" in access or int(access.rpartition("b")[2]) > widest], seen


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_arithmetic_is_one_fused_multiply_add(kernels: ModuleType, capability: int) -> None:
    """Nothing is contracted differently, and no denormal is flushed."""
    for pair, op in (("f32", "f32"), ("f32<-bf16", "f32"), ("f64", "f64")):
        ptx = compiled_update(kernels, [AVERAGE[pair]], [0, 1], capability, device_weights="argument").asm["ptx"]
        found = Counter(re.findall(rf"\b(fma|mul|sub|add)(?:\.rn)?\.{op}\b", ptx))
        assert found["fma"] > 4 and found["mul"] == 0, found
        # The difference of each element; the coefficient, once in each of the two variants.
        assert found["sub"] == found["fma"] and found["add"] == 2, found
        assert ".ftz" not in ptx


@pytest.mark.slow
def test_two_shadows_read_live_once(kernels: ModuleType) -> None:
    seen = accesses(compiled_update(kernels, [AVERAGE["f32"]], [1], 90, shadows=3).asm["ptx"])
    assert seen["ld.v4.b32"] == 4 * seen["st.v4.b32"] // 3, seen


@pytest.mark.slow
@pytest.mark.parametrize("shadows", [1, 4])
def test_nothing_is_spilled(kernels: ModuleType, shadows: int) -> None:
    import triton

    # With four shadows ptxas may keep a few addresses in memory, to fit one block more: not data. The one of Triton 3.7
    # and 3.8 does so with one shadow too.
    of_one = 8 if triton.__version__.startswith(("3.7.", "3.8.")) else 0
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton brings no cuobjdump")
    for kind in (*AVERAGE.values(), CONVERT_F32_BF16, COPY_BYTES):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled_update(kernels, [kind], [0, 1], 90, shadows).asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
        assert used["LOCAL"] == "0" and int(used["STACK"]) <= (of_one if shadows == 1 else 32), usage
        assert int(used["REG"]) <= (64 if shadows == 1 else 128), usage


SPECIALISED = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from fastema.backends import triton as backend
from fastema.backends.contract import Segment, UpdateArgs

class Driver:  # a machine with an H100, as far as compiling goes
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

class CompileOnly:
    def __init__(self, function): self.function = function
    def __getitem__(self, grid):
        return lambda *args, **options: self.function.warmup(*args, grid=grid, **options)

driver.set_active(Driver())
kernels = backend._load_kernels()
update, exchange = kernels.update, kernels.exchange
kernels.update, kernels.exchange = CompileOnly(update), CompileOnly(exchange)
counts = lambda: print(len(update.device_caches[0][0]), len(exchange.device_caches[0][0]))
for size in (5000, 1, 31):  # the number of chunks, addresses and weights are no part of the compiled kernel
    shadows = [[torch.zeros(size), torch.zeros(size, dtype=torch.int64)] for _ in range(2)]
    lives = torch.zeros(size), torch.zeros(size, dtype=torch.int64)
    plan = backend.Plan([Segment(list(s), live, not live.is_floating_point()) for *s, live in zip(*shadows, lives)], [])
    for weight in (0.0, 1.0, 0.5, 1e-4, 5e-324):
        plan.update(UpdateArgs([weight, weight], True))
    plan.exchange(0)
    plan.exchange(1)
counts()
numbers = torch.zeros(8)
for i in range(8):
    plan.update(UpdateArgs([0.1, 0.1], True, numbers[i]))
counts()
plan.update(UpdateArgs([0.1, 0.1], True, numbers[1], torch.zeros(3, dtype=torch.float64)[1:]))
plan.update(UpdateArgs([0.1, 0.1], True, numbers[0], torch.zeros(2, dtype=torch.float64)))
counts()
"""


@pytest.mark.slow
@needs_triton
def test_one_kernel_is_compiled_for_all_weights_sizes_and_addresses(tmp_path: Path) -> None:
    """Triton compiles anew for integers that are 1 or multiples of 16, and for aligned pointers."""
    result = run(["-c", SPECIALISED], TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:3] == ["1 1", "2 1", "3 1"]


@needs_triton
def test_a_plan_holds_the_tensors_whose_addresses_it_has() -> None:
    live, shadow = torch.zeros(8), torch.zeros(8)
    alive = [weakref.ref(live), weakref.ref(shadow)]
    plan = backend.Plan([Segment([shadow], live, copy=False)], [])
    del live, shadow
    assert all(each() is not None for each in alive)
    del plan
    assert not any(each() is not None for each in alive)


# ---- the chunk table ----


def rows_of(
    shadows: list[list[torch.Tensor]],
    lives: list[torch.Tensor],
    copy: bool,
    workers: int,
    low: torch.Tensor | None = None,
) -> list[list[int]]:
    lows = [] if low is None else [low] * len(shadows)
    segments = [Segment([shadow[i] for shadow in shadows], live, copy, lows) for i, live in enumerate(lives)]
    kinds = [backend._checked_kind(segment, len(shadows), lives[0].device) for segment in segments]
    return backend._chunk_rows(segments, kinds, lambda variant: 64 * (1 + variant % 2), workers)


@pytest.mark.parametrize("workers", [1, 100])
@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(
    ("shadow_dtype", "live_dtype", "split"),
    [
        (torch.float32, torch.float32, False),
        (torch.float32, torch.bfloat16, False),
        (torch.float64, torch.float16, False),
        (torch.bfloat16, torch.bfloat16, True),
    ],
)
def test_every_element_is_in_one_chunk_and_no_hint_is_false(
    shadow_dtype: torch.dtype, live_dtype: torch.dtype, split: bool, copy: bool, workers: int
) -> None:
    for size in (0, 1, 7, 63, 64, 129, 5000):
        for first, second in ((0, 0), (1, 1), (0, 1), (3, 3), (9, 1)):
            live = values(size + 9, dtype=live_dtype)[first : first + size]
            shadows = [[values(size + 9, dtype=shadow_dtype)[second : second + size]] for _ in range(2)]
            low = torch.zeros(size + 9, dtype=torch.int16)[second : second + size] if split else None
            rows = rows_of(shadows, [live], copy, workers, low)
            tensors = [live, *(shadow for (shadow,) in shadows), *([] if low is None else [low, low])]
            is_bytes = copy and shadow_dtype == live_dtype and not split
            steps = [1 if is_bytes else tensor.dtype.itemsize for tensor in tensors]
            done = 0
            for live_address, count, variant, swapped, *shadow_addresses in rows:
                addresses = [live_address, *shadow_addresses][: len(tensors)]
                assert shadow_addresses[len(tensors) - 1 :] == [0] * (5 - len(tensors)), "there are no low planes"
                assert addresses == [t.data_ptr() + done * s for t, s in zip(tensors, steps, strict=True)]
                assert swapped == count * steps[1] and count > 0
                assert not variant % 2 or all(address % 16 == 0 for address in addresses)
                done += count
            assert done == (live.nbytes if is_bytes else size)
            if first == second:  # at most a few elements before the first aligned one go without the hint
                assert sum(row[1] for row in rows if not row[2] % 2) <= 16


def test_a_large_segment_is_cut_into_whole_tiles_and_a_rest() -> None:
    live, shadow = torch.zeros(5000), torch.zeros(5000)
    sizes = [row[1] for row in rows_of([[shadow]], [live], False, 1)]
    assert sizes == [5 * 128] * 7 + [520]  # 40 tiles of 128, eight chunks a worker: five tiles each
    assert [row[1] for row in rows_of([[shadow]], [live], False, 100)] == [128] * 39 + [8]


# ---- selection ----


def test_on_cpu_tensors_the_reason_names_the_interpreter() -> None:
    reason = backend.why_unusable("cpu")
    if reason is None:
        pytest.skip("TRITON_INTERPRET is set")
    assert "TRITON_INTERPRET=1" in reason if importlib.util.find_spec("triton") else "cannot be imported" in reason
    with pytest.raises(ValueError, match="backend 'triton' cannot run on cpu: "):
        backends.select("triton", "cpu")


def test_auto_takes_triton_on_cuda_where_the_cuda_kernels_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_unusable", lambda device_type: "not built")
    monkeypatch.setattr(backend, "why_unusable", lambda device_type: None)
    monkeypatch.setattr(backend, "probe", lambda device: None)
    assert backends.select("auto", "cuda") is backend
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(UserWarning, match="torch backend on cpu"):  # the interpreter is no backend for users
        assert backends.select("auto", "cpu") is backends.BACKENDS["torch"]
    monkeypatch.setattr(backend, "why_unusable", lambda device_type: "no Triton")
    with pytest.warns(UserWarning, match="torch backend on cuda.*native: not built; triton: no Triton"):
        assert backends.select("auto", "cuda") is backends.BACKENDS["torch"]


def test_a_launch_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first launch raises if Triton finds no C compiler for its launcher; FastEMA says so in its own words."""

    class Failing:
        def __init__(self, *arguments: object) -> None:
            pass

        def update(self, *arguments: object, **named: object) -> None:
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    ones = torch.ones
    monkeypatch.setattr(backend, "Plan", Failing)
    monkeypatch.setattr(torch, "ones", lambda *sizes, device: ones(*sizes))
    backend.probe.cache_clear()
    reason = backend.probe(torch.device("cuda", 5))
    assert reason == "a launch of its kernels fails (RuntimeError: Failed to find C compiler.)"
    backend.probe.cache_clear()
    assert backend.probe(torch.device("cpu")) is None


def test_xpu_is_accepted_where_torch_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert backend.why_unusable("xpu") is None
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert backend.why_unusable("xpu") == "torch sees no XPU device"
    assert "no kernels for mps" in str(backend.why_unusable("mps"))


def test_a_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_kernels", None)
    monkeypatch.setattr(backend, "_import_error", None)
    monkeypatch.setitem(sys.modules, "fastema.triton_kernels.kernels", None)  # an import of it raises
    assert "Triton cannot be imported" in str(backend.why_unusable("cpu"))
    with pytest.raises(RuntimeError, match="Triton cannot be imported"):
        plan_of(backend, [[torch.zeros(1)]], [torch.zeros(1)])


@pytest.mark.slow
@needs_triton
def test_import_fastema_does_not_import_triton() -> None:
    code = "import sys, torch; before = 'triton' in sys.modules; import fastema; print(before, 'triton' in sys.modules)"
    assert run(["-c", code]).stdout.split() in (["False", "False"], ["True", "True"])
