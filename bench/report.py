"""`python -m bench.report FILE... [--plots FOLDER] [--readme PAGE... [--check]]`

Make tables and plots from the records of one machine. Prints the tables as Markdown; `--readme` writes each between its
markers, `<!-- bench:begin NAME -->` and `<!-- bench:end -->`; `--check` writes nothing and exits with 1 where the page
differs from the records.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.harness.cases import Unavailable
from bench.harness.records import Run, load
from bench.pages.tables import TABLES, filled


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Make tables and plots of a run.")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="of one machine, written with --json")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the plots there")
    parser.add_argument(
        "--readme", type=Path, nargs="+", metavar="PAGE", help="regenerate the marked tables of these pages"
    )
    parser.add_argument("--check", action="store_true", help="with --readme: change nothing, fail if it would change")
    parsed = parser.parse_args(arguments)
    if parsed.check and parsed.readme is None:
        parser.error("--check needs --readme, the page to check")
    try:
        run = load(parsed.files)
        if parsed.plots is not None:
            from bench.pages.plots import draw

            for path in draw(run, parsed.plots):
                print(f"written: {path}")
        if parsed.readme is not None:
            return max(_rewrite(page, run, parsed.check) for page in parsed.readme)
    except (OSError, ValueError, Unavailable) as error:
        print(error, file=sys.stderr)
        return 2
    if parsed.readme is None:
        print("\n\n".join(f"### {name}\n\n{table(run)}" for name, table in TABLES.items()))
    return 0


def _rewrite(path: Path, run: Run, check: bool) -> int:
    page = path.read_text()
    rewritten = filled(page, run)
    if rewritten == page:
        print(f"{path} agrees with the records")
        return 0
    if check:
        print(f"{path} does not say what the records say: run bench.report with --readme, without --check")
        return 1
    path.write_text(rewritten)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
