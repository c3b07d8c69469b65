"""docs/peers.md says what other libraries really do: measured here on the packages, so that a change of one fails.

A library whose package is not installed skips.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cases import peers
from cases.peers import Peer
from fastema.importing.recognise import recognise

PAGE = (Path(__file__).parents[2] / "docs" / "peers.md").read_text()
UPDATES = 60


def warmup(k: int, power: float = 2 / 3, inv_gamma: float = 1.0) -> float:
    return min(0.99, 1 - (1 + (k - 1) / inv_gamma) ** -power)


def threshold(k: int) -> float:
    return min(0.99, (1 + k) / (10 + k))


#: The peer of a row -> its decay at call k, from 1; None: it does not update then.
DECAYS: dict[type[Peer], Callable[[int], float | None]] = {
    peers.Torch: lambda k: 0.0 if k == 1 else 0.99,
    peers.TorchEqual: lambda k: (k - 1) / k,
    peers.Lightning: lambda k: 0.0 if k == 1 else 0.99,
    peers.Timm: lambda k: 0.0 if k == 1 else 0.99,
    peers.TimmWarmup: warmup,
    peers.Diffusers: lambda k: 0.0 if k == 1 else threshold(k - 1),
    peers.DiffusersWarmup: lambda k: 0.0 if k <= 8 else warmup(k - 7, 0.75, 2.0),
    peers.TorchEma: threshold,
    peers.EmaPytorch: warmup,
    peers.EmaPytorchDefaults: lambda k: None if k % 10 != 1 else 0.0 if k <= 21 else warmup(k - 20),
    peers.MMEngine: lambda k: 0.0 if k == 1 else 0.99,
    peers.MMEngineAnnealing: lambda k: 0.0 if k == 1 else 1 - max(0.01, 50 / (50 + k - 1)),
    peers.MMEngineEqual: lambda k: (k - 1) / k,
    peers.Ignite: lambda k: 0.99,
    peers.Composer: lambda k: 0.5 ** (1 / 50),
    peers.Ultralytics: lambda k: 0.99 * (1 - 2.718281828459045 ** (-k / 50)),
    peers.KDiffusion: lambda k: warmup(k, 0.75),
    peers.Boltz: threshold,
}


def a_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to(dtype)
    fill(model, 0.0)
    return model


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)


@pytest.mark.parametrize("kind", DECAYS, ids=lambda kind: kind.__name__)
def test_the_decay_of_every_call(kind: type[Peer]) -> None:
    """The average of a weight that was 0 and is 1 tells the decay of each update."""
    model = a_model()
    peer = kind(model)
    fill(model, 1.0)
    left = 1.0
    for k in range(1, UPDATES + 1):
        peer.update(model, k)
        decay = DECAYS[kind](k)
        left *= 1.0 if decay is None else decay
        assert float(peer.averages(model)["0.weight"].detach()[0, 0]) == pytest.approx(1 - left, abs=1e-6), k


def row_of(kind: type[Peer]) -> dict[str, str]:
    """Return what docs/peers.md says of a library, by column."""
    heading, row = (re.search(rf"^\| {name} .*$", PAGE, re.MULTILINE) for name in ("library", re.escape(kind.source)))
    assert heading is not None and row is not None, kind.source
    cells = [[cell.strip() for cell in line[0].strip("|").split("|")] for line in (heading, row)]
    return dict(zip(*cells, strict=True))


ROWS = tuple({kind.source: kind for kind in reversed(tuple(DECAYS))}.values())


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.source)
def test_buffers_dtype_and_count(kind: type[Peer]) -> None:
    model = a_model()
    peer = kind(model)
    statistics, counters = set(), set()
    for k in range(1, 41):
        fill(model, float(k))
        peer.update(model, k)
        averages, weight = peer.averages(model), float(peer.averages(model)["0.weight"].detach()[0, 0])
        mean, count = averages.get("1.running_mean"), averages.get("1.num_batches_tracked")
        if k > 30:
            statistics.add(
                "none" if mean is None else {weight: "averaged", float(k): "copied"}.get(float(mean[0]), "else")
            )
            counters.add("none" if count is None else {0: "frozen", 1: "frozen", k: "copied"}.get(int(count), "else"))
    said = row_of(kind)
    assert statistics == {said["running statistics"]}
    assert counters == {said["integer buffers"]}
    step = recognise(peer.file(model), "the file").step
    assert said["count in the file"] == ("no" if step is None else "yes")

    half = a_model(torch.bfloat16)
    peer = kind(half)
    peer.update(half, 1)
    assert str(peer.averages(half)["0.weight"].dtype).removeprefix("torch.") == said["average of bfloat16"]
