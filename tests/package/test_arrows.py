"""The folders import each other one way: cli -> guests -> front doors -> core -> backends.

Inside core: shadow and averaged_model -> swap -> model; they and decay -> the files beside the folders.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import fastema

PACKAGE = Path(fastema.__file__).parent
FRONT = {"ema", "swa_utils", "checkpoint", "schedules", "posthoc", "importing"}
GUESTS = {"advisor", "integrations", "segmentation", "cli", "__main__"}
#: A folder of core -> those that it may import beside itself; "core" are the files beside the folders.
IN_CORE: dict[str, set[str]] = {
    "core": set(),
    "core.decay": {"core"},
    "core.model": {"core"},
    "core.swap": {"core", "core.model"},
    "core.shadow": {"core", "core.model", "core.swap"},
    "core.averaged_model": {"core", "core.model", "core.swap"},
}
CORE = set(IN_CORE)
#: A folder or module of fastema -> those that it may import beside itself.
ALLOWED = {
    "backends": {"triton_kernels", "_C"},
    **{part: {"backends", *below} for part, below in IN_CORE.items()},
    **{part: {"backends", *CORE, *FRONT} for part in FRONT},
    "__init__": {*CORE, *FRONT},
    "advisor": {"schedules", *CORE},
    "integrations": {"backends", "advisor", *CORE, *FRONT},
    "segmentation": {"backends", "advisor", *CORE, *FRONT},
    "cli": {"backends", "advisor", "segmentation", *CORE, *FRONT},
    "__main__": {"cli"},
}


def part_of(names: Sequence[str]) -> str:
    """Return the folder or module of fastema, or the folder of core, by the names below the package."""
    if not names or not ((PACKAGE / names[0]).is_dir() or (PACKAGE / f"{names[0]}.py").is_file()):
        return "__init__"
    return ".".join(names[:2]) if ".".join(names[:2]) in IN_CORE else names[0]


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


def test_every_part_has_its_place() -> None:
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    assert {part_of(path.parts) for path in paths} == set(ALLOWED)
    assert {f"core.{path.parts[1]}" for path in paths if path.parts[0] == "core" and len(path.parts) > 2} < CORE
