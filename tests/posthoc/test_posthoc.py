"""Averages chosen after the training: the fit, real runs, resumed runs, damaged and foreign snapshots."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import AliveBytes
from fastema import FastEMA
from fastema.posthoc import (
    Profile,
    SnapshotError,
    Snapshots,
    constant_decay,
    errors_of,
    power,
    snapshots_in,
    synthesize,
    synthesize_all,
    uniform,
    weighted,
)
from fastema.posthoc import (
    snapshot_files as files,
)
from fastema.posthoc.profiles import fit, profiles_of

load_file = pytest.importorskip("safetensors.torch").load_file
STORED = [0.05, 0.10]


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 9), nn.BatchNorm1d(9), nn.Linear(9, 9), nn.Linear(9, 9))
    model[3].weight = model[2].weight  # tied
    return model.to(dtype)


def move(model: nn.Module, step: int) -> None:
    """Add a random step and a drift, so that averages of different windows differ."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype) + 0.01
        model[1].num_batches_tracked += 1  # type: ignore[union-attr, operator]


def run(folder: Path, steps: int, every: int, model: nn.Module | None = None, **arguments: Any) -> FastEMA:
    model = make_model() if model is None else model
    chosen = {**arguments.pop("ema", {})}
    chosen = chosen if "decay_type" in chosen else {"decay_type": "power", "sigma_rel": STORED, **chosen}
    ema = FastEMA(model, **chosen)
    snapshots = Snapshots(folder, ema, every=every, verbose=False, **arguments)
    for step in range(1, steps + 1):
        move(model, step)
        ema.update()
        snapshots.save()
    return ema


def direct(steps: int, **arguments: Any) -> dict[str, Tensor]:
    """Return the average that a run itself would have kept, in float64."""
    model = make_model().double()
    ema = FastEMA(model, **arguments)
    for step in range(1, steps + 1):
        move(model, step)
        ema.update()
    return ema.shadow_state_dict()


def distance(first: dict[str, Tensor], second: dict[str, Tensor], scale: dict[str, Tensor] | None = None) -> float:
    """Return the relative L2 distance over what is averaged."""
    names = [name for name in first if first[name].is_floating_point() and "running" not in name]
    apart = sum(float((first[name].double() - second[name].double()).square().sum()) for name in names)
    size = sum(float((scale or second)[name].double().square().sum()) for name in names)
    return (apart / size) ** 0.5


# ---- the fit ----


@pytest.mark.parametrize(
    ("sigma_rel", "snapshots", "allowed"),
    [(0.03, 16, 0.04), (0.15, 16, 0.01), (0.20, 16, 0.025), (0.03, 8, 0.105), (0.15, 8, 0.034), (0.20, 8, 0.08)],
)
def test_what_two_profiles_reach(sigma_rel: float, snapshots: int, allowed: float) -> None:
    (found,) = errors_of([power(s) for s in STORED], snapshots, [power(sigma_rel)])
    assert found.error <= allowed
    assert sum(found.coefficients) == pytest.approx(1.0, abs=1e-12)


def share(profile: Profile, step: int) -> list[float]:
    """Return the share of each step, the initial weights first, multiplied out one update after the other."""
    kinds: dict[str, dict[str, Any]] = {
        "power": {"decay_type": "power", "gamma": profile.values[0]},
        "decay": {"decay_type": "constant", "decay": profile.values[0]},
    }
    every = int(profile.values[1]) if profile.kind == "decay" else 1
    ema = FastEMA([("w", torch.zeros(1))], update_every=every, update_after_step=profile.start, **kinds[profile.kind])
    shares = [1.0] + [0.0] * step
    for now in range(every, step + 1, every):
        decay = ema.decay_at(now)
        shares = [each * decay for each in shares]
        shares[now] += 1 - decay
    return shares


