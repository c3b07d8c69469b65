"""A shadow averaged by a thread, behind a copy that is slow on purpose: whatever is out of order has wrong values."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import bits, raw, small_model, train, values
from fastema import FastEMA
from fastema.backends.contract import Segment, UpdateArgs
from fastema.core import offload

pytestmark = pytest.mark.usefixtures("one_thread")


class SlowCopy:
    """A copy in a thread, as late as it may come: what a stream orders by an event, the caller waits for here."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], transfer: SlowTransfer) -> None:
        self._transfer = transfer
        self._pairs = list(pairs)
        self.done = threading.Event()
        self._hurry = threading.Event()
        self._error = transfer.error
        transfer.error = None
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self._hurry.wait(self._transfer.delay)
        self._transfer.gate.wait()
        if self._error is None:
            for host, device in self._pairs:
                host.copy_(device)
        self.done.set()

    def order_writes(self) -> None:
        if self._transfer.orders:
            self._hurry.set()
            self.done.wait()

    def wait(self) -> None:
        self.done.wait()
        if self._error is not None:
            raise self._error


class SlowTransfer:
    """From CPU memory to CPU memory."""

    def __init__(self) -> None:
        self.delay = 0.1  # seconds that a copy takes which nothing waits for in order to write
        self.gate = threading.Event()  # closed: nothing is copied
        self.gate.set()
        self.orders = True
        self.error: Exception | None = None  # of the next copy
        self.copies: list[SlowCopy] = []

    def host_memory(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)  # NaN, until it is copied to

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> SlowCopy:
        self.copies.append(SlowCopy(pairs, self))
        return self.copies[-1]

    def open_later(self) -> None:
        threading.Timer(0.03, self.gate.set).start()


class Seam:
    """In place of `offload.transfer_between`: all that is built now is offloaded."""

    def __init__(self) -> None:
        self.transfers: list[SlowTransfer] = []
        self._is_on = True

    def __call__(self, live: torch.device, shadow: torch.device) -> SlowTransfer | None:
        if self._is_on:
            self.transfers.append(SlowTransfer())
        return self.last if self._is_on else None

    @property
    def last(self) -> SlowTransfer:
        return self.transfers[-1]

    @contextmanager
    def off(self) -> Iterator[None]:
        self._is_on = False
        yield
        self._is_on = True


@pytest.fixture
def seam(monkeypatch: pytest.MonkeyPatch) -> Seam:
    seam = Seam()
    monkeypatch.setattr(offload, "transfer_between", seam)
    return seam


def averages(ema: FastEMA) -> list[dict[str, bytes]]:
    """Return the averages of every decay as bytes."""
    return [
        {name: raw(tensor) for name, tensor in ema.shadow_state_dict(which=which).items()}
        for which in range(len(ema.counter.decays))
    ]


def pair(seam: Seam, model: nn.Module | None = None, **arguments: Any) -> tuple[FastEMA, FastEMA, nn.Module, nn.Module]:
    """Return an offloaded and an ordinary average of equal models; neither reads nonfinite_count() by itself."""
    model = small_model() if model is None else model
    twin = copy.deepcopy(model)
    arguments = {"decay": 0.5, "decay_type": "constant", **arguments}
    offloaded = FastEMA(model, **arguments)
    with seam.off():
        ordinary = FastEMA(twin, **arguments)
    offloaded.engine.averages.is_on_cpu = ordinary.engine.averages.is_on_cpu = False
    assert offloaded.engine.averages.plans.offloaded and not ordinary.engine.averages.plans.offloaded
    return offloaded, ordinary, model, twin


def mixed_model(dtype: torch.dtype) -> nn.Module:
    model = small_model(dtype)
    model[3].half_part = nn.Parameter(values(7, 33, dtype=torch.bfloat16))  # not used by forward
    model.register_buffer("steps", torch.tensor(3))
    return model


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    dtype = next(model.parameters()).dtype
    features = values(6, 3, dtype=torch.float32, seed=seed).to(dtype) / 100
    optimizer.zero_grad()
    model(features).float().square().mean().backward()  # writes the running statistics
    optimizer.step()


