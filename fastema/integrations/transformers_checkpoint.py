"""The average in the Hugging Face Trainer's checkpoints: as safetensors, and of a PEFT model as an adapter."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastema.core.checks import first_few
from fastema.core.counters import state_of
from fastema.core.policy import Rule
from fastema.core.state import by_name
from fastema.ema import FastEMA
from fastema.extras import require

if TYPE_CHECKING:
    import safetensors
    import safetensors.torch
else:
    safetensors = require("safetensors", "transformers")
    require("safetensors.torch", "transformers")

#: The averaged weights under the model's own keys; of several averages, the others are in ema_1.safetensors, ...
EMA_WEIGHTS = "ema.safetensors"
#: The counters that the average resumes with.
EMA_STATE = "ema.json"
#: Of a PEFT model, the averaged adapter as `PeftModel.save_pretrained` writes it.
EMA_ADAPTER = "ema_adapter"


def write_average(ema: FastEMA, folder: Path, model: nn.Module) -> None:
    """Write `ema.safetensors`, loadable into the model without fastema, and `ema.json`.

    Of a PEFT model `ema.safetensors` holds the averaged tensors alone, and `ema_adapter/` the averaged adapter.
    """
    peft = is_peft(model)
    ema.engine.ensure_current()
    for which in range(ema.engine.count):
        # Of a tensor with several names one is written, and the metadata says which: as safetensors itself does it.
        first_names: dict[Any, str] = {}
        tensors: dict[str, Tensor] = {}
        metadata = {"format": "pt"}
        every = ema.engine.averages.averages(which)
        averages = ema.engine.model_state(which, every)
        if peft:
            # The whole model's state with the averages in it, of which PEFT takes the adapter's part.
            model.save_pretrained(_numbered(folder / EMA_ADAPTER, which), state_dict=averages)  # type: ignore[operator]
            averages = {}
        # Averaged tensors that the model itself does not save are needed to resume.
        for name, value in {**by_name(every, saved_only=True), **averages}.items():
            if not isinstance(value, Tensor):
                continue
            first = first_names.setdefault((value.data_ptr(), value.shape, value.stride(), value.dtype), name)
            if first == name or value.numel() == 0:
                tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            else:
                metadata[name] = first
        del every, averages, value  # averages of bfloat16 weights are copies
        safetensors.torch.save_file(tensors, _numbered(folder / EMA_WEIGHTS, which), metadata=metadata)
    counters = state_of(ema.counter)
    if ema.engine.policy is not None:
        counters["averaged"] = ema.engine.averages.averaged_names()  # another time the policy may say something else
    (folder / EMA_STATE).write_text(json.dumps(counters, indent=2) + "\n")


def read_average(ema: FastEMA, folder: Path) -> None:
    """Load what `write_average` wrote, by value.

    What was averaged then and does not train now stays averaged; what trains now and did not then starts as a copy.

    Raises:
        ValueError: it is the average of another model; lists the first differences. Nothing is changed.
    """
    state: dict[str, Any] = json.loads((folder / EMA_STATE).read_text())
    averaged = state.pop("averaged", None)
    own = by_name(ema.engine.averages.averages(0), saved_only=True)
    wanted = dict.fromkeys([*own, *(averaged or ())])
    shadows = []
    for which in range(len(state["decay"]) if isinstance(state["decay"], list) else 1):
        with safetensors.safe_open(_numbered(folder / EMA_WEIGHTS, which), framework="pt") as file:
            aliases = file.metadata()
            held = set(file.keys())
            found = {name: name if name in held else aliases.get(name) for name in wanted}
            shadows.append({name: file.get_tensor(stored) for name, stored in found.items() if stored is not None})
    if averaged is not None and any(name in shadows[0] for name in averaged):
        begun = [name for name in own if name not in shadows[0]]
        for which, shadow in enumerate(shadows):
            live = by_name(ema.engine.averages.averages(which), saved_only=True)
            shadow.update({name: live[name] for name in begun})
        if begun:
            warnings.warn(
                f"the checkpoint has no average of {first_few([repr(name) for name in begun], 5)}, which did not train "
                "then: they are averaged from now on, starting as a copy",
                stacklevel=2,
            )
    ema.load_state_dict({**state, "shadow": shadows if isinstance(state["decay"], list) else shadows[0]})


def _numbered(path: Path, which: int) -> Path:
    """Return the path for one of several averages: the first has the plain name."""
    return path if which == 0 else path.with_name(f"{path.stem}_{which}{path.suffix}")


def is_peft(model: nn.Module) -> bool:
    """Return whether a model is PEFT's."""
    peft = sys.modules.get("peft")  # nothing is a PeftModel where peft was not imported
    return peft is not None and isinstance(model, peft.PeftModel)


def what_trains(name: str, tensor: Tensor, module: nn.Module | None) -> Rule | None:
    """Average the parameters that train and the buffers of their modules, and skip the rest: a policy for FastEMA."""
    if isinstance(tensor, nn.Parameter):
        return "average" if tensor.requires_grad else "skip"
    trains = module is not None and any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    return None if trains else "skip"
