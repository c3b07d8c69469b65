"""Metrics of one image: IoU and Dice of two masks, and the four measures of maps that papers on camouflage report.

The four give the numbers of the field's toolkits, conventions included; the reference is pysodmetrics, which reproduces
the authors' MATLAB code. A map is float64 [H, W] in [0, 1], as `as_published` makes it; a truth is bool [H, W]. Pixels
for which `known`, bool [H, W], is False do not count in any metric; map and truth are 0 there.
Two degenerate cases differ from the reference: an empty part of the image counts nothing in the S-measure (there: NaN),
and mean E of a single pixel is 0 or 1 (there: a division by 2e-16).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

_EPS = float(np.finfo(np.float64).eps)
# fspecial('gaussian', 7, 5) of the authors' code is the product of this and its transpose.
_GAUSSIAN = np.exp(-(np.arange(-3.0, 4.0) ** 2) / (2 * 5**2))
_GAUSSIAN /= _GAUSSIAN.sum()


def iou(prediction: torch.Tensor, truth: torch.Tensor, known: torch.Tensor | None = None) -> float:
    """Return the intersection over union of two masks, bool [H, W].

    With an empty truth it is 1 for an empty prediction, else 0. Where `known`, bool [H, W], is False, the truth is too,
    and nothing counts.
    """
    if known is not None:
        prediction = prediction & known
    union = int((prediction | truth).sum())
    return 1.0 if union == 0 else int((prediction & truth).sum()) / union


def dice(prediction: torch.Tensor, truth: torch.Tensor, known: torch.Tensor | None = None) -> float:
    """Return the Dice coefficient (F1) of two masks, bool [H, W]: 2·IoU / (1 + IoU)."""
    overlap = iou(prediction, truth, known)
    return 2 * overlap / (1 + overlap)


def to_levels(probability: np.ndarray) -> np.ndarray:
    """Convert probabilities in [0, 1] to uint8 grey levels; 128 and above is a probability of 0.5 and above."""
    return np.rint(np.asarray(probability, np.float64) * 255).astype(np.uint8)


def as_published(probability: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Convert probabilities to the map that the toolkits measure: 8 bits, then stretched from 0 to 1.

    The stretch is in the published numbers. It favours a network that is unsure everywhere, and makes a full-range map
    of its noise on an image without an object; IoU and Dice are of the probabilities themselves. A constant map is not
    stretched. Where `known` is False, the map becomes 0.
    """
    levels = to_levels(probability) / 255
    counted = levels if known is None else levels[known]
    lowest, highest = counted.min(), counted.max()
    published = levels if lowest == highest else (levels - lowest) / (highest - lowest)
    return published if known is None else np.where(known, published, 0)


def mae(prediction: np.ndarray, truth: np.ndarray, known: np.ndarray | None = None) -> float:
    """Return the mean absolute error; lower is better (Perazzi et al., Saliency filters, CVPR 2012)."""
    error = np.abs(prediction - truth)
    return float(np.mean(error if known is None else error[known]))


def s_measure(prediction: np.ndarray, truth: np.ndarray, known: np.ndarray | None = None) -> float:
    """Return the structure measure (Fan et al., ICCV 2017): half object similarity, half similarity of four regions.

    An empty truth gives 1 less the map's mean, a full one its mean.
    """
    inside, outside = truth, ~truth if known is None else ~truth & known
    share = truth.mean() if known is None else truth[known].mean()
    if share == 0:
        return float(1 - prediction[outside].mean())
    if share == 1:
        return float(prediction[inside].mean())
    objects = share * _object_similarity(prediction[inside]) + (1 - share) * _object_similarity(1 - prediction[outside])
    return float(max(0.0, 0.5 * objects + 0.5 * _region_similarity(prediction, truth, known)))


