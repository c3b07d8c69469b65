"""Run tests on the test accelerator, in processes of their own: torch knows one accelerator, and never forgets it.

    FASTEMA_ALL_ARCHITECTURES=1 python -m pytest tests/accelerator           all of it
    PYTHONPATH=tests FASTEMA_TEST_ACCELERATOR=kernels \\
        python -m pytest -p accelerator.plugin tests/accelerator/test_on_fastema.py    one file of it
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastema.backends import native

ROOT = Path(__file__).parents[2]
ON_GPU = [
    "backends/test_gpu",
    "backends/test_gpu_claims",
    "core/shadow/test_offload_gpu",
    "swa_utils/test_swa_utils_gpu",
]
#: Tests that know of no device, with the accelerator as the default one.
OF_NO_DEVICE = [
    *("core/test_ema", "core/test_hooks", "core/decay/test_decays", "core/decay/test_several_decays"),
    *("core/shadow/test_states", "core/swap/test_exchange", "core/swap/test_changes_inside_a_swap"),
    "checkpoint/test_checkpoint",
]
#: What does not hold on a device, or not on this one; and why.
NOT_THERE = {
    "a number on a device decides there, and the host counts the step": (
        "test_found_inf_skips_the_step_and_the_count",
        "test_attach_does_not_count_a_step_that_the_gradient_scaler_skipped and fused",
    ),
    "nobody waits for a device to warn": (
        "test_nonfinite_skip_counts_and_warns_once",
        "test_the_swap_warns_too",
        "test_a_loaded_average_that_is_not_finite_takes_the_live_value_and_is_said",
    ),
    "of the host's memory": (
        "test_device_cpu_is_where_it_is",
        "test_the_allocator_sees_nothing_of_an_exchange",
        "test_a_numpy_array_taken_inside_outlives_the_block",
        "test_contents_that_were_exchanged_in_place_need_their_addresses",
    ),
    "capturable=True needs kernels": (
        "test_a_decay_set_in_mid_run_is_that_of_the_next_update and torch-True",
        "test_a_captured_table_is_rewritten_where_it_is and torch",
    ),
    "torch: complex views, inference, quantised and sparse tensors, and convolutions of such a device": (
        "test_what_cannot_be_written_to_is_found_before_anything_changes and quantised",
        "test_what_cannot_be_written_to_is_found_before_anything_changes and sparse",
        "complex",
        "inference_tensor",
        "test_unchanged_models_give_no_warning",
    ),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("FASTEMA_ALL_ARCHITECTURES") != "1", reason="takes minutes: set FASTEMA_ALL_ARCHITECTURES=1"
    ),
    pytest.mark.skipif(native.why_unusable("cpu") is not None, reason="there is no C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="its memory is mapped as Linux does it"),
    # The handle of a stream, and the interfaces that a device implements, are those of torch 2.11 and later.
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="written for torch 2.11 and later"
    ),
]


def passed_on_accelerator(kind: str, tests: list[str], *arguments: str, **variables: str) -> int:
    """Run test files there, and return how many tests passed; fail where one did not."""
    environment = {**os.environ, "PYTHONPATH": "tests", "FASTEMA_TEST_ACCELERATOR": kind, **variables}
    environment.pop("PYTEST_XDIST_WORKER", None)
    files = [f"tests/{name}.py" for name in tests]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "-p",
        "accelerator.plugin",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-o", "faulthandler_timeout=120", *arguments, *files]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]
    found = re.search(r"(\d+) passed", result.stdout)
    return int(found[1]) if found else 0


def test_on_a_device_with_kernels() -> None:
    """The plan's CUDA branch: table, launches, streams, counters. The kernels are compiled for the host."""
    tests = [*ON_GPU, "accelerator/test_on_fastema"]
    assert passed_on_accelerator("kernels", tests, "-m", "gpu") > 150


def test_on_a_device_without_kernels() -> None:
    """Somebody else's accelerator, as the installed fastema._C finds it; and the accelerator itself."""
    tests = ["accelerator/test_on_device", "accelerator/test_on_fastema", "core/shadow/test_offload_gpu"]
    assert passed_on_accelerator("plain", tests) > 50


def test_tests_that_know_of_no_device() -> None:
    left_out = " and ".join(f"not ({name})" for names in NOT_THERE.values() for name in names)
    passed = passed_on_accelerator(
        "kernels", OF_NO_DEVICE, "-m", "not slow", "-k", left_out, FASTEMA_TEST_DEFAULT_DEVICE="1"
    )
    assert passed > 500
