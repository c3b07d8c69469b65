"""The rule, on every backend: against the reference, against torch.lerp, and backend against backend, bit for bit."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import COPIED_DTYPES, DTYPE_PAIRS, LAYOUTS, OFFSETS, SIZES, WEIGHTS, move, raw, values, with_offset
from cases.plans import plan_of
from cases.reference import assert_within, averaged, exact, tolerance
from fastema import FastEMA, backends
from fastema.backends import native
from fastema.backends import torch as plain_torch
from fastema.backends.contract import UpdateArgs

needs_native = pytest.mark.skipif(native.why_unusable("cpu") is not None, reason="fastema._C is not built")
# torch's own lerp fuses its multiply-add in vectorised builds only.
needs_fused_lerp = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch.lerp is not fused on this machine"
)
PAIR_IDS = [f"{shadow}<-{live}".replace("torch.", "") for shadow, live in DTYPE_PAIRS]
pairs = pytest.mark.parametrize(("shadow_dtype", "live_dtype"), DTYPE_PAIRS, ids=PAIR_IDS)


def update(
    module: ModuleType, shadow: Tensor, live: Tensor, weight: float, skip_nonfinite: bool = True, copy: bool = False
) -> Any:
    """One update of one segment; returns the plan."""
    plan = plan_of(module, [[shadow]], [live], [copy])
    plan.update(UpdateArgs([weight], skip_nonfinite, None))
    return plan


def sentinels_hold(part: Tensor) -> bool:
    """Return whether everything around `with_offset`'s result is untouched."""
    storage = torch.empty(0, dtype=part.dtype).set_(part.untyped_storage())
    around = torch.cat([storage[: part.storage_offset()], storage[part.storage_offset() + part.numel() :]])
    return bool((around == torch.tensor(77, dtype=part.dtype)).all())


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Any:
    """Every instruction set that this machine has and the library was built for."""
    if native.why_unusable("cpu") is not None:
        pytest.skip("fastema._C is not built")
    order = ["baseline", "avx2", "avx512"]
    if order.index(request.param) > order.index(native._C.cpu_isa()):
        pytest.skip(f"this machine has no {request.param}")
    return getattr(native._C.Isa, request.param)


@pytest.mark.parametrize("skip_nonfinite", [True, False], ids=["skipping", "plain"])
@pairs
def test_update_is_the_reference(
    backend: str, shadow_dtype: torch.dtype, live_dtype: torch.dtype, skip_nonfinite: bool
) -> None:
    module = backends.BACKENDS[backend]
    for size in SIZES:
        old, live = values(size, dtype=shadow_dtype, seed=1), values(size, dtype=live_dtype, seed=2)
        was = raw(live)
        for weight in (0.001, 0.7):
            shadow = old.clone()
            update(module, shadow, live, weight, skip_nonfinite)
            expected = averaged(exact(old), exact(live), weight, skip_nonfinite)
            what = f"size {size}, weight {weight}"
            assert_within(shadow, expected, tolerance(exact(old), exact(live), shadow_dtype), what)
            assert raw(live) == was, "the live weights were written"


@needs_native
@needs_fused_lerp
@pytest.mark.parametrize("skip_nonfinite", [True, False], ids=["skipping", "plain"])
@pairs
def test_backends_agree_bit_for_bit(shadow_dtype: torch.dtype, live_dtype: torch.dtype, skip_nonfinite: bool) -> None:
    for size in SIZES:
        old, live = values(size, dtype=shadow_dtype, seed=3), values(size, dtype=live_dtype, seed=4)
        for weight in WEIGHTS:
            a, b = old.clone(), old.clone()
            update(native, a, live, weight, skip_nonfinite)
            update(plain_torch, b, live, weight, skip_nonfinite)
            assert raw(a) == raw(b), f"size {size}, weight {weight}"


