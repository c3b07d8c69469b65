"""The output of a run beside its bars and tables: a line an epoch, and other messages when they change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fastema.advisor import Finding, diagnose, expect, lag, settle_epochs, window
from fastema.core.checks import counted
from fastema.core.decays import Decays
from fastema.schedules import gamma_of
from fastema.segmentation.console import say
from fastema.segmentation.distributed.process_group import Processes
from fastema.segmentation.model.experts import expert_names
from fastema.segmentation.options import TrainOptions
from fastema.segmentation.report.history import EpochRecord
from fastema.segmentation.train.averaging import Averages
from fastema.segmentation.train.stages import Stage

# With fewer epochs, a finding could be chance.
_EPOCHS_FOR_A_FINDING = 3
# Chosen for a smaller share of the images on every level, an expert hardly learns.
_IDLE = 0.01
# Share of the training time spent waiting for images that is reported.
_LONG_WAIT = 0.2
# The advisor's names of our learning-rate schedules, where they differ.
_LR_SCHEDULES = {"cosine_restart": "restarts", "onecycle": "cosine", "none": "constant"}


class Messages:
    """Print a run's messages to a console, and remember the last one on each topic."""

    def __init__(self, console: Console, options: TrainOptions) -> None:
        self._console = console
        self._options = options
        self._last: dict[str, object] = {}

    def say(self, text: str) -> None:
        say(self._console, text)

    def changed(self, topic: str, message: object) -> bool:
        """Return whether a message differs from the last one on its topic, and remember it."""
        before = self._last.get(topic)
        self._last[topic] = message
        return before != message

    def model(self, net: nn.Module, weights: str, device: torch.device, processes: Processes) -> None:
        """Print what is trained, from which weights, and where."""
        options = self._options
        millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
        experts = f", {options.num_experts} experts a level, {options.top_k} an image" if options.num_experts else ""
        self.say(f"Model: {options.backbone}{experts}; {millions:.1f} M parameters")
        place = f"on {device}" if options.amp == "none" else f"on {device}, {options.amp}"
        if options.fsdp or processes.world_size > 1:
            place += f", {'sharded over' if options.fsdp else 'on'} {processes.world_size} processes"
        self.say(f"       weights: {options.resume_from or weights}; {place}")

    def averages(self, averages: Averages, updates_per_epoch: int, is_new: bool = True) -> None:
        """Print which averages start or go on, and what to expect of them."""
        options, names, total = self._options, averages.names, averages.total_steps
        if options.ema_profiles:
            self.say(f"EMA: {', '.join(names)}, power profiles, backend {averages.ema.backend_name}")
            for name, sigma in zip(names, options.ema_profiles, strict=True):
                age = 1 / (gamma_of(sigma) + 2)
                self.say(f"EMA {name}: mean age {age:.1%} of the run, {age * total:,.0f} updates at its end")
        else:
            plural = "s" if len(names) > 1 else ""
            backend = averages.ema.backend_name
            self.say(f"EMA: decay{plural} {', '.join(names)}, {options.ema_decay_type}, backend {backend}")
            for decay, same in averages.decays.items():
                if same:
                    self.say(
                        f"EMA: {', '.join(f'{each:g}' for each in same)} left out: in a run of {total:,} updates the "
                        f"threshold schedule makes it the same average as {decay:g}"
                    )
            for name, decay in zip(names, averages.decays, strict=True):
                args = options.ema_decay_args or {}
                expected = describe_window(decay, options.ema_decay_type, updates_per_epoch, total, **args)
                self.say(f"{f'EMA {name}' if plural else 'EMA'}: {expected}")
        if not is_new:
            return
        schedule = _LR_SCHEDULES.get(options.scheduler, options.scheduler)
        self.say(f"EMA: {expect(max(1, total), schedule, options.min_lr / options.second_lr).text}")

    def stage(self, stage: Stage, opened: int, levels: int) -> None:
        """Print what trains, if that changes: `opened` of the backbone's `levels` levels."""
        if not self.changed("stage", (stage.number, opened)):
            return
        images = f"{stage.group_size} images a step"
        if stage.group_size > stage.batch_size:
            images += f" in batches of {stage.batch_size}"
        if stage.number == 1:
            parts = "the decoder trains, the backbone is frozen"
        elif opened < levels:
            parts = f"the decoder and the deepest {opened} of {levels} levels of the backbone train"
        else:
            parts = "everything trains, the backbone at a tenth of the rate"
        self.say(f"Stage {stage.number}: {parts}; {images}")

    def epoch(self, history: Sequence[EpochRecord], averages: Averages, updates_per_epoch: int) -> None:
        """Print the last epoch's line, and what changed since the epoch before."""
        record, options = history[-1], self._options
        self.say(record.line(*averages.names[:1]))
        if record.expert_usage:
            names = expert_names(options.num_experts)
            self.say(usage_line(names, record.expert_usage))
            idle = idle_experts(names, record.expert_usage)
            if self.changed("idle", idle) and idle:
                self.say(f"Experts: hardly learning, since chosen for less than 1 % of the images: {', '.join(idle)}")
        if record.data_wait >= _LONG_WAIT and self.changed("data", True):
            self.say(
                f"Data: {record.data_wait:.0%} of the training time went by waiting for images; try more --num-workers "
                f"than {options.num_workers}"
            )
        if not averages.decays:  # a profile's window grows with the run
            return
        finding = latest_finding(
            [record.iou for record in history],
            [record.ema_iou for record in history],
            next(iter(averages.decays)),
            options.ema_decay_type,
            updates_per_epoch,
            averages.total_steps,
            **(options.ema_decay_args or {}),
        )
        # Each kind once: near the noise, findings alternate from epoch to epoch.
        if finding is not None and self.changed(f"finding {finding.kind}", True):
            self.say(f"EMA: {finding.text} {finding.next_step}")


