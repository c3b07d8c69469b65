"""torch.optim.swa_utils under the same names, with one kernel launch for all parameters and buffers.

Only the import changes: `from fastema.swa_utils import AveragedModel, get_ema_multi_avg_fn`. Names, signatures,
defaults, attributes, state-dict keys, results and errors are torch's. An averaging function of your own is called by
torch's own code. `AveragedModel` is a subclass of torch's, with `swapped(model)` and its `restore()` added.

The averages of `get_ema_multi_avg_fn` and `get_swa_multi_avg_fn` have the same bits as torch's, in every dtype, where
torch uses fused multiply-adds: on x86 CPUs with AVX2, and on GPUs.

Differences from torch:

- `get_ema_avg_fn`, `get_swa_avg_fn`, and on a CPU the default: torch rounds `decay * ema + (1 - decay) * model`
  (or `ema + (model - ema) / (n + 1)`) after each operation; here they are the same `lerp` as the `multi` functions,
  rounded after the subtraction and at the end. An update differs by rounding alone, at most two units in the last
  place of the larger operand, and an average of equal weights stays exactly what it is. Called directly, the functions
  are torch's own.
- A decay of 0 copies, also over an average that is NaN or infinite, and keeps the sign of a zero; torch's lerp keeps
  the NaN for ever. At any other decay NaN propagates, as in torch.
- Integer and bool tensors are copied at every update, whatever the function, your own too: under `use_buffers=True`
  torch freezes or shifts them with an EMA (it rounds down) and raises with SWA, and an average of counters means
  nothing.
- Weights of another floating-point dtype than the average (bfloat16 weights, float32 average) are averaged, in the
  average's precision; torch raises with the `multi` functions.
- A GPU's counter is read once, and again only after `n_averaged` was written to or replaced; torch waits for the device
  at every step. A write that autograd cannot see (`n_averaged.data.fill_()`) is not noticed.
- An average that was built under `inference_mode` can be updated outside of it; torch's cannot.
- It can be pickled with an EMA function, torch's too: the copy has this module's equal function.
- `update_bn` puts momenta and mode back when the loader or the model raises, and says what is wrong where a model
  cannot take the dictionary that a loader yields.
- A model that cannot be deep-copied is a RuntimeError that says what to do.
- Inside a function that `torch.compile` compiles, `update_parameters` is torch's.
- Without fused multiply-adds (`ATEN_CPU_CAPABILITY=default`) torch rounds once more, and differs by one unit in the
  last place.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils as _torch_swa_utils
from torch.optim.swa_utils import SWALR

from fastema.averaging_functions import DEFAULT, AveragingFunction, recognise
from fastema.core.compiled import refuse_freezing
from fastema.core.counters import CounterTensor
from fastema.core.given import GivenAverages, Update, UseTorchFallback, tensors_by_name
from fastema.core.swap import Swap
from fastema.core.tensors import refuse_elsewhere
from fastema.memory.streams import is_capturing

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "patch",
    "unpatch",
    "update_bn",
]

# Torch's own, whatever patch() puts in their places later.
_TorchAveragedModel = _torch_swa_utils.AveragedModel
_torch_update_bn = _torch_swa_utils.update_bn
# ---- the averaging functions ----


def get_ema_multi_avg_fn(decay: float = 0.999) -> Any:
    """Return the function that applies an exponential moving average to lists of parameters.

    Args:
        decay: in [0, 1].

    Raises:
        ValueError: it is not.
    """
    return AveragingFunction("get_ema_multi_avg_fn", decay)


def get_swa_multi_avg_fn() -> Any:
    """Return the function that applies an equally weighted average to lists of parameters."""
    return AveragingFunction("get_swa_multi_avg_fn")


def get_ema_avg_fn(decay: float = 0.999) -> Any:
    """Return the function that applies an exponential moving average to one parameter.

    Args:
        decay: in [0, 1].

    Raises:
        ValueError: it is not.
    """
    return AveragingFunction("get_ema_avg_fn", decay)


def get_swa_avg_fn() -> Any:
    """Return the function that applies an equally weighted average to one parameter."""
    return AveragingFunction("get_swa_avg_fn")


# ---- the model ----


_REBUILT = ("_pairs", "_swap", "_counter", "_rule")


class AveragedModel(_TorchAveragedModel):
    """torch's `AveragedModel` with a faster `update_parameters`, and with `swapped(model)` for a validation.

    Args:
        model: the module to average; it is deep-copied.
        device: where the average is kept; None: where the model is.
        avg_fn: `(averaged, current, num_averaged) -> averaged` for one parameter; None: equal weights (SWA).
        multi_avg_fn: the same in place for lists of parameters of one device and dtype.
        use_buffers: average the buffers too; False: they are copied at every update.

    Raises:
        AssertionError: both functions are given.
        ValueError: the elements of a tensor are elsewhere (ZeRO-3, FSDP1, the meta device).
        RuntimeError: the model cannot be deep-copied.

    Examples:
        >>> model = torch.nn.Linear(2, 1)
        >>> averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        >>> averaged.update_parameters(model)  # after optimizer.step()
        >>> with averaged.swapped(model):
        ...     _ = model(torch.ones(1, 2))  # the averaged weights, in the model itself
    """

    _pairs: GivenAverages | None = None
    _swap: tuple[Swap, GivenAverages, nn.Module] | None = None  # the last one, its pairs and the model it is with
    _counter: CounterTensor | None = None
    _rule: tuple[Any, AveragingFunction | None] = (None, None)  # the given function, and what recognise() made of it

    def __init__(
        self,
        model: nn.Module,
        device: int | torch.device | None = None,
        avg_fn: Callable[[Tensor, Tensor, Tensor | int], Tensor] | None = None,
        multi_avg_fn: Callable[..., None] | None = None,
        use_buffers: bool = False,
    ) -> None:
        if isinstance(model, nn.Module):
            refuse_elsewhere("AveragedModel", tensors_by_name(model).items())
        try:
            # Under inference_mode these would be inference tensors, which cannot be updated.
            with torch.inference_mode(False):
                super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)
        except Exception as error:
            both = avg_fn is not None and multi_avg_fn is not None
            if both or "module" in self.__dict__.get("_modules", {}):
                raise
            raise RuntimeError(
                f"AveragedModel keeps a copy of the model, and a {type(model).__name__} cannot be deep-copied "
                f"({type(error).__name__}: {error}). fastema.FastEMA(model) averages without one. With "
                "torch.nn.utils.weight_norm or spectral_norm, those of torch.nn.utils.parametrizations can be copied."
            ) from error

    def update_parameters(self, model: nn.Module) -> None:
        """Average the parameters of `model` as they are now; the first call copies them.

        Raises:
            RuntimeError: the average is swapped into a model.
        """
        if torch.compiler.is_compiling():
            super().update_parameters(model)
            return
        self._refuse_while_swapped("update_parameters()")
        function = self._known_function()
        update = None if function is None else self._update_for(model)
        if function is None or update is None:
            super().update_parameters(model)
            if self.use_buffers:
                self._copy_integers(model)
            return
        if self._counter is None:
            self._counter = CounterTensor()
        counter = self.n_averaged
        num_averaged = self._counter.read(counter)
        if num_averaged == 0:
            update.start()
        else:
            update.run(functools.partial(function.weight, num_averaged))
            if self._pairs is not None:
                self._pairs.copy_to_new_memory()
        self._counter.increase(counter)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[nn.Module]:
        """Open a block in which `model` has the averaged parameters and buffers; it always ends with its own restored.

        Storage pointers are swapped: nothing is copied, and every alias of the weights follows. Meanwhile
        `averaged.module` has the live weights. Where the two differ in dtype, device or layout, the average is copied
        into scratch memory, which is swapped in instead. A backward through a graph recorded before raises inside the
        block. Writes to the model there (BatchNorm statistics in train mode) go to the average, or to the scratch
        memory and are lost.

        Args:
            model: the live model, as `update_parameters` takes it.

        Raises:
            RuntimeError: already swapped; another AveragedModel is swapped into this model; a CUDA graph is being
                captured; or inductor's freezing has made constants of the weights.
            ValueError: this model cannot be swapped with the average; says why. Nothing is changed.
            SwapError: at the end of the block, if the model was changed in it so that a tensor cannot take its trained
                value. Nothing is changed; `error.live` has the trained values by name. Undo the change, then call
                `restore()`.
        """
        self._refuse_while_swapped("swapped()")
        if is_capturing():
            raise RuntimeError("swapped() during CUDA graph capture would bake the exchanged addresses into it")
        refuse_freezing(model.parameters(), model.modules())
        pairs = self._pairs_for_swap(model)
        swap = pairs.swap()
        try:
            self._swap = swap, pairs, model
            swap.enter()
            yield model
        finally:
            if swap.is_entered:
                self.restore()
            else:
                self._swap = None

    def restore(self) -> None:
        """Put the trained weights back after a `SwapError`, once the change that it names is undone.

        Raises:
            RuntimeError: the average is not swapped into a model.
            SwapError: a tensor cannot take its trained value. Nothing is changed.
        """
        if self._swap is None or not self._swap[0].is_entered:
            raise RuntimeError("restore() outside of swapped(): the trained weights are in place")
        swap, pairs, model = self._swap
        if not swap.leave(pairs.is_unchanged, functools.partial(tensors_by_name, model)):
            self._pairs = None  # rebuilt: the model has other tensors or memory now
        self._swap = None

    # ---- refused while swapped: they would return the live weights as the average ----

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_while_swapped("state_dict()")
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_while_swapped("load_state_dict()")
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle and deepcopy, without what the next update rebuilds."""
        self._refuse_while_swapped("pickling or copying an AveragedModel")
        state = {key: value for key, value in self.__dict__.items() if key not in _REBUILT}
        state.pop("_compiled_call_impl", None)  # as torch's modules
        for name in ("avg_fn", "multi_avg_fn"):
            state[name] = recognise(state.get(name)) or state.get(name)
        return state

    # ---- private ----

    def _refuse_while_swapped(self, what: str) -> None:
        if self._swap is not None and self._swap[0].is_entered:
            raise RuntimeError(
                f"{what} while the average is swapped into a model: leave the block first, or call restore()"
            )

    def _known_function(self) -> AveragingFunction | None:
        """Return the averaging function, the default included; None: it is the user's."""
        function = self.multi_avg_fn if self.multi_avg_fn else self.avg_fn
        if function is None:
            return DEFAULT
        if self._rule[0] is not function:
            self._rule = (function, recognise(function))
        return self._rule[1]

    def _copy_integers(self, model: nn.Module) -> None:
        """Copy what torch gave to the user's function, which rounds down: counters, indices, masks."""
        with torch.no_grad():
            for averaged, live in zip(self.module.buffers(), model.buffers(), strict=False):
                if not (averaged.is_floating_point() or averaged.is_complex()):
                    averaged.copy_(live)

    def _current_pairs(self, model: nn.Module, what: str) -> GivenAverages:
        if self._pairs is None or not self._pairs.holds(model, self.use_buffers):
            self._pairs = None
            with torch.inference_mode(False), torch.no_grad():
                self._pairs = GivenAverages(
                    self, model, self.use_buffers, functools.partial(_forget, weakref.ref(self))
                )
        self._pairs.refuse_foreign(what)
        return self._pairs

    def _pairs_for_swap(self, model: nn.Module) -> GivenAverages:
        try:
            return self._current_pairs(model, "swapped()")
        except UseTorchFallback:
            raise ValueError(
                f"swapped() needs the averaged model as an ordinary module; a {type(model).__name__} stores its "
                "tensors elsewhere, or has other buffers"
            ) from None

    def _update_for(self, model: nn.Module) -> Update | None:
        """Return the update to run; None: torch's own code must run."""
        try:
            pairs = self._current_pairs(model, "update_parameters()")
            with torch.inference_mode(False), torch.no_grad():
                return pairs.update()
        except UseTorchFallback:
            return None


