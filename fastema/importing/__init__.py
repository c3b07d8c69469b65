"""Go on with the average of another library, in mid-run: `import_average`.

A reader a format (`lists_and_modules`, `trainers`) tells it by its content, `matching` finds the model's name of every
tensor, and `FastEMA.load_state_dict` loads all or nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastema.checkpoint import StrPath
from fastema.core.checks import checked_count, first_few
from fastema.ema import FastEMA
from fastema.importing.files import read
from fastema.importing.found import Found, Tensors
from fastema.importing.matching import Matched, match
from fastema.importing.recognise import recognise

__all__ = ["ImportedAverage", "import_average"]

_SAME_DECAY = 1e-6


@dataclass(frozen=True)
class ImportedAverage:
    """What `import_average` found and did; printed, it says so in a few lines.

    Attributes:
        source: the library that wrote it.
        where: the keys in the file that lead to it.
        step: optimizer steps so far; the next `update()` is that of the step after.
        loaded: names whose average is the file's now.
        kept: names that the format leaves out, buffers mostly: their average is as it was, the live value in a new
            FastEMA.
        ignored: names of the file that FastEMA does not average.
        goes_on: the FastEMA whose schedule goes on as theirs did.
        notes: what else there is to know about the format.
    """

    source: str
    where: str
    step: int
    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    ignored: tuple[str, ...]
    goes_on: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors from {self.where or 'the top'}, at step {self.step:,}"]
        if self.kept:
            lines.append(f"not in the file, as before: {first_few(self.kept, 5)}")
        if self.ignored:
            lines.append(f"in the file, not averaged here: {first_few(self.ignored, 5)}")
        return "\n".join([*lines, f"goes on as theirs: {self.goes_on}", *(f"note: {note}" for note in self.notes)])


def import_average(
    ema: FastEMA, path_or_dict: StrPath | Mapping[str, Any], source: str = "auto", step: int | None = None
) -> ImportedAverage:
    """Take over the average that another library wrote, so that `ema` goes on with it.

    The format is told by its content. Names may carry prefixes and wrappers, on either side; every tensor of the file
    and of the model is accounted for. The schedule is `ema`'s own: the result names the one that goes on as theirs did,
    and a warning says where the file shows that it is another.

    Args:
        ema: a FastEMA of the model that is being trained, with the live weights in it.
        path_or_dict: a file of `torch.save` or safetensors, the folder of a Hugging Face checkpoint or of diffusers'
            `save_pretrained`, or what such a file holds. Nothing in it can run code.
        source: "auto", or the library: "torch", "lightning", "timm", "diffusers", "ema-pytorch", "torch-ema",
            "k-diffusion", "litema", "ultralytics", "mmengine", "composer", "ignite", "d2go", "boltz", "edm2",
            "super-gradients", "detr", "callback" (`ema_state_dict`), "fastema", or "state_dict": plain weights.
        step: optimizer steps so far; None: as the file says. Needed where it does not say.

    Raises:
        ValueError: nothing or several averages are found; a tensor has no partner or another shape, or elements that
            are NaN or infinite; the count is missing. Nothing is changed.
        fastema.checkpoint.CheckpointError: the file is missing or damaged, or holds objects of classes; says which two
            lines take the average out of those.
        RuntimeError: the EMA weights are applied.

    Examples:
        >>> from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
        >>> model = torch.nn.Linear(2, 1)
        >>> theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        >>> theirs.update_parameters(model)
        >>> ema = FastEMA(model, decay=0.99, decay_type="constant")
        >>> result = fastema.import_average(ema, theirs.state_dict())
        >>> result.source, result.step, ema.num_updates
        ('torch', 1, 1)
    """
    if ema.is_applied:
        raise RuntimeError(
            "import_average() while the EMA weights are applied: call restore(), or leave the block, first"
        )
    content, origin = read(path_or_dict)
    found = recognise(content, origin, source)
    step = checked_count("step", _step_of(found, step, origin), at_least=0)
    shadow = ema.state_dict()["shadow"]
    several = isinstance(shadow, list)
    own: list[dict[str, Tensor]] = shadow if several else [shadow]
    chosen = _chosen(found, ema, len(own))
    matches: list[Matched] = []
    for given, mine in zip(chosen, own, strict=True):
        try:
            matches.append(match(given, mine, ema.source, found.whole, found.spelled))
        except ValueError as error:
            raise ValueError(f"{origin}, {found.source} at {found.where or 'the top'}: {error}") from None
    notes = (*found.notes, *_precision(matches, own))
    averages = [each.averages for each in matches]
    state = {**found.state, "step": step, "shadow": averages if several else averages[0]}
    ema.load_state_dict(
        {**state, "num_updates": step if found.num_updates is None else found.num_updates}, strict=False
    )
    following = ema.decay_at(step + 1)
    if found.next_decay is not None and not several and abs(following - found.next_decay) > _SAME_DECAY:
        warnings.warn(
            f"the next update has decay {following:.6g}, that of the file's {found.source} would be "
            f"{found.next_decay:.6g}: {found.goes_on} goes on as theirs did",
            stacklevel=2,
        )
    return ImportedAverage(
        found.source,
        found.where,
        step,
        tuple(name for name in matches[0].averages if name not in set(matches[0].kept)),
        tuple(matches[0].kept),
        tuple(matches[0].ignored),
        found.goes_on,
        notes,
    )


def _step_of(found: Found, step: int | None, origin: str) -> int:
    if step is not None:
        return step
    if found.step is None:
        raise ValueError(
            f"{origin} ({found.source}) does not say how many optimizer steps were made: pass step=, the number so far"
        )
    return found.step


def _chosen(found: Found, ema: FastEMA, count: int) -> list[Tensors]:
    """Return the file's averages for those of `ema`: in order, or by their widths."""
    arguments = ema.state_dict()["decay_args"]
    if found.sigma_rels and "sigma_rel" in arguments:
        wanted = arguments["sigma_rel"] if isinstance(arguments["sigma_rel"], list) else [arguments["sigma_rel"]]
        held = [round(width, 6) for width in found.sigma_rels]
        absent = [width for width in wanted if round(width, 6) not in held]
        if absent:
            raise ValueError(f"the file has averages of sigma_rel {list(found.sigma_rels)}, none of {absent[0]}")
        return [found.averages[held.index(round(width, 6))] for width in wanted]
    if len(found.averages) != count:
        raise ValueError(
            f"the file ({found.source}) has {len(found.averages)} averages, this FastEMA has {count}: build it with as "
            "many"
        )
    return found.averages


def _precision(matches: list[Matched], own: list[dict[str, Tensor]]) -> list[str]:
    """Return a note where the file has 16 bits for averages that are kept in more."""
    for each, mine in zip(matches, own, strict=True):
        for name, given in each.averages.items():
            if given.is_floating_point() and given.dtype.itemsize < mine[name].dtype.itemsize:
                return [f"the file holds averages in {given.dtype}, which go on in {mine[name].dtype}"]
    return []
