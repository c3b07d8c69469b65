"""Which tensor of a file is which of the model. Every tensor of both sides is accounted for, or an error lists it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastema.core.checks import difference, refuse_differences
from fastema.core.policy import Source, clean_name, named_tensors
from fastema.importing.found import Tensors

_DATA_PARALLEL = "module."


@dataclass
class Matched:
    """The averages for every name that FastEMA keeps one for.

    Attributes:
        averages: by name.
        kept: names that the file does not have and need not have: their average stays as it is.
        ignored: names of the file that FastEMA does not average: skipped by the policy, or outside of the model.
    """

    averages: dict[str, Tensor] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def match(
    given: Tensors, own: Mapping[str, Tensor], source: Source, whole: bool, spelled: Callable[[str], str] | None
) -> Matched:
    """Match the tensors of a file with those of a FastEMA.

    Args:
        given: the file's, by name or in the order of the parameters.
        own: `FastEMA.state_dict()["shadow"]`.
        source: what it averages.
        whole: whether the file should have buffers and frozen parameters too.
        spelled: how the file spells the name of a parameter.

    Raises:
        ValueError: a tensor without its partner; lists the first ones.
    """
    model = dict(named_tensors(source))
    parameters = {name for name, tensor in model.items() if isinstance(tensor, nn.Parameter)} or set(model)
    outside: list[str] = []
    if isinstance(given, list):
        named = _in_order(given, model, parameters)
    elif spelled is not None:
        names = [name for name in model if name in parameters]
        named = _respelled_for(given, names, spelled, lambda name: model[name].requires_grad)
    else:
        trained = [name for name in own if name in parameters and model[name].requires_grad]
        named, outside = _renamed(given, {**model, **own}, trained)
    siblings: dict[int, list[str]] = {}
    for name, tensor in own.items():
        siblings.setdefault(id(tensor), []).append(name)
    matched = Matched(ignored=outside)
    differences: list[str | None] = []
    for names in siblings.values():
        present = [name for name in names if name in named]
        for name in names:
            if present:
                matched.averages[name] = named[present[0]]
            elif whole or (name in parameters and model[name].requires_grad):
                differences.append(f"{name!r} is missing in the file")
            else:
                matched.averages[name] = own[name]
                matched.kept.append(name)
        for name in present:
            differences.append(_unlike(name, own[name], named[name], model.get(name)))
            if not _equal(named[present[0]], named[name]):
                differences.append(f"{names[0]!r} and {name!r} are one tensor in the model and differ in the file")
    for name in named:
        if name not in own:
            if name in model:
                matched.ignored.append(name)
            else:
                differences.append(f"{name!r} is in the file, not in the model")
    refuse_differences("the file does not fit this model", differences)
    return matched


def without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under names without what torch.compile, checkpointing, FSDP and data parallelism put into them."""
    plain = {clean_name(name.replace("_fsdp_wrapped_module.", "")): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        twice = [name for name, count in Counter(clean_name(name) for name in tensors).items() if count > 1]
        raise ValueError(f"two tensors of the file are named {twice[0]!r} without the wrappers' parts of their names")
    while plain and all(name.startswith(_DATA_PARALLEL) for name in plain):
        plain = {name.removeprefix(_DATA_PARALLEL): tensor for name, tensor in plain.items()}
    return plain


def respell(given: Mapping[str, Tensor], names: Iterable[str], spelled: Callable[[str], str]) -> dict[str, Tensor]:
    """Return the tensors that `names` lead to, by those names.

    Raises:
        ValueError: two names are spelled alike, so that the file holds a mixture under one of them.
    """
    by_spelling: dict[str, str] = {}
    for name in names:
        key = spelled(name)
        if key not in given:
            continue
        if key in by_spelling:
            raise ValueError(
                f"{by_spelling[key]!r} and {name!r} are both {key!r} in the file, which therefore averaged the two "
                "into one tensor: its average cannot be used"
            )
        by_spelling[key] = name
    return {name: given[key] for key, name in by_spelling.items()}


def below_each_part(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Return no part and the names as they are, then each first part of names with what comes after it."""
    names = list(names)
    parts = dict.fromkeys(name.partition(".")[0] + "." for name in names if "." in name)
    below = [(part, [name.removeprefix(part) for name in names if name.startswith(part)]) for part in parts]
    return [("", names), *below]


def _respelled_for(
    given: Mapping[str, Tensor], names: list[str], spelled: Callable[[str], str], trains: Callable[[str], bool]
) -> dict[str, Tensor]:
    best: dict[str, Tensor] = {}
    for part, below in below_each_part(name for name in names if trains(name)):
        found = respell(given, below, spelled)
        if len(found) > len(best):
            best = {part + name: tensor for name, tensor in found.items()}
    used = {id(tensor) for tensor in best.values()}
    return {**best, **{name: tensor for name, tensor in given.items() if id(tensor) not in used}}


def _in_order(given: list[Tensor], model: Mapping[str, Tensor], parameters: set[str]) -> dict[str, Tensor]:
    """Name the tensors of a list: those of all parameters, or of the ones that train."""
    first_names: dict[int, str] = {}
    for name, tensor in model.items():
        if name in parameters:
            first_names.setdefault(id(tensor), name)
    every = list(first_names.values())
    training = [name for name in every if model[name].requires_grad]
    names = every if len(given) == len(every) else training
    if len(given) != len(names):
        raise ValueError(
            f"the file has {len(given)} tensors without names, the model has {len(every)} parameters, of which "
            f"{len(training)} train"
        )
    refuse_differences(
        "the file's tensors have no names, and in order they do not fit the model's parameters",
        [difference(name, model[name], tensor, dtypes=False) for name, tensor in zip(names, given, strict=True)],
    )
    return dict(zip(names, given, strict=True))


def _renamed(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], trained: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors by the model's names, and the file's names outside of its part for the model."""
    given = without_wrappers(given)
    if set(given) <= set(own):
        return given, []
    first_names = {id(own[name]): name for name in reversed(trained)}  # a list of parameters has tied ones once
    ours, theirs = _prefixes(list(own), list(given), set(first_names.values()))
    inside = {f"{ours}{name[len(theirs) :]}": tensor for name, tensor in given.items() if name.startswith(theirs)}
    return inside, [name for name in given if not name.startswith(theirs)]


def _prefixes(own: list[str], given: list[str], trained: set[str]) -> tuple[str, str]:
    """Return what the model's names and the file's begin with, beyond each other's, by the most names that agree.

    Raises:
        ValueError: two parts of the file fit alike, or both have what is trained: the weights with their buffers beside
            an average without them.
    """
    candidates = {("", "")}
    for probe in {own[0], own[len(own) // 2], own[-1]}:
        for name in given:
            if name.endswith(f".{probe}"):
                candidates.add(("", name[: -len(probe)]))
            elif probe.endswith(f".{name}"):
                candidates.add((probe[: -len(name)], ""))
    held = set(given)
    agree = {
        (ours, theirs): {name for name in own if name.startswith(ours) and f"{theirs}{name[len(ours) :]}" in held}
        for ours, theirs in candidates
    }
    best = max(map(len, agree.values()))
    winners = sorted(pair for pair, names in agree.items() if len(names) == best or (trained and trained <= names))
    if ("", "") in winners:
        return "", ""
    if len(winners) > 1:
        parts = " and ".join(repr(theirs or ours) for ours, theirs in winners)
        raise ValueError(f"the names under {parts} fit the model alike: hand over the part that is the average")
    return winners[0]


def _unlike(name: str, own: Tensor, given: Tensor, live: Tensor | None) -> str | None:
    """Return why a tensor of the file cannot be the average, or None."""
    wrong = difference(name, own, given, dtypes=False)
    if wrong is not None:
        return wrong
    if given.layout != torch.strided or given.is_quantized or given.is_meta:
        return f"{name!r} is no ordinary tensor in the file, but {given.layout} on {given.device}"
    if _is_inexact(own) != _is_inexact(given) or own.is_complex() != given.is_complex():
        return f"{name!r} is {given.dtype} in the file, {own.dtype} here"
    # A broken file should not go by as an average. Where the weight is not finite either, as in a mask, it is meant.
    if _is_inexact(given) and not bool(given.isfinite().all()):
        bad = int((~given.isfinite()).sum())
        if live is None or int((~live.detach().isfinite()).sum()) < bad:
            return f"{name!r} has {bad} elements in the file that are NaN or infinite"
    return None


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _equal(first: Tensor, second: Tensor) -> bool:
    return first is second or torch.equal(first, second)
