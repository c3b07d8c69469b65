"""`ema.update()` inside a function that `torch.compile` compiles: one opaque op that says what it changes.

The compiler may pass other memory than the model's own (an optimizer step in the same graph writes to buffers first),
so the op works on its arguments. Eager updates do not use it. Swaps need no support: compiled code reads the pointers,
unless inductor froze the weights.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

UpdateOperands = Callable[[list[Tensor], list[Tensor], "int | None", "Tensor | None"], None]

_handles = itertools.count(1)
_updates: dict[int, weakref.WeakMethod[UpdateOperands]] = {}


def register(update_operands: UpdateOperands) -> int:
    """Return a number by which the op finds the bound method to call; it does not keep its object alive."""
    for handle in [handle for handle, method in _updates.items() if method() is None]:
        del _updates[handle]
    handle = next(_handles)
    _updates[handle] = weakref.WeakMethod(update_operands)  # no callback: it could run when the interpreter ends
    return handle


# It counts on the host: a replayed CUDA graph would not run it. `reduce-overhead` captures the code around it.
_TAGS = [
    tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None
]  # older torch has no such tag


@torch.library.custom_op(
    "fastema::update",
    mutates_args=("shadows",),
    tags=_TAGS,
    schema="(Tensor(a!)[] shadows, Tensor[] lives, int handle, int? step, Tensor? found_inf) -> ()",
)
def update(
    shadows: Sequence[Tensor], lives: Sequence[Tensor], handle: int, step: int | None, found_inf: Tensor | None
) -> None:
    """Run FastEMA.update() on the graph's version of `Averages.operands()`; `handle` identifies the FastEMA."""
    update_operands = _updates[handle]() if handle in _updates else None
    if update_operands is None:
        raise RuntimeError("the FastEMA that was compiled into this graph no longer exists")
    update_operands(list(shadows), list(lives), step, found_inf)


@update.register_fake
def _(
    shadows: Sequence[Tensor], lives: Sequence[Tensor], handle: int, step: int | None, found_inf: Tensor | None
) -> None:
    return None


def refuse_freezing(tensors: Iterable[Tensor], modules: Iterable[nn.Module]) -> None:
    """Raise RuntimeError if inductor has made, or will make, constants of the weights: no swap reaches those.

    Dynamo leaves a mark on every parameter that it has seen, whichever module or function was compiled around it.

    Args:
        tensors: as the model has them.
        modules: of the model; their wrappers show a compile that has not run yet.
    """
    config = sys.modules.get("torch._inductor.config")  # not there: nothing was compiled with it
    if config is None or not config.freezing:
        return
    seen = any(getattr(tensor, "_dynamo_static_input_type", None) is not None for tensor in tensors)
    if seen or any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in modules):
        raise RuntimeError(
            "averaged weights cannot be put into a compiled model while torch._inductor.config.freezing is set (by "
            "TORCHINDUCTOR_FREEZING in the environment, too): the compiled code holds weights as constants, which no "
            "exchange reaches. Switch it off and call torch._dynamo.reset(), or load ema.shadow_state_dict() into a "
            "second model"
        )


# ---- what is computed from the weights and kept beside them: docs/what-a-swap-cannot-reach.md ----


def clear_caches() -> None:
    """Forget what was computed from the weights: autocast's casts, and parametrized weights inside `cached()`."""
    torch.clear_autocast_cache()
    if parametrize._cache:
        parametrize._cache.clear()


class Merges:
    """The adapters of a model that are merged into its weights, as layers of PEFT and loralib tell by a flag `merged`.

    A merge adds to the weights what depends on the adapter's own, so that both have to be of one side: a layer that is
    merged on one side of a swap only would be damaged for good by its next unmerge.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._layers = [module for module in modules if _can_merge(module)]
        self._at_entry: list[bool] = []

    def enter(self) -> None:
        """Note what is merged.

        Raises:
            RuntimeError: a layer is, so that a swap would not reach what is merged into it.
        """
        if not self._layers:
            return
        self._at_entry = [bool(layer.merged) for layer in self._layers]
        if any(self._at_entry):
            raise RuntimeError(
                f"averaged weights cannot be swapped in while an adapter is merged into a {self._name(True)}: the "
                "weights hold what the trained adapter added to them. Unmerge it first (PEFT: model.unmerge_adapter(); "
                "loralib: model.train())"
            )

    def changed(self) -> str | None:
        """Return what to say where a layer was merged since `enter()` and still is; None: none was."""
        if not self._layers or [bool(layer.merged) for layer in self._layers] == self._at_entry:
            return None
        return (
            f"an adapter was merged into a {self._name(True)}, whose weights and adapter are averages: unmerge it "
            "(PEFT: model.unmerge_adapter(); loralib: model.train())"
        )

    def _name(self, merged: bool) -> str:
        return next((type(layer).__name__ for layer in self._layers if bool(layer.merged) == merged), "layer")


def _can_merge(module: nn.Module) -> bool:
    has_flag = "merged" in vars(module) or hasattr(type(module), "merged")
    return has_flag and isinstance(module.merged, bool) and any(_ways_to_merge(module))


def _ways_to_merge(module: nn.Module) -> Iterator[bool]:
    yield callable(getattr(type(module), "unmerge", None))  # PEFT
    yield "merge_weights" in vars(module)  # loralib
