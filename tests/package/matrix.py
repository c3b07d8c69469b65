"""`make matrix`: test the wheel with other Pythons and other torches, each in a venv with nothing else.

Takes pairs such as `python3.12:2.13.0`, builds one wheel for all, and installs it where no compiler is on the PATH.
Runs the tests with its kernels, and again with an extension that is refused, as of a torch with another layout. Writes
one row a pair between the markers of docs/promises.md. Outside CI: it downloads gigabytes.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/promises.md"
TESTS = ("tests/core", "tests/checkpoint", "tests/swa_utils", "tests/backends")
TESTS += tuple(f"tests/package/test_{name}.py" for name in ("import", "loading"))
TOOLS = ("numpy", "pytest>=8", "pytest-xdist", "hypothesis", "safetensors")
MARKED = re.compile(r"(<!-- matrix:begin -->\n).*?(<!-- matrix:end -->)", re.DOTALL)
# Moves a field of torch's structures in the extension, as tests/package/test_loading.py does.
REFUSE = """
import pathlib; from fastema.backends import loading
file = loading.extension_file()
code = bytearray(file.read_bytes())
code[code.index(loading._MARK) + len(loading._MARK)] ^= 8
file.unlink(); file.write_bytes(code)
"""


def main(pairs: list[str]) -> int:
    """Try every pair; return 1 if a test failed or nothing could be built."""
    subprocess.run(["make", "wheel", f"WHEEL={' '.join(pairs)}"], cwd=ROOT, check=True)
    rows = [tried(*pair.split(":")) for pair in pairs]
    table = ["| Python | torch | tests with the kernels | tests with the extension refused |", "|---|---|---|---|"]
    table += [row for row, _ in rows]
    when = f"{datetime.date.today()}, {platform.system()} {platform.machine()}, `make matrix`:"
    PAGE.write_text(MARKED.sub(lambda found: found[1] + "\n".join([when, "", *table, ""]) + found[2], PAGE.read_text()))
    print("\n".join(table))
    return 0 if all(passed for _, passed in rows) else 1


def tried(python: str, torch: str) -> tuple[str, bool]:
    """Return the row of one pair, and whether all is well."""
    folder = ROOT / ".matrix" / f"{Path(python).name}-torch{torch}"
    subprocess.run([python, "-m", "venv", folder], check=True)  # an earlier one is used again
    own = folder / "bin/python"
    pip = [own, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    (wheel,) = (ROOT / "dist").glob("*.whl")
    subprocess.run([*pip, f"torch=={torch}", *TOOLS], check=True)
    subprocess.run([*pip, "--force-reinstall", "--no-deps", wheel], check=True)
    # A copy without the package: what is tested is what was installed.
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "runs", "fastema"))
    # Neither a compiler nor a toolkit.
    options = {"cwd": tree, "env": {**os.environ, "PATH": str(folder / "bin"), "CUDA_HOME": ""}}
    options |= {"stdout": subprocess.PIPE, "text": True}

    def tests(expected: str) -> tuple[str, bool]:
        info = subprocess.run([folder / "bin/fastema", "info"], check=True, **options).stdout
        print(info, flush=True)
        run = subprocess.run([own, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *TESTS], **options)
        with (folder / "tests.log").open("a") as log:
            log.write(info + run.stdout)
        counts = re.sub(r"(, \d+ warnings?)? in .*|=", "", run.stdout.strip().splitlines()[-1]).strip()
        return counts, run.returncode == 0 and expected in info

    native = tests("native (cpu)   usable")
    subprocess.run([own, "-c", REFUSE], check=True, **options)
    refused = tests("with another layout")
    version = re.sub(r"^Python ", "", subprocess.run([own, "--version"], check=True, **options).stdout.strip())
    return f"| {version} | {torch} | {native[0]} | {refused[0]} |", native[1] and refused[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
