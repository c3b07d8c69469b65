"""The averages by name: save, load, copy, and move them to a rebuilt shadow.

Everything here checks first and lists the first differences; nothing is changed before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from fastema.core import sharded
from fastema.core.averages import Averages
from fastema.core.checks import difference, first_few, refuse_differences
from fastema.core.pairs import Average, Pair
from fastema.core.policy import Source, clean_name, named_tensors, unwrapped
from fastema.core.swap import SwapError
from fastema.core.tensors import why_no_storage, why_not_writable
from fastema.memory.atomic_steps import Step, run_atomically
from fastema.memory.bytes import place_of

Place: TypeAlias = tuple[Any, ...]
_IMPORT = "fastema.import_average(ema, file) goes on with the average of another library, or under other names"


class LoadResult(NamedTuple):
    """Keys that `load_state_dict(strict=False)` did not match, as in `nn.Module.load_state_dict`."""

    missing_keys: list[str]
    unexpected_keys: list[str]


_Average = TypeVar("_Average", Tensor, Average)


def averages_by_name(shadow: Averages, which: int) -> dict[str, Tensor]:
    """Return every average under each of its names."""
    return by_name(shadow.averages(which))


def stored_by_name(shadow: Averages, which: int, saved_only: bool = False) -> dict[str, Average]:
    """Return where every average is kept, under each of its names."""
    return by_name([(average.pair, average) for average in shadow.stored(which)], saved_only)


def by_name(averages: list[tuple[Pair, _Average]], saved_only: bool = False) -> dict[str, _Average]:
    """Return averages under each of their names; `saved_only`: what a state holds."""
    return {name: average for pair, average in averages if pair.is_saved or not saved_only for name in pair.names}


# ---- whole models ----


def model_state(
    source: Source,
    shadow: Averages,
    averages: list[tuple[Pair, Tensor]],
    is_in_model: bool,
    swapped: Callable[[], AbstractContextManager[Any]],
) -> dict[str, Any]:
    """Return the averaged model under the model's own keys; what has none, as it is in the model.

    Entries that a hook of the module makes anew (clones, casts, slices) are taken while the averages are in the model.

    Args:
        averages: of all tensors that have one.
        is_in_model: whether these averages are in the model now.
        swapped: open a block in which they are.
    """
    return _state_of_side(source, shadow, averages, is_in_model, swapped, "averaged")


def live_state(model: Source, shadow: Averages, restored: Callable[[], AbstractContextManager[Any]]) -> dict[str, Any]:
    """Return the trained model under its own keys, while the averages are in it.

    Args:
        restored: open a block in which they are not.
    """
    live = shadow.live_values()
    tensors = [(pair, sharded.as_dtensor_like(pair.whole, live[pair.name].detach())) for pair in shadow.pairs]
    return _state_of_side(model, shadow, tensors, False, restored, "trained")


def gathered(state: dict[str, Any], source: Source) -> dict[str, Any]:
    """Return a state with whole tensors in the CPU's memory in the process of rank 0, and an empty one in the others.

    Every process must call it; one tensor at a time is gathered.
    """
    shapes = {
        name: sharded.shape_of(tensor) for name, tensor in named_tensors(source) if sharded.is_partitioned(tensor)
    }
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    whole: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            if sharded.is_dtensor(value):
                value = value.to(value.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
            value = value.view(shapes[key]) if key in shapes else value
            value = value.detach().to("cpu", copy=True) if is_first else None
        if is_first:
            whole[key] = value
    return whole


def own_state(source: Source) -> dict[str, Any]:
    """Return the model's state as it is now, under the keys of the model inside its wrappers."""
    return unwrapped(source).state_dict() if isinstance(source, nn.Module) else dict(source)


def _state_of_side(
    source: Source,
    shadow: Averages,
    tensors: list[tuple[Pair, Tensor]],
    is_in_model: bool,
    put_in_model: Callable[[], AbstractContextManager[Any]],
    side: str,
) -> dict[str, Any]:
    """Return `source.state_dict()` with the tensors of one side: the averages, or the trained weights.

    Args:
        tensors: those of that side.
        is_in_model: True if that side is in the model now.
        put_in_model: open a block in which it is; used for values that `state_dict()` computes.
    """
    state = own_state(source)
    values = {_place_of_pair(pair): tensor for pair, tensor in tensors}
    named = by_name(tensors)
    managed = {place[0] for place in values} | shadow.live_storage_ids
    unmanaged = {_place(tensor)[0] for _, tensor in named_tensors(source) if sharded.has_storage(tensor)} - managed
    result = dict(state)
    partitioned = {name: tensor for name, tensor in named_tensors(source) if sharded.is_partitioned(tensor)}
    made_anew: list[str] = []
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        name = clean_name(key)
        if name in partitioned:  # empty in the model's own state
            result[key] = named[name] if name in named else sharded.as_dtensor(partitioned[name]).detach()
            continue
        if not sharded.has_storage(value):
            # A wrapper has no place. Put into the model inside a swap, it has the other side's value, if any.
            result[key] = named.get(name, value)
            continue
        place = _place(value)
        if place in values:
            result[key] = values[place]
        elif place[0] not in unmanaged:
            made_anew.append(key)
    if made_anew:
        try:
            with nullcontext() if is_in_model else put_in_model():
                state = state if is_in_model else own_state(source)
                result.update({key: state[key].detach().clone() for key in made_anew})
        except SwapError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"the model's state_dict() makes {first_few([repr(key) for key in made_anew], 5)} anew, so that the "
                f"{side} value can only be taken while the {side} weights are in the model, and that failed: {error}"
            ) from error
    return result


