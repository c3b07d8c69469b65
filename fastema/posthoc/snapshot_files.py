"""Snapshot files: written atomically, read with every checksum compared.

A snapshot is a safetensors file: `0/NAME`, `1/NAME`, ... are the averages, `copy/NAME` what is not averaged, and its
metadata holds the manifest: run, step, profiles, names, checksums. Of a sharded model it is a folder that
torch.distributed.checkpoint wrote, with the manifest beside.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastema.core.writing import flush, replacing, sync_folder
from fastema.posthoc.profiles import Profile

T = TypeVar("T")

FORMAT = 1
COPY = "copy"
_MANIFEST = "manifest.json"
_SINGLE, _SHARDED = ".safetensors", ".dcp"


class SnapshotError(RuntimeError):
    """A snapshot cannot be written, read or used; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Manifest:
    """The contents of a snapshot, by step, profiles and names.

    Args:
        run: tells one training from another.
        step: the optimizer step of the averages' last update.
        update_every: of the FastEMA.
        profiles: of each average.
        averaged: name to dtype and shape, as stored, of what is averaged; each tied weight once.
        copied: the same of what is not.
        names: every other name to the one under which the tensor is stored.
        rounding: relative L2 error that storing has added: 0 where nothing was rounded.
    """

    run: str
    step: int
    update_every: int
    profiles: list[Profile]
    averaged: dict[str, tuple[str, tuple[int, ...]]]
    copied: dict[str, tuple[str, tuple[int, ...]]]
    names: dict[str, str]
    rounding: float = 0.0

    def described(self, key: str) -> tuple[str, tuple[int, ...]]:
        """Return dtype and shape of a tensor in the file."""
        which, _, name = key.partition("/")
        return (self.copied if which == COPY else self.averaged)[name]

    def difference(self, other: Manifest) -> str | None:
        """Return how `other` differs in model or averages; None: it does not."""
        if self.profiles != other.profiles:
            theirs, ours = ("; ".join(map(str, each.profiles)) for each in (other, self))
            return f"it has the averages {theirs}, expected {ours}"
        for what, ours_, theirs_ in (
            ("averages", self.averaged, other.averaged),
            ("copies", self.copied, other.copied),
        ):
            for name in {**ours_, **theirs_}:
                if ours_.get(name) != theirs_.get(name):
                    return f"it {what} {_shown(name, theirs_)}, expected {_shown(name, ours_)}"
        return None


