"""Properties of the cutting: every element of every tensor is covered exactly once, and nothing else is touched."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import as_applied, raw, values
from cases.plans import plan_of
from fastema import FastEMA, backends
from fastema.backends.contract import UpdateArgs
from fastema.memory.bytes import Run, element_runs, gaps, merged, without

BYTES = 48
quick = settings(max_examples=60, deadline=None)
quicker = settings(max_examples=25, deadline=None)


def elements(runs: list[tuple[int, int]]) -> list[int]:
    return [element for begin, end in runs for element in range(begin, end)]


def covered(tensor: Tensor) -> list[int]:
    """The storage elements of a view, by brute force, in the order of the view."""
    storage_elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return (
        torch.arange(storage_elements)
        .as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        .flatten()
        .tolist()
    )


@st.composite
def sliced_views(draw: st.DrawFn) -> Tensor:
    """Draw views of a buffer: sliced, stepped, indexed, transposed."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    offset = draw(st.integers(0, 3))
    room = torch.zeros(offset + int(torch.tensor(shape).prod()) + draw(st.integers(0, 3)))
    view = room[offset : offset + int(torch.tensor(shape).prod())].view(shape)
    for dim in range(len(shape)):
        begin = draw(st.integers(0, shape[dim]))
        end = draw(st.integers(begin, shape[dim]))
        view = view[(slice(None),) * dim + (slice(begin, end, draw(st.integers(1, 3))),)]
    return view.permute(draw(st.permutations(range(len(shape)))))


