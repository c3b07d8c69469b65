"""Tell what a tensor is: whether it has elements in memory of its own, and whether values can be copied into it.

Found out from the tensor and its class, not from a list of libraries; but for those that take the elements away and
leave the tensor looking like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastema.memory.bytes import element_runs

FSDP1 = (
    "FullyShardedDataParallel keeps parameters in flat copies that FastEMA cannot follow: shard with "
    "torch.distributed.fsdp.fully_shard(model) instead"
)
_PLAIN_FUNCTIONS = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)  # type: ignore[attr-defined]


def why_elsewhere(tensor: Tensor) -> str | None:
    """Return why the elements of `tensor` are not in it, but where an average could not follow; None: they are."""
    if nn.parameter.is_lazy(tensor):
        return None
    if hasattr(tensor, "ds_id") and tensor.shape != getattr(tensor, "ds_shape", None):
        return (
            "is partitioned by DeepSpeed's ZeRO-3, and has no elements outside of a gathering: FastEMA(engine), "
            "built after deepspeed.initialize(), averages the parts"
        )
    if getattr(tensor, "_fsdp_flattened", False):  # flat parameters, and views of them
        return f"is sharded: {FSDP1}"
    if tensor.device.type == "meta":
        return (
            "is on the meta device: materialise the model (to_empty() and initialise), or load it without offloading, "
            "first; it has no memory"
        )
    is_plain = tensor.layout == torch.strided and not is_wrapper(tensor)
    if is_plain and tensor.numel() and tensor.untyped_storage().nbytes() == 0:
        return "has no memory: its storage was freed"
    return None


def refuse_elsewhere(what: str, named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError for the first tensor whose elements are not in it; see `why_elsewhere`."""
    for name, tensor in named:
        reason = why_elsewhere(tensor)
        if reason is not None:
            raise ValueError(f"{what}: {name!r} {reason}")


def why_no_storage(tensor: Tensor) -> str | None:
    """Return why `tensor` has no ordinary memory of its own; None: it has."""
    if nn.parameter.is_lazy(tensor):
        return "is not initialised yet: run the lazy module once first"
    if tensor.layout != torch.strided:
        return f"has layout {tensor.layout}: only strided tensors have storage that can be mirrored"
    if tensor.is_quantized:
        return "is quantised: average the float model and quantise the result"
    if is_wrapper(tensor):
        return f"is a {type(tensor).__name__}, a wrapper without storage of its own"
    return why_elsewhere(tensor)


def is_wrapper(tensor: Tensor) -> bool:
    """Return True if the tensor only refers to others, which its class knows."""
    if is_traceable_wrapper_subclass(tensor):
        return True
    # Of a wrapper that torch.compile cannot see through, the storage has a size and no memory.
    is_of_own_kind = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return is_of_own_kind and tensor.device.type != "meta" and tensor.numel() > 0 and tensor.data_ptr() == 0


def why_not_writable(tensor: Tensor, dtype: torch.dtype, kind: type[Tensor]) -> str | None:
    """Return why values of `dtype` cannot be copied into the memory of `tensor`; None: they can.

    Args:
        kind: a class whose tensors may be written to, though it has operations of its own.
    """
    if nn.parameter.is_lazy(tensor):
        return "is not initialised"
    if tensor.device.type == "meta":
        return "is on the meta device"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"is quantised or of layout {tensor.layout}"
    # With operations of its own it is more than its elements: packed, scaled, or somewhere else.
    if is_wrapper(tensor) or (has_own_operations(type(tensor)) and type(tensor) is not kind):
        return f"is a {type(tensor).__name__}"
    if not torch.can_cast(dtype, tensor.dtype):
        return f"is of dtype {tensor.dtype}"  # integers would cut floats, real numbers drop imaginary parts
    reason = why_elsewhere(tensor)
    if reason is None:
        try:
            element_runs(tensor)
        except ValueError as error:
            return str(error)
    return reason


def has_own_operations(kind: Any) -> bool:
    """Return True if tensors of this class do not calculate as their elements alone would."""
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ or function not in _PLAIN_FUNCTIONS
