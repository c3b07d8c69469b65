"""fastema/_C.pyi says what the compiled module has: names, arguments, and which of them may be left out."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

import fastema

STUB = Path(fastema.__file__).with_name("_C.pyi")
_C: Any = pytest.importorskip("fastema._C", reason="fastema._C was not built")


def declared(body: list[ast.stmt], prefix: str = "") -> dict[str, list[str] | None]:
    """Return the stub's functions with their arguments, those with a default marked; None for what is no function."""
    found: dict[str, list[str] | None] = {}
    for node in body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = None
            found.update(declared(node.body, f"{node.name}."))
        elif isinstance(node, ast.FunctionDef):
            every = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args) if arg.arg != "self"]
            if node.args.posonlyargs:  # pybind11 has no names for these
                every = [f"arg{index}" for index in range(len(every))]
            required = len(every) - len(node.args.defaults)
            is_property = any(isinstance(each, ast.Name) and each.id == "property" for each in node.decorator_list)
            found[prefix + node.name] = (
                None if is_property else every[:required] + [f"{name}=" for name in every[required:]]
            )
        elif isinstance(node, ast.AnnAssign):
            assert isinstance(node.target, ast.Name)
            found[prefix + node.target.id] = None
    return found


def compiled(owner: Any, prefix: str = "") -> dict[str, list[str] | None]:
    """Return the same of the module; pybind11 writes the signature into the docstring."""
    found: dict[str, list[str] | None] = {}
    for name in vars(owner):
        if name.startswith("_") and name != "__init__":
            continue
        value = getattr(owner, name)
        signature = re.match(rf"{name}\((.*)\) -> ", value.__doc__ or "") if callable(value) else None
        found[prefix + name] = None if signature is None else arguments(signature[1])
        if isinstance(value, type):
            found.update(compiled(value, f"{name}."))
    return found


def arguments(signature: str) -> list[str]:
    while re.search(r"\[[^\[\]]*\]", signature):  # types, and defaults that are lists
        signature = re.sub(r"\[[^\[\]]*\]", "", signature)
    parts = [part.strip() for part in signature.split(",") if part.strip()]
    names = [part.partition(":")[0] + ("=" if "=" in part else "") for part in parts]
    return [name for name in names if name != "self"]


def test_the_stub_says_what_the_module_has() -> None:
    stub, module = declared(ast.parse(STUB.read_text()).body), compiled(_C)
    for found in (stub, module):  # Python's own, of every enumeration
        found.pop("Isa.name", None)
        found.pop("Isa.value", None)
    assert stub == module
