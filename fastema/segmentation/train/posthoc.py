"""Snapshots during a run (--snapshots), and the best average that can be made from them at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader

from fastema import FastEMA
from fastema.posthoc import Averaged, Snapshots, power, snapshots_in, synthesize_all
from fastema.posthoc.profiles import fit
from fastema.segmentation.console import say
from fastema.segmentation.eval.scores import evaluate
from fastema.segmentation.model.network import Architecture, create_net

BEST_POSTHOC = "best_posthoc.pth"
#: Widths that are tried, besides the stored ones: 12 from 0.03 to 0.25 with equal ratios.
_TRIED = [round(0.03 * (0.25 / 0.03) ** (i / 11), 4) for i in range(12)]
_MAX_ERROR = 0.10


class RunSnapshots:
    """Saves evenly spaced snapshots of a run's averages, the last after its last step.

    Args:
        folder: of the snapshots.
        ema: with power profiles, after a checkpoint is loaded.
        count: of snapshots.
        total_steps: from the start of the averages to the end of the run.
    """

    def __init__(self, folder: Path, ema: FastEMA, count: int, total_steps: int) -> None:
        self._ema = ema
        self._snapshots = Snapshots(folder, ema, limit=count, verbose=False)
        self._due = {max(1, round(total_steps * (i + 1) / count)) for i in range(count)}
        self._last = 0

    def disk_use(self) -> str:
        """Return a line that says what the snapshots will take."""
        return self._snapshots.disk_use().removeprefix("fastema: ")

    def save_if_due(self) -> None:
        """Save a snapshot if one is due after this step. All processes must call this."""
        if self._ema.num_updates in self._due:
            self._save()

    def save_last(self) -> None:
        """Save one at the end of the run, whose last steps a gradient scaler may have skipped."""
        if self._ema.num_updates > self._last:
            self._save()

    def _save(self) -> None:
        self._snapshots.save()
        self._last = self._ema.num_updates


@dataclass(frozen=True)
class Best:
    """The average with the highest validation IoU.

    Args:
        sigma_rel: its width.
        iou: on the validation images.
        weights: a state dict, and how it was made.
    """

    sigma_rel: float
    iou: float
    weights: Averaged

    def plain(self) -> dict[str, Any]:
        """Return what a checkpoint says about it."""
        return {"sigma_rel": self.sigma_rel, "iou": self.iou, "error": self.weights.error, "step": self.weights.step}


def best_average(
    folder: Path,
    architecture: Architecture,
    stored: tuple[float, ...],
    loader: DataLoader,
    device: torch.device,
    console: Console,
    score: Callable[..., list[float]] = evaluate,
) -> Best:
    """Return the average of the last step whose IoU is highest, among the widths that the snapshots reach.

    Args:
        folder: of the snapshots.
        architecture: of the network.
        stored: sigma_rel of the snapshots' averages.
        loader: of all validation images.
        device: to validate on.
        console: to print each width's IoU to.
        score: returns the IoU per image.

    Raises:
        SnapshotError: no snapshots, or a damaged one.
    """
    manifests = snapshots_in(folder)
    sigmas = sorted({*_TRIED, *stored})
    have = [(profile, each.step) for each in manifests for profile in each.profiles]
    fits = fit(have, [power(sigma) for sigma in sigmas], manifests[-1].step)
    sigmas = [sigma for sigma, found in zip(sigmas, fits, strict=True) if found.error <= _MAX_ERROR]
    averages = synthesize_all(folder, [power(sigma) for sigma in sigmas], max_error=_MAX_ERROR)
    net = create_net(architecture, pretrained=False)[0].to(device)
    ious = []
    say(console, f"Post-hoc averages of step {manifests[-1].step:,}, from {len(manifests)} snapshots:")
    for sigma, weights in zip(sigmas, averages, strict=True):
        net.load_state_dict(weights)
        ious.append(fmean(score(net, loader, device)))
        say(console, f"  sigma_rel {sigma:<6g}  profile error {weights.error:6.2%}  IoU {ious[-1]:.4f}")
    best = max(range(len(sigmas)), key=ious.__getitem__)
    at_an_end = best in (0, len(sigmas) - 1) and len(sigmas) > 1
    say(
        console,
        f"Best:   sigma_rel {sigmas[best]:g}, IoU {ious[best]:.4f}"
        + ("; at an end of what was tried, so a value beyond may be better still" if at_an_end else ""),
    )
    return Best(sigmas[best], ious[best], averages[best])
