"""`--training-params FILE`: an EMA's recipe as JSON, in the form of YOLO-NAS and super-gradients."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fastema.core.checks import first_few
from fastema.errors import UserError
from fastema.segmentation.options import option_flag

_EXAMPLE = '{"ema": true, "ema_params": {"decay": 0.9999, "decay_type": "exp", "beta": 15}}'


def read_training_params(path: Path) -> dict[str, Any]:
    """Return the options of `fastema train` that a file sets.

    Args:
        path: JSON with `ema`, true or false, and `ema_params`: `decay`, `decay_type`, and the schedule's arguments.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--training-params {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--training-params {path} is not JSON: {error}. Expected for example {_EXAMPLE}") from error
    if not isinstance(content, dict):
        raise UserError(f"--training-params {path} must be a JSON object, for example {_EXAMPLE}")
    unknown = [repr(key) for key in content if key not in ("ema", "ema_params")]
    if unknown:
        raise UserError(
            f"--training-params {path} has {first_few(unknown, 5)}, which would not be used: only ema and ema_params "
            "are read; the rest of a training is set by flags"
        )
    wanted, params = content.get("ema"), content.get("ema_params", {})
    if not isinstance(wanted, bool):
        raise UserError(f'--training-params {path}: "ema" must be true or false, got {json.dumps(wanted)}')
    if not isinstance(params, dict):
        raise UserError(f'--training-params {path}: "ema_params" must be an object, got {json.dumps(params)}')
    return {"use_ema": wanted, **_ema_options(params, path)} if wanted else {"use_ema": False}


def refuse_conflicts(path: Path, options: Mapping[str, Any], given: Collection[str], flags: Mapping[str, Any]) -> None:
    """Raise `UserError` where the file and a given flag differ.

    Args:
        path: the file.
        options: that it sets.
        given: names of the options whose flags were given.
        flags: values of the flags.
    """
    for name, value in options.items():
        if name in given and flags[name] != value:
            raise UserError(
                f"{option_flag(name)} {flags[name]} and --training-params {path}, which says {value}, conflict"
            )
    several = sorted({"ema_decays", "ema_profiles"} & set(given))
    if several and options.get("use_ema"):
        raise UserError(
            f"{option_flag(several[0])} and --training-params {path} both say which averages there are: give one of "
            "them"
        )


def _ema_options(params: dict[str, Any], path: Path) -> dict[str, Any]:
    options: dict[str, Any] = {}
    args: dict[str, float] = {}
    for key, value in params.items():
        if key == "decay_type":
            if not isinstance(value, str):
                raise UserError(f'--training-params {path}: "decay_type" must be a name, got {json.dumps(value)}')
            options["ema_decay_type"] = value
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"--training-params {path}: {json.dumps(key)} must be a number, got {json.dumps(value)}")
        elif key == "decay":
            options["ema_decay"] = float(value)
        else:
            args[key] = float(value)
    return {**options, "ema_decay_args": args} if args else options
