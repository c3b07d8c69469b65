"""Checkpoints with `net` and `ema_net`, written atomically and read without running code.

A save goes to a temporary file in the same folder, is flushed to the disk and then renamed over the old file: a
process killed at any moment leaves either the old checkpoint or the new one, never a part. A load compares every
checksum that `torch.save` wrote and `torch.load` ignores, and only ever unpickles tensors and plain Python values.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias

import torch
from torch import nn

from fastema.core import sharded
from fastema.core.checks import first_few
from fastema.core.policy import clean_name, unwrapped
from fastema.core.writing import BackgroundWriter, copied, replacing
from fastema.ema import FastEMA

StrPath: TypeAlias = str | os.PathLike[str]

_ZIP_MAGIC = b"PK\x03\x04"
_DOS_DIRECTORY = 0x10  # of an entry's attributes in a zip

__all__ = ["CheckpointError", "load_checkpoint", "load_weights", "save_checkpoint", "synchronize"]

_background = BackgroundWriter()  # one for all files: at most one copy is in memory


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message says which file, why, and what to do."""


class AveragedWeights(Protocol):
    """The methods that `save_checkpoint` needs of an EMA; `fastema.FastEMA` has them."""

    @property
    def is_applied(self) -> bool: ...
    def state_dict(self) -> dict[str, Any]: ...
    def shadow_state_dict(self) -> dict[str, Any]: ...


def save_checkpoint(
    path: StrPath,
    *,
    net: nn.Module,
    ema: AveragedWeights | None = None,
    optimizer: Any = None,
    background: bool = False,
    **extra: Any,
) -> None:
    """Write a checkpoint atomically: `path` holds the old content or the new, whatever happens.

    Args:
        path: the file to write; its folder must exist. A symbolic link is followed.
        net: the model; its `state_dict()` is stored as `net`, that of the model inside where it is wrapped in DDP,
            `torch.compile` or a DeepSpeed engine.
        ema: stored twice, at no cost on the disk, since the tensors are shared: `ema_net`, the averaged model
            under the same keys as `net`, and `ema`, the state that resumes it exactly.
        optimizer: stored as `optimizer`.
        background: True to copy everything into host memory, as much as the file takes, and write it in a thread while
            training goes on. A second save first waits for the one before, and uses its memory: there is one copy,
            until `synchronize()` frees it. What goes wrong in the thread is raised by the next `save_checkpoint`,
            `load_checkpoint` or `synchronize`, and is a warning at once. The process does not end before the file is
            written.
        **extra: stored under their names: through `.state_dict()` where they have one, else as they are. Only tensors
            and plain Python values, since `load_checkpoint` accepts nothing else.

    Raises:
        RuntimeError: the weights of an `ema` that is no FastEMA are applied: `net` would be the averaged weights. Of a
            FastEMA both sides are known, and a save inside the block (by a handler of a signal, say) writes each to
            its own name.
        ValueError: a name in `extra` is one that the checkpoint uses itself; the model is sharded.
        TypeError: a value is of a type that `load_checkpoint` would refuse; nothing is written.
        CheckpointError: the file cannot be written; what was at `path` before is untouched.
    """
    _background.wait()
    if ema is not None and ema.is_applied and not isinstance(ema, FastEMA):
        raise RuntimeError(
            "save_checkpoint() while the EMA weights are applied: `net` would hold the averaged weights and the "
            "trained ones would be lost; call restore(), or leave the swapped() block, first"
        )
    if "ema_net" in extra:
        raise ValueError("'ema_net' is written from ema=...: pass the EMA itself, or another name")
    content: dict[str, Any] = {
        "net": ema.live_state_dict(net) if isinstance(ema, FastEMA) else _state_of(unwrapped(net))
    }
    if any(map(sharded.is_dtensor, content["net"].values())):
        raise ValueError(
            "the model is sharded, and each process would write its own part to one file: save its state_dict() and "
            "the EMA's with torch.distributed.checkpoint, or gather both on one process first"
        )
    if isinstance(ema, FastEMA):
        content["ema_net"], content["ema"] = ema.checkpoint_states()
    elif ema is not None:
        content["ema_net"], content["ema"] = ema.shadow_state_dict(), ema.state_dict()
    if optimizer is not None:
        content["optimizer"] = _state_of(optimizer)
    content.update((name, _state_of(value)) for name, value in extra.items())

    target = Path(os.path.realpath(path))
    if background:
        _background.start(partial(_save, copied(content, _background.memory), target))
    else:
        _save(content, target)