@st.composite
def strided_views(draw: st.DrawFn) -> Tensor:
    """Any strides at all: most overlap."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    stride = draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape)))
    return torch.zeros(100).as_strided(shape, stride, draw(st.integers(0, 9)))


@st.composite
def runs(draw: st.DrawFn, copy: bool = False) -> list[Run]:
    """Any runs of bytes within BYTES, overlapping or not."""
    pairs = draw(st.lists(st.tuples(st.integers(0, BYTES), st.integers(0, BYTES)), max_size=6))
    return [Run(min(pair), max(pair), torch.uint8, copy) for pair in pairs if pair[0] != pair[1]]


def bytes_of(some: list[Run]) -> list[int]:
    return [byte for run in some for byte in range(run.begin, run.end)]


# ---- runs of one tensor ----


@quick
@given(sliced_views())
def test_a_sliced_view_is_covered_exactly_once(view: Tensor) -> None:
    found = element_runs(view)
    assert elements(found) == sorted(covered(view))
    assert all(begin < end for begin, end in found)


@quick
@given(strided_views())
def test_any_view_is_covered_exactly_once_or_refused(view: Tensor) -> None:
    inside = covered(view)
    if len(set(inside)) < len(inside):
        with pytest.raises(ValueError, match="overlapping elements"):
            element_runs(view)
        return
    try:
        found = element_runs(view)
    except ValueError:
        # Interleaved without sharing an element: no slicing makes such a view, so it may be refused.
        dims = sorted((stride, size) for stride, size in zip(view.stride(), view.shape, strict=True) if size > 1)
        spans = itertools.accumulate((stride * (size - 1) for stride, size in dims), initial=1)
        assert any(stride < span for (stride, _), span in zip(dims, spans, strict=False))
        return
    assert elements(found) == sorted(inside)


def test_dense_layouts_are_one_run() -> None:
    for view in (
        torch.zeros(3, 4, 5),
        torch.zeros(3, 4).t(),
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ):
        assert element_runs(view) == [(0, view.numel())]
    assert element_runs(torch.zeros(4, 6)[:, 1:3]) == [(1, 3), (7, 9), (13, 15), (19, 21)]
    assert element_runs(torch.zeros(0, 3)) == []
    assert element_runs(torch.tensor(1.0)) == [(0, 1)]


# ---- runs of a storage ----


@quick
@given(runs())
def test_merged_is_the_union(some: list[Run]) -> None:
    result = merged(some)
    assert bytes_of(result) == sorted(set(bytes_of(some)))
    assert all(a.end < b.begin for a, b in itertools.pairwise(result)), "neighbours are one run"


@quick
@given(runs(), runs(copy=True))
def test_without_is_the_difference(average: list[Run], copies: list[Run]) -> None:
    taken = merged(average)
    result = without(merged(copies), taken)
    assert sorted(bytes_of(result)) == sorted(set(bytes_of(copies)) - set(bytes_of(average)))
    assert len(bytes_of(result)) == len(set(bytes_of(result)))
    assert all(run.copy and run.begin < run.end for run in result)


@quick
@given(runs(), runs(copy=True))
def test_gaps_are_the_rest(average: list[Run], copies: list[Run]) -> None:
    inside = merged(average) + without(merged(copies), merged(average))
    rest = gaps(inside, BYTES)
    assert all(begin < end for begin, end in rest)
    assert sorted(bytes_of(inside) + elements(rest)) == list(range(BYTES))


def test_runs_of_different_dtypes_stay_apart_and_may_not_overlap() -> None:
    a, b = Run(0, 8, torch.float64, False), Run(8, 16, torch.float32, False)
    assert merged([b, a]) == [a, b]
    with pytest.raises(ValueError, match=r"shares memory as torch.float32 with a tensor that is torch.float64"):
        merged([a, Run(4, 12, torch.float32, False)])


# ---- through FastEMA ----


@st.composite
def storages(draw: st.DrawFn) -> tuple[Tensor, list[tuple[str, Tensor, str]]]:
    """One buffer, and views of it that are tied, overlapping, strided, averaged or copied."""
    size = draw(st.integers(1, 40))
    room = values(size, dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])))
    views: list[tuple[str, Tensor, str]] = []
    for index in range(draw(st.integers(1, 5))):
        begin = draw(st.integers(0, size))
        end = draw(st.integers(begin, size))
        view = room[begin : end : draw(st.integers(1, 3))]
        if view.numel() % 2 == 0 and draw(st.booleans()):
            view = view.view(2, -1).t() if view.numel() else view
        views.append((str(index), view, draw(st.sampled_from(["average", "copy"]))))
    views.append(("always", room[: draw(st.integers(1, size))], "average"))
    return room, views


@quicker
@given(storages(), st.sampled_from(["native", "torch"]))
def test_every_element_is_averaged_or_copied_once_and_nothing_else_is_touched(
    case: tuple[Tensor, list[tuple[str, Tensor, str]]], backend: str
) -> None:
    if backends.BACKENDS[backend].why_unusable("cpu") is not None:
        backend = "torch"
    room, views = case
    rules = {name: rule for name, _, rule in views}
    averaged, copied = set(), set()
    for _, view, rule in views:
        (averaged if rule == "average" else copied).update(covered(view))
    named = [(name, view) for name, view, _ in views]
    ema = FastEMA(named, decay=0.5, decay_type="constant", backend=backend, policy=lambda name, *_: rules[name])  # type: ignore[arg-type, return-value]
    wide = torch.float32 if room.dtype == torch.bfloat16 else room.dtype
    old = room.to(wide).clone()
    room.copy_(values(room.numel(), dtype=room.dtype, seed=5))
    live = room.clone()
    ema.update()

    expected = live.to(wide).clone()  # copied, or not managed
    index = torch.tensor(sorted(averaged))
    expected[index] = torch.lerp(old[index], live[index].to(wide), 0.5)
    shadow = ema.state_dict()["shadow"]
    for name, view in named:
        wanted = expected.as_strided(view.shape, view.stride(), view.storage_offset())
        assert raw(shadow[name]) == raw(wanted), name
    assert raw(room) == raw(live)
    with ema.swapped():
        assert raw(room) == raw(as_applied(expected, room.dtype))
    assert raw(room) == raw(live)
    rest = [element for element in range(room.numel()) if element not in averaged | copied]
    if rest:
        with ema.swapped():
            room[rest[0]] = 123.0
        live[rest[0]] = 123.0
        assert raw(room) == raw(live)


# ---- through a plan's chunks ----


@pytest.fixture(scope="module")
def native() -> Any:
    module = backends.BACKENDS["native"]
    reason = module.why_unusable("cpu")
    if reason is not None:
        pytest.skip(reason)
    return module


SEGMENTS = st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 5), st.booleans()), min_size=1, max_size=5)


@quicker
@given(segments=SEGMENTS)
def test_chunks_cover_every_element_once(native: Any, segments: list[tuple[int, int, bool]]) -> None:
    """From 0 towards 1 by a half: an element that two chunks cover is at 0.75, one that none covers at 0."""
    rooms = [torch.zeros(offset + size + 4) for size, offset, _ in segments]
    shadows = [room[offset : offset + size] for room, (size, offset, _) in zip(rooms, segments, strict=True)]
    lives = [torch.ones(size) for size, _, _ in segments]
    copies = [copy for _, _, copy in segments]
    plan = plan_of(native, [shadows], lives, copies)
    plan.update(UpdateArgs([0.5], True))
    for room, (size, offset, copy) in zip(rooms, segments, strict=True):
        expected = torch.zeros_like(room)
        expected[offset : offset + size] = 1.0 if copy else 0.5
        assert torch.equal(room, expected)
    plan.exchange(0)
    for shadow, live, copy in zip(shadows, lives, copies, strict=True):
        assert torch.equal(shadow, torch.ones_like(shadow)), "an element changed places twice, or never"
        assert torch.equal(live, torch.full_like(live, 1.0 if copy else 0.5))


def test_chunks_are_cut_at_4096_elements(native: Any) -> None:
    for size, chunks in ((0, 0), (1, 1), (4096, 1), (4097, 2), (3 * 4096, 3)):
        assert plan_of(native, [[torch.zeros(size)]], [torch.zeros(size)]).chunk_count() == chunks
