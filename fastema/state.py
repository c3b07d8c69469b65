"""The averages by name: saving, loading, copying, and carrying them over to a rebuilt shadow.

Everything here checks first and lists the first differences; nothing is changed before.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastema import sharded
from fastema.checks import difference, refuse_differences
from fastema.policy import Source, named_tensors
from fastema.shadow import Shadow
from fastema.uncut import Step, run_uncut


def averages_by_name(shadow: Shadow, which: int, saved_only: bool = False) -> dict[str, Tensor]:
    """Every average under each of its names; `saved_only`: what a state holds."""
    averages = shadow.averages(which)
    return {name: average for entry, average in averages if entry.is_saved or not saved_only for name in entry.names}


def model_state(source: Source, shadow: Shadow, which: int) -> dict[str, Any]:
    """The averaged model under the model's own keys; what is not managed, as it is in the model."""
    averages = {_place(entry.tensor): average for entry, average in shadow.averages(which)}
    state: dict[str, Any] = source.state_dict() if isinstance(source, nn.Module) else dict(source)
    return {
        key: averages.get(_place(value), value) if isinstance(value, Tensor) else value for key, value in state.items()
    }


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from every other, whichever alias of it is at hand."""
    tensor = sharded.local_part(tensor)
    storage = tensor.untyped_storage()
    return storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


@torch.no_grad()
def copy_averages(shadow: Shadow, which: int, target: Source) -> None:
    """Copies every average into the tensors of `target` with the same names.

    Raises:
        ValueError: a name is missing there, or a shape differs.
    """
    averages = averages_by_name(shadow, which)
    targets = dict(named_tensors(target))
    refuse_differences(
        "copy_to() got a model that differs from the averaged one",
        [
            difference(name, average, targets[name], dtypes=False) if name in targets else f"{name!r} is missing"
            for name, average in averages.items()
        ]
        + [sharded.difference(name, targets[name], averages[name]) for name in averages if name in targets],
    )
    if isinstance(target, nn.Module):
        sharded.GatheredParameters(target.modules()).drop()
    run_uncut(_copies((targets[name], average) for name, average in averages.items()))


@torch.no_grad()
def loading(shadow: Shadow, saved: list[dict[str, Tensor]], strict: bool) -> tuple[list[str], list[str], list[Step]]:
    """How to load saved averages, one dictionary for each shadow, by value. Nothing is changed yet.

    Returns:
        The names that are missing in the state, those that are only there, and the steps for `run_uncut`.

    Raises:
        ValueError: another number of shadows; shapes that differ; with `strict`, names or dtypes that differ.
    """
    if len(saved) != shadow.count:
        raise ValueError(f"the state has {len(saved)} averages, this FastEMA has {shadow.count}: build it with as many")
    missing: list[str] = []
    unexpected: list[str] = []
    differences: list[str | None] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    for which, values in enumerate(saved):
        own = averages_by_name(shadow, which, saved_only=True)
        missing = [name for name in own if name not in values]
        unexpected = [name for name in values if name not in own]
        found = [name for name in own if name in values]
        differences += [difference(name, own[name], values[name], dtypes=strict) for name in found]
        differences += [sharded.difference(name, own[name], values[name]) for name in found]
        differences += [_unreadable(name, values[name]) for name in found]
        pairs += [(own[name], values[name]) for name in found]
        if strict:
            differences += [f"{name!r} is missing in the state" for name in missing]
            differences += [f"{name!r} is in the state, not in the model" for name in unexpected]
    refuse_differences("the state is of another model", differences)
    return missing, unexpected, _copies(pairs)


@torch.no_grad()
def carry_over(old: Shadow, new: Shadow) -> None:
    """Takes the averages of a shadow over into one that was built anew for the same model.

    What is only copied has no history: it may come, go and change.

    Raises:
        RuntimeError: an averaged tensor is new, gone, or of another shape, dtype or device.
    """
    was = {name: entry for entry in old.managed if entry.rule == "average" for name in entry.names}
    now = {name: entry for entry in new.managed if entry.rule == "average" for name in entry.names}
    differences = [f"{name!r} is gone" for name in was if name not in now]
    differences += [f"{name!r} is new" for name in now if name not in was]
    differences += [
        f"{name!r} is now {entry.layout}, was {was[name].layout}"
        for name, entry in now.items()
        if name in was and was[name].layout != entry.layout
    ]
    refuse_differences("the model changed since FastEMA was built; build a new one", differences, RuntimeError)
    for which in range(old.count):
        before, after = averages_by_name(old, which), averages_by_name(new, which)
        run_uncut(_copies((after[name], before[name]) for name in now))
    new.kept_elsewhere = old.nonfinite_count()


def _unreadable(name: str, value: Any) -> str | None:
    """Why nothing can be copied from a tensor; None where it can."""
    if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_quantized or value.is_meta):
        kind = "on the meta device" if value.is_meta else f"quantised or of layout {value.layout}"
        return f"{name!r} is {kind}, an ordinary tensor is expected"
    return None


def _copies(pairs: Iterable[tuple[Any, Any]]) -> list[Step]:
    """Steps that copy the second of every pair into the first."""
    return [partial(Tensor.copy_, *sharded.assignment(target, value)) for target, value in pairs]