@pytest.mark.parametrize("skip_nonfinite", [True, False], ids=["skipping", "plain"])
@pairs
def test_instruction_sets_agree_bit_for_bit(
    isa: Any, shadow_dtype: torch.dtype, live_dtype: torch.dtype, skip_nonfinite: bool
) -> None:
    for size in (1, 5, 17, 1025, 16385):
        old, live = values(size, dtype=shadow_dtype, seed=5), values(size, dtype=live_dtype, seed=6)
        live[size // 2] = float("nan")
        old[size // 3] = float("inf")
        expected, got = old.clone(), old.clone()
        best = update(native, expected, live, 0.3, skip_nonfinite)
        plan = plan_of(native, [[got]], [live])
        plan.set_isa(isa)
        plan.update(UpdateArgs([0.3], skip_nonfinite, None))
        assert torch.equal(got.isnan(), expected.isnan())
        assert raw(got.nan_to_num(7.0)) == raw(expected.nan_to_num(7.0)), f"size {size}"
        bad = ~(old.isfinite() & live.isfinite())
        assert plan.nonfinite_count() == best.nonfinite_count() == int(bad.sum()) * skip_nonfinite


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_update_is_within_one_ulp_of_torch_lerp(backend: str, dtype: torch.dtype, weight: float) -> None:
    old, live = values(4099, dtype=dtype, seed=7), values(4099, dtype=dtype, seed=8)
    expected = torch.lerp(old, live, weight)
    update(backends.BACKENDS[backend], old, live, weight)
    up = torch.nextafter(expected, torch.full_like(expected, float("inf")))
    down = torch.nextafter(expected, torch.full_like(expected, float("-inf")))
    assert bool(((down <= old) & (old <= up)).all())


@pairs
def test_weight_0_keeps_and_weight_1_copies(backend: str, shadow_dtype: torch.dtype, live_dtype: torch.dtype) -> None:
    module = backends.BACKENDS[backend]
    old, live = values(1025, dtype=shadow_dtype, seed=9), values(1025, dtype=live_dtype, seed=10)
    kept, copied = old.clone(), old.clone()
    update(module, kept, live, 0.0)
    update(module, copied, live, 1.0)
    assert raw(kept) == raw(old)
    assert raw(copied) == raw(live.to(torch.float64 if shadow_dtype == torch.float64 else torch.float32).to(old.dtype))


def broken(size: int, dtype: torch.dtype, seed: int, stride: int) -> Tensor:
    """Return values of which every `stride`th is NaN, infinite or negative zero."""
    tensor = values(size, dtype=dtype, seed=seed)
    bad = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0]).to(dtype)
    tensor[::stride] = bad[torch.arange(len(tensor[::stride])) % len(bad)]
    return tensor


@pytest.mark.parametrize("skip_nonfinite", [True, False], ids=["skipping", "plain"])
@pairs
def test_weight_1_copies_over_any_average(
    backend: str, shadow_dtype: torch.dtype, live_dtype: torch.dtype, skip_nonfinite: bool
) -> None:
    """NaN and infinity in the average, and zeros with their signs; a live value that is not finite only if asked."""
    for size in (1, 7, 1025):
        old, live = broken(size, shadow_dtype, 30, 3), broken(size, live_dtype, 31, 5)
        shadow = old.clone()
        plan = update(backends.BACKENDS[backend], shadow, live, 1.0, skip_nonfinite)
        keeps = ~live.isfinite() if skip_nonfinite else torch.zeros(size, dtype=torch.bool)
        expected = torch.where(keeps, old, live.to(shadow_dtype))
        assert torch.equal(shadow.isnan(), expected.isnan())
        assert raw(shadow[~shadow.isnan()]) == raw(expected[~shadow.isnan()])
        assert plan.nonfinite_count() == int((~(old.isfinite() & live.isfinite())).sum()) * skip_nonfinite


@pytest.mark.parametrize("weight", [0.0, 1e-4, 0.3, 0.7, 0.999])
@pairs
def test_a_nonfinite_average_takes_a_finite_live_value_and_is_counted(
    backend: str, shadow_dtype: torch.dtype, live_dtype: torch.dtype, weight: float
) -> None:
    module = backends.BACKENDS[backend]
    for size in (1, 7, 1025):
        old, live = broken(size, shadow_dtype, 32, 3), broken(size, live_dtype, 33, 5)
        healthy = torch.where(old.isfinite(), old, live.to(shadow_dtype))
        shadow, ordinary = old.clone(), healthy.clone()
        plan = update(module, shadow, live, weight)
        update(module, ordinary, live, weight)
        takes = ~old.isfinite() & live.isfinite()
        assert raw(shadow[takes]) == raw(live.to(shadow_dtype)[takes])
        assert raw(shadow[old.isfinite()]) == raw(ordinary[old.isfinite()])
        assert torch.equal(shadow.isfinite(), old.isfinite() | live.isfinite())
        assert plan.nonfinite_count() == int((~(old.isfinite() & live.isfinite())).sum())
        plan.update(UpdateArgs([weight], True, None))
        assert plan.nonfinite_count() == int(takes.sum() + 2 * (~live.isfinite()).sum()), "counted once"


