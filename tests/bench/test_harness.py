"""The benchmarks run from end to end on tiny cases; no test looks at a time."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import bench
from bench import busy, instructions, memory, scale, swap, train_step, update
from bench.contenders import libraries, peers
from bench.harness import cases, console, contender, growth, measure, records, session
from bench.harness.cases import Case, Unavailable, build_model
from bench.harness.contender import COPY, LIMIT, Contender, Peer, check_swap, check_update
from bench.harness.measure import Budget
from bench.harness.meters import CpuMeter
from bench.harness.race import Group, race
from bench.harness.records import Run
from bench.harness.session import Session

CPU = torch.device("cpu")
TINY = Budget(0.0, least=2, most=2)
ISSUE_FIELDS = {
    *("bench", "case", "impl", "backend", "device", "dtype_shadow", "dtype_live", "tensors", "params", "shadows"),
    *("median_us", "p10_us", "p90_us", "host_us", "bytes_floor", "gbps", "copy_share", "launches", "extra_bytes"),
    "versions",
}
MORE_FIELDS = {"min_us", "samples", "cache", "mean_us", "p95_us"}


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweep 2 MB before a cold round, not twice this machine's last-level cache."""
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1 << 20)


class TinySession(Session):
    """Every table gets two rounds."""

    def budget(self, seconds: float, least: int = 5) -> Budget:
        return TINY


def tiny_session(quick: bool = True) -> Session:
    return TinySession(CPU, CpuMeter(), quick, 1.0, Run({"device": "here"}))


def tiny() -> Case:
    return Case("tiny", ((64,), (3, 5), (1,)))


def tiny_mixed() -> Case:
    return Case("tiny mixed", ((64,), (3, 5), (1,)), torch.float32, torch.bfloat16)


def tiny_half() -> Case:
    return Case("tiny half", ((64,), (3, 5), (1,)), torch.bfloat16, torch.bfloat16)


# ---- cases ----


def test_synthetic_cases_are_as_large_as_their_names_say() -> None:
    assert (cases.small_tensors().tensors, cases.small_tensors().params) == (1000, 256_000)
    assert (cases.one_element_tensors().tensors, cases.one_element_tensors().params) == (600, 600)
    assert cases.one_large_tensor().params == 25_000_000
    assert cases.mixed_one_tensor().params == cases.mixed_list().params == cases.half_list().params == 64_000_000
    assert (cases.ladder(10, 16).tensors, cases.ladder(10, 16).params) == (10, 160)


def test_floors_of_an_update() -> None:
    assert cases.one_large_tensor().update_bytes == 12 * 25_000_000
    assert cases.mixed_list().update_bytes == 10 * 64_000_000
    assert cases.half_list().update_bytes == 6 * 64_000_000


@pytest.mark.parametrize(
    ("make", "tensors", "params"),
    [
        (cases.resnet50, 161, 25_557_032),
        (cases.vit_b, 152, 86_567_656),
        (cases.vit_h, 392, 632_045_800),
        (cases.segmentation_list, 746, 30_999_888),
    ],
)
def test_nets_written_down_have_the_parameters_of_the_net(make: Callable[[], Case], tensors: int, params: int) -> None:
    assert (make().tensors, make().params) == (tensors, params)


def test_the_vit_is_timms() -> None:
    try:
        timm = cases.import_timm()
    except Unavailable as error:
        pytest.skip(f"timm: {error}")
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    assert tuple(tuple(parameter.shape) for parameter in model.parameters()) == cases.vit_b().shapes


def test_the_segmentation_list_is_as_described() -> None:
    sizes = [math.prod(shape) for shape in cases.segmentation_list().shapes]
    assert sum(size <= 1024 for size in sizes) == 514
    assert sum(size >= 1_000_000 for size in sizes) == 9


def test_llama_is_cut_to_what_fits() -> None:
    large, small = cases.llama_7b(10**12), cases.llama_7b(16 * 10**9)
    assert large.params == pytest.approx(6.74e9, rel=0.001)
    assert (small.tensors - 3) % 9 == 0
    assert 22 * small.params <= 0.75 * 16e9
    with pytest.raises(Unavailable, match="one layer needs"):
        cases.llama_7b(10**9)


def test_a_model_has_the_parameters_of_its_case() -> None:
    case = tiny_mixed()
    parameters = list(build_model(case, CPU).parameters())
    assert tuple(tuple(parameter.shape) for parameter in parameters) == case.shapes
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    assert len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == case.tensors


