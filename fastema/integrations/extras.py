"""The frameworks are extras: a missing one is an error of one line that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports `module`, which the extra `extra` of fastema installs.

    Raises:
        ImportError: it is not installed; names the extra. An installed framework that is itself broken raises what
            it raises.

    Example:
        >>> require("json", "no extra at all").__name__
        'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        # A module that the framework itself misses is another problem, with a message of its own.
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(f"{package} is not installed: pip install fastema[{extra}]", name=error.name) from None
