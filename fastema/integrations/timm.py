"""timm's `ModelEmaV3` over FastEMA: the same constructor, methods and state, one kernel an update, no second model.

    from fastema.integrations.timm import ModelEmaV3       # was: from timm.utils import ModelEmaV3

`module` is a copy of the model whose tensors *are* FastEMA's shadow: it costs Python objects, but no memory beyond the
average itself, and is always up to date. timm itself is not needed.

The average of a bfloat16 model is a float32 in two 16-bit planes. The tensors of `module` are the high ones, the
average rounded to bfloat16: it runs in bfloat16, and its `state_dict()` has them alone. `load_state_dict()` of float32
values fills both planes, that of bfloat16 values sets the low one to 0. In 16 bits otherwise (float16, or a dtype or
device that is not the model's) `module` has tensors of its own, which every update rounds from a float32 average.

Differences from timm:

- bfloat16 and float16 averages are computed in float32, and `module` holds them rounded to nearest. timm computes in 16
  bits: bfloat16 with stochastic rounding, float16 standing still.
- Tied weights are averaged once a step; timm averages them once for each of their names.
- Weights in another dtype than the average are averaged with lerp too; timm takes `mul_`, `add_` there.
- A `decay` outside [0, 1] is refused.
- It keeps the model alive that it averages, and expects it, or a wrapper around it, in `update()`. With another model
  of the same structure it goes on with that one, as timm does, after building its plan anew.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastema import backends
from fastema.backends import contract
from fastema.core.checks import difference, refuse_differences
from fastema.core.policy import AVERAGED_DTYPES, Policy, Rule, Source, named_tensors
from fastema.core.storages import shadow_dtype
from fastema.integrations.external_average import ExternalAverage, shadow_like
from fastema.memory import planes

__all__ = ["ModelEmaV3"]


class ModelEmaV3(nn.Module):
    """An exponential moving average of everything in the model's `state_dict()`, with timm's names.

    Args:
        model: built after the weights are loaded; a wrapper (DDP, torch.compile) may come later.
        decay: of the average.
        min_decay: the least, while warming up.
        update_after_step: up to this step, `update(model, step)` copies.
        use_warmup: take `1 - (1 + step / warmup_gamma) ** -warmup_power` where that is less than `decay`.
        warmup_gamma, warmup_power: of the warm-up.
        device: the average's; None: where the model is.
        dtype: the dtype of `module`; None: the model's own.
        stochastic_rounding, stochastic_rounding_seed, foreach: taken and kept for timm's sake. Nothing is rounded to 16
            bits here, and there is one way of updating.
        exclude_buffers: copy the buffers instead of averaging them.

    Examples:
        >>> model = torch.nn.Linear(2, 1)
        >>> ema = ModelEmaV3(model, decay=0.9)
        >>> with torch.no_grad():
        ...     _ = model.bias.add_(1.0)
        >>> ema.update(model)
        >>> round(model.bias.item() - ema.module.bias.item(), 4)
        0.9
        >>> list(ema.state_dict())
        ['module.weight', 'module.bias']
    """

    # A copy or a pickle has neither of the first two; its next update makes them.
    _external: ExternalAverage | None = None  # the average of the last model
    _watch: contract.Watch | None = None  # of the tensors of `module`
    _noted: list[int]  # the versions of the rounded tensors after the last update

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
    ) -> None:
        super().__init__()
        self.decay = decay
        self.min_decay = min_decay
        self.update_after_step = update_after_step
        self.use_warmup = use_warmup
        self.warmup_gamma = warmup_gamma
        self.warmup_power = warmup_power
        self.foreach = foreach
        self.device = device
        self.dtype = dtype
        self.stochastic_rounding = stochastic_rounding
        self.stochastic_rounding_seed = stochastic_rounding_seed
        self.exclude_buffers = exclude_buffers
        self._excludes_now = exclude_buffers  # what the plan was built for
        may_split = dtype in (None, torch.bfloat16)
        policy = _policy(exclude_buffers, dtype)
        external = ExternalAverage(model, decay, policy, _shadow_dtype(dtype), device, may_split)
        self._external = external
        self._loaded: dict[int, Tensor] = {}  # low planes of what was loaded since the last update, by index
        self.module = _copy_with(model, external.weights(), dtype, device)
        self.module.eval()
        self._note_tensors(external)

    def get_decay(self, step: int | None = None) -> float:
        """Return the decay of an update at optimizer step `step`, counted from 0; None: no warm-up."""
        if step is None:
            return self.decay
        step = max(0, step - self.update_after_step - 1)
        if step <= 0:
            return 0.0
        if not self.use_warmup:
            return self.decay
        decay = 1 - (1 + step / self.warmup_gamma) ** -self.warmup_power
        return max(min(decay, self.decay), self.min_decay)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Average the model's weights as they are now. Call it once per optimizer step.

        Raises:
            ValueError: another structure than the averaged model's; lists the first differences.
            RuntimeError: shapes, dtypes or devices of the model changed.
        """
        decay = self.get_decay(step)
        if self.exclude_buffers:
            self.apply_update_no_buffers_(model, decay)
        else:
            self.apply_update_(model, decay)

    @torch.no_grad()
    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Average parameters and buffers."""
        self._average(model, decay, exclude_buffers=False)

    @torch.no_grad()
    def apply_update_no_buffers_(self, model: nn.Module, decay: float) -> None:
        """Average parameters, copy buffers."""
        self._average(model, decay, exclude_buffers=True)

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Make the average a copy of the model."""
        # An update with decay 0 would keep a NaN of the average.
        for average, live in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            average.copy_(live)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the averaged model."""
        return self.module(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle holds the average, not the model.
        self._take_what_was_written()
        return {**self.__dict__, "_external": None, "_watch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for each in self._rounded:  # so that the next update notices what is written to the copy
            each.address = each.tensor.data_ptr()
        self._noted = self._versions()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *others: Any
    ) -> None:
        """Split what is loaded: the high planes take theirs now, the low ones at the next update."""
        split = {id(each.tensor): index for index, each in enumerate(self._rounded) if each.is_split}
        for name, tensor in named_tensors(self.module):
            index, key = split.get(id(tensor)), f"{prefix}module.{name}"
            value = state_dict.get(key)
            if index is None or not isinstance(value, Tensor) or value.shape != tensor.shape:
                continue
            if value.is_floating_point() and not local_metadata.get("assign_to_params_buffers"):
                state_dict[key], self._loaded[index] = planes.split(value.detach().to(tensor.device, torch.float32))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)

    # ---- inside ----

    def _average(self, model: nn.Module, decay: float, exclude_buffers: bool) -> None:
        external = self._external_for(model, exclude_buffers)
        if self._loaded or self._versions() != self._noted:
            self._take_what_was_written()
        if external.update(decay):
            self._adopt(external)
        else:
            self._round()
        if self._copied_here:
            for (name, live), average in self._pairs(external.source):
                if name in self._copied_here:
                    average.copy_(live)

    def _external_for(self, model: nn.Module, exclude_buffers: bool) -> ExternalAverage:
        """Return the plan for this model, built anew if the model or the tensors of `module` were replaced."""
        external = self._external
        if (
            external is not None
            and self._excludes_now == exclude_buffers
            and self._watch is not None
            and self._watch.holds()
            and any(part is external.source for part in model.modules())  # itself, or inside a wrapper
        ):
            return external
        if external is not None:
            external.refuse_while_swapped("update()")
        pairs = self._pairs(model)
        refuse_differences(
            "the model is not built like the averaged one",
            [difference(name, average, live, dtypes=False) for (name, live), average in pairs],
        )
        dtype, device = shadow_like((live, average) for (_, live), average in pairs if isinstance(live, nn.Parameter))
        self._take_what_was_written()
        kept = {id(each.tensor): each for each in self._rounded}
        values = {name: kept[id(tensor)].value() if id(tensor) in kept else tensor for (name, _), tensor in pairs}
        may_split = all(tensor.dtype == torch.bfloat16 for (_, live), tensor in pairs if live.dtype == torch.bfloat16)
        external = ExternalAverage(model, self.decay, _policy(exclude_buffers, self.dtype), dtype, device, may_split)
        external.fill({name: values[name] for name in external.weights()})
        self._external, self._excludes_now = external, exclude_buffers
        self._adopt(external)
        return external

    def _adopt(self, external: ExternalAverage) -> None:
        """Let the module's tensors, which stay the same objects, be views of the shadow, or rounded from it."""
        averages = external.weights()
        for (name, _), tensor in self._pairs(external.source):
            if name in averages and averages[name].dtype == tensor.dtype:
                tensor.data = averages[name]
        self._note_tensors(external)

    def _versions(self) -> list[int]:
        try:
            return [each.tensor._version for each in self._rounded]
        except RuntimeError:  # inference tensors have none
            return [0 if each.tensor.is_inference() else each.tensor._version for each in self._rounded]

    @torch.no_grad()
    def _take_what_was_written(self) -> None:
        """Take rounded tensors that somebody wrote to, by loading a state for one, for their averages."""
        for index, (each, was, now) in enumerate(zip(self._rounded, self._noted, self._versions(), strict=True)):
            if index in self._loaded or (was, each.address) != (now, each.tensor.data_ptr()):
                each.take(self._loaded.get(index))
        self._loaded.clear()

    @torch.no_grad()
    def _round(self) -> None:
        """Bring the tensors of `module` up to date that have another dtype than the average."""
        others = [each for each in self._rounded if not each.is_split]
        if others:
            torch._foreach_copy_([each.tensor for each in others], [each.exact for each in others])
        self._noted = self._versions()

    def _note_tensors(self, external: ExternalAverage) -> None:
        """Note which tensors of `module` every update must copy, round and watch."""
        averages, lows = external.weights(), external.lows()
        names = [name for name, _ in named_tensors(external.source) if name not in averages]
        # Buffers in another dtype than their average. Without exclude_buffers they are outside of the state, and timm
        # leaves them as they are.
        self._copied_here = frozenset(names if self._excludes_now else ())
        rounded = {}
        for (name, _), tensor in self._pairs(external.source):
            if name in lows:
                rounded[id(tensor)] = _Rounded(tensor, lows[name], True, tensor.data_ptr())
            elif name in averages and averages[name].dtype != tensor.dtype:
                rounded[id(tensor)] = _Rounded(tensor, averages[name], False, tensor.data_ptr())
        self._rounded = list(rounded.values())
        self._round()
        dicts = [slots for part in self.module.modules() for slots in (part._parameters, part._buffers, part._modules)]
        tensors = [tensor for _, tensor in named_tensors(self.module)]
        self._watch = backends.host(backends.default_name()).Watch(dicts, tensors)

    def _pairs(self, model: Source) -> list[tuple[tuple[str, Tensor], Tensor]]:
        """Return every live tensor with its name and its average: by position, as a wrapper changes names."""
        lives = list(named_tensors(model))
        averages = [tensor for _, tensor in named_tensors(self.module)]
        if len(lives) != len(averages):
            raise ValueError(
                f"the model is not built like the averaged one: it has {len(lives)} parameters and buffers, the "
                f"average has {len(averages)}"
            )
        return list(zip(lives, averages, strict=True))


