"""An evaluation loop that runs with the averaged weights, and one that runs twice.

In the averaged run of "both" the module does everything under its own names: `self.log`, and
`trainer.callback_metrics` in its hooks. The metrics get the average's names where they leave the run: in the loggers,
in the progress bar, in `callback_metrics` afterwards and in what the loop returns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch

from fastema.integrations.callbacks import AXES, replaced
from fastema.integrations.lightning.framework import LightningModule, Trainer, isolate_rng

#: The leading word of a metric's name that says "validation", and what separates it from the rest.
_VALIDATION = re.compile(r"(val|valid|validation)([_/.\- ].*)")
_SILENT_HOOKS = tuple(
    f"on_validation_{event}" for event in ("start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end")
)
_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


def averaged_name(name: str) -> str:
    """Return the name under which a metric of the averaged weights is logged.

    Examples:
        >>> averaged_name("val_loss"), averaged_name("validation/acc"), averaged_name("accuracy")
        ('val_ema_loss', 'validation_ema/acc', 'val_ema_accuracy')
    """
    match = _VALIDATION.fullmatch(name)
    return f"{match[1]}_ema{match[2]}" if match else f"val_ema_{name}"


def averaged_names(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics under the names of the averaged weights."""
    return {name if name in AXES else averaged_name(name): value for name, value in metrics.items()}


@contextmanager
def logging_both(pl_module: LightningModule) -> Iterator[None]:
    """Open a block in which `self.log` of the module logs under its own names and those of the average."""
    log = pl_module.log

    def log_twice(name: str, *args: Any, **kwargs: Any) -> None:
        log(name, *args, **kwargs)
        if name not in AXES:
            log(averaged_name(name), *args, **kwargs)

    with replaced(pl_module, "log", log_twice):
        yield


@contextmanager
def extra_run(trainer: Trainer, loop: Any) -> Iterator[None]:
    """Open a block in which an evaluation loop runs once more than the trainer knows of.

    Its metrics get the names of the average. The other callbacks' hooks are not called. Random numbers, the progress
    of the loop, learning rates and their schedulers are afterwards as they were before. A validation that a checkpoint
    has interrupted begins anew, in both runs: Lightning would leave out as many batches as were done.
    """
    with ExitStack() as undo:
        undo.enter_context(isolate_rng())
        undo.enter_context(_untouched_progress(loop))
        undo.enter_context(_untouched_schedules(trainer))
        for callback in trainer.callbacks:
            for hook in _SILENT_HOOKS:
                undo.enter_context(replaced(callback, hook, _nothing))
        undo.enter_context(_renamed_metrics(trainer, loop))
        yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a hook of a callback."""


class _Recorded(dict[str, Any]):
    """Metrics that remember which of them were updated."""

    def __init__(self, metrics: dict[str, Any]) -> None:
        super().__init__(metrics)
        self.updated: dict[str, Any] = {}

    def update(self, metrics: dict[str, Any]) -> None:  # type: ignore[override]
        super().update(metrics)
        self.updated.update(metrics)


@contextmanager
def _renamed_metrics(trainer: Trainer, loop: Any) -> Iterator[None]:
    connector = trainer._logger_connector
    log_metrics, print_results = connector.log_metrics, loop._print_results

    def log_renamed(metrics: dict[str, Any], step: int | None = None) -> None:
        with replaced(connector, "_logged_metrics", {}):  # they are there under their own names
            log_metrics(averaged_names(metrics), step)

    def print_renamed(results: list[dict[str, Any]], stage: str) -> None:
        print_results([averaged_names(metrics) for metrics in results], stage)

    before = {name: getattr(connector, name) for name in _METRICS}
    during = {name: _Recorded(metrics) for name, metrics in before.items()}
    vars(connector).update(during)
    try:
        with replaced(connector, "log_metrics", log_renamed), replaced(loop, "_print_results", print_renamed):
            yield
    finally:
        for name, metrics in before.items():
            metrics.update(averaged_names(during[name].updated))
        vars(connector).update(before)


@contextmanager
def _untouched_progress(loop: Any) -> Iterator[None]:
    """Open a block after which the loop has counted nothing, so that checkpoints hold the progress of one run.

    An exception leaves what was counted: the validation has not finished, and a resumed run repeats it.
    """
    loop.restarting = False
    progress = deepcopy(loop.batch_progress.state_dict())
    seen = getattr(loop, "_seen_batches_per_dataloader", None)
    counts = None if seen is None else dict(seen)
    yield
    loop.batch_progress.load_state_dict(progress)
    seen = getattr(loop, "_seen_batches_per_dataloader", None)
    if seen is not None and counts is not None:
        seen.clear()
        seen.update(counts)


@contextmanager
def _untouched_schedules(trainer: Trainer) -> Iterator[None]:
    """Restore learning rates and their schedulers after a block: the module may step them in a hook."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    states = [deepcopy(scheduler.state_dict()) for scheduler in schedulers]
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    values = [{key: (value, deepcopy(value)) for key, value in group.items() if key != "params"} for group in groups]
    try:
        yield
    finally:
        for scheduler, state in zip(schedulers, states, strict=True):
            scheduler.load_state_dict(state)
        for group, saved in zip(groups, values, strict=True):
            for key, (value, was) in saved.items():
                if isinstance(value, torch.Tensor):
                    value.copy_(was)  # a captured graph may read this very tensor
                group[key] = value if isinstance(value, torch.Tensor) else was
