"""Hostile checkpoints for `load_checkpoint` and `load_weights`: never code that runs, a crash, or half a model.

Two ways in: `python tests/fuzz/checkpoints.py -runs=10000` lets atheris look for new paths through the reader, and
tests/fuzz/test_checkpoints.py calls `read()` on what hypothesis makes.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch._weights_only_unpickler as unpickler
from torch import Tensor, nn

from fastema import FastEMA, checkpoint
from fastema.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint

# What a pickle that runs code would do; torch itself opens files and imports modules meanwhile.
_FORBIDDEN = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.remove",
    "os.mkdir",
    "socket.",
)
_watching = False
_ran: list[str] = []


def _watch(event: str, arguments: Any) -> None:
    if _watching and event.startswith(_FORBIDDEN):
        _ran.append(event)


sys.addaudithook(_watch)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


_folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
_path = Path(_folder.name) / "a.pth"
save_checkpoint(_path, net=model(), ema=FastEMA(model()), epoch=3)
GOOD = _path.read_bytes()
with zipfile.ZipFile(io.BytesIO(GOOD)) as _archive:
    RECORDS = {entry.filename: _archive.read(entry) for entry in _archive.infolist()}
PICKLE = next(content for name, content in RECORDS.items() if name.endswith("data.pkl"))
_expected = load_checkpoint(_path)


def with_pickle(content: bytes) -> bytes:
    """The good checkpoint with another pickle and right checksums: what an attacker writes, not what a disk breaks."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as writer:
        for name, record in RECORDS.items():
            writer.writestr(zipfile.ZipInfo(name), content if name.endswith("data.pkl") else record)
    return archive.getvalue()


def patched(original: bytes, changes: bytes) -> bytes:
    """`original` with bytes set, inserted or cut; `changes`: four bytes for each."""
    content = bytearray(original)
    for i in range(0, len(changes) - 3, 4):
        kind, at, value = (
            changes[i] % 3,
            int.from_bytes(changes[i + 1 : i + 3], "little") % len(content),
            changes[i + 3],
        )
        if kind == 0:
            content[at] = value
        elif kind == 1:
            content.insert(at, value)
        elif len(content) > 1 + value:
            del content[at : at + 1 + value]
    return bytes(content)


def read(content: bytes, damaged: bool = False) -> str:
    """Reads a file with this content; returns what became of it.

    Args:
        content: of the file.
        damaged: it is `GOOD` with damage that checksums must find: it is refused, or nothing has changed.
    """
    global _watching
    _path.write_bytes(content)
    _ran.clear()
    net = model()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    _watching = True
    try:
        loaded = load_checkpoint(_path)
    except CheckpointError:
        return "refused"
    finally:
        _watching = False
        assert not _ran, f"the file ran {_ran}"
    assert isinstance(loaded, dict)
    if damaged:
        assert _same(loaded, _expected), "damage was loaded silently"
    try:
        load_weights(net, loaded)
    except CheckpointError:
        assert _same(net.state_dict(), before), "weights were refused, and some of them loaded"
        return "no weights"
    return "loaded"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def one_input(data: bytes) -> None:
    """The first byte says how the rest becomes a file."""
    warnings.simplefilter("ignore")
    kind, rest = data[0] % 4 if data else 0, data[1:]
    if kind == 0:
        read(rest)
    elif kind == 1:
        read(patched(GOOD, rest))
    elif kind == 2:
        read(with_pickle(patched(PICKLE, rest)))
    else:
        read(with_pickle(rest))


def main() -> None:
    atheris: Any = importlib.import_module("atheris")
    seeds = Path(_folder.name) / "seeds"
    seeds.mkdir()
    for number, seed in enumerate([b"\0" + GOOD, b"\1\0\5\0\1", b"\2\0\5\0\1", b"\3" + PICKLE]):
        (seeds / str(number)).write_bytes(seed)
    readers: list[Any] = [load_checkpoint, load_weights, checkpoint._refuse_damaged, checkpoint._matched]
    readers += [unpickler.Unpickler.load, unpickler._read_global_instruction, zipfile.ZipFile._RealGetContents]  # type: ignore[attr-defined]
    for reader in readers:
        atheris.instrument_func(reader)
    atheris.Setup([sys.argv[0], "-timeout=60", "-max_len=8192", "-len_control=0", *sys.argv[1:], str(seeds)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
