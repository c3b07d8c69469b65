"""`fastema posthoc`: averages made after the training from snapshots, a sweep over them, a plan before the training."""

from __future__ import annotations

import argparse
import math
import re
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastema.errors import UserError

if TYPE_CHECKING:
    from fastema.posthoc import Averaged

HELP = "choose the average after the training, from snapshots"
DESCRIPTION = (
    "Makes an average of any width from snapshots of a few (fastema.posthoc.Snapshots), sweeps over widths with a "
    "command of yours, or says before the training which snapshots give which error."
)
_PLANNED = (0.02, 0.03, 0.05, 0.075, 0.10, 0.15, 0.20, 0.25)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="what fastema.posthoc.Snapshots wrote")

    target = parser.add_argument_group("which average (one of these)")
    one = target.add_mutually_exclusive_group()
    one.add_argument("--sigma-rel", type=float, metavar="S", help="width of a power profile, relative to the run")
    one.add_argument("--gamma", type=float, metavar="G", help="exponent of a power profile")
    one.add_argument("--decay", type=float, metavar="D", help="constant decay")
    one.add_argument("--window", type=int, metavar="N", help="plain mean of the last N steps")
    one.add_argument("--weights", type=_numbers, metavar="W,W,...", help="relative weights of equal parts of the run")
    one.add_argument("--sweep", type=_sweep, metavar="A:B:N", help="N values of sigma-rel from A to B, for --evaluate")
    one.add_argument("--list", action="store_true", help="list the snapshots")
    one.add_argument("--plan", action="store_true", help="before a run: which snapshots give which error")
    target.add_argument("--step", type=int, metavar="T", help="a step with a snapshot (default: the last)")
    target.add_argument(
        "--max-error", type=float, default=0.25, metavar="E", help="largest profile error accepted (default: 0.25)"
    )

    sweep = parser.add_argument_group("the sweep")
    sweep.add_argument(
        "--evaluate", metavar="CMD", help="run for each average, {} being its file; the last number printed counts"
    )
    sweep.add_argument("--mode", choices=("max", "min"), default="max", help="which is better (default: max)")

    plan = parser.add_argument_group("the plan")
    plan.add_argument(
        "--profiles", type=_numbers, default=[0.05, 0.10], metavar="S,S", help="sigma-rel stored (default: 0.05,0.10)"
    )
    plan.add_argument(
        "--snapshots", type=_counts, default=[8, 16, 32, 64], metavar="N,N", help="how many (default: 8,16,32,64)"
    )
    plan.add_argument("--parameters", type=float, metavar="P", help="of the model, for the disk use; 25e6 is fine")

    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="FILE", help="the average, or the sweep's best, as safetensors")
    output.add_argument("--plot", type=Path, metavar="PNG", help="draw the sweep or the plan")