def _place(tensor: Tensor) -> Place:
    return place_of(sharded.local_part(tensor))


def _place_of_pair(pair: Pair) -> Place:
    return _place(pair.current() if pair.loose else pair.live)


def is_complete(source: Source) -> bool:
    """Return whether every module has its tensors: one that is being unpickled or copied has none yet."""
    try:
        return not isinstance(source, nn.Module) or all("_parameters" in vars(module) for module in source.modules())
    except AttributeError:
        return False


def refuse_averages_as_weights(source: Source, shadow: Averages) -> None:
    """Raise RuntimeError where tensors of the model are the averages' own memory."""
    own = shadow.storage_ids - shadow.live_storage_ids
    names = [name for name, tensor in named_tensors(source) if sharded.has_storage(tensor) and _place(tensor)[0] in own]
    if names:
        raise RuntimeError(
            f"{first_few([repr(name) for name in names], 5)} of the model are the memory of their own averages, as "
            "after model.load_state_dict(ema.shadow_state_dict(), assign=True): what changes one changes the other. "
            "Load without assign=True, or clone() the tensors before; ema.copy_to() does the same"
        )


def replaced_buffers(shadow: Averages) -> set[str]:
    """Return the names of copied buffers that the model assigned anew while everything averaged stayed."""
    if any(pair.rule == "average" and pair.slots and pair.current() is not pair.whole for pair in shadow.pairs):
        return set()
    return {
        pair.name
        for pair in shadow.pairs
        if pair.rule == "copy" and not pair.loose and pair.current() is not pair.whole
    }


# ---- copying and loading ----


@torch.no_grad()
def copy_averages(shadow: Averages, which: int, target: Source) -> None:
    """Copy every average into the tensors of `target` with the same names: into bfloat16, what a swap puts there.

    Raises:
        ValueError: a name is missing there, or a shape differs.
    """
    targets = {name: sharded.as_dtensor(tensor) for name, tensor in named_tensors(target)}
    averages = by_name(shadow.weights(which))
    others = [name for name in averages if name in targets and targets[name].dtype != averages[name].dtype]
    if others:
        exact = averages_by_name(shadow, which)
        averages.update({name: exact[name] for name in others})
    refuse_differences(
        "copy_to() got a model that differs from the averaged one",
        [
            difference(name, average, targets[name], dtypes=False) if name in targets else f"{name!r} is missing"
            for name, average in averages.items()
        ]
        + [sharded.difference(name, targets[name], averages[name]) for name in averages if name in targets]
        + [_unwritable(name, averages[name], targets[name]) for name in averages if name in targets],
    )
    if isinstance(target, nn.Module):
        sharded.GatheredParameters(target.modules()).drop()
    copies = [sharded.assignment(targets[name], average) for name, average in averages.items()]
    run_atomically([partial(Tensor.copy_, *copy) for copy in copies])


def saved_averages(state: Any) -> list[dict[str, Tensor]]:
    """Return the averages of a saved state, or raise ValueError if it is none."""
    if not isinstance(state, dict):
        raise ValueError(f"not a FastEMA state: it is a {type(state).__name__}, not a dict. {_IMPORT}")
    absent = {"step", "num_updates", "shadow"} - set(state)
    if absent:
        raise ValueError(f"not a FastEMA state: it has no {', '.join(sorted(absent))}. {_IMPORT}")
    saved = state["shadow"] if isinstance(state["shadow"], list) else [state["shadow"]]
    if not all(isinstance(averages, dict) for averages in saved):
        raise ValueError(f"not a FastEMA state: its shadow does not hold tensors by name. {_IMPORT}")
    return saved


