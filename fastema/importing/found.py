"""What a reader finds in a file: an average, the count of steps, and the schedule that goes on as its writer's did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, TypeAlias

from torch import Tensor

from fastema.schedules import EMA_DECAY_FUNCTIONS

#: Tensors by name, or in the order of the model's parameters.
Tensors: TypeAlias = "dict[str, Tensor] | list[Tensor]"


@dataclass(frozen=True)
class Found:
    """One library's average in a file.

    Attributes:
        source: name of the library, as `import_average(source=)` takes it.
        where: the keys that lead to it, e.g. "state_dict_ema".
        averages: one; several where the library keeps several.
        step: optimizer steps so far as FastEMA counts them; None: the file does not tell.
        num_updates, last_update: of FastEMA's state; None: as `step` says.
        goes_on: the FastEMA whose schedule goes on as theirs did.
        next_decay: decay of their next update, where the file tells it.
        whole: True if it has the model's whole state; False: parameters, or those that train, without buffers.
        spelled: how the file spells the name of a parameter, where not as the model does.
        names: of the trained weights beside it, from which `spelled` names can be read back without a model.
        notes: what else a user should know.
        state: further entries for `FastEMA.load_state_dict`.
        sigma_rels: widths of the averages, where they are power profiles.
    """

    source: str
    averages: list[Tensors]
    goes_on: str
    where: str = ""
    step: int | None = None
    num_updates: int | None = None
    last_update: int | None = None
    next_decay: float | None = None
    whole: bool = True
    spelled: Callable[[str], str] | None = None
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)
    sigma_rels: tuple[float, ...] = ()


class NotAverageYet(ValueError):
    """The file has the place of an average, and nothing was averaged so far."""


def tensors_in(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a state under `prefix`, without it; empty where `value` is no state by name."""
    if not isinstance(value, Mapping):
        return {}
    return {
        name[len(prefix) :]: tensor
        for name, tensor in value.items()
        if isinstance(name, str) and name.startswith(prefix) and isinstance(tensor, Tensor)
    }


def is_state(value: Any) -> bool:
    """Return whether `value` is a state: tensors by name, and at most a few plain values beside them."""
    return isinstance(value, Mapping) and 2 * len(tensors_in(value)) > len(value)


def number(value: Any) -> int | None:
    """Return a count, a number or a tensor of one element, as an int; None where it is neither."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else None
    return (
        int(value)
        if isinstance(value, (Integral, float)) and not isinstance(value, bool) and value == value // 1
        else None
    )


def decay_after(step: int, decay: float, decay_type: str, update_after_step: int = 0, **arguments: float) -> float:
    """Return the decay of the update that follows step `step`."""
    schedule: Any = EMA_DECAY_FUNCTIONS[decay_type]
    return schedule(**arguments).at(decay, step + 1, None, step, update_after_step)
