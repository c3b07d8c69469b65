"""Averages as torch, Lightning, ema-pytorch, diffusers, torch-ema, k-diffusion and LitEma write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from fastema.importing.found import Found, NotAverageYet, decay_after, number, tensors_in


def torch_averaged_model(content: Mapping[str, Any]) -> Iterator[Found]:
    """Find `AveragedModel.state_dict()`, also as a part of another module's state."""
    for key in content:
        prefix = key.removesuffix("n_averaged")
        if key == prefix or (prefix and not prefix.endswith(".")):
            continue
        tensors, updates = tensors_in(content, f"{prefix}module."), number(content[key])
        if not tensors or updates is None:
            continue
        if updates == 0:
            raise NotAverageYet(f"{key} is 0: nothing was averaged yet")
        yield Found(
            "torch",
            [tensors],
            'FastEMA(model, decay, decay_type="constant") for get_ema_multi_avg_fn(decay), decay_type="power", gamma=0 '
            'for the equal average; buffers="average" if it was made with use_buffers=True, else "copy"',
            prefix.rstrip("."),
            step=updates,
        )


def lightning_weight_averaging(content: Mapping[str, Any]) -> Iterator[Found]:
    """Find the checkpoint of Lightning's WeightAveraging: the average is `state_dict`."""
    if not {"state_dict", "current_model_state", "averaging_state"} <= set(content):
        return
    updates = number(content["averaging_state"].get("n_averaged"))
    if not updates:
        raise NotAverageYet("n_averaged is 0: nothing was averaged yet")
    step = number(content.get("global_step"))
    yield Found(
        "lightning",
        [tensors_in(content["state_dict"])],
        'FastEMA(module, decay, decay_type="constant", buffers="average" if use_buffers else "copy"), and their '
        "update_every_n_steps as update_every",
        "state_dict",
        step=step,
        num_updates=updates,
        notes=("current_model_state holds the trained weights",),
    )


def ema_pytorch(content: Mapping[str, Any]) -> Iterator[Found]:
    """Find `ema_pytorch.EMA.state_dict()`, also as a part of another module's state."""
    for key in content:
        prefix = key.removesuffix("initted")
        if key == prefix or (prefix and not prefix.endswith(".")):
            continue
        tensors, step = tensors_in(content, f"{prefix}ema_model."), number(content.get(f"{prefix}step"))
        if not tensors or step is None:
            continue
        if not bool(content[key]):
            raise NotAverageYet(f"{key} is False: nothing was averaged yet")
        yield Found(
            "ema-pytorch",
            [tensors],
            'FastEMA(model, beta, decay_type="warmup", inv_gamma=, power=, update_after_step=, buffers="average") for '
            "update_every=1",
            f"{prefix}ema_model",
            step=step,
            notes=(
                "with update_every above 1 (10 is their default) theirs updates at calls 1, 11, 21: pass "
                f"step={step - 1}, build FastEMA with update_after_step one less, and go on with "
                "ema.update(step=k - 1) at call k",
            ),
        )


_DIFFUSERS = ("optimization_step", "update_after_step", "use_ema_warmup", "shadow_params")


def diffusers(content: Mapping[str, Any]) -> Iterator[Found]:
    """Find diffusers' `EMAModel.state_dict()`, or the folder of its `save_pretrained`."""
    if not set(_DIFFUSERS) <= set(content):
        return
    done, after, decay = content["optimization_step"], content["update_after_step"], content.get("decay", 0.9999)
    inv_gamma, power, least = content.get("inv_gamma", 1.0), content.get("power", 2 / 3), content.get("min_decay", 0.0)
    if done < 1:
        raise NotAverageYet("optimization_step is 0: nothing was averaged yet")
    shadow = content["shadow_params"]
    if content["use_ema_warmup"]:
        step = done
        goes_on = f'FastEMA(model, {decay}, decay_type="warmup", inv_gamma={inv_gamma}, power={power}'
        goes_on += f", update_after_step={after})"
        following = decay_after(done, decay, "warmup", after, inv_gamma=inv_gamma, power=power)
    else:
        # Theirs is one step late, and counts from update_after_step.
        step = max(0, done - 1 - after)
        goes_on = f'FastEMA(model, {decay}, decay_type="threshold")'
        following = decay_after(step, decay, "threshold") if done > after else 0.0
    notes = []
    if done <= after:
        notes.append(f"update_after_step={after} is not reached: the average is a copy of the weights so far")
    if least > 0:
        following = max(following, least) if done > after else following
        notes.append(f"min_decay={least} has no counterpart: below it, give the decay: ema.update(decay={least})")
    yield Found(
        "diffusers",
        [dict(shadow) if isinstance(shadow, Mapping) else list(shadow)],
        goes_on,
        "shadow_params",
        step=step,
        num_updates=done,
        next_decay=following,
        whole=False,
        notes=tuple(notes),
    )