# ---- peers ----

EVERYBODY = (
    *(peers.OURS, peers.OURS_TORCH, peers.OURS_SWA_UTILS, peers.FOREACH),
    *libraries.LIBRARIES,
    *libraries.REPLACING[1:],
)


def check(check_it: Callable[..., None], peer: Peer, case: Case) -> None:
    try:
        check_it(peer, case, CPU)
    except Unavailable as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(f"{peer.name}: {error}")


@pytest.mark.parametrize("peer", EVERYBODY, ids=lambda peer: peer.name)
def test_peers_compute_the_same_average(peer: Peer) -> None:
    check(check_update, peer, tiny())


@pytest.mark.parametrize("peer", [peers.OURS, *peers.CASTS, libraries.TIMM], ids=lambda peer: peer.name)
def test_peers_average_bfloat16_in_float32(peer: Peer) -> None:
    check(check_update, peer, tiny_mixed())


@pytest.mark.parametrize("peer", [peers.OURS, peers.FOREACH], ids=lambda peer: peer.name)
def test_peers_average_bfloat16_in_bfloat16(peer: Peer) -> None:
    check(check_update, peer, tiny_half())


def test_importing_a_peer_leaves_the_process_as_it_was() -> None:
    image = pytest.importorskip("PIL.Image")
    before = (torch.save, image.open, os.environ.get("OMP_NUM_THREADS"))
    check(check_update, libraries.ULTRALYTICS, tiny())
    assert (torch.save, image.open, os.environ.get("OMP_NUM_THREADS")) == before


def test_a_missing_package_is_named() -> None:
    def missing(model: nn.Module, case: Case) -> Contender:
        raise ModuleNotFoundError("no module named nobody")

    with pytest.raises(Unavailable, match=r"not installed \(no module named nobody\)"):
        check_update(Peer("nobody", libraries._if_installed(missing)), tiny(), CPU)


def test_a_peer_that_computes_something_else_is_refused() -> None:
    for case in (tiny(), tiny_half()):
        with pytest.raises(Unavailable, match="another average"):
            check_update(dataclasses.replace(COPY, averages=True), case, CPU)


def test_a_peer_that_refuses_the_dtypes_is_named_with_its_own_words() -> None:
    with pytest.raises(Unavailable, match="RuntimeError"):
        check_update(peers.MULTI_FN, tiny_mixed(), CPU)


@pytest.mark.parametrize(
    "peer", [peers.OURS, peers.OURS_IN_PLACE, *libraries.SWAPPING, *peers.SWAPS_BY_HAND], ids=lambda peer: peer.name
)
def test_swaps_exchange_and_put_back(peer: Peer) -> None:
    check(check_swap, peer, tiny())


def test_a_swap_that_does_not_put_back_is_refused() -> None:
    def build(model: nn.Module, case: Case) -> Contender:
        contender = peers.OURS.build(model, case)
        contender.leave = contender.enter = lambda: None
        return contender

    with pytest.raises(Unavailable, match="does not exchange"):
        check_swap(Peer("idle", build), tiny(), CPU)


# ---- measuring ----


def test_implementations_take_turns() -> None:
    called: list[str] = []
    calls = {name: partial(called.append, name) for name in "ab"}
    timings = measure.take_turns(calls, CpuMeter(), "cold", Budget(0.0, least=3, most=9))
    assert [timings[name].samples for name in "ab"] == [3, 3]
    rounds = called[4:]  # after the warm-up
    assert [sorted(rounds[at : at + 2]) for at in range(0, 6, 2)] == [["a", "b"]] * 3


def test_a_sweep_comes_before_every_cold_round() -> None:
    called: list[str] = []
    calls = {name: partial(called.append, name) for name in "ab"}
    measure.take_turns(calls, CpuMeter(), "cold", Budget(0.0, least=2, most=2), sweep=lambda: called.append("sweep"))
    assert [called[at] for at in (-6, -3)] == ["sweep", "sweep"]
    assert sorted(called[-6:]) == ["a", "a", "b", "b", "sweep", "sweep"]


def test_a_sweep_goes_through_twice_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1000)
    sweep, read, add_up = measure.sweeper(CPU), [], torch.sum
    monkeypatch.setattr(torch, "sum", lambda swept, *rest, **named: read.append(swept) or add_up(swept, *rest, **named))
    left = sweep()
    assert [swept.nbytes for swept in read] == [2000]
    assert isinstance(left, torch.Tensor) and left.nbytes == 4, "it reads, and leaves no lines to be written back"


