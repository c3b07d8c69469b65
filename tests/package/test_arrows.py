"""The folders import each other one way: cli -> guests -> front doors -> core -> backends."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastema

PACKAGE = Path(fastema.__file__).parent
FRONT = {"ema", "swa_utils", "checkpoint", "schedules", "posthoc"}
GUESTS = {"advisor", "integrations", "segmentation", "cli", "__main__"}
#: room -> the rooms that its modules may import beside itself
ALLOWED = {
    "backends": {"triton_kernels", "_C"},
    "core": {"backends"},
    **{room: {"core", "backends", *FRONT} for room in FRONT},
    "__init__": {"core", *FRONT},
    "advisor": {"core", "schedules"},
    "integrations": {"core", "backends", "advisor", *FRONT},
    "segmentation": {"core", "backends", "advisor", *FRONT},
    "cli": {"core", "backends", "advisor", "segmentation", *FRONT},
    "__main__": {"cli"},
}


def imports(path: Path) -> Iterator[str]:
    """Yield the rooms that a module imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "fastema" else [node.module]
            )
        for name in names:
            parts = name.split(".")
            if parts[0] == "fastema":
                yield parts[1] if len(parts) > 1 and _is_room(parts[1]) else "__init__"


def _is_room(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_stands_on(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = ALLOWED[room] | {room} | ({"__init__"} if room in GUESTS | FRONT else set())
    assert set(imports(path)) <= allowed


def test_every_room_has_its_place() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert rooms == set(ALLOWED)
