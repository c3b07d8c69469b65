"""FastEMA beside DistributedDataParallel, on two processes over gloo."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from cases.distributed import Rank, on_ranks
from fastema import FastEMA
from fastema.checkpoint import load_checkpoint, load_weights, save_checkpoint

STEPS = 100


class Net(nn.Module):
    """Two branches, of which a forward may leave one unused; a tied weight and normalisation statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.left = nn.Linear(8, 8)
        self.right = nn.Linear(8, 8)
        self.leave = nn.Linear(8, 8, bias=False)
        self.leave.weight = self.left.weight

    def forward(self, x: Tensor, branch: str = "both") -> Tensor:
        x = self.norm(self.enter(x)).relu()
        left = self.left(x) if branch in ("both", "left") else 0.0
        right = self.right(x) if branch in ("both", "right") else 0.0
        return self.leave(left + right)


def net() -> Net:
    torch.manual_seed(1)  # the same on every rank
    return Net()


def batch(rank: Rank, step: int, size: int = 4) -> Tensor:
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(1000 * step + rank.rank))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, **forward: Any) -> None:
    optimizer.zero_grad()
    model(x, **forward).square().mean().backward()
    optimizer.step()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def averages(ema: FastEMA) -> dict[str, Tensor]:
    return ema.state_dict()["shadow"]


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    """Bit for bit."""
    assert got.keys() == expected.keys()
    for name in got:
        if not name.startswith(but or "-"):
            assert torch.equal(got[name], expected[name]), name


