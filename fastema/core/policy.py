"""The rule of each tensor of a model: average, copy or skip.

Parameters are averaged. Of the buffers only running statistics of normalisation layers are: the others are counters,
masks, caches or spectral-norm vectors, whose average means nothing. Integer and bool tensors are copied.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fastema.core import sharded
from fastema.core.pairs import Pair, Rule
from fastema.core.tensors import why_no_storage

Buffers = Literal["auto", "average", "copy", "skip"]
#: (name, tensor, the module that owns it or None) -> a rule, or None for the default.
Policy = Callable[[str, Tensor, "nn.Module | None"], "Rule | None"]
#: What FastEMA averages: a module, or named tensors.
Source = nn.Module | Iterable[tuple[str, Tensor]]

RUNNING_STATISTICS = frozenset({"running_mean", "running_var", "running_std"})
AVERAGED_DTYPES = frozenset(
    {torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex32, torch.complex64, torch.complex128}
)
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # submodules of torch.compile and of activation checkpointing
_PRECEDENCE: dict[Rule, int] = {"average": 0, "copy": 1, "skip": 2}


@dataclass(frozen=True)
class _Slot:
    name: str
    tensor: Tensor
    module: nn.Module | None
    is_buffer: bool
    persistent: bool

    @property
    def place(self) -> tuple[dict[str, Any], str] | None:
        """The module's dict and the key; None for a pair of name and tensor."""
        if self.module is None:
            return None
        leaf = self.name.rpartition(".")[2]
        return (self.module._buffers if self.is_buffer else self.module._parameters), leaf


def checked_source(source: Source) -> Source:
    """Return `source`, pairs as a list.

    Raises:
        TypeError: it is neither a module nor pairs of name and tensor.
    """
    if isinstance(source, nn.Module):
        return source
    items: list[Any] = list(source) if isinstance(source, Iterable) and not isinstance(source, Tensor) else [source]
    for item in items:
        if not (isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], str)):
            raise TypeError(
                "FastEMA needs a module, or pairs of name and tensor such as model.named_parameters(); got "
                f"{type(source).__name__} with a {type(item).__name__}"
            )
    return [(name, tensor) for name, tensor in items]


