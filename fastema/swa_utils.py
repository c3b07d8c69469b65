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
- Integer and bool tensors are copied at every update: under `use_buffers=True` torch freezes them with an EMA (it
  rounds down) and raises with SWA, and an average of counters means nothing.
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
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils as _torch_swa_utils
from torch.optim.swa_utils import SWALR
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices

from fastema.backends.streams import is_capturing
from fastema.core.averaged_model.paired_modules import PairedModules, tensors_by_name
from fastema.core.averaged_model.pairs import UseTorchFallback
from fastema.core.averaged_model.update import Update
from fastema.core.model.compiled import refuse_freezing
from fastema.core.swap.swap import Swap

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
_TORCH_FACTORIES: dict[str, Callable[..., Any]] = {
    name: getattr(_torch_swa_utils, name)
    for name in ("get_ema_multi_avg_fn", "get_swa_multi_avg_fn", "get_ema_avg_fn", "get_swa_avg_fn")
}


# ---- the averaging functions ----


class _AveragingFunction:
    """One of torch's averaging functions, as an object that can be pickled and that tells its rule."""

    def __init__(self, factory: str, decay: Any = None) -> None:
        self.factory = factory
        self.decay = decay
        self._function = _TORCH_FACTORIES[factory](*(() if decay is None else (decay,)))
        functools.update_wrapper(self, self._function)  # its name, its documentation and its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _AveragingFunction, (self.factory, self.decay)

    def __deepcopy__(self, memo: dict[int, Any]) -> _AveragingFunction:
        return self  # as a function is

    def __repr__(self) -> str:
        return f"{self.factory}({'' if self.decay is None else self.decay})"

    def weight(self, num_averaged: int) -> float:
        """Return the weight of the live model in the next average."""
        if self.decay is not None:
            return 1 - self.decay
        if self.factory == "get_swa_multi_avg_fn":
            # Torch divides tensors here, so that the weight is rounded to float32 even for float64 parameters.
            return (1 / torch.tensor(num_averaged + 1, device="cpu")).item()
        return 1 / (num_averaged + 1)


def get_ema_multi_avg_fn(decay: float = 0.999) -> Any:
    """Return the function that applies an exponential moving average to lists of parameters.

    Args:
        decay: in [0, 1].

    Raises:
        ValueError: it is not.
    """
    return _AveragingFunction("get_ema_multi_avg_fn", decay)


def get_swa_multi_avg_fn() -> Any:
    """Return the function that applies an equally weighted average to lists of parameters."""
    return _AveragingFunction("get_swa_multi_avg_fn")


def get_ema_avg_fn(decay: float = 0.999) -> Any:
    """Return the function that applies an exponential moving average to one parameter.

    Args:
        decay: in [0, 1].

    Raises:
        ValueError: it is not.
    """
    return _AveragingFunction("get_ema_avg_fn", decay)


def get_swa_avg_fn() -> Any:
    """Return the function that applies an equally weighted average to one parameter."""
    return _AveragingFunction("get_swa_avg_fn")


def _codes(function: Any) -> list[Any]:
    """Return the code of a function and of what it wraps, outermost first."""
    codes = []
    while isinstance(function, FunctionType):
        codes.append(function.__code__)
        function = getattr(function, "__wrapped__", None)
    return codes


_TORCH_CODES = {
    name: _codes(factory(0.5) if "_ema_" in name else factory()) for name, factory in _TORCH_FACTORIES.items()
}


def _recognise(function: Any) -> _AveragingFunction | None:
    """Return `function` as an `_AveragingFunction` if it is ours or torch's; None: it is the user's."""
    if isinstance(function, _AveragingFunction):
        known = function
    else:
        # torch's are closures; all that one factory makes share their code objects, and no others do.
        codes = _codes(function)
        factory = next((name for name, torch_codes in _TORCH_CODES.items() if codes == torch_codes), None)
        if factory is None:
            return None
        inner = inspect.unwrap(function)
        cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True))
        known = _AveragingFunction(factory, cells["decay"].cell_contents if "decay" in cells else None)
    # A decay that is a tensor may be on a GPU, where reading it would wait.
    return known if known.decay is None or isinstance(known.decay, (int, float)) else None


# As in torch: the second where foreach operations have kernels.
_DEFAULT = _AveragingFunction("get_swa_avg_fn")
_DEFAULT_WITH_FOREACH = _AveragingFunction("get_swa_multi_avg_fn")


# ---- the model ----


