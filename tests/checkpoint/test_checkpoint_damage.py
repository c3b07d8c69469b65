"""Damaged, hostile and unwritable checkpoints: an error that says what to do, or exactly what was saved.

`torch.load` itself compares no checksum: without `load_checkpoint`'s own look, most of these flips load silently.
"""

from __future__ import annotations

import errno
import io
import os
import pathlib
import random
import tempfile
import time
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fastema.checkpoint as checkpoint_module
from fastema import FastEMA
from fastema.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


def identical(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    """A checkpoint's bytes and its content."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("saved") / "a.pth"
    net = nn.Linear(4, 3)
    save_checkpoint(path, net=net, ema=FastEMA(net), epoch=3, note="x" * 40)
    return path.read_bytes(), load_checkpoint(path)


def flips(content: bytes) -> Iterator[tuple[int, int]]:
    """Byte and bit: all bits of the archive's directory, and a sample of every record with its header."""
    archive = zipfile.ZipFile(io.BytesIO(content))
    begins = sorted(entry.header_offset for entry in archive.infolist())
    directory = archive.start_dir
    choose = random.Random(0)
    for begin, end in zip(begins, [*begins[1:], directory], strict=True):
        for byte in {begin, begin + 1, end - 1, *(choose.randrange(begin, end) for _ in range(12))}:
            yield byte, choose.randrange(8)
    for byte in range(directory, len(content)):
        yield byte, choose.randrange(8)
        yield byte, 4  # some attributes are one bit


@pytest.mark.slow
def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: pathlib.Path, saved: tuple[bytes, dict[str, Any]]) -> None:
    content, expected = saved
    path, refused = tmp_path / "a.pth", 0
    for byte, bit in flips(content):
        damaged = bytearray(content)
        damaged[byte] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            assert identical(load_checkpoint(path), expected), f"bit {bit} of byte {byte} was loaded silently"
        except CheckpointError:
            refused += 1
    assert refused > 400


def test_a_flipped_bit_of_a_weight_names_the_other_files_newest_first(
    tmp_path: pathlib.Path, saved: tuple[bytes, dict[str, Any]]
) -> None:
    content, expected = saved
    at = content.index(expected["net"]["weight"].numpy().tobytes())
    for age, name in enumerate(["last.pth", "best_ema.pth", "an_old_one.pth"]):
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (time.time() - age * 60,) * 2)
    (tmp_path / "last.pth").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    silent = torch.load(tmp_path / "last.pth", weights_only=True)
    assert not identical(silent, expected), "torch checks by itself now: our own check can go"
    with pytest.raises(
        CheckpointError,
        match=r"last\.pth is damaged: the checksum of .*data/\d+ .*Nothing was loaded.*"
        r"there is best_ema\.pth, an_old_one\.pth \(newest first\)",
    ):
        load_checkpoint(tmp_path / "last.pth")


def test_cut_off_anywhere(tmp_path: pathlib.Path, saved: tuple[bytes, dict[str, Any]]) -> None:
    content, _ = saved
    for length in {*range(0, len(content), 97), *range(len(content) - 120, len(content))}:
        (tmp_path / "a.pth").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"a\.pth is (not a checkpoint, or is cut short|damaged)"):
            load_checkpoint(tmp_path / "a.pth")


def test_checkpoints_have_checksums_even_if_the_user_switched_torchs_off(tmp_path: pathlib.Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        save_checkpoint(tmp_path / "ours.pth", net=nn.Linear(2, 2))
        assert torch.serialization.get_crc32_options() is False
        torch.save({"net": {}, "note": "x"}, tmp_path / "torchs.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert "net" in load_checkpoint(tmp_path / "ours.pth")
    with pytest.raises(CheckpointError, match=r"or torch\.save without checksums"):
        load_checkpoint(tmp_path / "torchs.pth")


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "legacy"])
def test_files_of_torch_save_are_read_both_ways(tmp_path: pathlib.Path, archive: bool) -> None:
    content = {"net": nn.Linear(2, 2).state_dict(), "epoch": 1}
    torch.save(content, tmp_path / "theirs.pth", _use_new_zipfile_serialization=archive)
    assert identical(load_checkpoint(tmp_path / "theirs.pth"), content)
    save_checkpoint(tmp_path / "ours.pth", net=nn.Linear(2, 2), epoch=1)
    assert torch.load(tmp_path / "ours.pth", weights_only=True)["epoch"] == 1


class RunsACommand:
    """Unpickling it runs a shell."""

    def __init__(self, marker: pathlib.Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f": > {self._marker}",)


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "legacy"])
def test_a_pickle_that_runs_a_command_is_refused_as_such(tmp_path: pathlib.Path, archive: bool) -> None:
    marker, path = tmp_path / "was_run", tmp_path / "evil.pth"
    torch.save({"net": RunsACommand(marker)}, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(CheckpointError, match=r"evil\.pth was refused: besides weights it holds objects that only"):
        load_checkpoint(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the test's pickle is harmless: it tests nothing"


# --- where nothing can be written -------------------------------------------------------------------------------------


def fail_to_save(folder: pathlib.Path, reason: str) -> None:
    """Saving over `folder`/a.pth, a checkpoint of epoch 1, fails for `reason` and leaves it alone."""
    before = (folder / "a.pth").read_bytes()
    with pytest.raises(CheckpointError, match=f"cannot write the checkpoint .*{reason}.*is untouched"):
        save_checkpoint(folder / "a.pth", net=nn.Linear(300, 300), epoch=2)
    assert (folder / "a.pth").read_bytes() == before
    assert [file.name for file in folder.iterdir()] == ["a.pth"]
    assert load_checkpoint(folder / "a.pth")["epoch"] == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "a.pth", net=nn.Linear(2, 2), epoch=1)
    really_open = os.open
    with monkeypatch.context() as patched:
        patched.setattr(
            checkpoint_module.os,
            "open",
            lambda path, flags, *mode: really_open("/dev/full" if flags & os.O_CREAT else path, flags & ~os.O_EXCL),
        )
        before = (tmp_path / "a.pth").read_bytes()
        with pytest.raises(CheckpointError, match="No space left on device; what was there before is untouched"):
            save_checkpoint(tmp_path / "a.pth", net=nn.Linear(300, 300), epoch=2)
    assert (tmp_path / "a.pth").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    save_checkpoint(tmp_path / "a.pth", net=nn.Linear(2, 2), epoch=1)

    def broken(*arguments: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint_module.os, call, broken)
    fail_to_save(tmp_path, "Input/output error")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs users")
def test_a_read_only_folder() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_checkpoint(folder / "a.pth", net=nn.Linear(2, 2), epoch=1)
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            fail_to_save(folder, "Permission denied")
        finally:
            os.seteuid(user)
            folder.chmod(0o755)
