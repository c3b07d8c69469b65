"""An average of another library as a file of fastema's own, without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastema.checkpoint import CheckpointError, StrPath
from fastema.core.writing import replacing
from fastema.extras import require
from fastema.importing.files import read
from fastema.importing.found import Found
from fastema.importing.matching import below_each_part, respell, without_wrappers
from fastema.importing.recognise import recognise


def convert(
    source_file: StrPath, target: Path, source: str = "auto", step: int | None = None
) -> tuple[Found, int | None]:
    """Write the average in `source_file` as weights alone (`.safetensors`), or as a checkpoint of fastema.

    The checkpoint has `ema_net`, which `load_weights` takes, and `ema`, which `import_average` goes on with.

    Raises:
        ValueError, CheckpointError: as `import_average`; a file whose tensors have no names, or without a count.
    """
    content, origin = read(source_file)
    found = recognise(content, origin, source)
    step = found.step if step is None else step
    averages = [_named(tensors, found, origin) for tensors in found.averages]
    weights_only = target.suffix == ".safetensors"
    if not weights_only and step is None:
        raise ValueError(
            f"{origin} ({found.source}) does not say how many optimizer steps were made: give --step, or write the "
            "weights alone, to a file that ends in .safetensors"
        )
    try:
        with replacing(target.absolute()) as temporary:
            if weights_only:
                metadata = {"made_by": "fastema convert", "source": found.source}
                contiguous = {
                    name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in averages[0].items()
                }
                require("safetensors.torch", "posthoc").save_file(contiguous, temporary, metadata)
            else:
                updates = step if found.num_updates is None else found.num_updates
                shadow: Any = averages if len(averages) > 1 else averages[0]
                state = {**found.state, "step": step, "num_updates": updates, "shadow": shadow}
                torch.save({"ema_net": averages[0], "ema": state}, temporary)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    return found, step


def _named(tensors: Any, found: Found, origin: str) -> dict[str, Tensor]:
    if isinstance(tensors, list):
        raise ValueError(
            f"{origin} ({found.source}) holds {len(tensors)} tensors without names, in the order of the model's "
            "parameters: fastema.import_average(ema, file) has the model, and names them"
        )
    if found.spelled is None:
        return without_wrappers(tensors)
    for part, below in below_each_part(found.names):
        named = respell(tensors, below, found.spelled)
        if len(named) == len(tensors):
            return {part + name: tensor for name, tensor in named.items()}
    raise ValueError(
        f"{origin} ({found.source}) spells names so that only the model tells them: "
        "fastema.import_average(ema, file) has it"
    )
