#!/usr/bin/env bash
# lightning 2.6.6, torch 2.13.0. EMAWeightAveraging(update_starting_at_epoch=2) in a fit of 5 epochs of 4 steps.
# Guess: the average begins in epoch 2.
# Seen: it begins with the first step, and is updated once more at the end of each epoch from epoch 2 on: update_every_n_steps=1
# is the default and is not held back by the epoch. update_starting_at_step does delay.
# Output:
#   updates: 23 = 20 steps + 3 ends of epochs
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q lightning==2.6.6 torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import logging

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel

logging.disable(logging.WARNING)
callback = EMAWeightAveraging(decay=0.9, update_starting_at_epoch=2)
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = pl.Trainer(max_epochs=5, limit_train_batches=4, limit_val_batches=0, accelerator="cpu", callbacks=callback, **quiet)
updates = []
original = torch.optim.swa_utils.AveragedModel.update_parameters
torch.optim.swa_utils.AveragedModel.update_parameters = lambda self, model: (updates.append(trainer.global_step), original(self, model))[1]
trainer.fit(BoringModel())
print(f"updates: {len(updates)} = 20 steps + {len(updates) - 20} ends of epochs")
assert len(updates) == 23 and updates[0] == 1
PY