@torch.no_grad()
def load_steps(shadow: Averages, saved: list[dict[str, Tensor]], strict: bool) -> tuple[LoadResult, list[Step]]:
    """Prepare to load saved averages, one dictionary for each shadow, by value. Nothing is changed yet.

    Returns:
        The names that are only on one side, and the steps for `run_atomically`.

    Raises:
        ValueError: another number of shadows; shapes that differ; with `strict`, names or dtypes that differ; without,
            no name in common.
    """
    if len(saved) != shadow.count:
        raise ValueError(f"the state has {len(saved)} averages, this FastEMA has {shadow.count}: build it with as many")
    missing: list[str] = []
    unexpected: list[str] = []
    differences: list[str | None] = []
    left: list[str] = []  # averages that keep their values
    targets: list[tuple[Average, Tensor]] = []
    for which, values in enumerate(saved):
        averages = stored_by_name(shadow, which, saved_only=True)
        own = {name: average.shown() for name, average in averages.items()}
        values = {
            name: sharded.in_shape_of(averages[name].pair.whole, value) if name in averages else value
            for name, value in values.items()
        }
        missing = [name for name in own if name not in values]
        unexpected = [name for name in values if name not in own]
        found = [name for name in own if name in values]
        differences += [difference(name, own[name], values[name], dtypes=strict) for name in found]
        differences += [sharded.difference(name, own[name], values[name]) for name in found]
        differences += [_unreadable(name, values[name]) for name in found]
        targets += [(averages[name], values[name]) for name in found]
        loaded = {id(averages[name].pair) for name in found if averages[name].pair.rule == "average"}
        if not loaded and (values or not strict):
            theirs, ours = next(iter(values), None), next(iter(own))
            differences.append(f"none of its names is an average's here ({theirs!r} there, {ours!r} here). {_IMPORT}")
        elif strict:
            differences += [f"{name!r} is missing in the state" for name in missing]
            differences += [f"{name!r} is in the state, not in the model" for name in unexpected]
        else:
            left += [n for n in missing if _is_parameter(averages[n]) and id(averages[n].pair) not in loaded]
    refuse_differences("the state is of another model", differences)
    if left:
        warnings.warn(
            f"{first_few([repr(name) for name in left])} not in the state: their averages stay as they are, and go on "
            "with its counters",
            stacklevel=4,
        )
    return LoadResult(missing, unexpected), [step for average, value in targets for step in average.fill_steps(value)]


def _is_parameter(average: Average) -> bool:
    return isinstance(average.pair.whole, nn.Parameter)


@torch.no_grad()
def carry_over(old: Averages, new: Averages, may_begin: bool = False) -> list[str]:
    """Copy the averages of a shadow into one that was built anew for the same model.

    What is only copied has no history: it may come, go and change.

    Args:
        may_begin: True if tensors may be averaged that were not before.

    Returns:
        Their names.

    Raises:
        RuntimeError: an averaged tensor is new, gone, or of another shape, dtype or device.
    """
    was = {name: pair for pair in old.pairs if pair.rule == "average" for name in pair.names}
    now = {name: pair for pair in new.pairs if pair.rule == "average" for name in pair.names}
    begun = [name for name in now if name not in was]
    differences = [f"{name!r} is gone" for name in was if name not in now]
    differences += [] if may_begin else [f"{name!r} is new" for name in begun]
    differences += [
        f"{name!r} is now {pair.layout}, was {was[name].layout}"
        for name, pair in now.items()
        if name in was and was[name].layout != pair.layout
    ]
    refuse_differences("the model changed since FastEMA was built; build a new one", differences, RuntimeError)
    for which in range(old.count):
        before, after = (stored_by_name(shadow, which) for shadow in (old, new))
        run_atomically([step for name in now if name in was for step in after[name].fill_steps(before[name])])
    new.nonfinite_elsewhere = old.nonfinite_count()
    return begun


def _unreadable(name: str, value: Any) -> str | None:
    """Return why nothing can be copied from a tensor; None where it can."""
    reason = why_no_storage(sharded.local_part(value)) if isinstance(value, Tensor) else None
    return None if reason is None else f"{name!r} {reason}; an ordinary tensor is expected"


def _unwritable(name: str, value: Tensor, target: Tensor) -> str | None:
    """Return why nothing can be copied into a tensor of a model; None where it can."""
    local = sharded.local_part(target)
    reason = why_not_writable(local, value.dtype, type(local))
    return None if reason is None else f"{name!r} {reason}"


@torch.no_grad()
def fill(shadow: Averages, which: int, values: dict[str, Tensor]) -> None:
    """Copy values into the averages of the same names."""
    averages = stored_by_name(shadow, which)
    run_atomically([step for name, value in values.items() for step in averages[name].fill_steps(value)])
