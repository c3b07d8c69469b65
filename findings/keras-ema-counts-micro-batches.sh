#!/usr/bin/env bash
# keras 3.15.1 on torch 2.13.0. Optimizer(use_ema=True, ema_momentum=0.9, gradient_accumulation_steps=4).
# Guess: the average is updated when the weights are, once in four calls; the page says that the frequency of the EMA looks
# at accumulated iterations.
# Seen: it is updated at every micro-batch, three times of four with weights that did not move: momentum 0.9 acts as 0.9 ** 4.
# Output (two real steps, of which the first copies, and the three micro-batches after them):
#   weight -2.0, average -1.344, with one update a step it would be -1.1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q keras==3.15.1 torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import os

os.environ["KERAS_BACKEND"] = "torch"
import keras
import numpy as np

weight = keras.Variable(np.zeros(1, "float32"))
optimizer = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.9, gradient_accumulation_steps=4)
optimizer.build([weight])
gradient = keras.ops.ones(1)
for _ in range(11):
    optimizer.apply([gradient])
now = float(keras.ops.convert_to_numpy(weight.value)[0])
average = float(keras.ops.convert_to_numpy(optimizer._model_variables_moving_average[0].value)[0])
print(f"weight {now:.1f}, average {average:.3f}, with one update a step it would be -1.1")
assert now == -2.0 and average < -1.3
PY
