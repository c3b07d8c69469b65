#!/usr/bin/env bash
# pytorch-ignite 0.5.5, torch 2.13.0. EMAHandler(handle_buffers="copy"), the default.
# Guess: each update copies the model's buffers into the EMA model.
# Seen: it assigns them, `ema_b.data = model_b.data`. From the first update on both models have the same memory: a reset
# of the EMA model's running statistics (as before update_bn) empties those of the model in training.
# Output:
#   same memory: True
#   running_mean of the model in training after reset_running_stats() of the EMA model: [0.0, 0.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q pytorch-ignite==0.5.5 torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from ignite.engine import Engine
from ignite.handlers import EMAHandler

model = torch.nn.BatchNorm1d(2)
handler = EMAHandler(model, momentum=0.1)
engine = Engine(lambda engine, batch: model(batch))
handler.attach(engine)
engine.run([torch.ones(4, 2)] * 3)
same = handler.ema_model.running_mean.data_ptr() == model.running_mean.data_ptr()
assert model.running_mean.sum() > 0
handler.ema_model.reset_running_stats()
print("same memory:", same)
print("running_mean of the model in training after reset_running_stats() of the EMA model:", model.running_mean.tolist())
assert same and model.running_mean.tolist() == [0.0, 0.0]
PY
