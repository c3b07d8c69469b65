"""Out of memory, in words: what to lower, that which costs the result least first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastema.segmentation.errors import UserError
from fastema.segmentation.options import TrainOptions

# What the CPU allocator says, on Linux, Windows and macOS.
_CPU_WORDS = ("can't allocate memory", "not enough memory", "DefaultCPUAllocator", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a GPU or in the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in _CPU_WORDS)


def what_to_lower(options: TrainOptions, stage: int, device: torch.device) -> str:
    """The options to change, in the order in which to try them."""
    batch_size = options.second_batch_size if stage == 2 else options.batch_size
    flag = "--stage2-batch-size" if stage == 2 and options.stage2_batch_size is not None else "--batch-size"
    steps = []
    if options.amp == "none" and device.type == "cuda":
        steps.append("--amp bf16")
    if batch_size > 1:
        steps.append(f"a smaller {flag} than {batch_size} (with more --accumulation-steps the step stays the same)")
    steps.append(f"a smaller --img-size than {options.img_size}")
    if options.num_experts:
        steps.append(f"fewer --num-experts than {options.num_experts}")
    steps.append("a smaller --backbone")
    if device.type == "cpu" and options.num_workers:
        steps.append("fewer --num-workers")
    return f"try, in this order: {'; '.join(steps)}"


@contextmanager
def shortage_explained(options: TrainOptions, stage: int, device: torch.device, when: str) -> Iterator[None]:
    """A block in which running out of memory becomes a `UserError` that says what to lower."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory {when} ({str(error).strip().splitlines()[0] if str(error).strip() else 'host memory'}): "
            f"{what_to_lower(options, stage, device)}"
        ) from error
