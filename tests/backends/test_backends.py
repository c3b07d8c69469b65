"""The choice of a backend, by argument, environment and machine; and the messages about it."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator

import pytest
import torch

from cases import as_applied, bits, raw, small_model, train, values
from fastema import FastEMA, backends
from fastema.backends import exchange, native
from fastema.backends import torch as plain_torch
from fastema.backends.contract import Segment, UpdateArgs
from fastema.memory.streams import Streams

needs_native = pytest.mark.skipif(native.why_unusable("cpu") is not None, reason="fastema._C is not built")


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend that fastema._C was not built, and that nothing was warned of yet."""
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.delenv("FASTEMA_BACKEND", raising=False)
    yield


@needs_native
def test_auto_takes_the_kernels_on_a_cpu() -> None:
    assert backends.select("auto", "cpu") is native
    assert FastEMA(small_model(), backend="auto").backend_name == "native"


def test_by_name() -> None:
    assert backends.select("torch", "cpu") is plain_torch
    assert FastEMA(small_model(), backend="torch").backend_name == "torch"


def test_the_environment_sets_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTEMA_BACKEND", "torch")
    assert FastEMA(small_model()).backend_name == "torch"
    monkeypatch.setenv("FASTEMA_BACKEND", "")
    assert backends.default_name() == "auto"
    monkeypatch.delenv("FASTEMA_BACKEND")
    assert backends.default_name() == "auto"


@needs_native
def test_the_argument_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTEMA_BACKEND", "torch")
    assert FastEMA(small_model(), backend="native").backend_name == "native"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown backend 'fast'") as error:
        backends.select("fast", "cpu")
    for name in ("auto", *backends.BACKENDS):
        assert name in str(error.value)


def test_asking_for_what_cannot_run_says_why(no_native: None) -> None:
    with pytest.raises(ValueError, match=r"backend 'native' cannot run on cpu: fastema._C is not available") as error:
        FastEMA(small_model(), backend="native")
    assert "`python -m fastema build` compiles it" in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_backend_runs_on_cuda_without_a_device() -> None:
    for name in ("native", "torch"):
        assert backends.BACKENDS[name].why_unusable("cuda") is not None
        with pytest.raises(ValueError, match=f"backend {name!r} cannot run on cuda: "):
            backends.select(name, "cuda")


def test_the_report_has_a_line_for_each_backend_and_device() -> None:
    lines = {line.name: line for line in backends.report()}
    gpu = "cuda:0" if torch.cuda.is_available() else "cuda"
    assert {"native (cpu)", f"native ({gpu})", "torch (cpu)", f"torch ({gpu})"} <= set(lines)
    assert lines["torch (cpu)"].usable
    assert all(line.detail for line in lines.values()), "a reason, or what runs"
    assert lines["native (cpu)"].usable == (native.why_unusable("cpu") is None)
    if lines["native (cpu)"].usable:
        assert native._C.cpu_isa() in lines["native (cpu)"].detail


def test_the_report_without_native(no_native: None) -> None:
    lines = {line.name: line for line in backends.report()}
    assert not lines["native (cpu)"].usable
    assert "fastema._C is not available" in lines["native (cpu)"].detail
    assert lines["torch (cpu)"].usable


