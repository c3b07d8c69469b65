"""Measure the gain of an average on real images: `fastema train` on cell nuclei, base and averages, several seeds.

Every seed is trained twice, through the command line: once with two constant decays in one read, once with the
threshold schedule. An average does not change the training, so both must give the same base, bit for bit (checked).
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

RESULTS = Path(__file__).parent.parent / "results"

#: Name of an average → its column in history.csv, by run.
RUNS: dict[str, tuple[list[str], dict[str, str]]] = {
    "constant": (
        ["--ema-decays", "0.99,0.999", "--ema-decay-type", "constant"],
        {"base": "iou", "0.99 constant": "ema_iou", "0.999 constant": "ema_iou_0.999"},
    ),
    "threshold": (
        ["--ema-decay", "0.999", "--ema-decay-type", "threshold"],
        {"base": "iou", "0.999 threshold": "ema_iou"},
    ),
}


@dataclass(frozen=True)
class SeedResult:
    """One seed: IoU by epoch for each kind of weights, and IoU on the test images after the last epoch."""

    seed: int
    validation: dict[str, list[float]]
    test: dict[str, float]


def train_flags(arguments: argparse.Namespace) -> list[str]:
    """Return the flags that all runs share."""
    return [
        *("--backbone", arguments.backbone, "--num-experts", str(arguments.num_experts)),
        *("--img-size", str(arguments.img_size), "--batch-size", str(arguments.batch_size)),
        *("--epochs", str(arguments.epochs), "--lr", str(arguments.lr), "--num-workers", "1", "--use-ema"),
    ]


def run_seed(seed: int, arguments: argparse.Namespace) -> SeedResult:
    """Train a seed both ways and evaluate the last weights on the test images.

    Raises:
        RuntimeError: a command failed, or the two bases are not the same.
    """
    validation: dict[str, list[float]] = {}
    test: dict[str, float] = {}
    for name, (flags, columns) in RUNS.items():
        folder = arguments.out / f"seed{seed}-{name}"
        if not (folder / "test.json").exists():
            data = ["--dataset-path", str(arguments.dataset_path)]
            common = [*data, "--checkpoint-dir", str(folder), "--seed", str(seed)]
            _fastema("train", *common, *train_flags(arguments), *flags)
            _fastema("evaluate", str(folder / "last.pth"), *data, "--json", str(folder / "test.json"))
        with (folder / "history.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for weights, column in columns.items():
            values = [float(row[column]) for row in rows]
            if validation.setdefault(weights, values) != values:
                raise RuntimeError(f"seed {seed}: {weights} differs between the runs: {validation[weights]}, {values}")
        test.update(_test_ious(folder / "test.json", list(columns)[:2]))
    return SeedResult(seed, validation, test)


def _fastema(*arguments: str) -> None:
    print("fastema", " ".join(arguments), flush=True)
    if subprocess.run([sys.executable, "-m", "fastema", *arguments]).returncode != 0:
        raise RuntimeError(f"fastema {arguments[0]} failed")


def _test_ious(path: Path, names: list[str]) -> dict[str, float]:
    """Return the IoU of the base and of the main average; further averages are only validated."""
    ious = {entry["name"]: entry["means"]["iou"] for entry in json.loads(path.read_text())["weights"]}
    return {names[0]: ious["net"], names[1]: ious["ema_net"]}


def summary(results: list[SeedResult]) -> list[dict[str, Any]]:
    """Return a row per kind of weights: mean and deviation over the seeds, and the gain over the base by seed."""
    rows = []
    for weights in results[0].validation:
        last = [result.validation[weights][-1] for result in results]
        gains = [result.validation[weights][-1] - result.validation["base"][-1] for result in results]
        by_epoch = zip(*(result.validation[weights] for result in results), strict=True)
        test = [result.test[weights] for result in results if weights in result.test]
        rows.append(
            {
                "weights": weights,
                "last_mean": fmean(last),
                "last_sd": stdev(last) if len(last) > 1 else None,
                "gain_by_seed": gains,
                "mean_by_epoch": [fmean(values) for values in by_epoch],
                "test_mean": fmean(test) if test else None,
                "test_by_seed": test,
            }
        )
    return rows


def draw(path: Path, results: list[SeedResult]) -> None:
    """Plot IoU by epoch: a line for the mean over the seeds, a band from the lowest to the highest."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    canvas = FigureCanvasSVG(figure)
    axis = figure.subplots()
    for weights in results[0].validation:
        curves = list(zip(*(result.validation[weights] for result in results), strict=True))
        epochs = range(1, len(curves) + 1)
        (line,) = axis.plot(epochs, [fmean(values) for values in curves], marker="o", markersize=3, label=weights)
        lowest, highest = [min(values) for values in curves], [max(values) for values in curves]
        axis.fill_between(epochs, lowest, highest, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set_xlabel("epoch")
    axis.set_ylabel("validation IoU")
    axis.set_title(f"Cell nuclei, {len(results)} seeds: mean, and from the lowest to the highest", fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    canvas.print_svg(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset-path", type=Path, required=True, help="the nuclei in COD10K-v3 layout")
    parser.add_argument("--out", type=Path, required=True, help="where the runs go; runs that are there are reused")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--num-experts", type=int, default=7)
    parser.add_argument("--img-size", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--json", type=Path, default=RESULTS / "nuclei.json")
    arguments = parser.parse_args()
    results = [run_seed(seed, arguments) for seed in arguments.seeds]
    rows = summary(results)
    import torch

    command = f"python -m bench.studies.nuclei {' '.join(sys.argv[1:])}"
    record = {
        "command": command,
        "train_flags": train_flags(arguments),
        "machine": f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "summary": rows,
        "seeds": [vars(result) for result in results],
    }
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    draw(arguments.json.with_suffix(".svg"), results)
    print(f"{'weights':<18} {'last IoU, mean':>14} {'sd':>7}  gain over the base, by seed   test IoU")
    for row in rows:
        gains = " ".join(f"{gain:+.4f}" for gain in row["gain_by_seed"])
        spread = "" if row["last_sd"] is None else f"{row['last_sd']:.4f}"
        test = "" if row["test_mean"] is None else f"{row['test_mean']:.4f}"
        print(f"{row['weights']:<18} {row['last_mean']:>14.4f} {spread:>7}  {gains:<28} {test}")


if __name__ == "__main__":
    main()
