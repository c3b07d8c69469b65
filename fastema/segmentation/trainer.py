"""The training loop: one stage, base and EMA validated after every epoch, in one process and with one model.

Everything that an epoch depends on is a function of seed and epoch (order, augmentation, dropout) or of the number of
optimizer steps (learning rate). So a run that is resumed from a checkpoint goes on as if it had not been interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fastema import FastEMA
from fastema.advisor import should_start
from fastema.checkpoint import load_checkpoint, load_weights, save_checkpoint
from fastema.segmentation.advice import latest_finding, outlook
from fastema.segmentation.backbones import check_input_size, create_backbone
from fastema.segmentation.comparison import Comparison
from fastema.segmentation.costs import Costs
from fastema.segmentation.datasets import (
    EpochSampler,
    TrainingSet,
    Validation,
    ValidationSet,
    seed_of,
    training_loader,
    validation_loader,
)
from fastema.segmentation.errors import UserError
from fastema.segmentation.evaluation import evaluate, predict
from fastema.segmentation.history import EpochRecord, write_csv
from fastema.segmentation.layout import Pair
from fastema.segmentation.learning_rate import CosineSchedule
from fastema.segmentation.losses import structure_loss
from fastema.segmentation.model import SegmentationNet
from fastema.segmentation.options import TrainOptions
from fastema.segmentation.pictures import Example, write_predictions
from fastema.segmentation.progress import progress
from fastema.segmentation.report import print_report

_EXAMPLES = 4


class Trainer:
    """One run of `fastema train`.

    Args:
        options: checked options.
        training: what to train on.
        validation: what to validate on, after every epoch.
        console: where progress and results go.

    Raises:
        UserError: the backbone, the device or the checkpoint to resume from cannot be used.
        CheckpointError: the checkpoint to resume from is not readable, or of another model.
    """

    def __init__(
        self, options: TrainOptions, training: Sequence[Pair], validation: Sequence[Pair], console: Console
    ) -> None:
        self.options = options
        self.console = console
        self.costs = Costs()
        self.history: list[EpochRecord] = []
        self._last_finding: str | None = None
        self.device = _device(options.device)
        self._validation_pairs = validation

        self._sampler = EpochSampler(len(training), options.seed)
        training_set = TrainingSet(training, options.img_size)
        validation_set = ValidationSet(validation, options.img_size)
        self._training = training_loader(training_set, self._sampler, options.batch_size, options.num_workers)
        self._validation = validation_loader(validation_set, options.batch_size, options.num_workers)
        self._group_size = options.batch_size * options.accumulation_steps  # images an optimizer step
        self.steps_per_epoch = math.ceil(len(training) / self._group_size)
        self._schedule = CosineSchedule(
            options.lr,
            options.min_lr,
            options.warmup_epochs * self.steps_per_epoch,
            options.epochs * self.steps_per_epoch,
        )

        resumed = None if options.resume_from is None else _resumable(options.resume_from, options)
        torch.default_generator.manual_seed(seed_of(options.seed))
        self.net = self._build_net(pretrained=options.pretrained and resumed is None)
        self.optimizer = torch.optim.AdamW(_parameter_groups(self.net, options.weight_decay), lr=options.lr)
        if resumed is not None:
            self._resume_training(resumed)
        # Bests count from here when the run goes on in another folder: that folder needs best files of its own.
        self._bests_after = 0 if _is_inside(options.resume_from, options.checkpoint_dir) else self.epoch
        # Only now: built before the checkpoint is loaded, the EMA would average from the initial weights.
        self.ema: FastEMA | None = None
        if options.use_ema and (options.ema_start == "now" or (resumed is not None and "ema" in resumed)):
            self.ema = self._build_ema(resumed)
        elif options.use_ema:
            self._say("EMA: waits until the base IoU says that it pays (--ema-start auto)")
            self._start_ema_when_it_pays()
        if resumed is not None and "ema" in resumed and self.ema is None:
            self._say(f"The EMA in {options.resume_from} is left behind: --use-ema is not given")

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return self.history[-1].epoch if self.history else 0

    def fit(self) -> None:
        """Trains to the last epoch; writes checkpoints, history, report and picture.

        Raises:
            UserError: the loss is not finite any more; names the last good checkpoint.
        """
        ious: tuple[list[float], list[float] | None] = ([], None)
        for epoch in range(self.epoch + 1, self.options.epochs + 1):
            started = time.perf_counter()
            loss = self._train_epoch(epoch)
            ious = self._validate()
            self._record(epoch, loss, ious, time.perf_counter() - started)
            self.console.print(self.history[-1].line(), highlight=False, markup=False, soft_wrap=True)
            self._say_what_changed()
            self._start_ema_when_it_pays()
            self._save()
        self._report(*ious)

    # --- building ----------------------------------------------------------------------------------------------------

    def _build_net(self, pretrained: bool) -> SegmentationNet:
        backbone = create_backbone(self.options.backbone, pretrained)
        net = SegmentationNet(backbone.module, backbone.channels, backbone.mean, backbone.std)
        check_input_size(net, self.options.backbone, self.options.img_size)
        parameters = sum(parameter.numel() for parameter in net.parameters())
        source = backbone.weights if self.options.resume_from is None else f"{self.options.resume_from}"
        self._say(f"Model: {self.options.backbone}, {parameters / 1e6:.1f} M parameters; weights: {source}")
        return net.to(self.device)

    def _build_ema(self, resumed: dict[str, Any] | None) -> FastEMA:
        options = self.options
        try:
            ema = FastEMA(
                self.net,
                options.ema_decay,
                decay_type=options.ema_decay_type,
                total_steps=options.epochs * self.steps_per_epoch,
            )
            if resumed is not None and "ema" in resumed:
                ema.load_state_dict(resumed["ema"])
        except ValueError as error:
            raise UserError(f"the EMA cannot be set up: {error}") from error
        if resumed is not None and "ema" not in resumed:
            self._say(f"{options.resume_from} has no EMA: it starts here, from the weights of epoch {self.epoch}")
        self._say(f"EMA: decay {options.ema_decay:g}, {options.ema_decay_type}, backend {ema.backend_name}")
        total_steps = options.epochs * self.steps_per_epoch
        self._say(f"EMA: {outlook(options.ema_decay, options.ema_decay_type, self.steps_per_epoch, total_steps)}")
        return ema

    def _resume_training(self, checkpoint: dict[str, Any]) -> None:
        origin = self.options.resume_from
        load_weights(self.net, checkpoint, prefer="net")
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.history = [EpochRecord(**record) for record in checkpoint["history"]]
        changed = [
            f"--{name.replace('_', '-')} {checkpoint['options'].get(name)} → {value}"
            for name, value in self.options.plain().items()
            if name not in ("resume_from", "checkpoint_dir") and checkpoint["options"].get(name) != value
        ]
        self._say(f"Resuming from {origin} after epoch {self.epoch}" + (f"; {', '.join(changed)}" if changed else ""))
        if self.epoch >= self.options.epochs:
            raise UserError(
                f"{origin} has done its {self.epoch} epochs: --epochs is the total, so give more than {self.epoch}"
            )

    def _start_ema_when_it_pays(self) -> None:
        """With --ema-start auto, and as long as there is no average: asks the advisor."""
        if self.ema is not None or not self.options.use_ema or not self.history:
            return
        advice = should_start([record.iou for record in self.history])
        if advice.action == "start" and self.epoch < self.options.epochs:
            self._say(f"EMA: starts after epoch {self.epoch}, {advice.pattern}: {advice.reason}")
            self.ema = self._build_ema(None)
        elif advice.action != "start" and advice.pattern != self._last_finding:
            self._last_finding = advice.pattern
            self._say(f"EMA: not started, {advice.pattern}: {advice.reason}")

    def _say_what_changed(self) -> None:
        """One line when the advisor sees something else than after the epoch before."""
        if self.ema is None:
            return
        finding = latest_finding(
            [record.iou for record in self.history],
            [record.ema_iou for record in self.history],
            self.options.ema_decay,
            self.options.ema_decay_type,
            self.steps_per_epoch,
            self.options.epochs * self.steps_per_epoch,
        )
        if finding is not None and finding.kind != self._last_finding:
            self._last_finding = finding.kind
            self._say(f"EMA: {finding.text} {finding.next_step}")

    # --- an epoch ----------------------------------------------------------------------------------------------------

    def _train_epoch(self, epoch: int) -> float:
        """Returns the mean loss over the epoch's images."""
        self._sampler.epoch = epoch
        torch.manual_seed(seed_of(self.options.seed, epoch))
        self.net.train()
        step = (epoch - 1) * self.steps_per_epoch
        images_left = len(self._sampler)
        group_left = group = min(self._group_size, images_left)
        loss_sum = 0.0
        step_started = time.perf_counter()
        title = f"Epoch {epoch}/{self.options.epochs}"
        with progress(self.console, title, len(self._training)) as bar:
            for images, masks in self._training:
                loss = structure_loss(self.net(images.to(self.device)), masks.to(self.device))
                value = self._finite(loss, epoch)
                # By images, not by batches: a short last batch or group counts for what it has.
                (loss * (len(images) / group)).backward()
                loss_sum += value * len(images)
                images_left -= len(images)
                group_left -= len(images)
                if group_left == 0:
                    step += 1
                    self._optimizer_step(step, epoch)
                    group_left = group = min(self._group_size, images_left)
                    self.costs.step.append(time.perf_counter() - step_started)
                    step_started = time.perf_counter()
                bar.advance(f"loss {loss_sum / (len(self._sampler) - images_left):.4f}")
        return loss_sum / len(self._sampler)

    def _optimizer_step(self, step: int, epoch: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._schedule.at(step)
        limit = self.options.clip_grad or math.inf
        self._finite(nn.utils.clip_grad_norm_(self.net.parameters(), limit), epoch, "gradient")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            with self.costs.timed(self.costs.update):
                self.ema.update()

    def _finite(self, tensor: torch.Tensor, epoch: int, what: str = "loss") -> float:
        value = tensor.item()
        if math.isfinite(value):
            return value
        last = self._file("last.pth")
        good = f"the last good checkpoint is {last} (epoch {self.epoch})" if self.epoch else "no epoch was finished yet"
        raise UserError(
            f"the {what} became {value} in epoch {epoch}; {good}. Try a lower --lr, --warmup-epochs, or a smaller "
            "--clip-grad"
        )

    def _validate(self) -> tuple[list[float], list[float] | None]:
        """The IoU per image of the trained weights, and of the averaged ones."""
        base = evaluate(self.net, self._validation, self.device)
        if self.ema is None:
            return base, None
        with self.ema.swapped():
            return base, evaluate(self.net, self._validation, self.device)

    def _record(self, epoch: int, loss: float, ious: tuple[list[float], list[float] | None], seconds: float) -> None:
        base, averaged = ious
        ema_decay = None if self.ema is None else float(self.ema.decay_at(self.ema.num_updates))
        self.history.append(
            EpochRecord(
                epoch=epoch,
                loss=loss,
                iou=fmean(base),
                ema_iou=None if averaged is None else fmean(averaged),
                lr=self.optimizer.param_groups[0]["lr"],
                ema_decay=ema_decay,
                seconds=seconds,
            )
        )

    # --- what is written ---------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Writes `last.pth`, and the best ones where this epoch is the best so far."""
        record = self.history[-1]
        rivals = [earlier for earlier in self.history if earlier.epoch > self._bests_after]
        targets = ["last.pth"]
        if record.iou >= max(rival.iou for rival in rivals):
            targets.append("best_model.pth")
        averaged = [rival.ema_iou for rival in rivals if rival.ema_iou is not None]
        if record.ema_iou is not None and record.ema_iou >= max(averaged):
            targets.append("best_ema.pth")
        for name in targets:
            save_checkpoint(
                self._file(name),
                net=self.net,
                ema=self.ema,
                optimizer=self.optimizer,
                epoch=record.epoch,
                history=[asdict(earlier) for earlier in self.history],
                options=self.options.plain(),
            )
        write_csv(self._file("history.csv"), self.history)

    def _report(self, base: list[float], averaged: list[float] | None) -> None:
        comparison = None
        if self.ema is not None and averaged is not None:
            self.costs.measure_swaps(self.ema)
            decay = float(self.ema.decay_at(self.ema.num_updates))
            comparison = Comparison(
                base,
                averaged,
                updates=self.ema.num_updates,
                window=math.inf if decay == 1 else 1 / (1 - decay),
                updates_per_epoch=self.steps_per_epoch,
                final_rate=self.history[-1].lr / self.options.lr,
            )
        write_predictions(self._file("predictions.png"), self._examples())
        names = ("best_model.pth", "best_ema.pth", "last.pth", "history.csv", "predictions.png")
        files = [self._file(name) for name in names if self._file(name).exists()]
        print_report(self.console, self.history, comparison, self.costs, files)

    def _examples(self) -> list[Example]:
        """The first few validation images with what the weights after the last epoch predict."""
        self.net.eval()
        batch: Validation = next(iter(self._validation))
        columns = {"base": predict(self.net, batch, self.device)}
        if self.ema is not None:
            with self.ema.swapped():
                columns["EMA"] = predict(self.net, batch, self.device)
        return [
            Example(
                self._validation_pairs[i].stem,
                batch.images[i],
                batch.masks[i],
                {name: predictions[i] for name, predictions in columns.items()},
            )
            for i in range(min(_EXAMPLES, len(batch.masks)))
        ]

    def _file(self, name: str) -> Path:
        return self.options.checkpoint_dir / name

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _parameter_groups(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay is for weights: biases and normalisation have one dimension and go without."""
    weights = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in net.parameters() if parameter.ndim <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _resumable(path: Path, options: TrainOptions) -> dict[str, Any]:
    checkpoint = load_checkpoint(path)
    missing = [name for name in ("net", "optimizer", "history", "options") if name not in checkpoint]
    if missing:
        raise UserError(
            f"{path} cannot be resumed from: it has no {', '.join(missing)}; was it written by fastema train?"
        )
    trained = checkpoint["options"].get("backbone")
    if trained != options.backbone:
        raise UserError(f"{path} was trained with --backbone {trained}, not {options.backbone}")
    return checkpoint


def _is_inside(file: Path | None, folder: Path) -> bool:
    return file is not None and folder.resolve() in file.resolve().parents


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
