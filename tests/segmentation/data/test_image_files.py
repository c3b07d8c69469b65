"""Images as people have them: turned by EXIF, of more than 8 bits, of several pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastema.segmentation.train_extra import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

import numpy as np
from PIL import Image, ImageOps

from fastema.errors import UserError
from fastema.segmentation.data.image_files import Whites
from fastema.segmentation.data.images import read_image, read_mask, read_pair, verify_pairs
from fastema.segmentation.data.listing import list_pairs

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
# How viewers show what is stored, turned back: EXIF 2.32, tag 0x0112.
STORED = {
    1: lambda shown: shown,
    2: np.fliplr,
    3: lambda shown: np.rot90(shown, 2),
    4: np.flipud,
    5: lambda shown: shown.swapaxes(0, 1),
    6: lambda shown: np.rot90(shown, 1),
    7: lambda shown: np.rot90(shown, 2).swapaxes(0, 1),
    8: lambda shown: np.rot90(shown, -1),
}


def save_turned(shown: np.ndarray, path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](shown))
    Image.fromarray(stored).save(path, exif=exif, **({"quality": 95} if path.suffix == ".jpg" else {}))


@pytest.mark.parametrize("kind", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("size", [(48, 64), (50, 50)], ids=["oblong", "square"])
@pytest.mark.parametrize("of_mask", [False, True], ids=["image", "both"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_and_masks_are_turned_as_viewers_show_them(
    tmp_path: Path, kind: str, size: tuple[int, int], of_mask: bool, orientation: int
) -> None:
    shown = np.full((*size, 3), 40, np.uint8)
    shown[4:16, 4:24] = 250
    truth = (shown[..., 0] > 200).astype(np.uint8) * 255
    for folder in ("Image", "Mask"):
        (tmp_path / folder).mkdir()
    save_turned(shown, tmp_path / "Image" / f"a{kind}", orientation)
    save_turned(truth, tmp_path / "Mask" / "a.png", orientation if of_mask else 1)
    if kind == ".jpg":  # the test's own table is that of Pillow
        with Image.open(tmp_path / "Image" / "a.jpg") as image:
            assert (np.array(ImageOps.exif_transpose(image))[..., 0] > 200).tolist() == (truth > 0).tolist()
    image, mask = read_pair(verify_pairs(list_pairs(tmp_path))[0])
    assert ((image[..., 0] > 150) == (mask > 0)).mean() > 0.99
    assert (mask > 0).tolist() == (truth > 0).tolist()


def test_a_mask_of_the_unturned_photo_is_refused_with_the_sizes_that_viewers_show(tmp_path: Path) -> None:
    for folder in ("Image", "Mask"):
        (tmp_path / folder).mkdir()
    save_turned(np.zeros((48, 64, 3), np.uint8), tmp_path / "Image" / "a.jpg", 6)
    Image.new("L", (48, 64)).save(tmp_path / "Mask" / "a.png")
    with pytest.raises(UserError, match="image 64x48 as EXIF turns it, mask 48x64"):
        verify_pairs(list_pairs(tmp_path))


def test_damaged_exif_is_no_reason_to_refuse_a_photo(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert read_image(tmp_path / "a.jpg").shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("16.png", (RAMP * 65535).astype(np.uint16)),
        ("16.tif", (RAMP * 65535).astype(np.uint16)),
        ("big endian.tif", (RAMP * 65535).astype(">u2")),
        ("12 in 16.png", (RAMP * 4095).astype(np.uint16)),
        ("8 in 16.tif", (RAMP * 255).astype(np.uint16)),
        ("signed.tif", (RAMP * 32767 / 2).astype(np.int16)),
        ("32.tif", (RAMP * 65535).astype(np.int32)),
        ("0 to 1.tif", RAMP.astype(np.float32)),
        ("0 to 255.tif", (RAMP * 255).astype(np.float32)),
        ("overshoot.tif", (RAMP * 1.06 - 0.03).astype(np.float32)),
    ],
)
def test_more_than_8_bits_are_scaled(tmp_path: Path, name: str, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert (image.dtype, image.shape) == (np.uint8, (64, 64, 3))
    assert np.abs(image[..., 0] - 255 * RAMP).max() <= (8 if name == "overshoot.tif" else 1)


def test_16_bits_read_as_the_same_image_in_8_bits(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    pixels[0, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "8.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "16.png")
    assert (read_image(tmp_path / "8.png") == read_image(tmp_path / "16.png")).all()


def microscopy(root: Path, count: int = 4) -> list[np.ndarray]:
    """Write frames of a 12-bit camera in 16 bits: an offset of 100, cells of other brightness in each; return them."""
    rng = np.random.default_rng(0)
    frames = []
    for folder in ("images", "Image", "Mask"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        cell = np.hypot(*(np.mgrid[:40, :56] - 20)) < 12
        frame = rng.poisson(100 + cell * (40 + 1100 * index)).astype(np.uint16)
        Image.fromarray(frame).save(root / "Image" / f"f{index}.tif")
        Image.fromarray(cell.astype(np.uint8) * 255).save(root / "Mask" / f"f{index}.png")
        frames.append(frame)
    return frames


def test_a_set_has_one_white_so_that_bright_frames_stay_brighter_than_dark_ones(tmp_path: Path) -> None:
    frames = microscopy(tmp_path)
    pairs = verify_pairs(list_pairs(tmp_path))
    assert {pair.whites for pair in pairs} == {Whites(4095, 0)}
    for pair, frame in zip(pairs, frames, strict=True):
        assert np.abs(read_pair(pair)[0][..., 0] - frame * (255 / 4095)).max() <= 0.51


def test_images_brighter_than_those_trained_on_are_refused(tmp_path: Path) -> None:
    microscopy(tmp_path)
    assert verify_pairs(list_pairs(tmp_path), whites=Whites(16383))[0].whites.integer == 16383
    with pytest.raises(UserError, match=r"f3\.tif has values up to .* trained on end at 1023"):
        verify_pairs(list_pairs(tmp_path), whites=Whites(1023))
    with pytest.raises(ValueError, match="those of the images trained on end at 1023"):
        read_image(tmp_path / "Image" / "f3.tif", Whites(1023))


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (RAMP.astype(np.float32) * 6 - 3, "values from -3 to 3"),
        ((RAMP * 2000 - 1000).astype(np.int16), "values from -1000 to 1000, expected 0 to 65535"),
        (RAMP.astype(np.float32) * 5, "values from 0 to 5, expected 0 to 1, or 0 to 255 or 65535"),
        ((RAMP * 1e6).astype(np.int32), "values from 0 to 1e"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "NaN"),
    ],
)
def test_values_of_unclear_range_are_refused(tmp_path: Path, pixels: np.ndarray, said: str) -> None:
    for folder in ("Image", "Mask"):
        (tmp_path / folder).mkdir()
    Image.fromarray(pixels).save(tmp_path / "Image" / "a.tif")
    Image.new("L", (64, 64)).save(tmp_path / "Mask" / "a.png")
    with pytest.raises(ValueError, match=said):
        read_image(tmp_path / "Image" / "a.tif")
    with pytest.raises(UserError, match=said) as caught:
        verify_pairs(list_pairs(tmp_path))
    assert "a.tif" in str(caught.value)


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.webp"])
def test_several_pages_are_refused(tmp_path: Path, name: str) -> None:
    pages = [Image.new("L", (8, 8), grey) for grey in (0, 255)]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match="it has 2 pages: save the one that is meant"):
            read(tmp_path / name)


def test_a_thumbnail_is_no_second_page(tmp_path: Path) -> None:
    image, thumbnail = Image.new("L", (8, 8), 9), Image.new("L", (4, 4), 7)
    thumbnail.encoderinfo = {"tiffinfo": {254: 1}}
    image.save(tmp_path / "a.tif", save_all=True, append_images=[thumbnail])
    assert read_image(tmp_path / "a.tif").shape == (8, 8, 3)
