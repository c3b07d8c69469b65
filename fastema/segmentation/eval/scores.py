"""Every metric of every image, for several sets of weights in one pass over the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from fastema.segmentation.eval.evaluation import batch_logits, in_eval_mode
from fastema.segmentation.eval.metrics import as_published, mae, mean_e, s_measure, weighted_f
from fastema.segmentation.eval.overlap import dice, iou


@dataclass(frozen=True)
class Scores:
    """Every metric of one image, or the means over many. All but `mae` are better when higher.

    `iou` and `dice` are of the probabilities at threshold 0.5; the others of the 8-bit, stretched map that papers
    measure (`saliency_metrics.as_published`).
    """

    iou: float
    dice: float
    s_measure: float
    weighted_f: float
    mean_e: float
    mae: float


def score(logits: torch.Tensor, truth: torch.Tensor) -> Scores:
    """Every metric of one image.

    Args:
        logits: float [H, W].
        truth: bool [H, W].

    Raises:
        ValueError: the shapes differ, or a logit is not a number.
    """
    if logits.shape != truth.shape:
        raise ValueError(f"logits {list(logits.shape)} and truth {list(truth.shape)} must have the same size")
    if logits.isnan().any():
        raise ValueError("the logits have NaN in them")
    published, mask = as_published(logits.sigmoid().numpy()), truth.numpy()
    return Scores(
        iou=iou(logits > 0, truth),
        dice=dice(logits > 0, truth),
        s_measure=s_measure(published, mask),
        weighted_f=weighted_f(published, mask),
        mean_e=mean_e(published, mask),
        mae=mae(published, mask),
    )


def score_weights(
    net: nn.Module,
    weights: Mapping[str, Callable[[], AbstractContextManager[object]]],
    loader: DataLoader,
    device: torch.device,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, list[Scores]]:
    """Every metric of every image for several sets of weights, in one pass over the data.

    Args:
        net: the model; its modes are afterwards what they were before.
        weights: name → what puts these weights into `net` for the time of a block: `ema.swapped` for averaged ones,
            `contextlib.nullcontext` for those that are there.
        loader: gives `Validation` batches.
        device: where `net` is.
        on_batch: called after every batch.

    Returns:
        Name → scores in the loader's order.

    Raises:
        ValueError: a prediction has NaN in it.
    """
    scores: dict[str, list[Scores]] = {name: [] for name in weights}
    pending: list[tuple[str, Future[Scores]]] = []
    # Threads are enough: NumPy and SciPy let go of the interpreter. The network goes on meanwhile, but only a batch
    # ahead, so that its predictions do not pile up.
    with in_eval_mode(net), ThreadPoolExecutor() as threads:
        for batch in loader:
            before, pending = pending, []
            for name, in_place in weights.items():
                with in_place():
                    predictions = batch_logits(net, batch, device)
                for prediction, truth in zip(predictions, batch.masks, strict=True):
                    pending.append((name, threads.submit(score, prediction, truth)))
            _collect(before, scores)
            on_batch()
        _collect(pending, scores)
    return scores


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """The mean of every metric over images; there must be at least one."""
    return Scores(**{field.name: fmean(getattr(one, field.name) for one in scores) for field in fields(Scores)})


class Difference(NamedTuple):
    """By how much one is ahead of the other over the same images."""

    mean: float
    error: float  # the standard error, paired; NaN for a single image


def difference(base: Sequence[Scores], other: Sequence[Scores]) -> dict[str, Difference]:
    """Metric → by how much `other` is above `base`, both over the same images."""
    leads = {}
    for field in fields(Scores):
        of_images = [getattr(o, field.name) - getattr(b, field.name) for b, o in zip(base, other, strict=True)]
        error = stdev(of_images) / math.sqrt(len(of_images)) if len(of_images) > 1 else math.nan
        leads[field.name] = Difference(fmean(of_images), error)
    return leads


def _collect(pending: list[tuple[str, Future[Scores]]], scores: dict[str, list[Scores]]) -> None:
    for name, future in pending:
        try:
            scores[name].append(future.result())
        except ValueError as error:
            raise ValueError(f"image {len(scores[name]) + 1}, weights {name!r}: {error}") from error
