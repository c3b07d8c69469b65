# `make demo` and `make test` do everything on a fresh machine: Python 3.10+, a C++ compiler, a package registry.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPP := csrc/*.h csrc/*.cpp csrc/*.cu

.PHONY: demo test lint format bench gpu sanitize clean

demo: .venv/.ready  ## trains a small segmentation model, its EMA validated at no copy (two minutes)
	$(BIN)/fastema train --dataset-path synthetic --checkpoint-dir runs/demo --backbone tf_efficientnet_lite0 \
		--img-size 96 --batch-size 16 --epochs 8 --lr 0.002 --use-ema --ema-decay 0.99

test: .venv/.ready  ## the whole test suite
	$(BIN)/python -m pytest

lint: .venv/.ready  ## format, lint and types, as CI holds them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: .venv/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

bench: .venv/.ready  ## what an update costs here
	$(BIN)/python -m bench.update --quick

gpu:  ## on a machine with a GPU: build, GPU tests, memcheck and benchmarks, with the Python that has CUDA torch
	PYTHON=$(PYTHON) bench/gpu.sh

sanitize: .venv/.ready  ## the extension's tests under AddressSanitizer and UBSan, then under ThreadSanitizer
	tests/sanitize.sh address,undefined
	tests/sanitize.sh thread

clean:
	rm -rf .venv build dist *.egg-info fastema/_C*.so fastema/_build_record.json

# torch first and pinned: the build needs it there, and an unpinned one is gigabytes of CUDA packages.
.venv/.ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt torch setuptools ninja
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[train,dev]"
	touch $@
