"""Averages of what DeepSpeed trains, on gloo: ZeRO-1, 2 and 3, beside plain copies that are averaged by hand."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from cases.distributed import Rank, on_ranks
from fastema import FastEMA
from fastema.integrations.diffusers import EMAModel
from fastema.integrations.timm import ModelEmaV3
from fastema.swa_utils import AveragedModel

os.environ["DS_ACCELERATOR"] = "cpu"
deepspeed = pytest.importorskip("deepspeed", reason="deepspeed is not installed")

Averages = dict[str, Tensor]
HALF: dict[str, Any] = {"decay": 0.5, "decay_type": "constant"}


def net() -> nn.Sequential:
    """Sizes that nothing divides, a buffer, and a parameter of one element, of which all ranks but one have no part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 3), nn.Linear(3, 1))
    model.register_buffer("seen", torch.zeros((), dtype=torch.long))
    return model


def engine_of(model: nn.Module, stage: int, dtype: str = "float32", accumulate: int = 1, **zero: Any) -> Any:
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulate,
        "optimizer": {"type": "Adam", "params": {"lr": 0.05, "torch_adam": True}},
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
        "steps_per_print": None,
    }
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1]}]
    groups += [{"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    return engine


def train(engine: Any, rank: Rank, steps: int = 1, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(100 * seed + rank.rank)
    dtype = next(engine.module.parameters()).dtype
    for _ in range(steps):
        loss = engine(torch.randn(4, 7, generator=generator).to(dtype)).float().pow(2).mean()
        engine.backward(loss)
        engine.step()


def weights(engine: Any) -> Averages:
    """Return the whole weights as they are now, on every rank."""
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        state = {name: tensor.detach().clone() for name, tensor in engine.module.named_parameters()}
    return state | {name: tensor.detach().clone() for name, tensor in engine.module.named_buffers()}


def averaged(average: Averages, live: Averages) -> Averages:
    return {
        name: torch.lerp(average[name], live[name].float(), 0.5) if live[name].is_floating_point() else live[name]
        for name in live
    }


def wide(state: Averages) -> Averages:
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def output(engine: Any) -> Tensor:
    engine.eval()
    dtype = next(engine.module.parameters()).dtype
    with torch.no_grad():
        result = engine(torch.linspace(-1, 1, 28).view(4, 7).to(dtype))
    engine.train()
    return result.clone()


def output_of(state: Averages, dtype: torch.dtype) -> Tensor:
    model = net().to(dtype).eval()
    model.load_state_dict(
        {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    )
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 28).view(4, 7).to(dtype))


def close(one: Averages, other: Averages) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


CASES = [(1, "float32"), (2, "bfloat16"), (3, "float32"), (3, "bfloat16")]


@on_ranks(2)
def test_averages_are_those_of_whole_weights(rank: Rank) -> None:
    for stage, dtype in CASES:
        engine = engine_of(net(), stage, dtype)
        ema = FastEMA(engine, **HALF)
        ema.attach(engine)
        expected = wide(weights(engine))
        for step in range(3):
            train(engine, rank, seed=step)
            expected = averaged(expected, weights(engine))
        assert ema.num_updates == 3
        whole = ema.full_state_dict()
        assert bool(whole) == (rank.rank == 0)
        if whole:
            close(whole, expected)
            assert list(whole) == list(net().state_dict())
        trained = weights(engine)
        with ema.swapped():
            shown = output(engine)
            if dtype == "float32":
                close(weights(engine), expected)
        exact = torch.zeros_like(shown) if dtype == "bfloat16" else shown - output_of(expected, torch.float32)
        assert exact.abs().max() < 1e-6, (stage, dtype)
        assert all(torch.equal(value, trained[name]) for name, value in weights(engine).items()), (stage, dtype)


@on_ranks(2)
def test_a_swap_shows_the_average_also_after_an_evaluation_and_with_persistent_parameters(rank: Rank) -> None:
    for dtype in ("float32", "bfloat16"):
        for threshold in (0, 20):
            engine = engine_of(net(), 3, dtype, stage3_param_persistence_threshold=threshold)
            ema = FastEMA(engine.module, **HALF)
            for step in range(2):
                train(engine, rank, seed=step)
                ema.update()
                live = output(engine)
                whole = ema.full_state_dict()
                with ema.swapped():
                    shown = output(engine)
                    twice = output(engine)
                assert torch.equal(shown, twice) and not torch.equal(shown, live)
                assert torch.equal(output(engine), live), "the trained weights are back"
                if whole and dtype == "float32":
                    torch.testing.assert_close(shown, output_of(whole, torch.float32), rtol=1e-6, atol=1e-6)


@on_ranks(2)
def test_training_goes_on_as_without_a_swap(rank: Rank) -> None:
    for stage, dtype in CASES:
        outputs = []
        for swaps in (False, True):
            engine = engine_of(net(), stage, dtype)
            ema = FastEMA(engine, **HALF)
            ema.attach(engine)
            for step in range(4):
                train(engine, rank, seed=step)
                output(engine)
                if swaps:
                    with ema.swapped():
                        output(engine)
            outputs.append((output(engine), weights(engine)))
        assert torch.equal(outputs[0][0], outputs[1][0]), (stage, dtype)
        assert all(torch.equal(value, outputs[1][1][name]) for name, value in outputs[0][1].items())


@on_ranks(2)
def test_one_update_a_step_under_accumulation_and_none_of_a_step_that_overflowed(rank: Rank) -> None:
    for stage in (1, 2, 3):
        engine = engine_of(net(), stage, accumulate=3)
        ema = FastEMA(engine, **HALF)
        handle = ema.attach(engine)
        ema.attach(engine)
        train(engine, rank, 6)
        assert ema.num_updates == engine.global_steps == 2
        with ema.swapped(), pytest.raises(RuntimeError, match="while the EMA weights are applied"):
            train(engine, rank, 3)
        engine.optimizer.zero_grad()
        loss = engine(torch.ones(4, 7)).sum()
        with ema.swapped(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
            engine.backward(loss)
        del engine, ema, handle
    engine = engine_of(net(), 2)
    ema = FastEMA(engine, **HALF)
    ema.attach(engine)
    step = engine.optimizer.step
    engine.optimizer.step = lambda *args: setattr(engine.optimizer, "overflow", True)
    train(engine, rank)
    assert ema.num_updates == 0 and engine.skipped_steps == 1
    engine.optimizer.step, engine.optimizer.overflow = step, False
    train(engine, rank)
    assert ema.num_updates == 1


@on_ranks(2)
def test_an_update_and_a_swap_communicate_nothing_and_need_no_memory(rank: Rank) -> None:
    for dtype in ("float32", "bfloat16"):
        engine = engine_of(net(), 3, dtype)
        ema = FastEMA(engine, **HALF)
        train(engine, rank)
        with no_collectives():
            ema.update()
            ema.apply_shadow()
            ema.restore()
        parts = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in engine.module.parameters())
        storages = {p.ds_tensor.untyped_storage()._cdata for p in engine.module.parameters()}
        own = [storage for storage in ema.engine.averages._storages if storage.live._cdata in storages]
        assert all(storage.is_direct for storage in own), "what takes the parts' place is the average itself"
        assert sum(shadow.nbytes for storage in own for shadow in storage.shadows) == parts


@contextmanager
def no_collectives() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_into_tensor", "all_gather", "all_reduce", "broadcast", "reduce_scatter_tensor"):
            patch.setattr(dist, name, functools.partial(pytest.fail, f"{name}() was called"))
        yield


@on_ranks(2)
def test_a_sharded_state_is_resumed_exactly(rank: Rank) -> None:
    for dtype in ("float32", "bfloat16"):
        engine = engine_of(net(), 3, dtype)
        ema = FastEMA(engine, **HALF)
        for step in range(2):
            train(engine, rank, seed=step)
            ema.update()
        whole = ema.full_state_dict()
        dcp.save({"ema": ema.state_dict()}, checkpoint_id=rank.folder / dtype)
        again = FastEMA(engine, **HALF)
        state = {"ema": again.state_dict()}
        dcp.load(state, checkpoint_id=rank.folder / dtype)
        again.load_state_dict(state["ema"])
        assert again.num_updates == 2
        for one, other in zip(local(again), local(ema), strict=True):
            assert torch.equal(one, other)
        # Whole tensors, such as an average of one process, are taken apart.
        box = [whole]
        dist.broadcast_object_list(box)
        third = FastEMA(engine, **HALF)
        third.load_state_dict({**ema.state_dict(), "shadow": box[0]})
        for one, other in zip(local(third), local(ema), strict=True):
            assert torch.equal(one, other)


def local(ema: FastEMA) -> list[Tensor]:
    return [
        tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in ema.state_dict()["shadow"].values()
    ]


@on_ranks(2)
def test_states_that_hold_while_applied(rank: Rank) -> None:
    for stage in (2, 3):
        engine = engine_of(net(), stage)
        ema = FastEMA(engine, **HALF)
        train(engine, rank)
        ema.update()
        trained, expected = weights(engine), [each.clone() for each in local(ema)]
        with ema.swapped():
            live = {
                name: (value.full_tensor() if hasattr(value, "full_tensor") else value)
                .clone()
                .view(trained[name].shape)
                for name, value in ema.live_state_dict(engine.module).items()
            }
            inside = [each.clone() for each in local(ema)]
            whole = ema.full_state_dict()
        assert all(torch.equal(value, trained[name]) for name, value in live.items())
        assert all(map(torch.equal, inside, expected))
        assert all(map(torch.equal, whole.values(), ema.full_state_dict().values())) or rank.rank


@on_ranks(2)
def test_copy_to_and_frozen_parameters(rank: Rank) -> None:
    model = net()
    model[0].requires_grad_(False)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config={
            "train_micro_batch_size_per_gpu": 4,
            "optimizer": {"type": "Adam", "params": {"lr": 0.05, "torch_adam": True}},
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )
    ema = FastEMA(engine, policy=lambda name, tensor, module: None if tensor.requires_grad else "skip", **HALF)
    before = weights(engine)
    train(engine, rank)
    ema.update()
    live = weights(engine)
    output(engine)
    ema.copy_to()
    expected = {name: torch.lerp(before[name], live[name], 0.5) for name, p in model.named_parameters()}
    now = weights(engine)
    close({name: now[name] for name in expected}, expected)
    whole = ema.full_state_dict()
    if whole:
        close({name: whole[name] for name in expected}, expected)


@on_ranks(2)
def test_parts_in_host_memory(rank: Rank) -> None:
    cpu = {"device": "cpu", "pin_memory": False}
    for stage, zero in (
        (2, {"offload_optimizer": cpu}),
        (3, {"offload_param": cpu}),
        (3, {"offload_optimizer": cpu, "offload_param": cpu}),
    ):
        engine = engine_of(net(), stage, **zero)
        ema = FastEMA(engine, **HALF)
        expected = wide(weights(engine))
        train(engine, rank)
        ema.update()
        expected = averaged(expected, weights(engine))
        trained = weights(engine)
        whole = ema.full_state_dict()
        if whole:
            close(whole, expected)
        with ema.swapped():
            torch.testing.assert_close(output(engine), output_of(expected, torch.float32), rtol=1e-6, atol=1e-6)
        assert all(torch.equal(value, trained[name]) for name, value in weights(engine).items())


@on_ranks(2)
def test_what_is_refused(rank: Rank) -> None:
    engine = engine_of(net(), 3)
    model = engine.module
    for entry in (
        lambda: FastEMA(model.named_parameters()),
        lambda: AveragedModel(model),
        lambda: ModelEmaV3(model),
        lambda: EMAModel(model.parameters()),
    ):
        with pytest.raises(ValueError, match="partitioned by DeepSpeed's ZeRO-3"):
            entry()
    with deepspeed.zero.Init(
        config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    ):
        early = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"built after deepspeed\.initialize"):
        FastEMA(early)
    weight = model[0].weight
    for owner, name, value, message in (
        (weight.ds_tensor, "final_location", "nvme", "offloaded to NVMe"),
        (weight, "ds_secondary_tensor", torch.zeros(1), "zero_hpz_partition_size"),
        (weight.ds_tensor, "ds_quant_scale", torch.ones(1), "quantised by DeepSpeed"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, value, raising=False)
            with pytest.raises(ValueError, match=f"'0.weight'.*{message}"):
                FastEMA(engine)
    plain = net()
    before = FastEMA(plain)
    engine_of(plain, 3)
    with pytest.raises(RuntimeError, match=r"'0\.weight' is now .* partitioned by ZeRO-3, was "):
        before.update()
    with pytest.raises(TypeError, match="attach the engine"):
        FastEMA(engine).attach(engine.optimizer)


@on_ranks(4)
def test_other_numbers_of_ranks_load_a_state(rank: Rank) -> None:
    engine = engine_of(net(), 3)
    ema = FastEMA(engine, **HALF)
    train(engine, rank)
    ema.update()
    dcp.save({"ema": ema.state_dict()}, checkpoint_id=rank.folder / "four")
    flat = {name: value.full_tensor() for name, value in ema.state_dict()["shadow"].items() if name != "seen"}
    state = {"ema": {"shadow": {name: torch.zeros_like(value) for name, value in flat.items()}}}
    if rank.rank == 0:
        dcp.load(state, checkpoint_id=rank.folder / "four", no_dist=True)
        assert all(torch.equal(value, flat[name]) for name, value in state["ema"]["shadow"].items())
    group = dist.new_group([0, 1])
    if rank.rank < 2:  # as two ranks of DeepSpeed have it
        mesh = dist.DeviceMesh.from_group(group, "cpu", mesh=torch.arange(2))
        two: Any = {name: part_of_two(value, mesh) for name, value in flat.items()}
        for value in two.values():
            value.to_local().zero_()
        dcp.load({"ema": {"shadow": two}}, checkpoint_id=rank.folder / "four", process_group=group)
        assert all(
            torch.equal(value.to_local(), part_of_two(flat[name], mesh).to_local()) for name, value in two.items()
        )
        changed = {name: part_of_two(value + 1, mesh) for name, value in flat.items()}
        state = {"ema": {**ema.state_dict(), "shadow": {**changed, "seen": torch.zeros((), dtype=torch.long)}}}
        dcp.save(state, checkpoint_id=rank.folder / "two", process_group=group)
    dist.barrier()
    state = {"ema": ema.state_dict()}
    dcp.load(state, checkpoint_id=rank.folder / "two")
    ema.load_state_dict(state["ema"])
    for name, value in ema.state_dict()["shadow"].items():
        assert name == "seen" or torch.equal(value.full_tensor(), flat[name] + 1)


def part_of_two(value: Tensor, mesh: Any) -> DTensor:
    size = -(-value.numel() // 2)
    own = value[mesh.get_rank() * size : (mesh.get_rank() + 1) * size].clone()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=value.shape, stride=(1,))


# ---- the callbacks refuse before the first step ----


def test_the_callbacks_for_lightning_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from fastema.integrations.lightning import EMAWeightAveraging, FastEMACallback

    module, trainer = lightning.LightningModule(), lightning.Trainer(accelerator="cpu", logger=False)
    strategy = lightning.strategies.DeepSpeedStrategy(stage=3)
    monkeypatch.setattr(trainer._accelerator_connector, "strategy", strategy)
    for callback in (EMAWeightAveraging(), FastEMACallback()):
        with pytest.raises(ValueError, match=r"does not work with DeepSpeedStrategy|under DeepSpeed's ZeRO-3"):
            callback.setup(trainer, module, "fit")
