"""The folders of the trainer import each other in one direction."""

from __future__ import annotations

import ast
from pathlib import Path

import fastema.segmentation

ROOT = Path(fastema.segmentation.__file__).parent
# Each may import those before it. "" is for the files beside the folders.
ORDER = ["", "data", "model", "distributed", "eval", "report", "train"]


def folder_of(module: str) -> str:
    parts = module.removeprefix("fastema.segmentation").strip(".").split(".")
    return parts[0] if parts[0] in ORDER else ""


def test_folders_import_only_those_before_them() -> None:
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} == set(ORDER[1:])
    upward = []
    for file in ROOT.rglob("*.py"):
        own = file.parent.name if file.parent != ROOT else ""
        for node in ast.walk(ast.parse(file.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            ours = module.startswith("fastema.segmentation")
            if module.startswith("fastema.cli") or (ours and ORDER.index(folder_of(module)) > ORDER.index(own)):
                upward.append(f"{file.relative_to(ROOT)} imports {module}")
    assert not upward


def test_no_folder_is_crowded() -> None:
    for folder in (ROOT, *(ROOT / name for name in ORDER[1:])):
        assert len([file for file in folder.glob("*.py") if file.name != "__init__.py"]) <= 14, folder
