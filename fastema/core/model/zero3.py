"""Parameters that DeepSpeed's ZeRO-3 has partitioned: each process has a flat part, `ds_tensor`, of every parameter.

The parameter itself is empty outside of a forward. FastEMA averages and swaps the parts, each process its own, without
communication: what DeepSpeed gathers afterwards is made of them. What it has gathered before is dropped at a swap.

Part r of n is elements [r * k, (r + 1) * k) of the flat parameter with k = ceil(numel / n), which is how a DTensor is
sharded too. As such an average goes into a state, so that torch.distributed.checkpoint loads it on any number of
processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def is_partitioned(tensor: Any) -> bool:
    """Return True for a parameter with parts that an engine trains; before `deepspeed.initialize()` there is none."""
    return isinstance(getattr(tensor, "ds_tensor", None), Tensor) and hasattr(tensor, "_z3_optimizer")


def shape_of(tensor: Tensor) -> torch.Size:
    """Return the shape of the whole tensor."""
    return tensor.ds_shape if is_partitioned(tensor) else tensor.shape  # type: ignore[attr-defined]


def why_not(parameter: Any) -> str | None:
    """Return why the part of a partitioned parameter cannot be averaged; None: it can."""
    if getattr(parameter.ds_tensor, "final_location", None) == "nvme":
        return "is offloaded to NVMe by DeepSpeed, where its part has no memory: offload parameters to the CPU instead"
    if getattr(parameter, "ds_secondary_tensor", None) is not None:
        return "has a second partition (zero_hpz_partition_size), which a swap would not reach: set it to 1"
    if hasattr(parameter.ds_tensor, "ds_quant_scale"):
        return "is quantised by DeepSpeed (zero_quantized_nontrainable_weights)"
    return None


def without_padding(parameter: Any, part: Tensor) -> Tensor:
    """Return what of a part, or of the average of one, is of the parameter: the last parts have elements beyond it."""
    begin = parameter.ds_tensor.numel() * parameter.ds_zero_partition_rank
    return part[: max(0, min(part.numel(), parameter.ds_numel - begin))]


def as_dtensor(parameter: Any, part: Tensor) -> Tensor:
    """Return a part, or the average of one, as a flat DTensor; it shares memory."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    mesh = _mesh(parameter.ds_process_group, parameter.device.type)
    meta = TensorMeta(torch.Size((parameter.ds_numel,)), (1,), part.dtype)
    # from_local() would move the average of parameters that are offloaded to the mesh's device.
    return DTensor(
        without_padding(parameter, part), DTensorSpec(mesh, (Shard(0),), tensor_meta=meta), requires_grad=False
    )


@lru_cache(maxsize=8)
def _mesh(group: Any, device_type: str) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(group, device_type)


def drop_gathered(parameters: Iterable[Any]) -> None:
    """Free the parameters that DeepSpeed has gathered, or gathers now: the next forward gathers them again."""
    gathered = [parameter for parameter in parameters if parameter.ds_status.name != "NOT_AVAILABLE"]
    for optimizer in {id(parameter._z3_optimizer): parameter._z3_optimizer for parameter in gathered}.values():
        optimizer.empty_partition_cache()
