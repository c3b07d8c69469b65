"""`python -m bench.gpu.machine`: what this machine is, and which of the tools are there. Nothing here is a test."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

_TOOLS = ("nvcc", "g++", "ninja", "make", "compute-sanitizer", "ncu", "nvdisasm")
_PACKAGES = ("torch", "triton", "numpy", "setuptools", "pytest", "hypothesis", "timm", "sybil")
_ASKED = "name,driver_version,memory.total,clocks.max.sm"


def main() -> int:
    """Print it."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        print("no nvidia-smi")
    else:
        command = [smi, f"--query-gpu={_ASKED}", "--format=csv,noheader"]
        print(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    print(f"python {platform.python_version()}; {', '.join(versions)}")
    print("; ".join(f"{tool}: {shutil.which(tool) or 'none'}" for tool in _TOOLS))
    header = Path(sysconfig.get_path("include")) / "Python.h"
    print(f"{header}: {'there' if header.is_file() else 'missing: neither the extension nor Triton can be compiled'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
