"""Masks as people have them: read for what they hold, or refused with what to pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastema.segmentation.train_extra import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

import numpy as np
import torch
from PIL import Image, ImageFilter

from fastema.errors import UserError
from fastema.segmentation.asked import parse_asked
from fastema.segmentation.data.images import ignored_of, read_mask, read_pair, verify_pairs
from fastema.segmentation.data.listing import Listing, list_pairs
from fastema.segmentation.data.loaders import Draw, TrainingSet, ValidationSet, validation_loader
from fastema.segmentation.data.masks import MaskValuesError
from fastema.segmentation.eval.scores import Scores, score
from fastema.segmentation.train.losses import structure_loss

DISTANCE = np.hypot(*(np.mgrid[:64, :64] - 32))
LEFT = np.mgrid[:64, :64][1] < 32
DISK = DISTANCE < 12
RING = (DISTANCE >= 12) & (DISTANCE < 15)
HALVES = np.where(DISK, np.where(LEFT, 1, 2), 0)


def voc_palette() -> list[int]:
    """Return PASCAL VOC's colours: the bits of an index, from the lowest, are the high bits of red, green, blue."""
    colours = []
    for index in range(256):
        rgb = [0, 0, 0]
        for place in range(8):
            for channel in range(3):
                rgb[channel] |= (index >> (3 * place + channel) & 1) << (7 - place)
        colours += rgb
    return colours


def palette(indices: np.ndarray, colours: list[int] | None = None) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), "L")
    image.putpalette(voc_palette() if colours is None else colours)
    return image


def grey(values: np.ndarray, kind: type | str = np.uint8) -> Image.Image:
    return Image.fromarray(np.asarray(values).astype(kind))


