"""The file of a GPU's results, and the digest of the sources that they are of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def sources_digest() -> str:
    """Return a digest of what a GPU runs: with other sources nothing counts as done."""
    digest = hashlib.sha256()
    folders = ("csrc", "triton_kernels", "fastema", "bench", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.[chp]*") if path.suffix != ".pyc"]
    for path in sorted([*files, ROOT / "setup.py", ROOT / "setup_gpu.py"]):
        if path.is_file():
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def read_results(path: Path) -> dict[str, Any]:
    """Return what the file holds; an empty dict where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write_part(path: Path, stage: str, part: dict[str, Any]) -> None:
    """Replace one stage's part of the file and leave the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = read_results(path) | {"device": path.stem, stage: part}
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(whole, indent=1) + "\n")
    scratch.replace(path)