def mean_e(prediction: np.ndarray, truth: np.ndarray, known: np.ndarray | None = None) -> float:
    """Return the enhanced-alignment measure (Fan et al., IJCAI 2018), averaged over the 256 thresholds of 8 bits.

    As in the authors' code, the sum over H·W pixels is divided by H·W - 1: a perfect map gets a little more than 1.
    """
    if known is not None:
        prediction, truth = prediction[known], truth[known]
    size, object_size = truth.size, int(truth.sum())
    levels = (prediction * 255).astype(np.uint8)
    # Pixels at or above each threshold, from 255 down to 0, inside the object and outside.
    inside, outside = (
        np.bincount(levels[part], minlength=256)[::-1].cumsum().astype(np.float64) for part in (truth, ~truth)
    )
    chosen = inside + outside
    if object_size == 0:
        total = size - chosen
    elif object_size == size:
        total = chosen
    else:
        # After thresholding there are only four kinds of pixels: (chosen or not) x (object or not).
        map_mean, truth_mean = chosen / size, object_size / size
        total = sum(
            count * _alignment(map_value - map_mean, truth_value - truth_mean)
            for count, map_value, truth_value in (
                (inside, 1, 1),
                (outside, 1, 0),
                (object_size - inside, 0, 1),
                (size - object_size - outside, 0, 0),
            )
        )
    return float(np.mean(total) / max(1, size - 1))


def weighted_f(prediction: np.ndarray, truth: np.ndarray, known: np.ndarray | None = None) -> float:
    """Return the weighted F-measure (Margolin et al., CVPR 2014), beta 1: errors weigh by place and neighbourhood.

    An empty truth gives 0.
    """
    if not truth.any():
        return 0.0
    distance, nearest = ndimage.distance_transform_edt(~truth, return_indices=True)
    error = np.abs(prediction - truth)
    outside = ~truth if known is None else ~truth & known
    # Outside the object, the error of the nearest object pixel, so that smoothing ignores what lies beyond the edge.
    dependent = error[tuple(nearest)]
    smoothed = ndimage.correlate1d(dependent, _GAUSSIAN, axis=0, mode="constant")
    smoothed = ndimage.correlate1d(smoothed, _GAUSSIAN, axis=1, mode="constant")
    missed = np.minimum(error, smoothed)[truth]
    # A false alarm weighs up to twice as much, the farther it is from the object.
    false_alarms = error[outside] * (2 - np.exp(np.log(0.5) / 5 * distance[outside]))
    hits = missed.size - missed.sum()
    recall = 1 - missed.mean()
    precision = hits / (hits + false_alarms.sum() + _EPS)
    return float(2 * recall * precision / (recall + precision + _EPS))


def _object_similarity(values: np.ndarray) -> float:
    deviation = values.std(ddof=1) if values.size > 1 else 0.0
    return 2 * values.mean() / (values.mean() ** 2 + 1 + deviation + _EPS)


def _region_similarity(prediction: np.ndarray, truth: np.ndarray, known: np.ndarray | None) -> float:
    """Compare the four parts around the object's centroid, weighted by their areas."""
    known = np.ones_like(truth) if known is None else known
    row, column = (int(centre) + 1 for centre in np.argwhere(truth).mean(axis=0).round())
    return sum(
        part.sum() / known.sum() * _structural_similarity(prediction[rows, columns][part], truth[rows, columns][part])
        for rows in (slice(row), slice(row, None))
        for columns in (slice(column), slice(column, None))
        if (part := known[rows, columns]).any()
    )


def _structural_similarity(prediction: np.ndarray, truth: np.ndarray) -> float:
    freedom = truth.size - 1 + _EPS
    x, y = prediction.mean(), truth.mean()
    dx, dy = prediction - x, truth - y
    alike = 4 * x * y * (dx * dy).sum() / freedom
    most = (x**2 + y**2) * ((dx**2).sum() + (dy**2).sum()) / freedom
    if alike != 0:
        return alike / (most + _EPS)
    return 1.0 if most == 0 else 0.0


def _alignment(map_value: np.ndarray, truth_value: float) -> np.ndarray:
    alike = 2 * map_value * truth_value / (map_value**2 + truth_value**2 + _EPS)
    return (alike + 1) ** 2 / 4