# ---- the values ----


@pytest.mark.parametrize(("dtype", "block"), [(torch.float32, 128), (torch.bfloat16, 128), (torch.float32, 64 << 20)])
def test_fifty_steps_have_the_bits_of_an_ordinary_average(
    seam: Seam, backend: str, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "_BLOCK", block)
    emas = pair(seam, mixed_model(dtype), decay=[0.9, 0.99], decay_type="threshold", update_every=2, backend=backend)
    for ema, model in zip(emas[:2], emas[2:], strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        ema.attach(optimizer)
        for seed in range(50):
            train_step(model, optimizer, seed)
    assert bits(emas[2]) == bits(emas[3]), "the trainings are equal"
    assert averages(emas[0]) == averages(emas[1])
    assert emas[0].num_updates == emas[1].num_updates == 25
    assert emas[0].backend_name == backend


def test_weights_may_be_overwritten_right_after_an_update(seam: Seam) -> None:
    ema, ordinary, model, twin = pair(seam)
    for seed in range(5):
        for each, its in ((ema, model), (ordinary, twin)):
            train(its, seed)
            each.update()
            train(its, seed + 100)
    assert averages(ema) == averages(ordinary)


def test_without_the_order_of_writes_the_values_would_be_wrong(seam: Seam) -> None:
    ema, ordinary, model, twin = pair(seam)
    seam.last.orders = False
    seam.last.gate.clear()
    for each, its in ((ema, model), (ordinary, twin)):
        train(its, 1)
        each.update()
        train(its, 101)
    seam.last.gate.set()
    assert averages(ema) != averages(ordinary)


def test_nonfinite_elements_of_other_weights_are_counted(seam: Seam) -> None:
    ema, ordinary, model, twin = pair(seam, decay=[0.5, 0.9])
    for each, its in ((ema, model), (ordinary, twin)):
        with torch.no_grad():
            its[0].weight[0, 0] = float("nan")
            its[0].bias.fill_(float("inf"))
        each.update()
    assert ema.nonfinite_count() == ordinary.nonfinite_count() == 6
    assert averages(ema) == averages(ordinary)


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_device_scalar_skips_by_the_value_it_had(seam: Seam, found: float) -> None:
    ema, _, model, _ = pair(seam)
    before = averages(ema)
    train(model)
    found_inf = torch.tensor([found])
    ema.engine.averages.plans.update(UpdateArgs([0.5], True, found_inf))  # FastEMA itself looks at a scalar on the host
    found_inf.fill_(1.0 - found)
    assert (averages(ema) == before) == bool(found)


def test_a_device_scalar_must_be_one() -> None:
    plan = offload.OffloadedPlan(
        SlowTransfer(), lambda *_: None, [Segment([torch.zeros(3)], torch.zeros(3), copy=False)], []
    )
    with pytest.raises(ValueError, match="skip must be 1 number on cpu, got 2"):
        plan.update(UpdateArgs([0.5], True, torch.zeros(2)))
    assert not plan._transfer.copies  # type: ignore[attr-defined]


# ---- the order ----


def test_an_attached_step_waits_for_the_copy_and_nothing_before_it_does(seam: Seam) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))  # no buffers: their copy would be waited for
    ema, ordinary, model, twin = pair(seam, model)
    trainings = []
    for each, its in ((ema, model), (ordinary, twin)):
        optimizer = torch.optim.SGD(its.parameters(), lr=0.1)
        each.attach(optimizer)
        trainings.append((its, optimizer))
    slow = seam.last
    slow.gate.clear()
    train_step(*trainings[0], 1)
    late = slow.copies[-1]
    trainings[0][0](torch.ones(2, 3)).sum().backward()
    assert not late.done.is_set(), "forward and backward ran beside the copy"
    slow.open_later()
    train_step(*trainings[0], 2)
    assert late.done.is_set()
    for seed in (1, 2):
        train_step(*trainings[1], seed)
    assert averages(ema) == averages(ordinary)