def coloured(numbers: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    return Image.fromarray(np.array(colours, np.uint8)[numbers])


def cut_out(colour: np.ndarray) -> Image.Image:
    return Image.fromarray(np.concatenate([colour, (DISK * 255).astype(np.uint8)[..., None]], -1))


def blurred(kind: Callable[[Image.Image], Image.Image] = lambda image: image) -> Image.Image:
    return kind(grey(DISK * 255).filter(ImageFilter.GaussianBlur(1)))


def instances(count: int) -> np.ndarray:
    """Return `count` numbered tiles on a background of 0."""
    side = 16 * int(np.ceil(np.sqrt(count)))
    y, x = np.mgrid[:side, :side]
    numbers = y // 16 * (side // 16) + x // 16 + 1
    return np.where((y % 16 < 12) & (x % 16 < 12) & (numbers <= count), numbers, 0)


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
READ = {
    "1 bit": (Image.fromarray(DISK), DISK),
    "0/1": (grey(DISK), DISK),
    "0/255": (grey(DISK * 255), DISK),
    "one class, 7": (grey(DISK * 7), DISK),
    "one grey, 128": (grey(DISK * 128), DISK),
    "classes 1 and 2": (grey(HALVES), DISK),
    "greys of red and green": (grey(np.where(DISK, np.where(LEFT, 76, 150), 0)), DISK),
    "0/1 in 16 bits": (grey(DISK, np.uint16), DISK),
    "0/256": (grey(DISK * 256, np.uint16), DISK),
    "0/65535": (grey(DISK * 65535, np.uint16), DISK),
    "classes in 32 bits": (grey(HALVES * 1000, np.int32), DISK),
    "soft edge": (blurred(), DISTANCE < 11.8),
    "soft edge in 16 bits": (grey(np.array(blurred()).astype(int) * 257, np.uint16), DISTANCE < 11.8),
    "3 and 250": (grey(np.where(DISK, 250, 3)), DISK),
    "grey in RGB": (grey(DISK * 255).convert("RGB"), DISK),
    "opaque": (grey(DISK * 255).convert("RGBA"), DISK),
    "VOC": (palette(np.where(DISK, 15, 0)), DISK),
    "VOC, two classes": (palette(HALVES * 7), DISK),
    "DAVIS, six objects": (palette(instances(6)), instances(6) > 0),
    "palette of black and white, turned round": (palette(~DISK, [255, 255, 255, 0, 0, 0]), DISK),
    "red and green": (coloured(HALVES, (0, 0, 0), (255, 0, 0), (0, 255, 0)), DISK),
    "black and red": (coloured(DISK * 1, (0, 0, 0), (200, 0, 0)), DISK),
    "alpha, white": (cut_out(np.full((64, 64, 3), 255, np.uint8)), DISK),
    "alpha, black": (cut_out(np.zeros((64, 64, 3), np.uint8)), DISK),
    "alpha, red": (cut_out(np.full((64, 64, 3), (255, 0, 0), np.uint8)), DISK),
    "alpha, photo": (cut_out(NOISE), DISK),
    "alpha, grey": (cut_out(np.full((64, 64, 1), 90, np.uint8)), DISK),
    "alpha, grey photo": (cut_out(NOISE[..., :1]), DISK),
    "alpha and white on black": (cut_out((DISK * 255).astype(np.uint8)[..., None].repeat(3, 2)), DISK),
    "float 0/1": (grey(DISK, np.float32), DISK),
    "float 0/255": (grey(DISK * 255, np.float32), DISK),
    "probabilities": (grey(np.where(DISK, 0.9, 0.05), np.float32), DISK),
    "probabilities to 255": (grey(np.where(DISK, 200.5, 12.25), np.float32), DISK),
    **{f"{count} instances": (grey(instances(count)), instances(count) > 0) for count in (3, 100, 130, 240, 255)},
    "300 instances": (grey(instances(300), np.uint16), instances(300) > 0),
}


@pytest.mark.parametrize(("image", "truth"), READ.values(), ids=READ)
def test_objects_are_foreground(tmp_path: Path, image: Image.Image, truth: np.ndarray) -> None:
    path = tmp_path / ("mask.tif" if image.mode == "F" or image.mode == "I" else "mask.png")
    image.save(path)
    assert np.array_equal(read_mask(path), truth.astype(np.int8))


@pytest.mark.parametrize("quality", [60, 95])
def test_the_noise_of_jpeg_is_neither_class_nor_instance(tmp_path: Path, quality: int) -> None:
    grey(DISK * 255).save(tmp_path / "mask.jpg", quality=quality)
    assert (read_mask(tmp_path / "mask.jpg") > 0).tolist() == (DISK.tolist())
    Image.open(tmp_path / "mask.jpg").save(tmp_path / "mask.png")
    assert (read_mask(tmp_path / "mask.png") > 0).tolist() == (DISK.tolist())


IGNORING = {
    "0/1/255": (grey(np.where(RING, 255, DISK)), DISK),
    "0/1/2/255": (grey(np.where(RING, 255, HALVES)), DISK),
    "VOC with its void": (palette(np.where(RING, 255, HALVES * 8)), DISK),
    "VOC in RGB": (palette(np.where(RING, 255, HALVES * 8)).convert("RGB"), DISK),
    "numbers in 16 bits": (grey(np.where(RING, 255, DISK), np.uint16), DISK),
    "numbers as float": (grey(np.where(RING, 255, DISK), np.float32), DISK),
    "-1": (grey(np.where(RING, -1, DISK), np.int32), DISK),
}


@pytest.mark.parametrize(("image", "truth"), IGNORING.values(), ids=IGNORING)
def test_what_is_to_be_ignored_is_neither(tmp_path: Path, image: Image.Image, truth: np.ndarray) -> None:
    path = tmp_path / ("mask.tif" if image.mode in "FI" else "mask.png")
    image.save(path)
    assert np.array_equal(read_mask(path), np.where(RING, -1, truth))


TRIMAP = np.where(DISK, 255, np.where(RING, 128, 0))
REFUSED = {
    "trimap": (grey(TRIMAP), r"the values 0, 128, 255, and 255 may be foreground .* --foreground 128"),
    "no background": (grey(HALVES + 1), r"the values 1, 2, 3, but no 0"),
    "one value": (grey(np.full((8, 8), 7)), r"the values 7, but no 0"),
    "two colours": (coloured(DISK * 1, (68, 1, 84), (253, 231, 37)), r"the colours 440154, fde725, but no black"),
    "white and red": (coloured(DISK * 1, (255, 255, 255), (255, 0, 0)), "no black.* --foreground ff0000"),
    "a palette without black": (palette(DISK, [68, 1, 84, 253, 231, 37]), r"palette indices 0 \(440154\), 1"),
    "a photo": (Image.fromarray(NOISE), "more than 256 colours: a photo"),
    "a mask on transparent ground": (
        cut_out((LEFT[..., None] * 255).repeat(3, 2).astype(np.uint8)),
        "foreground alpha",
    ),
    "dark levels": (grey(NOISE[..., 0] // 4), r"levels of grey from 0 to 63"),
    "logits": (grey(np.where(DISK, 8.5, -7.25), np.float32), "values from -7.25 to 8.5, expected 0 to 1"),
    "NaN": (grey(np.where(DISK, 0.5, np.nan), np.float32), "NaN"),
}


@pytest.mark.parametrize(("image", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_ambiguous_is_refused(tmp_path: Path, image: Image.Image, said: str) -> None:
    path = tmp_path / ("mask.tif" if image.mode == "F" else "mask.png")
    image.save(path)
    with pytest.raises(MaskValuesError, match=said):
        read_mask(path)


def masks_of(root: Path, *masks: Image.Image, suffix: str = ".png") -> Listing:
    for folder in ("Image", "Mask"):
        (root / folder).mkdir(exist_ok=True)
    for index, mask in enumerate(masks):
        Image.fromarray(NOISE + np.uint8(index)).resize(mask.size).save(root / "Image" / f"{index}.jpg")
        mask.save(root / "Mask" / f"{index}{'.tif' if mask.mode == 'F' else suffix}")
    return list_pairs(root)


ASKED = [
    (grey(TRIMAP), "255", None, DISK * 1),
    (grey(TRIMAP), "255", "128", np.where(RING, -1, DISK)),
    (grey(TRIMAP), "128-255", None, DISK | RING),
    (grey(HALVES), "2", None, HALVES == 2),
    (grey(np.where(RING, 255, HALVES)), "2", None, np.where(RING, -1, HALVES == 2)),
    (grey(np.where(RING, 255, HALVES)), None, "none", DISK | RING),
    (grey(np.where(RING, 255, HALVES)), None, "2", np.where(HALVES == 2, -1, RING | (HALVES == 1))),
    (palette(HALVES * 8), "16", None, HALVES == 2),
    (palette(HALVES * 8), "400000", None, HALVES == 1),
    (coloured(DISK * 1, (68, 1, 84), (253, 231, 37)), "#fde725", None, DISK),
    (REFUSED["a mask on transparent ground"][0], "alpha", None, DISK),
    (REFUSED["a mask on transparent ground"][0], "ffffff", None, LEFT),
    (grey(np.where(DISK, 0.4, 0.1), np.float32), "0.3-1", None, DISK),
]


@pytest.mark.parametrize(("image", "foreground", "ignored", "truth"), ASKED)
def test_the_user_says_what_is_meant(
    tmp_path: Path, image: Image.Image, foreground: str | None, ignored: str | None, truth: np.ndarray
) -> None:
    (pair,) = verify_pairs(masks_of(tmp_path, image), asked=parse_asked(foreground, ignored))
    assert np.array_equal(read_pair(pair)[1], truth.astype(np.int8))


@pytest.mark.parametrize(("foreground", "ignored"), [("x", None), ("alpha,1", None), ("1", "x"), ("", None)])
def test_what_cannot_be_meant_is_refused(foreground: str | None, ignored: str | None) -> None:
    with pytest.raises(ValueError, match=r"must be|goes with"):
        parse_asked(foreground, ignored)


@pytest.mark.parametrize(("foreground", "ignored"), [("9", None), (None, "9"), ("ff0000", None)])
def test_what_no_mask_has_is_refused(tmp_path: Path, foreground: str | None, ignored: str | None) -> None:
    with pytest.raises(UserError, match=r"have the values 0, 1, 2, and nothing of what --\w+"):
        verify_pairs(masks_of(tmp_path, grey(HALVES)), asked=parse_asked(foreground, ignored))


# --- a set ------------------------------------------------------------------------------------------------------------


def test_a_set_is_read_as_a_whole(tmp_path: Path) -> None:
    """A mask of which the object is not in the picture has 0 and 255 alone: its 255 is not an object."""
    empty = grey(np.where(RING, 255, 0))
    listing = masks_of(tmp_path, grey(np.where(RING, 255, DISK)), grey(np.where(RING, 255, HALVES)), empty)
    pairs = verify_pairs(listing)
    assert np.array_equal(read_pair(pairs[2])[1], np.where(RING, -1, 0))
    assert listing.masks == ["masks: numbers 1, 2 foreground, 0 not; 255 ignored, in loss and metrics"]
    assert listing.all_black == 1
    assert ignored_of(pairs) == {"numbers": [255]}


def test_files_of_0_1_beside_files_of_0_255(tmp_path: Path) -> None:
    listing = masks_of(tmp_path, grey(DISK), grey(DISK * 255), blurred())
    for pair in verify_pairs(listing)[:2]:
        assert np.array_equal(read_pair(pair)[1], DISK.astype(np.int8))
    (tmp_path / "Mask" / "2.png").unlink()
    (tmp_path / "Image" / "2.jpg").unlink()
    listing = list_pairs(tmp_path)
    assert [np.array_equal(read_pair(pair)[1], DISK) for pair in verify_pairs(listing)] == [True, True]
    assert listing.notes() == []


def test_one_mask_with_a_border_among_many_without_is_unclear(tmp_path: Path) -> None:
    listing = masks_of(tmp_path, grey(np.where(RING, 255, DISK)), *[grey(DISK * 255)] * 2)
    with pytest.raises(UserError, match="255 may be foreground or stand for pixels to ignore"):
        verify_pairs(listing)


def test_an_opaque_mask_among_cut_outs(tmp_path: Path) -> None:
    white = Image.new("RGBA", (64, 64), (255, 255, 255, 255))
    nothing = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    listing = masks_of(tmp_path, READ["alpha, white"][0], white, nothing)
    assert [int(read_pair(pair)[1].sum()) for pair in verify_pairs(listing)] == [DISK.sum(), 64 * 64, 0]
    assert (listing.all_white, listing.all_black) == (1, 1)


def test_palettes_that_differ_are_read_by_colour(tmp_path: Path) -> None:
    one = palette(DISK, [0, 0, 0, 128, 0, 0])
    other = palette(~DISK, [128, 0, 0, 0, 0, 0])
    for pair in verify_pairs(masks_of(tmp_path, one, other)):
        assert np.array_equal(read_pair(pair)[1], DISK.astype(np.int8))


@pytest.mark.parametrize(("value", "said"), [(0, "all black: there is no foreground"), (255, "all white: there is no")])
def test_masks_all_of_one_colour_are_said_loudly(tmp_path: Path, value: int, said: str) -> None:
    listing = masks_of(tmp_path, *[grey(np.full((8, 8), value))] * 2)
    verify_pairs(listing)
    assert said in listing.warnings()[0]


def test_masks_of_nothing_but_ignored_pixels_are_left_out(tmp_path: Path) -> None:
    listing = masks_of(tmp_path, grey(np.where(RING, 255, DISK)), grey(np.full((64, 64), 255)))
    assert [pair.stem for pair in verify_pairs(listing)] == ["0"]
    assert listing.notes()[-1] == "1 mask of nothing but ignored pixels left out: 1.png"
    with pytest.raises(UserError, match="nothing but pixels to ignore"):
        verify_pairs(masks_of(tmp_path, *[grey(np.full((8, 8), 9))] * 2), asked=parse_asked(None, "9"))


def test_a_test_set_is_read_as_the_set_that_was_trained_on(tmp_path: Path) -> None:
    listing = masks_of(tmp_path, grey(np.where(RING, 255, DISK)), *[grey(np.where(RING, 255, 0))] * 3)
    with pytest.raises(UserError, match="may be foreground or stand for"):
        verify_pairs(listing)
    pairs = verify_pairs(listing, ignored={"numbers": [255]})
    assert np.array_equal(read_pair(pairs[1])[1], np.where(RING, -1, 0))


# --- what is ignored does not count -----------------------------------------------------------------------------------


def test_ignored_pixels_count_neither_in_the_loss_nor_in_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 48, 48, generator=generator, requires_grad=True)
    masks = (torch.rand(2, 1, 48, 48, generator=generator) > 0.5).float()
    masks[..., :20] = -1
    structure_loss(logits, masks).backward()
    assert logits.grad is not None
    assert (logits.grad[..., :20] == 0).all() and (logits.grad[..., 20:] != 0).any()
    changed = torch.where(masks < 0, 9.0, logits.detach())
    assert structure_loss(changed, masks) == structure_loss(logits, masks)
    assert float(structure_loss(logits, torch.full_like(masks, -1))) == 0


def test_ignored_pixels_count_in_no_metric() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, known = torch.from_numpy(DISK), torch.from_numpy(~RING)
    logits = torch.randn(64, 64, generator=generator) + truth * 3
    one = score(logits, truth, known)
    other = score(torch.where(known, logits, torch.full_like(logits, 9.0)), truth, known)
    assert one == other != score(logits, truth)
    everything = score(logits, truth, torch.ones(64, 64, dtype=torch.bool))
    for name, with_known, without in zip(Scores._fields, everything, score(logits, truth), strict=True):
        assert with_known == pytest.approx(without, abs=1e-12), name
    perfect = score(torch.where(truth | ~known, 20.0, -20.0), truth, known)
    assert (perfect.iou, perfect.mae) == (1, 0)


def test_samples_say_what_is_ignored(tmp_path: Path) -> None:
    pairs = verify_pairs(masks_of(tmp_path, grey(np.where(RING, 255, DISK)), grey(np.where(DISK, 1, 0))))
    _, mask = TrainingSet(pairs, size=64)[Draw(0, seed=1)]
    assert set(mask.unique().tolist()) == {-1.0, 0.0, 1.0}
    (batch,) = validation_loader(ValidationSet(pairs, size=32), batch_size=2, workers=0)
    assert batch.known[0] is not None and batch.known[1] is None
    assert batch.known[0].tolist() == (~RING).tolist()
    assert batch.masks[0].tolist() == DISK.tolist()
