"""`fastema train --ema-profiles S,S --snapshots N`: snapshots in the run, and the best average at its end."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("safetensors")

from fastema.checkpoint import load_checkpoint
from fastema.cli import main
from fastema.errors import UserError
from fastema.posthoc import snapshots_in, synthesize
from fastema.segmentation.data.loaders import ValidationSet, validation_loader
from fastema.segmentation.eval.scores import evaluate
from fastema.segmentation.model.load import load_net, read_checkpoint
from fastema.segmentation.train.checkpoints import move_previous_run
from fastema.segmentation.train.trainer import Trainer
from segmentation.runs import differences, output_of, tiny_options, tiny_run

PROFILES: dict[str, Any] = {"use_ema": True, "ema_profiles": (0.05, 0.10), "snapshots": 4, "epochs": 4, "batch_size": 3}
STEPS = [4, 8, 12, 16]


@pytest.fixture(scope="module")
def finished(pairs, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run of 16 steps with 4 snapshots."""
    run = tiny_run(pairs, tiny_options(tmp_path_factory.mktemp("runs") / "run", **PROFILES))
    run.fit()
    return run


def folder_of(run: Trainer) -> Path:
    return run.options.checkpoint_dir


def test_snapshots_are_evenly_spaced_and_the_last_is_the_average_itself(finished: Trainer) -> None:
    folder = folder_of(finished) / "snapshots"
    assert [each.step for each in snapshots_in(folder)] == STEPS
    assert finished.ema is not None
    for which, sigma in enumerate((0.05, 0.10)):
        assert not differences(dict(synthesize(folder, sigma_rel=sigma)), finished.ema.shadow_state_dict(which))
    assert re.search(r"Snapshots: a snapshot of 2 averages in float32 takes .*, 4 of them .* free", output_of(finished))


def test_the_end_of_the_run_names_the_best_sigma_rel_and_writes_its_average(pairs, finished: Trainer) -> None:
    text = output_of(finished)
    scores = {
        float(sigma): float(iou) for sigma, iou in re.findall(r"sigma_rel (\S+) +profile error +\S+%  IoU (\S+)", text)
    }
    assert {0.05, 0.10} < scores.keys()
    found = re.search(r"Best: +sigma_rel (\S+), IoU (\d\.\d+)", text)
    assert found is not None
    best = float(found[1])
    assert float(found[2]) == scores[best] == max(scores.values())

    path = folder_of(finished) / "best_posthoc.pth"
    content = load_checkpoint(path)
    made = synthesize(folder_of(finished) / "snapshots", sigma_rel=best)
    assert not differences(dict(content["ema_net"]), dict(made))
    assert not differences(dict(content["net"]), dict(finished.net.state_dict()))
    assert content["posthoc"]["sigma_rel"] == best and content["posthoc"]["step"] == STEPS[-1]

    net = load_net(read_checkpoint(path), torch.device("cpu"), "ema_net")
    loader = validation_loader(ValidationSet(pairs[1], 64), 3, 0)
    assert fmean(evaluate(net, loader, torch.device("cpu"))) == pytest.approx(content["posthoc"]["iou"], abs=1e-6)


def test_evaluate_and_predict_load_it_and_a_resume_refuses_it(
    pairs, finished: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, image = str(folder_of(finished) / "best_posthoc.pth"), str(pairs[1][0].image)
    root = str(Path(image).parent.parent)
    assert main(["evaluate", path, "--dataset-path", root, "--device", "cpu"]) == 0
    assert "EMA - base" in capsys.readouterr().out
    assert main(["predict", path, image, "--out", str(tmp_path / "masks"), "--device", "cpu"]) == 0
    with pytest.raises(UserError, match="cannot be resumed from: it has no optimizer"):
        tiny_run(pairs, tiny_options(tmp_path / "on", **{**PROFILES, "epochs": 5, "resume_from": Path(path)}))


def test_a_resumed_run_has_the_same_snapshots(pairs, finished: Trainer, tmp_path: Path) -> None:
    """Interrupted after a snapshot that the last checkpoint does not know of: it is set aside."""
    run = tiny_run(pairs, tiny_options(tmp_path / "run", **PROFILES))
    train_epoch = run._train_epoch

    def interrupted(epoch: int) -> Any:
        result = train_epoch(epoch)
        if epoch == 2:
            raise KeyboardInterrupt
        return result

    run._train_epoch = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert [each.step for each in snapshots_in(tmp_path / "run" / "snapshots")] == STEPS[:2]
    resumed = tiny_run(pairs, tiny_options(tmp_path / "run", **PROFILES, resume_from=tmp_path / "run" / "last.pth"))
    with pytest.warns(UserWarning, match="had 1 snapshots of steps 8 to 8, later than this run's 4"):
        resumed.fit()
    assert [each.step for each in snapshots_in(tmp_path / "run" / "snapshots")] == STEPS
    one, other = (load_checkpoint(each / "best_posthoc.pth") for each in (folder_of(finished), tmp_path / "run"))
    assert not differences(one["ema_net"], other["ema_net"]) and one["posthoc"] == other["posthoc"]


def test_other_profiles_are_refused_in_mid_run(pairs, finished: Trainer, tmp_path: Path) -> None:
    last = folder_of(finished) / "last.pth"
    for changes, had in (({"ema_profiles": (0.05, 0.15)}, "0.05,0.15"), ({"ema_profiles": (), "snapshots": 0}, "none")):
        chosen = {**PROFILES, "epochs": 5, "resume_from": last, **changes}
        with pytest.raises(UserError, match=f"cannot change in mid-run: .*was trained with 0.05,0.1, not {had}"):
            tiny_run(pairs, tiny_options(tmp_path / "run", **chosen))


def test_a_new_run_in_the_folder_moves_the_snapshots_with_the_rest(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "last.pth").touch()
    assert move_previous_run(tmp_path, keep=None) == tmp_path / "previous"
    assert (tmp_path / "previous" / "snapshots").is_dir() and not (tmp_path / "snapshots").exists()


def test_more_snapshots_than_steps_are_refused(pairs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--snapshots 17 is more than the 16 steps that the averages run for"):
        tiny_run(pairs, tiny_options(tmp_path / "run", **{**PROFILES, "snapshots": 17}))


@pytest.mark.parametrize(
    ("flags", "message"),
    {
        "no EMA": (["--ema-profiles", "0.05"], "--ema-profiles without an EMA would do nothing: add --use-ema"),
        "snapshots, no EMA": (["--ema-profiles", "0.05", "--snapshots", "4"], "without an EMA would do nothing"),
        "no profiles": (["--use-ema", "--snapshots", "4"], "--snapshots 4 needs averages with known profiles: add"),
        "out of reach": (["--use-ema", "--ema-profiles", "0.05,0.3"], "above 0 and below 0.2887 each, got 0.05,0.3"),
        "zero": (["--use-ema", "--ema-profiles", "0"], "above 0 and below 0.2887 each, got 0"),
        "nan": (["--use-ema", "--ema-profiles", "nan"], "above 0 and below 0.2887 each, got nan"),
        "twice": (["--use-ema", "--ema-profiles", "0.1,0.1"], "--ema-profiles must differ from each other"),
        "one": (["--use-ema", "--ema-profiles", "0.1", "--snapshots", "1"], "--snapshots must be 0, or at least 2"),
        "and a decay": (["--use-ema", "--ema-profiles", "0.1", "--ema-decay", "0.9"], "--ema-decay both say how"),
    }.values(),
)
def test_mistakes_are_one_line_before_the_run(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--dataset-path", "synthetic", "--checkpoint-dir", str(tmp_path / "run"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
