"""Checkpoints and snapshots that a thread writes: the same files, while the training goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastema.checkpoint as checkpoint_module
from fastema import FastEMA
from fastema.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, synchronize
from fastema.posthoc import SnapshotError, Snapshots, snapshot_files, snapshots


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    synchronize()


def trained(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, FastEMA, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)
    model[2].register_parameter("tied", model[0].weight)
    ema, optimizer = FastEMA(model, decay_type="power", sigma_rel=[0.05, 0.1]), torch.optim.AdamW(model.parameters())
    ema.attach(optimizer)
    step(model, optimizer)
    return model, ema, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(8, 3, dtype=next(model.parameters()).dtype)).sum().backward()
    optimizer.step()


class Held:
    """A function that waits until the test opens it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.gate, self.function, self.entered = threading.Event(), function, threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.entered.set()
        assert self.gate.wait(60)
        return self.function(*args, **kwargs)


def fails(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


# ---- checkpoints ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("applied", [False, True])
def test_a_checkpoint_has_the_bytes_that_it_had_when_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, applied: bool
) -> None:
    model, ema, optimizer = trained(dtype)
    content = {
        "net": model,
        "ema": ema,
        "optimizer": optimizer,
        "kept": model[0].weight,  # a parameter
        "view": torch.arange(10).view(2, 5).t()[1:],
        "conj": torch.ones(2, dtype=torch.complex64).conj(),
        "imag": torch.ones(2, dtype=torch.complex64).conj().imag,
        "nothing": torch.empty(0),
        "plain": {"list": [1, 2.5, None, ("a", torch.ones(2, requires_grad=True))]},
    }
    if applied:
        ema.apply_shadow()
    save_checkpoint(tmp_path / "a.pth", **content)
    held = Held(checkpoint_module._write)
    monkeypatch.setattr(checkpoint_module, "_write", held)
    save_checkpoint(tmp_path / "b.pth", background=True, **content)
    if applied:
        ema.restore()
    for _ in range(3):
        step(model, optimizer)
    content["plain"]["list"].append("later")
    assert not (tmp_path / "b.pth").exists()
    held.gate.set()
    synchronize()
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_second_save_waits_and_uses_the_memory_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ema, _ = trained()
    held = Held(checkpoint_module._write)
    monkeypatch.setattr(checkpoint_module, "_write", held)
    save_checkpoint(tmp_path / "a.pth", net=model, ema=ema, background=True)
    writer = checkpoint_module._background
    first = {memory.data_ptr() for memory in writer._taken}
    second = threading.Thread(
        target=save_checkpoint, args=(tmp_path / "b.pth",), kwargs={"net": model, "ema": ema, "background": True}
    )
    second.start()
    assert held.entered.wait(60)
    second.join(0.2)
    assert second.is_alive(), "the first is not written yet"
    held.gate.set()
    second.join(60)
    assert {memory.data_ptr() for memory in writer._taken} == first and not writer._free
    synchronize()
    assert not writer._taken and not writer._free
    assert load_checkpoint(tmp_path / "a.pth").keys() == load_checkpoint(tmp_path / "b.pth").keys()


def test_the_memory_of_a_save_in_inference_mode_is_used_outside_of_it(tmp_path: Path) -> None:
    model, ema, _ = trained()
    with torch.inference_mode():
        save_checkpoint(tmp_path / "a.pth", net=model, ema=ema, background=True)
    save_checkpoint(tmp_path / "b.pth", net=model, ema=ema, background=True)
    synchronize()
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


@pytest.mark.parametrize("following", ["save", "save in the background", "load", "synchronize"])
def test_the_next_call_raises_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, following: str) -> None:
    model, ema, _ = trained()
    target = tmp_path / "a.pth"
    save_checkpoint(target, net=model, ema=ema)
    before = target.read_bytes()
    calls: dict[str, Callable[[], Any]] = {
        "save": lambda: save_checkpoint(tmp_path / "b.pth", net=model),
        "save in the background": lambda: save_checkpoint(tmp_path / "b.pth", net=model, background=True),
        "load": lambda: load_checkpoint(target),
        "synchronize": synchronize,
    }
    with (
        monkeypatch.context() as inside,
        pytest.warns(UserWarning, match="a save in the background failed: cannot write"),
    ):
        inside.setattr(os, "fsync", fails)
        save_checkpoint(target, net=model, ema=ema, background=True)
        with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*a\.pth: No space left"):
            calls[following]()
    assert not (tmp_path / "b.pth").exists()
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]
    calls[following]()  # raised once