def run(arguments: argparse.Namespace) -> None:
    """Do what the flags say.

    Raises:
        UserError: whatever the user can put right.
    """
    for flag, path in (("--out", arguments.out), ("--plot", arguments.plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{flag}: there is no folder {path.absolute().parent}")
    if arguments.plot is not None and not (arguments.plan or arguments.sweep):
        raise UserError("--plot draws --sweep or --plan")
    if arguments.plan:
        _refuse_with("--plan", arguments, "folder", "out", "step", "evaluate")
    elif arguments.folder is None:
        raise UserError("give FOLDER, or --plan")
    if arguments.list:
        _refuse_with("--list", arguments, "out", "step", "evaluate")
    if (arguments.sweep is None) != (arguments.evaluate is None):
        raise UserError("--sweep A:B:N and --evaluate CMD go together")

    from fastema.posthoc import SnapshotError

    try:
        if arguments.plan:
            _plan(arguments)
        elif arguments.list:
            _list(arguments.folder)
        elif arguments.sweep is not None:
            _run_sweep(arguments)
        else:
            _make(arguments)
    except (SnapshotError, ValueError, OSError) as error:
        raise UserError(str(error)) from error


def _make(arguments: argparse.Namespace) -> None:
    from fastema.posthoc import synthesize

    names = ("sigma_rel", "gamma", "decay", "window", "weights")
    chosen = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if not chosen:
        raise UserError("say which average: --sigma-rel, --gamma, --decay, --window or --weights; or --sweep, --list")
    if arguments.out is None:
        raise UserError("give --out FILE")
    result = synthesize(arguments.folder, step=arguments.step, max_error=arguments.max_error, **chosen)
    _write(result, arguments.out)
    print(f"{arguments.out}: {result}")


def _list(folder: Path) -> None:
    from fastema.posthoc import snapshots_in

    snapshots = snapshots_in(folder)
    last = snapshots[-1]
    dtype = next(iter(last.averaged.values()), ("nothing", ()))[0]
    print(f"run {last.run}, {len(last.averaged)} averaged tensors in {dtype}")
    print(f"averages: {'; '.join(map(str, last.profiles))}")
    for each in snapshots:
        rounded = f"  rounding {each.rounding:.1e}" if each.rounding else ""
        print(f"step {each.step:>12,}{rounded}")


def _run_sweep(arguments: argparse.Namespace) -> None:
    from fastema.posthoc import power, snapshots_in, synthesize_all

    start = snapshots_in(arguments.folder)[-1].profiles[0].start
    targets = [power(sigma, start=start) for sigma in arguments.sweep]
    results = synthesize_all(arguments.folder, targets, arguments.step, arguments.max_error)
    scores = []
    print(f"{'sigma_rel':>9}  {'error':>6}  score")
    for sigma, result in zip(arguments.sweep, results, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "averaged.safetensors"
            _write(result, path)
            scores.append(_evaluated(arguments.evaluate, path))
        print(f"{sigma:9.4f}  {result.error:6.2%}  {scores[-1]:.6g}", flush=True)
    best = (max if arguments.mode == "max" else min)(range(len(scores)), key=lambda each: scores[each])
    print(f"best: sigma_rel {arguments.sweep[best]:.4f} with {scores[best]:.6g}, at step {results[best].step:,}")
    if best in (0, len(scores) - 1) and len(scores) > 1:
        print("the best is at an end of the sweep: a wider one may find a better")
    if arguments.out is not None:
        _write(results[best], arguments.out)
        print(f"{arguments.out}: {results[best]}")
    if arguments.plot is not None:
        errors = [result.error for result in results]
        _draw_sweep(arguments.plot, arguments.sweep, scores, errors, best)
        print(f"Plot: {arguments.plot}")


def _evaluated(command: str, path: Path) -> float:
    words = [word.replace("{}", str(path)) for word in shlex.split(command)]
    if "{}" not in command:
        words.append(str(path))
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise UserError(f"--evaluate: cannot run {words[0]!r}: {error.strerror}") from error
    if done.returncode != 0:
        raise UserError(f"--evaluate: {shlex.join(words)} ended with status {done.returncode}")
    found = _NUMBER.findall(done.stdout)
    if not found:
        raise UserError(f"--evaluate: {shlex.join(words)} printed no number")
    return float(found[-1])


def _plan(arguments: argparse.Namespace) -> None:
    from fastema.posthoc import errors_of, power

    stored = [power(sigma) for sigma in arguments.profiles]
    targets = [power(sigma) for sigma in _PLANNED]
    rows = [[fit.error for fit in errors_of(stored, count, targets)] for count in arguments.snapshots]
    print(f"profile error at the end of a run, from {', '.join(map(str, stored))}; snapshots evenly spaced")
    disk = arguments.parameters is not None
    print(
        "snapshots  " + "  ".join(f"{sigma:>6.4g}" for sigma in _PLANNED) + ("     float32     float16" if disk else "")
    )
    for count, row in zip(arguments.snapshots, rows, strict=True):
        bytes_ = (
            [f"{count * len(stored) * arguments.parameters * size / 1e9:9.1f} GB" for size in (4, 2)] if disk else []
        )
        print(f"{count:>9}  " + "  ".join(f"{error:6.2%}" for error in row) + "".join(bytes_))
    if arguments.plot is not None:
        _draw_plan(arguments.plot, arguments.profiles, arguments.snapshots)
        print(f"Plot: {arguments.plot}")


# ---- output ----


def _write(result: Averaged, path: Path) -> None:
    """Write a safetensors file atomically; tied weights are written under each of their names."""
    from fastema.core.writing import replacing
    from fastema.posthoc.snapshot_files import require_safetensors

    seen: set[int] = set()
    tensors = {}
    for name, value in result.items():
        tensors[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    about = {"made_by": "fastema posthoc", "average": str(result.target), "step": str(result.step)}
    with replacing(path.absolute()) as temporary:
        require_safetensors().torch.save_file(tensors, temporary, {**about, "profile_error": f"{result.error:.6f}"})


def _axes() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    axes.set_xscale("log")
    axes.set_xlabel("sigma_rel")
    axes.grid(alpha=0.3)
    return figure, axes


def _draw_sweep(
    path: Path, sigmas: Sequence[float], scores: Sequence[float], errors: Sequence[float], best: int
) -> None:
    figure, axes = _axes()
    axes.plot(sigmas, scores, marker="o")
    axes.axvline(sigmas[best], color="grey", linestyle=":")
    axes.set_ylabel("score")
    right = axes.twinx()
    right.fill_between(sigmas, [100 * error for error in errors], alpha=0.15, color="tab:red")
    right.set_ylabel("profile error, %")
    right.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path)


def _draw_plan(path: Path, profiles: Sequence[float], counts: Sequence[int]) -> None:
    from fastema.posthoc import errors_of, power

    figure, axes = _axes()
    sigmas = [0.015 * (0.28 / 0.015) ** (i / 60) for i in range(61)]
    for count in counts:
        fits = errors_of([power(sigma) for sigma in profiles], count, [power(sigma) for sigma in sigmas])
        axes.plot(sigmas, [100 * max(fit.error, 1e-5) for fit in fits], label=f"{count} snapshots")
    axes.set_yscale("log")
    axes.set_ylabel("profile error, %")
    axes.set_title(f"stored: sigma_rel {', '.join(f'{sigma:g}' for sigma in profiles)}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


# ---- flags ----


def _refuse_with(flag: str, arguments: argparse.Namespace, *names: str) -> None:
    given = [name for name in names if getattr(arguments, name) is not None]
    if given:
        shown = ", ".join("FOLDER" if name == "folder" else f"--{name}" for name in given)
        raise UserError(f"{flag} does not take {shown}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers with commas between, got {text!r}") from None


def _counts(text: str) -> list[int]:
    numbers = _numbers(text)
    if not all(number >= 1 and number == int(number) and number <= 1000 for number in numbers):
        raise argparse.ArgumentTypeError(f"whole numbers from 1 to 1000, got {text!r}")
    return [int(number) for number in numbers]


def _sweep(text: str) -> list[float]:
    """Return values whose ratios are equal: a width is a scale."""
    try:
        first, last, count = text.split(":")
        low, high, number = float(first), float(last), int(count)
    except ValueError:
        raise argparse.ArgumentTypeError(f"A:B:N, such as 0.03:0.25:12, got {text!r}") from None
    if not (0 < low < high <= 12**-0.5 and 2 <= number <= 1000) or not math.isfinite(high):
        raise argparse.ArgumentTypeError(f"A:B:N with 0 < A < B <= 0.2886 and N from 2 to 1000, got {text!r}")
    return [low * (high / low) ** (i / (number - 1)) for i in range(number)]
