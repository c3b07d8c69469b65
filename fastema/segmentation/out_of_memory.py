"""Turn running out of memory into an error that says what to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastema.segmentation.errors import UserError
from fastema.segmentation.options import TrainOptions

# Messages of the CPU allocator on Linux, Windows and macOS.
_CPU_MESSAGES = ("can't allocate memory", "not enough memory", "DefaultCPUAllocator", "Cannot allocate memory")


@contextmanager
def explain_out_of_memory(options: TrainOptions, stage: int, device: torch.device, when: str) -> Iterator[None]:
    """Raise `UserError` with what to lower if memory runs out within a block, on a GPU or the host."""
    try:
        yield
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        first_line = str(error).strip().partition("\n")[0] or "host memory"
        raise UserError(f"out of memory {when} ({first_line}): {_what_to_lower(options, stage, device)}") from error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in _CPU_MESSAGES)


def _what_to_lower(options: TrainOptions, stage: int, device: torch.device) -> str:
    batch_size = options.second_batch_size if stage == 2 else options.batch_size
    flag = "--stage2-batch-size" if stage == 2 and options.stage2_batch_size is not None else "--batch-size"
    # What costs the result least comes first.
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
