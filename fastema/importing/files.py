"""Reading a file, a folder or a dictionary that another library wrote. No class of a stranger is ever unpickled."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastema.checkpoint import CheckpointError, StrPath, load_checkpoint
from fastema.core.checks import first_few
from fastema.extras import require

_OWN_WEIGHTS, _OWN_STATE = "ema.safetensors", "ema.json"
#: For files of class objects: what takes the average out of them, by the package of those objects.
_RECIPES = {
    "ultralytics": '{{"ema": c["ema"].float().state_dict(), "updates": c["updates"]}}',
    "mmengine": '{{k: c[k] for k in ("state_dict", "ema_state_dict")}}',
    "": '{{"ema": c["ema"]}}',
}


def read(source: StrPath | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Return the content, and how errors name it.

    Raises:
        CheckpointError: missing, damaged, no checkpoint, or one that holds objects that only running code could
            rebuild; says which two lines take the average out of it where that code is installed.
    """
    if isinstance(source, Mapping):
        return source, "the dictionary"
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"expected a path or a dictionary, got {type(source).__name__}: pass its state_dict()")
    path = Path(source)
    if path.is_dir():
        return _read_folder(path), str(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)[0], str(path)
    try:
        # Harmless, and in the checkpoints of many training scripts: an object that only has attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return load_checkpoint(path), str(path)
    except CheckpointError as error:
        names = _objects_in(path)
        if not names:
            raise
        package = next((each for each in _RECIPES if each and any(name.startswith(f"{each}.") for name in names)), "")
        keep = _RECIPES[package].format()
        raise CheckpointError(
            f"{path} holds objects of classes ({first_few(names, 3)}), which only running their code could rebuild: "
            f"that is never done here. Where {package or 'that code'} is installed, these two lines take the average "
            f'out:\n    c = torch.load("{path}", weights_only=False)\n    torch.save({keep}, "average.pt")'
            + ("" if package else "\nwith the keys under which this file has it")
        ) from error


def _objects_in(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # it is no archive of torch.save: the first error says what it is
        return []


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    safetensors = require("safetensors", "posthoc")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except Exception as error:
        raise CheckpointError(f"{path} is not a safetensors file, or damaged: {error}") from error
    # Of a tensor with several names one is stored, and the metadata says which.
    tensors.update({name: tensors[kept] for name, kept in metadata.items() if kept in tensors})
    return tensors, metadata


def _read_folder(folder: Path) -> dict[str, Any]:
    """Read a checkpoint of FastEMATrainerCallback, or what `EMAModel.save_pretrained` of diffusers wrote."""
    try:
        if (folder / _OWN_STATE).is_file():
            state = json.loads((folder / _OWN_STATE).read_text())
            count = len(state["decay"]) if isinstance(state.get("decay"), list) else 1
            paths = [folder / (f"ema_{which}.safetensors" if which else _OWN_WEIGHTS) for which in range(count)]
            shadows = [_read_safetensors(path)[0] for path in paths]
            return {**state, "shadow": shadows if isinstance(state.get("decay"), list) else shadows[0]}
        config = folder / "config.json"
        if config.is_file():
            tensors = {}
            for path in sorted(folder.glob("*.safetensors")):
                tensors.update(_read_safetensors(path)[0])
            return {**json.loads(config.read_text()), "shadow_params": tensors}
    except ValueError as error:
        raise CheckpointError(f"{folder} holds a damaged JSON file: {error}") from error
    raise CheckpointError(
        f"{folder} is a folder without ema.json (a checkpoint of FastEMATrainerCallback) and without config.json "
        "(diffusers' EMAModel.save_pretrained): name the file"
    )
