"""The same training on both backends at once, with the average in float64 beside them, for fuzzing and for the soak.

Whatever is done is done to all; then the backends must agree bit for bit, and with float64 within what rounding allows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cases import as_applied
from fastema import FastEMA
from fastema.checkpoint import load_checkpoint, load_weights, save_checkpoint

BACKENDS = ("native", "torch")
_EPS = torch.finfo(torch.float32).eps


class Net(nn.Module):
    """Tied weights, a normalisation with its buffers, half a storage, and weights of `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.decoder = nn.Linear(7, 5, bias=False)
        self.again = nn.Linear(5, 7)
        self.again.weight = self.encoder.weight
        self.tail = nn.Parameter(torch.randn(10)[3:8])
        self.head = nn.Linear(5, 3, dtype=dtype)


class Twins:
    """Args:
    decays: one or several.
    dtype: of some weights; their averages are float32.
    seed: of weights and training.
    """

    def __init__(self, decays: Sequence[float] = (0.9,), dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self._random = torch.Generator().manual_seed(seed)
        first = Net(dtype)
        self.decays = list(decays)
        self.models: list[nn.Module] = [first, *(copy.deepcopy(first) for _ in BACKENDS[1:])]
        self.emas = [
            FastEMA(
                model, self.decays if len(self.decays) > 1 else self.decays[0], decay_type="constant", backend=backend
            )
            for model, backend in zip(self.models, BACKENDS, strict=True)
        ]
        self.averaged = [name for name, tensor in first.state_dict().items() if tensor.is_floating_point()]
        start = self._live()
        self.exact = start.repeat(len(self.decays), 1)  # [decays, elements]
        self.allowed = torch.zeros_like(self.exact)
        self._decay = torch.tensor(self.decays, dtype=torch.float64)[:, None]
        self.updates = self.nonfinite = 0
        self.worst = 0.0  # the largest error seen, as a share of what is allowed
        self.error = 0.0  # and in numbers
        self._saved: tuple[Any, ...] | None = None
        self.save()

    # --- what is there ---

    def _live(self) -> Tensor:
        """Return what is averaged, as one row of float64."""
        state = self.models[0].state_dict()
        return torch.cat([state[name].detach().double().flatten() for name in self.averaged])

    def bits(self) -> list[dict[str, Tensor]]:
        """The models' tensors, copied."""
        return [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in self.models]

    def shadows(self, ema: FastEMA) -> list[dict[str, Tensor]]:
        shadow = ema.state_dict()["shadow"]
        return shadow if isinstance(shadow, list) else [shadow]

    @property
    def is_applied(self) -> bool:
        (applied,) = {ema.is_applied for ema in self.emas}
        return applied

    def check(self) -> None:
        """The backends agree, and with float64."""
        first, *others = [self.shadows(ema) for ema in self.emas]
        for other in others:
            assert all(_equal(a, b) for a, b in zip(first, other, strict=True)), "the backends have drifted apart"
        assert _equal(self.models[0].state_dict(), self.models[1].state_dict()), "the models have drifted apart"
        for which, shadow in enumerate(first):
            now = torch.cat([shadow[name].double().flatten() for name in self.averaged])
            error = (now - self.exact[which]).abs()
            allowed = self.allowed[which]
            assert bool((error <= allowed + 1e-37).all()), f"average {which} is off by {error.max():.2e}"
            self.error = max(self.error, float(error.max()))
            self.worst = max(self.worst, float((error / allowed.clamp(min=1e-37)).max()))
        for ema in self.emas:
            assert (ema.num_updates, ema.nonfinite_count()) == (self.updates, self.nonfinite)

    # --- training ---

    def train(self, poison: float | None = None) -> None:
        """A step of an optimizer; `poison` also puts that value into one weight."""
        sizes = [parameter.numel() for parameter in self.models[0].parameters()]
        noise = 0.1 * torch.randn(sum(sizes), generator=self._random)
        for model in self.models:
            with torch.no_grad():
                for parameter, part in zip(model.parameters(), noise.split(sizes), strict=True):
                    parameter.mul_(0.99).add_(part.to(parameter.dtype).view(parameter.shape))
                norm: Any = model.norm
                norm.running_var.mul_(0.9).add_(noise[:7].abs())
                norm.num_batches_tracked.add_(1)
                if poison is not None:
                    model.get_parameter("encoder.weight")[2, 3] = poison

    def heal(self) -> None:
        """Takes poison out again."""
        for model in self.models:
            with torch.no_grad():
                model.get_parameter("encoder.weight").nan_to_num_(0.5, 0.5, 0.5)

    def update(self) -> None:
        for ema in self.emas:
            ema.update()
        self.updates += 1
        live = self._live()
        finite = live.isfinite()
        self.nonfinite += int((~finite).sum()) // 2  # poison is in the tied weight: twice in a state, averaged once
        rounding = 2 * _EPS * (self.exact.abs() + live.abs())
        self.allowed = torch.where(finite, self.allowed * self._decay + rounding, self.allowed)
        self.exact = torch.where(finite, self.exact + (1.0 - self._decay) * (live - self.exact), self.exact)

    # --- everything else: none of it changes live weights, averages or counters, but those that say so ---

    def swap(self, in_place: bool = False, which: int = 0, failing: bool = False) -> None:
        live = self.bits()
        for model, ema in zip(self.models, self.emas, strict=True):
            try:
                with ema.swapped(in_place, which):
                    self._check_applied(model, ema, which)
                    self.refused_while_applied(model, ema)
                    if failing:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                assert failing
        assert all(map(_equal, self.bits(), live)), "the exchange changed live weights"

    def apply(self, in_place: bool = False, which: int = 0) -> None:
        self._before = self.bits()
        for model, ema in zip(self.models, self.emas, strict=True):
            ema.apply_shadow(in_place, which)
            self._check_applied(model, ema, which)

    def restore(self) -> None:
        for ema in self.emas:
            ema.restore()
        assert all(map(_equal, self.bits(), self._before)), "the exchange changed live weights"

    def _check_applied(self, model: nn.Module, ema: FastEMA, which: int) -> None:
        shadow = self.shadows(ema)[which]
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, as_applied(shadow[name], tensor.dtype)), f"{name} is not the average"

    def refused_while_applied(self, model: nn.Module, ema: FastEMA) -> None:
        state = ema.state_dict()
        calls: list[Callable[[], Any]] = [
            ema.update,
            ema.apply_shadow,
            ema.copy_to,
            lambda: ema.load_state_dict(state),
            lambda: copy.deepcopy(ema),
        ]
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                assert "applied" in str(error), error
            else:
                raise AssertionError("something that needs live weights ran while the average was in their place")

    def save(self) -> None:
        """Keeps the averages for a later `load()`."""
        states = [copy.deepcopy(ema.state_dict()) for ema in self.emas]
        self._saved = states, self.exact, self.allowed, self.updates

    def load(self) -> None:
        """Goes back to the last `save()`: averages and counters, not the live weights."""
        assert self._saved is not None
        states, self.exact, self.allowed, self.updates = self._saved
        for ema, state in zip(self.emas, states, strict=True):
            ema.load_state_dict(state)

    def through_a_file(self, path: Path) -> None:
        """Saves a checkpoint and loads it into models and averages built anew."""
        for index, backend in enumerate(BACKENDS):
            model, ema = self.models[index], self.emas[index]
            save_checkpoint(path, net=model, ema=ema, number=self.updates)
            content = load_checkpoint(path)
            assert content["number"] == self.updates
            averaged = copy.deepcopy(model)
            assert load_weights(averaged, content) == "ema_net"
            assert torch.equal(averaged.state_dict()["tail"], self.shadows(ema)[0]["tail"])
            fresh = copy.deepcopy(model)
            assert load_weights(fresh, content, prefer="net") == "net"
            assert _equal(fresh.state_dict(), model.state_dict())
            self.models[index] = fresh
            self.emas[index] = FastEMA(
                fresh, self.decays if len(self.decays) > 1 else self.decays[0], decay_type="constant", backend=backend
            )
            self.emas[index].load_state_dict(content["ema"])
        self.nonfinite = 0  # the count is not part of a state

    def assign(self) -> None:
        """Other tensors with the same values take the parameters' places."""
        for model in self.models:
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            state["again.weight"] = state["encoder.weight"]
            model.load_state_dict(state, assign=True)
            model.again.weight = model.encoder.weight  # type: ignore[union-attr]  # loading unties them

    def to_another_dtype_and_back(self) -> None:
        for model, ema in zip(self.models, self.emas, strict=True):
            dtypes = {name: module_dtype(module) for name, module in model.named_children()}
            tail = model.get_parameter("tail").dtype
            model.to(torch.float64)
            try:
                ema.update()
            except RuntimeError as error:
                assert "is now" in str(error), error
            else:
                raise AssertionError("an average went on over weights of another dtype")
            for name, dtype in dtypes.items():
                model.get_submodule(name).to(dtype)
            parameter = model.get_parameter("tail")
            parameter.data = parameter.data.to(tail)

    def to_nowhere(self) -> None:
        for model in self.models:
            model.to("cpu", non_blocking=True)

    def freeze(self, frozen: bool) -> None:
        for model in self.models:
            model.get_submodule("encoder").requires_grad_(not frozen)

    def copy(self) -> None:
        """Model and EMA become a copy of themselves."""
        pairs = [copy.deepcopy(pair) for pair in zip(self.models, self.emas, strict=True)]
        self.models, self.emas = [model for model, _ in pairs], [ema for _, ema in pairs]

    def copy_to(self, which: int = 0) -> None:
        """The averages become the live weights."""
        for model, ema in zip(self.models, self.emas, strict=True):
            ema.copy_to(which=which)
            self._check_applied(model, ema, which)

    def load_something_else(self, damage: Callable[[dict[str, Any]], Any]) -> None:
        """Loading a damaged state is refused, and loads nothing."""
        for ema in self.emas:
            state = damage(copy.deepcopy(ema.state_dict()))
            try:
                ema.load_state_dict(state)
            except (ValueError, TypeError):
                continue
            raise AssertionError("a damaged state was loaded")


def module_dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].nan_to_num(), b[name].nan_to_num()) for name in a
    )
