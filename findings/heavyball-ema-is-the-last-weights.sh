#!/usr/bin/env bash
# heavyball 3.2.1, torch 2.13.0. The EMA of an optimizer (use_ema, ema_decay=0.001, state "param_ema").
# Guess: each step moves the average 0.1 % of the way to the weights (decay 0.999), debiased at the start.
# Seen: the debiased decay is used as the share of the new weights: after the first step the average is 0, later it is
# 99.9 % the last weights.
# Output (the weight is the number of the step; an average with decay 0.999 is near the mean, 100):
#   param_ema after 1 step: 0.0
#   param_ema after 200 steps: 200.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q heavyball==3.2.1 torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import heavyball
import torch

heavyball.utils.compile_mode = None
weight = torch.nn.Parameter(torch.ones(1))
optimizer = heavyball.SGD([weight], lr=0.0)
optimizer.use_ema = True
seen = {}
for step in range(1, 201):
    with torch.no_grad():
        weight.fill_(step)
    weight.grad = torch.zeros(1)
    optimizer.step()
    seen[step] = float(optimizer.state_(weight)["param_ema"])
print("param_ema after 1 step:", seen[1])
print("param_ema after 200 steps:", round(seen[200], 1))
assert seen[1] == 0 and seen[200] > 190
PY
