"""The streams that use a plan's memory: the allocator must know them, else it may reuse the memory too early.

csrc/plan.cpp does the same for the native backend.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Streams:
    """Tensors that are recorded on every stream that uses them; each stream once.

    Args:
        device: where the tensors are; on a CPU nothing is recorded.
        tensors: as long-lived as the plan.
    """

    def __init__(self, device: torch.device, tensors: Iterable[Tensor]) -> None:
        self._device = device
        self._gpu = None if device.type == "cpu" else torch.get_device_module(device)
        self._tensors = list(tensors) if self._gpu is not None else []
        self._seen: list[object] = []

    def note_current(self) -> None:
        """Record the tensors on the current stream of their device."""
        if self._gpu is None:
            return
        stream = self._gpu.current_stream(self._device)
        if stream not in self._seen:
            self._seen.append(stream)
            for tensor in self._tensors:
                tensor.record_stream(stream)