@pytest.mark.filterwarnings("ignore:a save in the background failed")
def test_what_no_load_would_accept_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pth", net=nn.Linear(1, 1), odd=threading.local, background=True)
    with pytest.raises(TypeError, match="load_checkpoint\\(\\) would refuse"):
        synchronize()
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("error:a save in the background failed")
def test_where_warnings_are_errors_the_next_call_still_has_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fails)
    save_checkpoint(tmp_path / "a.pth", net=nn.Linear(1, 1), background=True)
    with pytest.raises(CheckpointError, match="No space left"):
        synchronize()


CODE = """
import atexit, sys, threading, torch, fastema.checkpoint as c
write = c._write
c._write = lambda *args: (threading.Event().wait(0.5), write(*args))
save = lambda path: c.save_checkpoint(path, net=torch.nn.Linear(2, 2), background=True)
save(sys.argv[1])
atexit.register(save, sys.argv[2])
print("at the end", flush=True)
"""


def test_the_process_ends_when_the_file_is_written(tmp_path: Path) -> None:
    paths = [tmp_path / "a.pth", tmp_path / "b.pth"]  # the second is saved when no thread starts any more
    done = subprocess.run([sys.executable, "-c", CODE, *paths], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("at the end\n", "")
    assert all(set(load_checkpoint(path)) == {"net"} for path in paths)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_the_parents_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(checkpoint_module._write)
    monkeypatch.setattr(checkpoint_module, "_write", held)
    save_checkpoint(tmp_path / "a.pth", net=nn.Linear(2, 2), background=True)
    child = os.fork()
    if child == 0:
        try:
            synchronize()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    held.gate.set()
    synchronize()
    assert (tmp_path / "a.pth").exists()


# ---- snapshots ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_a_snapshot_has_the_bytes_that_it_had_when_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, stored: torch.dtype
) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.setattr(snapshots.uuid, "uuid4", lambda: type("Same", (), {"hex": "0" * 32}))
    model, ema, optimizer = trained(dtype)
    own = {
        name: Snapshots(tmp_path / name, ema, dtype=stored, limit=2, verbose=False) for name in ("front", "background")
    }
    for _ in range(3):
        step(model, optimizer)
        path = own["front"].save()
        with monkeypatch.context() as inside:
            held = Held(snapshot_files.write)
            inside.setattr(snapshot_files, "write", held)
            behind = own["background"].save(background=True)
            assert held.entered.wait(60)
            before = ema.num_updates
            step(model, optimizer)
            assert ema.num_updates == before + 1
            held.gate.set()
            own["background"].synchronize()
        assert path is not None and behind is not None
        assert path.read_bytes() == behind.read_bytes()
    assert [[each.name for each in sorted((tmp_path / name).iterdir())] for name in own].count(
        [each.name for each in sorted((tmp_path / "front").iterdir())]
    ) == 2


def test_the_next_snapshot_raises_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    model, ema, optimizer = trained()
    own = Snapshots(tmp_path, ema, every=2, verbose=False)
    step(model, optimizer)
    with monkeypatch.context() as inside, pytest.warns(UserWarning, match="a save in the background failed"):
        inside.setattr(snapshot_files, "flush", fails)
        own.save(background=True)
        assert own._background._future is not None
        own._background._future.exception()  # done
    step(model, optimizer)
    with pytest.raises(SnapshotError, match=r"cannot write the snapshot .*No space left"):
        own.save()  # none is due
    assert not list(tmp_path.iterdir())
    step(model, optimizer)
    path = own.save(background=True)
    own.synchronize()
    assert path is not None and list(tmp_path.iterdir()) == [path]


def test_a_sharded_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    own = Snapshots(tmp_path, trained()[1], verbose=False)
    own._sharded = True
    with pytest.raises(ValueError, match="processes of a sharded model write together"):
        own.save(background=True)
