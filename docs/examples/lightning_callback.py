"""Lightning with FastEMACallback: every validation is of both the trained and the averaged weights.

pip install ".[lightning]"
python docs/examples/lightning_callback.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastema.integrations.lightning import FastEMACallback


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def data(count: int, seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, generator=generator)
    targets = inputs.square().sum(1, keepdim=True) + torch.randn(count, 1, generator=generator)
    return DataLoader(TensorDataset(inputs, targets), batch_size=32, shuffle=seed == 1)


def main(epochs: int = 3) -> None:
    pl.seed_everything(0)
    callback = FastEMACallback(decay=0.99, decay_type="threshold", validate="both")
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[callback],
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        net = Net()
        trainer.fit(net, data(1024, seed=1), data(256, seed=2))
        both = {name: round(float(value), 3) for name, value in sorted(trainer.callback_metrics.items())}
        print(f"after {epochs} epochs: {both}")
        trainer.save_checkpoint(f"{folder}/last.ckpt")
        checkpoint = torch.load(f"{folder}/last.ckpt", weights_only=False)
        net.load_state_dict(checkpoint["ema_state_dict"])  # the average, under the module's own keys
        print(f"the checkpoint has {len(checkpoint['state_dict'])} trained and averaged tensors each")


if __name__ == "__main__":
    main()
