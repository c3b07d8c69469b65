"""The processes of one run, as torchrun starts them.

All decide by the same values. The first writes the files and prints. The one that fails first reports the error; the
others, which fail because it is gone, exit silently.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastema.errors import UserError
from fastema.segmentation.devices import accelerator, select_device
from fastema.segmentation.options import TrainOptions

T = TypeVar("T")

# One process may read all files of a large data set while the others wait.
_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them; by default the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine, and the number of its GPU
    launched: bool = False  # by torchrun, or another launcher with its environment variables

    @property
    def is_first(self) -> bool:
        """True if this process writes and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return every process's value, by rank. All processes must call this."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` in the first process and return its result in all. All processes must call this."""
        if self.world_size == 1:
            return make()
        values: list[Any] = [make() if self.is_first else None]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather_shares(self, share: Sequence[T]) -> list[T]:
        """Return the items of which each process gives its `items[rank::world_size]`. All processes must call this."""
        shares = self.gather(share)
        values: list[Any] = [None] * sum(map(len, shares))
        for rank, own in enumerate(shares):
            values[rank :: len(shares)] = own
        return values

    def device(self, name: str) -> torch.device:
        """Return the device of a `--device` flag for this process; each has its own GPU."""
        gpus = torch.accelerator.device_count()
        kind, _, index = (select_device(name).type if name == "auto" else name).partition(":")
        if self.world_size == 1 or not gpus or kind == "cpu":
            return select_device(name)
        if index:
            raise UserError(
                f"--device {name} is one GPU, and {self.world_size} processes need one each: --device {kind}"
            )
        if self.local_rank >= gpus:
            raise UserError(
                f"there are {gpus} GPUs here, and process {self.local_rank + 1} of this machine needs one of its own: "
                f"torchrun --nproc-per-node {gpus}, or --device cpu"
            )
        torch.accelerator.set_device_index(self.local_rank)  # NCCL uses the current device
        return select_device(f"{kind}:{self.local_rank}")

    def check(self, options: TrainOptions, images: int | None = None) -> None:
        """Raise `UserError` for options that so many processes cannot follow, or too few training images."""
        if options.fsdp and not self.launched:
            raise UserError(
                "--fsdp spreads the network over processes, and this is only one: start them with torchrun "
                "--nproc-per-node N -m fastema train …"
            )
        for name, size in (("--batch-size", options.batch_size), ("--stage2-batch-size", options.second_batch_size)):
            if size % self.world_size:
                raise UserError(
                    f"{name} {size} cannot be shared evenly by {self.world_size} processes: it counts the images of "
                    f"all of them together, so give a multiple of {self.world_size}"
                )
        if images is not None and images < self.world_size:
            raise UserError(f"{self.world_size} processes cannot share {images} training images: start fewer")


@contextmanager
def process_group() -> Iterator[Processes]:
    """Join this process to the others of its run for a block, if a launcher started it.

    An exception leaves the block in the process that failed first. In the others it becomes a silent exit.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield Processes()
        return
    # Objects are sent over gloo, tensors of a GPU over its own backend (NCCL), which is set up with the first one.
    gpu = accelerator()
    backend = "gloo" if gpu is None else f"cpu:gloo,{gpu.type}:{dist.get_default_backend_for_device(gpu)}"
    store: dist.Store | None = None
    try:
        try:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
            group_store = dist.PrefixStore("group", store)
            dist.init_process_group(backend, store=group_store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the processes of this run cannot find each other: {_first_sentence(error)}") from error
        yield Processes(rank, world_size, int(os.environ.get("LOCAL_RANK", rank)), launched=True)
        dist.destroy_process_group()
        # What still refers to the group keeps gloo's threads alive, and torch 2.13 aborts the process if one of them
        # waits for the GIL, to drop the last tensor, while the interpreter ends. Let them have it before.
        time.sleep(0.1)
    except BaseException as error:
        if not _is_first_to_fail(store):
            raise SystemExit(1) from None
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            raise UserError(
                f"another process of this run is gone, killed or out of memory maybe ({_first_sentence(error)}). "
                "The last checkpoint is whole: go on from it with --resume-from"
            ) from error
        raise


def pad_batches(batches: Iterable[T], count: int) -> Iterator[tuple[T, bool]]:
    """Yield `count` batches, and whether each counts: where there are fewer, the last one again, which does not.

    Gradients are reduced batch by batch, so every process must have the same number of them.
    """
    for batch in batches:
        count -= 1
        yield batch, True
    for _ in range(count):
        yield batch, False


def _is_first_to_fail(store: Any) -> bool:
    try:
        return store is None or store.add("failed", 1) == 1
    except RuntimeError:  # the process that kept the store is gone
        return True


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].partition(". ")[0]
