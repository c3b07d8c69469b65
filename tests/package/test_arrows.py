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
#: A folder or module of fastema -> those that it may import beside itself.
ALLOWED = {
    "backends": {"triton_kernels", "_C"},
    "core": {"backends"},
    **{part: {"core", "backends", *FRONT} for part in FRONT},
    "__init__": {"core", *FRONT},
    "advisor": {"core", "schedules"},
    "integrations": {"core", "backends", "advisor", *FRONT},
    "segmentation": {"core", "backends", "advisor", *FRONT},
    "cli": {"core", "backends", "advisor", "segmentation", *FRONT},
    "__main__": {"cli"},
}


def imports(path: Path) -> Iterator[str]:
    """Yield the parts of fastema that a module imports, also inside functions."""
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
                yield parts[1] if len(parts) > 1 and _is_part(parts[1]) else "__init__"


def _is_part(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_part_imports_only_those_below_it(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = ALLOWED[part] | {part} | ({"__init__"} if part in GUESTS | FRONT else set())
    assert set(imports(path)) <= allowed


def test_every_part_has_its_place() -> None:
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert parts == set(ALLOWED)
