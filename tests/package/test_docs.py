"""README and docs: command lines are parsed by the real parser, links lead somewhere, named tests exist.

The Python blocks run under Sybil (conftest.py at the root); `mkdocs build --strict` follows the links within docs.
"""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from pathlib import Path

import pytest

from fastema import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(fastema [^`]+)`")


def commands_in(page: Path) -> list[str]:
    """Return the lines of shell blocks that start fastema, without what stands before it (torchrun)."""
    lines = []
    for language, body in FENCED.findall(page.read_text()):
        if language in ("sh", "console", ""):
            for line in body.replace("\\\n", " ").splitlines():
                found = re.match(r"(?:\$ )?(?:torchrun .*-m )?(fastema .*)", line)
                lines += [found[1]] if found else []
    return lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_line_is_parsed(page: Path) -> None:
    for line in commands_in(page):
        try:
            cli._parser().parse_args(shlex.split(line, comments=True)[1:])
        except SystemExit:
            pytest.fail(f"{page.name}: {line}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_a_sentence_have_known_flags(page: Path) -> None:
    (commands,) = (each for each in cli._parser()._actions if isinstance(each, argparse._SubParsersAction))
    for line in INLINE.findall(FENCED.sub("", page.read_text())):
        words = shlex.split(line)[1:]
        assert words[0] in commands.choices, line
        known = commands.choices[words[0]]._option_string_actions
        assert not [word for word in words if word.startswith("--") and word not in known], line


def test_every_make_target_exists() -> None:
    rules = re.findall(r"^([a-z -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {name for names in rules for name in names.split()}
    text = "".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= targets


def test_there_are_command_lines() -> None:
    assert sum(len(commands_in(page)) for page in PAGES) >= 6


def test_every_link_of_readme_leads_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    anchors = {
        re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)", text, re.M)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("https:"):
            continue
        assert (ROOT / path).exists(), target
        assert path or anchor in anchors, target


PACKAGE = ROOT / "fastema"
API = (ROOT / "docs" / "api.md").read_text()


def public_names(module: str) -> set[str] | None:
    """Return a module's `__all__`, read without importing its framework; None: it has none."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return None


def documented_names() -> dict[str, set[str]]:
    """Return the names that docs/api.md documents, or mentions, by module."""
    names: dict[str, set[str]] = {}
    for module, members in re.findall(r"^::: (fastema\.\w+)\n(?: +.*\n)*? +members: \[(.*)\]", API, re.MULTILINE):
        names[module] = set(members.split(", "))
    for module, name in re.findall(r"(?:^::: |`)(fastema(?:\.\w+)*)\.(\w+)", API, re.MULTILINE):
        if f"{module}.{name}" not in names:
            names.setdefault(module, set()).add(name)
    return names


def test_the_api_page_has_every_public_name_and_no_other() -> None:
    documented = documented_names()
    documented["fastema.swa_utils"].add("SWALR")  # torch's own class
    assert documented == {module: public_names(module) for module in documented}


def test_what_pages_import_is_on_the_api_page() -> None:
    documented = documented_names()
    text = "".join(page.read_text() for page in PAGES)
    for module, names in re.findall(r"\bfrom (fastema[.\w]*) import ([\w, ]+)", text):
        assert set(names.split(", ")) <= documented.get(module, set()), module


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(test_\w+)(?:\.py)?`", "".join(page.read_text() for page in PAGES)))
    files = list((ROOT / "tests").rglob("test_*.py"))
    existing = {path.stem for path in files}
    for path in files:
        existing.update(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    assert len(named) > 20
    assert not named - existing
