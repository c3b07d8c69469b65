"""Files of records, fitted lines, comparisons, tables and plots, on made-up records."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from bench import busy, compare, report, scale
from bench.contenders import libraries, peers
from bench.contenders.peers import FOREACH, OURS
from bench.harness import cases, growth, records
from bench.harness.cases import Case
from bench.harness.contender import COPY, LIMIT
from bench.harness.meters import CpuMeter
from bench.harness.records import Cache, InstructionCount, Run, Timing
from bench.harness.session import Session
from bench.pages import losses, tables

RESNET = cases.resnet50()
ROOT = Path(__file__).parent.parent.parent


def new_run(device: str = "a processor") -> Session:
    environment = {"device": device, "threads": 2, "date": "2026-01-02T03:04:05", "versions": {"torch": "2"}}
    return Session(torch.device("cpu"), CpuMeter(), run=Run(environment))


def add(
    session: Session, median: float, impl: str = OURS.name, case: Case = RESNET, bench: str = "update", **more: object
) -> None:
    cache: Cache = more.pop("cache", "cold")  # type: ignore[assignment]
    spread = float(more.pop("spread", 0.02))  # type: ignore[arg-type]
    timing = Timing(median, median * (1 - spread), median * (1 + spread), median * (1 - spread), 20)
    session.record(bench, case, impl, "torch", timing, cache, **more)  # type: ignore[arg-type]


def committed() -> list[Path]:
    """The run that README's tables are made from."""
    return sorted((ROOT / "bench/results").glob("cpu-*.json"))


# ---- files ----


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    session = new_run()
    add(session, 10.0)
    session.count("update, 1,000 x 256", "fastema", "native", 1000)
    session.miss("update", "tiny", "nobody", "not installed")
    session.run.seconds["update"] = 1.5
    records.save(session.run, tmp_path / "run.json")
    assert records.load([tmp_path / "run.json"]) == session.run
    whole = json.loads((tmp_path / "run.json").read_text())
    assert whole["records"][0]["median_us"] == 10.0
    lines = (tmp_path / "run.json").read_text().splitlines()
    assert sum('"bench": "update"' in line and '"median_us"' in line for line in lines) == 1


def test_files_of_one_machine_are_joined_and_the_later_counts(tmp_path: Path) -> None:
    first, second, other = new_run(), new_run(), new_run("another processor")
    add(first, 10.0)
    add(first, 20.0, FOREACH.name)
    add(second, 11.0)
    for name, session in {"first": first, "second": second, "other": other}.items():
        records.save(session.run, tmp_path / f"{name}.json")
    run = records.load([tmp_path / "first.json", tmp_path / "second.json"])
    assert (run.median("update", RESNET.name, OURS.name), len(run.records)) == (11.0, 2)
    with pytest.raises(ValueError, match="one machine at a time"):
        records.load([tmp_path / "first.json", tmp_path / "other.json"])


def test_what_is_no_file_of_records_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text("[]")
    with pytest.raises(ValueError, match=r"odd\.json is no file that a benchmark wrote"):
        records.load([tmp_path / "odd.json"])


# ---- lines ----


def test_a_line_is_found_under_relative_noise() -> None:
    points = [(x, (5.0 + 0.25 * x) * (1.01 if index % 2 else 0.99)) for index, x in enumerate([1, 10, 100, 1000, 1e4])]
    found = growth.line(points)
    assert found.fixed == pytest.approx(5.0, rel=0.05)
    assert found.slope == pytest.approx(0.25, rel=0.03)
    assert 0 < found.worst < 0.03


def test_no_part_of_a_line_is_negative() -> None:
    falling = growth.line([(1, 10.0), (2, 5.0), (3, 4.0)])
    assert falling.slope == 0 and 4 < falling.fixed < 6
    steep = growth.line([(1, 1.0), (2, 4.0), (3, 7.0)])
    assert steep.fixed == 0 and steep.slope > 1


@pytest.mark.parametrize("points", [[(1, 2.0)], [(1, 2.0), (1, 3.0)], [(1, 0.0), (2, 1.0)]])
def test_what_makes_no_line_is_refused(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="a line needs"):
        growth.line(points)


def test_where_an_implementation_bends() -> None:
    session = new_run()
    for bench, rungs in scale.ladders(quick=False).items():
        for tensors, elements in rungs:
            case = cases.ladder(tensors, elements)
            add(session, 3.0 + 0.5 * tensors + 0.0002 * case.params, FOREACH.name, case, bench)
    (found,) = growth.growth(session.run.records)
    assert found.us_per_tensor == pytest.approx(0.5 + 16 * 0.0002, rel=1e-3)
    assert found.ns_per_parameter == pytest.approx(0.2, rel=1e-3)
    assert found.bend == pytest.approx(2516, rel=1e-3)


# ---- comparisons ----