class _Counter:
    """Caches the value of a counter tensor; reads it again only if others wrote to it."""

    def __init__(self) -> None:
        self._tensor: Callable[[], Tensor | None] = lambda: None  # a weak reference to what was read
        self._mark = (0, 0)
        self._value: Any = None

    def read(self, tensor: Tensor) -> Any:
        """Return the value; on a GPU this waits only if it was written to since the last call."""
        if tensor.device.type == "cpu" or tensor.is_inference():  # no wait; inference tensors have no version
            return tensor.item()
        return self.remembered(tensor)

    def remembered(self, tensor: Tensor) -> Any:
        """Return the value as last read, unless the tensor is another one or was written to."""
        mark = (tensor.data_ptr(), tensor._version)
        if self._tensor() is not tensor or mark != self._mark:
            self._tensor, self._mark, self._value = weakref.ref(tensor), mark, tensor.item()
        return self._value

    def increase(self, tensor: Tensor) -> None:
        """Add one to the tensor, which was just read."""
        tensor.add_(1)
        if self._tensor() is tensor:
            self._mark, self._value = (tensor.data_ptr(), tensor._version), self._value + 1


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
        RuntimeError: the model cannot be deep-copied.

    Examples:
        >>> model = torch.nn.Linear(2, 1)
        >>> averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        >>> averaged.update_parameters(model)  # after optimizer.step()
        >>> with averaged.swapped(model):
        ...     _ = model(torch.ones(1, 2))  # the averaged weights, in the model itself
    """

    _pairs: PairedModules | None = None
    _swap: tuple[Swap, PairedModules, nn.Module] | None = None  # the last one, its pairs and the model it is with
    _counter: _Counter | None = None
    _rule: tuple[Any, _AveragingFunction | None] = (None, None)  # the given function, and what _recognise() made of it

    def __init__(
        self,
        model: nn.Module,
        device: int | torch.device | None = None,
        avg_fn: Callable[[Tensor, Tensor, Tensor | int], Tensor] | None = None,
        multi_avg_fn: Callable[..., None] | None = None,
        use_buffers: bool = False,
    ) -> None:
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
        update = self._update_for(model)
        if update is None:
            super().update_parameters(model)
            return
        if self._counter is None:
            self._counter = _Counter()
        counter = self.n_averaged
        num_averaged = self._counter.read(counter)
        if num_averaged == 0:
            update.start()
        else:
            update.run(functools.partial(self._weight, num_averaged))
            if self._pairs is not None:
                self._pairs.settle()
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
            state[name] = _recognise(state.get(name)) or state.get(name)
        return state

    # ---- private ----

    def _refuse_while_swapped(self, what: str) -> None:
        if self._swap is not None and self._swap[0].is_entered:
            raise RuntimeError(
                f"{what} while the average is swapped into a model: leave the block first, or call restore()"
            )

    def _recognise_function(self) -> _AveragingFunction | None:
        """Return the averaging function, the default included; None: it is the user's."""
        function = self.multi_avg_fn if self.multi_avg_fn else self.avg_fn
        if function is None:
            return _DEFAULT
        if self._rule[0] is not function:
            self._rule = (function, _recognise(function))
        return self._rule[1]

    def _weight(self, num_averaged: int, device_type: str) -> float:
        function = self._recognise_function()
        assert function is not None  # else _update_for() returns None
        if function is _DEFAULT and device_type in _get_foreach_kernels_supported_devices():
            function = _DEFAULT_WITH_FOREACH
        return function.weight(num_averaged)

    def _current_pairs(self, model: nn.Module, what: str) -> PairedModules:
        if self._pairs is None or not self._pairs.holds(model, self.use_buffers):
            self._pairs = None
            with torch.inference_mode(False), torch.no_grad():
                self._pairs = PairedModules(
                    self, model, self.use_buffers, functools.partial(_forget, weakref.ref(self))
                )
        self._pairs.refuse_foreign(what)
        return self._pairs

    def _pairs_for_swap(self, model: nn.Module) -> PairedModules:
        try:
            return self._current_pairs(model, "swapped()")
        except UseTorchFallback:
            raise ValueError(
                f"swapped() needs the averaged model as an ordinary module; a {type(model).__name__} stores its "
                "tensors elsewhere, or has other buffers"
            ) from None

    def _update_for(self, model: nn.Module) -> Update | None:
        """Return the update to run; None: torch's own code must run."""
        if self._recognise_function() is None:
            return None
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


class _Patch:
    """Context manager of `patch()`; its end calls `unpatch()` if that `patch()` replaced the names."""

    def __init__(self, is_first: bool) -> None:
        self._is_first = is_first

    def __enter__(self) -> _Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_first:
            unpatch()


def patch() -> _Patch:
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
    if _before_patch is not None:
        return _Patch(is_first=False)
    _before_patch = {name: getattr(_torch_swa_utils, name) for name in _PATCHED}
    for name, value in _PATCHED.items():
        setattr(_torch_swa_utils, name, value)
    return _Patch(is_first=True)


def unpatch() -> None:
    """Put torch's own names back, if they were replaced."""
    global _before_patch
    for name, value in (_before_patch or {}).items():
        setattr(_torch_swa_utils, name, value)
    _before_patch = None
