"""An exception at every point of what FastEMA does: afterwards live and shadow are whole, and training goes on.

Points are bytecodes of fastema's own files, finer than lines: between any two of them Python may deliver Ctrl-C. A
fault in the middle of an operation of torch is one before it, or it has no effect that anyone sees.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastema
from fastema import FastEMA
from fastema.core import compiled, swap

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

PACKAGE = str(Path(fastema.__file__).parent) + os.sep
# Every bytecode takes minutes (`make long`); the suite tries each line, and every so many bytecodes.
EXHAUSTIVE = os.environ.get("FASTEMA_EXHAUSTIVE") == "1"
STRIDE = 1 if EXHAUSTIVE else 151


class Fault(BaseException):
    """Nobody expects it: no `except Exception` sees it, just as KeyboardInterrupt."""


def run_with_fault(action: Callable[[], Any], at: int, opcodes: bool) -> int:
    """Runs `action`, raising Fault at event number `at` in fastema's files. Returns how many events there were."""
    events = 0

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal events
        if event == ("opcode" if opcodes else "line"):
            events += 1
            if events == at:
                raise Fault
        return local

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        # Python itself keeps exceptions in a finalizer.
        if not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_name == "__del__":
            return None
        frame.f_trace = local  # before the next line, or Python 3.13.0 does not see that
        frame.f_trace_opcodes = opcodes
        return local

    before = sys.gettrace()
    if opcodes:
        sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for it once, when tracing begins
    sys.settrace(enter)
    try:
        with torch.enable_grad():  # what a `no_grad` that was cut off between its entry and its block left behind
            action()
    finally:
        sys.settrace(before)
    return events


def faults(build: Callable[[], Any], action: Callable[[Any], Any], lines: int = 1) -> Iterator[tuple[Any, bool]]:
    """(what `build` made, after `action` on it was cut short; whether it was), for every point in `action`.

    `lines`: in the suite, only every so many of them, where there are a thousand that do not matter one by one.
    """
    for opcodes, stride in ((False, 1 if EXHAUSTIVE else lines), (True, STRIDE)):
        for at in itertools.count(1, stride):
            subject = build()
            try:
                run_with_fault(lambda: action(subject), at, opcodes)  # noqa: B023
            except Fault:
                yield subject, True
                continue
            yield subject, False
            assert at > 5, "no event was seen: the test tests nothing"
            break


# --- the exchange -----------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """The tensors that are exchanged."""

    model: nn.Module
    ema: FastEMA
    options: dict[str, Any]
    live: list[Tensor]
    shadows: list[list[Tensor]]
    versions: list[int]

    def averages(self, which: int) -> list[Tensor]:
        state = self.ema.state_dict()["shadow"]
        return list((state[which] if isinstance(state, list) else state).values())


class PartOfAStorage(nn.Module):
    """A weight that covers the middle of its storage; the rest belongs to nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = torch.arange(12.0)
        self.weight = nn.Parameter(self.whole[3:9])


KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "pointer": (lambda: nn.Linear(2, 2), {}, {}),
    "in place": (lambda: nn.Linear(2, 2), {}, {"in_place": True}),
    "mixed dtypes": (lambda: nn.Sequential(nn.Linear(2, 2).half(), nn.LayerNorm(2)), {}, {}),
    "two planes": (lambda: nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.LayerNorm(2)), {}, {}),
    "several decays": (lambda: nn.Linear(2, 2), {"decay": [0.5, 0.9]}, {"which": 1}),
    "part of a storage": (PartOfAStorage, {}, {}),
}


def build_case(kind: str, backend: str) -> Case:
    torch.manual_seed(0)
    build, options, applied = KINDS[kind]
    model = build()
    ema = FastEMA(model, backend=backend, **{"decay": 0.5, **options})
    train(model)
    ema.update()
    case = Case(model, ema, applied, [t.clone() for t in model.state_dict().values()], [], [])
    case.shadows = [[t.clone() for t in case.averages(which)] for which in range(len(options.get("decay", [0])))]
    case.versions = [tensor._version for tensor in model.state_dict().values()]
    return case


def train(model: nn.Module) -> None:
    """A step whose result depends on every live bit."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.25)


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check_whole(case: Case) -> None:
    """Restored or never applied, everything is as at the beginning."""
    assert not case.ema.is_applied
    now = list(case.model.state_dict().values())
    assert equal(now, case.live), "the live weights changed"
    for which, shadow in enumerate(case.shadows):
        assert equal(case.averages(which), shadow), "the shadow changed"
    assert [tensor._version for tensor in now] == case.versions


