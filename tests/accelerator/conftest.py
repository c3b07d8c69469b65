"""What is called test_on_* runs on the test accelerator, in processes of its own that test_accelerator.py starts."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if hasattr(torch, "hostgpu") else ["test_on_*.py"]