def test_only_what_attached_optimizers_step_is_left_to_their_hooks(seam: Seam) -> None:
    model = small_model()
    ema = FastEMA(model, decay=0.5, decay_type="constant")
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    handle = ema.attach(optimizer)
    (plan,) = ema.engine.averages.plans.offloaded
    late = {live.untyped_storage().data_ptr() for _, live in plan._deferred}
    assert late == {parameter.data_ptr() for parameter in model[0].parameters()}
    assert len(plan._deferred) + len(plan._immediate) == len(plan._pairs)

    model[0].weight.data = model[0].weight.detach().clone()  # a rebuilt plan knows the optimizer too
    ema.update()
    (rebuilt,) = ema.engine.averages.plans.offloaded
    assert rebuilt is not plan
    late = {live.untyped_storage().data_ptr() for _, live in rebuilt._deferred}
    assert late == {parameter.data_ptr() for parameter in model[0].parameters()}

    handle.remove()
    assert not rebuilt._deferred and len(rebuilt._immediate) == len(rebuilt._pairs)
    assert seam.last.copies[-1].done.is_set(), "the copy under way is ordered before the hooks go"


def test_a_storage_that_others_write_to_as_well_is_safe_at_once(seam: Seam) -> None:
    room = torch.zeros(8)
    stepped, other = nn.Parameter(room[:4]), room[4:]
    ema = FastEMA([("stepped", stepped), ("other", other)])
    ema.attach(torch.optim.SGD([stepped], lr=0.1))
    assert not ema.engine.averages.plans.offloaded[0]._deferred


def test_an_update_waits_for_the_one_before(seam: Seam) -> None:
    ema, ordinary, model, _ = pair(seam, nn.Linear(3, 2))
    ema.attach(torch.optim.SGD(model.parameters(), lr=0.1))  # so that update() alone does not wait for its copy
    slow = seam.last
    slow.gate.clear()
    ema.update()
    second = threading.Thread(target=ema.update, daemon=True)
    second.start()
    second.join(0.05)
    assert second.is_alive(), "one staging buffer: the copy for the second update must not begin"
    assert len(slow.copies) == 1
    slow.gate.set()
    second.join(10)
    assert not second.is_alive()
    ordinary.update()
    ordinary.update()
    assert averages(ema) == averages(ordinary) and ema.num_updates == 2


def swapped_bits(ema: FastEMA) -> dict[str, bytes]:
    with ema.swapped():
        return bits(ema.source)  # type: ignore[arg-type]


def copied_bits(ema: FastEMA) -> dict[str, bytes]:
    target = small_model(seed=7)
    ema.copy_to(target)
    return bits(target)


def saved(ema: FastEMA) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    return torch.load(file)["shadow"]


def synchronized(ema: FastEMA) -> list[bytes]:
    ema.synchronize()
    return [raw(pair.averages[0].view) for pair in ema.engine.averages.pairs]


READERS: dict[str, Callable[[FastEMA], Any]] = {
    "synchronize": synchronized,
    "swapped": swapped_bits,
    "state_dict": lambda ema: {name: raw(tensor) for name, tensor in saved(ema).items()},
    "shadow_state_dict": averages,
    "copy_to": copied_bits,
    "nonfinite_count": lambda ema: ema.nonfinite_count(),
    "pickle": lambda ema: averages(pickle.loads(pickle.dumps(ema))),
    "deepcopy": lambda ema: averages(copy.deepcopy(ema)),
}


