"""The segmentation trainer from Python: train on generated images, evaluate both weights, predict a mask.

    pip install ".[train]"
    python docs/examples/segmentation.py

The same three commands work in a shell: `fastema train ...`, `fastema evaluate ...`, `fastema predict ...`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from fastema.cli import main as fastema
from fastema.segmentation.data.synthetic import ensure_dataset


def main(epochs: int = 4) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = ensure_dataset(Path(folder), seed=0, count=64, size=64)  # images and masks, in Train and Test
        run = Path(folder, "run")
        options = (
            f"--img-size 64 --batch-size 8 --epochs {epochs} --lr 0.002 --val-fraction 0.2 --use-ema --ema-decay 0.9"
        )
        model = "--backbone mobilenetv3_small_050 --no-pretrained --num-experts 2"
        where = ["--dataset-path", str(data), "--checkpoint-dir", str(run)]
        assert fastema(["train", *where, *options.split(), *model.split()]) == 0
        best = str(run / "best_ema.pth")
        assert fastema(["evaluate", best, "--dataset-path", str(data)]) == 0
        assert fastema(["predict", best, str(data / "Test/Image"), "--out", f"{folder}/masks"]) == 0
        print(f"{len(list(Path(folder, 'masks').glob('*.png')))} masks are written")


if __name__ == "__main__":
    main()
