"""An average carried over to a module whose tensors were renamed in mid-run, by pruning or a parametrization."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastema.core.policy import named_tensors
from fastema.ema import FastEMA

_ORIGINAL = "_orig"  # torch.nn.utils.prune: weight -> weight_orig
_PARAMETRIZATIONS = "parametrizations."  # torch.nn.utils.parametrize: weight -> parametrizations.weight.original
_PARAMETRIZED = ".original"


def layout_of(module: nn.Module) -> dict[str, Any]:
    """Return what an average depends on: shape and dtype of every tensor by name."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in named_tensors(module)}


def carried_over(old: FastEMA, new: FastEMA, module: nn.Module) -> list[str]:
    """Load the averages and counters of `old` into `new`, that of `module`, by name and by what renaming makes of it.

    Returns:
        The parameters whose average begins anew, with the weights as they are.
    """
    state, wanted = old.state_dict(), new.state_dict()
    several = isinstance(state["shadow"], list)
    sources = state["shadow"] if several else [state["shadow"]]
    targets = wanted["shadow"] if several else [wanted["shadow"]]
    anew: dict[str, None] = {}
    carried = []
    for source, target in zip(sources, targets, strict=True):
        plain = {_plain(name): tensor for name, tensor in source.items()}
        found = {}
        for name, tensor in target.items():
            average = source.get(name, plain.get(_plain(name)))
            if average is not None and average.shape == tensor.shape:
                found[name] = average
            else:
                found[name], anew[name] = tensor, None
        carried.append(found)
    new.load_state_dict({**state, "shadow": carried if several else carried[0]}, strict=False)
    return [name for name, tensor in named_tensors(module) if name in anew and isinstance(tensor, nn.Parameter)]


def _plain(name: str) -> str:
    """Return the name that a tensor has without pruning and parametrizations.

    Examples:
        >>> _plain("body.weight_orig"), _plain("body.parametrizations.weight.original")
        ('body.weight', 'body.weight')
    """
    head, separator, leaf = name.rpartition(".")
    if leaf.endswith(_ORIGINAL):
        return f"{head}{separator}{leaf.removesuffix(_ORIGINAL)}"
    if _PARAMETRIZATIONS in name and name.endswith(_PARAMETRIZED):
        return name.removesuffix(_PARAMETRIZED).replace(_PARAMETRIZATIONS, "")
    return name
