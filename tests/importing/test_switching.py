"""A run that changes to FastEMA at step 100 has the peer's own average at step 200."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import fastema
from cases import peers
from cases.peers import PEERS, Peer
from fastema import FastEMA

pytestmark = pytest.mark.usefixtures("one_thread")


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 5))


def train_one_step(model: nn.Module, k: int) -> None:
    """Change every weight and running statistic as a training step does."""
    generator = torch.Generator().manual_seed(k)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05)
            else:
                tensor.add_(1)


@pytest.mark.parametrize("kind", PEERS, ids=lambda kind: kind.__name__)
def test_a_run_that_changes_in_the_middle_goes_on_exactly(kind: type[Peer], tmp_path: Path) -> None:
    model = a_model()
    peer = kind(model)
    for k in range(1, 101):
        train_one_step(model, k)
        peer.update(model, k)
    torch.save(copy.deepcopy(peer.file(model)), tmp_path / "theirs.pt")

    ema = FastEMA(model, **kind.ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # among others: another decay than theirs
        result = fastema.import_average(ema, tmp_path / "theirs.pt", step=kind.step)
    assert result.source == kind.source
    for k in range(101, 201):
        train_one_step(model, k)
        peer.update(model, k)
        ema.update(step=peer.ours_at(k))
    averages = ema.state_dict()["shadow"]
    compared = 0
    for name, theirs in peer.averages(model).items():
        if name in averages and theirs.is_floating_point():
            difference = (averages[name] - theirs).abs().max() / theirs.abs().max()
            assert difference <= kind.tolerance, name
            compared += 1
    assert compared >= 6  # every parameter
    assert result.loaded and not result.ignored


def put_into(peer: Peer, ema: FastEMA, model: nn.Module) -> None:
    """Give a peer the average, by the lines of docs/moving-from.md."""
    averages = copy.deepcopy(ema.shadow_state_dict())
    if isinstance(peer, peers.Torch):
        count = {"n_averaged": torch.tensor(ema.num_updates)}
        peer.averaged.load_state_dict({**count, **{f"module.{name}": tensor for name, tensor in averages.items()}})
    elif isinstance(peer, peers.Timm):
        peer.ema.module.load_state_dict(averages)
    elif isinstance(peer, peers.Diffusers):
        steps = ema.state_dict()["step"] + (not peer.options)
        listed = [averages[name] for name, _ in model.named_parameters()]
        peer.ema.load_state_dict({**peer.ema.state_dict(), "shadow_params": listed, "optimization_step": steps})


BACK = (peers.Torch, peers.Timm, peers.TimmWarmup, peers.Diffusers, peers.DiffusersWarmup)


@pytest.mark.parametrize("kind", BACK, ids=lambda kind: kind.__name__)
def test_a_run_that_changes_back_goes_on_exactly(kind: type[Peer]) -> None:
    model = a_model()
    ema, peer = FastEMA(model, **kind.ours), kind(model)
    for k in range(1, 201):
        train_one_step(model, k)
        ema.update()
        if k > 100:
            peer.update(model, k)
        elif k == 100:
            put_into(peer, ema, model)
    averages = ema.state_dict()["shadow"]
    for name, theirs in peer.averages(model).items():
        if theirs.is_floating_point():
            assert (averages[name] - theirs).abs().max() / theirs.abs().max() <= kind.tolerance, name
