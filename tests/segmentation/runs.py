"""Tiny trainings for tests: data, options, a run, and the differences of two checkpoints."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastema.segmentation.data.listing import Pair, hold_out, list_pairs
from fastema.segmentation.data.synthetic import ensure_dataset
from fastema.segmentation.options import TrainOptions
from fastema.segmentation.train.trainer import Trainer

Pairs = tuple[list[Pair], list[Pair]]


def tiny_pairs(folder: Path) -> Pairs:
    """Return ten images to train on and four to validate on, 64 px."""
    root = ensure_dataset(folder, seed=0, count=14, size=64)
    training, validation = hold_out(list_pairs(root).pairs, 0.3)
    # Independent of the hash, since tests count groups of ten images.
    spare = validation + training
    return spare[4:14], spare[:4]


def tiny_options(folder: Path, **changes: Any) -> TrainOptions:
    """Return the options of the smallest training; make its folder."""
    folder.mkdir(exist_ok=True)
    defaults: dict[str, Any] = {
        "dataset_path": "synthetic",
        "checkpoint_dir": folder,
        "backbone": "mobilenetv3_small_050",
        "pretrained": False,
        "num_experts": 0,
        "img_size": 64,
        "batch_size": 4,
        "epochs": 2,
        "device": "cpu",
    }
    return TrainOptions(**{**defaults, **changes})


def tiny_run(pairs: Pairs, options: TrainOptions, **more: Any) -> Trainer:
    """Return a run that prints into memory."""
    options.check()
    return Trainer(options, *pairs, Console(file=io.StringIO(), width=200), **more)


def output_of(run: Trainer) -> str:
    assert isinstance(run.console.file, io.StringIO)
    return run.console.file.getvalue()


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Return the places where two nested values differ, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [place for key in a for place in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and type(a) is type(b) and len(a) == len(b):
        return [p for i, (x, y) in enumerate(zip(a, b, strict=True)) for p in differences(x, y, f"{where}/{i}")]
    return [] if a == b else [where]
