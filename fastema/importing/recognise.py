"""Which library wrote a file, told by its content."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastema.importing import lists_and_modules, trainers
from fastema.importing.found import Found, NotAverageYet

_Reader = Callable[[Mapping[str, Any]], Iterator[Found]]
_DEPTH = 3
#: Formats that are told by their own content, wherever they are in a checkpoint.
_BY_CONTENT: tuple[_Reader, ...] = (
    trainers.fastema,
    lists_and_modules.lightning_weight_averaging,
    trainers.mmengine,
    trainers.composer,
    lists_and_modules.k_diffusion,
    lists_and_modules.diffusers,
    lists_and_modules.torch_ema,
    lists_and_modules.torch_averaged_model,
    lists_and_modules.ema_pytorch,
    lists_and_modules.lit_ema,
    trainers.boltz,
    trainers.edm2,
    trainers.detr,
)
_BY_KEY: tuple[_Reader, ...] = (trainers.by_key,)
_BARE: tuple[_Reader, ...] = (trainers.bare_state,)

SOURCES = (
    *("fastema", "torch", "lightning", "timm", "diffusers", "ema-pytorch", "torch-ema", "k-diffusion", "litema"),
    *("ultralytics", "mmengine", "composer", "ignite", "d2go", "boltz", "edm2", "super-gradients", "detr"),
    *("callback", "state_dict"),
)


def recognise(content: Mapping[str, Any], origin: str, source: str = "auto") -> Found:
    """Return the average in `content`.

    Raises:
        ValueError: `source` is unknown, nothing is found, or several are.
    """
    if source != "auto" and source not in SOURCES:
        raise ValueError(f"unknown source {source!r}; known: auto, {', '.join(SOURCES)}")
    for readers in (_BY_CONTENT, _BY_KEY, _BARE):
        try:
            found = [each for each in _walk(content, readers, (), _DEPTH) if source in ("auto", each.source)]
        except NotAverageYet as error:
            raise ValueError(f"{origin}: {error}; build FastEMA as for a new run") from None
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"{origin} has the keys of a known format and values of other types: {error!r}") from error
        if len(found) > 1:
            places = "; ".join(f"{each.source} at {each.where or 'the top'}" for each in found)
            raise ValueError(f"{origin} has several averages ({places}): hand over the one part, or its source=")
        if found:
            return found[0]
    keys = ", ".join(map(repr, list(content)[:8])) or "no keys"
    wanted = "no average of a known library" if source == "auto" else f"no average of {source}"
    raise ValueError(
        f"{origin} holds {wanted}; its keys are {keys}. Weights alone are taken from a plain state_dict: hand over "
        f"that part, if it is the average. Known: {', '.join(SOURCES)}"
    )


def _walk(
    content: Mapping[str, Any], readers: tuple[_Reader, ...], path: tuple[str, ...], depth: int
) -> Iterator[Found]:
    """Yield what the first reader that fits finds at the top, else what they find below."""
    for reader in readers:
        found = [
            dataclasses.replace(each, where=".".join(part for part in (*path, each.where) if part))
            for each in reader(_with_plain_keys(content))
        ]
        if found:
            yield from found
            return
    if depth and readers is not _BARE:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, Mapping):
                yield from _walk(value, readers, (*path, key), depth - 1)


def _with_plain_keys(content: Mapping[Any, Any]) -> Mapping[str, Any]:
    return {key: value for key, value in content.items() if isinstance(key, str)}
