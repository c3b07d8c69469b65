"""`python bench/gpu/binary.py [FILE]`: the architectures in a built library, the installed one by default."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path


def cuobjdump() -> str | None:
    """Return the program: on PATH, or from Triton's wheel."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin:
        bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        return str(bundled) if bundled.is_file() else None
    return found


def listed(program: str, binary: Path) -> tuple[list[str], list[str]]:
    """Return the architectures with machine code, and those with PTX."""
    found = []
    for option in ("--list-elf", "--list-ptx"):
        output = subprocess.run([program, option, str(binary)], capture_output=True, text=True, check=False).stdout
        names = set(re.findall(r"\.(sm_\d+[af]?)\.", output))
        found.append(sorted(names, key=lambda name: (int(re.sub(r"\D", "", name)), name)))
    return found[0], found[1]


def main() -> int:
    """Run the command line; return the exit status."""
    if len(sys.argv) > 1:
        binary = Path(sys.argv[1])
    else:
        spec = importlib.util.find_spec("fastema")
        binary = Path(spec.origin if spec is not None and spec.origin else "fastema").with_name("_cuda.so")
        if not binary.is_file():
            print(f"there is no {binary}")
            return 1
    program = cuobjdump()
    if program is None:
        print("no cuobjdump, neither on PATH nor in Triton's wheel")
        return 1
    machine_code, ptx = listed(program, binary)
    print(
        f"{binary.name}: machine code for {', '.join(machine_code) or 'nothing'}; PTX of {', '.join(ptx) or 'nothing'}"
    )
    return 0 if machine_code else 1


if __name__ == "__main__":
    sys.exit(main())
