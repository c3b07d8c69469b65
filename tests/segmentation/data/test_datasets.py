"""Data sets: layouts, errors before training, and the tensors for the network."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from pathlib import Path

import pytest

from fastema.segmentation.train_extra import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

import numpy as np
import torch
from PIL import Image

from fastema.errors import UserError
from fastema.segmentation.data.images import read_mask, read_pair, verify_pairs
from fastema.segmentation.data.listing import hold_out, list_pairs
from fastema.segmentation.data.loaders import (
    Draw,
    EpochSampler,
    TrainingSet,
    ValidationSet,
    mix_seed,
    training_loader,
    validation_loader,
)
from fastema.segmentation.data.synthetic import camouflaged_pair, ensure_dataset
from fastema.segmentation.report.timers import timed_items

NUCLEI = Path(__file__).resolve().parents[3] / ".." / "shared" / "data" / "nuclei-dsb2018"


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
    (folder / images / "Thumbs.db").write_bytes(b"not an image")
    pairs = verify_pairs(list_pairs(tmp_path))
    assert [(pair.image.name, pair.mask.name) for pair in pairs] == [("a.jpg", "a.png"), ("b.jpg", "b.png")]


def test_the_test_split_is_never_trained_on(tmp_path: Path) -> None:
    cod10k(tmp_path, count=2)
    write_pair(tmp_path / "Test" / "Image", tmp_path / "Test" / "GT_Object", "held")
    assert [pair.stem for pair in list_pairs(tmp_path).pairs] == ["im0", "im1"]


def test_the_test_split_is_read_only_when_asked_for(tmp_path: Path) -> None:
    cod10k(tmp_path, count=2)
    write_pair(tmp_path / "Test" / "Image", tmp_path / "Test" / "GT_Object", "held")
    assert [pair.stem for pair in list_pairs(tmp_path, "Test").pairs] == ["held"]


def test_a_test_folder_is_refused_for_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(tmp_path / "Test" / "Image", tmp_path / "Test" / "GT_Object", "held")
    # Without a Train folder beside it, `Test` is just a name.
    assert [pair.stem for pair in list_pairs(tmp_path / "Test").pairs] == ["held"]
    cod10k(tmp_path, count=1)
    with pytest.raises(UserError, match=r"is a test set, for fastema evaluate only; to train, give .*"):
        list_pairs(tmp_path / "Test")
    monkeypatch.chdir(tmp_path / "Test")
    with pytest.raises(UserError, match="is a test set"):
        list_pairs(Path("."))
    assert [pair.stem for pair in list_pairs(tmp_path / "Test", "Test").pairs] == ["held"]


def test_only_a_test_folder_is_nothing_to_train_on(tmp_path: Path) -> None:
    write_pair(tmp_path / "Test" / "Image", tmp_path / "Test" / "GT_Object", "held")
    with pytest.raises(UserError, match=r"expected Train/Image .* has Test/"):
        list_pairs(tmp_path)


def test_what_was_trained_on_is_not_evaluated_in_place_of_a_missing_test_folder(tmp_path: Path) -> None:
    cod10k(tmp_path, count=2)
    with pytest.raises(UserError, match=f"has no Test folder.* give {tmp_path / 'Train'}"):
        list_pairs(tmp_path, "Test")
    assert len(list_pairs(tmp_path / "Train", "Test").pairs) == 2  # asked for in so many words


def test_without_a_train_and_test_level_both_commands_read_the_same(tmp_path: Path) -> None:
    write_pair(tmp_path / "Imgs", tmp_path / "GT", "a")
    assert list_pairs(tmp_path, "Train").pairs == list_pairs(tmp_path, "Test").pairs != []


def test_a_split_that_is_not_understood_is_not_replaced_by_what_lies_beside_it(tmp_path: Path) -> None:
    write_pair(tmp_path / "Image", tmp_path / "Mask", "everything, test images too")
    (tmp_path / "Train" / "Fotos").mkdir(parents=True)
    with pytest.raises(UserError, match=r"Train has Fotos/"):
        list_pairs(tmp_path)


def test_cod10k_without_camouflage_is_left_out_and_counted(tmp_path: Path) -> None:
    images, masks = tmp_path / "Train" / "Image", tmp_path / "Train" / "GT_Object"
    for stem in ("COD10K-CAM-1-Aquatic-1-BatFish-2", "COD10K-NonCAM-5-Other-7", "COD10K-NonCAM-5-Other-8"):
        write_pair(images, masks, stem)
    (images / "COD10K-NonCAM-5-Other-8.jpg").unlink()  # its mask alone is no problem either
    listing = list_pairs(tmp_path)
    assert [pair.stem for pair in verify_pairs(listing)] == ["COD10K-CAM-1-Aquatic-1-BatFish-2"]
    assert listing.notes() == ["1 COD10K-NonCAM image left out"]
    listing = list_pairs(tmp_path, cam_only=False)
    assert [pair.stem[:10] for pair in listing.pairs] == ["COD10K-CAM", "COD10K-Non"]
    assert listing.left_out == 0
    assert listing.problems["mask without an image"]


def test_other_sets_are_untouched_by_cam_only(tmp_path: Path) -> None:
    for stem in ("NonCAM-1", "my-COD10K-NonCAM-1", "noncam"):
        write_pair(tmp_path / "Imgs", tmp_path / "GT", stem)
    assert len(list_pairs(tmp_path).pairs) == 3


def test_nothing_but_images_without_camouflage(tmp_path: Path) -> None:
    write_pair(tmp_path / "Imgs", tmp_path / "GT", "COD10K-NonCAM-1")
    with pytest.raises(UserError, match=r"all 1 images in .*Imgs are COD10K-NonCAM, which --cam-only leaves out"):
        list_pairs(tmp_path)


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


def empty(file: Path) -> None:
    file.write_bytes(b"")


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


def write_a_photo(root: Path) -> None:
    (root / "Train/GT_Object/im0.png").write_bytes((root / "Train/Image/im0.jpg").read_bytes())


def two_images(root: Path) -> None:
    Image.new("RGB", (40, 30)).save(root / "Train/Image/im0.png")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda root: (root / "Train/GT_Object/im0.png").unlink(), r"1 image without a mask: im0\.jpg"),
        (lambda root: (root / "Train/Image/im0.jpg").unlink(), r"1 mask without an image: im0\.png"),
        (break_image, r"1 image that cannot be read: im0\.jpg \(image file is truncated"),
        (replace_mask_with_text, r"1 mask that cannot be read: im0\.png \(not an image\)"),
        (lambda root: empty(root / "Train/Image/im0.jpg"), r"1 image that cannot be read: im0\.jpg \(0 bytes\)"),
        (lambda root: empty(root / "Train/GT_Object/im0.png"), r"1 mask that cannot be read: im0\.png \(0 bytes\)"),
        (truncate_mask, r"1 mask that cannot be read: im0\.png"),
        (resize_mask, r"1 mask of another size than the image: im0\.png \(image 40x30, mask 41x30\)"),
        (write_a_photo, r"1 mask of unclear values: im0\.png \(more than 256 colours: a photo"),
        (two_images, r"1 stem with several images or masks: im0\.jpg, im0\.png"),
    ],
    ids=[
        "no mask",
        "no image",
        "broken image",
        "text",
        "empty image",
        "empty mask",
        "broken mask",
        "size",
        "photo",
        "several",
    ],
)
def test_each_kind_of_problem_is_named(tmp_path: Path, harm, said: str) -> None:
    cod10k(tmp_path, count=3)
    harm(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        verify_pairs(list_pairs(tmp_path))
    assert str(caught.value).startswith(f"1 problem in {tmp_path / 'Train'}; nothing was started")


def test_many_problems_are_counted_and_the_first_few_listed(tmp_path: Path) -> None:
    cod10k(tmp_path, count=9)
    for index in range(7):
        (tmp_path / f"Train/GT_Object/im{index}.png").unlink()
    replacement = tmp_path / "Train/GT_Object/im8.png"
    replacement.write_text("text")
    with pytest.raises(UserError) as caught:
        verify_pairs(list_pairs(tmp_path))
    message = str(caught.value)
    assert message.startswith("8 problems in")
    assert "7 images without a mask" in message
    assert "im2.jpg" in message
    assert "im5.jpg" not in message
    assert "and 4 more" in message
    assert "1 mask that cannot be read: im8.png" in message


def test_one_broken_file_among_many_is_found(tmp_path: Path) -> None:
    cod10k(tmp_path, count=300)
    file = tmp_path / "Train/Image/im217.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"1 image that cannot be read: im217\.jpg") as caught:
        verify_pairs(list_pairs(tmp_path))
    assert len(str(caught.value).splitlines()) == 2


def test_what_is_no_problem_is_counted(tmp_path: Path) -> None:
    cod10k(tmp_path, count=5)
    for index in (1, 3):
        Image.new("L", (40, 30)).save(tmp_path / f"Train/GT_Object/im{index}.png")
    (tmp_path / "Train/Image/im4.jpg").write_bytes((tmp_path / "Train/Image/im2.jpg").read_bytes())
    listing = list_pairs(tmp_path)
    assert listing.notes() == []
    ticks: list[int] = []
    for _ in range(2):  # counted anew, not on top
        assert len(verify_pairs(listing, advance=lambda: ticks.append(1))) == 5
        assert listing.notes() == [
            "2 all-black masks (IoU 1 for an empty prediction, else 0)",
            "1 image is there under several names: im2.jpg = im4.jpg",
        ]
    assert len(ticks) == 10


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
    assert len(verify_pairs(list_pairs(NUCLEI, "Train"))) == 528
    assert len(verify_pairs(list_pairs(NUCLEI, "Test"))) == 136


# --- split ------------------------------------------------------------------------------------------------------------


def test_the_split_is_by_hash_of_the_stem(tmp_path: Path) -> None:
    pairs = list_pairs(cod10k(tmp_path, count=60)).pairs
    training, validation = hold_out(pairs, 0.2)
    assert sorted(pair.stem for pair in training + validation) == sorted(pair.stem for pair in pairs)
    assert 4 <= len(validation) <= 22
    assert validation != pairs[: len(validation)]
    # An image stays held out when others are added.
    fewer_training, fewer_validation = hold_out(pairs[:30], 0.2)
    assert set(fewer_validation) <= set(validation)
    assert set(fewer_training) <= set(training)


def test_the_split_leaves_something_on_both_sides(tmp_path: Path) -> None:
    pairs = list_pairs(cod10k(tmp_path, count=3)).pairs
    assert [len(part) for part in hold_out(pairs, 0.0001)] == [2, 1]
    assert [len(part) for part in hold_out(pairs, 0.9999)] == [1, 2]
    with pytest.raises(UserError, match="not enough"):
        hold_out(pairs[:1], 0.1)


@pytest.mark.parametrize(("count", "least"), [(2, 1), (3, 1), (4, 2), (12, 2), (30, 3), (31, 4), (60, 6)])
def test_a_small_set_holds_out_its_share_all_the_same(tmp_path: Path, count: int, least: int) -> None:
    pairs = list_pairs(cod10k(tmp_path, count=count)).pairs
    assert least <= len(hold_out(pairs, 0.1)[1]) < count


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
    assert mix_seed(1, 2) != mix_seed(2, 1)
    assert mix_seed(1, 23) != mix_seed(12, 3)
    assert 0 <= mix_seed(0) < 2**63


# --- files that go while a run is on, workers that die ---------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("training", [True, False], ids=["training", "validation"])
def test_a_file_that_went_is_named_in_one_line(tmp_path: Path, workers: int, training: bool) -> None:
    pairs = verify_pairs(list_pairs(cod10k(tmp_path)))
    loader = (
        training_loader(TrainingSet(pairs, 32), EpochSampler(6, seed=0), 4, workers)
        if training
        else validation_loader(ValidationSet(pairs, 32), 4, workers)
    )
    others = set(multiprocessing.active_children())
    assert len(list(loader)) == len(loader) == 2
    assert len(set(multiprocessing.active_children()) - others) == workers
    pairs[3].image.unlink()
    with pytest.raises(UserError) as caught:
        list(loader)
    assert str(caught.value) == (
        f"{pairs[3].image} cannot be read (No such file or directory): was it moved or changed during the run?"
    )
    # No worker is left that would delay the end of the program.
    assert not set(multiprocessing.active_children()) - others


def test_a_pair_that_was_changed_is_named(tmp_path: Path) -> None:
    (pair,) = list_pairs(cod10k(tmp_path, count=1)).pairs
    Image.new("L", (41, 30)).save(pair.mask)
    with pytest.raises(UserError, match=r"im0\.png is 41x30, its image is 40x30: was one of them changed"):
        read_pair(pair)
    pair.mask.write_text("text")
    with pytest.raises(UserError, match=r"im0\.png cannot be read \(not an image\)") as caught:
        read_pair(pair)
    # It has to come out of a worker process, and be the same there.
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (UserError, str(caught.value))


class Deadly:
    """A data set whose worker is killed, as when memory runs out."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
