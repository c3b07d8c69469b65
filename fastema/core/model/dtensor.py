"""Sharded models: the DTensors of tensor parallelism and of FSDP2's `fully_shard`.

Only a DTensor's local tensor has memory. FastEMA averages and swaps local tensors, each process its own, without
communication, and wraps them into DTensors again when it returns them.

FSDP2 computes with gathered copies, which may stay in the modules' slots after a forward. The sharded parameters are
looked up behind them, and the copies are dropped at a swap, which would make them stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastema.core.model import zero3
from fastema.core.model.tensors import FSDP1, is_wrapper


def is_dtensor(tensor: object) -> bool:
    # Every process that has a DTensor imported its package; `import fastema` must not.
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(tensor, package.DTensor)


def local_part(tensor: Any) -> Tensor:
    """Return the part in this process's memory: of a sharded tensor its local one, else the tensor itself."""
    if is_dtensor(tensor):
        return tensor._local_tensor
    return tensor.ds_tensor if zero3.is_partitioned(tensor) else tensor


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
    if zero3.is_partitioned(whole):
        return zero3.as_dtensor(whole, local)
    if not is_dtensor(whole):
        return local
    spec = whole._spec  # from_local() would move an offloaded average to the mesh's device
    if spec.tensor_meta.dtype != local.dtype:
        spec = replace(spec, tensor_meta=spec.tensor_meta._replace(dtype=local.dtype))
    return sys.modules["torch.distributed.tensor"].DTensor(local, spec, requires_grad=False)


def placement(tensor: Any) -> str:
    """Describe how a tensor is sharded, for error messages; empty for those that are not."""
    if zero3.is_partitioned(tensor):
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
    return zero3.as_dtensor(tensor, tensor.ds_tensor) if zero3.is_partitioned(tensor) else tensor


def in_shape_of(whole: Any, value: Any) -> Any:
    """Return `value` in the shape that the state has of `whole`: flat, where ZeRO-3 has partitioned that."""
    if isinstance(value, Tensor) and zero3.is_partitioned(whole) and value.shape == whole.ds_shape:
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
            self._partitioned = [parameter for parameter in parameters if zero3.is_partitioned(parameter)]  # type: ignore[misc]
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
            zero3.drop_gathered(self._partitioned)

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