def torch_ema(content: Mapping[str, Any]) -> Iterator[Found]:
    """Find torch-ema's `ExponentialMovingAverage.state_dict()`, which torch-ngp and its relatives keep as `ema`."""
    if not {"decay", "num_updates", "shadow_params"} <= set(content):
        return
    decay, step = content["decay"], number(content["num_updates"])
    threshold = step is not None
    yield Found(
        "torch-ema",
        [list(content["shadow_params"])],
        f'FastEMA(model, {decay}, decay_type="{"threshold" if threshold else "constant"}")',
        "shadow_params",
        step=step,
        next_decay=decay if step is None else decay_after(step, decay, "threshold"),
        whole=False,
    )


def k_diffusion(content: Mapping[str, Any]) -> Iterator[Found]:
    """Find the checkpoint of k-diffusion's training script: `model_ema` and the schedule `ema_sched`."""
    schedule, tensors = content.get("ema_sched"), tensors_in(content.get("model_ema"))
    if not (isinstance(schedule, Mapping) and tensors and "last_epoch" in schedule):
        return
    inv_gamma, power, step = schedule.get("inv_gamma", 1.0), schedule.get("power", 1.0), schedule["last_epoch"]
    largest, least, start = schedule.get("max_value", 1.0), schedule.get("min_value", 0.0), schedule.get("start_at", 0)
    yield Found(
        "k-diffusion",
        [tensors],
        f'FastEMA(model, {largest}, decay_type="warmup", inv_gamma={inv_gamma}, power={power}, buffers="copy"'
        + (f", update_after_step={start})" if start else ")"),
        "model_ema",
        step=step,
        next_decay=max(least, decay_after(step, largest, "warmup", start, inv_gamma=inv_gamma, power=power)),
        notes=(f"min_value={least} has no counterpart: below it, give the decay: ema.update(decay={least})",)
        if least > 0
        else (),
    )


def lit_ema(content: Mapping[str, Any]) -> Iterator[Found]:
    """Find a LitEma in a module's state, or its own state: names of parameters without their dots."""
    for key in content:
        prefix = key.removesuffix("num_updates")
        if key == prefix or (prefix and not prefix.endswith(".")) or f"{prefix}decay" not in content:
            continue
        tensors: dict[str, Tensor] = tensors_in(content, prefix)
        updates, decay = number(tensors.pop("num_updates", None)), tensors.pop("decay", None)
        if not tensors or decay is None or updates is None or any("." in name for name in tensors):
            continue
        counted = updates >= 0  # -1: it was made with use_num_updates=False
        if updates == 0:
            raise NotAverageYet(f"{key} is 0: nothing was averaged yet")
        target = round(float(decay), 7)
        yield Found(
            "litema",
            [tensors],
            f'FastEMA(model, {target}, decay_type="{"threshold" if counted else "constant"}", buffers="copy")',
            prefix.rstrip("."),
            step=updates if counted else None,
            next_decay=decay_after(updates, target, "threshold") if counted else target,
            whole=False,
            spelled=lambda name: name.replace(".", ""),
            names=tuple(name for name in tensors_in(content) if not name.startswith(prefix)) if prefix else (),
        )