def test_a_worker_that_dies_is_one_line() -> None:
    with pytest.raises(UserError, match=r"a process that reads images died \(.*lower --num-workers"):
        list(validation_loader(Deadly(), 2, workers=1))  # type: ignore[arg-type]


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    dataset = TrainingSet(list_pairs(cod10k(tmp_path)).pairs, size=32)
    dataset.pairs.clear()
    with pytest.raises(IndexError):
        list(training_loader(dataset, EpochSampler(6, seed=0), 4, workers=0))


def test_iterating_does_not_touch_the_global_generator(tmp_path: Path) -> None:
    pairs = list_pairs(cod10k(tmp_path)).pairs
    before = torch.get_rng_state()
    list(validation_loader(ValidationSet(pairs, 32), 4, 0))
    list(training_loader(TrainingSet(pairs, 32), EpochSampler(6, seed=0), 4, 0))
    assert torch.equal(torch.get_rng_state(), before)


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [20, 21, 5])
def test_the_shares_of_an_epoch_are_the_whole_epoch_once(count: int, world_size: int) -> None:
    def epoch_of(rank: int, world_size: int) -> list[Draw]:
        sampler = EpochSampler(count, 3, rank, world_size)
        sampler.epoch = 4
        assert len(sampler) == len(list(sampler))
        return list(sampler)

    alone = epoch_of(0, 1)
    shares = [epoch_of(rank, world_size) for rank in range(world_size)]
    assert sorted(draw.image for share in shares for draw in share) == list(range(count))
    # The same order and the same augmentation as one process has, dealt like cards.
    assert [shares[position % world_size][position // world_size] for position in range(count)] == alone
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_validation_images_are_shared_out_once(tmp_path: Path) -> None:
    pairs = list_pairs(cod10k(tmp_path, count=5)).pairs
    shares = [pairs[rank::3] for rank in range(3)]
    assert sorted(pair.stem for share in shares for pair in share) == [pair.stem for pair in pairs]
    batches = [list(validation_loader(ValidationSet(share, 32), 8, 0)) for share in shares]
    assert [sum(len(batch.masks) for batch in share) for share in batches] == [2, 2, 1]


def test_a_process_without_a_share_has_an_empty_loader(tmp_path: Path) -> None:
    pairs = list_pairs(cod10k(tmp_path, count=1)).pairs
    assert list(validation_loader(ValidationSet(pairs[1::2], 32), 8, 0)) == []
    assert list(training_loader(TrainingSet(pairs, 32), EpochSampler(1, 0, rank=1, world_size=2), 8, 0)) == []


# --- waiting for data -------------------------------------------------------------------------------------------------


def test_only_the_time_inside_the_loader_is_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastema.segmentation.report import timers as module

    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def slow():
        for seconds in (3.0, 1.0):
            now[0] += seconds
            yield seconds
        now[0] += 0.5  # the end is waited for as well

    waited: list[float] = []
    for _ in timed_items(slow(), waited):
        now[0] += 100.0
    assert sum(waited) == 4.5


def test_waiting_adds_up_over_passes_and_lets_errors_through(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastema.segmentation.report import timers as module

    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    class Loader:
        def __iter__(self):
            now[0] += 1.0  # starting the workers
            yield 1
            now[0] += 2.0
            raise UserError("a file went")

    waited: list[float] = []
    for _ in range(2):
        with pytest.raises(UserError, match="a file went"):
            list(timed_items(Loader(), waited))
    assert sum(waited) == 6.0


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
    """Return the area under the ROC of a threshold on brightness: 0.5 finds nothing, 1 the whole object."""
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
    pairs = verify_pairs(list_pairs(folder))
    assert len(pairs) == 5
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in folder.rglob("*.*")}
    assert ensure_dataset(tmp_path, seed=1, count=5, size=48) == folder
    assert {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in folder.rglob("*.*")} == before
    assert ensure_dataset(tmp_path, seed=2, count=5, size=48) != folder


def test_the_generated_data_set_has_a_test_part_of_its_own(tmp_path: Path) -> None:
    folder = ensure_dataset(tmp_path, seed=1, count=8, size=48)
    training, test = (verify_pairs(list_pairs(folder, split)) for split in ("Train", "Test"))
    assert (len(training), len(test)) == (8, 2)
    assert not {pair.image.read_bytes() for pair in training} & {pair.image.read_bytes() for pair in test}
    assert not {pair.stem for pair in training} & {pair.stem for pair in test}


def test_two_processes_may_generate_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def beaten(self: Path, target: Path) -> None:
        (target / "Train").mkdir(parents=True)
        raise OSError("the folder is not empty")

    monkeypatch.setattr(Path, "rename", beaten)
    folder = ensure_dataset(tmp_path, seed=1, count=2, size=48)
    assert [file.name for file in tmp_path.iterdir()] == [folder.name]


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