def synchronize() -> None:
    """Wait until a checkpoint that is written in the background is on the disk, and free the memory of its copy.

    Raises:
        CheckpointError, TypeError: it was not written, as `save_checkpoint` says; raised once.
    """
    _background.synchronize()


def _save(content: dict[str, Any], target: Path) -> None:
    try:
        with replacing(target) as temporary:
            _write(content, temporary)
            _check_loadable(temporary, target)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot write the checkpoint {target}: {_write_failure(error)}; what was there before is untouched"
        ) from error


def load_checkpoint(path: StrPath) -> dict[str, Any]:
    """Read a checkpoint to the CPU, or any other file of `torch.save` that holds a dict.

    Nothing in the file can run code: only tensors and plain values are unpickled. A flipped bit anywhere in it is found
    (but in the legacy format, which has no checksums); that costs a second read from the page cache, 0.2 s a GB.

    Raises:
        CheckpointError: the file is missing, no checkpoint, cut short, damaged, or holds more than tensors and plain
            values. Names the other checkpoints beside it, newest first. Or one that was written in the background was
            not.
    """
    _background.wait()
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}: {_nearby(path)}")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a checkpoint: {_checkpoints_in(path)}")
    try:
        # Opened once: what is checked is what is read, even if another process saves meanwhile.
        with path.open("rb") as file:
            _refuse_damaged(file, path)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except CheckpointError:
        raise
    # torch's readers raise whatever the damage leads to: RuntimeError, EOFError, ValueError, KeyError, OSError, ...
    # Their texts are kept as the cause only: they advise weights_only=False, which is what must not be done here.
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and (zipfile.is_zipfile(path) or "GLOBAL" in str(error)):
            raise CheckpointError(
                f"{path} was refused: besides weights it holds objects that only running code could rebuild. "
                "If you trust where it comes from, load it yourself and save its state_dict again"
            ) from error
        raise CheckpointError(
            f"{path} is not a checkpoint, or is cut short ({path.stat().st_size:,} bytes); nothing in it was run. "
            f"Take another one: {_nearby(path)}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no checkpoint: it holds a {type(content).__name__}, not a dict with 'net'")
    return content


def load_weights(model: nn.Module, source: StrPath | Mapping[str, Any], prefer: str = "ema") -> str:
    """Load weights into a model: the averaged ones where there are any, else the trained ones.

    The names may carry the prefixes of `torch.compile` (`_orig_mod.`) and of `DistributedDataParallel` (`module.`) on
    either side. Everything is compared before the first tensor is written: after an error the model is as it was.

    Args:
        model: receives the weights.
        source: the checkpoint's path, or what `load_checkpoint` returned.
        prefer: "ema" takes `ema_net` if there is one, else `net`; "net" takes `net`.

    Returns:
        Which one was taken: "ema_net" or "net".

    Raises:
        ValueError: `prefer` is neither "ema" nor "net".
        CheckpointError: the file is not readable, has no such weights, or they are not this model's.
    """
    if prefer not in ("ema", "net"):
        raise ValueError(f"prefer must be 'ema' or 'net', got {prefer!r}")
    if isinstance(source, Mapping):
        content, origin = source, "the checkpoint"
    else:
        content, origin = load_checkpoint(source), str(source)
    taken = "ema_net" if prefer == "ema" and "ema_net" in content else "net"
    weights = content.get(taken)
    if not isinstance(weights, Mapping):
        raise CheckpointError(
            f"{origin} has no weights under {taken!r}; it has {first_few([repr(name) for name in content], 5)}. "
            "A bare state_dict is loaded with model.load_state_dict(...)"
        )
    model.load_state_dict(_matched(model, weights, f"{taken!r} of {origin}"), strict=True)
    return taken


# --- writing ---------------------------------------------------------------------------------------------------------


def _state_of(value: Any) -> Any:
    return value.state_dict() if callable(getattr(value, "state_dict", None)) else value


def _write(content: dict[str, Any], temporary: Path) -> None:
    # os.open rather than tempfile: the checkpoint gets the permissions that the user's umask asks for, not 0600.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        with _checksums():
            torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _checksums() -> Iterator[None]:
    """Turn torch's checksums on in a block, so that the checkpoint can be verified."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _write_failure(error: BaseException) -> str:
    """Return the operating system's message, which torch's writer replaces by its own ("unexpected pos")."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return str(error) if cause is None else cause.strerror or str(cause)


