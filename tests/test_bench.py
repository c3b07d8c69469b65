"""The benchmarks run from end to end on tiny cases. Nothing here looks at how long anything took."""

from __future__ import annotations

import dataclasses
import doctest
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

import bench
from bench import cases, figures, measure, peers, table, update
from bench.cases import Case, Unavailable, build_model
from bench.measure import Budget, CpuClock
from bench.session import Group, Session

CPU = torch.device("cpu")
TINY = Budget(0.0, least=2, most=2)
ISSUE_FIELDS = {
    *("bench", "case", "impl", "backend", "device", "dtype_shadow", "dtype_live", "tensors", "params", "shadows"),
    *("median_us", "p10_us", "p90_us", "host_us", "bytes_floor", "gbps", "copy_share", "launches", "extra_bytes"),
    "versions",
}


def tiny() -> Case:
    return Case("tiny", ((64,), (3, 5), (1,)))


def tiny_mixed() -> Case:
    return Case("tiny mixed", ((64,), (3, 5), (1,)), torch.float32, torch.bfloat16)


# ---- cases ----


def test_synthetic_cases_are_as_large_as_their_names_say() -> None:
    assert (cases.small_tensors().tensors, cases.small_tensors().params) == (1000, 256_000)
    assert (cases.one_element_tensors().tensors, cases.one_element_tensors().params) == (600, 600)
    assert cases.one_large_tensor().params == 25_000_000
    assert cases.validation_list().tensors == 1000
    assert cases.validation_list().params == cases.one_large_tensor().params
    assert cases.mixed_one_tensor().params == cases.mixed_list().params == 64_000_000


def test_floors_of_an_update() -> None:
    assert cases.one_large_tensor().update_bytes == 12 * 25_000_000
    assert cases.mixed_list().update_bytes == cases.mixed_list(torch.float16).update_bytes == 10 * 64_000_000


def test_resnet50_is_resnet50() -> None:
    case = cases.resnet50()
    assert (case.tensors, case.params) == (161, 25_557_032)


def test_segmentation_list_is_as_described() -> None:
    case = cases.segmentation_list()
    sizes = [math.prod(shape) for shape in case.shapes]
    assert len(sizes) == 746
    assert sum(size <= 1024 for size in sizes) == 514
    assert sum(size >= 1_000_000 for size in sizes) == 9
    assert case.params == pytest.approx(31e6, rel=0.001)


def test_a_model_has_the_parameters_of_its_case() -> None:
    case = tiny_mixed()
    parameters = list(build_model(case, CPU).parameters())
    assert tuple(tuple(parameter.shape) for parameter in parameters) == case.shapes
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    assert len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == case.tensors


def test_a_missing_timm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise Unavailable("not installed (no module named timm)")

    monkeypatch.setattr(peers, "import_timm", missing)
    with pytest.raises(Unavailable, match="not installed"):
        peers.check_update(peers.TIMM, tiny(), CPU)


# ---- peers ----


@pytest.mark.parametrize("peer", peers.SAME_DTYPE, ids=lambda peer: peer.name)
def test_peers_compute_the_same_average(peer: peers.Peer) -> None:
    if peer is peers.TIMM:
        try:
            cases.import_timm()
        except Unavailable as error:
            pytest.skip(f"timm: {error}")
    peers.check_update(peer, tiny(), CPU)


def test_a_peer_that_computes_something_else_is_refused() -> None:
    with pytest.raises(Unavailable, match="another average"):
        peers.check_update(dataclasses.replace(peers.COPY, averages=True), tiny(), CPU)


def test_a_peer_that_refuses_the_dtypes_is_named_with_its_own_words() -> None:
    with pytest.raises(Unavailable, match="RuntimeError"):
        peers.check_update(peers.MULTI_FN, tiny_mixed(), CPU)


@pytest.mark.parametrize("peer", peers.SWAPS, ids=lambda peer: peer.name)
def test_swaps_exchange_and_put_back(peer: peers.SwapPeer) -> None:
    peers.check_swap(peer, tiny(), CPU)


# ---- measuring ----


