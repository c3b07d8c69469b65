"""`fastema evaluate`, the table and the JSON; and loading a network from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastema.segmentation.train_extra import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

import numpy as np
import torch
from PIL import Image

from fastema import FastEMA, cli
from fastema.checkpoint import save_checkpoint
from fastema.segmentation.data.listing import hold_out, list_pairs
from fastema.segmentation.data.loaders import ValidationSet, network_input, validation_loader
from fastema.segmentation.eval.scores import evaluate, predict
from fastema.segmentation.model.load import load_both, load_net, read_checkpoint
from fastema.segmentation.model.network import SegmentationNet
from segmentation.tiny_network import ARCHITECTURE, OPTIONS, SIZES, random_net, write_pairs

CPU = torch.device("cpu")
COUNT = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set with a Train and a Test folder."""
    root = tmp_path_factory.mktemp("data")
    write_pairs(root / "Test", COUNT)
    write_pairs(root / "Train", 12, "train-{}")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained and averaged weights of the same network that have nothing in common."""
    net = random_net(0)
    ema = FastEMA(random_net(1))
    path = tmp_path_factory.mktemp("run") / "best_ema.pth"
    save_checkpoint(path, net=net, ema=ema, epoch=7, options=OPTIONS)
    return path


@pytest.fixture(scope="module")
def without_ema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "best_model.pth"
    save_checkpoint(path, net=random_net(0), epoch=7, options=OPTIONS)
    return path


def evaluated(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: object) -> tuple[dict[str, Any], str]:
    """Run the command; return its JSON and its output."""
    out = tmp_path / "evaluation.json"
    assert cli.main(["evaluate", *map(str, arguments), "--json", str(out), "--device", "cpu"]) == 0
    return json.loads(out.read_text()), capsys.readouterr().out


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["evaluate", *map(str, arguments), "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastema: error: ") and "Traceback" not in captured.err
    return captured.err


def test_base_and_ema_side_by_side(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path, data: Path
) -> None:
    record, text = evaluated(capsys, tmp_path, checkpoint, "--dataset-path", data, "--batch-size", 2)
    assert (record["epoch"], record["images"], record["img_size"]) == (7, COUNT, 32)
    assert record["dataset"] == str(data / "Test") and record["checkpoint"] == str(checkpoint)
    assert set(record["versions"]) == {"fastema", "torch", "python"}
    assert [weights["name"] for weights in record["weights"]] == ["net", "ema_net"]

    # Each is what the network gives with these weights alone, in the order of the files.
    pairs = list_pairs(data, "Test").pairs
    loader = validation_loader(ValidationSet(pairs, 32), 2, 0)
    for weights, seed in zip(record["weights"], (0, 1), strict=True):
        expected = evaluate(random_net(seed), loader, CPU)
        assert [one["iou"] for one in weights["per_image"]] == pytest.approx(expected, abs=1e-12)
        assert [one["image"] for one in weights["per_image"]] == [pair.image.name for pair in pairs]
        for metric, mean in weights["means"].items():
            values = [one[metric] for one in weights["per_image"]]
            assert mean == pytest.approx(sum(values) / COUNT)
            assert min(values) >= 0 and max(values) <= 1.01
    base, averaged = (weights["means"] for weights in record["weights"])
    assert base != averaged
    for value in (*base.values(), *averaged.values()):
        assert f"{value:.4f}" in text
    assert f"{averaged['iou'] - base['iou']:+.4f}" in text
    assert "EMA - base" in text and "wF" in text
    assert "mobilenetv3_small_050, 2 experts" in text


def test_without_an_ema_there_is_one_row(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, without_ema: Path, checkpoint: Path, data: Path
) -> None:
    record, text = evaluated(capsys, tmp_path, without_ema, "--dataset-path", data)
    assert [weights["name"] for weights in record["weights"]] == ["net"]
    assert "no EMA in it" in text and "EMA - base" not in text
    both, _ = evaluated(capsys, tmp_path, checkpoint, "--dataset-path", data)
    assert both["weights"][0] == record["weights"][0]


def test_the_batch_size_changes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, without_ema: Path, data: Path
) -> None:
    values = []
    for batch_size in (1, 5):
        record, _ = evaluated(capsys, tmp_path, without_ema, "--dataset-path", data, "--batch-size", batch_size)
        values.append([one["iou"] for one in record["weights"][0]["per_image"]])
    # Not exactly: convolutions round differently, and a pixel may be on the edge.
    assert values[0] == pytest.approx(values[1], abs=0.01)


def test_another_image_size(capsys: pytest.CaptureFixture[str], tmp_path: Path, without_ema: Path, data: Path) -> None:
    record, _ = evaluated(capsys, tmp_path, without_ema, "--dataset-path", data, "--img-size", 64)
    loader = validation_loader(ValidationSet(list_pairs(data, "Test").pairs, 64), 8, 0)
    assert record["img_size"] == 64
    expected = evaluate(random_net(0), loader, CPU)
    assert [one["iou"] for one in record["weights"][0]["per_image"]] == pytest.approx(expected, abs=1e-12)


def test_which_images(capsys: pytest.CaptureFixture[str], tmp_path: Path, without_ema: Path, data: Path) -> None:
    held_out = hold_out(list_pairs(data, "Train").pairs, 0.4)[1]
    record, text = evaluated(capsys, tmp_path, without_ema, "--dataset-path", data, "--split", "validation")
    assert [one["image"] for one in record["weights"][0]["per_image"]] == [pair.image.name for pair in held_out]
    assert "Train, held out" in text

    # A set without Train and Test is evaluated whole, and it is said that training images may be among them.
    record, text = evaluated(capsys, tmp_path, without_ema, "--dataset-path", data / "Train")
    assert record["images"] == 12
    assert "has no Test folder: these are all its images" in text and "--split validation" in text
    _, text = evaluated(capsys, tmp_path, without_ema, "--dataset-path", data / "Test")
    assert "has no Test folder" not in text


def test_the_generated_set_by_its_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastema.segmentation.data import synthetic

    original = synthetic.ensure_dataset
    monkeypatch.setattr(synthetic, "ensure_dataset", lambda parent, seed: original(parent, seed, count=8, size=32))
    save_checkpoint(tmp_path / "last.pth", net=random_net(0), options={**OPTIONS, "seed": 3})
    record, _ = evaluated(capsys, tmp_path, tmp_path / "last.pth", "--dataset-path", "synthetic")
    assert record["images"] == 2 and record["dataset"] == str(original(tmp_path, 3, count=8, size=32) / "Test")


def test_images_without_an_object(capsys: pytest.CaptureFixture[str], tmp_path: Path, without_ema: Path) -> None:
    write_pairs(tmp_path / "cod" / "Test", 2, "COD10K-CAM-{}")
    for kind, suffix in (("Image", "jpg"), ("GT_Object", "png")):
        black = Image.fromarray(np.zeros((30, 30), np.uint8))
        black.save(tmp_path / "cod" / "Test" / kind / f"COD10K-NonCAM-0.{suffix}")
    record, _ = evaluated(capsys, tmp_path, without_ema, "--dataset-path", tmp_path / "cod")
    assert (record["images"], record["all_black_masks"]) == (2, 0)
    record, text = evaluated(capsys, tmp_path, without_ema, "--dataset-path", tmp_path / "cod", "--no-cam-only")
    assert (record["images"], record["all_black_masks"]) == (3, 1)
    assert "1 all-black mask" in text
    last = record["weights"][0]["per_image"][-1]
    assert last["image"] == "COD10K-NonCAM-0.jpg" and last["weighted_f"] == 0 and last["iou"] in (0, 1)


def test_a_network_that_answers_nan(capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path) -> None:
    net = random_net(0)
    with torch.no_grad():
        next(net.backbone.parameters()).fill_(torch.nan)
    save_checkpoint(tmp_path / "bad.pth", net=net, options=OPTIONS)
    message = error_of(capsys, tmp_path / "bad.pth", "--dataset-path", data)
    assert "bad.pth cannot be evaluated: image 1, weights 'net': the logits have NaN" in message


def test_evaluation_leaves_every_mode_as_it_was(data: Path) -> None:
    net = random_net(0).train()
    net.backbone.eval()  # as while it is frozen
    modes = [module.training for module in net.modules()]
    evaluate(net, validation_loader(ValidationSet(list_pairs(data, "Test").pairs, 32), 8, 0), CPU)
    assert [module.training for module in net.modules()] == modes


def test_predictions_have_the_size_of_their_masks(data: Path) -> None:
    loader = validation_loader(ValidationSet(list_pairs(data, "Test").pairs, 32), COUNT, 0)
    (batch,) = loader
    predictions = predict(random_net(0).eval(), batch, CPU)
    assert [tuple(one.shape) for one in predictions] == SIZES
    assert all(one.dtype == torch.bool for one in predictions)


def test_predict_and_evaluate_see_the_same_image(data: Path) -> None:
    pair = list_pairs(data, "Test").pairs[1]
    with Image.open(pair.image) as image:
        pixels = np.array(image.convert("RGB"))
    seen = ValidationSet([pair], 20)[0][0]
    assert torch.equal(network_input(pixels, 20), seen)


# --- from a file to a network ----------------------------------------------------------------------------------------


def test_load_net_and_load_both(checkpoint: Path) -> None:
    read = read_checkpoint(checkpoint)
    assert (read.architecture, read.img_size, read.epoch) == (ARCHITECTURE, 32, 7)
    assert read.weights == ("net", "ema_net")
    expected = {"net": random_net(0).state_dict(), "ema_net": random_net(1).state_dict()}

    def same(net: SegmentationNet, name: str) -> bool:
        return all(torch.equal(value, expected[name][key]) for key, value in net.state_dict().items())

    for name in read.weights:
        net = load_net(read, CPU, name)
        assert same(net, name) and not net.training
    net, ema = load_both(read, CPU)
    assert ema is not None and same(net, "net") and not net.training
    with ema.swapped():
        assert same(net, "ema_net")
    assert same(net, "net")


def written(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_files_that_are_no_checkpoint_of_a_training(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path
) -> None:
    weights = random_net(0).state_dict()
    dataset = ("--dataset-path", data)

    message = error_of(capsys, tmp_path / "gone.pth", *dataset)
    assert "there is no checkpoint at" in message

    (tmp_path / "text.pth").write_text("no checkpoint")
    assert "text.pth is not a checkpoint, or is cut short" in error_of(capsys, tmp_path / "text.pth", *dataset)

    message = error_of(capsys, written(tmp_path / "bare.pth", weights), *dataset)
    assert f"a bare state_dict of {len(weights)} tensors (backbone." in message
    assert "save_checkpoint(path, net=model, options=...)" in message

    message = error_of(capsys, written(tmp_path / "other.pth", {"model": weights, "lr": 0.1}), *dataset)
    assert "no weights under 'net': it is a dict with 'model', 'lr'" in message

    message = error_of(capsys, written(tmp_path / "plain.pth", {"net": weights}), *dataset)
    assert "does not say how its network is built: it has 'net', but no 'options'" in message

    old = {name: value for name, value in OPTIONS.items() if name not in ("num_experts", "top_k")}
    message = error_of(capsys, written(tmp_path / "old.pth", {"net": weights, "options": old}), *dataset)
    assert "another version of fastema: its options have no num_experts, no top_k" in message

    odd = {**OPTIONS, "img_size": "large"}
    message = error_of(capsys, written(tmp_path / "odd.pth", {"net": weights, "options": odd}), *dataset)
    assert "its options have img_size 'large'" in message

    more = {**OPTIONS, "num_experts": 3}
    message = error_of(capsys, written(tmp_path / "more.pth", {"net": weights, "options": more}), *dataset)
    assert "net of " in message and "does not fit this model" in message and "num_experts=3" in message

    unknown = {**OPTIONS, "backbone": "mobilenetv3_smal_050"}
    message = error_of(capsys, written(tmp_path / "name.pth", {"net": weights, "options": unknown}), *dataset)
    assert "did you mean mobilenetv3_small_050" in message


def test_bad_flags_and_data(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path, without_ema: Path, data: Path
) -> None:
    good = (checkpoint, "--dataset-path", data)
    assert "there is no data set at" in error_of(capsys, checkpoint, "--dataset-path", tmp_path / "gone")
    (tmp_path / "train-only").mkdir()
    (tmp_path / "train-only" / "Train").symlink_to(data / "Train")
    assert "has no Test folder" in error_of(capsys, checkpoint, "--dataset-path", tmp_path / "train-only")
    assert "--batch-size must be at least 1, got 0" in error_of(capsys, *good, "--batch-size", 0)
    assert "cannot take --img-size 0" in error_of(capsys, *good, "--img-size", 0)
    assert "its folder does not exist" in error_of(capsys, *good, "--json", tmp_path / "no" / "x.json")
    assert "is a folder" in error_of(capsys, *good, "--json", tmp_path)
    assert cli.main(["evaluate", str(checkpoint), "--dataset-path", str(data), "--device", "gpu9"]) == 2
    assert "--device gpu9 cannot be used here" in capsys.readouterr().err
    other = {name: value for name, value in OPTIONS.items() if name != "val_fraction"}
    save_checkpoint(tmp_path / "own.pth", net=random_net(0), options=other)
    message = error_of(capsys, tmp_path / "own.pth", "--dataset-path", data, "--split", "validation")
    assert "does not say which images it was trained on: its options have no val_fraction" in message
