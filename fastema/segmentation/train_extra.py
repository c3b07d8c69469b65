"""The packages of the `train` extra, looked for before anything heavy is imported."""

from __future__ import annotations

from fastema import extras
from fastema.errors import UserError

_NEEDED = {name: name for name in ("numpy", "scipy", "timm", "rich", "matplotlib")} | {"PIL": "pillow"}


def missing_packages() -> list[str]:
    """Return the packages of the `train` extra that are not installed."""
    return extras.missing_packages(_NEEDED)


def require_train_extra() -> None:
    """Raise `UserError` with the command to run if a package of the `train` extra is missing."""
    if missing := missing_packages():
        raise UserError(f"{', '.join(missing)} not installed: pip install 'fastema[train]'")