def _forget(averaged: weakref.ref[AveragedModel], model: Any) -> None:
    """Drop the pairs of a live model that was deleted."""
    owner = averaged()
    pairs = None if owner is None else owner.__dict__.get("_pairs")
    if owner is not None and pairs is not None and pairs.is_of(model):
        del owner.__dict__["_pairs"]  # nn.Module.__delattr__ may not work at interpreter exit


# ---- batch norm ----


@torch.no_grad()
def update_bn(loader: Iterable[Any], model: nn.Module, device: int | torch.device | None = None) -> None:
    """Recompute the running statistics of BatchNorm layers in one pass over `loader`.

    Args:
        loader: yields the model's input, or a list or tuple whose first element it is.
        model: the model, e.g. an AveragedModel.
        device: where to move the inputs; None: they are not moved.

    Raises:
        TypeError: the loader yields dictionaries and the model cannot take one.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    was_training = model.training
    batch: Any = None

    def batches() -> Iterator[Any]:
        nonlocal batch
        for batch in loader:  # noqa: UP028 - the last batch is named in the error
            yield batch

    try:
        _torch_update_bn(batches(), model, device)
    except Exception as error:
        if isinstance(batch, Mapping) and isinstance(error, (TypeError, AttributeError)):
            raise TypeError(
                f"update_bn() got a dictionary with the keys {list(batch)} from the loader, and the model cannot take "
                "it: give it the model's input, e.g. (batch['image'] for batch in loader)"
            ) from error
        raise
    finally:
        if layers:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
            model.train(was_training)


# ---- for trainers whose imports cannot be edited ----

_PATCHED: dict[str, Any] = {name: value for name, value in list(globals().items()) if name in _torch_swa_utils.__all__}
_before_patch: dict[str, Any] | None = None


def patch() -> ExitStack:
    """Put the names of this module into `torch.optim.swa_utils`, for a trainer that imports them from there.

    Call it before the trainer is imported, since `from ... import` keeps what was there. Nested calls have no effect.

    Returns:
        A context manager; `with patch():` ends with torch's own names.

    Examples:
        >>> with patch():
        ...     torch.optim.swa_utils.AveragedModel is AveragedModel
        True
        >>> torch.optim.swa_utils.AveragedModel is AveragedModel
        False
    """
    global _before_patch
    end = ExitStack()
    if _before_patch is None:
        _before_patch = {name: getattr(_torch_swa_utils, name) for name in _PATCHED}
        for name, value in _PATCHED.items():
            setattr(_torch_swa_utils, name, value)
        end.callback(unpatch)
    return end


def unpatch() -> None:
    """Put torch's own names back, if they were replaced."""
    global _before_patch
    for name, value in (_before_patch or {}).items():
        setattr(_torch_swa_utils, name, value)
    _before_patch = None
