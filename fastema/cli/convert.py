"""`fastema convert`: an average that another library wrote, as a checkpoint of fastema or as plain weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastema.errors import UserError

HELP = "read the average in another library's checkpoint"
DESCRIPTION = (
    "Finds the average in a checkpoint of another library and writes it as a checkpoint of fastema, or, to a file that "
    "ends in .safetensors, as weights alone. Says what was found, and the schedule that goes on as theirs did."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("input", type=Path, metavar="IN", help="a file of torch.save or safetensors, or a folder")
    parser.add_argument("output", type=Path, metavar="OUT", help="the checkpoint to write, or weights.safetensors")
    parser.add_argument("--source", default="auto", metavar="NAME", help="the library (default: told by the content)")
    parser.add_argument("--step", type=int, metavar="N", help="optimizer steps so far, where the file does not say")


def run(arguments: argparse.Namespace) -> None:
    """Convert, and say what was found.

    Raises:
        UserError: whatever the user can put right.
    """
    from fastema.importing.converting import convert

    if arguments.step is not None and arguments.step < 0:
        raise UserError(f"--step must be at least 0, got {arguments.step}")
    try:
        found, step = convert(arguments.input, arguments.output, arguments.source, arguments.step)
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    at = "" if step is None else f", at step {step:,}"
    print(f"{arguments.output}: the average of {found.source} from {found.where or 'the top'}{at}")
    print(f"goes on as theirs: {found.goes_on}")
    for note in found.notes:
        print(f"note: {note}")