def describe_window(
    decay: float, decay_type: str, updates_per_epoch: int, total_steps: int, **decay_args: float
) -> str:
    """Describe window, lag and the wait before an average can be judged; of a schedule, its final window."""
    if decay == 1.0:
        return "decay 1 never moves from the weights it starts with"
    settle = settle_epochs(decay, updates_per_epoch, decay_type=decay_type, total_steps=total_steps, **decay_args)
    # A schedule drops the starting weights at once, but still has to fill the widest window that it gets to.
    decays = Decays(decay, decay_type, total_steps, 0, decay_args)
    last = max(decays.at(step)[0] for step in (1, max(1, total_steps)))
    epochs = lag(last, updates_per_epoch)
    wait = max(settle, epochs)
    # The threshold schedule's window grows with the run, and so fits it.
    if decay_type != "threshold" and wait * updates_per_epoch > max(total_steps, updates_per_epoch):
        # With this constant decay, 5 % of the average are starting weights at the end.
        fitting = math.floor(1000 * 0.05 ** (1 / max(1, total_steps))) / 1000
        run = counted(math.ceil(total_steps / updates_per_epoch), "epoch")
        judge = (
            f"that never settles in the {run} it runs for: --ema-decay {fitting:g} or less would, or --ema-decay-type "
            "threshold"
        )
    else:
        judge = f"judge it after {counted(math.ceil(wait), 'epoch')}"
    return f"looks back over up to {counted(round(window(last)), 'update')}, {epochs:.3g} epochs; {judge}"


def latest_finding(
    base: Sequence[float],
    ema: Sequence[float | None],
    decay: float,
    decay_type: str,
    updates_per_epoch: int,
    total_steps: int,
    **decay_args: float,
) -> Finding | None:
    """Return the advisor's most urgent finding, or None while there are too few epochs.

    A run that was resumed without its average for a while has a gap in `ema`: only the epochs after it count.
    """
    start = max((i + 1 for i, value in enumerate(ema) if value is None), default=0)
    if len(ema) - start < _EPOCHS_FOR_A_FINDING:
        return None
    averaged = [None] * start + list(ema[start:])
    schedule: dict[str, Any] = {"decay_type": decay_type, "total_steps": total_steps, **decay_args}
    return diagnose(base, averaged, decay, updates_per_epoch, **schedule)[0]


def usage_line(names: Sequence[str], usage: Sequence[Sequence[float]]) -> str:
    """Format each expert's share of the images, the most chosen first; `usage` is [levels][experts]."""
    means = sorted((fmean(shares), name) for name, shares in zip(names, zip(*usage, strict=True), strict=True))
    listed = ", ".join(f"{name} {mean:.0%}" for mean, name in reversed(means))
    return f"  Experts, share of images (mean of {len(usage)} levels): {listed}"


def idle_experts(names: Sequence[str], usage: Sequence[Sequence[float]]) -> list[str]:
    """Return the experts that hardly any image chose on any level."""
    return [name for name, shares in zip(names, zip(*usage, strict=True), strict=True) if max(shares) < _IDLE]
