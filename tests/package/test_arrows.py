"""The folders import each other one way: cli -> guests -> front doors -> core -> backends -> memory."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import fastema

PACKAGE = Path(fastema.__file__).parent
FRONT = {"ema", "swa_utils", "checkpoint", "posthoc", "importing"}
GUESTS = {"advisor", "integrations", "segmentation", "cli", "__main__"}
GROUND = {"schedules", "averaging_functions", "extras", "errors", "memory"}  # they import nothing of fastema
#: A folder or module of fastema -> those that it may import beside itself.
ALLOWED = {
    **{part: set() for part in GROUND},
    "backends": {"memory", "triton_kernels", "_C"},
    "core": {"backends", *GROUND},
    **{part: {"backends", "core", *GROUND, *FRONT} for part in FRONT},
    "__init__": {"core", "schedules", *FRONT},
    "advisor": {"core", *GROUND},
    "integrations": {"backends", "advisor", "core", *GROUND, *FRONT},
    "segmentation": {"backends", "advisor", "core", *GROUND, *FRONT},
    "cli": {"backends", "advisor", "segmentation", "core", *GROUND, *FRONT},
    "__main__": {"cli"},
}


def part_of(names: Sequence[str]) -> str:
    """Return the folder or module of fastema, or the folder of core, by the names below the package."""
    if not names or not ((PACKAGE / names[0]).is_dir() or (PACKAGE / f"{names[0]}.py").is_file()):
        return "__init__"
    return names[0]


def imports(path: Path) -> Iterator[str]:
    """Yield the parts of fastema that a module imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *below = name.split(".")
            if package == "fastema":
                yield part_of(below)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_part_imports_only_those_below_it(path: Path) -> None:
    part = part_of(path.relative_to(PACKAGE).with_suffix("").parts)
    allowed = ALLOWED[part] | {part} | ({"__init__"} if part in GUESTS | FRONT else set())
    assert set(imports(path)) <= allowed


def test_nothing_uses_a_private_name_of_fastema() -> None:
    """Adapters, posthoc and checkpoints use `ema.engine` and `ema.counter`."""
    uses = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.attr}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and getattr(node.value, "attr", getattr(node.value, "id", "")) in ("ema", "_ema")
    ]
    assert not uses


def test_every_part_has_its_place() -> None:
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    assert {part_of(path.parts) for path in paths} == set(ALLOWED)


def test_no_two_files_have_one_name() -> None:
    names = [path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert {name for name in names if names.count(name) > 1} == set()