def verdicts(old: Session, new: Session) -> dict[str, str]:
    return {change.what.split(",")[1].strip(): change.verdict for change in compare.compare(old.run, new.run)}


def test_slower_beyond_noise_is_told_from_noise() -> None:
    old, new = new_run(), new_run()
    for session, factor in ((old, 1.0), (new, 1.2)):
        add(session, 100.0 * factor, "fastema")
        add(session, 100.0 * (1 + (factor - 1) / 10), "fastema A")  # 2 %
        add(session, 100.0 * factor, "fastema B", spread=0.5)
        add(session, 100.0 / factor, "fastema C")
        add(session, 500.0, FOREACH.name)
    assert verdicts(old, new) == {"fastema": "slower", "fastema A": "", "fastema B": "", "fastema C": "faster"}


def test_a_slower_machine_is_not_a_slower_kernel() -> None:
    old, new = new_run(), new_run()
    for session, factor in ((old, 1.0), (new, 1.6)):
        add(session, 100.0 * factor, "fastema")
        add(session, 300.0 * factor, FOREACH.name)
    assert verdicts(old, new) == {"fastema": ""}


def test_what_the_peers_disagree_by_is_noise() -> None:
    old, new = new_run(), new_run()
    for session, factor in ((old, 1.0), (new, 1.2)):
        add(session, 100.0 * factor, "fastema")
        add(session, 300.0, FOREACH.name)
        add(session, 300.0, libraries.TIMM.name)
        add(session, 300.0 * factor**2, libraries.TORCH_EMA.name)
    assert verdicts(old, new) == {"fastema": ""}


def test_what_takes_less_time_than_before_is_not_slower() -> None:
    old, new = new_run(), new_run()
    for session, ours, theirs in ((old, 100.0, 300.0), (new, 80.0, 150.0)):
        add(session, ours, "fastema")
        add(session, theirs, FOREACH.name)
    assert verdicts(old, new) == {"fastema": ""}


def test_counts_are_compared_exactly() -> None:
    old, new = new_run(), new_run()
    old.run.instructions.append(InstructionCount("update", "fastema", "native", 1000, {}))
    new.run.instructions.append(InstructionCount("update", "fastema", "native", 1021, {}))
    (change,) = compare.compare(old.run, new.run)
    assert change.verdict == "slower"


def test_the_exit_status_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast, slow, elsewhere = new_run(), new_run(), new_run("another processor")
    add(fast, 100.0)
    add(slow, 150.0)
    add(elsewhere, 100.0)
    files = {}
    for name, session in {"fast": fast, "slow": slow, "elsewhere": elsewhere}.items():
        files[name] = str(tmp_path / f"{name}.json")
        records.save(session.run, Path(files[name]))
    assert compare.main([files["fast"], files["slow"]]) == 1
    assert "1 slower, 0 faster, 0 within noise" in capsys.readouterr().out
    assert compare.main([files["slow"], files["fast"]]) == 0
    assert compare.main([files["fast"], files["elsewhere"]]) == 2
    assert "times cannot be compared" in capsys.readouterr().err


# ---- where ours is not ahead ----


def full_run() -> Session:
    """Made-up figures of everything that tables and plots show."""
    session = new_run()
    everybody = (OURS, LIMIT, COPY, FOREACH, *libraries.LIBRARIES, *libraries.REPLACING)
    for case in (cases.small_tensors(), RESNET, cases.vit_b(), cases.mixed_list(), cases.vit_h()):
        for index, peer in enumerate(everybody):
            for cache in ("warm", "cold"):
                add(session, 100.0 + 10 * index, peer.name, case, cache=cache)
    for processes in busy.LOADS:
        timing = Timing(100.0, 90.0, 110.0, 90.0, 20, mean_us=120.0, p95_us=300.0)
        for name in (OURS.name, busy.ONE_THREAD):
            session.record(busy.bench_name(processes), RESNET, name, "native", timing, "warm")
    for count in (1, 4):
        add(session, 100.0 * count, peers.TOGETHER, bench="several", shadows=count)
        add(session, 150.0 * count, peers.APART, bench="several", shadows=count)
    for index, peer in enumerate((OURS, peers.OURS_IN_PLACE, *libraries.SWAPPING, *peers.SWAPS_BY_HAND)):
        for cache in ("warm", "cold"):
            add(session, 10.0 ** (1 + 2 * min(index, 2)), peer.name, bench="swap", cache=cache, extra_bytes=index)
        session.record("memory: update", RESNET, peer.name, "torch", extra_bytes=index)
        session.record("memory: validation", RESNET, peer.name, "torch", extra_bytes=index)
    for index, peer in enumerate((OURS, FOREACH)):
        for bench, rungs in scale.ladders(quick=True).items():
            for tensors, elements in rungs:
                case = cases.ladder(tensors, elements)
                add(session, 3 + (1 + index) * tensors + case.params / 1e4, peer.name, case, bench)
    add(session, 900.0, "the training step itself", bench="train_step")
    add(session, 100.0, bench="train_step")
    add(session, 1.0, bench="train_step: swap")
    add(session, 1.0, bench="validation")
    session.count("update, 1,000 x 256", OURS.name, "native", 812_345)
    session.miss("update", "tiny", "nobody", "not installed")
    return session


