"""A small net, its data, and a Trainer on the CPU, for the tests of both Lightning callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics comes with lightning")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402


class Net(pl.LightningModule):
    """A BatchNorm net that logs in every way, and records the weights after each real optimizer step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=2)
        self.after_steps: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def on_validation_epoch_start(self) -> None:
        self.validated.append(snapshot(self))
        self._losses: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = self.loss(batch)
        self._losses.append(loss)
        self.accuracy(self.body(batch[0]), batch[1])
        self.log("val_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"val/acc": self.accuracy, "other": loss * 2})

    def on_validation_epoch_end(self) -> None:
        self.log("val_worst", torch.stack(self._losses).max())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.body(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        self.record(optimizer)
        return optimizer

    def record(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_post_hook(lambda *_: self.after_steps.append(snapshot(self)))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def loader(shuffle: bool = False, seed: int = 7, count: int = 20) -> DataLoader[Any]:
    inputs = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), batch_size=4, shuffle=shuffle)


def trainer(folder: Path, *callbacks: Any, **args: Any) -> Any:
    given = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    return pl.Trainer(**{**given, **args})
