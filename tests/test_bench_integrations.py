"""`bench.integrations` runs from end to end on tiny cases. Nothing here looks at how long anything took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import integrations, peers
from bench.cases import Case, Unavailable
from bench.measure import Budget
from bench.session import Group

TINY = Budget(0.0, least=2, most=2)


def tiny() -> Case:
    return Case("tiny", ((64,), (3, 5), (1,)))


@pytest.mark.parametrize("peer", integrations.EVERYBODY, ids=lambda peer: peer.name)
def test_everybody_computes_the_same_average(peer: peers.Peer) -> None:
    try:
        peers.check_update(peer, tiny(), torch.device("cpu"))
    except Unavailable as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))


def test_a_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def missing(model: Any) -> Any:
        raise ModuleNotFoundError("no module named diffusers")

    def small_run(groups: Any, copy_budget: Budget) -> Any:
        groups = [Group("update", tiny, everybody, "cold", TINY)]
        return run(groups, copy_elements=1000, copy_budget=TINY)

    run = integrations.run
    gone = peers.Peer("diffusers EMAModel", integrations._import(missing))
    everybody = (peers.NATIVE, integrations._OUR_TIMM, gone)
    monkeypatch.setattr(integrations, "run", small_run)
    assert integrations.main(["--json", str(tmp_path / "it.json")]) == 0
    written = json.loads((tmp_path / "it.json").read_text())
    assert {record["impl"] for record in written["records"]} == {"torch copy_", "fastema", "fastema ModelEmaV3"}
    assert written["unavailable"][0]["impl"] == "diffusers EMAModel"
    assert "not measured: diffusers EMAModel: not installed (no module named diffusers)" in capsys.readouterr().out


def test_the_plan_has_everybody_twice() -> None:
    for group in integrations.plan():
        assert group.peers == integrations.EVERYBODY
    assert {peer for pair in integrations.PAIRS for peer in pair} < set(integrations.EVERYBODY)
