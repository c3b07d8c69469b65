"""Predict masks at their file's size, and measure every image.

The logits, not the probabilities, are resized to the mask's size (bilinear), as most published code does; a pixel is
foreground where its logit is above 0, a probability above 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from statistics import fmean, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastema.segmentation.data.loaders import Validation
from fastema.segmentation.eval.metrics import as_published, dice, iou, mae, mean_e, s_measure, weighted_f
from fastema.segmentation.model.network import eval_mode


def resized_logits(net: nn.Module, images: Tensor, sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return a batch's logits, float32 [H, W] on the CPU, each at its own size.

    Args:
        net: returns an `Output`; in evaluation mode.
        images: float [N, 3, S, S] in [0, 1], on the network's device.
        sizes: N of (H, W).
    """
    with torch.no_grad():  # not inference_mode: its tensors could not be averaged again
        logits = net(images).logits.float()
    return [
        F.interpolate(one[None], tuple(size), mode="bilinear", align_corners=False)[0, 0].cpu()
        for one, size in zip(logits, sizes, strict=True)
    ]


def predict(net: nn.Module, batch: Validation, device: torch.device) -> list[Tensor]:
    """Return a batch's predicted masks, bool [H, W], each at the size of its true mask."""
    return [logits > 0 for logits in _logits(net, batch, device)]


def evaluate(net: nn.Module, loader: DataLoader, device: torch.device) -> list[float]:
    """Return the IoU per image, in the loader's order."""
    with eval_mode(net):
        return [
            iou(prediction, truth, known)
            for batch in loader
            for prediction, truth, known in zip(predict(net, batch, device), batch.masks, batch.known, strict=True)
        ]


class Scores(NamedTuple):
    """Every metric of one image, or the means over many. All but `mae` are better when higher.

    `iou` and `dice` are at a probability of 0.5; the others of the map that `as_published` makes.
    """

    iou: float
    dice: float
    s_measure: float
    weighted_f: float
    mean_e: float
    mae: float


def score(logits: Tensor, truth: Tensor, known: Tensor | None = None) -> Scores:
    """Measure the logits, float [H, W], against the truth, bool [H, W], of one image.

    Where `known`, bool [H, W], is False, the truth is too, and nothing counts.

    Raises:
        ValueError: the shapes differ, or a logit is NaN.
    """
    if logits.shape != truth.shape:
        raise ValueError(f"logits {list(logits.shape)} and truth {list(truth.shape)} must have the same size")
    if logits.isnan().any():
        raise ValueError("the logits have NaN in them")
    valid = None if known is None else known.numpy()
    published, mask = as_published(logits.sigmoid().numpy(), valid), truth.numpy()
    maps = (s_measure, weighted_f, mean_e, mae)
    overlaps = iou(logits > 0, truth, known), dice(logits > 0, truth, known)
    return Scores(*overlaps, *(metric(published, mask, valid) for metric in maps))


def score_weights(
    net: nn.Module,
    weights: Mapping[str, Callable[[], AbstractContextManager[object]]],
    loader: DataLoader,
    device: torch.device,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, list[Scores]]:
    """Return every image's scores, in the loader's order, for several sets of weights, in one pass over the data.

    Args:
        net: on `device`.
        weights: by name, a context manager with these weights in `net`: `ema.swapped`, or `nullcontext` for its own.
        loader: of `Validation` batches.
        device: the network's.
        on_batch: called after every batch.

    Raises:
        ValueError: a prediction has NaN in it.
    """
    scores: dict[str, list[Scores]] = {name: [] for name in weights}
    pending: list[tuple[str, Future[Scores]]] = []

    def collect(futures: list[tuple[str, Future[Scores]]]) -> None:
        for name, future in futures:
            try:
                scores[name].append(future.result())
            except ValueError as error:
                raise ValueError(f"image {len(scores[name]) + 1}, weights {name!r}: {error}") from error

    # Threads are enough: NumPy and SciPy release the GIL. The network is one batch ahead of the metrics, no more, so
    # that predictions do not pile up.
    with eval_mode(net), ThreadPoolExecutor() as threads:
        for batch in loader:
            before, pending = pending, []
            for name, applied in weights.items():
                with applied():
                    predictions = _logits(net, batch, device)
                for each in zip(predictions, batch.masks, batch.known, strict=True):
                    pending.append((name, threads.submit(score, *each)))
            collect(before)
            on_batch()
        collect(pending)
    return scores


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """Return the mean of every metric over images."""
    return Scores(*map(fmean, zip(*scores, strict=True)))


class Difference(NamedTuple):
    """A mean difference over the same images."""

    mean: float
    error: float  # the standard error, paired; NaN for a single image


def difference(base: Sequence[Scores], other: Sequence[Scores]) -> dict[str, Difference]:
    """Return by metric how much `other` is above `base`, over the same images."""
    columns = zip(Scores._fields, zip(*base, strict=True), zip(*other, strict=True), strict=True)
    return {name: Difference(fmean(b) - fmean(a), paired_error(a, b)) for name, a, b in columns}


def paired_error(base: Sequence[float], other: Sequence[float]) -> float:
    """Return the standard error of the mean difference over the same images; NaN for a single image."""
    if len(base) < 2:
        return math.nan
    return stdev(b - a for a, b in zip(base, other, strict=True)) / math.sqrt(len(base))


def _logits(net: nn.Module, batch: Validation, device: torch.device) -> list[Tensor]:
    return resized_logits(net, batch.images.to(device), [mask.shape for mask in batch.masks])
