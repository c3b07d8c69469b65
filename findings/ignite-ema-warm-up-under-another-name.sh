#!/usr/bin/env bash
# pytorch-ignite 0.5.5, torch 2.13.0. EMAHandler(momentum_warmup=, warmup_iters=) attached under a name of its own, as the
# documentation asks of whoever attaches two.
# Guess: the warm-up is that of the attached name.
# Seen: the warm-up is written to engine.state.ema_momentum whatever the name is: under another name there is none, and
# the momentum of another handler that has the default name is overwritten by it.
# Output:
#   momentum of the handler with the warm-up: 0.002
#   momentum of the other handler, which is 0.5 without a warm-up: 0.09
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

engine = Engine(lambda engine, batch: None)
EMAHandler(torch.nn.Linear(2, 1), momentum=0.5).attach(engine)
EMAHandler(torch.nn.Linear(2, 1), momentum=0.002, momentum_warmup=0.2, warmup_iters=10).attach(engine, "generator")
engine.run([0] * 6)
own, other = engine.state.generator, engine.state.ema_momentum
print("momentum of the handler with the warm-up:", own)
print("momentum of the other handler, which is 0.5 without a warm-up:", round(other, 4))
assert own == 0.002 and 0.002 < other < 0.2
PY
