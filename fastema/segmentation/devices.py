"""Device, precision and memory of a training: on any accelerator that torch knows, or the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastema.errors import UserError
from fastema.memory.streams import has_streams
from fastema.segmentation.options import TrainOptions

CPU = torch.device("cpu")

# In messages of the CPU allocator on Linux, Windows and macOS, of CUDA's driver, and of MPS.
_NO_MEMORY = ("allocate memory", "not enough memory", "DefaultCPUAllocator", "out of memory")


def accelerator() -> torch.device | None:
    """Return the kind of accelerator that `auto` trains on; None without one, and for MPS: give `--device mps`."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found if found is not None and has_streams(found) else None


def select_device(name: str) -> torch.device:
    """Return the device of a `--device` flag; `auto` is the accelerator if there is one."""
    if name == "auto":
        return accelerator() or CPU
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def synchronize(device: torch.device) -> None:
    """Wait for a device's work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class Precision:
    """Automatic mixed precision of forward and backward; weights, moments and averages stay float32.

    Attributes:
        amp: "none", "bf16" or "fp16".
        device: of the training.
    """

    amp: str
    device: torch.device

    def __post_init__(self) -> None:
        if self.amp == "fp16" and self.device.type == "cpu":
            raise UserError(
                f"--amp fp16 needs a GPU, and this run is on {self.device}: float16 gradients must be scaled, and a "
                "CPU gains nothing from it. Use --amp bf16, or none"
            )
        has_bfloat16 = getattr(torch.get_device_module(self.device), "is_bf16_supported", lambda: True)
        if self.amp == "bf16" and not has_bfloat16():
            raise UserError(f"{self.device} has no bfloat16: use --amp fp16, or none")

    def autocast(self) -> torch.autocast:
        """Return the context of a forward."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.amp)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """Return a gradient scaler, which is disabled without float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")


@contextmanager
def explain_out_of_memory(options: TrainOptions, stage: int, device: torch.device, when: str) -> Iterator[None]:
    """Raise `UserError` with what to lower if memory runs out within a block, on a GPU or the host."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        kinds = (MemoryError, torch.OutOfMemoryError)
        if not isinstance(error, kinds) and not any(text in str(error) for text in _NO_MEMORY):
            raise
        reason = str(error).strip().partition("\n")[0] or "host memory"
        steps = "; ".join(_what_to_lower(options, stage, device))
        raise UserError(f"out of memory {when} ({reason}): try, in this order: {steps}") from error


def _what_to_lower(options: TrainOptions, stage: int, device: torch.device) -> Iterator[str]:
    # What costs the result least comes first.
    if options.amp == "none" and device.type != "cpu":
        yield "--amp bf16"
    batch_size = options.second_batch_size if stage == 2 else options.batch_size
    flag = "--stage2-batch-size" if stage == 2 and options.stage2_batch_size is not None else "--batch-size"
    if batch_size > 1:
        yield f"a smaller {flag} than {batch_size} (with more --accumulation-steps the step stays the same)"
    yield f"a smaller --img-size than {options.img_size}"
    if options.num_experts:
        yield f"fewer --num-experts than {options.num_experts}"
    yield "a smaller --backbone"
    if device.type == "cpu" and options.num_workers:
        yield "fewer --num-workers"
