"""The other side of a swap: for each live storage, the memory that changes places with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastema.memory.bytes import view_in
from fastema.memory.streams import current_stream, has_streams


@dataclass
class SwapBuffer:
    """A storage that changes places with a live one, or whose contents do so with a part of it."""

    live: torch.UntypedStorage
    storage: torch.UntypedStorage
    rest: list[tuple[Tensor, Tensor]]  # of the two: the bytes that nothing manages
    casts: list[tuple[Tensor, Tensor]]  # scratch <- average; empty where the storage is the shadow itself
    parts: list[tuple[Tensor, Tensor]]  # bytes of the two whose contents change places; empty: the pointers do
    begin: int  # the byte of the live storage at which this one begins

    def __post_init__(self) -> None:
        self.nbytes = self.storage.nbytes()  # in use; scratch memory is given back meanwhile

    @property
    def needs_filling(self) -> bool:
        return bool(self.rest or self.casts)

    def fill(self) -> None:
        """Cast the average into scratch memory, and copy what is not managed, before the exchange."""
        if self.casts and self.storage.nbytes() != self.nbytes:
            self.storage.resize_(self.nbytes)
        for scratch, average in self.casts:
            scratch.copy_(average)
        self.copy_rest()

    def copy_rest(self) -> None:
        """Copy the bytes that nothing manages to the side that goes into the model."""
        for other, live in self.rest:
            other.copy_(live)

    def free(self) -> None:
        """Give scratch memory back, after it came out."""
        # numpy() marks a storage as fixed: an array taken in the block still reads the scratch memory.
        if self.casts and self.storage.resizable() and self.live.resizable():
            scratch = self.casts[0][0]
            if has_streams(scratch.device):  # what reads it was enqueued before on this stream, not the allocating one
                scratch.record_stream(current_stream(scratch.device))
            self.storage.resize_(0)

    def view_of(self, tensor: Tensor) -> Tensor:
        """Return the place of a live tensor in this storage."""
        offset = tensor.storage_offset() - self.begin // tensor.dtype.itemsize
        return view_in(self.storage, tensor, tensor.dtype, offset)
