"""The metrics, by hand on masks of a few pixels, and against pysodmetrics on every kind of pair."""

from __future__ import annotations

import importlib.util
import math
import warnings

import pytest

from fastema.segmentation.train_extra import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

import numpy as np
import torch
from scipy import ndimage

from fastema.segmentation.eval import metrics
from fastema.segmentation.eval.metrics import as_published, dice, iou, mae, mean_e, s_measure, to_levels, weighted_f
from fastema.segmentation.eval.scores import Scores, difference, mean_scores, score

HAS_ORACLE = importlib.util.find_spec("py_sod_metrics") is not None
needs_oracle = pytest.mark.skipif(not HAS_ORACLE, reason="pysodmetrics, the oracle, is not installed")

MEASURES = {"mae": mae, "s_measure": s_measure, "mean_e": mean_e, "weighted_f": weighted_f}

# (height, width): ordinary, odd, a line, tiny.
SIZES = [(48, 64), (37, 53), (1, 40), (29, 1), (7, 7), (2, 3)]


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[pixel == "#" for pixel in row] for row in rows])


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_iou_and_dice_of_four_pixels() -> None:
    prediction, truth = mask("##", ".."), mask("#.", "#.")
    assert iou(prediction, truth) == pytest.approx(1 / 3)
    assert dice(prediction, truth) == pytest.approx(2 * 1 / (2 + 2))


@pytest.mark.parametrize("metric", [iou, dice])
def test_an_empty_truth_asks_for_an_empty_prediction(metric) -> None:
    assert metric(mask("..."), mask("...")) == 1.0
    assert metric(mask("#.."), mask("...")) == 0.0
    assert metric(mask("..."), mask("#..")) == 0.0


def test_levels_and_the_stretch_of_published_maps() -> None:
    assert to_levels(np.array([0.0, 0.1, 0.5, 0.499, 1.0])).tolist() == [0, 26, 128, 127, 255]
    stretched = as_published(np.array([[0.2, 0.4], [0.6, 0.2]]))
    assert stretched.dtype == np.float64
    np.testing.assert_allclose(stretched, [[0, 0.5], [1, 0]])
    np.testing.assert_allclose(as_published(np.full((2, 2), 0.4)), 0.4)  # nothing to stretch
    # 8 bits: what is less than half a level apart is the same.
    assert as_published(np.array([[0.5000, 0.5001]])).tolist() == [[128 / 255] * 2]


def test_mae_by_hand() -> None:
    assert mae(np.array([[0.25, 1.0]]), np.array([[False, True]])) == 0.125


def test_s_measure_by_hand() -> None:
    truth = np.array([[True, False], [False, False]])
    assert s_measure(truth.astype(float), truth) == pytest.approx(1)
    # All 0.5. Objects: 2m / (m² + 1) = 0.8 for m = 0.5, inside and outside. Regions: the centroid is the first pixel,
    # so each pixel is a part; a single pixel has no deviation to differ in: 1 each.
    assert s_measure(np.full((2, 2), 0.5), truth) == pytest.approx(0.5 * 0.8 + 0.5 * 1.0)
    empty, full = np.zeros((2, 2), bool), np.ones((2, 2), bool)
    assert s_measure(np.full((2, 2), 0.25), empty) == 0.75
    assert s_measure(np.full((2, 2), 0.25), full) == 0.25


def test_mean_e_by_hand() -> None:
    truth = np.array([[True, False], [False, False]])
    # Threshold 0 takes everything, so the map has no contrast: alignment 0, enhanced to 1/4 a pixel. The other 255
    # thresholds take exactly the object: 1 a pixel.
    assert mean_e(truth.astype(float), truth) == pytest.approx((1 * 4 / 4 + 255 * 4) / 256 / 3)
    # Without an object only what stays below the threshold counts: nothing at 0, all of it above.
    assert mean_e(np.zeros((2, 2)), np.zeros((2, 2), bool)) == pytest.approx(255 * 4 / 256 / 3)
    assert mean_e(np.ones((2, 2)), np.ones((2, 2), bool)) == pytest.approx(4 / 3)


def test_weighted_f_by_hand() -> None:
    truth = np.zeros((40, 40), bool)
    truth[20, 20] = True
    assert weighted_f(truth.astype(float), truth) == pytest.approx(1)
    assert weighted_f(np.zeros((40, 40)), np.zeros((40, 40), bool)) == 0.0
    # A false alarm three pixels away weighs 2 - exp(ln(1/2) / 5 · 3) = 2 - 0.5^0.6; the hit is whole.
    prediction = truth.astype(float)
    prediction[20, 23] = 1
    precision = 1 / (1 + 2 - 0.5**0.6)
    assert weighted_f(prediction, truth) == pytest.approx(2 * precision / (1 + precision))
    # A missed object whose every neighbour takes over its error: no smoothing helps, recall 0.
    assert weighted_f(np.zeros((40, 40)), truth) == pytest.approx(0, abs=1e-9)


def test_weighted_f_forgives_a_missed_pixel_among_hits() -> None:
    truth = np.zeros((40, 40), bool)
    truth[10:30, 10:30] = True
    prediction = truth.astype(float)
    prediction[20, 20] = 0
    axis = np.exp(-(np.arange(-3, 4) ** 2) / 50)
    error = (axis[3] / axis.sum()) ** 2  # of the Gaussian, the share of its middle
    recall = 1 - error / 400
    assert weighted_f(prediction, truth) == pytest.approx(2 * recall / (recall + 1), rel=1e-12)


