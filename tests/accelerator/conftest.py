"""Leave files named test_on_* to test_accelerator.py, which runs them on the test accelerator in other processes."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if hasattr(torch, "hostgpu") else ["test_on_*.py"]
