"""The stages of `make gpu-test` and its like, on a machine without a GPU: resumed, limited, and dry."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_binary, gpu_cases, gpu_results
from bench.gpu import Step

PYTHON = sys.executable


def step(name: str, code: str, seconds: float = 30, **arguments: Any) -> Step:
    return Step(name, [PYTHON, "-S", "-c", code], seconds, **arguments)


def outcome(results: Path, stage: str = "test") -> dict[str, bool]:
    return {name: done["passed"] for name, done in json.loads(results.read_text())[stage]["steps"].items()}


def test_a_stage_goes_on_where_it_was_cut_short(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results, marker = tmp_path / "chip.json", tmp_path / "marker"
    once = step("once", f"open({str(marker)!r}, 'a').write('x')")
    broken = step("broken", "raise SystemExit(3)")
    assert not gpu.run_stage("test", [once, broken], results, fresh=False)
    assert outcome(results) == {"once": True, "broken": False}
    assert gpu.run_stage("test", [once, step("broken", "print('mended')")], results, fresh=False)
    assert marker.read_text() == "x", "what passed is not run again"
    assert "mended" in capfd.readouterr().out
    assert gpu.run_stage("test", [once], results, fresh=True)
    assert marker.read_text() == "xx"


def test_other_sources_are_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, marker = tmp_path / "chip.json", tmp_path / "marker"
    once = step("once", f"open({str(marker)!r}, 'a').write('x')")
    assert gpu.run_stage("test", [once], results, fresh=False)
    monkeypatch.setattr(gpu, "sources_digest", lambda: "other")
    assert gpu.run_stage("test", [once], results, fresh=False)
    assert marker.read_text() == "xx"


def test_the_digest_changes_with_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "csrc").mkdir()
    kernel = tmp_path / "csrc/cuda_kernels.cu"
    kernel.write_text("one")
    monkeypatch.setattr(gpu_results, "ROOT", tmp_path)
    before = gpu_results.sources_digest()
    kernel.write_text("two")
    assert gpu_results.sources_digest() != before


def test_a_step_and_a_stage_have_limits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "chip.json"
    assert not gpu.run_stage("test", [step("slow", "import time; time.sleep(60)", 1)], results, fresh=False)
    assert outcome(results) == {"slow": False}
    assert not gpu.run_stage("test", [step("late", "")], results, fresh=False, seconds=1)
    assert "the time is up before late: run it again to go on" in capfd.readouterr().out
    assert "late" not in outcome(results)


def test_nothing_is_tested_that_was_not_built(tmp_path: Path) -> None:
    results = tmp_path / "chip.json"
    assert not gpu.run_stage("test", [step("build", "raise SystemExit(1)"), step("tests", "")], results, fresh=False)
    assert outcome(results) == {"build": False}


def test_stages_share_a_file(tmp_path: Path) -> None:
    results = tmp_path / "chip.json"
    gpu.run_stage("test", [step("a", "")], results, fresh=False)
    gpu.run_stage("sanitize", [step("planted fault", "raise SystemExit(9)", fails_with=9)], results, fresh=False)
    assert outcome(results) == {"a": True}
    assert outcome(results, "sanitize") == {"planted fault": True}


@pytest.mark.parametrize("stage", list(gpu.STAGES))
def test_every_stage_shows_what_it_would_run(stage: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main([stage, "--dry-run", "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    steps = gpu.STAGES[stage](tmp_path / "chip.json")
    assert all(f"{stage}: {one.name} (at most" in printed for one in steps)
    assert "missing here: " in printed
    assert not list(tmp_path.iterdir()), "nothing ran"


def test_the_tests_of_a_stage_exist() -> None:
    tests = [f"tests/{name}.py" for name in (*gpu.GPU_TESTS, *gpu.CORE_TESTS)]
    assert [name for name in tests if not (gpu.ROOT / name).is_file()] == []
    found = [path for path in gpu.ROOT.glob("tests/**/test_*.py") if path.parent.name != "accelerator"]
    marked = {path for path in found if _is_for_a_gpu(path)}
    assert gpu.ROOT / "tests/core/shadow/test_offload_gpu.py" in marked
    assert {str(path.relative_to(gpu.ROOT)) for path in marked} <= set(tests)


def _is_for_a_gpu(path: Path) -> bool:
    text = path.read_text()
    return "pytestmark" in text and "needs_gpu" in text.partition("def ")[0]


def test_memcheck_runs_without_the_caching_allocator(tmp_path: Path) -> None:
    steps = [one for one in gpu.sanitize_steps(tmp_path) if one.name != "build"]
    assert steps[0].fails_with == 9, "a fault that it must see comes first"
    assert all(one.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" for one in steps)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["test"])
    assert "torch sees no CUDA device; --dry-run shows what would run" in capsys.readouterr().err
    assert gpu.device_slug() == "no-gpu"


# ---- predictions and measurements ----


def test_predicted_bytes_are_those_of_the_dtypes() -> None:
    for one in gpu_cases.PREDICTIONS:
        live, shadow = one.live.itemsize, one.shadow.itemsize
        moved = 2 * (live + shadow) if one.name.startswith("exchange") else live + 2 * shadow * one.shadows
        assert one.bytes == moved, one.name
    first = gpu_cases.PREDICTIONS[0]
    assert first.floor_us(3000) == pytest.approx(4000)


def test_the_table_of_predictions_is_part_of_the_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["bench", "--dry-run"])
    printed = capsys.readouterr().out
    assert all(one.name in printed and one.why in printed for one in gpu_cases.PREDICTIONS)


def test_the_measurement_runs_on_a_cpu_and_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_cases, "PREDICTIONS", [gpu_cases.PREDICTIONS[index] for index in (1, 4, 5, 7)])
    results = tmp_path / "chip.json"
    arguments = ["--device", "cpu", "--scale", "1e-4", "--seconds", "0.01", "--results", str(results)]
    assert gpu_cases.main(arguments) == 0
    rows = json.loads(results.read_text())["bench"]["cases"]
    assert {row["case"] for row in rows} == {one.name for one in gpu_cases.PREDICTIONS}
    assert {row["impl"] for row in rows} == {"native", "_foreach_lerp_"}
    assert all(row["median_us"] > 0 and row["share"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "predicted" in printed and ">= 92 %" in printed
    monkeypatch.setattr(gpu_cases, "measure", lambda *_: pytest.fail("measured again"))
    assert gpu_cases.main(arguments) == 0
    assert json.loads(results.read_text())["bench"]["cases"] == rows


def test_launches_are_counted_after_all_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    row = {"impl": "native", "launches": None}
    monkeypatch.setattr(gpu_cases, "measure", lambda case, *_: calls.append("measure") or [{**row, "case": case.name}])
    monkeypatch.setattr(gpu_cases, "print_rows", lambda rows: None)
    monkeypatch.setattr(gpu_cases, "count_launches", lambda *_: calls.append("count"))
    gpu_cases.main(["--device", "cpu", "--scale", "1e-6"])
    assert calls == ["measure"] * len(gpu_cases.PREDICTIONS) + ["count"] * len(gpu_cases.PREDICTIONS)


def test_a_stage_keeps_what_its_command_wrote(tmp_path: Path) -> None:
    results = tmp_path / "chip.json"
    part = {"sources": gpu_results.sources_digest(), "cases": [{"case": "one"}], "steps": {}}
    code = f"from bench.gpu_results import *; write_part(Path({str(results)!r}), 'bench', {part!r})"
    command = Step("cases", [PYTHON, "-c", code], 60)
    assert gpu.run_stage("bench", [step("build", ""), command], results, fresh=False)
    assert outcome(results, "bench") == {"build": True, "cases": True}
    assert json.loads(results.read_text())["bench"]["cases"] == [{"case": "one"}]


# ---- the binary ----


def test_the_architectures_of_a_binary_are_read_from_cuobjdump(tmp_path: Path) -> None:
    fake = tmp_path / "cuobjdump"
    elf = "".join(f"ELF file    {i}: cuda_kernels.{i}.sm_{name}.cubin\\n" for i, name in enumerate((120, 75, 90), 1))
    fake.write_text(
        f'#!/bin/sh\n[ $1 = --list-elf ] && printf "{elf}" || echo "PTX file    1: cuda_kernels.1.sm_120.ptx"\n'
    )
    fake.chmod(0o755)
    assert gpu_binary.listed(str(fake), tmp_path) == (["sm_75", "sm_90", "sm_120"], ["sm_120"])


def test_gpu_binary_is_a_program() -> None:
    command = [PYTHON, str(gpu.ROOT / "bench/gpu_binary.py"), str(gpu.ROOT / "setup.py")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1, "no machine code in a text"
    assert "machine code for nothing" in result.stdout or "no cuobjdump" in result.stdout