def test_every_average_that_is_not_finite_is_counted_and_a_live_value_once_for_all(backend: str) -> None:
    for count in (1, 2, 9):  # 9 are more than one launch takes
        shadows = [broken(1025, torch.float32, k, 7 + k) for k in range(count)]
        live = broken(1025, torch.float32, 40, 5)
        taken = [int((~shadow.isfinite() & live.isfinite()).sum()) for shadow in shadows]
        plan = plan_of(backends.BACKENDS[backend], [[shadow] for shadow in shadows], [live])
        plan.update(UpdateArgs([0.1] * count, True))
        assert plan.nonfinite_count() == sum(taken) + int((~live.isfinite()).sum())
        assert all(shadow[live.isfinite()].isfinite().all() for shadow in shadows)


@pytest.mark.parametrize("skip_nonfinite", [True, False], ids=["skipping", "plain"])
def test_an_average_that_overflows_is_not_stored(backend: str, skip_nonfinite: bool) -> None:
    shadow, live = torch.full((9,), -3e38), torch.full((9,), 3e38)
    plan = update(backends.BACKENDS[backend], shadow, live, 0.25, skip_nonfinite)
    assert bool((shadow == (-3e38 if skip_nonfinite else float("inf"))).all())
    assert plan.nonfinite_count() == 9 * skip_nonfinite


@pytest.mark.parametrize("offset", OFFSETS)
@pairs
def test_unaligned_segments_touch_nothing_around_them(
    backend: str, shadow_dtype: torch.dtype, live_dtype: torch.dtype, offset: int
) -> None:
    module = backends.BACKENDS[backend]
    for size in (0, 1, 5, 17, 1025):
        old, source = values(size, dtype=shadow_dtype, seed=11), values(size, dtype=live_dtype, seed=12)
        aligned = old.clone()
        update(module, aligned, source, 0.25)
        shadow, live = with_offset(old, offset), with_offset(source, (offset + 1) % 4)
        update(module, shadow, live, 0.25)
        assert raw(shadow) == raw(aligned), f"size {size}"
        assert sentinels_hold(shadow)
        assert sentinels_hold(live)


@pytest.mark.parametrize("dtype", COPIED_DTYPES, ids=str)
def test_integers_and_bools_are_copied(backend: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        live = values(size, dtype=torch.float64, seed=13).mul(50).clamp(0, 100).to(dtype)
        shadow = with_offset(torch.zeros(size, dtype=dtype), 3)
        update(backends.BACKENDS[backend], shadow, live, 0.001, copy=True)
        assert raw(shadow) == raw(live), f"size {size}"
        assert sentinels_hold(shadow)


@pairs
def test_floats_under_the_copy_rule_are_converted(
    backend: str, shadow_dtype: torch.dtype, live_dtype: torch.dtype
) -> None:
    live = values(1025, dtype=live_dtype, seed=14)
    live[3], live[4] = float("nan"), float("-inf")  # skip_nonfinite is the average's, not the copy's
    shadow = values(1025, dtype=shadow_dtype, seed=15)
    plan = update(backends.BACKENDS[backend], shadow, live, 0.001, copy=True)
    assert torch.equal(shadow.isnan(), live.isnan())
    assert raw(shadow.nan_to_num(1.0, -2.0, -2.0)) == raw(live.to(shadow_dtype).nan_to_num(1.0, -2.0, -2.0))
    assert plan.nonfinite_count() == 0


@pairs
def test_nonfinite_elements_are_skipped_and_counted(
    backend: str, shadow_dtype: torch.dtype, live_dtype: torch.dtype
) -> None:
    module = backends.BACKENDS[backend]
    for size in (1, 3, 17, 1025, 16385):
        old, live = values(size, dtype=shadow_dtype, seed=16), values(size, dtype=live_dtype, seed=17)
        bad = torch.arange(size) % 7 == 0
        live[bad] = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=live_dtype)[torch.arange(size) % 3][
            bad
        ]
        clean = live.clone()
        clean[bad] = 0
        skipping, plain, expected = old.clone(), old.clone(), old.clone()
        plan = update(module, skipping, live, 0.3, skip_nonfinite=True)
        update(module, expected, clean, 0.3)
        assert raw(skipping[bad]) == raw(old[bad]), "a shadow moved although its live value is not finite"
        assert raw(skipping[~bad]) == raw(expected[~bad])
        assert plan.nonfinite_count() == int(bad.sum())
        plan.update(UpdateArgs([0.3], True, None))
        assert plan.nonfinite_count() == 2 * int(bad.sum()), "the count is since the beginning"
        propagating = update(module, plain, live, 0.3, skip_nonfinite=False)
        assert not plain[bad].isfinite().any()
        assert raw(plain[~bad]) == raw(expected[~bad])
        assert propagating.nonfinite_count() == 0