def test_a_part_without_pixels_counts_nothing() -> None:
    """The object is in the last column: nothing is right of its centroid. The reference gives NaN here."""
    truth = np.zeros((4, 4), bool)
    truth[:, -1] = True
    assert s_measure(truth.astype(float), truth) == pytest.approx(1)


def test_a_single_pixel() -> None:
    for truth in (np.zeros((1, 1), bool), np.ones((1, 1), bool)):
        right = as_published(truth.astype(float))
        values = [measure(right, truth) for measure in MEASURES.values()]
        assert all(0 <= value <= 1 for value in values), values


def test_score_is_the_metrics_of_one_image() -> None:
    truth = mask("##..", "##..", "....")
    logits = torch.where(truth, 2.0, -3.0)
    logits[0, 2] = 1.0
    scores = score(logits, truth)
    assert scores.iou == pytest.approx(4 / 5)
    assert scores.dice == pytest.approx(8 / 9)
    published = as_published(logits.sigmoid().numpy())
    assert published.max() == 1 and published.min() == 0
    for name, measure in MEASURES.items():
        assert getattr(scores, name) == measure(published, truth.numpy())
    with pytest.raises(ValueError, match=r"\[3, 4\] and truth \[4, 3\] must have the same size"):
        score(logits, truth.T)
    logits[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        score(logits, truth)


def test_means_and_differences() -> None:
    base, other = [Scores(*[value] * 6) for value in (0.2, 0.4)], [Scores(*[value] * 6) for value in (0.3, 0.9)]
    assert mean_scores(base).mae == pytest.approx(0.3)
    lead = difference(base, other)["iou"]
    assert lead.mean == pytest.approx(0.3)
    assert lead.error == pytest.approx(0.2)  # the leads are 0.1 and 0.5: a deviation of 0.2·√2, over √2
    assert math.isnan(difference(base[:1], other[:1])["iou"].error)


# --- against the reference -------------------------------------------------------------------------------------------


def predictions(rng: np.random.Generator, size: tuple[int, int]) -> dict[str, np.ndarray]:
    noise = rng.random(size)
    return {
        "noise": noise,
        "smooth": as_published(ndimage.gaussian_filter(noise, 2)),
        "binary": (noise > 0.5).astype(float),
        "black": np.zeros(size),
        "white": np.ones(size),
        "faint": noise / 100,
    }


def truths(rng: np.random.Generator, size: tuple[int, int]) -> dict[str, np.ndarray]:
    noise = rng.random(size)
    smooth = ndimage.gaussian_filter(noise, 2)
    one = np.zeros(size, bool)
    one[size[0] // 3, size[1] // 3] = True
    return {
        "blobs": smooth > np.median(smooth),
        "specks": noise > 0.9,
        "holes": noise > 0.1,
        "one pixel": one,
        "all but one": ~one,
        "empty": np.zeros(size, bool),
        "full": np.ones(size, bool),
    }


def reference(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    import py_sod_metrics

    measures = [py_sod_metrics.MAE(), py_sod_metrics.Smeasure(), py_sod_metrics.Emeasure()]
    measures.append(py_sod_metrics.WeightedFmeasure())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # its mean of no pixels
        for measure in measures:
            measure.step(prediction, truth, normalize=False)
    m, s, e, w = measures
    return {
        "mae": m.maes[0],
        "s_measure": s.sms[0],
        "mean_e": e.changeable_ems[0].mean(),
        "weighted_f": w.weighted_fms[0],
    }


@needs_oracle
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_same_numbers_as_pysodmetrics(size: tuple[int, int]) -> None:
    compared = 0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        for truth_kind, truth in truths(rng, size).items():
            for prediction_kind, prediction in predictions(rng, size).items():
                expected = reference(prediction, truth)
                for name, measure in MEASURES.items():
                    value = measure(prediction, truth)
                    if name == "s_measure" and math.isnan(expected[name]):
                        assert 0 <= value <= 1  # the object's centroid is in the last row or column
                        continue
                    compared += 1
                    assert value == pytest.approx(expected[name], abs=1e-9), (name, prediction_kind, truth_kind, seed)
    assert compared > 300


@needs_oracle
def test_the_same_numbers_as_pysodmetrics_on_files() -> None:
    """Its usual way: grey levels and a 0/255 mask in, stretched by it. Ours from the probabilities."""
    import py_sod_metrics

    rng = np.random.default_rng(0)
    probability = 0.1 + 0.7 * as_published(ndimage.gaussian_filter(rng.random((60, 80)), 3))
    truth = ndimage.gaussian_filter(rng.random((60, 80)), 3) > 0.5
    grey, black_and_white = to_levels(probability), truth.astype(np.uint8) * 255
    oracle = py_sod_metrics.WeightedFmeasure()
    oracle.step(grey, black_and_white)
    assert weighted_f(as_published(probability), truth) == pytest.approx(oracle.weighted_fms[0], abs=1e-12)
    errors = py_sod_metrics.MAE()
    errors.step(grey, black_and_white)
    assert mae(as_published(probability), truth) == pytest.approx(errors.maes[0], abs=1e-12)


def test_the_smoothing_kernel_is_matlabs() -> None:
    kernel = np.outer(metrics._GAUSSIAN, metrics._GAUSSIAN)
    y, x = np.mgrid[-3:4, -3:4]
    expected = np.exp(-(x**2 + y**2) / (2 * 5**2))
    np.testing.assert_allclose(kernel, expected / expected.sum(), rtol=1e-14)
