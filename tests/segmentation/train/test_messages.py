"""The advisor's messages in a training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastema.errors import UserError
from fastema.segmentation.train.messages import describe_window, latest_finding
from fastema.segmentation.train_extra import missing_packages


def test_the_outlook() -> None:
    assert (
        describe_window(0.999, "constant", 400, 40_000)
        == "looks back over up to 1,000 updates, 2.5 epochs; judge it after 8 epochs"
    )
    assert describe_window(0.999, "threshold", 400, 40_000).endswith("judge it after 3 epochs")
    short = describe_window(0.999, "threshold", 100, 500)  # which never gets to its target
    assert short == "looks back over up to 57 updates, 0.567 epochs; judge it after 1 epoch"
    assert describe_window(0.9, "linear", 400, 40_000).endswith("judge it after 1 epoch")
    never = describe_window(0.9999, "exp", 1, 30, beta=15)
    assert "that never settles in the 30 epochs it runs for: --ema-decay 0.904 or less would" in never
    assert "judge it" in describe_window(0.999, "threshold", 2, 2)
    assert "never moves" in describe_window(1.0, "constant", 400, 40_000)
    assert describe_window(0.0, "constant", 400, 40_000).endswith("judge it after 1 epoch")


def test_nothing_is_said_too_early_in_a_run() -> None:
    assert latest_finding([0.5, 0.6], [0.4, 0.5], 0.9999, "constant", 400, 4000) is None
    found = latest_finding([0.5, 0.6, 0.65], [0.4, 0.42, 0.44], 0.9999, "constant", 400, 4000)
    assert found is not None
    assert found.kind == "too early"


def test_a_resume_that_left_the_average_behind_counts_anew() -> None:
    base = [0.1 * i for i in range(1, 8)]
    ema = [0.1, 0.2, None, None, 0.2, 0.3, 0.4]
    found = latest_finding(base, ema, 0.9999, "constant", 400, 4000)
    assert found is not None
    assert found.evidence["updates"] == pytest.approx(3 * 400)
    assert latest_finding(base[:6], ema[:6], 0.9999, "constant", 400, 4000) is None


# --- whole, tiny trainings -------------------------------------------------------------------------------------------

needs_train = pytest.mark.skipif(bool(missing_packages()), reason="the train extra is not installed")


@pytest.fixture
def train(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, str]]:
    """Train with given (base, ema) IoUs per epoch in place of the validation."""
    from fastema.segmentation.train.trainer import Trainer
    from segmentation.runs import output_of, tiny_options, tiny_run

    def run(base: list[float], ema: list[float], **changes: Any) -> tuple[Any, str]:
        def validate(self: Trainer) -> tuple[list[float], list[list[float]]]:
            epoch = self.epoch
            return [base[epoch]] * 2, [[ema[epoch]] * 2] * len(self.averages.names)

        monkeypatch.setattr(Trainer, "_validate", validate)
        chosen = {"epochs": len(base), "use_ema": True, **changes}
        trainer = tiny_run(request.getfixturevalue("pairs"), tiny_options(tmp_path / "run", **chosen))
        trainer.fit()
        return trainer, output_of(trainer)

    return run


@needs_train
def test_a_run_says_the_outlook_and_each_change_once(train: Callable[..., tuple[Any, str]]) -> None:
    base = [0.30, 0.40, 0.50, 0.60, 0.70]
    _, text = train(base, [0.1, 0.1, 0.1, 0.1, 0.1], ema_decay=0.9999, ema_decay_type="constant")
    assert "EMA: looks back over up to 10,000 updates" in text
    assert text.count("EMA: Too early") == 1
    assert text.index("Epoch 3: Loss") < text.index("EMA: Too early") < text.index("Epoch 4: Loss")


@needs_train
def test_the_outlook_is_that_of_the_schedule_with_its_arguments(train: Callable[..., tuple[Any, str]]) -> None:
    schedule = {"ema_decay": 0.9999, "ema_decay_type": "exp", "ema_decay_args": {"beta": 0.1}}
    _, text = train([0.60, 0.62, 0.64], [0.31, 0.33, 0.36], **schedule)
    assert "EMA: looks back over up to 1 update" in text  # at the end, 0.9999 * (1 - exp(-0.1))
    assert "Too early" not in text


@needs_train
def test_findings_that_alternate_are_said_once(train: Callable[..., tuple[Any, str]]) -> None:
    base = [0.30, 0.50, 0.60, 0.66, 0.70, 0.72, 0.735, 0.745]
    gaps = [0.0, 0.02, 0.01, 0.09, 0.08, 0.0, 0.0, 0.09]
    ema = [value + gap for value, gap in zip(base, gaps, strict=True)]
    kinds = [latest_finding(base[:n], ema[:n], 0.9, "threshold", 3, 24) for n in range(3, 9)]
    changes = [kind.kind for kind in kinds if kind is not None]
    assert len(changes) > len(set(changes)) > 1, changes
    _, text = train(base, ema, ema_decay=0.9)
    lines = [line for line in text.splitlines() if line.startswith("EMA: ") and "median of the last" in line]
    assert len(lines) == len(set(changes))


@needs_train
@pytest.mark.parametrize(
    ("scheduler", "expected"), [("none", "stays high to the end"), ("cosine", "falls to almost 0"), ("wsd", "almost 0")]
)
def test_a_run_says_what_to_expect(train: Callable[..., tuple[Any, str]], scheduler: str, expected: str) -> None:
    _, text = train([0.3, 0.4], [0.3, 0.4], scheduler=scheduler)
    assert expected in text[: text.index("Epoch 1: Loss")]


@needs_train
def test_decays_that_cannot_differ_are_one_average(train: Callable[..., tuple[Any, str]], tmp_path: Path) -> None:
    trainer, text = train([0.3, 0.4], [0.3, 0.4], ema_decays=(0.99, 0.9, 0.999))
    total = trainer.stages.total_steps
    assert trainer.averages.names == ["0.99"]
    assert f"EMA: 0.9, 0.999 left out: in a run of {total} updates" in text
    assert "ema_iou_0.999" not in (tmp_path / "run" / "history.csv").read_text()


@needs_train
def test_a_longer_run_goes_on_with_each_from_the_one_average(
    train: Callable[..., tuple[Any, str]], tmp_path: Path
) -> None:
    before, _ = train([0.3], [0.3], ema_decays=(0.5, 0.999))
    assert before.averages.names == ["0.5"]
    after, text = train([0.3] * 4, [0.3] * 4, ema_decays=(0.5, 0.999), resume_from=tmp_path / "run" / "last.pth")
    assert after.averages.names == ["0.5", "0.999"]
    assert "has no EMA of decay" not in text
    assert after.ema.num_updates == after.stages.total_steps


@needs_train
def test_auto_starts_at_once_where_the_start_is_forgotten(train: Callable[..., tuple[Any, str]]) -> None:
    trainer, text = train([0.30, 0.40], [0.3, 0.4], ema_start="auto")
    assert text.count("EMA: starts now (--ema-start auto)") == 1
    assert trainer.ema.num_updates == trainer.stages.total_steps


@needs_train
def test_auto_starts_when_it_pays(train: Callable[..., tuple[Any, str]]) -> None:
    trainer, text = train([0.30, 0.40, 0.50, 0.55], [0.0, 0.0, 0.0, 0.56], ema_start="auto", ema_decay_type="constant")
    assert "EMA: waits until" in text
    assert "EMA: starts after epoch 3, improving" in text
    assert [record.ema_iou for record in trainer.history] == [None, None, None, pytest.approx(0.56)]
    assert trainer.ema.num_updates == trainer.stages.at(4).steps_per_epoch


@needs_train
def test_auto_never_starts_a_run_that_collapses(train: Callable[..., tuple[Any, str]], tmp_path: Path) -> None:
    trainer, text = train([0.5480, 0.1136, 0.11], [0.0] * 3, ema_start="auto", ema_decay_type="constant")
    assert trainer.ema is None
    assert text.count("EMA: not started, collapse") == 1
    assert not (tmp_path / "run" / "best_ema.pth").exists()


@needs_train
def test_auto_goes_on_after_a_resume(train: Callable[..., tuple[Any, str]], tmp_path: Path) -> None:
    last = tmp_path / "run" / "last.pth"
    waits = {"ema_start": "auto", "ema_decay_type": "constant"}
    train([0.30, 0.40], [0.0] * 2, **waits)
    resumed, text = train([0.30, 0.40, 0.50, 0.60], [0.0] * 4, **waits, resume_from=last)
    assert "EMA: starts after epoch 3" in text
    again, text = train([0.30, 0.40, 0.50, 0.60, 0.65], [0.0] * 5, **waits, resume_from=last)
    assert "starts after" not in text
    assert again.ema.num_updates == 2 * resumed.ema.num_updates  # the average went on


@needs_train
def test_an_unknown_start_is_refused(train: Callable[..., tuple[Any, str]]) -> None:
    with pytest.raises(UserError, match="--ema-start must be now or auto, got later"):
        train([0.3], [0.3], ema_start="later")
