"""update_bn, SWALR and patch(); and the cases of PyTorch's own tests of swa_utils that the other files lack."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils as theirs

from cases import bits, values
from fastema import swa_utils as ours

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- averages, as PyTorch's tests compute them ----


@pytest.mark.parametrize("decay", [None, 0.9, 0.999])
@pytest.mark.parametrize("multi", [True, False])
@pytest.mark.parametrize("device", [None, torch.device("cpu"), "cpu"])
def test_the_average_is_the_weighted_sum_of_what_was_seen(decay: float | None, multi: bool, device: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5, momentum=0.3), nn.Linear(5, 10))
    if decay is None:
        function = ours.get_swa_multi_avg_fn() if multi else ours.get_swa_avg_fn()
    else:
        function = ours.get_ema_multi_avg_fn(decay) if multi else ours.get_ema_avg_fn(decay)
    averaged = ours.AveragedModel(model, device, **{"multi_avg_fn" if multi else "avg_fn": function})
    expected = [torch.zeros_like(parameter) for parameter in model.parameters()]
    updates = 10
    for index in range(updates):
        weight = 1 / updates
        if decay is not None:
            weight = decay ** (updates - index - 1) * ((1 - decay) if index else 1.0)
        for parameter, total in zip(model.parameters(), expected, strict=True):
            parameter.detach().add_(torch.randn_like(parameter))
            total += parameter.detach() * weight
        averaged.update_parameters(model)
    for got, total in zip(averaged.parameters(), expected, strict=True):
        torch.testing.assert_close(got, total)
        assert got.device.type == "cpu"
    assert averaged.n_averaged.device.type == "cpu"
    assert averaged.n_averaged == updates


def test_an_averaged_model_continues_from_a_state_dict() -> None:
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Linear(5, 10))
    first, second = ours.AveragedModel(model), ours.AveragedModel(model)
    for _ in range(10):
        for parameter in model.parameters():
            parameter.detach().add_(torch.randn_like(parameter))
        first.update_parameters(model)
    second.load_state_dict(first.state_dict())
    assert bits(first) == bits(second)
    first.update_parameters(model)
    second.update_parameters(model)
    assert second.n_averaged == 11
    assert bits(first) == bits(second)


# ---- update_bn ----


class Net(nn.Module):
    """Return one layer, then batch norm."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


def dense() -> tuple[Net, Tensor]:
    return Net(nn.Linear(5, 10), nn.BatchNorm1d(10, momentum=0.3)), torch.rand(60, 5)


def convolutional() -> tuple[Net, Tensor]:
    return Net(nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10, momentum=0.3)), torch.rand(60, 3, 5, 5)


def batches_of(x: Tensor, kind: str) -> list[Any]:
    wraps: dict[str, Callable[[Tensor], Any]] = {
        "tensor": lambda batch: batch,
        "list": lambda batch: [batch],
        "tuple": lambda batch: (batch, torch.zeros(len(batch))),
    }
    return [wraps[kind](batch) for batch in x.split(6)]


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("kind", ["tensor", "list", "tuple"])
@pytest.mark.parametrize("build", [dense, convolutional])
@pytest.mark.parametrize("training", [True, False])
def test_update_bn_estimates_the_statistics(build: Any, kind: str, device: Any, training: bool) -> None:
    model, x = build()
    model.train(training)
    with torch.no_grad():
        features = model.layer(x).transpose(0, 1).flatten(1)
    for _ in range(2):  # the second from statistics that are wrong
        result = ours.update_bn(batches_of(x, kind), model, device=device)
        assert result is None
        torch.testing.assert_close(model.norm.running_mean, features.mean(1))
        torch.testing.assert_close(model.norm.running_var, features.var(1), rtol=0.2, atol=0.1)
        assert model.training is model.norm.training is training
        assert model.norm.momentum == 0.3
        model.norm.running_mean.fill_(100.0)


def test_update_bn_has_torchs_bits() -> None:
    results = []
    for module in (theirs, ours):
        torch.manual_seed(0)
        model, x = convolutional()
        averaged = module.AveragedModel(model)
        averaged.update_parameters(model)
        module.update_bn(batches_of(x, "tuple"), averaged)
        results.append(bits(averaged))
    assert results[0] == results[1]


def test_update_bn_without_batch_norm_does_not_touch_the_loader() -> None:
    def loader() -> Iterator[Tensor]:
        raise AssertionError("touched")
        yield

    model = nn.Linear(2, 2).eval()
    model.training = True
    ours.update_bn(loader(), model)
    assert model.training


@pytest.mark.parametrize("training", [True, False])
def test_update_bn_restores_after_an_exception(training: bool) -> None:
    """torch leaves momentum None, which turns later running averages into plain ones."""
    model, x = dense()
    model.train(training)
    wrong = [x[:6], torch.rand(6, 4)]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ours.update_bn(wrong, model)
    assert model.norm.momentum == 0.3
    assert model.training is model.norm.training is training

    def broken() -> Iterator[Tensor]:
        yield x[:6]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours.update_bn(broken(), model)
    assert model.norm.momentum == 0.3
    assert model.training is training


@pytest.mark.parametrize("device", [None, "cpu"])
def test_update_bn_says_what_is_wrong_with_a_dictionary(device: Any) -> None:
    model, x = dense()
    with pytest.raises(TypeError, match=r"dictionary with the keys \['image', 'mask'\].*batch\['image'\] for batch"):
        ours.update_bn([{"image": x, "mask": x}], model, device=device)
    assert model.norm.momentum == 0.3


