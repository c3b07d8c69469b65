"""Averages in the checkpoints of trainers: by their form (mmengine, composer, boltz, EDM2, DETR), or by their key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from fastema.importing.found import Found, NotAverageYet, is_state, number, tensors_in


def fastema(content: Mapping[str, Any]) -> Iterator[Found]:
    """Find `FastEMA.state_dict()`."""
    if not {"step", "num_updates", "shadow"} <= set(content):
        return
    shadows = content["shadow"] if isinstance(content["shadow"], list) else [content["shadow"]]
    if not all(isinstance(shadow, Mapping) for shadow in shadows):
        return
    state = {key: content[key] for key in ("decay", "decay_type", "decay_args") if key in content}
    if "last_update" in content:
        state["last_update"] = content["last_update"]
    yield Found(
        "fastema",
        [tensors_in(shadow) for shadow in shadows],
        "the schedule of the state goes on",
        step=number(content["step"]),
        num_updates=number(content["num_updates"]),
        whole=False,
        state=state,
    )


def mmengine(content: Mapping[str, Any]) -> Iterator[Found]:
    """Find the checkpoint of mmengine's EMAHook, which exchanges both sides: the average is `state_dict`."""
    raw = content.get("ema_state_dict")
    if not (isinstance(raw, Mapping) and "steps" in raw and tensors_in(raw, "module.")):
        return
    averages = tensors_in(content.get("state_dict"))
    if not set(tensors_in(raw, "module.")) <= set(averages):
        return
    steps = number(raw["steps"])
    if steps == 0:
        raise NotAverageYet("steps is 0: nothing was averaged yet")
    yield Found(
        "mmengine",
        [averages],
        'FastEMA(model, decay=1 - momentum, decay_type="constant", buffers="average" if update_buffers else "copy"); '
        'MomentumAnnealingEMA: decay_type="warmup", inv_gamma=gamma, power=1; StochasticWeightAverage: "power", '
        "gamma=0",
        "state_dict",
        step=steps,
        notes=("ema_state_dict holds the trained weights: EMAHook exchanges the two when it saves",),
    )


def composer(content: Mapping[str, Any]) -> Iterator[Found]:
    """Find composer's EMA algorithm in its checkpoint, or the algorithm's own state."""
    algorithm, weights = content, None
    state = content.get("state")
    if isinstance(state, Mapping) and "algorithms" in state:
        algorithms = state["algorithms"]
        pairs = algorithms.items() if isinstance(algorithms, Mapping) else algorithms
        algorithm, weights = dict(pairs).get("EMA", {}), state.get("model")
    held = algorithm.get("ema_model")
    if not (isinstance(held, Mapping) and {"named_parameters_dict", "named_buffers_dict"} <= set(held)):
        return
    if algorithm.get("ema_started") is False:
        raise NotAverageYet("ema_started is False: nothing was averaged yet")
    tensors = {**tensors_in(held["named_parameters_dict"]), **tensors_in(held["named_buffers_dict"])}
    where, notes = "ema_model", []
    if algorithm.get("ema_weights_active"):
        # Its checkpoints are written while the average is in the model: what is kept as ema_model are then the weights.
        if not is_state(weights):
            raise ValueError(
                "composer's ema_weights_active is True: the average is in state.model, and this dictionary has only "
                "the algorithm's part: hand over the whole checkpoint"
            )
        tensors, where = tensors_in(weights), "state.model"
        notes = ["ema_weights_active is True: the average is in the model, and ema_model holds the trained weights"]
    yield Found(
        "composer",
        [tensors],
        'FastEMA(model, decay_type="half_life", half_life=, update_every=, buffers="average") with the update_interval '
        'in batches; smoothing: decay, decay_type="constant"',
        where,
        whole=False,
        notes=tuple(notes),
    )


def boltz(content: Mapping[str, Any]) -> Iterator[Found]:
    """Find the state of the EMA callback of boltz: `ema_weights` and `cur_step`."""
    tensors = tensors_in(content.get("ema_weights"))
    if tensors and "cur_step" in content:
        yield Found(
            "boltz",
            [tensors],
            'FastEMA(module, decay, decay_type="threshold" with warm_start, else "constant", buffers="average", '
            "update_every=apply_ema_every_n_steps)",
            "ema_weights",
            step=number(content["cur_step"]),
        )


