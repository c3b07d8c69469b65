"""The processes of one run, as torchrun starts them: which one this is, what all of them know, and who says so.

Whatever a run decides by, all processes know alike. The first writes the files and has the screen. When one fails it
says why; the others, which only see that it is gone, keep silent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from fastema.segmentation.errors import UserError

if TYPE_CHECKING:
    import torch

    from fastema.segmentation.options import TrainOptions

T = TypeVar("T")

# As long as one process may keep the others waiting, by reading all files of a big data set at the beginning.
_PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them; by default it is the only one.

    Attributes:
        rank: which one this is, from 0.
        world_size: how many there are.
        local_rank: which one of this machine's; it has the GPU of that number.
        joined: whether torchrun, or another launcher with its environment variables, has started them.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    joined: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank. All must call it."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, where alone it is called. All must call this."""
        if self.world_size == 1:
            return make()
        import torch.distributed as dist

        values: list[Any] = [make() if self.is_first else None]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def all_of(self, share: Sequence[T]) -> list[T]:
        """Undoes `share_of`: every process's values in the order of the whole. All must call it."""
        shares = self.gather(share)
        whole: list[Any] = [None] * sum(map(len, shares))
        for rank, values in enumerate(shares):
            whole[rank :: len(shares)] = values
        return whole

    def device(self, name: str) -> torch.device:
        """The device of a `--device` flag for this process: each has a GPU of its own.

        Raises:
            UserError: there is no such device, or there are fewer than processes.
        """
        import torch

        from fastema.segmentation.model.load import chosen_device

        gpus = torch.cuda.device_count()
        if self.world_size == 1 or not gpus or name not in ("auto", "cuda"):
            if self.world_size > 1 and name.startswith("cuda:"):
                raise UserError(
                    f"--device {name} is one GPU, and {self.world_size} processes need one each: --device cuda"
                )
            return chosen_device(name)
        if self.local_rank >= gpus:
            raise UserError(
                f"there are {gpus} GPUs here, and process {self.local_rank + 1} of this machine needs one of its own: "
                f"torchrun --nproc-per-node {gpus}, or --device cpu"
            )
        torch.cuda.set_device(self.local_rank)  # where NCCL works
        return chosen_device(f"cuda:{self.local_rank}")

    def described(self, sharded: bool) -> str:
        """For the user: `on 2 processes`; empty for a single one."""
        if sharded:
            return f"sharded over {self.world_size} processes"
        return f"on {self.world_size} processes" if self.world_size > 1 else ""

    def check(self, options: TrainOptions, images: int | None = None) -> None:
        """Raises `UserError` for options that so many processes cannot follow, or too few training images."""
        if options.fsdp and not self.joined:
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
def joined() -> Iterator[Processes]:
    """A block in which this process and the others of its run know of each other; one alone is told so.

    An exception comes out of it in the process that failed first. In the others, which fail since that one is gone, it
    becomes a silent exit.

    Raises:
        UserError: the processes cannot find each other, or one is gone without a word.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield Processes()
        return
    import torch
    import torch.distributed as dist

    # Objects travel over the CPU's, tensors of a GPU over NCCL, which is not set up until there is one.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store: dist.Store | None = None
    try:
        try:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=_PATIENCE))
            group_store = dist.PrefixStore("group", store)
            dist.init_process_group(backend, store=group_store, rank=rank, world_size=world_size, timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the processes of this run cannot find each other: {_first_sentence(error)}") from error
        yield Processes(rank, world_size, int(os.environ.get("LOCAL_RANK", rank)), joined=True)
        dist.destroy_process_group()
    except BaseException as error:
        if not _is_first_to_fail(store):
            raise SystemExit(1) from None
        if _is_lost_connection(error):
            raise UserError(
                f"another process of this run is gone, killed or out of memory maybe ({_first_sentence(error)}). "
                "The last checkpoint is whole: go on from it with --resume-from"
            ) from error
        raise


def padded(batches: Iterable[T], count: int) -> Iterator[tuple[T, bool]]:
    """As many batches as every process has, and whether each counts.

    Gradients are exchanged batch by batch, so a process that has one less than others goes along with its last one
    again, which must then weigh nothing.
    """
    left = count
    for batch in batches:
        left -= 1
        yield batch, True
    for _ in range(left):
        yield batch, False


def _is_first_to_fail(store: Any) -> bool:
    try:
        return store is None or store.add("failed", 1) == 1
    except RuntimeError:  # whoever kept the store is gone
        return True


def _is_lost_connection(error: BaseException) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].partition(". ")[0]