def test_update_bn_gives_a_dictionary_to_a_model_that_takes_one() -> None:
    class TakesOne(Net):
        def forward(self, batch: Any) -> Tensor:
            return super().forward(batch["image"])

    plain, x = dense()
    model = TakesOne(plain.layer, plain.norm)
    ours.update_bn([{"image": x}], model)
    torch.testing.assert_close(model.norm.running_mean, plain.layer(x).mean(0).detach())
    with pytest.raises(RuntimeError, match="shapes"):  # not the dictionary's fault
        ours.update_bn([{"image": torch.rand(6, 4)}], model)


# ---- SWALR ----


def optimizer_of() -> torch.optim.Optimizer:
    parameters = [nn.Parameter(values(2)), nn.Parameter(values(3))]
    return torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.5}], lr=0.05)


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("epochs", [1, 5])
@pytest.mark.parametrize("target", [0.01, [0.01, 0.02]])
def test_swalr_anneals_after_another_scheduler(strategy: Any, epochs: int, target: Any) -> None:
    optimizer = optimizer_of()
    before = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.9)
    scheduler = ours.SWALR(optimizer, target, epochs, strategy)
    targets = target if isinstance(target, list) else [target, target]
    for _ in range(5):
        optimizer.step()
        before.step()
    start = rates(optimizer)
    for got, initial in zip(start, (0.05, 0.5), strict=True):
        assert got == pytest.approx(initial * 0.9**5)
    for step in range(1, 9):
        optimizer.step()
        scheduler.step()
        share = min(1.0, step / epochs)
        share = (1 - math.cos(math.pi * share)) / 2 if strategy == "cos" else share
        for got, first, last in zip(rates(optimizer), start, targets, strict=True):
            assert got == pytest.approx(last * share + first * (1 - share), rel=1e-6)
    assert scheduler.get_last_lr() == rates(optimizer)


def test_swalr_without_annealing_starts_at_the_target() -> None:
    optimizer = optimizer_of()
    scheduler = ours.SWALR(optimizer, 0.01, anneal_epochs=0)
    for _ in range(3):
        assert rates(optimizer) == [0.01, 0.01]
        optimizer.step()
        scheduler.step()


def test_swalr_state_goes_over() -> None:
    first = ours.SWALR(optimizer_of(), anneal_epochs=3, swa_lr=0.5)
    second = ours.SWALR(optimizer_of(), anneal_epochs=10, anneal_strategy="linear", swa_lr=5.0)
    for _ in range(10):
        first.optimizer.step()
        first.step()
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert second.get_last_lr() == first.get_last_lr()
    assert second.anneal_func(0.25) == first.anneal_func(0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anneal_strategy": "exponential", "swa_lr": 1.0}, "anneal_strategy must"),
        ({"anneal_epochs": -1, "swa_lr": 1.0}, "anneal_epochs must"),
        ({"anneal_epochs": 1.7, "swa_lr": 1.0}, "anneal_epochs must"),
        ({"swa_lr": [1.0, 0.1, 0.01]}, "swa_lr must"),
    ],
)
def test_swalr_refuses_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.SWALR(optimizer_of(), **arguments)


# ---- patch ----


@pytest.fixture
def names() -> Iterator[dict[str, Any]]:
    """Torch's names are replaced, and put back whatever happens."""
    before = dict(vars(theirs))
    yield before
    for name, value in before.items():
        setattr(theirs, name, value)
    ours.unpatch()


def patched() -> bool:
    mine = [getattr(theirs, name) is getattr(ours, name) for name in theirs.__all__ if name != "SWALR"]
    assert all(mine) or not any(mine)
    return all(mine)


def test_patch_and_unpatch(names: dict[str, Any]) -> None:
    assert not patched()
    ours.patch()
    assert patched()
    ours.patch()
    assert patched()
    ours.unpatch()
    assert dict(vars(theirs)) == names
    ours.unpatch()
    assert dict(vars(theirs)) == names


def test_patch_as_a_block_nested_and_left_by_an_exception(names: dict[str, Any]) -> None:
    with pytest.raises(ZeroDivisionError), ours.patch():
        with ours.patch():
            assert patched()
        assert patched()
        1 / 0  # noqa: B018
    assert dict(vars(theirs)) == names
    ours.patch()
    with ours.patch():
        pass
    assert patched()  # it was before the block
    ours.unpatch()
    with ours.patch():
        ours.unpatch()
    assert dict(vars(theirs)) == names


def test_unpatch_puts_back_what_was_there(names: dict[str, Any]) -> None:
    """A name that somebody else had put there comes back, too."""

    def another(*args: Any) -> None: ...

    theirs.update_bn = another
    with ours.patch():
        assert patched()
    assert theirs.update_bn is another


def test_a_trainer_that_imports_after_the_patch(names: dict[str, Any]) -> None:
    """Everything works on top of the patched names, torch's own code included."""
    with ours.patch():
        namespace: dict[str, Any] = {}
        exec("from torch.optim.swa_utils import *", namespace)
        model, x = dense()
        averages = [
            namespace["AveragedModel"](model, multi_avg_fn=namespace["get_ema_multi_avg_fn"](0.5)),
            namespace["AveragedModel"](model, avg_fn=lambda one, other, count: (one + other) / 2),
        ]
        for averaged in averages:
            assert isinstance(averaged, ours.AveragedModel)
            for _ in range(2):
                averaged.update_parameters(model)
                model.layer.bias.data.add_(1.0)
            namespace["update_bn"]([x], averaged)
        # torch's own method looks the default up under the patched names
        torchs = names["AveragedModel"](model)
        for _ in range(2):
            torchs.update_parameters(model)
        assert bits(torchs.module.layer) == bits(model.layer)
    assert not patched()


@pytest.mark.slow
def test_torchs_own_tests_names_are_all_there() -> None:
    code = "from fastema.swa_utils import *; AveragedModel, update_bn, SWALR, get_swa_multi_avg_fn, patch, unpatch"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
