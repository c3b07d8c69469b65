"""The errors that a command prints as one line, without a traceback; trainer and commands raise them."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right. The message says what is wrong, where, and what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a command as Ctrl-C does, with an exit status of its own."""