def test_small_cases_are_swept_and_have_models_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    swept: list[int] = []
    one = tiny_session()
    one.sweep = lambda: swept.append(1)  # type: ignore[misc]
    built: list[nn.Module] = []
    monkeypatch.setattr(
        "bench.harness.race.build_model", lambda case, device: built.append(build_model(case, device)) or built[-1]
    )
    race(one, Group("update", tiny, (LIMIT, peers.OURS, peers.FOREACH), "cold", TINY))
    assert (len(swept), len(built)) == (2, 3)
    monkeypatch.setattr("bench.harness.race.cache_bytes", lambda device: 8)
    race(one, Group("update", tiny, (LIMIT, peers.OURS, peers.FOREACH), "cold", TINY))
    assert (len(swept), len(built)) == (2, 4)


def test_percentiles_are_in_order() -> None:
    timing = measure.take_turns({"a": lambda: None}, CpuMeter(), "warm", TINY)["a"]
    assert timing.min_us <= timing.p10_us <= timing.median_us <= timing.p90_us
    assert timing.host_us is None


def test_memory_of_a_call_is_seen() -> None:
    meter, kept = CpuMeter(), []
    assert meter.allocated(lambda: torch.empty(1000)) == (0, 4000)
    assert meter.allocated(lambda: kept.append(torch.empty(500))) == (2000, 2000)
    assert meter.allocated(lambda: None) == (0, 0)


@pytest.mark.parametrize(
    ("peer", "update_copies", "validation_copies"),
    [
        (peers.OURS, 0, 0),
        (peers.MULTI_FN, 0, 0),
        (peers.CASTS[0], 2, None),  # the weights cast are as large as the average, and the test's are twice theirs
        (peers.SWAPS_BY_HAND[0], 0, 1),
        (peers.SWAPS_BY_HAND[1], 1, 1),
    ],
    ids=lambda value: value.name if isinstance(value, Peer) else None,
)
def test_footprints(peer: Peer, update_copies: int, validation_copies: int | None) -> None:
    case = Case("4 x 250,000", ((250_000,),) * 4)
    if peer is peers.CASTS[0]:
        case = dataclasses.replace(case, live_dtype=torch.bfloat16)
    found, _ = contender.footprint(CpuMeter(), peer, build_model(case, CPU), case)
    assert found.update == pytest.approx(update_copies * case.live_bytes, abs=100)
    if validation_copies is None:
        assert found.validation is None
    else:
        kept = case.live_bytes if peer is peers.SWAPS_BY_HAND[1] else 0
        assert found.validation == pytest.approx(validation_copies * case.live_bytes, abs=100)
        assert found.kept == pytest.approx(kept, abs=100)


# ---- runs ----


def test_a_race_records_everybody_and_names_who_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    one = tiny_session()
    race(one, Group("update", tiny, (LIMIT, COPY, peers.OURS, peers.FOREACH), "cold", TINY))
    race(one, Group("update", tiny_mixed, (peers.OURS, peers.MULTI_FN), "warm", TINY))
    assert [record.impl for record in one.run.records if record.case == "tiny"] == [
        *("torch copy_, one tensor", "torch._foreach_copy_", "fastema", "torch._foreach_lerp_")
    ]
    for record in one.run.records:
        fields = set(dataclasses.asdict(record))
        assert fields == ISSUE_FIELDS | MORE_FIELDS
        assert (record.launches, record.versions["torch"]) == (None, torch.__version__)
        assert (record.copy_share is None) == (record.cache == "warm")
    limit = one.run.find("update", "tiny", LIMIT.name)
    assert limit is not None and limit.copy_share == pytest.approx(1.0)
    assert [(missing.impl, missing.case) for missing in one.run.missing] == [(peers.MULTI_FN.name, "tiny mixed")]
    assert "not measured: AveragedModel, ema multi fn: RuntimeError" in capsys.readouterr().out