def test_every_16_bit_pattern_is_widened_and_narrowed_as_torch_does(backend: str) -> None:
    """All 65,536 halves, into float32 and back: subnormals, infinities and NaN included."""
    module = backends.BACKENDS[backend]
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        live = patterns.view(dtype)
        wide = torch.zeros(1 << 16)
        update(module, wide, live, 1.0, skip_nonfinite=False, copy=True)
        assert torch.equal(wide.isnan(), live.isnan())
        assert raw(wide[~live.isnan()]) == raw(live.float()[~live.isnan()])
        narrow = torch.zeros(1 << 16, dtype=dtype)
        between = torch.where(wide.isfinite(), wide * 1.0007, wide)  # most fall between two halves: rounding shows
        update(module, narrow, between, 1.0, skip_nonfinite=False, copy=True)
        assert torch.equal(narrow.isnan(), between.isnan())
        assert raw(narrow[~between.isnan()]) == raw(between.to(dtype)[~between.isnan()])


def test_one_plan_does_every_dtype_rule_and_size_at_once(backend: str) -> None:
    """An odd or unaligned segment must not spoil its neighbours."""
    module = backends.BACKENDS[backend]
    shadows, lives, copies, expected = [], [], [], []
    for index, (shadow_dtype, live_dtype) in enumerate(DTYPE_PAIRS):
        size, copy = SIZES[(5 * index) % len(SIZES)], index % 5 == 4
        old, live = values(size, dtype=shadow_dtype, seed=index), values(size, dtype=live_dtype, seed=99 - index)
        alone = old.clone()
        update(module, alone, live, 0.01, copy=copy)
        shadows.append(with_offset(old, index % 4))
        lives.append(live)
        copies.append(copy)
        expected.append(raw(alone))
    plan_of(module, [shadows], lives, copies).update(UpdateArgs([0.01], True, None))
    assert [raw(shadow) for shadow in shadows] == expected
    assert all(sentinels_hold(shadow) for shadow in shadows)


def test_threads_do_not_change_a_bit(backend: str) -> None:
    module = backends.BACKENDS[backend]
    sizes = (300_001, 5, 1, 17_000, 16_385, 64, 0)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            shadows = [values(size, seed=size) for size in sizes]
            lives = [values(size, seed=size + 1) for size in sizes]
            lives[0][123] = float("nan")
            plan = plan_of(module, [shadows], lives)
            plan.update(UpdateArgs([0.01], True, None))
            assert plan.nonfinite_count() == 1
            results.append([raw(shadow) for shadow in shadows])
    finally:
        torch.set_num_threads(before)
    assert all(result == results[0] for result in results)


def test_found_inf_skips_the_update(backend: str) -> None:
    module = backends.BACKENDS[backend]
    shadow, live = values(17, seed=1), values(17, seed=2)
    counter, count = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    old = shadow.clone()
    plan = plan_of(module, [[shadow, counter]], [live, count], [False, True])
    plan.update(UpdateArgs([0.5], True, torch.tensor(1.0)))
    assert raw(shadow) == raw(old)
    assert counter.item() == 0
    plan.update(UpdateArgs([0.5], True, torch.tensor(0.0)))
    assert raw(shadow) != raw(old)
    assert counter.item() == 1


