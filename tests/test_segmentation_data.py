"""What a data set may look like, what is refused before training, and what reaches the network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastema.segmentation.extras import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

import numpy as np
import torch
from PIL import Image

from fastema.segmentation.datasets import (
    Draw,
    EpochSampler,
    TrainingSet,
    ValidationSet,
    seed_of,
    training_loader,
    validation_loader,
)
from fastema.segmentation.errors import UserError
from fastema.segmentation.layout import list_pairs
from fastema.segmentation.reading import read_mask
from fastema.segmentation.split import hold_out
from fastema.segmentation.synthetic import camouflaged_pair, ensure_dataset
from fastema.segmentation.verification import verified_pairs

NUCLEI = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "nuclei-dsb2018"


def write_pair(images: Path, masks: Path, stem: str, size: tuple[int, int] = (40, 30)) -> None:
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(stem.encode()))
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(images / f"{stem}.jpg")
    mask = np.zeros((size[1], size[0]), dtype=np.uint8)
    mask[5:20, 8:25] = 255
    Image.fromarray(mask).save(masks / f"{stem}.png")


def cod10k(root: Path, count: int = 6) -> Path:
    for index in range(count):
        write_pair(root / "Train" / "Image", root / "Train" / "GT_Object", f"im{index}")
    return root


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["Train", "", "train"])
@pytest.mark.parametrize(("images", "masks"), [("Image", "GT_Object"), ("Imgs", "GT"), ("Image", "Mask")])
def test_layouts(tmp_path: Path, level: str, images: str, masks: str) -> None:
    folder = tmp_path / level if level else tmp_path
    write_pair(folder / images, folder / masks, "b")
    write_pair(folder / images, folder / masks, "a")
    (folder / images / "Thumbs.db").write_bytes(b"not an image, and nobody's business")
    pairs = verified_pairs(list_pairs(tmp_path))
    assert [(pair.image.name, pair.mask.name) for pair in pairs] == [("a.jpg", "a.png"), ("b.jpg", "b.png")]


def test_the_test_split_is_never_trained_on(tmp_path: Path) -> None:
    cod10k(tmp_path, count=2)
    write_pair(tmp_path / "Test" / "Image", tmp_path / "Test" / "GT_Object", "held")
    assert [pair.stem for pair in list_pairs(tmp_path).pairs] == ["im0", "im1"]


def test_a_folder_that_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data set at .*gone: it is missing"):
        list_pairs(tmp_path / "gone")
    (tmp_path / "Pictures").mkdir()
    with pytest.raises(UserError, match=r"expected Train/Image \+ Train/GT_Object or .*has Pictures/"):
        list_pairs(tmp_path)


def test_no_images(tmp_path: Path) -> None:
    cod10k(tmp_path, count=1)
    (tmp_path / "Train" / "Image" / "im0.jpg").unlink()
    with pytest.raises(UserError, match=r"no images in .*Train/Image"):
        list_pairs(tmp_path)


# --- verification -----------------------------------------------------------------------------------------------------


def break_image(root: Path) -> None:
    file = root / "Train/Image/im0.jpg"
    file.write_bytes(file.read_bytes()[:-200])


def replace_mask_with_text(root: Path) -> None:
    (root / "Train/GT_Object/im0.png").write_text("this is not a picture")


def truncate_mask(root: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (300, 400), dtype=np.uint8) * 255).save(
        root / "Train/GT_Object/im0.png"
    )
    file = root / "Train/GT_Object/im0.png"
    file.write_bytes(file.read_bytes()[:-5000])


def resize_mask(root: Path) -> None:
    Image.new("L", (41, 30)).save(root / "Train/GT_Object/im0.png")


def number_classes(root: Path) -> None:
    Image.new("L", (40, 30), 7).save(root / "Train/GT_Object/im0.png")


def two_images(root: Path) -> None:
    Image.new("RGB", (40, 30)).save(root / "Train/Image/im0.png")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda root: (root / "Train/GT_Object/im0.png").unlink(), r"1 images without a mask: im0\.jpg"),
        (lambda root: (root / "Train/Image/im0.jpg").unlink(), r"1 masks without an image: im0\.png"),
        (break_image, r"1 images that cannot be read: im0\.jpg \(image file is truncated"),
        (replace_mask_with_text, r"1 masks that are not an image: im0\.png \(not an image\)"),
        (truncate_mask, r"1 masks that are not an image: im0\.png"),
        (resize_mask, r"1 masks of another size than their image: im0\.png \(image 40x30, mask 41x30\)"),
        (number_classes, r"1 masks that are not black and white: im0\.png \(values up to 7"),
        (two_images, r"1 stems with several images or masks: im0\.jpg, im0\.png"),
    ],
    ids=["no mask", "no image", "broken image", "text", "broken mask", "size", "classes", "several"],
)
def test_each_kind_of_problem_is_named(tmp_path: Path, harm, said: str) -> None:
    cod10k(tmp_path, count=3)
    harm(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        verified_pairs(list_pairs(tmp_path))
    assert str(caught.value).startswith(f"1 problems in {tmp_path / 'Train'}; nothing was trained")


def test_many_problems_are_counted_and_the_first_few_listed(tmp_path: Path) -> None:
    cod10k(tmp_path, count=9)
    for index in range(7):
        (tmp_path / f"Train/GT_Object/im{index}.png").unlink()
    replacement = tmp_path / "Train/GT_Object/im8.png"
    replacement.write_text("text")
    with pytest.raises(UserError) as caught:
        verified_pairs(list_pairs(tmp_path))
    message = str(caught.value)
    assert message.startswith("8 problems in")
    assert "7 images without a mask" in message
    assert "im2.jpg" in message
    assert "im5.jpg" not in message
    assert "and 4 more" in message
    assert "1 masks that are not an image: im8.png" in message


def test_mask_values(tmp_path: Path) -> None:
    for name, values, expected in [
        ("0/255", [0, 255], [0, 1]),
        ("0/1", [0, 1], [0, 1]),
        ("nearly 0/255", [3, 250], [0, 1]),
        ("all black", [0, 0], [0, 0]),
        ("all white", [255, 255], [1, 1]),
    ]:
        Image.fromarray(np.array([values], dtype=np.uint8)).save(tmp_path / "mask.png")
        assert read_mask(tmp_path / "mask.png").tolist() == [expected], name


@pytest.mark.skipif(not NUCLEI.is_dir(), reason="../shared/data/nuclei-dsb2018 is not here")
def test_the_real_data_set_is_fine() -> None:
    assert len(verified_pairs(list_pairs(NUCLEI, "Train"))) == 528
    assert len(verified_pairs(list_pairs(NUCLEI, "Test"))) == 136


# --- split ------------------------------------------------------------------------------------------------------------


def test_the_split_is_by_hash_of_the_stem(tmp_path: Path) -> None:
    pairs = list_pairs(cod10k(tmp_path, count=60)).pairs
    training, validation = hold_out(pairs, 0.2)
    assert sorted(pair.stem for pair in training + validation) == sorted(pair.stem for pair in pairs)
    assert 4 <= len(validation) <= 22
    assert validation != pairs[: len(validation)]
    # Whoever is held out stays held out, whatever else is in the folder and wherever that folder is.
    fewer_training, fewer_validation = hold_out(pairs[:30], 0.2)
    assert set(fewer_validation) <= set(validation)
    assert set(fewer_training) <= set(training)


def test_the_split_leaves_something_on_both_sides(tmp_path: Path) -> None:
    pairs = list_pairs(cod10k(tmp_path, count=3)).pairs
    assert [len(part) for part in hold_out(pairs, 0.0001)] == [2, 1]
    assert [len(part) for part in hold_out(pairs, 0.9999)] == [1, 2]
    with pytest.raises(UserError, match="not enough"):
        hold_out(pairs[:1], 0.1)


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_training_samples(tmp_path: Path) -> None:
    dataset = TrainingSet(list_pairs(cod10k(tmp_path)).pairs, size=32)
    image, mask = dataset[Draw(0, seed=1)]
    assert (image.shape, image.dtype, mask.shape, mask.dtype) == (
        (3, 32, 32),
        torch.float32,
        (1, 32, 32),
        torch.float32,
    )
    assert 0 <= float(image.min()) <= float(image.max()) <= 1
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert type(image) is torch.Tensor
    again, _ = dataset[Draw(0, seed=1)]
    other, _ = dataset[Draw(0, seed=2)]
    assert torch.equal(image, again)
    assert not torch.equal(image, other)


def test_augmentation_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    dataset = TrainingSet(list_pairs(cod10k(tmp_path, count=1)).pairs, size=32)
    before = torch.get_rng_state()
    dataset[Draw(0, seed=1)]
    assert torch.equal(torch.get_rng_state(), before)


def test_image_and_mask_are_cut_alike(tmp_path: Path) -> None:
    """A white square on black, which is its own mask, still is after the augmentation."""
    for folder, mode in (("Image", "RGB"), ("GT_Object", "L")):
        (tmp_path / folder).mkdir()
        picture = Image.new(mode, (64, 64))
        picture.paste(Image.new(mode, (25, 20), "white"), (8, 30))
        picture.save(tmp_path / folder / "square.png")
    dataset = TrainingSet(list_pairs(tmp_path).pairs, size=64)
    agreements = []
    for seed in range(20):
        image, mask = dataset[Draw(0, seed)]
        bright = image.mean(0) > image.max() / 2
        agreements.append(float((bright == mask[0].bool()).float().mean()))
    assert min(agreements) > 0.95


def test_validation_keeps_the_masks_as_they_are(tmp_path: Path) -> None:
    write_pair(tmp_path / "Image", tmp_path / "Mask", "a", size=(40, 30))
    write_pair(tmp_path / "Image", tmp_path / "Mask", "b", size=(50, 60))
    (batch,) = validation_loader(ValidationSet(list_pairs(tmp_path).pairs, size=32), batch_size=2, workers=0)
    assert batch.images.shape == (2, 3, 32, 32)
    assert [mask.shape for mask in batch.masks] == [(30, 40), (60, 50)]
    assert batch.masks[0].dtype == torch.bool
    assert int(batch.masks[0].sum()) == 15 * 17


def test_every_epoch_has_its_own_order_and_the_same_one_again() -> None:
    sampler = EpochSampler(20, seed=3)
    first = list(sampler)
    sampler.epoch = 2
    second = list(sampler)
    sampler.epoch = 1
    assert list(sampler) == first
    assert sorted(draw.image for draw in second) == list(range(20))
    assert [draw.image for draw in first] != [draw.image for draw in second]
    assert not {draw.seed for draw in first} & {draw.seed for draw in second}


def test_workers_do_not_change_the_batches(tmp_path: Path) -> None:
    dataset = TrainingSet(list_pairs(cod10k(tmp_path)).pairs, size=32)
    batches = [
        [image for image, _ in training_loader(dataset, EpochSampler(len(dataset), seed=0), 4, workers)]
        for workers in (0, 2)
    ]
    assert [batch.shape[0] for batch in batches[0]] == [4, 2]
    for alone, with_workers in zip(*batches, strict=True):
        assert torch.equal(alone, with_workers)


def test_seeds_depend_on_the_order_of_their_parts() -> None:
    assert seed_of(1, 2) != seed_of(2, 1)
    assert seed_of(1, 23) != seed_of(12, 3)
    assert 0 <= seed_of(0) < 2**63


# --- the generated data set -------------------------------------------------------------------------------------------


def test_generated_images_are_deterministic() -> None:
    image, mask = camouflaged_pair(np.random.default_rng([5, 1]), 64)
    again, mask_again = camouflaged_pair(np.random.default_rng([5, 1]), 64)
    other, _ = camouflaged_pair(np.random.default_rng([6, 1]), 64)
    assert (image == again).all()
    assert (mask == mask_again).all()
    assert (image != other).any()
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert 0.05 < mask.mean() < 0.27


def brightness_separation(image, mask) -> float:
    """How well a threshold on brightness finds the object: 0.5 is not at all, 1 is perfectly (area under the ROC)."""
    values = image.mean(axis=2)
    ranks = np.empty(values.size)
    ranks[np.argsort(values.ravel())] = np.arange(values.size)
    inside = mask.astype(bool).ravel()
    u = ranks[inside].sum() - inside.sum() * (inside.sum() - 1) / 2
    area = u / (inside.sum() * (~inside).sum())
    return max(area, 1 - area)


def test_first_order_statistics_do_not_give_the_object_away() -> None:
    separations, contrasts = [], []
    for index in range(40):
        image, mask = camouflaged_pair(np.random.default_rng([0, index]), 96)
        separations.append(brightness_separation(image, mask))
        inside = mask.astype(bool)
        contrasts.append(image[inside].std() / image[~inside].std())
    assert np.mean(separations) < 0.56  # painted over with another shade, it would be near 1
    assert 0.9 < np.mean(contrasts) < 1.1


def test_the_texture_does_give_the_object_away() -> None:
    """Camouflaged, not invisible: the dominant direction of the gradient differs inside and outside."""
    differences = []
    for index in range(20):
        image, mask = camouflaged_pair(np.random.default_rng([0, index]), 96)
        gradient_y, gradient_x = np.gradient(image.mean(axis=2))
        doubled = (gradient_x + 1j * gradient_y) ** 2
        inside = mask.astype(bool)
        turn = np.angle(doubled[inside].sum() / doubled[~inside].sum()) / 2
        differences.append(abs(np.degrees(turn)))
    assert np.median(differences) > 30


def test_the_generated_data_set_is_made_once(tmp_path: Path) -> None:
    folder = ensure_dataset(tmp_path, seed=1, count=5, size=48)
    pairs = verified_pairs(list_pairs(folder))
    assert len(pairs) == 5
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in folder.rglob("*.*")}
    assert ensure_dataset(tmp_path, seed=1, count=5, size=48) == folder
    assert {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in folder.rglob("*.*")} == before
    assert ensure_dataset(tmp_path, seed=2, count=5, size=48) != folder


def test_an_interrupted_generation_leaves_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []

    def interrupted(self, path, **arguments) -> None:
        saved.append(path)
        if len(saved) == 5:
            raise KeyboardInterrupt
        original(self, path, **arguments)

    original = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_dataset(tmp_path, seed=1, count=5, size=48)
    assert os.listdir(tmp_path) == []