@pytest.mark.parametrize("reader", READERS)
def test_who_reads_the_average_waits_for_it(seam: Seam, reader: str) -> None:
    ema, ordinary, model, twin = pair(seam)
    ema.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    slow = seam.last
    for each, its in ((ema, model), (ordinary, twin)):
        train(its)
        with torch.no_grad():
            its[0].weight[0, 0] = float("nan")
        if each is ema:
            slow.gate.clear()
            slow.open_later()
        each.update()
    expected = READERS[reader](ordinary)
    assert READERS[reader](ema) == expected
    assert bits(model) == bits(twin)


def test_what_is_loaded_is_not_averaged_over(seam: Seam) -> None:
    ema, ordinary, model, _ = pair(seam, nn.Linear(3, 2))
    ema.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    state = copy.deepcopy(ordinary.state_dict())
    train(model)
    seam.last.gate.clear()
    seam.last.open_later()
    ema.update()
    ema.load_state_dict(state)
    ema.synchronize()
    assert averages(ema) == averages(ordinary)


def test_weights_that_move_while_they_are_copied(seam: Seam) -> None:
    ema, ordinary, model, twin = pair(seam)
    ema.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    for seed in range(3):
        for each, its in ((ema, model), (ordinary, twin)):
            train(its, seed)
            each.update()
            for parameter in its.parameters():
                parameter.data = parameter.detach().clone() + 1.0
    assert averages(ema) == averages(ordinary)


def test_stand_ins_of_another_dtype_are_swapped_in(seam: Seam) -> None:
    model = small_model(torch.bfloat16)
    ema = FastEMA(model, decay=0.5, decay_type="constant")
    train(model)
    live = bits(model)
    ema.update()
    expected = {name: raw(tensor.bfloat16()) for name, tensor in ema.shadow_state_dict().items() if "num" not in name}
    with ema.swapped():
        assert {name: each for name, each in bits(model).items() if "num" not in name} == expected
        with pytest.raises(RuntimeError, match="while the EMA weights are applied"):
            ema.update()
    assert bits(model) == live


# ---- what goes wrong ----


@pytest.mark.parametrize(
    "reader",
    [FastEMA.update, FastEMA.synchronize, FastEMA.apply_shadow, FastEMA.state_dict, FastEMA.nonfinite_count, repr],
    ids=lambda reader: reader.__name__,
)
def test_an_error_in_the_thread_is_told_once(seam: Seam, reader: Callable[[FastEMA], Any]) -> None:
    ema, ordinary, model, twin = pair(seam)
    before, live = averages(ema), bits(model)
    seam.last.error = OSError("the bus is gone")
    ema.update()
    if reader is repr:
        assert "FastEMA" in repr(ema), "which reads no average, and says nothing of it"
        reader = FastEMA.synchronize
    with pytest.raises(RuntimeError, match="the latest update is lost") as caught:
        reader(ema)
    assert isinstance(caught.value.__cause__, OSError)
    assert not ema.is_applied and bits(model) == live
    assert averages(ema) == before, "told once"
    for each, its in ((ema, model), (ordinary, twin)):
        train(its)
        each.update()
    assert averages(ema) == averages(ordinary), "and goes on"
    assert seam.last.copies[-1].done.is_set()


def test_an_update_that_tells_an_error_does_not_count(seam: Seam) -> None:
    ema, *_ = pair(seam)
    seam.last.error = OSError("the bus is gone")
    ema.update()
    with pytest.raises(RuntimeError):
        ema.update()
    assert ema.num_updates == 1 and ema.state_dict()["step"] == 1


def test_a_compiled_step_is_refused(seam: Seam) -> None:
    ema, *_ = pair(seam)
    with pytest.raises(Exception, match="outside the compiled function"):
        torch.compile(ema.update, backend="eager", fullgraph=True)()
    torch._dynamo.reset()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastema-offload")]


