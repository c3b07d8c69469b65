"""A run: epochs in two stages, base and averages validated after every one, with one model in each process.

Everything that an epoch depends on is a function of seed and epoch (order, augmentation, dropout, what is frozen) or
of the number of optimizer steps (learning rate). So a run that is resumed from a checkpoint goes on as if it had not
been interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from rich.console import Console

from fastema import FastEMA
from fastema.advisor import should_start
from fastema.checkpoint import CheckpointError, load_weights
from fastema.segmentation.console import progress
from fastema.segmentation.data.listing import Pair
from fastema.segmentation.data.loaders import (
    EpochSampler,
    TrainingSet,
    Validation,
    ValidationSet,
    seed_of,
    share_of,
    training_loader,
    validation_loader,
)
from fastema.segmentation.distributed.parallel import Spread
from fastema.segmentation.distributed.process_group import Processes
from fastema.segmentation.errors import UserError
from fastema.segmentation.eval.evaluation import evaluate, predict
from fastema.segmentation.model.backbones import check_input_size
from fastema.segmentation.model.network import Architecture, SegmentationNet, create_net
from fastema.segmentation.options import TrainOptions
from fastema.segmentation.report.comparison import Comparison
from fastema.segmentation.report.curves import write_curves
from fastema.segmentation.report.history import EpochRecord, append_csv
from fastema.segmentation.report.prediction_grid import Example, write_predictions
from fastema.segmentation.report.summary import print_report
from fastema.segmentation.report.tensorboard import TensorBoardLog
from fastema.segmentation.report.timers import Costs
from fastema.segmentation.train.averages import Averages, evaluate_each
from fastema.segmentation.train.checkpoints import (
    BEST,
    BEST_EMA,
    LAST,
    changes,
    read_resumable,
    restore_rng,
    write_epoch,
)
from fastema.segmentation.train.epoch import EpochResult, train_epoch
from fastema.segmentation.train.messages import Announcements
from fastema.segmentation.train.objective import MakeObjective, supervised
from fastema.segmentation.train.optimizer import NotFiniteError, Optimisation
from fastema.segmentation.train.out_of_memory import shortage_explained
from fastema.segmentation.train.precision import Precision
from fastema.segmentation.train.run_dir import TENSORBOARD, is_inside, require_space
from fastema.segmentation.train.signals import uninterrupted
from fastema.segmentation.train.stages import Stage, freeze, open_levels, stages_of

_EXAMPLES = 4

T = TypeVar("T")

#: IoU per image of the trained weights, and of each average.
Ious = tuple[list[float], list[list[float]]]


class Trainer:
    """One run of `fastema train`.

    Args:
        options: checked options.
        training: what to train on.
        validation: what to validate on, after every epoch.
        console: where progress and results go.
        make_objective: what to train towards; the loss against the masks unless given.
        processes: those of the run, each with a trainer of its own; only this one unless given.

    Raises:
        UserError: the backbone, the device, the precision or the checkpoint to resume from cannot be used.
        CheckpointError: the checkpoint to resume from is not readable, or of another model.
    """

    def __init__(
        self,
        options: TrainOptions,
        training: Sequence[Pair],
        validation: Sequence[Pair],
        console: Console,
        make_objective: MakeObjective = supervised,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        self.processes.check(options, len(training))
        self.options = options
        self.console = console
        self.history: list[EpochRecord] = []
        self.averages: Averages | None = None
        self.device = self.processes.device(options.device)
        self.costs = Costs(device=self.device)
        self.stages = stages_of(options, len(training))
        self._precision = Precision(options.amp, self.device)
        self._tell = Announcements(console, options)
        self._saved: int | None = None  # the epoch of `last.pth`, if this process wrote it

        rank, world_size = self.processes.rank, self.processes.world_size
        self._sampler = EpochSampler(len(training), options.seed, rank, world_size)
        self._training_set = TrainingSet(training, options.img_size)
        self._training: tuple[Stage, Any] | None = None
        self._validation_pairs = validation
        validation_set = ValidationSet(share_of(validation, rank, world_size), options.img_size)
        self._validation = validation_loader(validation_set, options.batch_size // world_size, options.num_workers)

        resumed = None if options.resume_from is None else read_resumable(options.resume_from, options)
        torch.default_generator.manual_seed(seed_of(options.seed))
        self.net = self._build_net(resumed)
        self._levels = self.net.backbone_stages()
        self._spread = Spread(self.net, self.processes, self.device, options.fsdp)
        self.optimisation = Optimisation(self.net, options.weight_decay, options.clip_grad, self._precision)
        if resumed is not None:
            self._resume(resumed)
        # Bests count from here when the run goes on in another folder: that folder needs best files of its own.
        goes_on_here = options.resume_from is None or is_inside(options.resume_from, options.checkpoint_dir)
        self._bests_after = 0 if goes_on_here else self.epoch
        # Only now: built before the checkpoint is loaded, the averages would start from the initial weights.
        self._resume_averages(resumed or {})
        self._start_averages_when_due(options.resume_from)
        self._objective = make_objective(self._spread.forward, self._precision)
        if self.processes.is_first:
            self._require_space()

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return self.history[-1].epoch if self.history else 0

    @property
    def ema(self) -> FastEMA | None:
        """The averages, once they have started."""
        return None if self.averages is None else self.averages.ema

    def fit(self) -> None:
        """Trains to the last epoch; writes checkpoints, history, report and pictures.

        Raises:
            UserError: the loss is not finite any more, or memory ran out; says what to do.
            CheckpointError: a checkpoint cannot be written; names the last good one.
        """
        log = TensorBoardLog(self._file(TENSORBOARD), self.epoch + 1, writes=self.processes.is_first)
        try:
            self._tell.say(log.note)
            ious: Ious = ([], [])
            for epoch in range(self.epoch + 1, self.options.epochs + 1):
                started = time.perf_counter()
                stage = self.stages.at(epoch).number
                with shortage_explained(self.options, stage, self.device, f"in epoch {epoch}; {self._last_good()}"):
                    result = self._train_epoch(epoch)
                    ious = self._validate()
                self._record(epoch, result, ious, time.perf_counter() - started)
                self._tell.epoch(self.history, self.averages, self.stages.at(epoch).steps_per_epoch)
                with uninterrupted():
                    self._save()
                log.record(self.history[-1])
                self._start_averages_when_due()
            self._finish(*ious)
        finally:
            log.close()

    # --- building ----------------------------------------------------------------------------------------------------

    def _build_net(self, resumed: dict[str, Any] | None) -> SegmentationNet:
        options = self.options
        architecture = Architecture(options.backbone, options.num_experts, options.top_k)
        net, weights = create_net(architecture, options.pretrained and resumed is None)
        check_input_size(net, options.backbone, options.img_size)
        self._tell.model(net, weights, self.device, self.processes)
        if resumed is not None:
            load_weights(net, resumed, prefer="net")  # here, where they are whole
        return net.to(self.device)

    def _resume(self, checkpoint: dict[str, Any]) -> None:
        origin = self.options.resume_from
        self.optimisation.load(checkpoint, origin)
        self._spread.take_shards(self.optimisation.optimizer)
        self.history = [EpochRecord(**record) for record in checkpoint["history"]]
        if "rng" in checkpoint:
            restore_rng(checkpoint["rng"])
        changed = changes(checkpoint, self.options)
        self._tell.say(
            f"Resuming from {origin} after epoch {self.epoch}" + (f"; {', '.join(changed)}" if changed else "")
        )

    def _require_space(self) -> None:
        """Weights and two moments; each average is stored once, under two names."""
        tensors = [tensor for tensor in self.net.state_dict().values() if torch.is_tensor(tensor)]
        weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        averages = len(self.options.decays) if self.options.use_ema else 0
        require_space(self.options.checkpoint_dir, weights * (3 + averages))

    # --- averages ----------------------------------------------------------------------------------------------------

    def _resume_averages(self, checkpoint: dict[str, Any]) -> None:
        if "ema" not in checkpoint:
            return
        origin = self.options.resume_from
        if not self.options.use_ema:
            self._tell.say(f"The EMA in {origin} is left behind: --use-ema is not given")
            return
        self._build_averages(checkpoint.get("ema_start_epoch") or 1)
        assert self.averages is not None
        fresh = self.averages.load(checkpoint["ema"])
        if fresh:
            self._tell.say(f"{origin} has no EMA of decay {', '.join(fresh)}: from the weights of epoch {self.epoch}")

    def _start_averages_when_due(self, origin: Path | None = None) -> None:
        """Before the epoch that comes next: by --ema-start-epoch, or with --ema-start auto by the advisor."""
        options = self.options
        if self.averages is not None or not options.use_ema or self.epoch >= options.epochs:
            return
        if options.ema_start == "auto":
            if self._tell.is_news("wait", True):
                self._tell.say("EMA: waits until the base IoU says that it pays (--ema-start auto)")
            if not self._pays():
                return
        elif self.epoch + 1 < options.ema_start_epoch:
            if self._tell.is_news("wait", True):
                self._tell.say(f"EMA: starts before epoch {options.ema_start_epoch} (--ema-start-epoch)")
            return
        elif origin is not None:
            self._tell.say(f"{origin} has no EMA: it starts here, from the weights of epoch {self.epoch}")
        self._build_averages(self.epoch + 1)

    def _pays(self) -> bool:
        """What the advisor says of the epochs so far; said to the user where it is new."""
        if not self.history:
            return False
        advice = should_start([record.iou for record in self.history])
        if advice.action == "start":
            self._tell.say(f"EMA: starts after epoch {self.epoch}, {advice.pattern}: {advice.reason}")
            return True
        if self._tell.is_news("advice", advice.pattern):
            self._tell.say(f"EMA: not started, {advice.pattern}: {advice.reason}")
        return False

    def _build_averages(self, start_epoch: int) -> None:
        options = self.options
        total_steps = self.stages.total_steps - self.stages.steps_before(start_epoch)
        averages = Averages(self.net, self.optimisation.optimizer, options, start_epoch, total_steps, self.costs)
        self.averages = averages
        self._tell.averages(averages, self.stages.at(start_epoch).steps_per_epoch)

    # --- an epoch ----------------------------------------------------------------------------------------------------

    def _train_epoch(self, epoch: int) -> EpochResult:
        stage = self.stages.at(epoch)
        levels = len(self._levels)
        opened = open_levels(stage, epoch, levels, self.options.progressive_unfreeze)
        self._tell.stage(stage, opened, levels)
        self.net.train()
        freeze(self.net.backbone, self._levels, opened)
        self._sampler.epoch = epoch
        # Dropout differs from process to process.
        torch.manual_seed(seed_of(self.options.seed, epoch, *filter(None, [self.processes.rank])))
        loader = self._loader_of(stage)
        with progress(self.console, f"Epoch {epoch}/{self.options.epochs}", len(loader)) as bar:
            try:
                result = train_epoch(
                    self._objective,
                    loader,
                    self.optimisation,
                    stage,
                    epoch,
                    len(self._training_set),
                    self.device,
                    lambda loss: bar.advance(f"loss {loss:.4f}"),
                    self._spread,
                )
            except NotFiniteError as error:
                raise UserError(
                    f"{error} in epoch {epoch}; {self._last_good()}. Try a lower --lr, --warmup-epochs, or a smaller "
                    "--clip-grad"
                ) from error
        self.costs.step += result.step_seconds
        return result

    def _loader_of(self, stage: Stage) -> Any:
        if self._training is None or self._training[0] != stage:
            self._training = None  # ends the workers of the stage before
            batch_size = stage.batch_size // self.processes.world_size
            loader = training_loader(self._training_set, self._sampler, batch_size, self.options.num_workers)
            self._training = (stage, loader)
        return self._training[1]

    def _validate(self) -> Ious:
        base, *averaged = self._with_each(lambda: evaluate(self.net, self._validation, self.device))
        return self.processes.all_of(base), [self.processes.all_of(one) for one in averaged]

    def _with_each(self, score: Callable[[], T]) -> list[T]:
        """What `score()` says of the trained weights, and then of each average. All processes must call it."""

        def score_whole() -> T:
            with self._spread.whole():
                return score()

        return [score_whole(), *([] if self.averages is None else evaluate_each(self.averages, score_whole))]

    def _record(self, epoch: int, result: EpochResult, ious: Ious, seconds: float) -> None:
        base, averaged = ious
        scores = [fmean(one) for one in averaged]
        names = [] if self.averages is None else self.averages.names
        decays: list[float] = [] if self.averages is None else self.averages.decays_now()
        self.history.append(
            EpochRecord(
                epoch=epoch,
                loss=result.loss,
                iou=fmean(base),
                ema_iou=scores[0] if scores else None,
                lr=self.optimisation.optimizer.param_groups[0]["lr"],
                ema_decay=decays[0] if decays else None,
                seconds=seconds,
                stage=self.stages.at(epoch).number,
                data_wait=result.data_wait,
                other_ema_ious=dict(zip(names[1:], scores[1:], strict=True)),
                other_ema_decays=dict(zip(names[1:], decays[1:], strict=True)),
                expert_usage=result.usage.tolist() if result.usage.numel() else (),
            )
        )

    # --- what is written ---------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Checkpoints and `history.csv`."""
        try:
            write_epoch(
                self.options.checkpoint_dir,
                self.net,
                self.averages,
                self.optimisation,
                self.history,
                self.options,
                self._bests_after,
                self._spread,
            )
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._last_good()}") from error
        self._saved = self.epoch
        if self.processes.is_first:
            append_csv(self._file("history.csv"), self.history)

    def _last_good(self) -> str:
        if self._saved is not None:
            return f"the last good checkpoint is {self._file(LAST)} (epoch {self._saved})"
        if self.options.resume_from is not None:
            return f"the last good checkpoint is {self.options.resume_from} (epoch {self.epoch})"
        return "no epoch was finished yet"

    def _finish(self, base: list[float], averaged: list[list[float]]) -> None:
        comparison = None
        if self.averages is not None and averaged:
            self.costs.measure_swaps(self.averages.ema)
            decay = self.averages.decays_now()[0]
            stage = self.stages.at(self.epoch)
            comparison = Comparison(
                base,
                averaged[0],
                updates=self.averages.ema.num_updates,
                window=math.inf if decay == 1 else 1 / (1 - decay),
                updates_per_epoch=stage.steps_per_epoch,
                final_rate=self.history[-1].lr / stage.schedule.highest,
            )
        examples = self._examples()
        if not self.processes.is_first:
            return
        write_predictions(self._file("predictions.png"), examples)
        write_curves(self._file("curves.png"), self.history)
        written = (BEST, BEST_EMA, LAST, "history.csv", "curves.png", "predictions.png")
        files = [self._file(name) for name in written if self._file(name).exists()]
        names = ["EMA"] if self.averages is None else self.averages.names
        print_report(self.console, self.history, comparison, self.costs, files, names)

    def _examples(self) -> list[Example]:
        """The first few validation images with what the weights after the last epoch predict."""
        self.net.eval()
        names = [] if self.averages is None else self.averages.names
        names = ["base", *(f"EMA {name}" if len(names) > 1 else "EMA" for name in names)]
        if not self.processes.is_first:  # the first has the first images
            self._with_each(lambda: None)
            return []
        batch: Validation = next(iter(self._validation))
        columns = dict(zip(names, self._with_each(lambda: predict(self.net, batch, self.device)), strict=True))
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
