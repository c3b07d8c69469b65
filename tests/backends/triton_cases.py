"""The Triton backend in Triton's interpreter; run by test_triton.py as a program of its own.

Whether a kernel is interpreted is settled when Triton is imported, once for a process. Prints a line for each group,
`name <tab> number of cases <tab> what failed`, and stops with status 77 where this interpreter cannot run.
"""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from cases.plans import plan_of
from fastema.backends.contract import Segment, UpdateArgs

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
from torch import Tensor, nn

from cases import COPIED_DTYPES, DTYPE_PAIRS, bits, raw, small_model, train, values, with_offset
from fastema import FastEMA
from fastema.backends import native
from fastema.backends import torch as plain_torch
from fastema.backends import triton as backend
from fastema.memory import planes

CANNOT_RUN = 77
SIZES = (1, 15, 1023, 1025)
LARGE = 20000  # more than a chunk: full tiles, masked vectors and a scalar tail
OFFSETS = ((0, 0), (1, 1), (0, 1))  # of shadow and live, in elements: aligned, aligned after a head, never aligned
LARGE_PAIRS = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
)
WEIGHTS = {1: ((0.1,), (0.75,)), 3: ((1e-12, 0.4999999, 0.999), (0.5, 0.0, 1.0))}


def exact_interpreter() -> str | None:
    """Makes fma round once, as it does on a GPU, also in interpreters before 3.9; the reason where they do not run."""
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
        return None
    try:
        int(np.zeros(1))
    except TypeError:
        return f"the interpreter of Triton {triton.__version__} takes int() of an array, NumPy {np.__version__} refuses"
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    libm = ctypes.CDLL("libm.so.6")
    fused = {}
    for name, number, dtype in (("fmaf", ctypes.c_float, np.float32), ("fma", ctypes.c_double, np.float64)):
        function = getattr(libm, name)
        function.restype, function.argtypes = number, [number] * 3
        fused[np.dtype(dtype)] = np.vectorize(function, otypes=[dtype])

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return TensorHandle(fused[z.data.dtype](x.data, y.data, z.data), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma
    return None


def oracles() -> list[ModuleType]:
    """The backends that must give the same bits."""
    fused = torch.backends.cpu.get_cpu_capability() != "DEFAULT"  # torch.lerp fuses in vectorised builds only
    found = [native] if native.why_unusable("cpu") is None else []
    return [*found, plain_torch] if fused or not found else found


ORACLES = oracles()


def whole(part: Tensor) -> Tensor:
    """The storage behind `with_offset`'s result, NaN made alike: which NaN a chip makes is its own affair."""
    storage = torch.empty(0, dtype=part.dtype).set_(part.untyped_storage())
    return storage.where(~storage.isnan(), float("nan")) if storage.is_floating_point() else storage


def hostile(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers, with what rounding and skip_nonfinite could stumble over among them."""
    special = [
        float("nan"),
        float("inf"),
        float("-inf"),
        0.0,
        -0.0,
        1e-40,
        -1e-45,
        6e-8,
        65519.0,
        65520.0,
        -3e38,
        1e300,
    ]
    tensor = values(size, dtype=dtype, seed=seed)
    if size > 3:
        where = torch.arange(1, size, 11)
        tensor[where] = torch.tensor(special, dtype=torch.float64)[torch.arange(len(where)) % len(special)].to(dtype)
    return tensor


def segments(
    shadow_dtype: torch.dtype, live_dtype: torch.dtype, count: int, sizes: tuple[int, ...] = SIZES
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """[count][sizes x OFFSETS] shadows, and the lives."""
    places = [(size, *offsets) for size in sizes for offsets in OFFSETS]
    lives = [with_offset(hostile(size, live_dtype, size), offset) for size, _, offset in places]
    shadows = [
        [with_offset(hostile(size, shadow_dtype, size + k + 1), offset) for size, offset, _ in places]
        for k in range(count)
    ]
    return shadows, lives


def copied(shadows: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[with_offset(shadow, shadow.storage_offset()) for shadow in each] for each in shadows]


def check_update(
    shadow_dtype: torch.dtype, live_dtype: torch.dtype, skip_nonfinite: bool, count: int, sizes: tuple[int, ...] = SIZES
) -> None:
    shadows, lives = segments(shadow_dtype, live_dtype, count, sizes)
    before = [raw(whole(live)) for live in lives]
    others = [(oracle, copied(shadows)) for oracle in ORACLES]
    mine = plan_of(backend, shadows, lives)
    plans = [plan_of(oracle, theirs, lives) for oracle, theirs in others]
    for weights in WEIGHTS[count]:
        mine.update(UpdateArgs(list(weights), skip_nonfinite))
        for plan, (oracle, theirs) in zip(plans, others, strict=True):
            plan.update(UpdateArgs(list(weights), skip_nonfinite, None))
            for which in range(count):
                for i, (got, expected) in enumerate(zip(shadows[which], theirs[which], strict=True)):
                    what = f"segment {i} of {got.numel()}, shadow {which}, weights {weights}, against {oracle.NAME}"
                    assert raw(whole(got)) == raw(whole(expected)), what
            assert mine.nonfinite_count() == plan.nonfinite_count()
    assert (mine.nonfinite_count() > 0) == skip_nonfinite
    assert [raw(whole(live)) for live in lives] == before, "the live weights were written"


def check_planes(skip_nonfinite: bool, count: int) -> None:
    shadows, lives = segments(torch.float32, torch.bfloat16, count)
    pairs = [[planes.split(shadow) for shadow in each] for each in shadows]
    offsets = [[shadow.storage_offset() for shadow in each] for each in shadows]
    copies = [i % 5 == 4 for i in range(len(lives))]
    highs, lows = (
        [
            [with_offset(p[half], at) for p, at in zip(each, ats, strict=True)]
            for each, ats in zip(pairs, offsets, strict=True)
        ]
        for half in (0, 1)
    )
    others = [(oracle, copied(highs), copied(lows)) for oracle in ORACLES]
    mine = plan_of(backend, highs, lives, copies, (), lows)
    plans = [plan_of(oracle, high, lives, copies, (), low) for oracle, high, low in others]
    for weights in WEIGHTS[count]:
        mine.update(UpdateArgs(list(weights), skip_nonfinite))
        for plan, (oracle, high, low) in zip(plans, others, strict=True):
            plan.update(UpdateArgs(list(weights), skip_nonfinite, None))
            for which in range(count):
                for *got, upper, lower in zip(highs[which], lows[which], high[which], low[which], strict=True):
                    nan = upper.isnan()  # its payload is the processor's
                    assert torch.equal(got[0].isnan(), nan), f"{weights}, {nan.numel()} elements, {oracle.NAME}"
                    for ours, theirs in zip(got, (upper, lower), strict=True):
                        assert raw(ours[~nan]) == raw(theirs[~nan]), f"{weights}, {nan.numel()} elements, {oracle.NAME}"
            assert mine.nonfinite_count() == plan.nonfinite_count()


def updates_of_planes() -> Iterator[Callable[[], None]]:
    for skip_nonfinite in (True, False):
        for count in (1, 3):
            yield lambda g=skip_nonfinite, k=count: check_planes(g, k)


def small_updates() -> Iterator[Callable[[], None]]:
    for index, (shadow, live) in enumerate(DTYPE_PAIRS):
        for skip_nonfinite in (True, False):
            count = 3 if skip_nonfinite == (index % 2 == 0) else 1  # the loop over shadows is the same for every pair
            yield lambda s=shadow, t=live, g=skip_nonfinite, k=count: check_update(s, t, g, k)


def large_updates() -> Iterator[Callable[[], None]]:
    for shadow, live in LARGE_PAIRS:
        for skip_nonfinite, count in ((True, 1), (False, 3)):
            yield lambda s=shadow, t=live, g=skip_nonfinite, k=count: check_update(s, t, g, k, (LARGE,))


def copies() -> Iterator[Callable[[], None]]:
    def check(shadow_dtype: torch.dtype, live_dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
        shadows, lives = segments(shadow_dtype, live_dtype, 2, sizes)
        expected = copied(shadows)
        for each in expected:
            for shadow, live in zip(each, lives, strict=True):
                shadow.copy_(live)
        plan = plan_of(backend, shadows, lives, True)
        plan.update(UpdateArgs([0.3, 0.3], True))
        for each, right in zip(shadows, expected, strict=True):
            same = (lambda tensor: tensor) if shadow_dtype == live_dtype else whole  # bitwise, NaN and all
            assert [raw(same(part)) for part in each] == [raw(same(part)) for part in right]
            assert [raw(whole(part)) for part in each] == [raw(whole(part)) for part in right]
        assert plan.nonfinite_count() == 0, "skip_nonfinite is the average's, not the copy's"

    for dtype in COPIED_DTYPES:
        yield lambda d=dtype: check(d, d, (*SIZES, LARGE))
    for shadow, live in DTYPE_PAIRS:
        yield lambda s=shadow, t=live: check(s, t, (15, 1025))
    yield lambda: check(torch.float32, torch.bfloat16, (LARGE,))


def every_half() -> Iterator[Callable[[], None]]:
    """All 65,536 patterns of 16 bits, into float32 and back."""

    def check(dtype: torch.dtype) -> None:
        live = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        wide, narrow = torch.zeros(1 << 16), torch.zeros(1 << 16, dtype=dtype)
        plan_of(backend, [[wide]], [live], [True]).update(UpdateArgs([1.0], False))
        assert raw(whole(wide)) == raw(whole(live.float()))
        between = torch.where(wide.isfinite(), wide * 1.0007, wide)  # most fall between two halves: rounding shows
        plan_of(backend, [[narrow]], [between], [True]).update(UpdateArgs([1.0], False))
        assert raw(whole(narrow)) == raw(whole(between.to(dtype)))

    yield lambda: check(torch.bfloat16)
    yield lambda: check(torch.float16)


def mixed() -> Iterator[Callable[[], None]]:
    """Every pair and rule in one launch: none spoils its neighbours."""

    def check() -> None:
        shadows, lives, copy = [], [], []
        for index, (shadow_dtype, live_dtype) in enumerate(DTYPE_PAIRS):
            size = (0, *SIZES)[index % 5]
            shadows.append(with_offset(values(size, dtype=shadow_dtype, seed=index), index % 4))
            lives.append(values(size, dtype=live_dtype, seed=99 - index))
            copy.append(index % 5 == 4)
        shadows.append(with_offset(torch.zeros(33, dtype=torch.int64), 1))
        lives.append(torch.arange(33))
        copy.append(True)
        (expected,) = copied([shadows])
        plan_of(backend, [shadows], lives, copy).update(UpdateArgs([0.01], True))
        plan_of(ORACLES[0], [expected], lives, copy).update(UpdateArgs([0.01], True, None))
        assert [raw(whole(shadow)) for shadow in shadows] == [raw(whole(shadow)) for shadow in expected]

    yield check


def scalars() -> Iterator[Callable[[], None]]:
    """Weights and skip, from the host and from the device; more shadows than one launch takes."""
    weights = [0.0, 1.0, 0.1, 1.0 - 0.9999, 0.5, 5e-324, 1.0 - 2.0**-53]

    def run(count: int, dtype: torch.dtype, use: Callable[[Any, list[float]], None]) -> list[bytes]:
        live = hostile(300, dtype, 3)
        shadows = [[values(300, dtype=dtype, seed=k)] for k in range(count)]
        plan = plan_of(backend, shadows, [live])
        use(plan, weights[:count])
        return [raw(whole(shadow)) for (shadow,) in shadows]

    def check_weights(count: int, dtype: torch.dtype) -> None:
        live = hostile(300, dtype, 3)
        expected = [[values(300, dtype=dtype, seed=k)] for k in range(count)]
        plan = plan_of(ORACLES[0], expected, [live])
        plan.update(UpdateArgs(weights[:count], True, None))
        right = [raw(whole(shadow)) for (shadow,) in expected]
        device = torch.tensor(weights, dtype=torch.float64)[:count]
        assert run(count, dtype, lambda mine, host: mine.update(UpdateArgs(host, True))) == right
        assert run(count, dtype, lambda mine, host: mine.update(UpdateArgs([0.3] * count, True, None, device))) == right
        assert run(count, dtype, lambda mine, host: mine.update(UpdateArgs(host, True, torch.tensor(0.0)))) == right

    def check_skip(value: float) -> None:
        untouched = [raw(values(300, seed=k)) for k in range(2)]
        assert (
            run(2, torch.float32, lambda mine, host: mine.update(UpdateArgs([0.5, 0.5], True, torch.tensor(value))))
            == untouched
        )

    for count in (1, 4, 5, 7):
        for dtype in (torch.float32, torch.float64):
            yield lambda k=count, d=dtype: check_weights(k, d)
    for value in (1.0, -0.5, float("nan")):
        yield lambda v=value: check_skip(v)


def counted_once() -> Iterator[Callable[[], None]]:
    def check(count: int) -> None:
        live = values(9000)
        live[::7] = float("nan")
        plan = plan_of(backend, [[values(9000, seed=k)] for k in range(count)], [live])
        for updates in (1, 2):
            plan.update(UpdateArgs([0.1] * count, True))
            assert plan.nonfinite_count() == updates * len(live[::7])

    for count in (1, 3, 6):
        yield lambda k=count: check(k)


def exchanges() -> Iterator[Callable[[], None]]:
    def check(dtype: torch.dtype, sizes: tuple[int, ...], count: int, which: int) -> None:
        shadows, lives = segments(dtype, dtype, count, sizes)
        plan = plan_of(backend, shadows, lives, [dtype == torch.int64] * len(lives))
        before = [raw(live) for live in lives], [[raw(shadow) for shadow in each] for each in shadows]
        around = [raw(torch.empty(0, dtype=dtype).set_(live.untyped_storage())[-8:]) for live in lives]
        plan.exchange(which)
        assert [raw(live) for live in lives] == before[1][which]
        assert [raw(shadow) for shadow in shadows[which]] == before[0]
        plan.exchange(which)
        assert ([raw(live) for live in lives], [[raw(shadow) for shadow in each] for each in shadows]) == before
        assert [raw(torch.empty(0, dtype=dtype).set_(live.untyped_storage())[-8:]) for live in lives] == around

    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64):
        yield lambda d=dtype: check(d, SIZES, 1, 0)
    yield lambda: check(torch.float32, (LARGE,), 3, 1)
    yield lambda: check(torch.float32, (15, 1025), 6, 5)


def refusals() -> Iterator[Callable[[], None]]:
    a, b = torch.zeros(4), torch.zeros(4)

    def raises(text: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except ValueError as error:
            assert text in str(error), error
        else:
            raise AssertionError(f"nothing was raised: {text}")

    def plan(shadow: Tensor = a, live: Tensor = b, copy: bool = False) -> Any:
        return plan_of(backend, [[shadow]], [live], [copy])

    yield lambda: raises("at least one shadow", lambda: plan_of(backend, [], [b]))
    uneven = [Segment([a], b, copy=False), Segment([a, a], b, copy=False)]
    yield lambda: raises("as many shadows", lambda: backend.Plan(uneven, []))
    yield lambda: raises("contiguous 1-D", lambda: plan(torch.zeros(8)[::2]))
    yield lambda: raises("contiguous 1-D", lambda: plan(torch.zeros(5)))
    yield lambda: raises("one dtype", lambda: plan_of(backend, [[a], [a.double()]], [b]))
    yield lambda: raises("no kernel for a torch.int64 shadow", lambda: plan(a.long()))
    yield lambda: raises("1 shadows", lambda: plan().update(UpdateArgs([0.1, 0.2], True)))
    yield lambda: raises(
        "skip must be", lambda: plan().update(UpdateArgs([0.1], True, torch.zeros((), dtype=torch.int32)))
    )
    yield lambda: raises("weights must be", lambda: plan().update(UpdateArgs([0.1], True, None, torch.zeros(1))))
    yield lambda: raises("no such shadow", lambda: plan().exchange(1))
    yield lambda: raises("different dtypes", lambda: plan(a, b.bfloat16()).exchange(0))


def end_to_end() -> Iterator[Callable[[], None]]:
    """FastEMA with backend="triton" beside the same with another backend: the same bits all the way."""

    def check(dtype: torch.dtype, **arguments: Any) -> None:
        def made(name: str) -> tuple[nn.Module, FastEMA]:
            model = small_model(dtype)
            return model, FastEMA(model, backend=name, **arguments)

        (model, ema), (twin, other) = made("triton"), made(ORACLES[0].NAME)
        assert ema.backend_name == "triton"
        for seed in range(3):
            for each in (model, twin):
                train(each, seed)
            ema.update()
            other.update()
        several = range(len(ema.decay) if isinstance(ema.decay, tuple) else 1)
        live = bits(model)
        for which in several:
            in_place = dtype == torch.float32
            for inside in {False, in_place}:
                with ema.swapped(in_place=inside, which=which), other.swapped(which=which):
                    assert bits(model) == bits(twin)
                    assert bits(model) != live
                assert bits(model) == live
        state = ema.state_dict()
        resumed_model, resumed = made("triton")
        resumed_model.load_state_dict(model.state_dict())
        resumed.load_state_dict(state)
        for each in (model, resumed_model):
            train(each, 9)
        ema.update()
        resumed.update()
        for which in several:
            mine, theirs = ema.shadow_state_dict(which), resumed.shadow_state_dict(which)
            assert {name: raw(tensor) for name, tensor in mine.items()} == {n: raw(t) for n, t in theirs.items()}

    def check_nonfinite() -> None:
        model = small_model()
        ema = FastEMA(model, decay=0.9, decay_type="constant", backend="triton")
        views = [tensor for tensor in ema.shadow_state_dict().values() if tensor.is_floating_point()]
        versions = [view._version for view in views]
        with torch.no_grad():
            next(model.parameters())[0, 0] = float("nan")
        ema.update(found_inf=torch.tensor(1.0))
        assert ema.nonfinite_count() == 0
        ema.update()
        assert ema.nonfinite_count() == 1
        assert all(tensor.isfinite().all() for tensor in views)
        assert all(view._version > version for view, version in zip(views, versions, strict=True))

    yield lambda: check(torch.float32, decay=0.9)
    yield lambda: check(torch.float64, decay=[0.5, 0.9, 0.99], decay_type="threshold")
    yield lambda: check(torch.bfloat16, decay=0.999)
    yield lambda: check(torch.float32, decay=[0.9, 0.99], capturable=True)
    yield check_nonfinite


GROUPS = (
    small_updates,
    large_updates,
    updates_of_planes,
    copies,
    every_half,
    mixed,
    scalars,
    counted_once,
    exchanges,
    refusals,
    end_to_end,
)


def main() -> int:
    reason = exact_interpreter() or backend.why_unusable("cpu")
    if reason is not None:
        print(reason)
        return CANNOT_RUN
    np.seterr(all="ignore")  # NaN and infinity are meant
    for group in GROUPS:
        count, failure = 0, ""
        for case in group():
            count += 1
            try:
                case()
            except Exception:
                failure = failure or f"case {count}: " + traceback.format_exc(limit=-3).replace("\n", " | ")
        print(f"{group.__name__}\t{count}\t{failure}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
