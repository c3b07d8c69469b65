"""The plugin of a pytest that runs on the test accelerator: `-p accelerator.plugin`, with PYTHONPATH=tests.

FASTEMA_TEST_DEFAULT_DEVICE: also make it the default device, for tests that know of no device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from accelerator.load import load_if_asked

load_if_asked()  # before anything imports fastema
MOST_DELAY = 100  # microseconds


@pytest.fixture(autouse=True)
def late_and_watched() -> Iterator[None]:
    """Let every task start late, by a random time; and fail where the device found something wrong."""
    gpu = torch.get_device_module("hostgpu")
    gpu.set_delay(MOST_DELAY)
    gpu.set_device(0)
    if "FASTEMA_TEST_DEFAULT_DEVICE" in os.environ:
        with torch.device("hostgpu"):
            yield
    else:
        yield
    for device in range(gpu.device_count()):
        gpu.synchronize(device)
    assert gpu.take_error() == ""
