"""The calls for a machine with a GPU, on one without: resumed, limited, honest about what did not run, and dry."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu import binary, blocks, cases, outcomes, peers, rehearse, results, runner, steps, usable
from bench.gpu.runner import Runner, Step
from bench.harness import records
from bench.harness.cases import mixed_list, small_tensors
from bench.harness.meters import CpuMeter
from bench.harness.records import Run, Timing
from bench.harness.session import Session

PYTHON = sys.executable


@pytest.fixture(autouse=True)
def one_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "sources_digest", lambda parts: "these")


def step(name: str, code: str, seconds: float = 30, **arguments: Any) -> Step:
    return Step(name, [PYTHON, "-S", "-c", code], seconds, **arguments)


def outcome(folder: Path) -> dict[str, str]:
    return {name: done["outcome"] for name, done in json.loads((folder / "results.json").read_text())["steps"].items()}


def packed(folder: Path) -> str:
    return gzip.decompress((folder / "logs.txt.gz").read_bytes()).decode()


# ---- a call ----


def test_a_call_goes_on_where_it_was_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "marker"
    once = step("once", f"open({str(marker)!r}, 'a').write('x')")
    always = step("always", f"open({str(marker)!r}, 'a').write('y')", again=True)
    assert not Runner(tmp_path).run([once, always, step("broken", "print('why'); raise SystemExit(3)")])
    assert outcome(tmp_path) == {"once": "passed", "always": "passed", "broken": "failed"}
    assert "failed in" in (reply := capsys.readouterr().out) and "   why" in reply
    assert Runner(tmp_path).run([once, always, step("broken", "print('mended')")])
    assert marker.read_text() == "xyy", "what passed is not run again"
    assert "mended" not in capsys.readouterr().out, "the reply is short"
    assert "why" in packed(tmp_path) and "mended" in packed(tmp_path)


def test_other_sources_are_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "marker"
    once = step("once", f"open({str(marker)!r}, 'a').write('x')", writes="cases.json")
    assert Runner(tmp_path).run([once])
    (tmp_path / "cases.json").write_text("of these sources")
    assert Runner(tmp_path).run([once]) and (tmp_path / "cases.json").is_file()
    monkeypatch.setattr(runner, "sources_digest", lambda parts: "other")
    assert Runner(tmp_path).run([once])
    assert marker.read_text() == "xx" and not (tmp_path / "cases.json").is_file()


def test_a_step_and_a_call_have_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not Runner(tmp_path).run([step("slow", "print('so far', flush=True); import time; time.sleep(60)", 1)])
    assert outcome(tmp_path) == {"slow": "cut"} and "so far" in packed(tmp_path)
    assert not Runner(tmp_path, seconds=1).run([step("late", "")])
    assert "the time is up: run the same command again to go on" in capsys.readouterr().out
    assert "late" not in outcome(tmp_path)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
def test_a_cut_in_the_middle_of_a_step_loses_nothing(tmp_path: Path, how: signal.Signals) -> None:
    slow = "print('half a result', flush=True); import time; time.sleep(3)"
    code = (
        "import signal, sys; from pathlib import Path; from bench.gpu.runner import *; "
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); folder = Path(sys.argv[1]); "
        f"Runner(folder).run([Step('first', ['true'], 9), Step('slow', [sys.executable, '-c', {slow!r}], 30)])"
    )
    process = subprocess.Popen([PYTHON, "-c", code, str(tmp_path)], cwd=results.ROOT, stdout=subprocess.DEVNULL)
    running = tmp_path / "running.log"
    deadline = time.monotonic() + 60
    while not (running.is_file() and "half" in running.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(how)
    process.wait()
    assert outcome(tmp_path) == {"first": "passed", "slow": "begun"}
    assert "half a result" in running.read_text()
    assert Runner(tmp_path).run([step("slow", "")])
    assert "what was cut" in packed(tmp_path) and "half a result" in packed(tmp_path)
    assert not running.is_file()


def test_nothing_is_tested_that_was_not_built_or_is_not_usable(tmp_path: Path) -> None:
    broken = step("build", "raise SystemExit(1)", stops=True)
    assert not Runner(tmp_path).run([broken, step("tests", "")])
    assert outcome(tmp_path) == {"build": "failed"}
    prepared = {one.name: one for one in steps.steps_of("first", tmp_path)[:3]}
    assert all(prepared[name].stops and prepared[name].again for name in ("build", "usable"))
    assert prepared["build"].command[-2:] == ["-e", "."], "an install: a build in place has no fastema.triton_kernels"


def test_a_tool_that_is_missing_is_said_and_only_an_optional_step_may_fail(tmp_path: Path) -> None:
    assert not Runner(tmp_path).run([Step("planted", ["no-such-sanitizer"], 9)])
    assert outcome(tmp_path) == {"planted": "not run"}
    assert Runner(tmp_path).run([Step("extra", ["false"], 9, optional=True), step("needed", "")])


def test_a_planted_fault_is_recognised_by_what_the_tool_prints(tmp_path: Path) -> None:
    seen = "print('Invalid __global__ read of size 16'); raise SystemExit(1)"
    planted = {"sees": "Invalid __global__ read", "any_status": True}
    assert Runner(tmp_path).run([step("planted", seen, **planted)])
    assert not Runner(tmp_path).run([step("planted 2", "print('ERROR SUMMARY: 0 errors')", **planted)])


def test_the_reply_fits_whatever_the_commands_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loud = [step(f"loud {number}", "print('x' * 70000); raise SystemExit(1)") for number in range(14)]
    assert not Runner(tmp_path).run(loud)
    assert len(capsys.readouterr().out) < rehearse.REPLY


def test_results_that_a_cut_or_another_program_spoiled_are_no_results(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"steps": {"once": {"outc')
    assert Runner(tmp_path).run([step("once", "")])
    assert outcome(tmp_path) == {"once": "passed"}


# ---- tests ----


def planted(folder: Path, text: str, name: str = "tests: planted") -> Step:
    """A step as steps.py has them, on a file of tests of its own."""
    path = folder / "test_planted.py"
    path.write_text("import os, pytest\n" + text)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    command = [PYTHON, "-m", "pytest", "-q", "-m", "gpu", "-p", "bench.gpu.outcomes", "-c", str(folder / "pytest.ini")]
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return Step(name, [*command, "--rootdir", str(folder), str(path)], 60, environment=environment, tests=True)


SKIPPED = (
    '@pytest.mark.gpu\n@pytest.mark.skip(reason="{}")\n@pytest.mark.parametrize("i", [1, 2])\ndef test_s(i): pass\n'
)
PASSES = "@pytest.mark.gpu\ndef test_passes(): pass\n"


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        (SKIPPED.format("Triton cannot be imported"), "no test passed (2 skipped: Triton cannot be imported)"),
        ("def test_of_something_else(): pass\n", "no test passed (none ran)"),
        (PASSES + SKIPPED.format("triton is not usable"), "a reason that is not expected: triton is not usable"),
        (PASSES + "@pytest.mark.gpu\ndef test_fails(): assert 0\n", "1 passed, 1 failed"),
        (PASSES + "raise ImportError('cannot be collected')\n", "no test passed (none ran)"),
        (PASSES + "@pytest.mark.gpu\ndef test_crashes(): os._exit(7)\n", "1 passed, 1 cut"),
    ],
)
def test_a_step_of_tests_fails_unless_what_it_is_for_has_passed(
    text: str, reply: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not Runner(tmp_path).run([planted(tmp_path, text)])
    assert reply in capsys.readouterr().out


def test_a_skip_for_want_of_a_second_gpu_is_expected(tmp_path: Path) -> None:
    assert Runner(tmp_path).run([planted(tmp_path, PASSES + SKIPPED.format("one GPU"))])


def test_tests_that_were_cut_go_on_inside_the_file(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    body = f"open({str(ran)!r}, 'a').write('{{}} ')"
    text = "".join(f"@pytest.mark.gpu\ndef test_{n}(): {body.format(n)}\n" for n in "abc")
    assert not Runner(tmp_path).run(
        [planted(tmp_path, text.replace("test_b():", "test_b(): os.kill(os.getpid(), 9);"))]
    )
    assert outcome(tmp_path) == {"tests: planted": "failed"} and ran.read_text() == "a "
    assert Runner(tmp_path).run([planted(tmp_path, text)])
    assert ran.read_text() == "a c b ", "what passed is not run again, and what hung runs last"
    lines = outcomes.outcomes(tmp_path / "tests.jsonl", "tests: planted these")
    assert outcomes.count(lines.values()) == {"passed": 3}
    assert Runner(tmp_path).run([planted(tmp_path, text)])


def test_a_line_that_a_cut_left_unfinished_is_no_outcome(tmp_path: Path) -> None:
    path = tmp_path / "tests.jsonl"
    path.write_text('{"test": "a", "outcome": "passed", "of": "x"}\n{"test": "b", "outc')
    assert list(outcomes.outcomes(path, "x")) == ["a"]


# ---- what the sources are ----


def test_the_digest_is_of_sources_and_not_of_what_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for name in ("csrc/cuda_kernels.cu", "fastema/ema.py", "tests/build/made.cpp", "setup.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    before = results.sources_digest()
    for name in ("fastema/_C.cpython-312-x86_64-linux-gnu.so", "fastema/_build_record.json", "tests/build/made.cpp"):
        (tmp_path / name).write_text("built")
    assert results.sources_digest() == before
    seen = {before}
    for name in ("csrc/cuda_kernels.cu", "fastema/ema.py", "setup.py"):
        (tmp_path / name).write_text("two")
        seen.add(results.sources_digest())
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert len(seen | {results.sources_digest()}) == 5


# ---- the command line ----


@pytest.mark.parametrize("call", list(steps.CALLS))
def test_every_call_shows_what_it_would_run(call: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main([call, "--dry-run", "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    found = steps.steps_of(call, tmp_path)
    assert all(f"{one.name} (at most" in printed for one in found)
    assert "missing here: " in printed and str(tmp_path) in printed
    assert not list(tmp_path.iterdir()), "nothing ran"
    assert len({one.name for one in found}) == len(found)


def test_the_rehearsal_knows_every_step_of_the_calls(tmp_path: Path) -> None:
    all_steps = {one.name for one in steps.steps_of("all", tmp_path)}
    for call in steps.NEEDS_GPU:
        assert {one.name for one in steps.steps_of(call, tmp_path)} <= all_steps, call
    assert all(any(name.startswith(begin) for begin in rehearse.EXPECTED) for name in all_steps)


def test_a_folder_that_cannot_be_written_to_is_said_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        gpu.main(["first", "--without-gpu", "--results", str(tmp_path / "file/folder")])
    assert ended.value.code == 2
    assert f"nothing can be written to {tmp_path}/file/folder" in capsys.readouterr().err


def test_fresh_forgets_what_was_done_and_nothing_else(tmp_path: Path) -> None:
    for name in (*results.FILES, "mine.txt"):
        (tmp_path / name).write_text("{}")
    gpu._make_writable(tmp_path, fresh=False)
    assert len(list(tmp_path.iterdir())) == len(results.FILES) + 1 <= rehearse.FILES_AT_MOST
    gpu._make_writable(tmp_path, fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["test"])
    assert "torch sees no CUDA device; --dry-run shows what would run" in capsys.readouterr().err
    assert results.device_name() == "no GPU"


# ---- the steps ----


def test_the_tests_of_a_step_exist() -> None:
    tests = [f"tests/{name}.py" for name in (*steps.GPU_TESTS, *steps.CORE_TESTS)]
    assert [name for name in tests if not (results.ROOT / name).is_file()] == []
    found = [
        path for path in results.ROOT.glob("tests/**/test_*.py") if path.parent.name not in ("accelerator", "bench")
    ]
    marked = {path for path in found if "needs_gpu" in (text := path.read_text()) or "mark.gpu" in text}
    assert results.ROOT / "tests/core/shadow/test_offload_gpu.py" in marked
    assert {str(path.relative_to(results.ROOT)) for path in marked} <= set(tests)


def test_memcheck_runs_without_the_caching_allocator(tmp_path: Path) -> None:
    found = steps.steps_of("sanitize", tmp_path)[3:]
    assert found[0].sees == "Invalid __global__ read", "a fault that it must see comes first"
    assert all(one.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" for one in found)
    assert all(one.tests and one.sees == "ERROR SUMMARY: 0 errors" for one in found[1:])
    assert [one.name for one in found if one.optional] == ["initcheck native"]


def test_usable_says_which_backend_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fastema.backends import native, triton

    for backend in (native, triton):
        monkeypatch.setattr(backend, "why_unusable", lambda kind: None if kind == "cpu" else "not here")
    assert usable.main(["--device", "cpu"]) == 0
    assert "usable on cpu: native, triton" in capsys.readouterr().out
    monkeypatch.setattr(triton, "why_unusable", lambda kind: "Triton cannot be imported (no triton_kernels)")
    assert usable.main(["--device", "cpu"]) == 1
    assert "unusable on cpu: triton: Triton cannot be imported" in capsys.readouterr().out
    monkeypatch.setattr(usable, "ROOT", Path("/elsewhere"))
    assert "not from /elsewhere" in usable.complaints(torch.device("cpu"))[0]


def test_the_blocks_of_a_page_run_in_order_where_there_is_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "docs/page.md"
    page.parent.mkdir()
    (tmp_path / "README.md").write_text("```python\nraise SystemExit\n```\n")
    page.write_text(
        '<!-- invisible-code-block: python\na = ["cuda"]\n-->\n\n- item:\n\n  ```python\n  b = a * 2\n  ```\n'
    )
    monkeypatch.setattr(blocks, "ROOT", tmp_path)
    assert blocks.main() == 1, "a page that was only compiled has shown nothing"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert blocks.pages() == [page]
    assert blocks.main() == 0
    assert "docs/page.md: 1 blocks for a GPU ran, 0 left out" in capsys.readouterr().out
    page.write_text('```python\nraise ValueError("cuda")\n```\n')
    assert blocks.main() == 1
    assert "docs/page.md: FAILED" in (printed := capsys.readouterr().out) and "ValueError: cuda" in printed


# ---- the rehearsal: its faults are seen ----


def rehearsed(folder: Path, **changed: str) -> list[str]:
    """What the rehearsal says of a call whose steps came to what they must, but for `changed`."""
    right = {name: wanted.replace("\\", "").partition("|")[0] for name, wanted in rehearse.EXPECTED.items()}
    right |= {"tests": "failed: no test passed (150 skipped: no CUDA device)"} | changed
    found = {name: dict(zip(("outcome", "why"), text.split(": ", 1), strict=True)) for name, text in right.items()}
    results.write(folder / "results.json", {"steps": found})
    return rehearse.unexpected("all", 1, "short", folder)


def test_a_step_that_would_lie_fails_the_rehearsal(tmp_path: Path) -> None:
    assert rehearsed(tmp_path) == []
    for name, lie in {
        "tests": "passed: ",
        "docs": "passed: ",
        "usable": "failed: status 1",
        "memcheck": "passed: ",
        "cases": "cut: it took too long",
        "peers": "failed: status 2",
    }.items():
        assert [name in line for line in rehearsed(tmp_path, **{name: lie})] == [True], name
    skipped = "failed: no test passed (150 skipped: Triton cannot be imported)"
    assert len(rehearsed(tmp_path, tests=skipped)) == 1, "skipped, but not for want of a GPU"
    assert "of a step that nobody expects" and len(rehearsed(tmp_path, unknown="passed: ")) == 1
    rehearsed(tmp_path)
    assert len(rehearse.unexpected("all", 0, "x" * 20_000, tmp_path)) == 2
    (tmp_path / "core.1234").write_text("")
    assert "core.1234" in rehearse.unexpected("all", 1, "", tmp_path)[0]
    assert rehearse.unexpected_tests(tmp_path) == [
        f"0 tests skipped for want of a GPU, of {rehearse.LEAST_TESTS} or more"
    ]


# ---- predictions and measurements ----


def test_predicted_bytes_are_those_of_the_dtypes() -> None:
    for one in cases.PREDICTIONS:
        live, shadow = one.live.itemsize, one.shadow.itemsize
        moved = 2 * (live + shadow) if one.name.startswith("exchange") else live + 2 * shadow * one.shadows
        assert one.bytes == moved, one.name
    assert cases.PREDICTIONS[2].floor_us(3000) == pytest.approx(4000)


def test_the_measurement_runs_on_a_cpu_beside_its_predictions_and_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "PREDICTIONS", [cases.PREDICTIONS[index] for index in (0, 6, 7, 8, 10)])
    file = tmp_path / "cases.json"
    arguments = ["--device", "cpu", "--scale", "1e-4", "--seconds", "0.01", "--results", str(file)]
    assert cases.main(arguments) == 0
    rows = json.loads(file.read_text())["cases"]
    assert {row["case"] for row in rows} == {one.name for one in cases.PREDICTIONS}
    assert {row["impl"] for row in rows} == {"native", "_foreach_lerp_"}
    assert all(row["median_us"] > 0 and row["share"] > 0 and row["triad_gbps"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "predicted" in printed and "94 to 98 %" in printed and "triad" in printed
    monkeypatch.setattr(cases, "measure", lambda *_: pytest.fail("measured again"))
    assert cases.main(arguments) == 0
    assert json.loads(file.read_text())["cases"] == rows


def test_launches_are_counted_after_all_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    row = {"impl": "native", "launches": None}
    monkeypatch.setattr(cases, "measure", lambda case, *_: calls.append("measure") or [{**row, "case": case.name}])
    monkeypatch.setattr(cases, "print_rows", lambda rows: None)
    monkeypatch.setattr(cases, "count_launches", lambda *_: calls.append("count"))
    cases.main(["--device", "cpu", "--scale", "1e-6"])
    assert calls == ["measure"] * len(cases.PREDICTIONS) + ["count"] * len(cases.PREDICTIONS)


def test_the_peers_stand_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "peers.json"
    run = Run({"device": "a GPU"})
    one = Session(torch.device("cpu"), CpuMeter(), run=run)
    for case, host in ((small_tensors(), 9.5), (mixed_list(), 12.0)):
        for name in ("fastema", "AveragedModel"):
            timing = Timing(20.0, 19.0, 21.0, 18.0, 5, host_us=host)
            one.record("update", case, name, "native", timing, "cold", launches=1)
    records.save(run, file)
    assert peers.main([str(file)]) == 0
    printed = capsys.readouterr().out
    assert [printed.count(words) for words in ("device time", "host time", "launches")] == [1, 1, 1]
    assert [len(line.split()) for line in printed.splitlines() if line.startswith("AveragedModel")] == [3, 3, 3]
    records.save(Run({}), file)
    assert peers.main([str(file)]) == 1 and "no update was measured" in capsys.readouterr().out


# ---- the binary ----


def test_the_architectures_of_a_binary_are_read_from_cuobjdump(tmp_path: Path) -> None:
    fake = tmp_path / "cuobjdump"
    elf = "".join(f"ELF file    {i}: cuda_kernels.{i}.sm_{name}.cubin\\n" for i, name in enumerate((120, 75, 90), 1))
    fake.write_text(
        f'#!/bin/sh\n[ $1 = --list-elf ] && printf "{elf}" || echo "PTX file    1: cuda_kernels.1.sm_120.ptx"\n'
    )
    fake.chmod(0o755)
    assert binary.listed(str(fake), tmp_path) == (["sm_75", "sm_90", "sm_120"], ["sm_120"])


def test_binary_is_a_program() -> None:
    command = [PYTHON, str(results.ROOT / "bench/gpu/binary.py"), str(results.ROOT / "setup.py")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1, "no machine code in a text"
    assert "machine code for nothing" in result.stdout or "no cuobjdump" in result.stdout
