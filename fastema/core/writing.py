"""Files that are whole or not there, and writes in a thread, whose errors the next call raises."""

from __future__ import annotations

import contextlib
import copy
import os
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class BackgroundWriter:
    """Run one write at a time in a thread. The process does not end before it is done.

    Host memory for the copies is kept from one write to the next: the system takes longer to hand out new pages than a
    copy takes.
    """

    def __init__(self) -> None:
        self._future: Future[None] | None = None
        self._process = 0
        self._taken: list[Tensor] = []  # memory of the write that runs
        self._free: dict[int, list[Tensor]] = {}  # memory of the one before, by size

    def memory(self, nbytes: int) -> Tensor:
        """Return host memory for what the next write writes, [nbytes] uint8. The caller has called `wait()`."""
        free = self._free.get(nbytes)
        with torch.inference_mode(False):  # a later write, outside of inference mode, uses it again
            own = free.pop() if free else torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        self._taken.append(own)
        return own

    def start(self, write: Callable[[], None]) -> None:
        """Run `write` in a thread. The caller has called `wait()`.

        A write that fails warns at once, too: there may be no next call.
        """

        def run() -> None:
            try:
                write()
            except BaseException as error:
                _warn(f"a save in the background failed: {error}")
                raise

        self._free = {}  # of other sizes than what is written now
        executor = ThreadPoolExecutor(1, thread_name_prefix="fastema-write")
        try:
            self._future, self._process = executor.submit(run), os.getpid()
        except RuntimeError:  # no thread starts any more while the process ends, in functions of atexit
            self._future = None
        executor.shutdown(wait=False)  # the thread ends after the write
        if self._future is None:
            write()

    def raise_error(self) -> None:
        """Raise the error of a write that is done; do not wait for one that is not."""
        if self._future is not None and self._process == os.getpid() and self._future.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the write is done, and raise its error, once."""
        future: Future[None] | None = None
        if self._future is not None and self._process == os.getpid():  # else forked meanwhile: the parent writes it
            wait([self._future])  # KeyboardInterrupt changes nothing here: the next call waits again
            future = self._future
        self._future = None
        for memory in self._taken:
            self._free.setdefault(memory.nbytes, []).append(memory)
        self._taken = []
        error = None if future is None else future.exception()
        if error is not None:
            raise error

    def synchronize(self) -> None:
        """Wait as `wait()`, and free the memory of the copies."""
        try:
            self.wait()
        finally:
            self._free = {}


def _warn(message: str) -> None:
    with contextlib.suppress(Warning):  # where warnings are errors, the next call raises anyway
        warnings.warn(message, stacklevel=4)


def copied(content: Any, memory: Callable[[int], Tensor]) -> Any:
    """Return a copy of nested dicts, lists and tuples whose tensors are in host memory, from `memory(nbytes)`.

    Tensors that share memory share it in the copy, each storage being copied once, so that `torch.save` writes the same
    bytes.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    memo: dict[int, Any] = {}
    for tensor in _tensors(content):
        # Anything else than a plain tensor knows itself how it is copied.
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not _is_special(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in storages:
                own = memory(storage.nbytes())
                if storage.nbytes():
                    own.copy_(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))
                storages[storage._cdata] = own.untyped_storage()
            view = torch.empty(0, dtype=tensor.dtype, device="cpu").set_(
                storages[storage._cdata], tensor.storage_offset(), tensor.shape, tensor.stride()
            )
            view = view.conj() if tensor.is_conj() else view
            view = torch._neg_view(view) if tensor.is_neg() else view
            needs_gradient = tensor.requires_grad
            is_parameter = type(tensor) is nn.Parameter
            memo[id(tensor)] = (
                nn.Parameter(view, needs_gradient) if is_parameter else view.requires_grad_(needs_gradient)
            )
    return copy.deepcopy(content, memo)


def _is_special(tensor: Tensor) -> bool:
    return tensor.is_quantized or tensor.is_meta or bool(vars(tensor))


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, (dict, list, tuple)):
        inside: Iterable[Any] = content.values() if isinstance(content, dict) else content
        for value in inside:
            yield from _tensors(value)


# ---- files that are whole or not there: written beside their place, and renamed ----


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`, which takes its place on success and vanishes on any error."""
    host = socket.gethostname()
    _remove_leftovers(target, host)
    temporary = target.with_name(f".{target.name}.{host}-{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def _remove_leftovers(target: Path, host: str) -> None:
    """Remove temporary files of processes of this machine that were killed in the middle of a save."""
    for leftover in target.parent.glob(f".{target.name}.{host}-*.tmp"):
        process = leftover.name.removesuffix(".tmp").rpartition("-")[2]
        if process.isdecimal() and not _is_alive(int(process)):
            leftover.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the file system can; the file is whole in any case."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flush(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