def check_applied(case: Case) -> None:
    shadow = case.shadows[case.options.get("which", 0)]
    applied = list(case.model.state_dict().values())
    assert equal(applied, [average.to(live.dtype) for average, live in zip(shadow, applied, strict=True)])
    assert all(t._version > version for t, version in zip(applied, case.versions, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_anywhere_in_apply_leaves_it_applied_or_not(backend: str, kind: str) -> None:
    outcomes = set()
    for case, _ in faults(lambda: build_case(kind, backend), lambda case: case.ema.apply_shadow(**case.options)):
        outcomes.add(case.ema.is_applied)
        if case.ema.is_applied:
            check_applied(case)
            case.ema.restore()
        check_whole(case)
        case.ema.apply_shadow(**case.options)
        check_applied(case)
        case.ema.restore()
        check_whole(case)
    assert outcomes == {True, False}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_anywhere_in_restore_can_be_restored_again(backend: str, kind: str) -> None:
    def build() -> Case:
        case = build_case(kind, backend)
        case.ema.apply_shadow(**case.options)
        return case

    for case, _ in faults(build, lambda case: case.ema.restore()):
        if case.ema.is_applied:
            case.ema.restore()
        check_whole(case)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_anywhere_in_a_block_ends_restored(backend: str, kind: str) -> None:
    def validate(case: Case) -> None:
        with case.ema.swapped(**case.options):
            check_applied(case)

    twin = build_case(kind, backend)
    train(twin.model)
    twin.ema.update()
    expected = [*twin.model.state_dict().values(), *twin.averages(0)]
    for case, _ in faults(lambda: build_case(kind, backend), validate):
        if case.ema.is_applied:  # a fault in the very act of restoring
            case.ema.restore()
        check_whole(case)
        train(case.model)
        case.ema.update()
        assert equal([*case.model.state_dict().values(), *case.averages(0)], expected), "training went another way"


def test_an_interrupt_between_apply_and_restore_is_restored_by_the_block(backend: str) -> None:
    case = build_case("pointer", backend)
    with pytest.raises(KeyboardInterrupt), case.ema.swapped():
        check_applied(case)
        raise KeyboardInterrupt
    check_whole(case)


# --- what changes the shadow ------------------------------------------------------------------------------------------


def test_a_fault_anywhere_in_an_update_leaves_every_tensor_before_or_after(backend: str) -> None:
    def build() -> Case:
        case = build_case("several decays", backend)
        train(case.model)
        case.live = [tensor.clone() for tensor in case.model.state_dict().values()]
        return case

    twin = build()
    twin.ema.update()
    after = [twin.averages(which) for which in range(2)]
    for case, cut in faults(build, lambda case: case.ema.update()):
        assert equal(list(case.model.state_dict().values()), case.live)
        for which in range(2):
            for now, old, new in zip(case.averages(which), case.shadows[which], after[which], strict=True):
                assert torch.equal(now, old) or torch.equal(now, new), "torn inside a tensor"
        if case.ema.num_updates == 2:
            assert all(equal(case.averages(which), after[which]) for which in range(2)), "counted before it was done"
        if backend == "native":
            shadows = [case.averages(which) for which in range(2)]
            assert any(all(map(equal, shadows, whole)) for whole in (case.shadows, after)), "one call of C"
        assert cut or case.ema.num_updates == 2
        case.ema.update()  # nothing is in the way of the next


def test_a_fault_anywhere_in_a_rebuild_keeps_the_average(backend: str) -> None:
    def build() -> Case:
        case = build_case("pointer", backend)
        assert isinstance(case.model, nn.Linear)
        case.model.weight = nn.Parameter(case.model.weight.detach().clone())
        return case

    for case, _ in faults(build, lambda case: case.ema.apply_shadow(), lines=4):
        if case.ema.is_applied:
            case.ema.restore()
        assert equal(list(case.model.state_dict().values()), case.live)
        assert equal(case.averages(0), case.shadows[0])
        case.ema.update()
        assert case.ema.num_updates == 2


def test_a_fault_anywhere_in_load_state_dict_loads_all_or_nothing(backend: str) -> None:
    other = build_case("several decays", backend)
    for _ in range(3):
        train(other.model)
        other.ema.update()
    state = other.ema.state_dict()
    loaded = [other.averages(which) for which in range(2)]
    outcomes = set()
    for case, cut in faults(
        lambda: build_case("several decays", backend), lambda case: case.ema.load_state_dict(state)
    ):
        is_loaded = case.ema.num_updates == 4
        assert is_loaded or case.ema.num_updates == 1
        for which in range(2):
            assert equal(case.averages(which), loaded[which] if is_loaded else case.shadows[which])
        assert cut or is_loaded
        outcomes.add(is_loaded)
    assert outcomes == {True, False}


@pytest.mark.parametrize("bad", [{"step": "many"}, {"num_updates": -1}, {"num_updates": None}])
def test_a_state_with_wrong_numbers_loads_nothing(bad: dict[str, Any]) -> None:
    case = build_case("pointer", "torch")
    state = {**case.ema.state_dict(), **bad}
    state["shadow"] = {name: tensor + 1 for name, tensor in state["shadow"].items()}
    with pytest.raises((ValueError, TypeError)):
        case.ema.load_state_dict(state)
    check_whole(case)
    assert case.ema.num_updates == 1


def test_a_fault_anywhere_in_copy_to_copies_all_or_nothing(backend: str) -> None:
    outcomes = set()
    for case, _ in faults(lambda: build_case("pointer", backend), lambda case: case.ema.copy_to()):
        live = list(case.model.state_dict().values())
        copied = equal(live, case.shadows[0])
        assert copied or equal(live, case.live)
        outcomes.add(copied)
    assert outcomes == {True, False}


def test_replaced_tensors_do_not_pass_for_their_averages(backend: str) -> None:
    """Before the next update: a checkpoint would have held the live weights twice."""
    case = build_case("pointer", backend)
    case.model.load_state_dict({name: t.clone() for name, t in case.model.state_dict().items()}, assign=True)
    assert equal(list(case.ema.shadow_state_dict().values()), case.shadows[0])


# --- memory runs out --------------------------------------------------------------------------------------------------


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the n-th allocation of fastema from now on fail, as the allocator does on a full device; 0: none."""
    really_empty = torch.empty
    left = [0]

    def empty(*arguments: Any, **options: Any) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("out of memory")
        return really_empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", empty)

    def fail_at(number: int) -> None:
        left[0] = number

    return fail_at


def test_no_memory_for_the_shadow_leaves_nothing_half_built(backend: str, allocations: Callable[[int], None]) -> None:
    model = nn.Linear(2, 2)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    registered, owners = dict(compiled._updates), set(swap.entered)
    gc.collect()
    alive = count_tensors()
    for number in itertools.count(1):
        allocations(number)
        try:
            ema = FastEMA(model, decay=[0.5, 0.9], decay_type="constant", backend=backend)
            break
        except torch.OutOfMemoryError:
            pass
        assert (compiled._updates, set(swap.entered)) == (registered, owners)
    assert number > 10, "almost nothing is allocated: the test tests nothing"
    allocations(0)
    assert equal(list(model.state_dict().values()), before)
    ema.update()
    del ema
    gc.collect()
    assert count_tensors() <= alive, "something is kept of what was built"


def count_tensors() -> int:
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects())


def test_no_memory_for_the_scratch_of_an_exchange(backend: str, allocations: Callable[[int], None]) -> None:
    case = build_case("mixed dtypes", backend)
    for number in itertools.count(1):
        allocations(number)
        try:
            case.ema.apply_shadow()
        except torch.OutOfMemoryError:
            allocations(0)
            check_whole(case)
            continue
        break
    assert number > 1
    check_applied(case)
    case.ema.restore()
    check_whole(case)


def test_no_memory_to_fill_the_scratch_gives_back_what_it_got(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build_case("mixed dtypes", backend)
    with case.ema.swapped():
        pass
    scratch = [buffer for each in case.ema.engine.averages._swaps.values() for buffer in each._filled]
    assert [stand_in.storage.nbytes() for stand_in in scratch] == [0, 0], "two float16 tensors"
    fill = type(scratch[1]).fill

    def fill_one(stand_in: Any) -> None:
        if stand_in is scratch[1]:
            raise torch.OutOfMemoryError("out of memory")
        fill(stand_in)

    monkeypatch.setattr(type(scratch[1]), "fill", fill_one)
    with pytest.raises(torch.OutOfMemoryError):
        case.ema.apply_shadow()
    assert [stand_in.storage.nbytes() for stand_in in scratch] == [0, 0]
    check_whole(case)


# --- dropped while applied --------------------------------------------------------------------------------------------


def test_an_ema_dropped_while_applied_says_so_and_leaves_the_model_alone(backend: str) -> None:
    case = build_case("pointer", backend)
    case.ema.apply_shadow()
    gone = weakref.ref(case.ema)
    with pytest.warns(RuntimeWarning, match=r"deleted while its weights were applied.*copy_to\(\)"):
        del case.ema
        gc.collect()
    assert gone() is None
    assert equal(list(case.model.state_dict().values()), case.shadows[0])
    FastEMA(case.model, backend=backend).update()  # nobody's averages are in the way


@pytest.mark.filterwarnings("error")
def test_an_ema_dropped_otherwise_says_nothing(backend: str) -> None:
    case = build_case("pointer", backend)
    with case.ema.swapped():
        pass
    del case
    gc.collect()