def test_the_thread_and_the_memory_go_with_the_ema(seam: Seam) -> None:
    gc.collect()
    before = set(threads())
    model = small_model()
    ema = FastEMA(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema.attach(optimizer)
    train_step(model, optimizer, 1)
    (thread,) = set(threads()) - before
    shadow = weakref.ref(ema.engine.averages)
    plan = weakref.ref(ema.engine.averages.plans.offloaded[0])
    del ema, model, optimizer
    gc.collect()
    thread.join(10)
    assert not thread.is_alive() and shadow() is None and plan() is None


def run_script(script: str) -> str:
    head = "import sys; sys.path[:0] = [sys.argv[1]]\nfrom test_offload import *\n"
    head += "seam = offload.transfer_between = Seam()\nmodel = small_model()\nema = FastEMA(model, decay=0.5)\n"
    done = subprocess.run(
        [sys.executable, "-c", head + script, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_interpreter_ends_while_something_is_averaged() -> None:
    script = "ema.attach(torch.optim.SGD(model.parameters(), lr=1.0))\nema.update()\nprint('end')"
    assert run_script(script) == "end\n"


FORK = """
import os
state = averages(ema)
ema.attach(torch.optim.SGD(model.parameters(), lr=1.0))
ema.update()
ema.synchronize()
def child(check):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            check()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
def reads():
    assert averages(ema)
def goes_on():
    with seam.off():
        twin = copy.deepcopy(ema)
    train(model); train(twin.source)
    ema.update(); twin.update()
    assert averages(ema) == averages(twin)
def refuses():
    for _ in range(2):
        try:
            ema.state_dict()
        except RuntimeError as error:
            assert "forked" in str(error)
        else:
            raise AssertionError
child(reads)
child(goes_on)
model = nn.Linear(3, 2)  # no buffers, whose copy update() would wait for
ema = FastEMA(model)
ema.attach(torch.optim.SGD(model.parameters(), lr=1.0))
seam.last.gate.clear()
ema.update()
child(refuses)
seam.last.gate.set()
ema.state_dict()
print("end")
"""


@pytest.mark.slow
def test_a_forked_process_reads_what_is_done_and_refuses_what_is_half_done() -> None:
    assert run_script(FORK) == "end\n"


# ---- who gets it ----


def test_weights_on_the_cpu_are_averaged_directly() -> None:
    assert not FastEMA(small_model(), device="cpu").engine.averages.plans.offloaded
    cpu, cuda, meta = (torch.device(name) for name in ("cpu", "cuda:0", "meta"))
    assert offload.transfer_between(cpu, cpu) is None
    assert offload.transfer_between(cuda, cuda) is None
    assert offload.transfer_between(meta, cpu) is None


def test_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload.streams, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a replay would run no average"):
        offload._refuse_capture("update()")


# ---- the copy on a stream, as far as it goes without a device; tests/accelerator has the rest ----


def test_the_event_that_a_thread_waits_for_lets_it_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that spins takes a core from the training."""
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking=False: blocking)
    assert offload.streams.new_event(torch.device("cuda", 1)) is True


def test_stream_and_event_are_of_one_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch.cuda.Event does not work on a torch.Stream, which lacks what the event needs."""
    for kind in ("cuda", "xpu"):
        for name in ("Stream", "Event"):
            monkeypatch.setattr(
                torch.get_device_module(kind), name, lambda *_, kind=kind, name=name, **__: f"{kind} {name}"
            )
        device = torch.device(kind, 0)
        assert offload.streams.new_stream(device) == f"{kind} Stream"
        assert offload.streams.new_event(device) == f"{kind} Event"


def test_the_thread_waits_with_its_device_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread starts on device 0: waiting there for another device's event makes a context on both."""
    happened: list[str] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            happened.append(f"set {self.device}")

        def __exit__(self, *error: object) -> None:
            happened.append("reset")

    class Event:
        def synchronize(self) -> None:
            happened.append("wait")

    monkeypatch.setattr(torch.cuda, "device", Guard)
    offload.StreamCopy(torch.device("cuda", 1), Event()).wait()  # type: ignore[arg-type]
    assert happened == ["set cuda:1", "wait", "reset"]