def test_implementations_take_turns() -> None:
    called: list[str] = []
    calls = {name: [lambda name=name: called.append(name)] for name in "ab"}
    timings = measure.take_turns(calls, CpuClock(), "cold", Budget(0.0, least=3, most=9))
    assert [timings[name].samples for name in "ab"] == [3, 3]
    rounds = called[4:]  # after the warm-up
    assert [sorted(rounds[at : at + 2]) for at in range(0, 6, 2)] == [["a", "b"]] * 3


def test_cold_calls_rotate_over_the_models() -> None:
    called: list[int] = []
    calls = {"a": [lambda model=model: called.append(model) for model in range(3)]}
    measure.take_turns(calls, CpuClock(), "cold", Budget(0.0, least=6, most=6))
    assert called[-6:] == [0, 1, 2, 0, 1, 2]


def test_percentiles_are_in_order() -> None:
    timing = measure.take_turns({"a": [lambda: None]}, CpuClock(), "warm", TINY)["a"]
    assert timing.min_us <= timing.p10_us <= timing.median_us <= timing.p90_us
    assert timing.host_us is None


def test_peak_memory_of_a_call_is_seen() -> None:
    clock = CpuClock()
    assert clock.peak_bytes(lambda: torch.empty(1000)) == 4000
    assert clock.peak_bytes(lambda: None) == 0


# ---- a run ----


def test_a_tiny_run_from_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    groups = [
        Group("update", tiny, (peers.NATIVE, peers.FOREACH, peers.COPY), "warm", TINY),
        Group("update", tiny_mixed, (peers.NATIVE, peers.MULTI_FN), "cold", TINY),
        Group("host", tiny, (peers.NATIVE, peers.PLAIN), "cold", TINY),
    ]
    session = update.run(
        groups, tiny(), tiny(), CPU, copy_elements=1000, copy_budget=TINY, several_budget=TINY, swap_budget=TINY
    )
    found = figures.figures(session)
    update.print_figures(found)
    printed = capsys.readouterr().out
    assert printed.index("copy:") < printed.index("update:") < printed.index("swap:") < printed.index("figures")
    assert "not measured: AveragedModel, ema multi fn: RuntimeError" in printed
    assert {figure.reached for figure in found} == {None}  # none of these cases is one of the figures'

    whole = json.loads(update.to_json(session, measure.environment(CPU), found))
    assert {"date", "device", "cores", "threads", "load", "versions"} <= set(whole["environment"])
    records = whole["records"]
    assert records[0]["bench"] == "copy"
    assert {record["bench"] for record in records} == {"copy", "update", "host", "several", "swap"}
    for record in records:
        assert set(record) >= ISSUE_FIELDS
        assert record["launches"] is None
        assert record["versions"]["torch"] == torch.__version__
    ours = next(record for record in records if record["bench"] == "swap" and record["impl"] == peers.OURS)
    assert (ours["extra_bytes"], ours["bytes_floor"], ours["gbps"]) == (0, 0, None)
    assert whole["unavailable"][0]["impl"] == peers.MULTI_FN.name


def test_figures_say_reached_or_not() -> None:
    session = Session(CPU, CpuClock())
    timings = {peers.OURS: 10.0, peers.FOREACH.name: 9.0}
    for impl, median in timings.items():
        timing = measure.Timing(median, median, median, median, 1)
        session.record(("update", cases.one_large_tensor(), "cold"), impl, "torch", timing)
    figure = next(one for one in figures.figures(session) if "_foreach_lerp_" in one.figure)
    assert (figure.measured, figure.reached) == ("0.900 x", False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--seconds", "-1"], "--seconds must be positive, got -1"),
        (["--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        update.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_importing_the_benchmarks_starts_no_gpu() -> None:
    assert bench.__doc__
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize("module", [measure, table])
def test_examples_in_the_docstrings(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


def test_a_table_without_rich() -> None:
    lines = table.plain_table("Title", ["who", "us"], [["we", "9"], ["they", "1,000"]]).splitlines()
    assert lines == ["Title", "who      us", "-----------", "we        9", "they  1,000"]
