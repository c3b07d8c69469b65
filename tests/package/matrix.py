"""`make matrix`: test the wheel with other Pythons and other torches, each in a venv with nothing else.

Takes pairs such as `python3.12:2.13.0`, builds one wheel for all, and installs it where no compiler is on the PATH.
Writes one row a pair between the markers of docs/promises.md. Outside CI: it downloads gigabytes.
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
TESTS += tuple(f"tests/package/test_{name}.py" for name in ("import", "loading"))  # also with the layout refused
TOOLS = ("numpy", "pytest>=8", "hypothesis", "safetensors")
MARKED = re.compile(r"(<!-- matrix:begin -->\n).*?(<!-- matrix:end -->)", re.DOTALL)


def main(pairs: list[str]) -> int:
    """Try every pair; return 1 if a test failed or nothing could be built."""
    subprocess.run(["make", "wheel", f"WHEEL={' '.join(pairs)}"], cwd=ROOT, check=True)
    rows = [tried(*pair.split(":")) for pair in pairs]
    table = ["| Python | torch | usable backends | tests |", "|---|---|---|---|", *(row for row, _ in rows)]
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
    subprocess.run([*pip, f"torch=={torch}"], check=True)
    # A copy without the package: what is tested is what was installed.
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "runs")
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT, tree, ignore=ignored)
    shutil.rmtree(tree / "fastema")
    (wheel,) = (ROOT / "dist").glob("*.whl")
    subprocess.run([*pip, "--force-reinstall", "--no-deps", wheel], check=True)
    subprocess.run([*pip, *TOOLS], check=True)
    # Neither a compiler nor a toolkit.
    environment = {**os.environ, "PATH": str(folder / "bin"), "CUDA_HOME": ""}
    options = {"cwd": tree, "env": environment, "stdout": subprocess.PIPE, "text": True}
    info = subprocess.run([folder / "bin/fastema", "info"], check=True, **options).stdout
    print(info, flush=True)
    run = subprocess.run([own, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS], check=False, **options)
    (folder / "tests.log").write_text(run.stdout)
    last = run.stdout.strip().splitlines()[-1]
    counts = re.sub(r" in .*|=", "", last).strip()
    values = dict(line.split(None, 1) for line in info.splitlines() if not line.startswith((" ", "backends")))
    built = ", ".join(re.findall(r"^  (\w+ \(\w+\)) +usable:", info, re.MULTILINE))
    return f"| {values['python']} | {values['torch']} | {built} | {counts} |", run.returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