@pytest.mark.parametrize(
    "profile",
    [
        power(0.05),
        power(0.2),
        power(0.1, start=7),
        constant_decay(0.9),
        constant_decay(0.9, 3),
        constant_decay(0.8, 4, 9),
    ],
)
@pytest.mark.parametrize("step", [12, 60])
def test_a_profile_is_what_the_updates_multiply_out_to(profile: Profile, step: int) -> None:
    cumulative = profile.cumulative(torch.arange(step + 1, dtype=torch.float64), step)
    expected = torch.tensor(share(profile, step), dtype=torch.float64).cumsum(0)
    every = int(profile.values[1]) if profile.kind == "decay" else 1
    updates = range(0, step + 1, every)
    torch.testing.assert_close(cumulative[updates], expected[updates], rtol=0, atol=1e-12)


def test_the_error_is_that_of_the_profile_in_float64() -> None:
    """The steps are the bins, so the shares of all steps can be summed without the fit and compared."""
    stored = [(power(s), step) for step in (100, 200, 300, 400) for s in STORED]
    for target in (power(0.07), power(0.15), constant_decay(0.98)):
        (found,) = fit(stored, [target], 400)
        wanted = torch.tensor(share(target, 400), dtype=torch.float64)
        got = torch.zeros(401, dtype=torch.float64)
        for coefficient, (profile, step) in zip(found.coefficients, stored, strict=True):
            got[: step + 1] += coefficient * torch.tensor(share(profile, step), dtype=torch.float64)
        assert float((got - wanted).norm() / wanted.norm()) == pytest.approx(found.error, rel=1e-6)


@pytest.mark.parametrize("total_steps", [20_000, 1_000_000, 300_000_000])
def test_long_runs_have_the_errors_of_short_ones(total_steps: int) -> None:
    targets = [power(0.03), power(0.15), power(0.2)]
    short = errors_of([power(s) for s in STORED], 16, targets, 8000)
    long = errors_of([power(s) for s in STORED], 16, targets, total_steps)
    assert [each.error for each in long] == pytest.approx([each.error for each in short], rel=0.02)


def test_more_snapshots_are_no_worse() -> None:
    errors = [errors_of([power(s) for s in STORED], n, [power(0.03)])[0].error for n in (4, 8, 16, 32, 64)]
    assert errors == sorted(errors, reverse=True)


def test_a_window_and_weights_are_the_profiles_they_say() -> None:
    steps = torch.arange(11, dtype=torch.float64)
    assert uniform(4).cumulative(steps, 10).tolist() == [0] * 7 + [0.25, 0.5, 0.75, 1]
    assert weighted([1, 3]).cumulative(steps, 10).tolist() == pytest.approx(
        [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.4, 0.55, 0.7, 0.85, 1]
    )


# ---- real runs ----


@pytest.mark.parametrize("every", [1, 5])
def test_an_average_is_the_one_that_was_kept_within_the_error(tmp_path: Path, every: int) -> None:
    run(tmp_path, 320, 20, ema={"update_every": every})
    moved = make_model().state_dict()
    for arguments, kept in (
        ({"sigma_rel": 0.07}, {"decay_type": "power", "sigma_rel": 0.07}),
        ({"sigma_rel": 0.15}, {"decay_type": "power", "sigma_rel": 0.15}),
        ({"sigma_rel": 0.03}, {"decay_type": "power", "sigma_rel": 0.03}),
        ({"gamma": 4.0}, {"decay_type": "power", "gamma": 4.0}),
        ({"decay": 0.97**every}, {"decay_type": "constant", "decay": 0.97**every}),
    ):
        found = synthesize(tmp_path, **arguments)  # type: ignore[arg-type]
        expected = direct(320, **kept, update_every=every)  # type: ignore[arg-type]
        live = direct(320, decay_type="constant", decay=0.0)
        path = {name: live[name].double() - moved[name].double() for name in live}
        # What the weights have moved, times the profile's error, bounds the distance for a path of this kind.
        assert distance(found, expected, path) <= found.error + 1e-6
        assert found.error < 0.05