def _shown(name: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    return f"no {name!r}" if name not in tensors else f"{name!r} as {tensors[name][0]} {list(tensors[name][1])}"


def tensor_key(which: int | str, name: str) -> str:
    """Return where a tensor is in the file."""
    return f"{which}/{name}"


def path_of(folder: Path, step: int, sharded: bool) -> Path:
    """Return where the snapshot of a step belongs."""
    return folder / f"step-{step:012d}{_SHARDED if sharded else _SINGLE}"


def paths_in(folder: Path) -> dict[int, Path]:
    """Return the snapshots of a folder by step, ascending."""
    found = {}
    for path in sorted(folder.glob("step-*")):
        number = path.name.removeprefix("step-").partition(".")[0]
        if path.suffix in (_SINGLE, _SHARDED) and number.isdecimal():
            found[int(number)] = path
    return dict(sorted(found.items()))


def rank() -> int:
    """Return the number of this process; 0 where there is one alone."""
    return (
        torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
    )


def on_first_process(act: Callable[[], T], all_raise: bool) -> T | None:
    """Call a function on the process that writes, since its folder changes while others read it.

    Args:
        all_raise: raise its `SnapshotError` on every process; all must call this then.

    Returns:
        The function's result there, None on other processes.
    """
    result: T | None = None
    failures: list[SnapshotError | None] = [None]
    if rank() == 0:
        try:
            result = act()
        except SnapshotError as error:
            if not all_raise:
                raise
            failures = [error]
    if all_raise:
        torch.distributed.broadcast_object_list(failures)
    if failures[0] is not None:
        raise failures[0]
    return result


def remove(path: Path) -> None:
    """Delete a snapshot."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


# ---- writing ----


# The names of dtypes in a safetensors file.
_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}


def write(path: Path, manifest: Manifest, values: Mapping[str, Callable[[], Tensor]]) -> None:
    """Write a snapshot file atomically, one tensor at a time, and read it back before it takes its place.

    Args:
        values: functions that return a contiguous CPU tensor, by key.

    Raises:
        SnapshotError: it cannot be written; what was there before is untouched.
    """
    kinds = {key: manifest.described(key) for key in values}
    unknown = sorted(key for key, (dtype, _) in kinds.items() if dtype not in _DTYPES)
    if unknown:
        raise SnapshotError(f"safetensors files cannot hold {unknown[0]!r}: it is {kinds[unknown[0]][0]}")
    # Readers need tensors at multiples of their element size.
    kinds = dict(sorted(kinds.items(), key=lambda each: -getattr(torch, each[1][0]).itemsize))
    # The checksums are known last: the space before the tensors is for the longest; the manifest's has 1 to 10 digits.
    length = len(_header(manifest, kinds, dict.fromkeys(kinds, 0xFFFFFFFF))) + 9
    length += -length % 8
    sums: dict[str, int] = {}
    try:
        with replacing(path) as temporary:
            with temporary.open("wb") as file:
                file.seek(8 + length)
                for key in kinds:
                    tensor = values[key]()
                    sums[key] = checksum(tensor)
                    file.write(_bytes_of(tensor))
                file.seek(0)
                file.write(length.to_bytes(8, "little") + _header(manifest, kinds, sums).ljust(length))
            flush(temporary)
            with reading(temporary) as reader:
                for key in kinds:
                    reader.read([key])
    except (OSError, ValueError) as error:
        raise SnapshotError(f"cannot write the snapshot {path}: {error}") from error


def _header(manifest: Manifest, kinds: Mapping[str, tuple[str, tuple[int, ...]]], sums: Mapping[str, int]) -> bytes:
    """Return the header of a safetensors file: the manifest, and the place of every tensor."""
    header: dict[str, Any] = {"__metadata__": {"fastema": _dumped(manifest, sums)}}
    begin = 0
    for key, (dtype, shape) in kinds.items():
        end = begin + math.prod(shape) * getattr(torch, dtype).itemsize
        header[key] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": (begin, end)}
        begin = end
    return json.dumps(header).encode()


def write_sharded(path: Path, manifest: Manifest, tensors: Mapping[str, Any]) -> None:
    """Write the shards of all processes; all must call it, with a folder that all of them see.

    Raises:
        SnapshotError: it cannot be written; on every process.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    temporary = path.with_name(f".{path.name}.tmp")
    if rank() == 0 and temporary.exists():
        shutil.rmtree(temporary)
    dist.barrier()
    dcp.save(dict(tensors), checkpoint_id=temporary)

    def finish() -> None:
        try:
            sums = {each.name: _file_checksum(each) for each in sorted(temporary.iterdir())}
            (temporary / _MANIFEST).write_text(_dumped(manifest, sums))
            flush(temporary / _MANIFEST)
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except OSError as error:
            raise SnapshotError(f"cannot write the snapshot {path}: {error}") from error

    on_first_process(finish, all_raise=True)


def _dumped(manifest: Manifest, sums: Mapping[str, int]) -> str:
    plain = {**vars(manifest), "format": FORMAT, "checksums": dict(sums)}
    plain["profiles"] = [profile.plain() for profile in manifest.profiles]
    text = json.dumps(plain)
    return json.dumps({"manifest": text, "checksum": zlib.crc32(text.encode())})


# ---- reading ----


class Reader:
    """Read tensors of one snapshot, and compare their checksums."""

    def __init__(self, path: Path, manifest: Manifest, sums: Mapping[str, int], file: Any) -> None:
        self.path, self.manifest = path, manifest
        self._sums, self._file = sums, file

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors by key.

        Raises:
            SnapshotError: one is missing or damaged.
        """
        keys = list(keys)
        if self._file is None:
            return self._read_sharded(keys)
        found = {}
        for key in keys:
            try:
                found[key] = self._file.get_tensor(key)
            except Exception as error:  # safetensors raises an exception of its own
                raise _damaged(self.path, str(error)) from error
            if checksum(found[key]) != self._sums.get(key):
                raise _damaged(self.path, f"the checksum of {key!r} does not match its content")
        return found

    def _read_sharded(self, keys: list[str]) -> dict[str, Tensor]:
        import torch.distributed.checkpoint as dcp

        kinds = {key: self.manifest.described(key) for key in keys}
        tensors = {key: torch.empty(shape, dtype=getattr(torch, dtype)) for key, (dtype, shape) in kinds.items()}
        try:
            dcp.load(tensors, checkpoint_id=self.path, no_dist=True)
        except Exception as error:  # whatever the damage leads to
            raise _damaged(self.path, str(error)) from error
        return tensors


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Reader]:
    """Open a snapshot.

    Raises:
        SnapshotError: it is none, damaged, or of a later version of fastema.
    """
    if path.is_dir():
        manifest, sums = _loaded(path, _text_of(path))
        for name, expected in sums.items():
            if not (path / name).is_file() or _file_checksum(path / name) != expected:
                raise _damaged(path, f"{name} is missing, or its checksum does not match its content")
        yield Reader(path, manifest, sums, None)
        return
    with _opened(path) as file:
        manifest, sums = _loaded(path, (file.metadata() or {}).get("fastema"))
        yield Reader(path, manifest, sums, file)


def manifest_of(path: Path) -> Manifest:
    """Return what a snapshot is of, without reading its tensors.

    Raises:
        SnapshotError: it is none, or damaged.
    """
    if path.is_dir():
        return _loaded(path, _text_of(path))[0]
    with _opened(path) as file:
        return _loaded(path, (file.metadata() or {}).get("fastema"))[0]


def _text_of(folder: Path) -> str | None:
    try:
        return (folder / _MANIFEST).read_text()
    except (OSError, UnicodeDecodeError):
        return None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    safetensors = require_safetensors()
    try:
        file = safetensors.safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise SnapshotError(f"there is no snapshot {path}") from error
    except Exception as error:  # safetensors raises an exception of its own
        raise _damaged(path, str(error)) from error
    with file as opened:
        yield opened


def _loaded(path: Path, text: str | None) -> tuple[Manifest, dict[str, int]]:
    if text is None:
        raise SnapshotError(f"{path} is not a snapshot of fastema: it has no manifest")
    try:
        outer = json.loads(text)
        if zlib.crc32(outer["manifest"].encode()) != outer["checksum"]:
            raise ValueError("the manifest's checksum does not match its content")
        plain = json.loads(outer["manifest"])
        if plain.pop("format") != FORMAT:
            raise SnapshotError(f"{path} was written by a later version of fastema: update it")
        sums = plain.pop("checksums")
        plain["profiles"] = [Profile.of_plain(profile) for profile in plain["profiles"]]
        for kind in ("averaged", "copied"):
            plain[kind] = {name: (dtype, tuple(shape)) for name, (dtype, shape) in plain[kind].items()}
        return Manifest(**plain), sums
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> SnapshotError:
    return SnapshotError(
        f"{path} is damaged or cut short ({why}). It was not used; move it out of the folder to go on without it"
    )


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a contiguous CPU tensor's bytes."""
    return zlib.crc32(_bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> Any:
    """Return the memory of a contiguous CPU tensor; numpy has no bfloat16."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.numel() else b""


def _file_checksum(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            found = zlib.crc32(block, found)
    return found


def require_safetensors() -> Any:
    """Return the package, or raise SnapshotError that says how to install it."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise SnapshotError("snapshots need the package safetensors: pip install safetensors") from error
    return safetensors