def assert_same_on_all_ranks(tensors: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    of_rank_0 = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in of_rank_0.values():
        dist.broadcast(tensor, 0)
    assert_same(tensors, of_rank_0, but)


NORM = ("norm.running", "norm.num")  # DDP lets each rank have its own between two forwards


@on_ranks(2)
def test_every_rank_has_the_same_shadow(rank: Rank) -> None:
    """100 steps, the last batch of every epoch of another size on every rank; against a twin in one process."""
    model = DistributedDataParallel(net())
    ema = FastEMA(model, decay=0.9, decay_type="constant")
    optimizer = adam(model)
    twin = {name: parameter.detach().clone() for name, parameter in model.module.named_parameters()}
    for step in range(STEPS):
        train_step(model, optimizer, batch(rank, step, size=2 + rank.rank if step % 10 == 9 else 4))
        ema.update()
        for name, parameter in model.module.named_parameters():
            twin[name].lerp_(parameter.detach(), 1 - 0.9)
    assert_same_on_all_ranks(averages(ema), but=NORM)
    for name, expected in twin.items():
        torch.testing.assert_close(averages(ema)[name], expected)
    assert not torch.equal(twin["enter.weight"], model.module.enter.weight)


@on_ranks(2)
def test_wrapped_and_inner_module_have_the_same_state(rank: Rank) -> None:
    """And either loads into the inner one."""
    model = DistributedDataParallel(net())
    outer, inner = (
        FastEMA(model, decay=0.5, decay_type="constant"),
        FastEMA(model.module, decay=0.5, decay_type="constant"),
    )
    train_step(model, adam(model), batch(rank, 0))
    outer.update()
    inner.update()
    assert_same(averages(outer), averages(inner))
    assert "enter.weight" in averages(outer)
    inner.load_state_dict(outer.state_dict())
    for ema in (outer, inner):
        target = copy.deepcopy(model.module)
        target.load_state_dict(ema.shadow_state_dict())
        fresh = FastEMA(target)
        assert_same(averages(fresh), averages(ema))
    plain = net()
    outer.copy_to(plain)
    assert_same(averages(FastEMA(plain)), averages(inner))


@on_ranks(2)
def test_accumulation_without_synchronisation(rank: Rank) -> None:
    """`no_sync`: an update per optimizer step, not per backward."""
    model = DistributedDataParallel(net())
    optimizer = adam(model)
    ema = FastEMA(model, decay=0.9, decay_type="constant")
    ema.attach(optimizer)
    for step in range(20):
        optimizer.zero_grad()
        for part in range(3):
            with model.no_sync() if part < 2 else nullcontext():
                model(batch(rank, 3 * step + part)).square().mean().backward()
        optimizer.step()
    assert ema.num_updates == 20
    assert_same_on_all_ranks(averages(ema), but=NORM)


@on_ranks(2)
def test_unused_parameters(rank: Rank) -> None:
    model = DistributedDataParallel(net(), find_unused_parameters=True)
    optimizer = adam(model)
    ema = FastEMA(model, decay=0.9, decay_type="constant")
    for step in range(20):
        with ema.swapped():  # between the forwards that look for them
            model(batch(rank, step)[:2], branch="left")
        train_step(model, optimizer, batch(rank, step), branch=("left", "right", "both")[(step + rank.rank) % 3])
        ema.update()
    assert_same_on_all_ranks(averages(ema), but=NORM)


@on_ranks(2)
def test_a_static_graph(rank: Rank) -> None:
    model = DistributedDataParallel(net(), static_graph=True)
    optimizer = adam(model)
    ema = FastEMA(model, decay=0.9, decay_type="constant")
    for step in range(20):
        train_step(model, optimizer, batch(rank, step), branch="left")
        ema.update()
        with ema.swapped(), torch.no_grad():
            model.module(batch(rank, step), branch="left")
    assert_same_on_all_ranks(averages(ema), but=NORM)


@on_ranks(2)
def test_training_after_swaps_is_unchanged_to_the_bit(rank: Rank) -> None:
    """With hooks and buckets as they were, in both ways to exchange."""
    models = [DistributedDataParallel(net(), gradient_as_bucket_view=True) for _ in range(2)]
    optimizers = [adam(model) for model in models]
    emas = [FastEMA(model, decay=0.9, decay_type="constant") for model in models]
    reduced = [0, 0]  # by each model's communication hook

    def hook(which, bucket):  # DDP would not understand annotations that are strings
        reduced[which] += 1
        flat = bucket.buffer().div_(rank.world)
        return dist.all_reduce(flat, async_op=True).get_future().then(lambda done: done.value()[0])

    for which, model in enumerate(models):
        model.register_comm_hook(which, hook)
    for step in range(30):
        for model, optimizer, ema in zip(models, optimizers, emas, strict=True):
            train_step(model, optimizer, batch(rank, step))
            ema.update()
        gradients = [parameter.grad.data_ptr() for parameter in models[0].parameters()]
        with emas[0].swapped(in_place=step % 2 == 0), torch.no_grad():
            models[0].eval()
            out = models[0].module(batch(rank, step))
            models[0].train()
        assert gradients == [parameter.grad.data_ptr() for parameter in models[0].parameters()]
        assert not torch.equal(out, models[0].module.eval()(batch(rank, step)))
        models[0].train()
    assert reduced[0] == reduced[1] > 0
    assert_same(models[0].state_dict(), models[1].state_dict())
    assert_same(averages(emas[0]), averages(emas[1]))
    assert_same_on_all_ranks(averages(emas[0]), but=NORM)


@on_ranks(2)
def test_validation_through_the_wrapper(rank: Rank) -> None:
    """DDP sends rank 0's buffers around in a forward: of the average then, and the live ones stay."""
    model = DistributedDataParallel(net())
    optimizer = adam(model)
    ema = FastEMA(model, decay=0.9, decay_type="constant")
    for step in range(5):
        train_step(model, optimizer, batch(rank, step))
        ema.update()
    live = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ema.swapped(), torch.no_grad():
        model.eval()
        model(batch(rank, 0))
        assert_same_on_all_ranks(model.state_dict())
    assert_same(model.state_dict(), live)
    assert_same_on_all_ranks(averages(ema))


@on_ranks(2)
def test_ranks_that_end_early_join(rank: Rank) -> None:
    """A rank without batches makes no steps; afterwards the last joiner's average goes to all, as its model did."""
    model = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # has no state, which join() would leave apart
    ema = FastEMA(model, decay=0.9, decay_type="constant")
    with Join([model]):
        for step in range(5 + 3 * rank.rank):
            train_step(model, optimizer, batch(rank, step))
            ema.update()
    assert ema.num_updates == 5 + 3 * rank.rank
    state = ema.state_dict()  # its tensors are the EMA's own
    for average in state["shadow"].values():
        dist.broadcast(average, 1)
    counters = [{key: state[key] for key in ("step", "num_updates")}]
    dist.broadcast_object_list(counters, 1)
    ema.load_state_dict({**state, **counters[0]})
    assert ema.num_updates == 8
    assert_same_on_all_ranks(averages(ema))
    train_step(model, optimizer, batch(rank, 99))
    ema.update()
    assert_same_on_all_ranks(averages(ema), but=NORM)


@on_ranks(2)
def test_resuming_from_one_file(rank: Rank) -> None:
    """Rank 0 writes; every rank, with initial weights of its own, goes on as if nothing had happened."""
    model = DistributedDataParallel(net())
    optimizer = adam(model)
    ema = FastEMA(model, decay=0.9, decay_type="warmup")
    file = rank.folder / "checkpoint.pth"
    for step in range(20):
        train_step(model, optimizer, batch(rank, step))
        ema.update()
        if step == 9 and rank.rank == 0:
            save_checkpoint(file, net=model, ema=ema, optimizer=optimizer)
    dist.barrier()

    torch.manual_seed(rank.rank)
    late = Net()
    content = load_checkpoint(file)
    load_weights(late, content, prefer="net")
    late = DistributedDataParallel(late)
    late_optimizer = adam(late)
    late_optimizer.load_state_dict(content["optimizer"])
    late_ema = FastEMA(late, decay=0.9, decay_type="warmup")
    late_ema.load_state_dict(content["ema"])
    assert late_ema.num_updates == 10
    assert_same_on_all_ranks(averages(late_ema))
    for step in range(10, 20):
        train_step(late, late_optimizer, batch(rank, step))
        late_ema.update()
    if rank.rank == 0:  # the file has the running statistics of rank 0, as DDP goes by them
        assert_same(averages(late_ema), averages(ema))
    assert_same(averages(late_ema), averages(ema), but=NORM)
    assert_same(late.state_dict(), model.state_dict(), but=tuple(f"module.{name}" for name in NORM))


def test_names_without_a_process_group() -> None:
    """A wrapper of a whole model leaves no trace in the names, in any order; a child of that name does."""
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)))
    model.add_module("module", nn.Linear(2, 2))
    seen: set[str] = set()
    expected = {"0.weight", "0.bias", "module.weight", "module.bias"}
    for wrapped in (model, nn.DataParallel(model), torch.compile(nn.DataParallel(torch.compile(model)))):
        assert set(averages(FastEMA(wrapped))) == expected
        FastEMA(wrapped, policy=lambda name, tensor, module: seen.add(name))
    assert seen == expected


def test_a_wrapped_models_shadow_has_the_keys_of_the_model_inside() -> None:
    inner = nn.Linear(2, 2)
    model = nn.DataParallel(inner)
    ema = FastEMA(model)
    assert set(ema.shadow_state_dict()) == {"weight", "bias"}
    inner.load_state_dict(ema.shadow_state_dict())
    with pytest.raises(ValueError, match="none of its names is an average's here"):
        FastEMA(nn.Sequential(nn.Linear(2, 2))).load_state_dict(ema.state_dict())