def test_a_window_is_the_mean_of_its_steps(tmp_path: Path) -> None:
    run(tmp_path, 320, 5)
    model, total = make_model().double(), {}
    for step in range(1, 321):
        move(model, step)
        if step > 160:
            for name, value in model.state_dict().items():
                total[name] = total.get(name, 0) + value.double() / 160
    found = synthesize(tmp_path, window=160)
    assert found.error < 0.12
    assert distance(found, total) < 0.02
    halves = synthesize(tmp_path, weights=[0, 1])
    assert halves.error == pytest.approx(found.error, rel=1e-6) and distance(halves, found) < 1e-5


def test_a_stored_average_at_a_stored_step_comes_back_exactly(tmp_path: Path) -> None:
    kept: dict[int, list[dict[str, Tensor]]] = {}
    model = make_model()
    ema = FastEMA(model, decay_type="power", sigma_rel=STORED)
    snapshots = Snapshots(tmp_path, ema, every=10, verbose=False)
    for step in range(1, 41):
        move(model, step)
        ema.update()
        if snapshots.save():
            kept[step] = [copy.deepcopy(dict(ema.shadow_state_dict(which))) for which in (0, 1)]
    for step in (10, 20, 40):
        for which, sigma_rel in enumerate(STORED):
            found = synthesize(tmp_path, sigma_rel=sigma_rel, step=step)
            assert found.error == 0.0 and found.fit.amplification == 1.0 and found.step == step
            assert found.keys() == kept[step][which].keys()
            assert all(torch.equal(found[name], value) for name, value in kept[step][which].items())


def test_a_stored_constant_decay_comes_back_exactly(tmp_path: Path) -> None:
    ema = run(tmp_path, 30, 10, ema={"decay_type": "constant", "decay": [0.9, 0.95]})
    found = synthesize(tmp_path, decay=0.9)
    assert found.error == 0.0
    assert all(torch.equal(found[name], value) for name, value in ema.shadow_state_dict(0).items())


def test_it_loads_into_the_model_and_saves_as_a_plain_state(tmp_path: Path) -> None:
    run(tmp_path / "s", 40, 10)
    found = synthesize(tmp_path / "s", sigma_rel=0.12)
    model = make_model(seed=9)
    model.load_state_dict(found)
    assert model[2].weight is model[3].weight and int(model[1].num_batches_tracked) == 40  # type: ignore[arg-type]
    torch.save(found, tmp_path / "found.pt")
    again = torch.load(tmp_path / "found.pt", weights_only=True)
    assert all(torch.equal(again[name], found[name]) for name in found)
    assert "sigma_rel 0.12 at step 40: profile error" in str(found)


def test_only_snapshots_up_to_the_step_are_used(tmp_path: Path) -> None:
    run(tmp_path, 80, 10)
    before = synthesize(tmp_path, sigma_rel=0.15, step=40)
    for path in list(files.paths_in(tmp_path).values())[4:]:
        path.unlink()
    after = synthesize(tmp_path, sigma_rel=0.15)
    assert before.fit == after.fit and all(torch.equal(before[name], after[name]) for name in before)


def test_a_sweep_reads_every_tensor_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, 80, 10)
    targets = [power(sigma) for sigma in (0.04, 0.07, 0.1, 0.15)]
    alone = [synthesize_all(tmp_path, [target])[0] for target in targets]
    seen: list[str] = []
    checksum = files.checksum
    monkeypatch.setattr(files, "checksum", lambda tensor: seen.append("read") or checksum(tensor))
    together = synthesize_all(tmp_path, targets)
    manifest = snapshots_in(tmp_path)[-1]
    assert len(seen) == 8 * 2 * len(manifest.averaged) + len(manifest.copied)
    for one, each in zip(alone, together, strict=True):
        assert one.fit == each.fit and all(torch.equal(one[name], each[name]) for name in one)


