"""The `fastema` command.

Errors that the user can put right are one line on stderr and exit status 2; a traceback means a bug. The modules here
import only argparse and the flags, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fastema.checkpoint import CheckpointError
from fastema.cli import advise, build, convert, distill, evaluate, info, posthoc, predict, train
from fastema.errors import Terminated, UserError

_COMMANDS = {
    "train": train,
    "distill": distill,
    "evaluate": evaluate,
    "predict": predict,
    "advise": advise,
    "posthoc": posthoc,
    "convert": convert,
    "info": info,
    "build": build,
}

# As a shell reports them: 128 + SIGINT, and 128 + SIGTERM.
_INTERRUPTED, _TERMINATED = 130, 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    parser, given = _parser(), list(sys.argv[1:] if arguments is None else arguments)
    parsed, unknown = parser.parse_known_args(given)
    if unknown:
        several = "--ema-decay" in given and all(each.replace(".", "", 1).isdigit() for each in unknown)
        hint = "; several averages are --ema-decays 0.9,0.99" if several else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    try:
        parsed.run(parsed)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may the flush at exit complain
        return 0
    except (UserError, CheckpointError, OSError) as error:
        print(f"fastema: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, Terminated)
        status = "fastema: terminated" if terminated else "fastema: interrupted"
        print(": ".join([status, *map(str, interrupt.args)]), file=sys.stderr)
        return _TERMINATED if terminated else _INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastema", description="Exponential moving averages of model weights, at the speed of memory."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
