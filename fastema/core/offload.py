"""A plan for weights on a GPU and their averages in host memory, which a thread computes while training goes on.

An update only enqueues work: the weights are copied into pinned memory on a side stream. Events put the copy after the
kernels that wrote the weights, and before those that write them next. A thread waits for the copy and runs the CPU plan
on it. There is one staging buffer, as large as the weights; an update waits until the thread is done with the last one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastema.backends import contract
from fastema.memory import streams

_ALIGNMENT = 64  # bytes: a cache line, and a multiple of every element's size
_BLOCK = 64 << 20  # bytes: torch rounds pinned memory up to a power of two, up to twice the size of one large block


class Copy(Protocol):
    """A copy from a device to the host that is under way."""

    def order_writes(self) -> None:
        """Make what the caller enqueues from now on wait for the copy."""

    def wait(self) -> None:
        """Block the calling thread until the copy is done.

        Raises:
            Exception: it failed.
        """


class Transfer(Protocol):
    """A way to copy from a device to the host. The tests have a slow one that needs no GPU."""

    def host_memory(self, nbytes: int) -> Tensor:
        """Return memory for copies, [nbytes] uint8: pinned, so that they run without the host."""

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Copy:
        """Begin host <- device for pairs of equal dtypes and sizes, after all that was enqueued so far."""


def transfer_between(live: torch.device, shadow: torch.device) -> Transfer | None:
    """Return how to copy weights to a shadow in host memory without a wait; None: there is no way, or no need."""
    return StreamTransfer(live) if shadow.type == "cpu" and streams.can_copy_to_pinned(live) else None


@dataclass(frozen=True)
class StreamCopy:
    """A copy whose end an event marks."""

    device: torch.device
    copied: torch.Event

    def order_writes(self) -> None:
        with streams.on_device(self.device):
            _refuse_capture("the step after an update()")
            streams.current_stream(self.device).wait_event(self.copied)

    def wait(self) -> None:
        with streams.on_device(self.device):  # a thread starts on device 0, and waiting makes a context there
            self.copied.synchronize()


class StreamTransfer:
    """Transfer on a stream of its own, ordered by events alone: the host never waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = streams.new_stream(device)

    def host_memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> StreamCopy:
        with streams.on_device(self._device):
            _refuse_capture("update()")
            self._stream.wait_stream(streams.current_stream(self._device))
            with streams.on_stream(self._stream):
                # One call for all: 746 calls from Python take the host two and a half times as long.
                hosts, lives = [host for host, _ in pairs], [live for _, live in pairs]
                torch._foreach_copy_(hosts, lives, non_blocking=True)
                # The thread that waits for it sleeps: spinning would take a core from the training.
                copied = streams.new_event(self._device)
                copied.record(self._stream)
        return StreamCopy(self._device, copied)


def _refuse_capture(what: str) -> None:
    if streams.is_capturing():
        raise RuntimeError(
            f"{what} during CUDA graph capture, with a shadow in host memory: a replay would run no average. Capture "
            "the step of an optimizer that is not attached, and call update() after each replay"
        )


@dataclass(frozen=True)
class _Piece:
    """Elements [begin, end) of one live tensor, at byte `offset` of a block of staging memory."""

    live: int  # index
    begin: int
    end: int
    block: int
    offset: int


