"""The folder of results: what each step and test came to, of which sources; written so that a cut loses nothing."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ("csrc", "triton_kernels", "fastema", "setup.py", "build_support")
#: What a folder of results may hold: eight files at most come back from some machines.
FILES = ("results.json", "tests.jsonl", "logs.txt.gz", "running.log", "cases.json", "peers.json")
_SOURCES = {".c", ".h", ".cpp", ".cu", ".py", ".pyi", ".md"}
_MOST_LOG = 1 << 20  # characters of one command, at either end


def sources_digest(parts: Sequence[str] = (*PACKAGE, "tests", "bench")) -> str:
    """Return a digest of source files, of torch and of the GPU: with any other nothing counts as done.

    What was built, and what Python and tools leave behind, is no source.
    """
    digest = hashlib.sha256(f"{torch.__version__} {device_name()}".encode())
    for part in sorted(parts):
        path = ROOT / part
        files = [path] if path.is_file() else [each for each in path.rglob("*") if each.suffix in _SOURCES]
        for file in sorted(files):
            if "build" not in file.relative_to(ROOT).parts:
                digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def device_name() -> str:
    """Return the GPU's name, or "no GPU"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def read(path: Path) -> dict[str, Any]:
    """Return what the file holds; an empty dict where there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace the file as a whole, so that a cut leaves the old one or the new one."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(scratch, path)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file of lines; a line that a cut left unfinished is none."""
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found


def pack_log(running: Path, title: str) -> str:
    """Move a command's output to the end of logs.txt.gz beside it, which `zcat` reads; return the output.

    Each entry is compressed by itself: one that a cut left unfinished takes no other with it.
    """
    text = running.read_text(errors="replace")
    kept = text if len(text) <= 2 * _MOST_LOG else f"{text[:_MOST_LOG]}\n[...]\n{text[-_MOST_LOG:]}"
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with (running.parent / "logs.txt.gz").open("ab") as packed:
        packed.write(gzip.compress(f"==== {title}, {now}\n{kept}\n".encode()))
    running.unlink()
    return text