@pairs
def test_exchange_of_contents_is_exact(backend: str, shadow_dtype: torch.dtype, live_dtype: torch.dtype) -> None:
    module = backends.BACKENDS[backend]
    shadows = [with_offset(values(size, dtype=shadow_dtype, seed=size), 1) for size in SIZES]
    lives = [with_offset(values(size, dtype=live_dtype, seed=size + 1), 2) for size in SIZES]
    shadows[-1][7] = float("nan")
    was_shadow, was_live = [raw(s) for s in shadows], [raw(s) for s in lives]
    plan = plan_of(module, [shadows], lives)
    if shadow_dtype != live_dtype:
        with pytest.raises(ValueError, match="different dtypes cannot be exchanged exactly"):
            plan.exchange(0)
        assert [raw(s) for s in shadows] == was_shadow
        assert [raw(s) for s in lives] == was_live
        return
    plan.exchange(0)
    assert [raw(s) for s in shadows] == was_live
    assert [raw(s) for s in lives] == was_shadow
    assert all(map(sentinels_hold, [*shadows, *lives]))


def test_exchange_of_contents_swaps_copied_segments_too(backend: str) -> None:
    shadow, live = torch.arange(5000), torch.arange(5000) * 3
    plan_of(backends.BACKENDS[backend], [[shadow]], [live], [True]).exchange(0)
    assert torch.equal(shadow, torch.arange(5000) * 3)
    assert torch.equal(live, torch.arange(5000))


def test_update_bumps_the_version_of_the_shadow_views(backend: str) -> None:
    """A graph through a shadow (a teacher) must notice that the shadow moved on."""
    shadow, live = values(8, seed=1), values(8, seed=2)
    view = torch.empty(0).set_(shadow.untyped_storage(), 0, (2, 4))  # with a version counter of its own
    before = view._version
    plan_of(backends.BACKENDS[backend], [[shadow]], [live], views=[view]).update(UpdateArgs([0.5], True, None))
    assert view._version > before


@pytest.mark.parametrize("layout", LAYOUTS)
@pairs
def test_every_layout_through_fastema(
    backend: str, shadow_dtype: torch.dtype, live_dtype: torch.dtype, layout: str
) -> None:
    live = LAYOUTS[layout](live_dtype)
    around = torch.empty(0, dtype=live_dtype).set_(live.untyped_storage()).clone()
    ema = FastEMA([("w", live)], decay=0.75, decay_type="constant", dtype=shadow_dtype, backend=backend)
    shadow = ema.state_dict()["shadow"]["w"]
    assert shadow.dtype == shadow_dtype
    is_split = (shadow_dtype, live_dtype) == (torch.float32, torch.bfloat16)  # kept in two planes, shown as a copy
    assert is_split or shadow.stride() == live.stride()
    expected = exact(live.to(shadow_dtype))
    allowed = np.zeros_like(expected)
    for seed in (1, 2):
        move([live], seed)
        moved = exact(live)
        allowed = allowed + tolerance(expected, moved, shadow_dtype)
        expected = averaged(expected, moved, 0.25)
        ema.update()
    assert_within(ema.state_dict()["shadow"]["w"], expected, allowed, layout)
    # What the tensor does not cover is as it was.
    storage = torch.empty(0, dtype=live_dtype).set_(live.untyped_storage())
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside.as_strided(live.shape, live.stride(), live.storage_offset()).fill_(False)
    assert raw(storage[outside]) == raw(around[outside])


@pytest.mark.parametrize("count", [1, 2, 600, 10_000])
def test_any_number_of_tensors(backend: str, count: int) -> None:
    sizes = [1 + (number * 7) % 23 for number in range(count)]
    lives = [values(size, seed=number) for number, size in enumerate(sizes)]
    shadows = [values(size, seed=count + number) for number, size in enumerate(sizes)]
    old, new = exact(torch.cat(shadows)), exact(torch.cat(lives))
    plan_of(backends.BACKENDS[backend], [shadows], lives).update(UpdateArgs([0.25], True))
    assert_within(torch.cat(shadows), averaged(old, new, 0.25), tolerance(old, new, torch.float32))