def test_without_native_it_warns_once(no_native: None) -> None:
    with pytest.warns(UserWarning, match="torch backend on cpu, slower .*fastema._C is not available"):
        FastEMA(small_model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FastEMA(small_model())
        FastEMA(small_model(), backend="torch")


# ---- backends that are built, but cannot run on this very device ----

T4, NEW = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, torch.device], str]:
    """Two GPUs on which native and triton are built; what is put in here keeps one from running on one of them."""
    reasons: dict[tuple[str, torch.device], str] = {}
    for backend in (native, backends.triton):
        monkeypatch.setattr(backend, "why_unusable", lambda device_type: None)
        monkeypatch.setattr(backend, "probe", lambda device, name=backend.NAME: reasons.get((name, device)))
        monkeypatch.setattr(backend, "describe", lambda device_type: "kernels")
    monkeypatch.setattr(plain_torch, "why_unusable", lambda device_type: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(backends, "_warned", set())
    return reasons


def test_a_backend_that_cannot_launch_is_passed_over_with_one_warning(
    two_gpus: dict[tuple[str, torch.device], str],
) -> None:
    two_gpus["native", T4] = "no kernel image is available"
    with pytest.warns(UserWarning, match="runs its triton backend on cuda:0: native: no kernel image") as caught:
        assert backends.select("auto", T4) is backends.triton
        assert backends.select("auto", T4) is backends.triton
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("auto", NEW) is native
        assert backends.select("auto", "cuda") is native, "the current one"


def test_where_no_kernel_can_launch_torch_is_taken_and_both_reasons_are_said(
    two_gpus: dict[tuple[str, torch.device], str],
) -> None:
    two_gpus["native", T4], two_gpus["triton", T4] = "no kernel image", "no C compiler"
    with pytest.warns(
        UserWarning, match="torch backend on cuda:0.*native: no kernel image; triton: no C compiler"
    ) as caught:
        assert backends.select("auto", T4) is plain_torch
    assert len(caught) == 1


def test_a_named_backend_that_cannot_launch_raises(two_gpus: dict[tuple[str, torch.device], str]) -> None:
    two_gpus["triton", NEW] = "no C compiler"
    assert backends.select("triton", T4) is backends.triton
    with pytest.raises(ValueError, match="backend 'triton' cannot run on cuda:1: no C compiler"):
        backends.select("triton", "cuda")


def test_the_report_tells_devices_apart(two_gpus: dict[tuple[str, torch.device], str]) -> None:
    two_gpus["native", T4] = "no kernel image"
    lines = {line.name: line for line in backends.report()}
    assert not lines["native (cuda:0)"].usable and lines["native (cuda:0)"].detail == "no kernel image"
    assert lines["native (cuda:1)"].usable and lines["triton (cuda:0)"].usable
    assert "native (cuda)" not in lines


def test_the_probe_of_native_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Built:
        @staticmethod
        def probe_cuda(index: int) -> str | None:
            return "no kernel image is available" if index == 0 else None

    monkeypatch.setattr(native, "_C", Built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    native.probe.cache_clear()
    reason = native.probe(T4)
    assert reason is not None and "cannot run on Tesla T4 (no kernel image is available)" in reason
    assert 'TORCH_CUDA_ARCH_LIST="7.5"' in reason
    assert native.probe(NEW) is None and native.probe(torch.device("cpu")) is None
    native.probe.cache_clear()


@needs_native
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_compiled_probe_has_a_reason_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native._C.has_cuda():
        assert native._C.probe_cuda(0) == "fastema._C was built without CUDA"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    native.probe.cache_clear()
    assert native.probe(T4) is not None
    native.probe.cache_clear()


# ---- found_inf, on every device ----


def test_found_inf_is_copied_to_each_device_before_any_plan_sees_it() -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    skip = torch.zeros(1)
    copies = backends.skips_on([cpu, meta, cpu], skip)
    assert [copy.device for copy in copies if copy is not None] == [cpu, meta, cpu]
    assert copies[0] is copies[2] and copies[0].data_ptr() == skip.data_ptr(), "no copy where it is"
    assert backends.skips_on([cpu, meta], None) == [None, None]


@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.zeros(1, dtype=torch.int64), torch.zeros(0)])
def test_a_wrong_found_inf_is_refused_before_anything_is_averaged(wrong: torch.Tensor) -> None:
    model = small_model()
    ema = FastEMA(model, decay=0.5)
    train(model)
    before = {name: raw(tensor) for name, tensor in ema.shadow_state_dict().items()}
    with pytest.raises(ValueError, match=r"found_inf must be 1 torch\.float32, got"):
        ema.engine.averages.plans.update(UpdateArgs([0.5], True, wrong))
    assert {name: raw(tensor) for name, tensor in ema.shadow_state_dict().items()} == before


