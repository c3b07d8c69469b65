"""`python -m bench.gpu.blocks`: run the Python blocks of the pages that need a GPU. It does without Sybil.

Ends with 1 where a block raises, or where none that names "cuda" ran.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import textwrap
import traceback
from pathlib import Path
from typing import Any

import torch

from bench.gpu.results import ROOT

_BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```|<!--+ *invisible-code-block: python\n(.*?)-->", re.M | re.S)


def blocks_of(page: Path) -> list[str]:
    """Return the page's blocks of Python, those that readers do not see among them."""
    return [textwrap.dedent(found[2] or found[3]) for found in _BLOCK.finditer(page.read_text())]


def pages() -> list[Path]:
    """Return the pages with a block that names "cuda"."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if any("cuda" in block for block in blocks_of(page))]


def _names_of_the_pages() -> Any:
    """Import conftest.py at the root, by its path: another module may have the name."""
    spec = importlib.util.spec_from_file_location("names_of_the_pages", Path(__file__).parents[2] / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_page(page: Path) -> tuple[int, int, list[str]]:
    """Run a page's blocks in order, with one namespace; compile them where there is no GPU.

    Returns:
        How many blocks that name "cuda" ran, how many were left out, and why; a traceback where one raised.
    """
    conftest = _names_of_the_pages()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    ran = left_out = 0
    notes = []
    if not torch.cuda.is_available():
        codes = [compile(block, str(page), "exec") for block in blocks_of(page)]
        return 0, len(codes), ["compiled, not run: there is no GPU"]
    conftest.enter(namespace)
    try:
        for block in blocks_of(page):
            try:
                exec(compile(block, str(page), "exec"), namespace)
                ran += "cuda" in block
            except ModuleNotFoundError as error:
                if error.name is None or error.name.partition(".")[0] not in conftest.OPTIONAL:
                    raise
                left_out += 1
                notes.append(f"a block was left out: {error.name} is not installed")
    except Exception:
        notes.append(traceback.format_exc(limit=-3))
        ran = -1
    finally:
        conftest.leave(namespace)
    return ran, left_out, notes


def main() -> int:
    """Run all pages; return the exit status."""
    ran = 0
    failed = False
    for page in pages():
        of_page, left_out, notes = run_page(page)
        failed = failed or of_page < 0
        ran += max(0, of_page)
        state = "FAILED" if of_page < 0 else f"{of_page} blocks for a GPU ran"
        print(f"{page.relative_to(ROOT)}: {state}, {left_out} left out", *dict.fromkeys(notes), sep="\n  ")
    print(f"{ran} blocks for a GPU ran")
    return 1 if failed or ran == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
