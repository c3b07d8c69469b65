"""The summary of the nuclei study: what was right, from figures that are given."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from bench.studies import nuclei


def nuclei_run(plan: str, gain: float) -> dict:
    values = {name: [0.5, 0.6] for name in nuclei.NAMES}
    test = {name: 0.6 if name == "base" else 0.6 + gain for name in nuclei.NAMES}
    return {"plan": plan, "seed": 0, "updates": 900, "validation": values, "test": test}


@pytest.mark.parametrize(
    ("plan", "gain", "right"),
    [
        ("constant rate", 0.001, True),
        ("constant rate", -0.001, False),
        ("cosine to 0", 0.009, True),
        ("cosine to 0", 0.011, False),
        ("warm-up, stable, decay", -0.011, False),
    ],
)
def test_the_advice_is_judged_by_what_came_of_it(plan: str, gain: float, right: bool) -> None:
    (row,) = nuclei.summary([nuclei_run(plan, gain)])
    assert row["advice_right"] == [right]
    assert f"{int(right)} of 1" in nuclei.table([row])


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    nuclei.draw(tmp_path / "x.svg", [nuclei_run("constant rate", 0.0), nuclei_run("cosine to 0", 0.0)])
    assert "<svg" in (tmp_path / "x.svg").read_text()
