"""`python -m bench.gpu_lab [--scale X] [--build-only] [--counters] [--only VARIANT...]`

Build the update kernel as it is in csrc/ and changed copies of it, each with lab.cu in one program, and run them in
turns, twice: a table of every variant against the kernel as it is, whose difference from itself is the spread, and
against a copy of as many bytes. What is predicted of each, on an H200, stands in `VARIANTS` and in `IN_BASE`.
`--counters`: what the hardware counts in the kernel as it is, by Nsight Compute.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAB = Path(__file__).with_name("lab.cu")
WORK = ROOT / "build/gpu_lab"
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v")
RUN_SECONDS = 90  # of one program; it takes about 12
BASE, PLAN = "base", "plan"
#: Kernels and tables of the base program -> what is predicted of them.
IN_BASE = {
    PLAN: "the kernel as it is",
    "unguarded": "bf16: less arithmetic, up to 5 % faster; others the same",
    "chunks of": "25 M: within 2 %; 32,768 for 1 B: 0 to 1 % faster",
    "largest first": "746 tensors: 3 to 6 % faster",
    "persistent": "25 M: 1 to 2 % faster, 746 tensors 2 to 3 %, 1 B up to 1 % slower",
    "bulk copies": "within 2 %: the loads in flight are enough already",
}
COUNTED = ("f32 100 M", "f32 746 tensors", "planes <- bf16 100 M", "bf16 100 M")
_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy")
_WORTH_READING = re.compile(r"DRAM Throughput|Duration|L2 Hit|Achieved Occ|Stall|Compute \(SM\)|No Eligible")

# The pairs that nearly all trainings have: with the others, which are gone, the kernel needs 80 registers.
_FEW_PAIRS = r"    case kPair<(?!(?:float|BFloat16|Planes), BFloat16>|float, float>)\w+, \w+>:\n      return [^;]*;\n"


@dataclass(frozen=True)
class Edit:
    """A change of a file of csrc/: every match of a pattern, and there must be `times` of them."""

    file: str
    pattern: str
    replacement: str
    times: int = 1


#: A changed copy of the kernel -> its edits, and what is predicted of it.
VARIANTS: dict[str, tuple[tuple[Edit, ...], str]] = {
    BASE: ((), ""),
    "four_blocks": (
        (
            Edit("cuda_kernels.cu", _FEW_PAIRS, "", 13),
            Edit("cuda_kernels.cu", r"(kResidentBlocksPerMultiprocessor = )3;", r"\g<1>4;"),
        ),
        "0 to 2 % faster, 746 tensors 2 to 4 %; 64 registers a thread",
    ),
}


def edited(variant: str, folder: Path) -> None:
    """Copy csrc/'s headers and kernels there, with the edits of the variant.

    Raises:
        ValueError: the sources have changed, and an edit is not what it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "csrc").glob("*.[hc]*"):
        if path.suffix in (".h", ".cu"):
            shutil.copyfile(path, folder / path.name)
    for edit in VARIANTS[variant][0]:
        path = folder / edit.file
        text, found = re.subn(edit.pattern, edit.replacement, path.read_text())
        if found != edit.times:
            raise ValueError(f"{variant}: {edit.pattern!r} is {found} times in csrc/{edit.file}, not {edit.times}")
        path.write_text(text)


def command(variant: str, architecture: str) -> list[str]:
    """Return what compiles a variant."""
    folder = WORK / variant
    everything = ["-DALL"] if variant == BASE else []
    source = [f'-DSOURCE="{folder / "cuda_kernels.cu"}"', "-I", str(folder), *everything]
    return ["nvcc", *FLAGS, f"-arch={architecture}", *source, "-o", str(folder / "lab"), str(LAB)]


