#!/usr/bin/env bash
# torch 2.13.0. distribute_tensor(tensor, mesh, [Replicate()]) on two processes (gloo) whose tensors differ.
# Guess: it returns a DTensor with rank 0's values, and leaves the tensor that it was given.
# Seen: the broadcast writes into the tensor itself, whose memory the DTensor shares: rank 1's own values are gone.
# Output:
#   rank 1's tensor before [1.0, 1.0], after [0.0, 0.0], shared with the DTensor: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import os
import pathlib
import subprocess
import sys

pathlib.Path("two.py").write_text('''
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
dist.init_process_group("gloo")
tensor = torch.full((2,), float(dist.get_rank()))
before = tensor.tolist()
distributed = distribute_tensor(tensor, init_device_mesh("cpu", (2,)), [Replicate()])
if dist.get_rank() == 1:
    shared = distributed.to_local().data_ptr() == tensor.data_ptr()
    print(f"rank 1's tensor before {before}, after {tensor.tolist()}, shared with the DTensor: {shared}", flush=True)
    assert before == [1.0, 1.0] and tensor.tolist() == [0.0, 0.0] and shared
dist.destroy_process_group()
''')
command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "two.py"]
sys.exit(subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)
PY
