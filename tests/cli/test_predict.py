"""`fastema predict`: a mask for every image, no other file replaced, unreadable images named at the end."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastema.segmentation.train_extra import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastema import FastEMA, cli
from fastema.checkpoint import save_checkpoint
from fastema.segmentation.data.loaders import network_input
from segmentation.tiny_network import OPTIONS, random_net, write_pairs

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "best_ema.pth"
    save_checkpoint(path, net=random_net(0), ema=FastEMA(random_net(1)), options=OPTIONS)
    return path


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path) -> Run:
    """Run the command with `tmp_path / "masks"` as its output; return that folder."""

    def run(*arguments: object, status: int = 0, out: Path = tmp_path / "masks") -> Path:
        given = ["predict", str(checkpoint), *map(str, arguments), "--out", str(out), "--device", "cpu"]
        assert cli.main(given) == status
        return out

    return run


def image_file(path: Path, seed: int = 0, size: tuple[int, int] = (40, 56), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def mask_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L" and image.format == "PNG"
        return np.array(image)


def probability(seed: int, file: Path) -> np.ndarray:
    """Compute the probability map of the weights of this seed with torch alone."""
    with Image.open(file) as image:
        pixels = np.array(image.convert("RGB"))
    with torch.no_grad():
        logits = random_net(seed).eval()(network_input(pixels, 32)[None]).logits
    return F.interpolate(logits, pixels.shape[:2], mode="bilinear").sigmoid()[0, 0].double().numpy()


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize(("flags", "seed"), [((), 1), (("--weights", "ema"), 1), (("--weights", "net"), 0)])
def test_a_mask_is_the_probability_at_the_size_of_the_image(
    run: Run, tmp_path: Path, flags: tuple[str, ...], seed: int
) -> None:
    file = image_file(tmp_path / "in" / "frog.jpg", size=(41, 57))
    mask = mask_of(run(file, *flags) / "frog.png")
    assert mask.shape == (41, 57) and mask.dtype == np.uint8
    expected = probability(seed, file)
    assert np.ptp(expected) > 0.02, "a flat map would show nothing"
    np.testing.assert_allclose(mask, expected * 255, atol=0.51)


def test_a_threshold_makes_it_black_and_white(run: Run, tmp_path: Path) -> None:
    file = image_file(tmp_path / "frog.png")
    expected = probability(1, file)
    threshold = float(np.median(expected))
    mask = mask_of(run(file, "--threshold", threshold) / "frog.png")
    assert set(np.unique(mask)) == {0, 255}
    clear = np.abs(expected - threshold) > 1e-6
    assert ((mask == 255) == (expected > threshold))[clear].all()


def test_folders_and_kinds_of_images(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_file(tmp_path / "in" / "grey.png", mode="L")
    image_file(tmp_path / "in" / "colour.JPG")
    image_file(tmp_path / "in" / ".hidden.png")
    image_file(tmp_path / "in" / "below" / "deep.png")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    single = image_file(tmp_path / "palette.png", mode="P")
    # The file is named twice: once by its folder.
    out = run(tmp_path / "in", single, tmp_path / "in" / "grey.png", out=tmp_path / "new" / "masks")
    assert names(out) == ["colour.png", "grey.png", "palette.png"]
    assert f"3 of 3 masks written to {out}" in capsys.readouterr().out


def test_bad_images_are_named_and_the_others_done(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [image_file(tmp_path / "in" / f"{name}.png") for name in ("a", "z")]
    whole = good[0].read_bytes()
    (tmp_path / "in" / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "text.jpg").write_text("no image")
    out = run(tmp_path / "in", tmp_path / "gone.png", status=2)
    assert names(out) == ["a.png", "z.png"]
    captured = capsys.readouterr()
    assert f"2 of 5 masks written to {out}" in captured.out
    assert captured.err.startswith("fastema: error: no mask for 3 of 5 images: ")
    assert f"{tmp_path / 'in' / 'half.png'} (" in captured.err
    assert f"{tmp_path / 'in' / 'text.jpg'} (not an image)" in captured.err
    assert f"{tmp_path / 'gone.png'} (No such file or directory)" in captured.err
    assert captured.err.count("\n") == 1


def test_images_of_the_same_name(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        image_file(tmp_path / "one" / "frog.jpg", seed=0),
        image_file(tmp_path / "two" / "frog.jpg", seed=1),
        image_file(tmp_path / "two" / "Frog.png", seed=2),
        image_file(tmp_path / "two" / "frog-2.png", seed=3),
    ]
    out = run(*files)
    text = capsys.readouterr().out
    assert names(out) == ["Frog-4.png", "frog-2.png", "frog-3.png", "frog.png"]
    for file, mask in zip(files, ("frog", "frog-3", "Frog-4", "frog-2"), strict=True):
        np.testing.assert_allclose(mask_of(out / f"{mask}.png"), probability(1, file) * 255, atol=0.51)
    assert f"{files[1]} is not the only frog: its mask is frog-3.png" in text


def test_only_its_own_masks_are_replaced(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    photo = image_file(folder / "photo.png")
    picture = image_file(folder / "picture.jpg")
    truth = image_file(folder / "picture.png", mode="L", seed=5)
    before = {file: file.read_bytes() for file in (photo, picture, truth)}

    run(photo, picture, status=2, out=folder)  # into the folder that they are in
    message = capsys.readouterr().err
    assert f"photo.png (its mask would replace the input {photo})" in message
    assert f"picture.jpg ({truth} is there already, and no mask of fastema predict)" in message
    assert {file: file.read_bytes() for file in before} == before
    assert names(folder) == ["photo.png", "picture.jpg", "picture.png"]

    # A second run replaces the masks of the first, but not where they are what it reads.
    out = run(photo)
    first = mask_of(out / "photo.png")
    run(photo, "--weights", "net")
    assert (mask_of(out / "photo.png") != first).any()
    capsys.readouterr()
    run(out, status=2, out=out)
    assert "its mask would replace the input" in capsys.readouterr().err


def test_a_link_in_the_folder_is_not_written_through(run: Run, tmp_path: Path) -> None:
    photo = image_file(tmp_path / "photo.png")
    out = run(photo)
    mine = tmp_path / "mine.png"
    (out / "photo.png").rename(mine)
    content = mine.read_bytes()
    (out / "photo.png").symlink_to(mine)
    run(photo, "--weights", "net")
    assert mine.read_bytes() == content
    assert not (out / "photo.png").is_symlink()


def test_bad_flags(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = image_file(tmp_path / "in" / "photo.png")

    def error(*arguments: object, **options: Path) -> str:
        run(*arguments, status=2, **options)
        captured = capsys.readouterr()
        assert captured.err.startswith("fastema: error: ") and captured.err.count("\n") == 1
        return captured.err

    (tmp_path / "empty").mkdir()
    assert f"no images in {tmp_path / 'empty'}" in error(tmp_path / "empty")
    assert "--threshold must be a probability between 0 and 1, got 1" in error(photo, "--threshold", 1)
    assert f"--out {photo} is a file, not a folder" in error(photo, out=photo)
    assert "Not a directory" in error(photo, out=photo / "below")
    assert names(tmp_path) == ["empty", "in"], "nothing is written before everything is known to be right"


def test_without_an_ema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = image_file(tmp_path / "photo.png")
    save_checkpoint(tmp_path / "base.pth", net=random_net(0), options=OPTIONS)
    command = ["predict", str(tmp_path / "base.pth"), str(photo), "--out", str(tmp_path / "masks"), "--device", "cpu"]
    assert cli.main([*command, "--weights", "ema"]) == 2
    assert "base.pth has no ema_net: it was trained without --use-ema" in capsys.readouterr().err
    assert cli.main(command) == 0
    np.testing.assert_allclose(mask_of(tmp_path / "masks" / "photo.png"), probability(0, photo) * 255, atol=0.51)


def test_a_folder_that_cannot_be_written_to(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a full disk: root, under whom containers run tests, may write everywhere."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    photo = image_file(tmp_path / "photo.png")
    monkeypatch.setattr(Image.Image, "save", full)
    out = run(photo, status=2)
    assert f"cannot write {out / 'photo.png'}: No space left on device" in capsys.readouterr().err
    assert names(out) == []


@pytest.mark.skipif(
    importlib.util.find_spec("py_sod_metrics") is None, reason="pysodmetrics, the oracle, is not installed"
)
def test_the_files_measured_by_pysodmetrics_give_what_evaluate_says(
    run: Run, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import py_sod_metrics

    data, record = tmp_path / "data", tmp_path / "record.json"
    write_pairs(data / "Test", 4)
    out = run(data / "Test" / "Image")
    command = ["evaluate", str(checkpoint), "--dataset-path", str(data), "--json", str(record), "--device", "cpu"]
    assert cli.main([*command, "--batch-size", "1"]) == 0  # as predict: batches round differently

    mae, s, e, w = (
        py_sod_metrics.MAE(),
        py_sod_metrics.Smeasure(),
        py_sod_metrics.Emeasure(),
        py_sod_metrics.WeightedFmeasure(),
    )
    handlers = {"iou": py_sod_metrics.IOUHandler, "dice": py_sod_metrics.DICEHandler}
    overlap = py_sod_metrics.FmeasureV2(
        {name: handler(with_dynamic=False, with_adaptive=False, with_binary=True) for name, handler in handlers.items()}
    )
    for file in sorted((data / "Test" / "GT_Object").iterdir()):
        with Image.open(file) as image:
            truth = np.array(image)
        grey = mask_of(out / file.name)
        for measure in (mae, s, e, w):
            measure.step(grey, truth)
        # Not stretched: 128 and above is foreground.
        overlap.step(np.where(grey >= 128, 1.0, 0.0), truth > 128, normalize=False)
    expected = {
        "mae": mae.get_results()["mae"],
        "s_measure": s.get_results()["sm"],
        "mean_e": e.get_results()["em"]["curve"].mean(),
        "weighted_f": w.get_results()["wfm"],
        **{name: values["binary"] for name, values in overlap.get_results().items()},
    }
    means = next(each["means"] for each in json.loads(record.read_text())["weights"] if each["name"] == "ema_net")
    assert means == pytest.approx(expected, abs=1e-9)


def test_the_mask_has_the_size_and_the_turn_that_viewers_show(run: Run, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels))).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "upright.png")
    out = run(tmp_path / "turned.png", tmp_path / "upright.png")
    assert (mask_of(out / "turned.png") == mask_of(out / "upright.png")).all()


def test_images_of_16_bits_are_read_with_the_white_that_was_trained_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.pth"
    save_checkpoint(path, net=random_net(0), options=OPTIONS, whites=[4095, 0])
    pixels = np.random.default_rng(0).integers(0, 1000, (40, 56))
    images = {"dark": pixels.astype(np.uint16), "same": np.rint(pixels * (255 / 4095)).astype(np.uint8)}
    for name, each in images.items():
        Image.fromarray(each).save(tmp_path / f"{name}.png")
    Image.fromarray((pixels * 50).astype(np.uint16)).save(tmp_path / "bright.png")
    given = ["predict", str(path), *(str(tmp_path / f"{name}.png") for name in ("dark", "same", "bright"))]
    assert cli.main([*given, "--out", str(tmp_path / "masks"), "--device", "cpu"]) == 2
    assert "bright.png (values up to 49950, but those of the images trained on end at 4095)" in capsys.readouterr().err
    assert (mask_of(tmp_path / "masks" / "dark.png") == mask_of(tmp_path / "masks" / "same.png")).all()
