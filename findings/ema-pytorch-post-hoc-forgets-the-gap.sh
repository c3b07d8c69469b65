#!/usr/bin/env bash
# ema-pytorch 0.8.3, torch 2.13.0. PostHocEMA(sigma_rels=(0.05, 0.10)), whose update_every is 100 unless given.
# Guess: the two averages have the profiles they are named for, as with EDM2, whatever update_every is.
# Seen: beta is that of a single step, though an update stands for update_every steps. The averages are far older, and what
# synthesize_ema_model makes of them is as wrong.
# Output (mean age of an average, as a share of the run; by the formula 0.053 and 0.112):
#   update_every=1: 0.052 0.112
#   update_every=10: 0.359 0.559
#   update_every=100: 0.853 0.929
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q ema-pytorch==0.8.3 torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from ema_pytorch import PostHocEMA

ages = {}
for every in (1, 10, 100):
    model = torch.nn.Linear(1, 1, bias=False)
    ema = PostHocEMA(model, sigma_rels=(0.05, 0.10), update_every=every, checkpoint_folder=f"folder{every}", checkpoint_every_num_steps=10**9)
    for step in range(1, 2001):
        with torch.no_grad():
            model.weight.fill_(float(step))
        ema.update()
    ages[every] = [round(1 - float(each.ema_model.weight) / 2000, 3) for each in ema.ema_models]
    print(f"update_every={every}:", *ages[every])
assert abs(ages[1][0] - 0.053) < 0.01 and ages[10][0] > 0.3 and ages[100][0] > 0.7
PY
