"""These run on the test accelerator, in a process of its own: test_accelerator.py starts that."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if hasattr(torch, "hostgpu") else ["test_on_*.py"]