def _check_loadable(temporary: Path, target: Path) -> None:
    """Raise TypeError for content that `load_checkpoint` would refuse."""
    refused = torch.serialization.get_unsafe_globals_in_checkpoint(temporary)
    if refused:
        raise TypeError(
            f"not written to {target}: load_checkpoint() would refuse {first_few(sorted(refused), 5)}. "
            "Save tensors and plain Python values (int, float, str, list, dict) only"
        )


# --- reading ---------------------------------------------------------------------------------------------------------


def _refuse_damaged(file: IO[bytes], path: Path) -> None:
    """Raise CheckpointError where the archive's checksums do not agree; leaves `file` at its beginning."""
    is_archive = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    # An archive whose very first bytes are damaged would be read as the legacy format, which has no checksums.
    if is_archive or zipfile.is_zipfile(file):
        damage = None if is_archive else "its first bytes"
        try:
            with zipfile.ZipFile(file) as archive:
                # torch takes a record with this attribute for a folder, and leaves its tensor uninitialised.
                folders = [entry.filename for entry in archive.infolist() if entry.external_attr & _DOS_DIRECTORY]
                damage = damage or next(iter(folders), None) or archive.testzip()
        # zipfile raises whatever the damage leads to: BadZipFile, NotImplementedError, UnicodeDecodeError, ...
        except Exception as error:
            raise CheckpointError(
                f"{path} is not a checkpoint, or is cut short ({path.stat().st_size:,} bytes), or its directory is "
                f"damaged ({error}); nothing in it was run. Take another one: {_nearby(path)}"
            ) from error
        if damage is not None:
            raise CheckpointError(
                f"{path} is damaged: the checksum of {damage} does not agree with its content (a flipped bit on the "
                f"disk or on the way, or torch.save without checksums). Nothing was loaded. Take another one: "
                f"{_nearby(path)}"
            )
    file.seek(0)


def _matched(model: nn.Module, weights: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the checkpoint's weights under the model's own names; raise if they do not fit."""
    own = model.state_dict()
    weights = {str(name): value for name, value in weights.items()}
    if own.keys() != weights.keys():
        own_plain, weights_plain = _without_wrappers(own), _without_wrappers(weights)
        own_names = {plain: name for name, plain in own_plain.items()}
        renamed = {own_names.get(plain, name): weights[name] for name, plain in weights_plain.items()}
    else:
        renamed = dict(weights)
    differences = [f"{name}: only in the model" for name in own if name not in renamed]
    differences += [f"{name}: only in the checkpoint" for name in renamed if name not in own]
    for name, value in own.items():
        given = renamed.get(name, value)
        if isinstance(value, torch.Tensor) and not nn.parameter.is_lazy(value):
            if not isinstance(given, torch.Tensor):
                differences.append(f"{name}: a {type(given).__name__} in the checkpoint, a tensor in the model")
            elif given.shape != value.shape:
                differences.append(f"{name}: {list(given.shape)} in the checkpoint, {list(value.shape)} in the model")
            elif given.layout != torch.strided or given.is_meta or given.is_quantized:
                differences.append(f"{name}: no ordinary tensor in the checkpoint, but {given.layout}, {given.device}")
    if differences:
        raise CheckpointError(
            f"{origin} does not fit this model ({len(differences)} differences): {first_few(differences, 5, '; ')}. "
            "Nothing was loaded; build the model as it was when the checkpoint was written"
        )
    return renamed


def _without_wrappers(names: Mapping[str, Any]) -> dict[str, str]:
    """Map every name to the name without what `torch.compile` and `DistributedDataParallel` put into it."""
    plain = {name: clean_name(name) for name in names}
    # DDP wraps a whole model: `module.` is a wrapper only where every name begins with it.
    while plain and all(name.startswith("module.") for name in plain.values()):
        plain = {name: short.removeprefix("module.") for name, short in plain.items()}
    return plain


def _nearby(path: Path) -> str:
    """List the checkpoints beside `path`, newest first."""
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    return _checkpoints_in(folder, but=path)


def _checkpoints_in(folder: Path, but: Path | None = None) -> str:
    others = [file for file in folder.glob("*.pth") if file != but and file.is_file()]
    if not others:
        return f"there is no {'other ' if but and but.exists() else ''}*.pth in {folder}"
    others.sort(key=lambda file: (-file.stat().st_mtime_ns, file.name))
    return (
        f"in {folder} there is {first_few([file.name for file in others], 5)}{' (newest first)' if others[1:] else ''}"
    )