@dataclass
class _Rounded:
    """A tensor of `module` that is a float32 average in 16 bits."""

    tensor: Tensor
    exact: Tensor  # the low plane, where `tensor` is the high one; or the average
    is_split: bool
    address: int  # of the tensor's memory

    def value(self) -> Tensor:
        """Return the average."""
        if not self.is_split:
            return self.exact
        is_plane = (self.tensor.dtype, self.tensor.device) == (torch.bfloat16, self.exact.device)
        return planes.join(self.tensor, self.exact) if is_plane else self.tensor  # which to() made of the high plane

    def take(self, low: Tensor | None) -> None:
        """Let what is in the tensor now be the average. `low`: the low plane; None: zeros."""
        if not self.is_split:
            self.exact.copy_(self.tensor)
        elif low is not None:
            self.exact.copy_(low)
        else:
            self.exact.zero_()


def _policy(exclude_buffers: bool, dtype: torch.dtype | None) -> Policy:
    """Return timm's rule for a tensor."""

    def rule(name: str, tensor: Tensor, module: nn.Module | None) -> Rule:
        leaf = name.rpartition(".")[2]
        if module is not None and leaf in module._buffers:
            if exclude_buffers:
                # FastEMA copies within a dtype. Where the average's is another, this adapter copies.
                return "copy" if _module_dtype(tensor, dtype) == tensor.dtype else "skip"
            if leaf in module._non_persistent_buffers_set:
                return "skip"  # timm averages what is in the state_dict
        return "average" if _is_averaged(tensor) else "copy"

    return rule


def _shadow_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype of the average under a module of `dtype`: 16 bits are averaged in float32."""
    return None if dtype is None else shadow_dtype(dtype, None)


def _is_averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype in AVERAGED_DTYPES


def _module_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return shadow_dtype(tensor.dtype, dtype or tensor.dtype) if _is_averaged(tensor) else tensor.dtype


def _copy_with(
    model: nn.Module, averages: dict[str, Tensor], dtype: torch.dtype | None, device: torch.device | str | None
) -> nn.Module:
    """Return a deep copy of the model whose tensors are `averages`, by name; the few others are copied."""
    # deepcopy() takes what its memo holds for a copy made before.
    memo: dict[int, Any] = {
        id(live): torch.Tensor._make_subclass(
            type(live), averages[name].to(_module_dtype(live, dtype)), live.requires_grad
        )
        for name, live in named_tensors(model)
        if name in averages
    }
    module = deepcopy(model, memo)
    for name, tensor in named_tensors(module):
        if name not in averages:
            tensor.data = tensor.data.to(device=device, dtype=_module_dtype(tensor, dtype))
    return module
