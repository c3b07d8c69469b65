"""`fastema build`: compiles the extension for this torch and this Python."""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from fastema.errors import UserError

HELP = "compile the extension for this torch and this Python, where there is none"
DESCRIPTION = "Compiles the extension for the torch and the Python at hand into fastema's folder. Needs a C++ compiler."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: there are no flags."""


def run(_: argparse.Namespace) -> None:
    """Compile, and say in a new process what runs now."""
    import torch

    from fastema.backends import building, loading

    sources = next(folder for folder in (loading.FOLDER / "csrc", loading.FOLDER.parent / "csrc") if folder.is_dir())
    target, kernels = loading.extension_file(), loading.FOLDER / "_kernels.so"
    version = importlib.metadata.version("fastema")
    with tempfile.TemporaryDirectory() as work:
        try:
            if not kernels.is_file():
                building.build_kernels(kernels, sources, Path(work) / "kernels", version)
            torch_folder, python_include = Path(torch.__file__).parent, Path(sysconfig.get_path("include"))
            building.build_extension(target, sources, Path(work), torch_folder, python_include, version)
        except building.BuildError as error:
            raise UserError(f"{target.name} was not built: {error}") from None
    print(f"built {target}", flush=True)
    subprocess.run([sys.executable, "-m", "fastema", "info"], check=True)