def test_float16_says_its_error(tmp_path: Path) -> None:
    run(tmp_path / "32", 160, 20)
    run(tmp_path / "16", 160, 20, dtype=torch.float16)
    wide, narrow = synthesize(tmp_path / "32", sigma_rel=0.15), synthesize(tmp_path / "16", sigma_rel=0.15)
    assert wide.rounding == 0.0 and 0 < narrow.rounding < 1e-3
    assert 0 < distance(narrow, wide) <= narrow.rounding
    assert narrow["0.weight"].dtype == torch.float32
    sizes = [sum(path.stat().st_size for path in files.paths_in(tmp_path / each).values()) for each in ("16", "32")]
    assert sizes[0] < sizes[1]


def test_float16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model[0].weight[0, 0] = 1e5  # type: ignore[index]
    ema = FastEMA(model, decay_type="power", sigma_rel=0.1)
    snapshots = Snapshots(tmp_path, ema, dtype=torch.float16, verbose=False)
    ema.update()
    with pytest.raises(ValueError, match=r"'0/0.weight' has values beyond 65,504"):
        snapshots.save()
    assert not files.paths_in(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_models_in_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    ema = run(tmp_path, 40, 10, model=make_model(dtype=dtype))
    found = synthesize(tmp_path, sigma_rel=0.05)
    assert all(torch.equal(found[name], value) for name, value in ema.shadow_state_dict(0).items())
    assert found["0.weight"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    make_model(dtype=dtype).load_state_dict(found)


def test_conjugate_and_negative_views_are_stored_by_value(tmp_path: Path) -> None:
    model = make_model()
    model.register_buffer("conjugate", torch.tensor([1 + 2j]).conj())
    model.register_buffer("negative", torch.tensor([1 + 2j]).conj().imag)
    run(tmp_path, 10, 10, model=model)
    found = synthesize(tmp_path, sigma_rel=0.05)
    assert (found["conjugate"].item(), found["negative"].item()) == (1 - 2j, -2.0)


def test_a_snapshot_taken_while_swapped_in_is_the_same(tmp_path: Path) -> None:
    model = make_model()
    ema = FastEMA(model, decay_type="power", sigma_rel=STORED)
    for step in range(1, 6):
        move(model, step)
        ema.update()
    Snapshots(tmp_path / "out", ema, verbose=False).save()
    with ema.swapped(which=1):
        Snapshots(tmp_path / "in", ema, verbose=False).save()
    for sigma_rel in STORED:
        out, inside = (synthesize(tmp_path / each, sigma_rel=sigma_rel) for each in ("out", "in"))
        assert all(torch.equal(out[name], inside[name]) for name in out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_snapshot_of_bfloat16_weights_copies_one_tensor_at_a_time(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(12))).bfloat16()
    ema = FastEMA(model, decay_type="power", sigma_rel=STORED)
    ema.update()
    with AliveBytes() as alive:
        Snapshots(tmp_path, ema, dtype=dtype).save()
    # A tensor is joined of its planes in four pieces; with float16 two float64 copies of it are compared.
    assert alive.most < 10 * 4 * 32 * 32, "24 averages have 4 bytes a parameter"
    found = synthesize(tmp_path, sigma_rel=STORED[1])
    expected = {name: value.to(dtype).float() for name, value in ema.shadow_state_dict(1).items()}
    assert all(torch.equal(found[name], value) for name, value in expected.items())


STORABLE = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64),
    *(torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    torch.complex64,
]


def test_the_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    model = nn.Linear(3, 5)
    for dtype in STORABLE:
        model.register_buffer(f"of_{dtype}".replace(".", "_"), torch.arange(3).to(dtype))
    model.register_buffer("empty", torch.zeros(0, 2))
    ema = FastEMA(model, decay_type="power", sigma_rel=0.1, buffers="copy")
    ema.update()
    path = Snapshots(tmp_path, ema, verbose=False).save()
    assert path is not None
    read = load_file(path)
    expected = {
        f"{0 if name in ('weight', 'bias') else 'copy'}/{name}": value for name, value in model.state_dict().items()
    }
    assert read.keys() == expected.keys()
    for key, value in expected.items():
        assert read[key].dtype == value.dtype
        assert bits_of(read[key]) == bits_of(value)


def bits_of(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


# ---- which snapshots ----


def test_when_a_snapshot_is_due(tmp_path: Path) -> None:
    run(tmp_path / "a", 25, 10, total_steps=25)
    assert list(files.paths_in(tmp_path / "a")) == [10, 20, 25]
    run(tmp_path / "b", 12, 5, at=[2, 11])
    assert list(files.paths_in(tmp_path / "b")) == [2, 5, 10, 11]
    run(tmp_path / "c", 12, 6, ema={"update_every": 4})  # the step of the average is its last update's
    assert list(files.paths_in(tmp_path / "c")) == [4, 12]


def test_the_limit_keeps_even_gaps_and_the_newest(tmp_path: Path) -> None:
    run(tmp_path, 64, 1, limit=8)
    steps = list(files.paths_in(tmp_path))
    assert len(steps) == 8 and steps[-1] == 64
    gaps = [b - a for a, b in zip([0, *steps], steps, strict=False)][:-1]
    assert max(gaps) <= 2 * 64 / 8 and max(gaps) <= 4 * min(gaps)


def test_disk_use_is_told_before_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ema = FastEMA(nn.Linear(1000, 250, bias=False), decay_type="power", sigma_rel=STORED)
    Snapshots(tmp_path, ema, every=10, total_steps=160)
    assert "a snapshot of 2 averages in float32 takes 2.0 MB, 16 of them 32.0 MB, in " in capsys.readouterr().out
    Snapshots(tmp_path, ema, every=10, total_steps=160, limit=4, dtype=torch.float16)
    assert "in float16 takes 1.0 MB, 4 of them 4.0 MB" in capsys.readouterr().out


def test_a_disk_that_is_too_small_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    ema = FastEMA(make_model(), decay_type="power", sigma_rel=STORED)
    with pytest.warns(UserWarning, match=r"has 1.0 kB free"):
        Snapshots(tmp_path, ema, every=1, total_steps=100)


def test_a_new_run_takes_no_snapshots_of_an_abandoned_one(tmp_path: Path) -> None:
    """Snapshots of steps before its own first one are set aside, too."""
    for every in (3, 5):
        model = make_model()
        ema = FastEMA(model, decay_type="power", sigma_rel=STORED)
        snapshots = Snapshots(tmp_path, ema, every=every, verbose=False)
        expected = pytest.warns(UserWarning, match="had 3 snapshots of steps 3 to 9") if every == 5 else nullcontext()
        with expected:
            for step in range(10):
                move(model, step)
                ema.update()
                snapshots.save()
    assert [each.step for each in snapshots_in(tmp_path)] == [5, 10]


def test_a_resumed_run_sets_later_snapshots_aside(tmp_path: Path) -> None:
    model = make_model()
    ema = FastEMA(model, decay_type="power", sigma_rel=STORED)
    snapshots = Snapshots(tmp_path, ema, every=5, verbose=False)
    for step in range(1, 31):
        move(model, step)
        ema.update()
        snapshots.save()
        if step == 12:
            saved = copy.deepcopy((model.state_dict(), ema.state_dict()))
    run_id = snapshots_in(tmp_path)[0].run
    again = make_model()
    again.load_state_dict(saved[0])
    resumed = FastEMA(again, decay_type="power", sigma_rel=STORED)
    resumed.load_state_dict(saved[1])
    snapshots = Snapshots(tmp_path, resumed, every=5, verbose=False)
    with pytest.warns(UserWarning, match=r"had 4 snapshots of steps 15 to 30, later than this run's 12"):
        for step in range(13, 16):
            move(again, step)
            resumed.update()
            snapshots.save()
    assert list(files.paths_in(tmp_path)) == [5, 10, 15]
    assert {each.run for each in snapshots_in(tmp_path)} == {run_id}
    assert len(list(tmp_path.glob("set-aside-*/step-*"))) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(16, 21):
            move(again, step)
            resumed.update()
            snapshots.save()
    assert list(files.paths_in(tmp_path)) == [5, 10, 15, 20]


def test_a_new_run_in_an_old_folder_is_another_run(tmp_path: Path) -> None:
    run(tmp_path, 20, 10)
    first = snapshots_in(tmp_path)[0].run
    with pytest.warns(UserWarning, match="had 2 snapshots"):
        run(tmp_path, 5, 5)
    (only,) = snapshots_in(tmp_path)
    assert only.step == 5 and only.run != first


# ---- what is refused ----


def test_another_models_folder_is_refused_before_the_run(tmp_path: Path) -> None:
    run(tmp_path, 10, 10)
    other = FastEMA(nn.Linear(3, 3), decay_type="power", sigma_rel=STORED)
    with pytest.raises(SnapshotError, match=r"of another model or run: it averages no 'weight', expected 'weight' as "):
        Snapshots(tmp_path, other, verbose=False)
    profiles = FastEMA(make_model(), decay_type="power", sigma_rel=[0.05, 0.2])
    with pytest.raises(SnapshotError, match=r"it has the averages sigma_rel 0\.05; sigma_rel 0\.1, expected sigma_rel"):
        Snapshots(tmp_path, profiles, verbose=False)


@pytest.mark.parametrize("decay_type", ["threshold", "warmup", "half_life_fraction"])
def test_a_schedule_without_a_known_profile_is_refused(tmp_path: Path, decay_type: str) -> None:
    ema = FastEMA(make_model(), decay_type=decay_type)
    with pytest.raises(ValueError, match=f"power, constant or half_life; got '{decay_type}'"):
        Snapshots(tmp_path, ema)


def test_a_state_dict_that_a_hook_changes_is_refused(tmp_path: Path) -> None:
    def split(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
        state["top"], state["bottom"] = state.pop("weight").chunk(2)

    model = nn.Linear(3, 4)
    model.register_state_dict_post_hook(split)
    with pytest.raises(ValueError, match="'weight' is not in the model's state_dict"):
        Snapshots(tmp_path, FastEMA(model, decay_type="power", sigma_rel=0.1), verbose=False)


def test_half_lives_have_the_profile_of_their_decay() -> None:
    ema = FastEMA([("w", torch.zeros(1))], decay_type="half_life", half_life=[10, 1000], batch_size=5)
    assert [each.values[0] for each in profiles_of(ema.counter.decays, 1)] == pytest.approx(list(ema.decay_at(9)))


def test_a_decay_set_in_mid_run_is_refused(tmp_path: Path) -> None:
    model = make_model()
    ema = FastEMA(model, 0.9, decay_type="constant")
    snapshots = Snapshots(tmp_path, ema, verbose=False)
    ema.update()
    snapshots.save()
    ema.set_decay(0.99)
    ema.update()
    with pytest.raises(SnapshotError, match=r"changed in mid-run: it has .* decay 0\.99, expected decay 0\.9"):
        snapshots.save()


@pytest.mark.parametrize(
    "arguments",
    [{"every": 0}, {"every": 2.5}, {"at": [0]}, {"limit": 1}, {"dtype": torch.bfloat16}, {"total_steps": -1}],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any]) -> None:
    ema = FastEMA(make_model(), decay_type="power", sigma_rel=0.1)
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Snapshots(tmp_path, ema, **arguments)


def test_a_sigma_that_cannot_be_reached_says_which_can(tmp_path: Path) -> None:
    run(tmp_path, 64, 8)
    with pytest.raises(
        ValueError, match=r"sigma_rel 0.005 cannot be made .* They reach sigma_rel from 0\.0\d+ to 0\.2"
    ):
        synthesize(tmp_path, sigma_rel=0.005)
    assert synthesize(tmp_path, sigma_rel=0.015, max_error=1.0).error > 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of"),
        ({"sigma_rel": 0.1, "decay": 0.9}, "give one of .* got sigma_rel, decay"),
        ({"sigma_rel": 0.5}, "sigma_rel must be in"),
        ({"decay": 1.5}, "decay must be in"),
        ({"window": 0}, "window must be an int"),
        ({"window": 65}, "window must be at most 64"),
        ({"weights": []}, "weights must be numbers"),
        ({"weights": [0, 0]}, "weights must be numbers"),
        ({"weights": [1, -1]}, "weights must be numbers"),
    ],
)
def test_bad_targets(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    run(tmp_path, 64, 32)
    with pytest.raises(ValueError, match=message):
        synthesize(tmp_path, **arguments)


def test_bad_folders_and_steps(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="there is no folder"):
        synthesize(tmp_path / "none", sigma_rel=0.1)
    with pytest.raises(SnapshotError, match="has no snapshots"):
        synthesize(tmp_path, sigma_rel=0.1)
    run(tmp_path, 20, 10)
    with pytest.raises(SnapshotError, match=r"no snapshot of step 15 .* the last 10, 20"):
        synthesize(tmp_path, sigma_rel=0.1, step=15)


def test_snapshots_of_two_runs_or_models_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "a", 20, 10)
    run(tmp_path / "b", 30, 10)
    files.paths_in(tmp_path / "b")[30].rename(files.path_of(tmp_path / "a", 30, False))
    with pytest.raises(SnapshotError, match="is of another run than step-000000000030"):
        synthesize(tmp_path / "a", sigma_rel=0.1)
    files.paths_in(tmp_path / "b")[20].rename(files.path_of(tmp_path / "b", 40, False))
    with pytest.raises(SnapshotError, match="is of step 20, not of the step in its name"):
        synthesize(tmp_path / "b", sigma_rel=0.1)


