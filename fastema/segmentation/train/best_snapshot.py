"""The best average that can be made from a run's snapshots (--snapshots), at its end."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader

from fastema.checkpoint import save_checkpoint
from fastema.posthoc import Averaged, power, snapshots_in, synthesize_all
from fastema.posthoc.profiles import fit
from fastema.segmentation.console import say
from fastema.segmentation.eval.scores import evaluate
from fastema.segmentation.model.network import Architecture, create_net
from fastema.segmentation.options import TrainOptions
from fastema.segmentation.report.history import EpochRecord
from fastema.segmentation.train.averaging import SavedAverage
from fastema.segmentation.train.checkpoints import BEST_POSTHOC, SNAPSHOTS

#: Widths that are tried, besides the stored ones: 12 from 0.03 to 0.25 with equal ratios.
_TRIED = [round(0.03 * (0.25 / 0.03) ** (i / 11), 4) for i in range(12)]
_MAX_ERROR = 0.10


def write_best_posthoc(
    options: TrainOptions,
    trained: dict[str, Any],
    record: EpochRecord,
    loader: DataLoader,
    device: torch.device,
    console: Console,
) -> None:
    """Write `best_posthoc.pth`: of the averages that the snapshots reach, the one with the highest validation IoU.

    Its `net` is `trained`, the run's weights, not sharded, of the epoch of `record`. The loader has all validation
    images.

    Raises:
        SnapshotError: no snapshots, or a damaged one.
    """
    sigma, iou, average = _best(options, record.iou, loader, device, console)
    path = options.checkpoint_dir / BEST_POSTHOC
    save_checkpoint(
        path,
        net=trained,  # type: ignore[arg-type]
        ema=SavedAverage(False, {}, average),
        epoch=record.epoch,
        options=options.plain(),
        posthoc={"sigma_rel": sigma, "iou": iou, "error": average.error, "step": average.step},
    )
    say(console, f"File:   {path}, its ema_net is this average")


def _best(
    options: TrainOptions, base: float, loader: DataLoader, device: torch.device, console: Console
) -> tuple[float, float, Averaged]:
    folder = options.checkpoint_dir / SNAPSHOTS
    manifests = snapshots_in(folder)
    sigmas = sorted({*_TRIED, *options.ema_profiles})
    have = [(profile, each.step) for each in manifests for profile in each.profiles]
    fits = fit(have, [power(sigma) for sigma in sigmas], manifests[-1].step)
    sigmas = [sigma for sigma, found in zip(sigmas, fits, strict=True) if found.error <= _MAX_ERROR]
    averages = synthesize_all(folder, [power(sigma) for sigma in sigmas], max_error=_MAX_ERROR)
    architecture = Architecture(options.backbone, options.num_experts, options.top_k)
    net = create_net(architecture, pretrained=False)[0].to(device)
    ious = []
    say(console, f"Post-hoc averages of step {manifests[-1].step:,}, from {len(manifests)} snapshots:")
    say(console, f"  {'base, of the last epoch':<39}  IoU {base:.4f}")
    for sigma, weights in zip(sigmas, averages, strict=True):
        net.load_state_dict(weights)
        ious.append(fmean(evaluate(net, loader, device)))
        say(console, f"  sigma_rel {sigma:<6g}  profile error {weights.error:6.2%}  IoU {ious[-1]:.4f}")
    best = ious.index(max(ious))
    at_an_end = best in (0, len(sigmas) - 1) and len(sigmas) > 1
    beyond = "; at an end of what was tried, so a value beyond may be better still" if at_an_end else ""
    behind = "; behind the base" if ious[best] < base else ""
    say(console, f"Best:   sigma_rel {sigmas[best]:g}, IoU {ious[best]:.4f}{beyond}{behind}")
    return sigmas[best], ious[best], averages[best]
