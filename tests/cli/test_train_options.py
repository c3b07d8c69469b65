"""The options of a training, by flags and by a file: accepted values, and errors with a reason."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fastema import cli
from fastema.cli import train as train_command
from fastema.cli.train import options_of
from fastema.errors import UserError
from fastema.segmentation.options import TrainOptions
from fastema.segmentation.train_extra import missing_packages
from segmentation.phases import PHASE_1, PHASE_2

RECIPE = {"ema": True, "ema_params": {"decay": 0.9999, "decay_type": "exp", "beta": 15}}


def parsed(command: str) -> TrainOptions:
    return options_of(cli._parser().parse_args(command.split()))


def told(**changes: Any) -> TrainOptions:
    return TrainOptions("x", Path("y"), **changes)


def params(folder: Path, content: Any) -> str:
    file = folder / "params.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return f"train --dataset-path x --checkpoint-dir y --training-params {file}"


def test_the_two_phases_of_a_training() -> None:
    first, second = parsed(PHASE_1), parsed(PHASE_2)
    assert (first.backbone, first.num_experts, first.second_batch_size, first.accumulation_steps) == (
        "edgenext_base",
        7,
        1,
        4,
    )
    assert (first.first_stage_epochs, first.epochs, first.second_lr, first.min_lr) == (0, 120, 0.0002, 0.00001)
    assert first.progressive_unfreeze and not first.use_ema and first.cam_only
    assert (second.checkpoint_dir, second.epochs, second.use_ema, second.decays) == (
        Path("checkpoints_ema"),
        150,
        True,
        (0.999,),
    )


def test_flags_that_are_lists_and_switches() -> None:
    chosen = parsed(
        "train --dataset-path x --checkpoint-dir y --use-ema --ema-decays 0.99,0.999,0.9999 --ema-decay-type warmup "
        "--ema-decay-args inv_gamma=2,power=0.75 --no-cam-only --no-pretrained"
    )
    assert chosen.decays == (0.99, 0.999, 0.9999)
    assert chosen.ema_decay_args == {"inv_gamma": 2.0, "power": 0.75}
    assert not chosen.cam_only and not chosen.pretrained


def test_options_survive_a_checkpoint_as_plain_values() -> None:
    plain = told(ema_decays=(0.9, 0.99), ema_decay_args={"beta": 3.0}).plain()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["checkpoint_dir"] == "y"
    assert plain["ema_decays"] == [0.9, 0.99]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--ema-decays 0.9,x", "argument --ema-decays: expected numbers like 0.99,0.999, got '0.9,x'"),
        ("--ema-decay-args beta", "argument --ema-decay-args: expected something like beta=15, got 'beta'"),
        ("--scheduler step", "argument --scheduler: invalid choice: 'step'"),
        ("--amp fp8", "argument --amp: invalid choice: 'fp8'"),
    ],
)
def test_flags_that_cannot_be_read(capsys: pytest.CaptureFixture[str], flags: str, said: str) -> None:
    with pytest.raises(SystemExit):
        parsed(f"train --dataset-path x --checkpoint-dir y {flags}")
    assert said in capsys.readouterr().err


# --- the file ---------------------------------------------------------------------------------------------------------


def test_training_params_are_the_flags_of_an_ema(tmp_path: Path) -> None:
    chosen = parsed(params(tmp_path, RECIPE))
    assert (chosen.use_ema, chosen.ema_decay, chosen.ema_decay_type) == (True, 0.9999, "exp")
    assert chosen.ema_decay_args == {"beta": 15.0}
    assert not parsed(params(tmp_path, {"ema": False, "ema_params": RECIPE["ema_params"]})).use_ema
    assert parsed(params(tmp_path, {"ema": True})).ema_decay == TrainOptions.ema_decay
    assert parsed(f"{params(tmp_path, RECIPE)} --use-ema --ema-decay 0.9999").use_ema, "the same twice is no conflict"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", r"is not JSON: .*Expected for example \{"),
        ([1], "must be a JSON object"),
        ({**RECIPE, "max_epochs": 3, "lr": 1}, r"has 'max_epochs', 'lr', which would not be used: only ema and"),
        ({"ema_params": {}}, r'"ema" must be true or false, got null'),
        ({"ema": "yes"}, r'"ema" must be true or false, got "yes"'),
        ({"ema": True, "ema_params": 1}, r'"ema_params" must be an object, got 1'),
        ({"ema": True, "ema_params": {"decay": "much"}}, r'"decay" must be a number, got "much"'),
        ({"ema": True, "ema_params": {"decay_type": 3}}, r'"decay_type" must be a name, got 3'),
        ({"ema": True, "ema_params": {"decay": 2}}, r"--ema-decay must be in \[0, 1\], got 2.0"),
    ],
)
def test_training_params_that_cannot_be_used(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parsed(params(tmp_path, content))


def test_a_missing_file_of_training_params(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.json cannot be read: No such file"):
        parsed(f"train --dataset-path x --checkpoint-dir y --training-params {tmp_path / 'none.json'}")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--ema-decay 0.999", r"--ema-decay 0.999 and --training-params .*, which says 0.9999, conflict"),
        ("--ema-decay-type constant", r"--ema-decay-type constant and .* which says exp, conflict"),
        ("--ema-decays 0.9,0.99", r"--ema-decays and --training-params .* both say which averages"),
    ],
)
def test_a_flag_and_the_file_that_differ(tmp_path: Path, flags: str, said: str) -> None:
    """Also where the flag is given with its default value."""
    with pytest.raises(UserError, match=said):
        parsed(f"{params(tmp_path, RECIPE)} {flags}")


def test_an_ema_that_the_file_switches_off_and_a_flag_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--use-ema True and --training-params .*, which says False, conflict"):
        parsed(f"{params(tmp_path, {'ema': False})} --use-ema")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"decay_type": "cosine"},
            "--ema-decay-type must be one of constant, debiased, exp, .*, threshold, warmup, got cos",
        ),
        ({"decay_type": "constant", "beta": 3}, "--ema-decay-type constant cannot be set up: .*do not take .*: beta"),
        ({"decay_type": "exp", "beta": -1}, "--ema-decay-type exp cannot be set up: beta must be positive, got -1.0"),
    ],
)
def test_a_schedule_is_tried_before_the_training(tmp_path: Path, content: Any, said: str) -> None:
    chosen = parsed(params(tmp_path, {"ema": True, "ema_params": content}))
    with pytest.raises(UserError, match=said):
        train_command.check_schedule(chosen)


# --- what cannot be meant ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"batch_size": -1}, "--batch-size must be at least 1, got -1"),
        ({"stage2_batch_size": 0}, "--stage2-batch-size must be at least 1, got 0"),
        ({"img_size": 32}, "--img-size must be at least 64, got 32"),
        ({"lr": math.nan}, "--lr must be a number above 0, got nan"),
        ({"stage2_lr": 0.0}, "--stage2-lr must be a number above 0, got 0.0"),
        ({"min_lr": 0.1}, r"--min-lr must be between 0 and --lr \(0.001\), got 0.1"),
        ({"stage2_lr": 1e-6}, r"--min-lr must be between 0 and --stage2-lr \(1e-06\), got 1e-05"),
        ({"ema_decay": 1.5}, r"--ema-decay must be in \[0, 1\], got 1.5"),
        ({"ema_decay": math.nan}, r"--ema-decay must be in \[0, 1\], got nan"),
        ({"ema_decays": (0.9, 1.5)}, r"--ema-decays must be in \[0, 1\] each, got 1.5"),
        ({"ema_decays": (0.9, 0.99, 0.9)}, "--ema-decays must differ from each other, got 0.9,0.99,0.9"),
        ({"val_fraction": 1.0}, "--val-fraction must be between 0 and 1, got 1.0"),
        ({"warmup_epochs": 30}, "--warmup-epochs must be below --epochs 30, got 30"),
        ({"warmup_epochs": 3, "stage1_epochs": 3}, "--warmup-epochs must be below --stage1-epochs 3, got 3"),
        ({"stage1_epochs": 31}, "--stage1-epochs must be at most --epochs 30, the total, got 31"),
        ({"accumulation_steps": 0}, "--accumulation-steps must be at least 1, got 0"),
        ({"num_experts": -1}, "--num-experts must be 0 or more, got -1"),
        ({"num_experts": 3, "top_k": 4}, "--top-k must be from 1 to 3 experts, got 4"),
        ({"scheduler": "step"}, "--scheduler must be cosine, cosine_restart, onecycle, wsd or none, got step"),
        ({"scheduler": "onecycle", "warmup_epochs": 1}, "onecycle has a warm-up of its own: leave out --warmup-epochs"),
        ({"stage1_epochs": 30, "progressive_unfreeze": True}, "but all 30 epochs are stage 1"),
        ({"use_ema": True, "ema_start_epoch": 31}, "--ema-start-epoch must be at most --epochs 30, got 31"),
        ({"use_ema": True, "ema_start": "auto", "ema_start_epoch": 2}, "both say when the EMA starts"),
        ({"use_ema": True, "ema_start": "later"}, "--ema-start must be now or auto, got later"),
    ],
)
def test_options_that_cannot_be_meant(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        told(**changes).check()


def test_a_decay_and_several_decays() -> None:
    with pytest.raises(UserError, match="--ema-decay and --ema-decays both say which averages there are"):
        parsed("train --dataset-path x --checkpoint-dir y --use-ema --ema-decay 0.9 --ema-decays 0.9,0.99")


@pytest.mark.skipif(bool(missing_packages()), reason="the train extra is not installed")
def test_a_flag_of_an_ema_that_there_is_not(tmp_path: Path) -> None:
    arguments = cli._parser().parse_args(
        ["train", "--dataset-path", "x", "--checkpoint-dir", str(tmp_path / "run"), "--ema-decay", "0.99"]
    )
    with pytest.raises(UserError, match="--ema-decay without an EMA would do nothing: add --use-ema"):
        train_command.run(arguments)
    assert not (tmp_path / "run").exists()


def test_several_decays_after_the_flag_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--dataset-path", "x", "--checkpoint-dir", "y", "--ema-decay", "0.9", "0.99"])
    assert "unrecognized arguments: 0.99; several averages are --ema-decays 0.9,0.99" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "give --dataset-path DIR, or else --images DIR --masks DIR"),
        (["--images", "a"], "--images DIR needs --masks DIR too"),
        (["--dataset-path", "x", "--images", "a", "--masks", "b"], "or else --images"),
        (["--dataset-path", "x", "--foreground", "red"], "--foreground must be numbers"),
        (["--dataset-path", "x", "--ignore-index", "a"], "--ignore-index must be numbers"),
    ],
)
def test_what_the_data_are(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--checkpoint-dir", "y", *given]) == 2
    assert said in capsys.readouterr().err