def _pieces(lives: Sequence[Tensor], block_bytes: int) -> Iterator[_Piece]:
    """Yield all elements of `lives`, cut where a block ends."""
    block = offset = 0
    for index, live in enumerate(lives):
        begin = 0
        while begin < live.numel():
            end = min(live.numel(), begin + (block_bytes - offset) // live.itemsize)
            yield _Piece(index, begin, end, block, offset)
            offset += -(-(end - begin) * live.itemsize // _ALIGNMENT) * _ALIGNMENT
            begin = end
            if offset >= block_bytes:
                block, offset = block + 1, 0


@dataclass
class _Job:
    """One update in the thread."""

    run: Callable[[], None]
    reads: list[Tensor]  # kept alive until it is done, even if the model is deleted
    process: int
    finished: bool = False  # not the future's own flag: that has a lock, which a fork may leave locked

    def __call__(self) -> None:
        self.run()
        self.finished = True


class OffloadedPlan:
    """A plan whose lives are on a device and whose shadows are on the host.

    Args:
        transfer: copies the lives to the host.
        plan: the plan on the host, `Plan` of a backend.
        segments, views: see `contract.Plan`; lives on the device.
    """

    def __init__(
        self,
        transfer: Transfer,
        plan: Callable[..., contract.Plan],
        segments: Sequence[contract.Segment],
        views: Sequence[Tensor],
    ) -> None:
        self._transfer = transfer
        self._lives = lives = [segment.live for segment in segments]
        pieces = list(_pieces(lives, _BLOCK))
        sizes: dict[int, int] = {}
        for piece in pieces:
            sizes[piece.block] = piece.offset + (piece.end - piece.begin) * lives[piece.live].itemsize
        blocks = [transfer.host_memory(size) for size in sizes.values()]
        cuts = [lives[piece.live][piece.begin : piece.end] for piece in pieces]
        staged = [
            blocks[piece.block][piece.offset : piece.offset + cut.nbytes].view(cut.dtype)
            for piece, cut in zip(pieces, cuts, strict=True)
        ]
        self._pairs = list(zip(staged, cuts, strict=True))
        self._plan = plan(
            [
                segments[piece.live]._replace(
                    shadows=[shadow[piece.begin : piece.end] for shadow in segments[piece.live].shadows], live=own
                )
                for piece, own in zip(pieces, staged, strict=True)
            ],
            views,
        )
        self._devices = {live.device for live in lives} | {torch.device("cpu")}
        self._skip = transfer.host_memory(_ALIGNMENT)[:4].view(torch.float32)
        self._immediate, self._deferred = self._pairs, self._pairs[:0]  # copies: see `defer_copies_until_step`
        self._executor: ThreadPoolExecutor | None = None
        self._executor_process = 0
        self._job: _Job | None = None
        self._future: Future[None] | None = None
        self._deferred_copy: Copy | None = None  # under way

    def defer_copies_until_step(self, storages: frozenset[int]) -> None:
        """Let copies of these live storages (`_cdata`) last until the caller's `order_writes()`."""
        self.order_writes()
        self._deferred = [pair for pair in self._pairs if pair[1].untyped_storage()._cdata in storages]
        self._immediate = [pair for pair in self._pairs if pair[1].untyped_storage()._cdata not in storages]

    def order_writes(self) -> None:
        """Make what is enqueued from now on wait for the deferred copies."""
        if self._deferred_copy is not None:
            self._deferred_copy.order_writes()

    @torch.no_grad()
    def update(self, args: contract.UpdateArgs) -> None:
        """Begin an update and return before anything is averaged. `args.skip` is on the lives' device.

        The caller has called `synchronize()`, of every plan of its own before the first of them updates.
        """
        skip = args.skip
        if args.device_weights is not None:
            raise ValueError("the weights of an average on the host must be known on the host")
        if skip is not None and (skip.numel() != 1 or skip.device not in self._devices):
            devices = " or ".join(sorted(map(str, self._devices)))
            raise ValueError(f"skip must be 1 number on {devices}, got {skip.numel()} on {skip.device}")
        skips = [] if skip is None else [(self._skip, skip.detach().reshape(1))]
        on_host = args._replace(weights=list(args.weights), skip=self._skip if skips else None)
        copies = []
        if self._immediate or skips:
            copies.append(self._transfer.start([*self._immediate, *skips]))
            copies[0].order_writes()
        if self._deferred:
            self._deferred_copy = self._transfer.start(self._deferred)
            copies.append(self._deferred_copy)
        plan = self._plan  # not `self`, which the thread must not keep alive: it ends with the plan

        def average() -> None:
            for copy in copies:
                copy.wait()
            plan.update(on_host)

        if self._executor is None or self._executor_process != os.getpid():  # threads do not survive a fork
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="fastema-offload")
            self._executor_process = os.getpid()
        job = _Job(average, self._lives, os.getpid())
        self._future = self._executor.submit(job)
        self._job = job

    def synchronize(self) -> None:
        """Wait until the shadow is up to date.

        Raises:
            RuntimeError: the average failed, raised once; or this process was forked before it was done.
        """
        if self._job is None or self._future is None:
            return
        if self._job.process == os.getpid():
            wait([self._future])  # KeyboardInterrupt changes nothing here: the next call waits again
        elif not self._job.finished:
            raise RuntimeError(
                "this process was forked while the shadow in host memory was being averaged, and has half of the "
                "result: call ema.synchronize() before the fork"
            )
        finished, future = self._job.finished, self._future
        self._job = self._future = self._deferred_copy = None
        if not finished:
            raise RuntimeError(
                "the thread that averages into host memory failed: the latest update is lost, those before it stand. "
                "Training may go on"
            ) from future.exception()

    def nonfinite_count(self) -> int:
        self.synchronize()
        return self._plan.nonfinite_count()