def test_who_is_ahead_or_level_is_found_and_who_is_not_is_not() -> None:
    session = new_run()
    for median, impl in ((100.0, OURS.name), (95.0, FOREACH.name), (102.0, libraries.TIMM.name), (110.0, "slower")):
        add(session, median, impl, bytes_floor=RESNET.update_bytes)
    add(session, 50.0, COPY.name)  # no average
    found = {loss.theirs.impl: loss for loss in losses.losses(session.run)}
    assert list(found) == [FOREACH.name, libraries.TIMM.name]
    assert not found[FOREACH.name].level and found[libraries.TIMM.name].level
    (row,) = losses.loss_rows(list(found.values()))
    assert row[1:] == ["100 us", "torch._foreach_lerp_ 95.0 us, timm ModelEmaV3 102 us"]


def test_what_takes_the_place_of_a_package_is_compared_with_it() -> None:
    session = new_run()
    add(session, 100.0)
    add(session, 200.0, libraries.OUR_TIMM.name)
    add(session, 150.0, libraries.TIMM.name)
    (loss,) = losses.losses(session.run)
    assert (loss.ours.impl, loss.theirs.impl) == (libraries.OUR_TIMM.name, libraries.TIMM.name)


# ---- the page ----

PAGE = "before\n<!-- bench:begin update -->\nold\n<!-- bench:end -->\nafter\n"


def test_marked_tables_are_renewed_and_nothing_else() -> None:
    page = tables.filled(PAGE, full_run().run)
    assert page.startswith(
        "before\n<!-- bench:begin update -->\n| update, median | 1,000 x 256 | ResNet-50 | ViT-B/16 |\n"
    )
    assert "| fastema | **100 us** | **100 us** | **100 us** |" in page
    assert page.endswith("\n<!-- bench:end -->\nafter\n")
    assert "old" not in page
    assert tables.filled(page, full_run().run) == page


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_can_be_made(name: str) -> None:
    made = tables.TABLES[name](full_run().run)
    assert made
    if made.startswith("|"):
        widths = {line.count("|") for line in made.splitlines()}
        assert len(widths) == 1 and len(made.splitlines()) > 2


def test_tables_of_an_empty_run_are_no_error() -> None:
    for make in tables.TABLES.values():
        make(new_run().run)


def test_a_page_with_odd_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no such table"):
        tables.filled(PAGE.replace("update", "nothing"), full_run().run)
    with pytest.raises(ValueError, match="without its"):
        tables.filled("<!-- bench:begin update -->\n", full_run().run)


def test_a_page_is_checked_and_renewed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = tmp_path / "run.json", tmp_path / "README.md"
    records.save(full_run().run, file)
    page.write_text(PAGE)
    assert report.main([str(file), "--readme", str(page), "--check"]) == 1
    assert page.read_text() == PAGE
    assert report.main([str(file), "--readme", str(page)]) == 0
    assert report.main([str(file), "--readme", str(page), "--check"]) == 0
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert report.main([str(file)]) == 0
    assert "### losses" in capsys.readouterr().out


def test_every_page_says_what_the_committed_records_say() -> None:
    shown: set[str] = set()
    for name in ("README.md", "docs/numbers.md", "bench/results/README.md"):
        page = (ROOT / name).read_text()
        shown.update(re.findall("<!-- bench:begin (.*) -->", page))
        assert tables.filled(page, records.load(committed())) == page
    assert shown == set(tables.TABLES), "a table that no page shows"


def test_plots_are_small_and_the_same_for_the_same_records(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.pages.plots import draw

    written = draw(full_run().run, tmp_path)
    assert [path.name for path in written] == ["front.svg", "update.svg", "scale.svg", "train_step.svg"]
    first = [path.read_bytes() for path in written]
    assert all(len(content) < 100_000 for content in first)
    assert b"torch._foreach_lerp_" in first[1] and b"ns a parameter" in first[2]
    assert [path.read_bytes() for path in draw(full_run().run, tmp_path)] == first
    assert draw(new_run().run, tmp_path) == []


def test_a_record_without_a_time_is_in_no_comparison() -> None:
    session = new_run()
    session.record("memory: update", RESNET, OURS.name, "torch", extra_bytes=0)
    with pytest.raises(ValueError, match="no figure of ours in common"):
        compare.compare(session.run, session.run)
    assert dataclasses.replace(session.run.records[0], median_us=1.0).key == session.run.records[0].key
