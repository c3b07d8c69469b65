"""The test accelerator is worth something only if it bites: what a GPU does to wrong host code happens here as well."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import small_model
from cases.gpu import DEVICE, gpu, on

POISON = 0x7B7B7B7B
BIG = 100_000  # elements: more than a page


def ints(value: int, count: int = BIG) -> Tensor:
    return torch.full((count,), value, dtype=torch.int32, device=DEVICE)


# ---- memory ----

_READ = """
import ctypes, sys, torch
sys.path.insert(0, "tests")
from accelerator.load import load
gpu = load(with_kernels=False)
tensor = torch.ones(4, device="hostgpu")
view = torch.ones(64, device="hostgpu")[32:]
host = torch.ones(4, pin_memory=True)
gpu.synchronize()
print("begin", flush=True)
"""
FAULTS = {
    "the host reads": "ctypes.string_at(tensor.data_ptr(), 4)",
    "the host writes": "ctypes.memset(tensor.data_ptr(), 0, 4)",
    "the host reads while a stream works": "gpu.sleep(0.2); tensor.add_(1); ctypes.string_at(tensor.data_ptr(), 4)",
    # The storage is smaller than the view by now: the fill goes beyond the end of its block.
    "a stream writes beyond the end": "view.untyped_storage().resize_(8); view.fill_(2.0); gpu.synchronize()",
}
ALLOWED = (
    "ctypes.string_at(host.data_ptr(), 4); tensor.add_(1); view.fill_(2.0); gpu.synchronize(); print(tensor.cpu())"
)


def run_script(line: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _READ + line]
    return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)


@pytest.mark.parametrize("what", FAULTS)
def test_access_to_memory_that_is_out_of_reach_faults(what: str) -> None:
    result = run_script(FAULTS[what])
    assert result.stdout == "begin\n", result.stderr
    assert result.returncode == -signal.SIGSEGV, result.stderr


def test_what_is_in_reach_does_not_fault() -> None:
    result = run_script(ALLOWED)
    assert result.returncode == 0, result.stderr
    assert "2., 2., 2., 2." in result.stdout


def copy_behind_a_gate(target: Tensor, source: Tensor) -> tuple[torch.Stream, Any]:
    """Enqueue a copy on another stream, which waits there until the gate is opened; return both."""
    side = torch.Stream(DEVICE)
    gpu.synchronize()
    gate = gpu.Gate(side)
    with on(side):
        target.copy_(source)
    return side, gate


def test_what_is_freed_too_early_is_seen_by_the_stream_that_still_reads_it() -> None:
    source, target = ints(5), ints(0)
    side, gate = copy_behind_a_gate(target, source)
    del source
    gpu.synchronize(1 - torch.accelerator.current_device_index())  # not this device: the gate is shut
    torch.accelerator.current_stream().synchronize()
    gate.open()
    side.synchronize()
    assert bool((target == POISON).all())


def test_record_stream_keeps_it_until_then() -> None:
    source, target = ints(5), ints(0)
    address = source.data_ptr()
    side, gate = copy_behind_a_gate(target, source)
    source.record_stream(side)
    del source
    assert ints(6).data_ptr() != address, "it is not given to anyone yet"
    torch.accelerator.current_stream().synchronize()
    gate.open()
    side.synchronize()
    assert bool((target == 5).all())
    assert ints(7).data_ptr() == address


def test_a_write_to_freed_memory_is_told() -> None:
    target, source = ints(0), ints(3)
    side, gate = copy_behind_a_gate(target, source)
    del target
    torch.accelerator.current_stream().synchronize()
    gate.open()
    side.synchronize()
    assert gpu.take_error() == ""
    ints(1)  # has the same memory
    gpu.synchronize()
    assert gpu.take_error() == "memory was written to after it was freed"


def test_uninitialised_memory_has_no_plausible_values() -> None:
    assert bool((torch.empty(BIG, dtype=torch.int32, device=DEVICE) == POISON).all())


# ---- streams and events ----


@pytest.mark.parametrize("waits", [False, True])
def test_a_missing_wait_for_an_event_gives_another_value(waits: bool) -> None:
    side = torch.Stream(DEVICE)
    source, target = ints(1), ints(0)
    gpu.synchronize()
    gate = gpu.Gate(torch.accelerator.current_stream())
    source.fill_(2)
    written = torch.Event(DEVICE)
    written.record(torch.accelerator.current_stream())
    if waits:
        side.wait_event(written)
    with on(side):
        target.copy_(source)
    if waits:
        assert not written.query()
        gate.open()
    side.synchronize()
    gate.open()
    gpu.synchronize()
    assert bool((target == (2 if waits else 1)).all())


def test_the_host_runs_ahead_of_arithmetic() -> None:
    model = small_model().to(DEVICE)
    features = torch.ones(4, 3, device=DEVICE)
    gpu.synchronize()
    gate = gpu.Gate(torch.accelerator.current_stream())
    before = gpu.tasks()
    with torch.no_grad():
        output = model(features).relu().add_(1)
    assert gpu.tasks() > before + 4 and not torch.accelerator.current_stream().query()
    gate.open()
    assert bool((output >= 1).all())


def test_an_event_stands_for_the_moment_of_its_record() -> None:
    event, stream = torch.Event(DEVICE), torch.accelerator.current_stream()
    event.record(stream)
    event.synchronize()
    gate = gpu.Gate(stream)
    assert event.query(), "what came after does not count"
    event.record(stream)
    assert not event.query()
    gate.open()
    event.synchronize()


def test_a_copy_to_pinned_memory_comes_later_and_one_to_other_memory_does_not() -> None:
    source = ints(4)
    pinned = torch.zeros(BIG, dtype=torch.int32).pin_memory()
    gpu.synchronize()
    gate = gpu.Gate(torch.accelerator.current_stream())
    pinned.copy_(source, non_blocking=True)
    assert pinned.is_pinned() and bool((pinned == 0).all())
    gate.open()
    torch.accelerator.current_stream().synchronize()
    assert bool((pinned == 4).all())
    other = torch.zeros(BIG, dtype=torch.int32)
    other.copy_(source, non_blocking=True)
    assert not other.is_pinned() and bool((other == 4).all())


def test_a_copy_from_pinned_memory_reads_what_is_there_by_then() -> None:
    pinned, plain = (torch.ones(BIG, dtype=torch.int32) for _ in range(2))
    pinned, targets = pinned.pin_memory(), [ints(0), ints(0)]
    gpu.synchronize()
    gate = gpu.Gate(torch.accelerator.current_stream())
    for source, target in zip((pinned, plain), targets, strict=True):
        target.copy_(source, non_blocking=True)
        source.fill_(9)
    gate.open()
    assert bool((targets[0] == 9).all()), "the host was too quick"
    assert bool((targets[1] == 1).all()), "this was staged"


def test_pinned_memory_is_not_reused_while_a_copy_reads_it() -> None:
    pinned, target = torch.ones(BIG, dtype=torch.int32).pin_memory(), ints(0)
    gpu.synchronize()
    gate = gpu.Gate(torch.accelerator.current_stream())
    target.copy_(pinned, non_blocking=True)
    del pinned
    others = [torch.zeros(BIG, dtype=torch.int32).pin_memory() for _ in range(4)]
    gate.open()
    assert bool((target == 1).all()) and not any(bool(other.any()) for other in others)


def test_streams_and_devices_are_those_of_the_thread() -> None:
    side = torch.Stream(f"{DEVICE}:1")
    default = torch.accelerator.current_stream(1)
    with side:
        assert torch.accelerator.current_stream(1) == side and gpu.current_device() == 1
        assert torch.empty(1, device=DEVICE).device.index == 1
    assert torch.accelerator.current_stream(1) == default and gpu.current_device() == 0


def test_an_operation_that_waits_is_refused_where_it_is_asked_for() -> None:
    value = ints(1)
    gpu.set_sync_debug_mode("error")
    try:
        value.add_(1)
        with pytest.raises(RuntimeError, match="synchronizing"):
            value.sum().item()
        with pytest.raises(RuntimeError, match="synchronizing"):
            value.cpu()
    finally:
        gpu.set_sync_debug_mode("default")


# ---- arithmetic ----


def test_a_training_has_the_bits_of_the_cpu() -> None:
    torch.manual_seed(0)
    on_cpu = nn.Sequential(nn.Linear(7, 33), nn.BatchNorm1d(33), nn.GELU(), nn.Linear(33, 5, bias=False))
    on_gpu = nn.Sequential(nn.Linear(7, 33), nn.BatchNorm1d(33), nn.GELU(), nn.Linear(33, 5, bias=False)).to(DEVICE)
    on_gpu.load_state_dict(on_cpu.state_dict())
    features = torch.randn(16, 7)
    for model, its in ((on_cpu, features), (on_gpu, features.to(DEVICE))):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            model(its).square().mean().backward()
            optimizer.step()
    for name, tensor in on_gpu.state_dict().items():
        assert torch.equal(tensor.cpu(), on_cpu.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_copies_follow_strides_dtypes_and_devices(dtype: torch.dtype) -> None:
    values = torch.arange(60).reshape(4, 15)
    first = values.to(f"{DEVICE}:0")
    second = torch.empty(15, 4, dtype=dtype, device=f"{DEVICE}:1").t()
    second.copy_(first)
    assert torch.equal(second.cpu(), values.to(dtype))
    back = torch.zeros(4, 30)[:, ::2]
    back.copy_(second)
    assert torch.equal(back, values.float())
    columns = torch.zeros(4, 30, device=DEVICE)[:, 1::2]
    columns.copy_(values)
    assert torch.equal(columns.cpu(), values.float()) and columns.untyped_storage().nbytes() == 480
