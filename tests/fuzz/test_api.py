"""The public API under whatever hypothesis thinks of: no crash, no silent change, errors that are meant.

`make long` runs many; the suite runs some. FASTEMA_FUZZ_CASES says how many.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cases.twins import Twins
from fastema import FastEMA, backends

pytest.importorskip("hypothesis", reason="needs hypothesis")
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

if backends.native.why_unusable("cpu") is not None:
    pytest.skip("compares the backends, and fastema._C is not available", allow_module_level=True)

CASES = int(os.environ.get("FASTEMA_FUZZ_CASES", "200"))
pytestmark = pytest.mark.usefixtures("one_thread")
quiet = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize="FASTEMA_FUZZ_CASES" not in os.environ,  # the suite is the same every time
    database=None,
    print_blob=True,
    phases=[Phase.generate, Phase.shrink],
)

# --- sequences of calls -----------------------------------------------------------------------------------------------

DAMAGES = {
    "not a dict": lambda state: [state],
    "no step": lambda state: {key: value for key, value in state.items() if key != "step"},
    "step is text": lambda state: {**state, "step": "first"},
    "negative": lambda state: {**state, "num_updates": -1},
    "no tensors": lambda state: {**state, "shadow": {}},
    "not tensors": lambda state: {**state, "shadow": dict.fromkeys(first(state), 1.0)},
    "one is gone": lambda state: {**state, "shadow": dict(list(first(state).items())[1:])},
    "another shape": lambda state: {**state, "shadow": {**first(state), "tail": torch.zeros(4)}},
    "another dtype": lambda state: {**state, "shadow": {**first(state), "tail": torch.zeros(5).double()}},
    "meta": lambda state: {**state, "shadow": {**first(state), "tail": torch.zeros(5, device="meta")}},
    "sparse": lambda state: {**state, "shadow": {**first(state), "tail": torch.zeros(5).to_sparse()}},
    "too many": lambda state: {**state, "shadow": [first(state)] * 9},
    "None": lambda state: {**state, "shadow": None},
    "a list": lambda state: {**state, "shadow": [list(first(state))]},
}


def first(state: dict[str, Any]) -> dict[str, Any]:
    shadow = state["shadow"]
    return shadow[0] if isinstance(shadow, list) else shadow


class Calls(RuleBasedStateMachine):
    """Any order of anything, on both backends, against float64."""

    @initialize(
        decays=st.lists(st.sampled_from([0.0, 0.5, 0.9, 0.999, 1.0]), min_size=1, max_size=3),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        seed=st.integers(0, 1000),
    )
    def build(self, decays: list[float], dtype: torch.dtype, seed: int) -> None:
        self.twins = Twins(decays, dtype, seed)
        self.is_cast = dtype == torch.float16

    def live(self) -> bool:
        return not self.twins.is_applied

    def refused(self, in_place: bool) -> bool:
        """In place is refused where averages are cast, before anything changes."""
        if not (in_place and self.is_cast):
            return False
        for ema in self.twins.emas:
            with pytest.raises(ValueError, match="in_place=True exchanges contents"):
                ema.apply_shadow(in_place=True)
        return True

    @precondition(live)
    @rule(poison=st.sampled_from([None, None, None, math.nan, math.inf, -math.inf]))
    def train(self, poison: float | None) -> None:
        self.twins.heal()
        self.twins.train(poison)

    @precondition(live)
    @rule()
    def update(self) -> None:
        self.twins.update()

    @precondition(live)
    @rule(step=st.sampled_from([0, -1, 1.5, "3", True, math.nan]))
    def update_at_no_step(self, step: Any) -> None:
        for ema in self.twins.emas:
            with pytest.raises(ValueError, match="step must be an int of at least 1"):
                ema.update(step)

    @precondition(live)
    @rule(in_place=st.booleans(), which=st.integers(0, 2), failing=st.booleans())
    def swap(self, in_place: bool, which: int, failing: bool) -> None:
        if not self.refused(in_place):
            self.twins.swap(in_place, which % len(self.twins.decays), failing)

    @precondition(live)
    @rule(in_place=st.booleans(), which=st.integers(0, 2))
    def apply(self, in_place: bool, which: int) -> None:
        if not self.refused(in_place):
            self.twins.apply(in_place, which % len(self.twins.decays))

    @precondition(lambda self: not self.live())
    @rule()
    def restore(self) -> None:
        self.twins.restore()

    @precondition(lambda self: not self.live())
    @rule()
    def do_what_is_refused(self) -> None:
        for model, ema in zip(self.twins.models, self.twins.emas, strict=True):
            self.twins.refused_while_applied(model, ema)

    @precondition(live)
    @rule(which=st.sampled_from([-1, 3, 7, "0", None, 0.0, True]))
    def apply_none_that_exists(self, which: Any) -> None:
        for ema in self.twins.emas:
            with pytest.raises(ValueError, match="which must be"):
                ema.apply_shadow(which=which)

    @precondition(live)
    @rule()
    def restore_what_is_not_applied(self) -> None:
        for ema in self.twins.emas:
            with pytest.raises(RuntimeError, match="without apply_shadow"):
                ema.restore()

    @rule()
    def save(self) -> None:
        self.twins.save()

    @precondition(live)
    @rule()
    def load(self) -> None:
        self.twins.load()

    @precondition(live)
    @rule(damage=st.sampled_from(sorted(DAMAGES)))
    def load_something_else(self, damage: str) -> None:
        self.twins.load_something_else(DAMAGES[damage])

    @precondition(live)
    @rule()
    def through_a_file(self) -> None:
        self.twins.heal()
        with tempfile.TemporaryDirectory() as folder:
            self.twins.through_a_file(Path(folder) / "a.pth")

    @precondition(live)
    @rule()
    def assign(self) -> None:
        self.twins.assign()

    @precondition(live)
    @rule()
    def to_another_dtype_and_back(self) -> None:
        self.twins.to_another_dtype_and_back()

    @rule()
    def to_nowhere(self) -> None:
        self.twins.to_nowhere()

    @rule(frozen=st.booleans())
    def freeze(self, frozen: bool) -> None:
        self.twins.freeze(frozen)

    @precondition(live)
    @rule()
    def copy(self) -> None:
        self.twins.copy()

    @precondition(live)
    @rule(which=st.integers(0, 2))
    def copy_to(self, which: int) -> None:
        self.twins.copy_to(which % len(self.twins.decays))

    def teardown(self) -> None:
        if hasattr(self, "twins") and self.twins.is_applied:
            self.twins.restore()

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "twins"):
            self.twins.check()


TestCalls = Calls.TestCase
TestCalls.settings = settings(quiet, max_examples=max(1, CASES // 8), stateful_step_count=25)

# --- arguments --------------------------------------------------------------------------------------------------------

TYPES = ["constant", "threshold", "exp", "linear", "warmup", "debiased", "power", "half_life", "half_life_fraction"]
junk = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just([]), st.just({}))
numbers = st.one_of(st.floats(), st.floats(0, 1), st.integers(-2, 40), junk)
choices = {
    "decay": st.one_of(numbers, st.lists(numbers, max_size=4), st.tuples(st.floats(0, 1))),
    "decay_type": st.one_of(st.sampled_from(TYPES), st.lists(st.sampled_from(TYPES), max_size=3), junk),
    "sigma_rel": st.one_of(numbers, st.lists(numbers, max_size=3)),
    "half_life": numbers,
    "total_steps": numbers,
    "update_every": numbers,
    "update_after_step": numbers,
    "buffers": st.one_of(st.sampled_from(["auto", "average", "copy", "skip"]), junk),
    "policy": st.one_of(
        st.none(), st.sampled_from(["average", "copy", "skip", "?"]).map(lambda rule: lambda *_: rule), st.just(len)
    ),
    "dtype": st.one_of(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool]), junk),
    "device": st.one_of(st.sampled_from(["cpu", "meta", "cuda:77", "nowhere"]), junk),
    "nonfinite": st.one_of(st.sampled_from(["skip", "propagate"]), junk),
    "capturable": st.booleans(),
    "backend": st.one_of(st.sampled_from(["auto", "native", "torch", "triton"]), junk),
    "beta": numbers,
    "power": numbers,
}
models = st.sampled_from([
    lambda: nn.Linear(2, 3),
    lambda: nn.BatchNorm1d(3),
    lambda: nn.Linear(2, 2, dtype=torch.bfloat16),
    lambda: nn.Linear(2, 2, dtype=torch.complex64),
    lambda: nn.Sequential(),
    lambda: nn.LazyLinear(2),
    lambda: nn.Embedding(0, 3),
    lambda: nn.Linear(2, 2, device="meta"),
    lambda: [("a", torch.ones(2)), ("b", torch.arange(3))],
    lambda: [("a", torch.ones(2)), ("a", torch.ones(2))],
    lambda: [("a", torch.ones(1).expand(4))],
    lambda: [("a", torch.ones(3, 4).T), ("b", torch.ones(()))],
    lambda: [("a", torch.eye(2).to_sparse())],
    lambda: [("a", "no tensor")],
    lambda: None,
    lambda: 7,
])  # fmt: skip


@settings(quiet, max_examples=CASES)
@given(build=models, arguments=st.fixed_dictionaries({}, optional=choices), data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_any_arguments_are_refused_clearly_or_work(build: Any, arguments: dict[str, Any], data: st.DataObject) -> None:
    torch.manual_seed(0)
    source: Any = build()
    try:
        ema = FastEMA(source, **arguments)
    except (ValueError, TypeError, OverflowError) as error:
        assert str(error), "an error without words"
        return
    tensors = list(source.state_dict().values()) if isinstance(source, nn.Module) else [t for _, t in source]
    before = [tensor.clone() for tensor in tensors]
    for step in (None, data.draw(st.one_of(st.none(), st.integers(1, 100)))):
        if arguments.get("capturable"):
            step = None
        ema.update(step)
    assert ema.num_updates <= 2
    with ema.swapped():
        assert ema.is_applied
    for now, then in zip(tensors, before, strict=True):
        assert torch.equal(now, then), "averaging or swapping changed the model"
    ema.load_state_dict(ema.state_dict())
    assert "FastEMA" in repr(ema)
    # Nothing moved, so the average is the model, whatever the schedule. (-0.0 == 0.0)
    for name, tensor in ema.shadow_state_dict().items():
        live = dict(source.state_dict() if isinstance(source, nn.Module) else source)[name]
        assert torch.allclose(tensor.to(live.dtype), live, rtol=1e-2), name
