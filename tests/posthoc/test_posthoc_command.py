"""`fastema posthoc` as a user meets it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_posthoc import make_model, run

from fastema import cli
from fastema.posthoc import synthesize

pytest.importorskip("safetensors")
load_file = pytest.importorskip("safetensors.torch").load_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("snapshots")
    run(made, 160, 10)
    return made


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["posthoc", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["posthoc", *map(str, arguments)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("fastema: error: ") and "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        (["--sigma-rel", "0.12"], {"sigma_rel": 0.12}),
        (["--gamma", "5"], {"gamma": 5.0}),
        (["--decay", "0.95"], {"decay": 0.95}),
        (["--window", "80"], {"window": 80}),
        (["--weights", "0,1,2,3"], {"weights": [0, 1, 2, 3]}),
        (["--sigma-rel", "0.12", "--step", "100"], {"sigma_rel": 0.12, "step": 100}),
    ],
)
def test_an_average_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], arguments: dict
) -> None:
    out = tmp_path / "averaged.safetensors"
    text = told(capsys, folder, *flags, "--out", out)
    expected = synthesize(folder, **arguments)
    written = load_file(out)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    assert f"profile error {expected.error:.2%}" in text
    make_model().load_state_dict(written)


def test_list(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, folder, "--list")
    assert "averages: sigma_rel 0.05; sigma_rel 0.1" in text
    assert len([line for line in text.splitlines() if line.startswith("step ")]) == 16


def test_a_sweep_names_the_best_and_writes_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    script = tmp_path / "score.py"  # best where a weight is closest to what sigma_rel 0.1 gives
    wanted = float(synthesize(folder, sigma_rel=0.1)["0.bias"][0])
    script.write_text(
        "import sys\nfrom safetensors.torch import load_file\n"
        f"print('loss of 1 model:', abs(float(load_file(sys.argv[1])['0.bias'][0]) - {wanted}))\n"
    )
    out, plot = tmp_path / "best.safetensors", tmp_path / "curve.png"
    text = told(
        capsys, folder, "--sweep", "0.05:0.2:3", "--evaluate", f"{sys.executable} {script} {{}}", "--mode", "min",
        "--out", out, "--plot", plot,
    )  # fmt: skip
    assert "best: sigma_rel 0.1000 with" in text and "at an end" not in text
    assert all(torch.equal(load_file(out)[name], value) for name, value in synthesize(folder, sigma_rel=0.1).items())
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_best_at_the_end_is_said(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("import os, sys\nprint(os.path.getsize(sys.argv[1]))\n")
    text = told(capsys, folder, "--sweep", "0.05:0.2:2", "--evaluate", f"{sys.executable} {tmp_path / 's.py'}")
    assert "the best is at an end of the sweep" in text


def test_a_plan_needs_no_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = told(capsys, "--plan", "--snapshots", "8,16", "--parameters", "1e9", "--plot", tmp_path / "plan.png")
    assert "64.0 GB" in text and "128.0 GB" in text
    (line,) = [line for line in text.splitlines() if line.strip().startswith("16")]
    assert line.split()[1:9] == ["11.96%", "3.86%", "0.00%", "0.35%", "0.00%", "0.90%", "2.32%", "7.90%"]
    assert (tmp_path / "plan.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give FOLDER, or --plan"),
        (["F"], "say which average"),
        (["F", "--sigma-rel", "0.1"], "give --out FILE"),
        (["F", "--sigma-rel", "0.4", "--out", "O"], "sigma_rel must be in"),
        (["F", "--sigma-rel", "0.001", "--out", "O"], "cannot be made"),
        (["F", "--sigma-rel", "0.1", "--out", "O", "--step", "7"], "no snapshot of step 7"),
        (["F", "--sweep", "0.05:0.2:3"], "go together"),
        (["F", "--sigma-rel", "0.1", "--out", "O", "--evaluate", "true"], "go together"),
        (["F", "--sigma-rel", "0.1", "--out", "O", "--plot", "p.png"], "--plot draws"),
        (["F", "--plan"], "--plan does not take FOLDER"),
        (["F", "--list", "--out", "O"], "--list does not take --out"),
        (["nowhere", "--list"], "there is no folder nowhere"),
        (["F", "--sigma-rel", "0.1", "--out", "nowhere/o"], "--out: there is no folder"),
        (["F", "--sweep", "0.05:0.2:2", "--evaluate", "false"], "ended with status 1"),
        (["F", "--sweep", "0.05:0.2:2", "--evaluate", "true"], "printed no number"),
        (["F", "--sweep", "0.05:0.2:2", "--evaluate", "no-such-command"], "no-such-command"),
    ],
)
def test_errors_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    places = {"F": folder, "O": tmp_path / "out.safetensors"}
    assert message in error_of(capsys, *(places.get(flag, flag) for flag in flags))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("sweep", ["0.1", "0.2:0.1:3", "0:0.1:3", "0.1:0.5:3", "0.1:0.2:1", "a:b:c", "0.1:0.2:2.5"])
def test_bad_sweeps_are_usage_errors(folder: Path, capsys: pytest.CaptureFixture[str], sweep: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["posthoc", str(folder), "--sweep", sweep, "--evaluate", "true"])
    assert caught.value.code == 2 and "A:B:N" in capsys.readouterr().err