def clean_name(name: str) -> str:
    """Return the name without the parts that torch.compile and activation checkpointing add."""
    if "_orig_mod" not in name and "_checkpoint_wrapped_module" not in name:
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DDP, DataParallel and DeepSpeed: every state has the keys of that one."""
    deepspeed = sys.modules.get("deepspeed")  # nothing is its engine where it was not imported
    wrappers = (DistributedDataParallel, DataParallel, getattr(deepspeed, "DeepSpeedEngine", DataParallel))
    while True:
        if isinstance(module, wrappers):
            module = module.module
        elif "_orig_mod" in getattr(module, "_modules", ()):
            module = module.get_submodule("_orig_mod")
        else:
            return module


def _slots(source: Source) -> list[_Slot]:
    """Return every named tensor; a tensor with several names is returned once for each name."""
    if not isinstance(source, nn.Module):
        return [_Slot(name, tensor, None, False, True) for name, tensor in source]
    with sharded.GatheredParameters(source.modules()).set_aside():
        return list(_slots_of(unwrapped(source)))


def _slots_of(model: nn.Module) -> Iterator[_Slot]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = "." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield _Slot(clean_name(prefix + dot + name), parameter, module, False, True)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                persistent = name not in module._non_persistent_buffers_set
                yield _Slot(clean_name(prefix + dot + name), buffer, module, True, persistent)


def named_tensors(source: Source) -> Iterator[tuple[str, Tensor]]:
    """Yield every name with its tensor; tied tensors come under each of their names."""
    return ((slot.name, slot.tensor) for slot in _slots(source))


def _rule_for(slot: _Slot, buffers: Buffers, policy: Policy | None) -> Rule:
    chosen = policy(slot.name, slot.tensor, slot.module) if policy is not None else None
    if chosen is None:
        if slot.tensor.dtype not in AVERAGED_DTYPES:
            return "skip" if slot.is_buffer and buffers == "skip" else "copy"
        if not slot.is_buffer:
            return "average"
        if buffers != "auto":
            return buffers
        return "average" if slot.name.rpartition(".")[2] in RUNNING_STATISTICS else "copy"
    if chosen not in get_args(Rule):
        raise ValueError(
            f"policy returned {chosen!r} for {slot.name!r}; it must return one of {get_args(Rule)} or None"
        )
    if chosen == "average" and slot.tensor.dtype not in AVERAGED_DTYPES:
        raise ValueError(f"policy wants to average {slot.name!r}, but {slot.tensor.dtype} cannot be averaged: copy it")
    return chosen


def _refuse_unmanageable(slot: _Slot) -> None:
    tensor = sharded.local_part(slot.tensor)
    reason: str | None
    if sharded.is_partitioned(slot.tensor):
        alone = "is partitioned by DeepSpeed's ZeRO-3: give FastEMA the engine, or its module, not tensors alone"
        reason = alone if slot.module is None else sharded.why_no_part(slot.tensor) or why_no_storage(tensor)
    elif tensor is not slot.tensor and slot.module is None:
        reason = "is a DTensor without its module, in which FSDP may keep copies of it: give FastEMA the model itself"
    elif sharded.has_partial_sums(slot.tensor):
        reason = f"holds sums that are not reduced yet, {slot.tensor.placements}: redistribute() it"  # type: ignore[attr-defined]
    else:
        reason = why_no_storage(tensor)
    if reason is not None:
        raise ValueError(f"{slot.name!r} {reason}. To leave it out, return 'skip' for it from the policy.")


def collect(
    source: Source,
    buffers: Buffers = "auto",
    policy: Policy | None = None,
    replaced: Collection[str] = (),
    kept: Mapping[str, Rule | None] = MappingProxyType({}),
) -> list[Pair]:
    """Return all tensors that are averaged or copied, each once, in the model's order.

    Args:
        replaced: names of buffers that the model reassigns; those that are copied become `loose`.
        kept: rules that hold by name whatever the policy says now; None: the default.

    Raises:
        ValueError: nothing to average, a tensor that cannot be managed, or a rule that does not exist.
        TypeError: a value is not a tensor.
    """
    if buffers not in get_args(Buffers):
        raise ValueError(f"buffers must be one of {get_args(Buffers)}, got {buffers!r}")
    found: dict[int, Pair] = {}
    by_name: dict[str, Tensor] = {}
    for slot in _slots(source):
        if not isinstance(slot.tensor, Tensor):
            raise TypeError(f"{slot.name!r} is a {type(slot.tensor).__name__}, not a tensor")
        if by_name.setdefault(slot.name, slot.tensor) is not slot.tensor:
            raise ValueError(f"two tensors are named {slot.name!r}: a state could hold only one of them")
        rule = kept.get(slot.name)
        if rule is None or slot.tensor.dtype not in AVERAGED_DTYPES:
            rule = _rule_for(slot, buffers, None if slot.name in kept else policy)
        if rule != "skip":
            _refuse_unmanageable(slot)
        pair = found.setdefault(id(slot.tensor), Pair(slot.tensor, rule, persistent=slot.persistent))
        pair.names.append(slot.name)
        if slot.place is not None:
            pair.slots.append(slot.place)
        pair.persistent |= slot.persistent
        # A tied tensor takes the strongest rule of its names.
        pair.rule = min(pair.rule, rule, key=_PRECEDENCE.__getitem__)
    selected = [pair for pair in found.values() if pair.rule != "skip"]
    for pair in selected:
        pair.loose = pair.rule == "copy" and pair.name in replaced and pair.live is pair.whole
    if not any(pair.rule == "average" for pair in selected):
        what = "parameters" if isinstance(source, nn.Module) else "tensors"
        raise ValueError(f"nothing to average: the model has no floating-point {what}, or the policy skips them all")
    return selected


def frozen_parameters(source: Source, pairs: Iterable[Pair]) -> list[Tensor]:
    """Return the parameters that are not averaged and need no gradient: once one does, a policy may say otherwise."""
    averaged = {id(pair.whole) for pair in pairs if pair.rule == "average"}
    parameters = {id(tensor): tensor for _, tensor in named_tensors(source) if isinstance(tensor, nn.Parameter)}
    return [each for key, each in parameters.items() if key not in averaged and not each.requires_grad]
