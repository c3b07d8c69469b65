"""The swap of one shadow and the live weights of its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastema.backends import contract
from fastema.backends.exchange import ContentsExchange
from fastema.core.plans import Plans
from fastema.core.policy import Managed
from fastema.core.storages import ShadowStorage
from fastema.core.swap import Swap, exchange_of

_OWNER = "another FastEMA is applied to the same model: the live weights are its average now; restore() that one first"
_DROPPED = (
    "a FastEMA was deleted while its weights were applied: the model keeps the averaged weights, and the trained ones "
    "are lost. Call restore() first; or copy_to(), if that is intended"
)


def swap_of(
    storages: Sequence[ShadowStorage],
    which: int,
    entries: Sequence[Managed],
    versioned: Sequence[Tensor],
    host: Any,
    contents_of: Plans | None,
    modules: Sequence[nn.Module] = (),
) -> Swap:
    """Return the swap of live weights and average `which`.

    Args:
        entries: the managed tensors on these storages.
        versioned: tensors that recorded graphs may refer to.
        host: the backend whose `StorageExchange` to use.
        contents_of: the plans that exchange contents; None: pointers are exchanged.
        modules: of the model.

    Raises:
        ValueError: contents could not be put back exactly.
    """
    if contents_of is not None and not all(storage.is_direct for storage in storages):
        raise ValueError(
            "in_place=True exchanges contents, and live and shadow differ in dtype or device, so that the live "
            "weights could not be put back exactly: use apply_shadow() without it, or give FastEMA the model's own "
            "dtype and device"
        )
    with torch.inference_mode(False), torch.no_grad():
        buffers = sorted((s.swap_buffer(which) for s in storages), key=lambda buffer: bool(buffer.parts))
        exchange: contract.StorageExchange | ContentsExchange
        if contents_of is None:
            exchange = exchange_of(buffers, versioned, host)
        else:
            pairs = [(buffer.live, buffer.storage) for buffer in buffers]
            exchange = ContentsExchange(contents_of.by_device, which, versioned, pairs)
        tensors = [(entry.names, entry.tensor, entry.rule == "copy") for entry in entries]
        return Swap(_OWNER, _DROPPED, tensors, exchange, buffers, modules)