def test_beside_busy_processes_ours_is_measured_on_one_thread_and_on_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(busy, "_BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(busy, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(cases, "small_tensors", tiny)
    monkeypatch.setattr(busy, "measure_fresh", lambda session, maker, processes: fresh.append((maker, processes)))
    fresh: list[tuple[str, int]] = []
    one = tiny_session()
    busy.run(one)
    assert fresh == [("tiny", 2)]
    assert [(record.bench, record.impl) for record in one.run.records] == [
        (f"busy: {processes}", impl)
        for processes in (0, 4)
        for impl in (peers.OURS.name, peers.FOREACH.name, peers.MULTI_FN.name, busy.ONE_THREAD)
    ]
    for record in one.run.records:
        assert record.mean_us is not None and record.p95_us is not None and record.samples >= 2
        assert record.time <= record.p95_us
    assert "4 busy: median" in capsys.readouterr().out


def test_the_first_updates_of_fresh_processes_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(busy, "LOADS", (0,))
    monkeypatch.setattr(busy, "_SETTLE_SECONDS", 0.0)
    busy.measure_fresh(dataclasses.replace(tiny_session(), quick=False), "one_element_tensors", 2)
    shown = capsys.readouterr().out
    assert "first 150 updates of 2 fresh processes: one element tensors" in shown
    assert re.search(r"0 busy +\S+ \w+ +\d\.\d+ x +\d", shown)


def test_the_load_spins_until_it_is_over() -> None:
    with busy.load(2):
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        if not children.exists():
            pytest.skip("the system does not list a process's children")
        during = children.read_text().split()
    assert len(set(during) - set(children.read_text().split())) == 2


def test_what_does_not_fit_into_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.harness.race.free_bytes", lambda device: 10**9)
    monkeypatch.setattr("bench.harness.race._SPARE_BYTES", 0)
    huge = Case("huge", ((10**9,),))
    one = tiny_session()
    race(one, Group("update", lambda: huge, (), "cold", TINY))
    with pytest.raises(Unavailable, match=r"needs 8.0 GB, 1.0 GB are free"):
        from bench.harness.race import _ensure_room

        _ensure_room(8 * 10**9, 0, CPU)


def test_the_copy_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    one = tiny_session()
    update.measure_copy(one, elements=1000)
    (record,) = one.run.records
    assert (record.bench, record.bytes_floor, record.gbps is not None) == ("copy", 8000, True)


def test_several_averages_are_measured_together_and_apart() -> None:
    one = tiny_session(quick=False)
    update.measure_several(one, tiny())
    assert sorted({record.shadows for record in one.run.records}) == [1, 2, 3, 4]
    four = {record.impl: record.bytes_floor for record in one.run.records if record.shadows == 4}
    assert four == {peers.TOGETHER: 36 * 80, peers.APART: 48 * 80}


def test_swaps_are_recorded_with_what_they_take() -> None:
    one = tiny_session()
    swap.measure_swap(one, Case("4 x 250,000", ((250_000,),) * 4), (peers.OURS, peers.SWAPS_BY_HAND[0]))
    ours, by_hand = (one.run.find("swap", "4 x 250,000", peer.name) for peer in (peers.OURS, peers.SWAPS_BY_HAND[0]))
    assert ours is not None and by_hand is not None
    assert (ours.bytes_floor, ours.extra_bytes, ours.gbps) == (0, 0, None)
    assert (by_hand.bytes_floor, by_hand.extra_bytes) == (24 * 10**6, 4 * 10**6)


def test_a_validation_of_base_and_average() -> None:
    one = tiny_session()
    swap.measure_validation(one, (peers.OURS, peers.MULTI_FN))
    if one.run.missing:
        pytest.skip(one.run.missing[0].reason)
    assert {record.impl for record in one.run.records} == {peers.BASE_TWICE, peers.OURS.name, peers.MULTI_FN.name}


def test_a_training_step_and_its_average(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(8, 4)
    before = model.weight.detach().clone()
    workload = train_step.Workload("linear", model, lambda: model(torch.ones(2, 8)).square().mean())
    one = tiny_session()
    found = train_step.measure(one, workload, (peers.OURS, peers.FOREACH), TINY)
    train_step.print_shares(found)
    assert [(record.bench, record.impl) for record in found] == [
        ("train_step", peers.STEP),
        ("train_step", peers.OURS.name),
        ("train_step", peers.FOREACH.name),
        ("train_step: swap", peers.OURS.name),
    ]
    assert not torch.equal(model.weight, before)
    assert "swap, once a validation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "name"), [(update, "update"), (swap, "swap"), (scale, "scale"), (memory, "memory"), (busy, "busy")]
)
def test_every_benchmark_has_the_same_command_line(
    module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "run", lambda one: one.miss(name, "", "", "a test"))
    monkeypatch.setattr(update, "measure_copy", lambda one: None)
    file = tmp_path / "it.json"
    assert module.main(["--quick", "--json", str(file), "--threads", "1"]) == 0
    run = records.load([file])
    assert [missing.bench for missing in run.missing] == [name]
    assert {"date", "device", "threads", "cores", "load", "versions", "cache_bytes"} <= set(run.environment)
    assert run.environment["threads"] == 1
    assert name in run.seconds


def test_all_of_them_go_into_one_file_and_the_losses_follow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (update, swap, scale, memory, train_step, instructions):
        name = module.__name__
        monkeypatch.setattr(module, "run", lambda one, name=name: one.miss(name, "", "", "a test"))
    monkeypatch.setattr(update, "measure_copy", lambda one: one.miss("copy", "", "", "a test"))
    importlib.import_module("bench.all").main(["--json", str(tmp_path / "it.json")])
    run = records.load([tmp_path / "it.json"])
    names = ["copy", "update", "swap", "scale", "memory", "train_step", "instructions"]
    assert [missing.bench.removeprefix("bench.") for missing in run.missing] == names
    assert list(run.seconds) == [*names, "losses"]
    printed = capsys.readouterr().out
    assert "where ours is not ahead" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--seconds", "-1"], "--seconds must be positive, got -1"),
        (["--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (["--go-on"], "--go-on needs --json"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        session.run_benchmarks("bench.update", "", {}, arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_is_kept_table_by_table_and_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "it.json"
    raced: list[str] = []

    def plan(one: Session) -> None:
        for bench_name in ("first", "second", "third"):
            found = race(one, Group(bench_name, tiny, (LIMIT, peers.OURS), "cold", TINY))
            raced.extend(record.bench for record in found if record.impl == peers.OURS.name)
            if found and len(raced) == 2:
                raise SystemExit("cut")

    arguments = ["--json", str(file), "--go-on"]
    with pytest.raises(SystemExit, match="cut"):
        session.run_benchmarks("bench.update", "", {"copy": lambda one: None, "update": plan}, arguments)
    assert {record.bench for record in records.load([file]).records} == {"first", "second"}
    for _ in range(2):
        assert session.run_benchmarks("bench.update", "", {"copy": pytest.fail, "update": plan}, arguments) == 0
        assert raced == ["first", "second", "third"]
    run = records.load([file])
    assert [record.bench for record in run.records] == ["first", "first", "second", "second", "third", "third"]
    assert list(run.seconds) == ["copy", "update"]
    file.write_text(file.read_text().replace(str(run.environment["device"]), "another machine"))
    assert session.run_benchmarks("bench.update", "", {"update": lambda one: None}, arguments) == 0
    assert records.load([file]).records == [], "records of another machine are not gone on with"


def test_a_quick_run_needs_no_slow_imports() -> None:
    slow = {libraries.DIFFUSERS, libraries.DIFFUSERS_FOREACH, libraries.LIGHTNING, *libraries.REPLACING[1:]}
    for group in update.plan(Session(CPU, CpuMeter(), quick=True)):
        assert not slow & set(group.entrants)
    full = {peer for group in update.plan(Session(CPU, CpuMeter())) for peer in group.entrants}
    assert slow | set(libraries.LIBRARIES) <= full


def test_instructions_are_read_from_callgrinds_files() -> None:
    dump = "desc: Trigger: Client Request: swap: fastema\n\nevents: Ir\nsummary: 70\n\ntotals: 99\n"
    assert instructions.totals([dump, "desc: Trigger: Program termination\nsummary: 1\n"]) == {"swap: fastema": 70}


def test_without_valgrind_it_is_named_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.instructions.shutil.which", lambda tool: None)
    one = tiny_session()
    instructions.run(one)
    assert [(missing.bench, missing.reason) for missing in one.run.missing] == [
        ("instructions", "valgrind is not installed")
    ]


def test_importing_the_benchmarks_starts_no_gpu() -> None:
    assert bench.__doc__
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize("module", [measure, console, growth, instructions])
def test_examples_in_the_docstrings(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


def test_a_table_is_aligned() -> None:
    lines = console.plain_table("Title", ["who", "us"], [["we", "9"], ["they", "1,000"]]).splitlines()
    assert lines == ["Title", "who      us", "-----------", "we        9", "they  1,000"]
