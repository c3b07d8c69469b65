"""diffusers' `EMAModel` over FastEMA: the same constructor, methods and state, one kernel an update.

    from fastema.integrations.diffusers import EMAModel    # was: from diffusers.training_utils import EMAModel

diffusers itself is not needed. Beyond the original there is `swapped()`, a validation without `store()`, `copy_to()`
and `restore()`, which moves no weights; and `parameters` may be left out after the first `step()`.

Differences from diffusers:

- bfloat16 and float16 weights are averaged in float32: `shadow_params` are float32 then. In 16 bits an average stands
  still from decay 0.99 on.
- `shadow += (1 - decay) * (live - shadow)` is a difference and one fused multiply-add, and is computed from the live
  end where 1 - decay is 0.5 and more, so that decay 0 copies exactly. The original gives the same bits with
  `foreach=True` and 1 - decay below 0.5; without `foreach` it rounds the product too.
- `step()` refuses another number of parameters, where the original averages as many as the shorter list has.
- An unknown argument is a TypeError, where the original ignores it.
- Parameters whose elements are not in them are refused: DeepSpeed's ZeRO-3, FSDP1, the meta device.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from fastema.core.checks import difference, refuse_differences
from fastema.core.policy import AVERAGED_DTYPES, Rule
from fastema.core.storages import shadow_dtype
from fastema.core.swap import SwapError
from fastema.core.tensors import refuse_elsewhere
from fastema.integrations.external_average import ExternalAverage, shadow_like

__all__ = ["EMAModel"]

Parameters = Iterable[Tensor]

_DEPRECATED = {"max_value": "decay", "min_value": "min_decay", "device": "to"}


class EMAModel:
    """An exponential moving average of parameters, with diffusers' names.

    The averages are `shadow_params`, in the order of `parameters`. Parameters that need no gradient are copied.

    Args:
        parameters: what the averages start from; `step()` may be given those of another model, of the same shapes.
        decay: the highest decay.
        min_decay: the lowest.
        update_after_step: up to this step the average is a copy.
        use_ema_warmup: warm up with `1 - (1 + step / inv_gamma) ** -power` instead of `(1 + step) / (10 + step)`.
        inv_gamma, power: of that.
        foreach: kept for the original's sake; there is one way of updating.
        model_cls, model_config: for `save_pretrained()`.
        **kwargs: `max_value`, `min_value` and `device`, which diffusers deprecates.

    Raises:
        TypeError: an unknown argument.

    Examples:
        >>> model = torch.nn.Linear(2, 1)
        >>> ema = EMAModel(model.parameters(), decay=0.9, min_decay=0.9)
        >>> ema.step(model.parameters())  # the first step copies
        >>> with torch.no_grad():
        ...     _ = model.bias.add_(1.0)
        >>> ema.step(model.parameters())
        >>> round(model.bias.item() - ema.shadow_params[1].item(), 4)
        0.9
    """

    _external: ExternalAverage | None = None  # the average of the last parameters; a copy or a pickle has none
    _owner: weakref.ref[nn.Module] | None = None  # their module, if known

    def __init__(
        self,
        parameters: Parameters | nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_ema_warmup: bool = False,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        foreach: bool = False,
        model_cls: Any = None,
        model_config: Any = None,
        **kwargs: Any,
    ) -> None:
        unknown = ", ".join(sorted(kwargs.keys() - _DEPRECATED.keys()))
        if unknown:
            raise TypeError(f"EMAModel does not take the arguments: {unknown}")
        for name, instead in _DEPRECATED.items():
            if kwargs.get(name) is not None:
                _warn_deprecated(f"EMAModel's argument {name!r}", repr(instead))
        if isinstance(parameters, nn.Module):
            use_ema_warmup = True  # as the original does
        lives = _listed(parameters)
        refuse_elsewhere("EMAModel", _numbered(lives))
        self.shadow_params: list[Tensor] = [_widened_copy(live) for live in lives]
        self.temp_stored_params: list[Tensor] | None = None
        self.decay = decay if kwargs.get("max_value") is None else kwargs["max_value"]
        self.min_decay = min_decay if kwargs.get("min_value") is None else kwargs["min_value"]
        self.update_after_step = update_after_step
        self.use_ema_warmup = use_ema_warmup
        self.inv_gamma = inv_gamma
        self.power = power
        self.optimization_step = 0
        self.cur_decay_value: float | None = None  # set by step()
        self.foreach = foreach
        self.model_cls = model_cls
        self.model_config = model_config
        self._lives: list[Tensor] = []  # the parameters of the last step
        self._trained: list[bool] = []  # which of them need a gradient
        self._views: list[Tensor] = []  # shadow_params, as the plan made them
        if kwargs.get("device") is not None:
            self.to(device=kwargs["device"])

    # ---- averaging ----

    def get_decay(self, optimization_step: int) -> float:
        """Return the decay of step `optimization_step`, counted from 1."""
        step = max(0, optimization_step - self.update_after_step - 1)
        if step <= 0:
            return 0.0
        decay = 1 - (1 + step / self.inv_gamma) ** -self.power if self.use_ema_warmup else (1 + step) / (10 + step)
        return max(min(decay, self.decay), self.min_decay)

    @torch.no_grad()
    def step(self, parameters: Parameters | nn.Module | None = None) -> None:
        """Average `parameters` as they are now. Call it once per optimizer step.

        Args:
            parameters: in the order of `shadow_params`. The plan of an update is kept as long as they are the same
                tensors. None: those of the last step.

        Raises:
            ValueError: another number of them, or other shapes; lists the first differences.
            RuntimeError: within `swapped()`.
        """
        self._refuse_while_swapped("step()")
        external = self._external_for(self._listed_or_last(parameters))
        self.optimization_step += 1
        decay = self.get_decay(self.optimization_step)
        self.cur_decay_value = decay
        # Where nothing needs a gradient, FastEMA has nothing to average, and an average with decay 0 is the copy.
        if external.update(decay if any(self._trained) else 0.0):
            self._adopt(external)

    # ---- into the model and out of it ----

    @torch.no_grad()
    def copy_to(self, parameters: Parameters | None = None) -> None:
        """Copy the averages into `parameters`; None: those of the last step."""
        self._refuse_while_swapped("copy_to()")
        lives = self._listed_or_last(parameters)
        refuse_elsewhere("copy_to()", _numbered(lives))
        averages = [average.to(live.device) for average, live in zip(self.shadow_params, lives, strict=False)]
        # As the original, past autograd: a graph recorded before stays valid once the weights are restored.
        torch._foreach_copy_([live.data for live in lives[: len(averages)]], averages)

    def store(self, parameters: Parameters | None = None) -> None:
        """Keep a copy of `parameters`, in the CPU's memory, for `restore()`."""
        lives = self._listed_or_last(parameters)
        refuse_elsewhere("store()", _numbered(lives))
        self.temp_stored_params = [live.detach().to("cpu", copy=True) for live in lives]

    @torch.no_grad()
    def restore(self, parameters: Parameters | None = None) -> None:
        """Copy what `store()` kept back into `parameters`; after a `SwapError` of `swapped()`, end that swap instead.

        Raises:
            RuntimeError: nothing is stored.
            SwapError: a parameter cannot take its trained value. Nothing is changed.
        """
        if self._external is not None and self._external.is_applied:
            self._external.restore()
            self._adopt(self._external)
            return
        if self.temp_stored_params is None:
            raise RuntimeError("This ExponentialMovingAverage has no `store()`ed weights to `restore()`")
        for stored, live in zip(self.temp_stored_params, self._listed_or_last(parameters), strict=False):
            live.data.copy_(stored)
        self.temp_stored_params = None

    @contextmanager
    def swapped(self, parameters: Parameters | None = None) -> Iterator[EMAModel]:
        """Open a block in which `parameters` hold the averages, by an exchange of pointers; see `FastEMA.apply_shadow`.

        The same as `store()`, `copy_to()` ... `restore()` for a validation, without the copies.

        Raises:
            SwapError: at the end of the block, if a parameter was changed in it so that it cannot take its trained
                value. Nothing is changed; `error.live` has the trained values. Undo the change, then call `restore()`.
                Also if the module of these parameters (known where `step()` was given `module.parameters()`) has other
                tensors in their place: `parameters` have their trained values again, those others have none.
        """
        self._refuse_while_swapped("swapped()")
        external = self._external_for(self._listed_or_last(parameters))
        try:
            with external.swapped():
                self._adopt(external)  # for state_dict(): the averages are elsewhere now
                live = external.live_values()
                yield self
                self._refuse_others_in_their_place(live)
        finally:
            self._adopt(external)

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """Return diffusers' own state; the tensors share memory with the EMA."""
        return {
            "decay": self.decay,
            "min_decay": self.min_decay,
            "optimization_step": self.optimization_step,
            "update_after_step": self.update_after_step,
            "use_ema_warmup": self.use_ema_warmup,
            "inv_gamma": self.inv_gamma,
            "power": self.power,
            "shadow_params": self.shadow_params,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of diffusers', by value. What it lacks stays as it is.

        Raises:
            ValueError: a value of a wrong type or out of range. Nothing is changed.
            RuntimeError: within `swapped()`.
        """
        self._refuse_while_swapped("load_state_dict()")
        loaded = {name: state_dict.get(name, getattr(self, name)) for name in _STATE_TYPES}
        if not 0.0 <= loaded["decay"] <= 1.0:
            raise ValueError("Decay must be between 0 and 1")
        for name, types in _STATE_TYPES.items():
            if not isinstance(loaded[name], types):
                raise ValueError(f"Invalid {name}")
        shadow_params = state_dict.get("shadow_params")
        if shadow_params is not None:
            if not isinstance(shadow_params, list):
                raise ValueError("shadow_params must be a list")
            if not all(isinstance(average, Tensor) for average in shadow_params):
                raise ValueError("shadow_params must all be Tensors")
            self._replace(copy.deepcopy(shadow_params))
        for name, value in loaded.items():
            setattr(self, name, value)

    def to(self, device: Any = None, dtype: torch.dtype | None = None, non_blocking: bool = False) -> None:
        """Move and convert `shadow_params`, as `Tensor.to` does. The next step widens 16 bits to float32."""
        self._refuse_while_swapped("to()")
        self._replace(
            [
                average.to(device, dtype if average.is_floating_point() else None, non_blocking=non_blocking)
                for average in self.shadow_params
            ]
        )

    def pin_memory(self) -> None:
        """Move `shadow_params` into pinned memory, until the next step."""
        self._refuse_while_swapped("pin_memory()")
        self._replace([average.pin_memory() for average in self.shadow_params])

    @classmethod
    def from_pretrained(cls, path: Any, model_cls: Any, foreach: bool = False) -> EMAModel:
        """Load what `save_pretrained()` wrote, of this class or of diffusers'."""
        _, state = model_cls.from_config(path, return_unused_kwargs=True)
        model = model_cls.from_pretrained(path)
        ema = cls(model.parameters(), model_cls=model_cls, model_config=model.config, foreach=foreach)
        ema.load_state_dict(state)
        return ema

    def save_pretrained(self, path: Any) -> None:
        """Save the averaged model, with the EMA's numbers in its configuration.

        Raises:
            ValueError: built without `model_cls` or `model_config`.
        """
        for name in ("model_cls", "model_config"):
            if getattr(self, name) is None:
                raise ValueError(f"`save_pretrained` can only be used if `{name}` was defined at __init__.")
        model = self.model_cls.from_config(self.model_config)
        state = self.state_dict()
        del state["shadow_params"]
        model.register_to_config(**state)
        self.copy_to(model.parameters())
        model.save_pretrained(path)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle holds the averages, not the model; its next step() makes the rest.
        self._refuse_while_swapped("pickling or copying an EMAModel")
        empty: dict[str, Any] = {"_external": None, "_owner": None, "_lives": [], "_trained": [], "_views": []}
        return {**self.__dict__, **empty}

    # ---- inside ----

    def _external_for(self, lives: list[Tensor]) -> ExternalAverage:
        """Return the plan for these parameters; a new one if they, their need of gradients, or the averages changed."""
        trained = [live.requires_grad for live in lives]
        external = self._external
        if (
            external is not None
            and _same(lives, self._lives)
            and trained == self._trained
            and _same(self.shadow_params, self._views)
        ):
            return external
        if len(lives) != len(self.shadow_params):
            raise ValueError(f"got {len(lives)} parameters, the average has {len(self.shadow_params)}")
        names = [str(index) for index in range(len(lives))]
        refuse_elsewhere("EMAModel", _numbered(lives))
        refuse_differences(
            "the parameters are not those of the averages",
            [
                difference(f"parameter {name}", average, live, dtypes=False)
                for name, average, live in zip(names, self.shadow_params, lives, strict=True)
            ],
        )
        is_averaged = {
            name: live.dtype in AVERAGED_DTYPES and (needs_gradient or not any(trained))
            for name, live, needs_gradient in zip(names, lives, trained, strict=True)
        }

        def rule(name: str, tensor: Tensor, module: nn.Module | None) -> Rule:
            return "average" if is_averaged[name] else "copy"

        pairs = zip(lives, self.shadow_params, strict=True)
        dtype, device = shadow_like(pair for name, pair in zip(names, pairs, strict=True) if is_averaged[name])
        external = ExternalAverage(list(zip(names, lives, strict=True)), self.decay, rule, dtype, device)
        external.fill(dict(zip(names, self.shadow_params, strict=True)))
        self._external, self._lives, self._trained = external, lives, trained
        self._adopt(external)
        return external

    def _adopt(self, external: ExternalAverage) -> None:
        """Let the tensors of `shadow_params`, which stay the same objects, be views of the shadow."""
        averages = external.averages()
        for index, average in enumerate(self.shadow_params):
            if average.is_inference():  # it stays one, and nothing may update it
                self.shadow_params[index] = averages[str(index)]
            else:
                average.data = averages[str(index)]
        self._views = list(self.shadow_params)

    def _replace(self, shadow_params: list[Tensor]) -> None:
        """Put the averages into memory of their own; the next step builds a plan for them."""
        self.shadow_params = shadow_params
        self._external, self._views = None, []

    def _refuse_others_in_their_place(self, live: dict[str, Tensor]) -> None:
        owner = None if self._owner is None else self._owner()
        if owner is not None and not _same(list[Tensor](owner.parameters()), self._lives):
            raise SwapError(
                f"the {type(owner).__name__} has other parameters than when the averages were swapped into them, such "
                "as quantised ones: they keep what they hold. The trained values are in this error's `.live`, by index",
                {name: value.clone() for name, value in live.items()},
            )

    def _listed_or_last(self, parameters: Parameters | nn.Module | None) -> list[Tensor]:
        if parameters is not None:
            self._owner = _owner_of(parameters)
            return _listed(parameters)
        if not self._lives:
            raise ValueError("no step() was made yet that would tell the parameters: pass them")
        return self._lives

    def _refuse_while_swapped(self, what: str) -> None:
        if self._external is not None and self._external.is_applied:
            raise RuntimeError(f"{what} while the averages are swapped in: leave the block first, or call restore()")


_STATE_TYPES: dict[str, Any] = {
    "decay": (float, int),
    "min_decay": float,
    "optimization_step": int,
    "update_after_step": int,
    "use_ema_warmup": bool,
    "inv_gamma": (float, int),
    "power": (float, int),
}


def _listed(parameters: Parameters | nn.Module) -> list[Tensor]:
    if isinstance(parameters, nn.Module):
        _warn_deprecated("passing a module", "its parameters")
        return list(parameters.parameters())
    return list(parameters)


def _owner_of(parameters: Any) -> weakref.ref[nn.Module] | None:
    """Return a weak reference to the module whose `parameters()` these are, if a module made them."""
    frame = getattr(parameters, "gi_frame", None)  # of a generator that has not ended
    owner = parameters if frame is None else frame.f_locals.get("self")
    return weakref.ref(owner) if isinstance(owner, nn.Module) else None


def _numbered(parameters: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((f"parameter {index}", parameter) for index, parameter in enumerate(parameters))


def _warn_deprecated(what: str, instead: str) -> None:
    warnings.warn(f"{what} is deprecated in diffusers: use {instead} instead", FutureWarning, stacklevel=4)


def _widened_copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to(shadow_dtype(parameter.dtype, None), copy=True)


def _same(these: list[Tensor], those: list[Tensor]) -> bool:
    """Return whether they are the same objects."""
    return len(these) == len(those) and all(map(is_, these, those))
