"""A teacher without a second module: the average computes the targets of the training step (BYOL, DINO, mean teacher).

    with ema.swapped(), torch.no_grad():
        target = model(x)
    loss = distance(model(x), target)

The targets, and so the whole training, are bit for bit those of a separate averaged module.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fastema import FastEMA

STEPS = 6


def make_student(norm: str = "layer", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    middle = {"layer": nn.LayerNorm(16), "batch": nn.BatchNorm1d(16)}[norm]
    return nn.Sequential(nn.Linear(8, 16), middle, nn.ReLU(), nn.Linear(16, 4)).to(dtype)


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(12, 8, generator=generator).to(dtype) for _ in range(STEPS)]


def bits(model: nn.Module) -> list[bytes]:
    return [t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in model.state_dict().values() if t.dim()]


Wrap = Callable[[nn.Module], Any]


def trained(
    student: nn.Module,
    forward: Callable[[Tensor], Tensor],
    teach: Callable[[Tensor], Tensor],
    update: Callable[[], None],
    context: Callable[[], Any],
    data: list[Tensor] | None,
) -> list[Tensor]:
    """Train towards the teacher's outputs, with an update after each step; return every step's targets."""
    targets = []
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for x in batches() if data is None else data:
        targets.append(teach(x))
        with context():
            loss = (forward(x + 0.1) - targets[-1] - 1.0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update()
    return targets


def swapping(
    student: nn.Module,
    wrap: Wrap = lambda module: module,
    context: Callable[[], Any] = nullcontext,
    eval_teacher: bool = False,
    data: list[Tensor] | None = None,
) -> list[Tensor]:
    """Train towards the swapped-in average; return every step's targets."""
    ema = FastEMA(student, 0.9, decay_type="constant")
    forward = wrap(student)

    def teach(x: Tensor) -> Tensor:
        student.train(not eval_teacher)
        with ema.swapped(), torch.no_grad(), context():
            target = forward(x).clone()
        student.train()
        return target

    return trained(student, forward, teach, ema.update, context, data)


def separate(
    student: nn.Module,
    wrap: Wrap = lambda module: module,
    context: Callable[[], Any] = nullcontext,
    eval_teacher: bool = False,
    data: list[Tensor] | None = None,
) -> list[Tensor]:
    """The same with a second module as the teacher, averaged by a FastEMA of the student."""
    ema = FastEMA(student, 0.9, decay_type="constant")
    teacher = copy.deepcopy(student).train(not eval_teacher)
    forward, teacher_forward = wrap(student), wrap(teacher) if wrap is torch.compile else teacher

    def teach(x: Tensor) -> Tensor:
        with torch.no_grad(), context():
            return teacher_forward(x).clone()

    def update() -> None:
        ema.update()
        ema.copy_to(teacher)

    return trained(student, forward, teach, update, context, data)


def same_training(first: nn.Module, second: nn.Module, **arguments: Any) -> None:
    mine, theirs = swapping(first, **arguments), separate(second, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), "the targets"
    assert bits(first) == bits(second), "the students"


def test_a_plain_training() -> None:
    same_training(make_student(), make_student())


def test_bfloat16_weights() -> None:
    dtype = torch.bfloat16
    same_training(make_student(dtype=dtype), make_student(dtype=dtype), data=batches(dtype))


def test_autocast_casts_the_averages_anew() -> None:
    """Autocast caches bfloat16 copies of weights: those of the student must not serve the teacher, nor the reverse."""
    same_training(make_student(), make_student(), context=lambda: torch.autocast("cpu", torch.bfloat16))


def test_one_autocast_around_the_whole_step() -> None:
    student, twin = make_student(), make_student()
    x = batches()[0]
    ema = FastEMA(student, 0.5, decay_type="constant")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.5
    ema.update()
    average = copy.deepcopy(twin)
    ema.copy_to(average)
    twin.load_state_dict(student.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        before = student(x)
        with ema.swapped(), torch.no_grad():
            target = student(x)
        after = student(x)
    with torch.autocast("cpu", torch.bfloat16):
        expected = average(x)
    assert torch.equal(target, expected) and torch.equal(before, after)
    assert not torch.equal(target, after)


def test_a_compiled_model_is_not_compiled_again() -> None:
    counter = CompileCounter()

    def wrap(module: nn.Module) -> Any:
        return torch.compile(module, backend=counter)

    swapping(make_student(), wrap)
    frames = counter.frame_count
    assert frames <= 2  # with gradients, and without
    mine, theirs = swapping(make_student(), wrap), separate(make_student())
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_ddp() -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrap = nn.parallel.DistributedDataParallel
        student, twin = make_student(), make_student()
        mine, theirs = swapping(student, wrap), separate(twin)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert bits(student) == bits(twin)
    finally:
        dist.destroy_process_group()


def test_batchnorm_in_eval_mode_is_that_of_a_teacher_in_eval_mode() -> None:
    same_training(make_student("batch"), make_student("batch"), eval_teacher=True)


def test_batchnorm_in_train_mode_gives_the_teachers_targets() -> None:
    """The batch's own statistics normalise, so targets are right; the running ones go to the average alone."""
    student, twin = make_student("batch"), make_student("batch")
    mine, theirs = swapping(student), separate(twin)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert bits(student) == bits(twin), "the student's running statistics saw the student's batches alone"


def test_a_forward_for_gradients_before_the_teacher_is_refused_in_backward() -> None:
    """Student first, teacher second: the graph refers to weights that changed places, unless they are back."""
    student, x = make_student(), batches()[0]
    ema = FastEMA(student, 0.9, decay_type="constant")
    loss = student(x).square().mean()
    with ema.swapped(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    student.zero_grad()
    loss = student(x).square().mean()
    with ema.swapped(), torch.no_grad():
        student(x)
    loss.backward()  # they are back, and so is their version
    expected = make_student()
    expected(x).square().mean().backward()
    for mine, theirs in zip(student.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]


def test_a_step_or_an_update_inside_the_block_is_refused() -> None:
    student = make_student()
    ema = FastEMA(student, 0.9)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    ema.attach(optimizer)
    student(batches()[0]).square().mean().backward()
    for call in (optimizer.step, ema.update):
        with ema.swapped(), pytest.raises(RuntimeError, match="while the EMA weights are applied"):
            call()
