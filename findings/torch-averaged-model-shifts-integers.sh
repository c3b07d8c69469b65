#!/usr/bin/env bash
# torch 2.13.0. AveragedModel(avg_fn=get_ema_avg_fn(0.9999), use_buffers=True) of a model with an integer table that never
# changes: an index, a codebook, packed weights.
# Guess: what never changes is its own average, or integers are refused.
# Seen: decay * table + (1 - decay) * table is computed in float32 and truncated on the way back: where rounding ends just
# below the integer, it becomes one less, at the first update after the copy; a table of token numbers points elsewhere.
# Output:
#   of 2048 integers that never changed, one less in the average: 418
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

model = torch.nn.Linear(2, 2)
model.register_buffer("table", torch.arange(2048))
averaged = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9999), use_buffers=True)
averaged.update_parameters(model)
averaged.update_parameters(model)
changed = int((averaged.module.table == model.table - 1).sum())
print("of 2048 integers that never changed, one less in the average:", changed)
assert changed > 100
PY