def test_every_plan_of_a_model_gets_found_inf_on_its_own_device() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[torch.Tensor | None] = []

        def update(self, args: UpdateArgs) -> None:
            self.seen.append(args.skip)

    plans = FastEMA(small_model(), decay=0.5).engine.averages.plans
    plans.by_device = [Recorder(), Recorder()]
    plans.devices = [torch.device("meta"), torch.device("cpu")]
    plans.update(UpdateArgs([0.5], True, torch.ones(1)))
    assert [plan.seen[0].device.type for plan in plans.by_device] == ["meta", "cpu"]


# ---- memory on streams ----


def test_memory_is_recorded_once_on_every_stream_that_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        stream = "first"

        def current_stream(self, device: torch.device) -> str:
            return self.stream

    class Memory:
        def __init__(self) -> None:
            self.streams: list[str] = []

        def record_stream(self, stream: str) -> None:
            self.streams.append(stream)

    gpu, memory = Gpu(), Memory()
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpu)
    streams = Streams(T4, [memory])  # type: ignore[list-item]
    for gpu.stream in ("first", "second", "first", "second"):
        streams.note_current()
    assert memory.streams == ["first", "second"]
    monkeypatch.undo()
    on_cpu = Streams(torch.device("cpu"), [memory])  # type: ignore[list-item]
    on_cpu.note_current()
    assert memory.streams == ["first", "second"]


def test_what_was_captured_outlives_a_rebuild() -> None:
    model = small_model()
    ema = FastEMA(model, capturable=True)
    captured, ordinary = weakref.ref(ema.engine.averages), FastEMA(small_model())
    ema.engine.averages.is_on_cpu = False  # as on a GPU
    model[0].weight.data = model[0].weight.data.clone()
    ema.update()
    gc.collect()
    assert captured() is not None and captured() is not ema.engine.averages
    assert not copy.deepcopy(ema).engine._captured
    del ema, ordinary
    gc.collect()
    assert captured() is None


@pytest.mark.filterwarnings("ignore:fastema runs its torch backend")
def test_without_native_everything_works(no_native: None) -> None:
    model = small_model()
    ema = FastEMA(model, decay=0.5, decay_type="constant")
    assert ema.backend_name == "torch"
    assert ema.engine.averages._host is plain_torch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema.attach(optimizer)
    graph = model(values(4, 3)).sum()
    live = bits(model)
    for in_place in (False, True):
        with ema.swapped(in_place):
            pass
        assert bits(model) == live
    graph.backward()
    optimizer.step()
    assert ema.num_updates == 1
    train(model)
    twin = FastEMA(small_model(seed=4), decay=0.5, decay_type="constant")
    twin.load_state_dict(ema.state_dict())
    for name, tensor in ema.state_dict()["shadow"].items():
        assert raw(twin.state_dict()["shadow"][name]) == raw(tensor)
    model[0].weight.data = model[0].weight.data.clone()
    ema.update()
    ema.copy_to()


