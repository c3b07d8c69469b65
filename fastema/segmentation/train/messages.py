"""What a run says as it goes, beside its tables and bars: a line an epoch, and everything else only when it is news."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console
from torch import nn

from fastema.segmentation.distributed.process_group import Processes
from fastema.segmentation.model.experts import expert_names
from fastema.segmentation.options import TrainOptions
from fastema.segmentation.report.history import EpochRecord
from fastema.segmentation.train.advice import latest_finding, outlook
from fastema.segmentation.train.averages import Averages
from fastema.segmentation.train.stages import Stage
from fastema.segmentation.train.usage import idle_experts, usage_line

_LONG_WAIT = 0.2  # share of the training time spent waiting for images that is worth a word


class Announcements:
    """Prints to a console, and remembers what was said last of each topic.

    Args:
        console: where to.
        options: of the run.
    """

    def __init__(self, console: Console, options: TrainOptions) -> None:
        self._console = console
        self._options = options
        self._last: dict[str, object] = {}

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def is_news(self, topic: str, what: object) -> bool:
        """Whether this is other than what was said of the topic last; from now on it is what was."""
        before = self._last.get(topic)
        self._last[topic] = what
        return before != what

    def model(self, net: nn.Module, weights: str, device: torch.device, processes: Processes) -> None:
        """What is trained, from which weights, and where."""
        options = self._options
        parameters = sum(parameter.numel() for parameter in net.parameters())
        experts = f"{options.num_experts} experts a level, {options.top_k} an image" if options.num_experts else ""
        what = ", ".join(filter(None, (options.backbone, experts)))
        self.say(f"Model: {what}; {parameters / 1e6:.1f} M parameters")
        precision = options.amp if options.amp != "none" else ""
        where = ", ".join(filter(None, (f"on {device}", precision, processes.described(options.fsdp))))
        self.say(f"       weights: {options.resume_from or weights}; {where}")

    def averages(self, averages: Averages, updates_per_epoch: int) -> None:
        """Which averages there are from here on, and what to expect of each."""
        options, several = self._options, len(averages.names) > 1
        decays = f"{'decays' if several else 'decay'} {', '.join(averages.names)}"
        self.say(f"EMA: {decays}, {options.ema_decay_type}, backend {averages.ema.backend_name}")
        for name, decay in zip(averages.names, options.decays, strict=True):
            expected = outlook(decay, options.ema_decay_type, updates_per_epoch, averages.total_steps)
            self.say(f"{f'EMA {name}' if several else 'EMA'}: {expected}")

    def stage(self, stage: Stage, opened: int, levels: int) -> None:
        """What trains from here on: `opened` of the backbone's `levels` levels."""
        if not self.is_news("stage", (stage.number, opened)):
            return
        images = f"{stage.group_size} images a step"
        if stage.group_size > stage.batch_size:
            images += f" in batches of {stage.batch_size}"
        if stage.number == 1:
            what = "the decoder trains, the backbone is frozen"
        elif opened < levels:
            what = f"the decoder and the deepest {opened} of {levels} levels of the backbone train"
        else:
            what = "everything trains, the backbone at a tenth of the rate"
        self.say(f"Stage {stage.number}: {what}; {images}")

    def epoch(self, history: Sequence[EpochRecord], averages: Averages | None, updates_per_epoch: int) -> None:
        """The last epoch's line; and one more for whatever is other than after the epoch before."""
        record = history[-1]
        self.say(record.line("" if averages is None else averages.names[0]))
        if record.expert_usage:
            names = expert_names(self._options.num_experts)
            self.say(usage_line(names, record.expert_usage))
            idle = idle_experts(names, record.expert_usage)
            if self.is_news("idle", idle) and idle:
                self.say(f"Experts: hardly learning, since chosen for less than 1 % of the images: {', '.join(idle)}")
        if record.data_wait >= _LONG_WAIT and self.is_news("data", True):
            self.say(
                f"Data: {record.data_wait:.0%} of the training time went by waiting for images; try more --num-workers "
                f"than {self._options.num_workers}"
            )
        if averages is not None:
            self._finding(history, averages, updates_per_epoch)

    def _finding(self, history: Sequence[EpochRecord], averages: Averages, updates_per_epoch: int) -> None:
        """What the advisor sees in the main average."""
        finding = latest_finding(
            [record.iou for record in history],
            [record.ema_iou for record in history],
            self._options.decays[0],
            self._options.ema_decay_type,
            updates_per_epoch,
            averages.total_steps,
        )
        if finding is not None and self.is_news("advice", finding.kind):
            self.say(f"EMA: {finding.text} {finding.next_step}")