def edm2(content: Mapping[str, Any]) -> Iterator[Found]:
    """Find `PowerFunctionEMA.state_dict()` of EDM2: one average for each standard deviation."""
    sigmas, emas = content.get("stds"), content.get("emas")
    if not (isinstance(emas, (list, tuple)) and isinstance(sigmas, (list, tuple)) and all(map(is_state, emas))):
        return
    widths = tuple(float(sigma) for sigma in sigmas)
    yield Found(
        "edm2",
        [tensors_in(ema) for ema in emas],
        f'FastEMA(model, decay_type="power", sigma_rel={widths[0] if len(widths) == 1 else list(widths)}, '
        'buffers="copy"), step=cur_nimg / batch size',
        "emas",
        sigma_rels=widths,
    )


def detr(content: Mapping[str, Any]) -> Iterator[Found]:
    """Find `ModelEMA.state_dict()` of RT-DETR, D-FINE and their relatives: `module` and `updates`."""
    tensors = tensors_in(content.get("module"))
    if not tensors or "updates" not in content:
        return
    yield Found(
        "detr",
        [tensors],
        'FastEMA(model, decay, decay_type="exp", total_steps=N, beta=N / warmups, buffers="average")',
        "module",
        step=number(content["updates"]),
        notes=("step counts their updates: with start= above 0 their optimizer made more steps",),
    )


# ---- keys that name an average ----

#: key -> the library that writes it, and the schedule that goes on.
_KEYS: dict[str, tuple[str, str]] = {
    "state_dict_ema": (
        "timm",
        'FastEMA(model, decay, decay_type="constant", buffers="average"); use_warmup: decay_type="warmup", inv_gamma=, '
        "power=",
    ),
    "ema_net": ("super-gradients", 'FastEMA.from_params(model, ema_params, total_steps), buffers="average"'),
    "ema_state": ("d2go", 'FastEMA(model, decay, decay_type="constant", buffers="average")'),
    "ema_model": ("ignite", 'FastEMA(model, decay=1 - momentum, decay_type="constant", buffers="copy")'),
    "ema_state_dict": ("callback", 'as the callback\'s: mostly decay_type="constant"'),
}
_NAMED = re.compile(r"(?:^|_)(?:ema|averaged?|shadow)(?:_|$)", re.IGNORECASE)
_NOT_NAMED = re.compile(r"(?:^|_)(?:no|non|not|wo|without|before|pre)_(?:ema|averaged?|shadow)", re.IGNORECASE)
_COUNTS = ("global_step", "num_updates", "optimization_step")


def by_key(content: Mapping[str, Any]) -> Iterator[Found]:
    """Find a state under a key that says so: `state_dict_ema`, `ema_net`, `model_ema`, `ema`, `ema_0.9999`."""
    for key, value in content.items():
        if not (isinstance(key, str) and is_state(value)):
            continue
        step = next((number(content[count]) for count in _COUNTS if count in content), None)
        if key == "ema" and "updates" in content:
            yield Found(
                "ultralytics",
                [_plain(value)],
                'FastEMA(model, decay, decay_type="exp", total_steps=N, beta=N / tau, buffers="average")',
                key,
                step=number(content["updates"]),
                notes=("its checkpoints hold the average in 16 bits: half the precision of the run is gone",),
            )
        elif key in _KEYS or (_NAMED.search(key) and not _NOT_NAMED.search(key)):
            source, goes_on = _KEYS.get(key, ("state_dict", "as its writer's"))
            yield Found(source, [_plain(value)], goes_on, key, step=step, whole=source in ("timm", "super-gradients"))


def bare_state(content: Mapping[str, Any]) -> Iterator[Found]:
    """Take a plain `state_dict()`: what a file of averaged weights alone holds."""
    if content and all(isinstance(value, Tensor) for value in content.values()):
        yield Found("state_dict", [_plain(content)], "as its writer's", "", whole=False)


def _plain(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return tensors_in(state)
