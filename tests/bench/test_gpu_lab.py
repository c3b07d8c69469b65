"""The laboratory without a GPU: its edits fit the sources of today, its programs compile, its table is right."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from bench import gpu_lab
from bench.gpu_lab import __main__ as lab

SOURCES = Path(gpu_lab.__file__).parents[2] / "csrc"


@pytest.mark.parametrize("variant", list(lab.VARIANTS))
def test_a_variant_is_the_kernel_of_today_with_its_edits(variant: str, tmp_path: Path) -> None:
    lab.edited(variant, tmp_path)
    changed = {path.name for path in tmp_path.iterdir() if path.read_text() != (SOURCES / path.name).read_text()}
    assert changed == {edit.file for edit in lab.VARIANTS[variant][0]}
    assert {"cuda_kernels.cu", "ema_math.h", "chunks.h"} <= {path.name for path in tmp_path.iterdir()}


def test_four_blocks_keep_the_pairs_that_the_laboratory_times(tmp_path: Path) -> None:
    lab.edited("four_blocks", tmp_path)
    kept = re.findall(r"case kPair<(.*)>:", (tmp_path / "cuda_kernels.cu").read_text())
    assert set(kept) == {"float, float", "float, BFloat16", "BFloat16, BFloat16", "Planes, BFloat16"}


def test_an_edit_that_no_longer_fits_is_no_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit = lab.Edit("chunks.h", "no such line", "")
    monkeypatch.setitem(lab.VARIANTS, "base", ((edit,), ""))
    with pytest.raises(ValueError, match=r"base: 'no such line' is 0 times in csrc/chunks\.h, not 1"):
        lab.edited("base", tmp_path)


def test_the_table_has_every_variant_beside_the_plan_and_the_copy() -> None:
    base = "f32 1 B\tplan\t100\t95\t90\t88\nf32 1 B\tpersistent\t80\t95\t100\t88\nsome note\n"
    again = base.replace("\t100\t95\t90", "\t98\t95\t90")
    runs = [
        lab.parse("base", text) + lab.parse("four_blocks", "f32 1 B\tplan\t50\t95\t45\t88") for text in (base, again)
    ]
    _, plan, persistent, blocks = (re.split(r" {2,}", line.replace(" %", "%  ").strip()) for line in lab.table(runs))
    assert plan == ["f32 1 B", "plan", "100.0", "95.0%", "+0.0%", "+0.0%", "+2.0%", "+0.0%"], "its spread"
    assert persistent[2:6] == ["80.0", "118.8%", "+25.0%", "-10.0%"]
    assert blocks[1:6] == ["four_blocks", "50.0", "190.0%", "+100.0%", "+100.0%"]
    assert lab.table([[], []])[1:] == []


def test_without_a_compiler_or_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lab.shutil, "which", lambda tool: None)
    assert lab.main([]) == 1 and "there is no nvcc on PATH" in capsys.readouterr().out
    monkeypatch.setattr(lab.shutil, "which", lambda tool: tool if tool == "nvcc" else None)
    assert lab.main(["--counters"]) == 1 and "there is no ncu on PATH" in capsys.readouterr().out
    monkeypatch.setattr(lab, "WORK", tmp_path)
    program = tmp_path / "base/lab"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf 'f32\\tplan\\t1\\t1\\t1\\t1\\nWRONG: 3 values of f32, plan\\n'; exit 1\n")
    program.chmod(0o755)
    runs, right = lab.run(["base"], "1")
    assert not right and [len(rows) for rows in runs] == [1, 1]
    assert "WRONG: 3 values of f32, plan" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH: the laboratory is not compiled")
def test_every_program_compiles_and_fits_its_registers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lab, "WORK", tmp_path)
    assert lab.build(list(lab.VARIANTS), "sm_90")
    printed = capsys.readouterr().out
    assert "four_blocks: at most 64 registers" in printed and "base: at most 80 registers, 0 bytes spilled" in printed
