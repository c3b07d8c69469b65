"""README names tests as its promises' proofs: they must exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_readme_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)(?:\.py)?`", (ROOT / "README.md").read_text()))
    files = list((ROOT / "tests").rglob("test_*.py"))
    existing = {path.stem for path in files}
    for path in files:
        existing.update(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    assert len(named) > 20
    assert not named - existing
