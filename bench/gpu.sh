#!/usr/bin/env bash
# What only a GPU can show, in one command: builds in place, tests, memcheck, benchmarks. For a machine with CUDA torch,
# nvcc, Triton and pytest; nothing is downloaded. PYTHON names the interpreter (python3); results go to bench/results/.
#   bench/gpu.sh            everything (under 8 minutes on one GPU)
#   bench/gpu.sh --dry-run  shows the commands, and checks what they need
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
dry=${1:-}
failed=()

step() { # name, seconds, command...
    local name=$1 limit=$2
    shift 2
    echo "== $name: $*"
    [ "$dry" = --dry-run ] && return 0
    timeout "$limit" "$@" || failed+=("$name ($?)")
}

"$PYTHON" - <<'PY' || failed+=(environment)
import importlib.util, shutil, sys
import torch
print("python", sys.version.split()[0], "| torch", torch.__version__, "| CUDA of torch", torch.version.cuda)
print("device", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
for name in ("triton", "pytest", "numpy", "timm", "ema_pytorch", "torch_ema", "diffusers", "lightning"):
    print(name, "found" if importlib.util.find_spec(name) else "MISSING")
for tool in ("nvcc", "compute-sanitizer", "ninja"):
    print(tool, shutil.which(tool) or "MISSING")
PY
device=$("$PYTHON" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-') if torch.cuda.is_available() else 'no-gpu')")

# Only the chip at hand: the other architectures are CI's business and triple the compile time.
arch=$("$PYTHON" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability() if torch.cuda.is_available() else '9.0')")
step build 240 env FASTEMA_CUDA=1 TORCH_CUDA_ARCH_LIST="$arch" \
    "$PYTHON" -m pip install -q --no-index --no-deps --no-build-isolation -e .
step info 60 "$PYTHON" -m fastema info
step tests 240 "$PYTHON" -m pytest -q -m gpu tests/test_gpu.py tests/test_offload_gpu.py tests/test_swa_utils_gpu.py
if command -v compute-sanitizer >/dev/null; then
    step memcheck 120 compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$PYTHON" -m pytest -q -m gpu tests/test_gpu.py -k "matrix and native and guarded or exchange"
else
    echo "== memcheck: no compute-sanitizer on PATH"
fi
# The long tables get a third of their time: rounds on a GPU are short. What is cut short has written what it measured.
results=bench/results/gpu-$device
step bench 240 "$PYTHON" -m bench.all --device cuda --seconds 0.3 --json "$results.json"
step report 60 "$PYTHON" -m bench.report "$results.json" --plots "$results"

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all steps passed"
