"""Which backend runs: by argument, by environment, by what this machine has; and what the user is told."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

from cases import bits, raw, small_model, train, values
from fastema import FastEMA, backends
from fastema.backends import native
from fastema.backends import torch as plain_torch

needs_native = pytest.mark.skipif(native.why_unusable("cpu") is not None, reason="fastema._C is not built")


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where fastema._C was not built, and nobody was told yet."""
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
    assert "reinstall" in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_backend_runs_on_cuda_without_a_device() -> None:
    for name in ("native", "torch"):
        assert backends.BACKENDS[name].why_unusable("cuda") is not None
        with pytest.raises(ValueError, match=f"backend {name!r} cannot run on cuda: "):
            backends.select(name, "cuda")


def test_the_report_has_a_line_for_each_backend_and_device() -> None:
    lines = {line.name: line for line in backends.report()}
    assert {"native (cpu)", "native (cuda)", "torch (cpu)", "torch (cuda)"} <= set(lines)
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


@pytest.mark.filterwarnings("ignore:fastema runs its torch backend")
def test_without_native_everything_works(no_native: None) -> None:
    model = small_model()
    ema = FastEMA(model, decay=0.5, decay_type="constant")
    assert ema.backend_name == "torch"
    assert ema._shadow._host is plain_torch
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
    monkeypatch.setattr(plain_torch, "_SWAPS_POINTERS", False)
    assert "cannot swap storages" in plain_torch.describe("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        model = small_model(dtype)
        ema = FastEMA(model, decay=0.5, decay_type="constant", backend="torch")
        train(model)
        ema.update()
        train(model)
        live, average = bits(model), {n: t.to(model.state_dict()[n].dtype) for n, t in ema.shadow_state_dict().items()}
        address = model[0].weight.data_ptr()
        expected = {name: raw(tensor) for name, tensor in average.items()}
        with ema.swapped():
            assert bits(model) == expected
            assert model[0].weight.data_ptr() == address
            assert {n: raw(t.to(average[n].dtype)) for n, t in ema.shadow_state_dict().items()} == expected
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
    cases = [
        ([torch.ones(3)], [ones], [False], "equal length"),
        ([torch.ones(2, 2)], [ones], [False], "1-D"),
        ([torch.ones(8)[::2]], [ones], [False], "contiguous"),
        ([ones.clone()], [ones], [], "equal lengths"),
        ([integers.clone()], [integers], [False], "no kernel"),
        ([ones.clone()], [integers], [True], "no kernel"),
    ]
    for shadows, lives, copies, words in cases:
        with pytest.raises(ValueError, match=words):
            native.Plan([shadows], lives, copies, [])
