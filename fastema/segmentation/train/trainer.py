"""A run: epochs in two stages, with the trained weights (base) and the averages validated after each.

Everything that an epoch depends on is a function of seed and epoch (order, augmentation, dropout, freezing) or of the
number of optimizer steps (learning rate). So a resumed run gives the same results as one without an interruption.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch.utils.data import DataLoader

from fastema import FastEMA
from fastema.advisor import should_start, window
from fastema.checkpoint import CheckpointError, load_weights
from fastema.errors import UserError
from fastema.posthoc import SnapshotError
from fastema.segmentation.console import progress
from fastema.segmentation.data.images import ignored_of
from fastema.segmentation.data.listing import Pair
from fastema.segmentation.data.loaders import (
    EpochSampler,
    TrainingSet,
    Validation,
    ValidationSet,
    mix_seed,
    training_loader,
    validation_loader,
)
from fastema.segmentation.devices import Precision, explain_out_of_memory
from fastema.segmentation.distributed.parallel import ParallelModel
from fastema.segmentation.distributed.process_group import Processes
from fastema.segmentation.eval.scores import evaluate, paired_error, predict
from fastema.segmentation.model.network import Architecture, SegmentationNet, check_input_size, create_net
from fastema.segmentation.options import TrainOptions
from fastema.segmentation.report.history import EpochRecord, TensorBoardLog, append_csv
from fastema.segmentation.report.pictures import Example, write_curves, write_predictions
from fastema.segmentation.report.summary import Comparison, print_summary
from fastema.segmentation.report.timers import Timers
from fastema.segmentation.train.averaging import Averages, forgets_start
from fastema.segmentation.train.best_snapshot import write_best_posthoc
from fastema.segmentation.train.checkpoints import (
    BEST,
    BEST_EMA,
    LAST,
    SNAPSHOTS,
    TENSORBOARD,
    changed_options,
    is_inside,
    read_resumable,
    require_space,
    restore_rng,
    write_epoch,
)
from fastema.segmentation.train.epoch import EpochResult, NotFiniteError, TrainOptimizer, train_epoch
from fastema.segmentation.train.losses import MakeObjective, supervised
from fastema.segmentation.train.messages import Messages
from fastema.segmentation.train.signals import defer_signals
from fastema.segmentation.train.stages import Stage, freeze, open_levels, plan_stages

_EXAMPLES = 4

T = TypeVar("T")

#: IoU per image of the trained weights, and of each average.
Ious = tuple[list[float], list[list[float]]]


class Trainer:
    """One run of `fastema train`.

    Args:
        options: checked.
        training: images to train on.
        validation: images to validate on.
        console: to print to.
        make_objective: the objective's factory; the loss against the masks unless given.
        processes: of the run, each with a trainer of its own.
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
        self.device = self.processes.device(options.device)
        self.timers = Timers(device=self.device)
        self.stages = plan_stages(options, len(training))
        steps = self.stages.total_steps - self.stages.steps_before(options.ema_start_epoch)
        if options.snapshots > steps:
            raise UserError(f"--snapshots {options.snapshots} is more than the {steps} steps that the averages run for")
        self._messages = Messages(console, options)
        self._say = self._messages.say
        self._saved: int | None = None  # the epoch of `last.pth`, if this process wrote it

        rank, world_size = self.processes.rank, self.processes.world_size
        self._sampler = EpochSampler(len(training), options.seed, rank, world_size)
        self._training_set = TrainingSet(training, options.img_size)
        self._stage_loader: tuple[Stage, DataLoader] | None = None
        self._validation_pairs = validation
        # For evaluate and predict, so that they read images and masks alike.
        self._data: dict[str, Any] = {
            "whites": list(training[0].whites) if training else [],
            "ignored": ignored_of([*training, *validation]),
            "held_out": [pair.stem for pair in validation],
        }
        validation_set = ValidationSet(validation[rank::world_size], options.img_size)
        batch_size = options.batch_size // world_size
        self._validation_loader = validation_loader(validation_set, batch_size, options.num_workers)

        precision = Precision(options.amp, self.device)
        resumed = None if options.resume_from is None else read_resumable(options.resume_from, options)
        torch.default_generator.manual_seed(mix_seed(options.seed))
        self.net = self._build_net(resumed)
        self._levels = self.net.backbone_levels()
        self._parallel = ParallelModel(self.net, self.processes, self.device, options.fsdp)
        self.optimizer = TrainOptimizer(self.net, options.weight_decay, options.clip_grad, precision)
        self.averages = Averages(self.net, self.optimizer.adamw, options, self.timers)
        if resumed is not None:
            self._resume(resumed)
        # A run that continues in another folder needs best files there, so its bests count from here.
        same_folder = options.resume_from is None or is_inside(options.resume_from, options.checkpoint_dir)
        self._bests_after = 0 if same_folder else self.epoch
        # After the checkpoint is loaded: averages start from the weights that are there.
        self._resume_averages(resumed or {})
        self._start_averages_when_due(options.resume_from)
        self._objective = make_objective(self._parallel.forward, precision)
        if self.processes.is_first:
            # Weights and two moments; each average is stored once, under two names.
            tensors = [tensor for tensor in self.net.state_dict().values() if torch.is_tensor(tensor)]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            averages = len(options.average_names) if options.use_ema else 0
            require_space(options.checkpoint_dir, size * (3 + averages), size * averages * options.snapshots)

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return self.history[-1].epoch if self.history else 0

    @property
    def ema(self) -> FastEMA | None:
        """The FastEMA, once it has started."""
        return self.averages.ema if self.averages.names else None

    def fit(self) -> None:
        """Train to the last epoch; write checkpoints, history, summary and pictures."""
        ious: Ious = ([], [])
        try:
            with closing(TensorBoardLog(self._file(TENSORBOARD), self.epoch + 1, self.processes.is_first)) as log:
                self._say(log.note)
                for epoch in range(self.epoch + 1, self.options.epochs + 1):
                    started, stage = time.perf_counter(), self.stages.at(epoch)
                    when = f"in epoch {epoch}; {self._last_good()}"
                    with explain_out_of_memory(self.options, stage.number, self.device, when):
                        self._start_averages_when_due()
                        result = self._train_epoch(epoch)
                        ious = self._validate()
                    self._record(epoch, result, ious, time.perf_counter() - started)
                    self._messages.epoch(self.history, self.averages, stage.steps_per_epoch)
                    with defer_signals():
                        self._save()
                    log.record(self.history[-1])
                self._finish(*ious)
        except SnapshotError as error:
            raise UserError(f"{error}; {self._last_good()}") from error

    # --- building ----------------------------------------------------------------------------------------------------

    def _build_net(self, resumed: dict[str, Any] | None) -> SegmentationNet:
        options = self.options
        architecture = Architecture(options.backbone, options.num_experts, options.top_k)
        net, weights = create_net(architecture, options.pretrained and resumed is None)
        check_input_size(net, options.backbone, options.img_size)
        self._messages.model(net, weights, self.device, self.processes)
        if resumed is not None:
            load_weights(net, resumed, prefer="net")  # before the network is sharded
        return net.to(self.device)

    def _resume(self, checkpoint: dict[str, Any]) -> None:
        origin = self.options.resume_from
        self.optimizer.load(checkpoint, origin)
        self._parallel.shard_optimizer_state(self.optimizer.adamw)
        self.history = [EpochRecord(**record) for record in checkpoint["history"]]
        if "rng" in checkpoint:
            restore_rng(checkpoint["rng"])
        changed = f"; {', '.join(changes)}" if (changes := changed_options(checkpoint, self.options)) else ""
        self._say(f"Resuming from {origin} after epoch {self.epoch}{changed}")

    # --- averages ----------------------------------------------------------------------------------------------------

    def _resume_averages(self, checkpoint: dict[str, Any]) -> None:
        if "ema" not in checkpoint:
            return
        origin = self.options.resume_from
        if not self.options.use_ema:
            self._say(f"The EMA in {origin} is dropped: --use-ema is not given")
            return
        before, now = list(checkpoint["options"].get("ema_profiles", [])), list(self.options.ema_profiles)
        if before != now:
            had, want = (",".join(f"{sigma:g}" for sigma in each) or "none" for each in (before, now))
            raise UserError(
                f"--ema-profiles cannot change in mid-run: {origin} was trained with {had}, not {want}. Give the same"
            )
        # Steps done and steps to come: what was planned at first may have had other batches, epochs or images.
        to_come, plan = self._steps_to_come, checkpoint.get("ema_plan") or {}
        done = plan["total"] - plan["to_come"] if plan else int(checkpoint["ema"]["step"])
        epoch = checkpoint.get("ema_start_epoch") or 1
        self.averages.start(epoch, done + to_come, done, plan.get("total", 0))
        self._messages.averages(self.averages, self.stages.at(self.epoch + 1).steps_per_epoch, is_new=False)
        if fresh := self.averages.load(checkpoint["ema"]):
            self._say(f"{origin} has no EMA of decay {', '.join(fresh)}: from the weights of epoch {self.epoch}")

    def _start_averages_when_due(self, origin: Path | None = None) -> None:
        """Start the averages before the next epoch if --ema-start-epoch or the advisor (--ema-start auto) says so."""
        options, stage = self.options, self.stages.at(self.epoch + 1)
        if self.averages.names or not options.use_ema:
            return
        if options.ema_start == "auto":
            if forgets_start(options, stage.steps_per_epoch, self.stages.total_steps):
                self._say("EMA: starts now (--ema-start auto), since it forgets its start within an epoch")
            elif not self._advisor_says_start():
                return
        elif self.epoch + 1 < options.ema_start_epoch:
            if self._messages.changed("wait", True):
                self._say(f"EMA: starts before epoch {options.ema_start_epoch} (--ema-start-epoch)")
            return
        elif origin is not None:
            self._say(f"{origin} has no EMA: it starts here, from the weights of epoch {self.epoch}")
        self._start_averages(self.epoch + 1)

    def _advisor_says_start(self) -> bool:
        """Ask the advisor about the epochs so far; print its advice when it changes."""
        if self._messages.changed("wait", True):
            self._say("EMA: waits until the base IoU says that it pays (--ema-start auto)")
        if not self.history:
            return False
        advice = should_start([record.iou for record in self.history])
        if advice.pattern == "too short":  # its advice is for averages that forget their start, and these do not
            return False
        if advice.action == "start":
            self._say(f"EMA: starts after epoch {self.epoch}, {advice.pattern}: {advice.reason}")
            return True
        if self._messages.changed("advice", advice.pattern):
            self._say(f"EMA: not started, {advice.pattern}: {advice.reason}")
        return False

    @property
    def _steps_to_come(self) -> int:
        return self.stages.total_steps - self.stages.steps_before(self.epoch + 1)

    def _start_averages(self, epoch: int) -> None:
        self.averages.start(epoch, self._steps_to_come)
        self._messages.averages(self.averages, self.stages.at(epoch).steps_per_epoch)

    # --- an epoch ----------------------------------------------------------------------------------------------------

    def _train_epoch(self, epoch: int) -> EpochResult:
        stage, levels = self.stages.at(epoch), len(self._levels)
        opened = open_levels(stage, epoch, levels, self.options.progressive_unfreeze)
        self._messages.stage(stage, opened, levels)
        self.net.train()
        freeze(self.net.backbone, self._levels, opened)
        self._sampler.epoch = epoch
        # Dropout differs from process to process.
        torch.manual_seed(mix_seed(self.options.seed, epoch, *filter(None, [self.processes.rank])))
        loader = self._loader_of(stage)
        # Not before the files of an earlier run were moved.
        if disk_use := self.averages.start_snapshots(self._file(SNAPSHOTS)):
            self._say(f"Snapshots: {disk_use}")
        with progress(self.console, f"Epoch {epoch}/{self.options.epochs}", len(loader)) as advance:
            try:
                result = train_epoch(
                    self._objective,
                    loader,
                    self.optimizer,
                    stage,
                    epoch,
                    len(self._training_set),
                    self.device,
                    lambda loss: advance(f"loss {loss:.4f}"),
                    self._parallel,
                )
            except NotFiniteError as error:
                clip = f"a --clip-grad below {self.options.clip_grad:g}" if self.options.clip_grad else "--clip-grad 1"
                raise UserError(
                    f"{error} in epoch {epoch}; {self._last_good()}. Try a lower --lr, --warmup-epochs, or {clip}"
                ) from error
        self.timers.step += result.step_seconds
        return result

    def _loader_of(self, stage: Stage) -> DataLoader:
        if self._stage_loader is None or self._stage_loader[0] != stage:
            self._stage_loader = None  # ends the workers of the previous stage
            batch_size = stage.batch_size // self.processes.world_size
            loader = training_loader(self._training_set, self._sampler, batch_size, self.options.num_workers)
            self._stage_loader = (stage, loader)
        return self._stage_loader[1]

    def _validate(self) -> Ious:
        base, *averaged = self._with_each(lambda: evaluate(self.net, self._validation_loader, self.device))
        gather = self.processes.gather_shares
        return gather(base), [gather(one) for one in averaged]

    def _with_each(self, score: Callable[[], T]) -> list[T]:
        """Call `score` with the trained weights and with each average. All processes must call this."""

        def score_unsharded() -> T:
            with self._parallel.unsharded():
                return score()

        return [score_unsharded(), *self.averages.with_each(score_unsharded)]

    def _record(self, epoch: int, result: EpochResult, ious: Ious, seconds: float) -> None:
        base, averaged = ious
        scores = [fmean(one) for one in averaged]
        names, decays = self.averages.names, self.averages.decays_now()
        self.history.append(
            EpochRecord(
                epoch=epoch,
                loss=result.loss,
                iou=fmean(base),
                ema_iou=scores[0] if scores else None,
                ema_error=paired_error(base, averaged[0]) if averaged and len(base) > 1 else None,
                lr=self.optimizer.adamw.param_groups[0]["lr"],
                ema_decay=decays[0] if decays else None,
                seconds=seconds,
                stage=self.stages.at(epoch).number,
                data_wait=result.data_wait,
                other_ema_ious=dict(zip(names[1:], scores[1:], strict=True)),
                other_ema_decays=dict(zip(names[1:], decays[1:], strict=True)),
                expert_usage=result.usage.tolist() if result.usage.numel() else (),
            )
        )

    # --- files --------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        plan = {"total": self.averages.total_steps, "to_come": self._steps_to_come} if self.averages.names else None
        try:
            write_epoch(
                self.options,
                self.net,
                self.averages,
                self.optimizer,
                self.history,
                self._bests_after,
                self._parallel,
                {**self._data, "ema_plan": plan},
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
        return "no checkpoint was written yet" if self.history else "no epoch was finished yet"

    def _finish(self, base: list[float], averaged: list[list[float]]) -> None:
        comparison, options = None, self.options
        if averaged:
            self.timers.measure_swaps(self.averages.ema)
            stage = self.stages.at(self.epoch)
            comparison = Comparison(
                base,
                averaged[0],
                updates=self.averages.ema.num_updates,
                window=window(self.averages.decays_now()[0]),
                updates_per_epoch=stage.steps_per_epoch,
                final_rate=self.history[-1].lr / stage.schedule.highest,
                decay_type=options.ema_decay_type,
            )
        examples = self._examples(base, averaged)
        has_snapshots = self.averages.save_last_snapshot()
        trained = self._parallel.gather_state(self.net.state_dict()) if has_snapshots else {}
        if not self.processes.is_first:
            return
        write_predictions(self._file("predictions.png"), examples)
        write_curves(
            self._file("curves.png"), self.history, f"{options.checkpoint_dir.resolve().name}: {options.backbone}"
        )
        written = (BEST, BEST_EMA, LAST, "history.csv", "curves.png", "predictions.png")
        files = [self._file(name) for name in written if self._file(name).exists()]
        print_summary(self.console, self.history, comparison, self.timers, files, self.averages.names)
        if has_snapshots:
            images = ValidationSet(self._validation_pairs, options.img_size)
            loader = validation_loader(images, options.batch_size, options.num_workers)
            write_best_posthoc(options, trained, self.history[-1], loader, self.device, self.console)
        elif options.snapshots:
            self._say("Snapshots: none, since no average was started")

    def _examples(self, base: list[float], averaged: list[list[float]]) -> list[Example]:
        """Predict the validation images on which base and EMA differ most, with the last epoch's weights."""
        self.net.eval()
        if not self.processes.is_first:
            self._with_each(lambda: None)
            return []
        averages = self.averages.names
        names = ["base", *(f"EMA {name}" if len(averages) > 1 else "EMA" for name in averages)]
        order = list(range(len(self._validation_pairs)))
        if averaged and len(base) == len(order):
            order.sort(key=lambda i: -abs(averaged[0][i] - base[i]))
        chosen = [self._validation_pairs[i] for i in sorted(order[:_EXAMPLES])]
        batch: Validation = next(iter(validation_loader(ValidationSet(chosen, self.options.img_size), len(chosen), 0)))
        columns = dict(zip(names, self._with_each(lambda: predict(self.net, batch, self.device)), strict=True))
        return [
            Example(
                pair.stem,
                batch.images[i],
                batch.masks[i],
                {name: each[i] for name, each in columns.items()},
                batch.known[i],
            )
            for i, pair in enumerate(chosen)
        ]

    def _file(self, name: str) -> Path:
        return self.options.checkpoint_dir / name