def test_a_torch_that_cannot_swap_storages_exchanges_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 has no UntypedStorage._swap_data_ptr_: the torch backend copies, and is as exact."""
    monkeypatch.setattr(exchange, "SWAPS_POINTERS", False)
    assert "cannot swap storages" in plain_torch.describe("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        model = small_model(dtype)
        ema = FastEMA(model, decay=0.5, decay_type="constant", backend="torch")
        train(model)
        ema.update()
        train(model)
        live, average = (
            bits(model),
            {n: as_applied(t, model.state_dict()[n].dtype) for n, t in ema.shadow_state_dict().items()},
        )
        address = model[0].weight.data_ptr()
        expected = {name: raw(tensor) for name, tensor in average.items()}
        with ema.swapped():
            assert bits(model) == expected
            assert model[0].weight.data_ptr() == address
            assert {n: raw(as_applied(t, average[n].dtype)) for n, t in ema.shadow_state_dict().items()} == expected
        assert bits(model) == live


@pytest.mark.slow
@needs_native
def test_the_instruction_set_can_be_lowered_by_the_environment() -> None:
    code = "import torch, fastema._C as c; print(c.cpu_isa())"
    for wanted in ("baseline", "avx2"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "FASTEMA_CPU_ISA": wanted},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert run.stdout.strip() in ("baseline", wanted)


# ---- the contract of the three classes, on either backend ----


def test_watch_notices_what_changes(backend: str) -> None:
    weight = values(4, 6)
    slots: dict[str, object] = {"a": weight, "b": None}

    def watch() -> object:
        return backends.host(backend).Watch([slots], [weight])

    watched = watch()
    assert watched.holds()  # type: ignore[attr-defined]
    slots["b"] = torch.ones(1)
    assert not watched.holds()  # type: ignore[attr-defined]
    watched = watch()
    slots["c"] = None
    assert not watched.holds()  # type: ignore[attr-defined]
    del slots["c"]
    assert watched.holds()  # type: ignore[attr-defined]
    slots["a"] = weight.clone()
    assert not watched.holds()  # type: ignore[attr-defined]
    watched = watch()
    weight.data = weight.data.clone()
    assert not watched.holds()  # type: ignore[attr-defined]
    watched = watch()
    weight.add_(1)
    assert watched.holds()  # type: ignore[attr-defined]
    weight.data = weight.data.as_strided((4, 6), (1, 4))
    assert not watched.holds()  # type: ignore[attr-defined]


def test_storage_exchange_refuses_what_does_not_fit(backend: str) -> None:
    a, b, small = torch.arange(4.0), torch.arange(4.0) + 10, torch.zeros(3)
    exchange = backends.host(backend).StorageExchange([a, a.clone()], [b, small], [])
    with pytest.raises(ValueError, match=r"change places"):
        exchange.enter(1)
    assert not exchange.entered
    assert a.tolist() == [0, 1, 2, 3], "nothing is changed before the check"
    assert b.tolist() == [10, 11, 12, 13]


def test_storage_exchange_enters_and_leaves_in_turn(backend: str) -> None:
    a, b = torch.arange(4.0), torch.arange(4.0) + 10
    exchange = backends.host(backend).StorageExchange([a], [b], [a])
    with pytest.raises(RuntimeError, match="not entered"):
        exchange.leave()
    exchange.enter(1000)
    assert a.tolist() == [10, 11, 12, 13]
    assert exchange.entered
    with pytest.raises(RuntimeError, match="already entered"):
        exchange.enter(1000)
    exchange.leave()
    assert a.tolist() == [0, 1, 2, 3]
    assert a._version == 0


def test_plan_refuses_what_does_not_fit() -> None:
    pytest.importorskip("fastema._C")
    ones, integers = torch.ones(4), torch.ones(4, dtype=torch.int64)
    first = Segment([ones.clone()], ones, copy=False)
    cases = [
        (first._replace(shadows=[torch.ones(3)]), "equal length"),
        (first._replace(shadows=[torch.ones(2, 2)]), "1-D"),
        (first._replace(shadows=[torch.ones(8)[::2]]), "contiguous"),
        (first._replace(shadows=[ones, ones]), "as many shadows"),
        (first._replace(lows=[ones, ones]), "as many low planes"),
        (first._replace(shadows=[integers.clone()], live=integers), "no kernel"),
        (first._replace(live=integers, copy=True), "no kernel"),
    ]
    for segment, words in cases:
        with pytest.raises(ValueError, match=words):
            native.Plan([first, segment], [])
    with pytest.raises(ValueError, match="at least one shadow"):
        native.Plan([first._replace(shadows=[])], [])


def test_a_plan_without_segments_only_raises_versions(backend: str) -> None:
    view = torch.zeros(2)
    plan = backends.BACKENDS[backend].Plan([], [view])
    plan.update(UpdateArgs([0.5, 0.25], True))
    plan.exchange(0)
    assert (view._version, plan.nonfinite_count()) == (1, 0)
