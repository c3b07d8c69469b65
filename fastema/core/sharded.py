"""Sharded models: the DTensors of tensor parallelism and of FSDP2's `fully_shard`, and the parts of DeepSpeed's ZeRO-3.

Only a DTensor's local tensor has memory. FastEMA averages and swaps local tensors, each process its own, without
communication, and wraps them into DTensors again when it returns them.

FSDP2 computes with gathered copies, which may stay in the modules' slots after a forward. The sharded parameters are
looked up behind them, and the copies are dropped at a swap, which would make them stale.

A parameter that ZeRO-3 has partitioned is empty outside of a forward; its part r of n is elements [r * k, (r + 1) * k)
of the flat parameter with k = ceil(numel / n), which is how a DTensor is sharded too. As such its average goes into a
state, so that torch.distributed.checkpoint loads it on any number of processes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fastema.core.tensors import FSDP1, is_wrapper


def is_dtensor(tensor: object) -> bool:
    # Every process that has a DTensor imported its package; `import fastema` must not.
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(tensor, package.DTensor)


def local_part(tensor: Any) -> Tensor:
    """Return the part in this process's memory: of a sharded tensor its local one, else the tensor itself."""
    if is_dtensor(tensor):
        return tensor._local_tensor
    return tensor.ds_tensor if is_partitioned(tensor) else tensor


def has_storage(tensor: Any) -> bool:
    """Return True if the part in this process is an ordinary tensor with memory of its own."""
    local = local_part(tensor)
    return (
        isinstance(local, Tensor)
        and not nn.parameter.is_lazy(local)
        and local.layout == torch.strided
        and not is_wrapper(local)
    )


def as_dtensor_like(whole: Any, local: Tensor) -> Tensor:
    """Return `local` as a DTensor like `whole`, or itself if `whole` is not sharded; it shares memory."""
    if is_partitioned(whole):
        return part_as_dtensor(whole, local)
    if not is_dtensor(whole):
        return local
    spec = whole._spec  # from_local() would move an offloaded average to the mesh's device
    if spec.tensor_meta.dtype != local.dtype:
        spec = replace(spec, tensor_meta=spec.tensor_meta._replace(dtype=local.dtype))
    return sys.modules["torch.distributed.tensor"].DTensor(local, spec, requires_grad=False)


def placement(tensor: Any) -> str:
    """Describe how a tensor is sharded, for error messages; empty for those that are not."""
    if is_partitioned(tensor):
        return " partitioned by ZeRO-3"
    return f" as {tensor.placements} on {tensor.device_mesh}" if is_dtensor(tensor) else ""


def has_partial_sums(tensor: Any) -> bool:
    return is_dtensor(tensor) and any(place.is_partial() for place in tensor.placements)


def difference(name: str, target: Any, value: Any) -> str | None:
    """Return why `assignment(target, value)` is impossible, or None; shapes and dtypes are not checked."""
    if not is_dtensor(value):
        return None
    if not is_dtensor(target):
        return (
            f"{name!r} is sharded on one side and a plain tensor on the other: let torch.distributed.checkpoint load "
            "it, or gather it with full_tensor() on every rank first"
        )
    if target.placements != value.placements or target.device_mesh != value.device_mesh:
        return (
            f"{name!r} is sharded{placement(value)}, expected{placement(target)}: let torch.distributed.checkpoint "
            "load it"
        )
    return None


def as_dtensor(tensor: Any) -> Any:
    """Return a tensor that ZeRO-3 has partitioned as a flat DTensor, and others as they are."""
    return part_as_dtensor(tensor, tensor.ds_tensor) if is_partitioned(tensor) else tensor


def in_shape_of(whole: Any, value: Any) -> Any:
    """Return `value` in the shape that the state has of `whole`: flat, where ZeRO-3 has partitioned that."""
    if isinstance(value, Tensor) and is_partitioned(whole) and value.shape == whole.ds_shape:
        return value.flatten()
    return value


def assignment(target: Any, value: Any) -> tuple[Tensor, Tensor]:
    """Return the local tensors of `target.copy_(value)`, without communication; a plain `value` is sharded first."""
    if is_dtensor(target) and not is_dtensor(value):
        package = sys.modules["torch.distributed.tensor"]
        mesh = target.device_mesh
        whole = package.DTensor.from_local(value, mesh, [package.Replicate()] * mesh.ndim, run_check=False)
        value = whole.redistribute(placements=target.placements)
    return local_part(target), local_part(value)


class GatheredParameters:
    """Access to the parameters that FSDP2, or DeepSpeed's ZeRO-3, gathers for these modules.

    Raises:
        ValueError: a module is wrapped by FSDP's first version.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._groups: list[Any] = []
        self._partitioned: list[Tensor] = []
        if "deepspeed" in sys.modules:
            modules = list(modules)
            parameters = [parameter for module in modules for parameter in module._parameters.values()]
            self._partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]  # type: ignore[misc]
        package: Any = sys.modules.get("torch.distributed.fsdp")
        if package is None:
            return
        for module in modules:
            if isinstance(module, package.FullyShardedDataParallel):
                raise ValueError(FSDP1)
            if isinstance(module, package.FSDPModule):
                fsdp_state = module._get_fsdp_state()
                single = getattr(fsdp_state, "_fsdp_param_group", None)  # older torch has at most one
                groups = getattr(fsdp_state, "_fsdp_param_groups", [single] if single is not None else [])
                self._groups += [group for group in groups if group not in self._groups]

    def __bool__(self) -> bool:
        """Return True if modules have gathered parameters in the place of their own: those of FSDP2."""
        return bool(self._groups)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Open a block in which the modules' slots hold the sharded parameters; nothing is freed or sent."""
        found = [(parameter, _in_slot(parameter)) for group in self._groups for parameter in group.fsdp_params]
        gathered = [(parameter, tensor) for parameter, tensor in found if tensor is not parameter.sharded_param]
        for parameter, _ in gathered:
            parameter._setattr_on_modules(parameter.sharded_param)
        try:
            yield
        finally:
            for parameter, tensor in gathered:
                parameter._setattr_on_modules(tensor)

    def drop(self) -> None:
        """Free the gathered copies: the next forward gathers them again."""
        for group in self._groups:
            group.wait_for_unshard()  # a prefetch may be running
            group._to_sharded()  # as reshard(), but also after a forward that raised
        if self._partitioned:
            drop_gathered(self._partitioned)

    def tensors(self) -> list[Tensor]:
        """Return the gathered parameters, to which recorded graphs refer."""
        return [
            parameter._unsharded_param
            for group in self._groups
            for parameter in group.fsdp_params
            if hasattr(parameter, "_unsharded_param")
        ]


def _in_slot(parameter: Any) -> Any:
    module = parameter._module_info
    return module.module._parameters.get(module.param_name)


# ---- what DeepSpeed's ZeRO-3 has partitioned: each process has a flat part, `ds_tensor`, of every parameter ----


def is_partitioned(tensor: Any) -> bool:
    """Return True for a parameter with parts that an engine trains; before `deepspeed.initialize()` there is none."""
    return isinstance(getattr(tensor, "ds_tensor", None), Tensor) and hasattr(tensor, "_z3_optimizer")


def shape_of(tensor: Tensor) -> torch.Size:
    """Return the shape of the whole tensor."""
    return tensor.ds_shape if is_partitioned(tensor) else tensor.shape  # type: ignore[attr-defined]


def why_no_part(parameter: Any) -> str | None:
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


def part_as_dtensor(parameter: Any, part: Tensor) -> Tensor:
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