def test_any_damage_is_found(tmp_path: Path) -> None:
    run(tmp_path, 20, 10)
    path = files.paths_in(tmp_path)[20]
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(
            SnapshotError, match=r"step-000000000020.* (damaged or cut short|is not a snapshot|another)"
        ):
            synthesize(tmp_path, sigma_rel=0.07)
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(SnapshotError, match="damaged or cut short"):
            synthesize(tmp_path, sigma_rel=0.07)
    path.write_bytes(whole)
    synthesize(tmp_path, sigma_rel=0.07)


def test_a_header_fits_with_the_longest_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One digit for the manifest that sets the header's length, ten for the one that is written.
    monkeypatch.setattr(files.zlib, "crc32", lambda data: 7 if b"4294967295" in bytes(data) else 1111111111)
    ema = FastEMA(nn.Linear(1, 1), decay_type="power", sigma_rel=0.1)
    ema.update()
    Snapshots(tmp_path, ema, verbose=False).save()
    synthesize(tmp_path, sigma_rel=0.1)


def test_a_full_disk_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    run(tmp_path, 10, 10)
    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(SnapshotError, match=r"cannot write the snapshot .*step-000000000020.*No space left"):
        run_on(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000010.safetensors"]


def run_on(folder: Path) -> None:
    model = make_model()
    ema = FastEMA(model, decay_type="power", sigma_rel=STORED)
    ema.update(step=20)
    Snapshots(folder, ema, verbose=False).save()


def test_without_safetensors_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    ema = FastEMA(make_model(), decay_type="power", sigma_rel=0.1)
    with pytest.raises(SnapshotError, match="pip install safetensors"):
        Snapshots(tmp_path, ema)
