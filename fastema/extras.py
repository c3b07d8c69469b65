"""Optional packages: a missing one is an error of one line that says what to install."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, which the extra `extra` of fastema installs.

    Raises:
        ImportError: it is not installed; names the extra. An installed framework that is itself broken raises what
            it raises.

    Examples:
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


def missing_packages(needed: Mapping[str, str]) -> list[str]:
    """Return the packages that are not installed, without importing any.

    Args:
        needed: module name to the name that its package has on the index.

    Examples:
        >>> missing_packages({"json": "no-package", "no_such_module": "some-package"})
        ['some-package']
    """
    return [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