def build(variants: Sequence[str], architecture: str) -> bool:
    """Compile side by side, as many as there are cores; print registers and spills; return whether all compiled."""
    running: list[tuple[str, subprocess.Popen[str]]] = []
    done = []

    def finish() -> None:
        variant, process = running.pop(0)
        output, _ = process.communicate()
        (WORK / variant / "log").write_text(output)
        done.append(process.returncode == 0)
        registers = re.findall(r"Used (\d+) registers", output)
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", output)))
        state = f"at most {max(map(int, registers))} registers, {spilled} bytes spilled" if done[-1] else output[-1500:]
        print(f"{variant}: {state}", flush=True)

    for variant in variants:
        edited(variant, WORK / variant)
        if len(running) >= (os.cpu_count() or 1):
            finish()
        pipe = subprocess.Popen(
            command(variant, architecture), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        running.append((variant, pipe))
    while running:
        finish()
    return all(done)


@dataclass(frozen=True)
class Row:
    """Microseconds of a variant and of the copy beside it: alone, after a sweep; and chained, in a graph of many."""

    case: str
    variant: str
    alone: float
    copy_alone: float
    chained: float
    copy_chained: float


def parse(program: str, output: str) -> list[Row]:
    """Return what a program printed; the kernel of a program other than the base has the program's name."""
    rows = []
    for line in output.splitlines():
        cells = line.split("\t")
        if len(cells) == 6:
            rows.append(Row(cells[0], cells[1] if program == BASE else program, *map(float, cells[2:])))
    return rows


def run(variants: Sequence[str], scale: str) -> tuple[list[list[Row]], bool]:
    """Run the programs in turns, twice; return the rows of both, and whether every value was right."""
    runs: list[list[Row]] = []
    right = True
    for turn in (1, 2):
        rows: list[Row] = []
        for variant in variants:
            program = ["timeout", str(RUN_SECONDS), str(WORK / variant / "lab"), scale]
            done = subprocess.run(program, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            rows += parse(variant, done.stdout)
            notes = [line for line in done.stdout.splitlines() if "\t" not in line]
            if done.returncode != 0:
                right = False
                print(f"run {turn} of {variant} ended with {done.returncode}", *notes, sep="\n  ", flush=True)
        runs.append(rows)
    return runs, right


def table(runs: Sequence[Sequence[Row]]) -> list[str]:
    """Return a line a case and variant.

    Microseconds and share of the copy, alone; then by how much it is faster than the plan, alone and chained, in each
    run. The plan itself stands beside that of the first run: that is the spread.
    """
    seen = [{(row.case, row.variant): row for row in rows} for rows in runs]
    title = "".join(f"{f'run {turn}':>9}{'chained':>9}" for turn in range(1, len(runs) + 1))
    lines = [f"{'':<37}{'us':>9}{'of copy':>9}{title}"]
    cases = list(dict.fromkeys(row.case for row in runs[0]))
    for row in sorted(runs[0], key=lambda row: cases.index(row.case)):
        cells = f"{row.alone:>9.1f}{100 * row.copy_alone / row.alone:>7.1f} %"
        for rows in seen:
            plan = (seen[0] if row.variant == PLAN else rows).get((row.case, PLAN))
            this = rows.get((row.case, row.variant))
            for kind in ("alone", "chained"):
                cells += (
                    f"{100 * (getattr(plan, kind) / getattr(this, kind) - 1):>+7.1f} %" if plan and this else " " * 9
                )
        lines.append(f"{row.case:<21}{row.variant:<16}{cells}")
    return lines


def counters() -> int:
    """Print what Nsight Compute counts in the kernel as it is; return the exit status."""
    sections = [word for name in _SECTIONS for word in ("--section", name)]
    status = 0
    for case in COUNTED:
        lab = [str(WORK / BASE / "lab"), "1", case]
        # The card's clocks are left as they are found.
        counted = ["timeout", "60", "ncu", "--clock-control", "none", *sections, "-k", "regex:update_kernel", "-c", "2"]
        done = subprocess.run([*counted, *lab], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        found = [" ".join(line.split()) for line in done.stdout.splitlines() if _WORTH_READING.search(line)]
        print(f"{case}: {'; '.join(found) or f'nothing: {done.stdout[-300:]}'}", flush=True)
        status = status or (0 if found else 1)
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_lab", description="Variants of the update kernel.")
    parser.add_argument("--scale", default="1", help="of the large tensors")
    parser.add_argument("--arch", help="what nvcc builds for (default: the GPU here, else sm_90)")
    parser.add_argument("--build-only", action="store_true", help="where there is no GPU")
    parser.add_argument("--counters", action="store_true", help="count in the kernel as it is; time nothing")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    parsed = parser.parse_args(arguments)
    for tool in ("nvcc", *(["ncu"] if parsed.counters else [])):
        if shutil.which(tool) is None:
            print(f"there is no {tool} on PATH")
            return 1
    variants = [BASE] if parsed.counters else parsed.only
    if not build(variants, parsed.arch or ("sm_90" if shutil.which("nvidia-smi") is None else "native")):
        return 1
    if parsed.build_only:
        return 0
    if parsed.counters:
        return counters()
    runs, right = run(variants, parsed.scale)
    print("\n".join(table(runs)))
    if not right or not all(runs):
        print("NOT ALL OF IT RAN, OR NOT ALL VALUES ARE RIGHT: see above")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
