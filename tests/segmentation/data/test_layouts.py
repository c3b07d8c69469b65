"""Folders and names as people have them: every pair is found, and what is not used is listed with its reason."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from fastema.segmentation.train_extra import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

from PIL import Image

from fastema.errors import UserError
from fastema.segmentation.data.images import verify_pairs
from fastema.segmentation.data.listing import hold_out, list_pairs

PLAIN = [("x", "Imgs/x.jpg", "GT/x.png"), ("y", "Imgs/y.jpg", "GT/y.png")]
LAYOUTS = {
    "COD10K": [
        ("x", "Train/Image/x.jpg", "Train/GT_Object/x.png"),
        ("y", "Train/Image/y.jpg", "Train/GT_Object/y.png"),
    ],
    "images, masks": [("x", "images/x.jpg", "masks/x.png"), ("y", "images/y.JPG", "masks/y.PNG")],
    "train, lower case": [
        ("x", "train/image/x.png", "train/label/x.png"),
        ("y", "train/image/y.png", "train/label/y.png"),
    ],
    "split below": [("x", "images/train/x.jpg", "masks/train/x.png"), ("y", "images/train/y.jpg", "masks/train/y.png")],
    "CamelCase": [("x", "TrainImages/x.jpg", "TrainMasks/x.png"), ("y", "TrainImages/y.jpg", "TrainMasks/y.png")],
    "ground truth": [("x", "Images/x.jpg", "GroundTruth/x.png"), ("y", "Images/y.jpg", "GroundTruth/y.png")],
    "Carvana": [("x", "train/x.jpg", "train_masks/x_mask.gif"), ("y", "train/y.jpg", "train_masks/y_mask.gif")],
    "ISIC": [
        (
            "ISIC-2017_Training_Data/x",
            "ISIC-2017_Training_Data/x.jpg",
            "ISIC-2017_Training_Part1_GroundTruth/x_segmentation.png",
        ),
        (
            "ISIC-2017_Training_Data/y",
            "ISIC-2017_Training_Data/y.jpg",
            "ISIC-2017_Training_Part1_GroundTruth/y_segmentation.png",
        ),
    ],
    "DAVIS": [
        ("480p/bear/0", "JPEGImages/480p/bear/0.jpg", "Annotations/480p/bear/0.png"),
        ("480p/cow/0", "JPEGImages/480p/cow/0.jpg", "Annotations/480p/cow/0.png"),
    ],
    "classes inside": [("cat/0", "Image/cat/0.jpg", "Mask/cat/0.png"), ("dog/0", "Image/dog/0.jpg", "Mask/dog/0.png")],
    "classes outside": [
        ("cat/0", "cat/images/0.jpg", "cat/masks/0.png"),
        ("dog/0", "dog/images/0.jpg", "dog/masks/0.png"),
    ],
    "some deeper": [("more/x", "Imgs/more/x.jpg", "GT/more/x.png"), ("y", "Imgs/y.jpg", "GT/y.png")],
    "masks side by side": [("cat/x", "Imgs/cat/x.jpg", "GT/x.png"), ("dog/y", "Imgs/dog/y.jpg", "GT/y.png")],
    "_mask": [("x", "Imgs/x.jpg", "GT/x_mask.png"), ("y", "Imgs/y.jpg", "GT/y_mask.png")],
    "_mask, one folder": [("x", "x.jpg", "x_mask.png"), ("y", "y.jpg", "y_mask.png")],
    "several suffixes": [("a/x", "a/x.jpg", "a/x_segmentation.png"), ("b/y", "b/y.jpg", "b/y-label.png")],
    "camel suffix": [("x", "x.tif", "xMask.tif"), ("y", "y.tif", "y_GT.tif")],
    "_sat and _mask": [("x_sat", "x_sat.jpg", "x_mask.png"), ("y_sat", "y_sat.jpg", "y_mask.png")],
    "prefixes": [("image_1", "image_1.png", "mask_1.png"), ("image_2", "image_2.png", "mask_2.png")],
    "jpg and png": [("x", "Imgs/x.jpg", "Imgs/x.png"), ("y", "Imgs/y.jpg", "Imgs/y.png")],
    "a class that is called mask": [
        ("with_mask/x", "images/with_mask/x.jpg", "masks/with_mask/x.png"),
        ("no/y", "images/no/y.jpg", "masks/no/y.png"),
    ],
    "a set that is called segmentation": [
        ("segmentation_set/x", "segmentation_set/images/x.jpg", "segmentation_set/masks/x.png"),
        ("segmentation_set/y", "segmentation_set/images/y.jpg", "segmentation_set/masks/y.png"),
    ],
    "a folder around all that is called GT": [
        ("set_with/cat/x (1)", "Set_with_GT/cat/x (1).png", "Set_with_GT/cat/x (1)_mask.png"),
        ("set_with/dog/y (1)", "Set_with_GT/dog/y (1).png", "Set_with_GT/dog/y (1)_mask.png"),
    ],
    "nnU-Net": [
        ("x_001_0000", "imagesTr/x_001_0000.png", "labelsTr/x_001.png"),
        ("x_002_0000", "imagesTr/x_002_0000.png", "labelsTr/x_002.png"),
    ],
    "an image that is called mask": [("gas_mask", "Imgs/gas_mask.jpg", "GT/gas_mask.png"), PLAIN[1]],
    "another case": [("IMG_1", "Imgs/IMG_1.jpg", "GT/img_1.png"), PLAIN[1]],
}


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), 255 * len(path.name) % 256).save(path)


def made(root: Path, files: list[str]) -> Path:
    for file in files:
        write(root / file)
    return root


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_are_read(tmp_path: Path, layout: list[tuple[str, str, str]]) -> None:
    made(tmp_path, [file for _, *both in layout for file in both])
    pairs = list_pairs(tmp_path).pairs
    expected = sorted((name, tmp_path / image, tmp_path / mask) for name, image, mask in layout)
    assert [(pair.stem, pair.image, pair.mask) for pair in pairs] == expected
    assert not list_pairs(tmp_path).problems
    assert not list_pairs(tmp_path).unused


def test_one_name_is_written_in_two_ways(tmp_path: Path) -> None:
    for form, folder in (("NFC", "Imgs"), ("NFD", "GT")):
        write(tmp_path / folder / f"{unicodedata.normalize(form, 'Käfer')}.png")
    assert len(list_pairs(tmp_path).pairs) == 1


def test_folders_of_any_name(tmp_path: Path) -> None:
    made(tmp_path, ["Fotos/a/x.jpg", "Fotos/y.jpg", "Fotos/Masken/a/x_mask.png", "Fotos/Masken/y.gif"])
    listing = list_pairs(None, images=tmp_path / "Fotos", masks=tmp_path / "Fotos" / "Masken")
    assert [pair.stem for pair in listing.pairs] == ["a/x", "y"]
    made(tmp_path, ["one/x.jpg", "one/x_mask.png"])
    assert len(list_pairs(None, images=tmp_path / "one", masks=tmp_path / "one").pairs) == 1
    with pytest.raises(UserError, match=r"no data set at .*gone"):
        list_pairs(None, images=tmp_path / "gone", masks=tmp_path)


def test_the_same_name_in_two_folders_is_never_paired_across_them(tmp_path: Path) -> None:
    made(tmp_path, ["Imgs/bear/0.jpg", "GT/cow/0.png", "Imgs/cow/1.jpg", "GT/cow/1.png", "Imgs/cow/0.jpg"])
    listing = list_pairs(tmp_path)
    assert [pair.stem for pair in listing.pairs] == ["cow/0", "cow/1"]
    assert listing.problems["image without a mask"] == ["Imgs/bear/0.jpg"]


def test_test_images_are_never_trained_on(tmp_path: Path) -> None:
    made(
        tmp_path, [f"{kind}/{split}/{split}.png" for kind in ("images", "masks") for split in ("train", "test", "val")]
    )
    assert [pair.stem for pair in list_pairs(tmp_path).pairs] == ["train"]
    assert [pair.stem for pair in list_pairs(tmp_path, "Test").pairs] == ["test"]
    made(tmp_path / "b", ["images/x.png", "masks/x.png", "images/test/y.png", "masks/test/y.png"])
    assert [pair.stem for pair in list_pairs(tmp_path / "b").pairs] == ["x"]


def test_channels_in_files_of_their_own_are_not_left_out_silently(tmp_path: Path) -> None:
    listing = list_pairs(made(tmp_path, ["imagesTr/x_0000.png", "imagesTr/x_0001.png", "labelsTr/x.png"]))
    assert listing.problems["image without a mask"] == ["x_0001.png"]


def test_splits_that_are_shortened(tmp_path: Path) -> None:
    """DUTS has DUTS-TR and DUTS-TE, others imagesTr and imagesTs; a folder that is called `tr` alone is no split."""
    kinds = ("Image", "Mask")
    made(tmp_path / "a", [f"{s}/{s}-{kind}/{s}.png" for s in ("DUTS-TR", "DUTS-TE") for kind in kinds])
    made(tmp_path / "b", [f"{kind}{s}/{s}.png" for s in ("Tr", "Ts") for kind in ("images", "labels")])
    for root, train, test in (("a", "DUTS-TR", "DUTS-TE"), ("b", "Tr", "Ts")):
        assert [pair.image.stem for pair in list_pairs(tmp_path / root).pairs] == [train]
        assert [pair.image.stem for pair in list_pairs(tmp_path / root, "Test").pairs] == [test]
    made(tmp_path / "c", [f"{kind}/{s}/{s}.png" for s in ("tr", "te") for kind in ("images", "masks")])
    assert len(list_pairs(tmp_path / "c").pairs) == 2


def test_the_object_masks_of_cod10k_are_taken_and_the_others_named(tmp_path: Path) -> None:
    kinds = ("GT_Object", "GT_Edge", "GT_Instance")
    made(tmp_path, [f"Train/Image/{i}.jpg" for i in range(3)] + [f"Train/{k}/{i}.png" for k in kinds for i in range(3)])
    (tmp_path / "Train" / "CAM_Instance_Train.json").write_text("{}")
    listing = list_pairs(tmp_path)
    assert {pair.mask.parent.name for pair in listing.pairs} == {"GT_Object"}
    assert not listing.problems
    notes = "; ".join(listing.notes())
    assert "6 files not used (other masks are used): 0.png" in notes
    assert "1 file not used (no images): CAM_Instance_Train.json" in notes


def voc(root: Path) -> Path:
    made(root, [f"JPEGImages/{i}.jpg" for i in range(6)])
    for kind in ("SegmentationClass", "SegmentationObject"):
        made(root, [f"{kind}/{i}.png" for i in range(4)])
    return root


def test_pascal_voc(tmp_path: Path) -> None:
    root = voc(tmp_path / "VOCdevkit" / "VOC2012")
    listing = list_pairs(tmp_path)
    assert [pair.image.stem for pair in listing.pairs] == ["0", "1", "2", "3"]
    assert {pair.mask.parent.name for pair in listing.pairs} == {"SegmentationClass"}
    assert not listing.problems
    assert [len(files) for files in listing.unused.values()] == [2, 4]
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n1\n2\n")
    (lists / "val.txt").write_text("3\n")
    assert [pair.image.stem for pair in list_pairs(root).pairs] == ["0", "1", "2"]
    assert [pair.image.stem for pair in list_pairs(root, "Test").pairs] == ["3"]


def test_masks_of_two_folders_are_a_problem(tmp_path: Path) -> None:
    made(tmp_path, ["images/x.jpg", "masks/x.png", "labels/x.png"])
    assert list_pairs(tmp_path).problems["stem with several images or masks"] == ["x.jpg, x.png, x.png"]


def test_what_lies_elsewhere_is_listed(tmp_path: Path) -> None:
    made(tmp_path, ["Imgs/x.jpg", "GT/x.png", "paper/figure.png"])
    (tmp_path / "labels.csv").write_text("x")
    listing = list_pairs(tmp_path)
    assert [pair.stem for pair in verify_pairs(listing)] == ["x"]
    assert [list(files) for files in listing.unused.values()] == [["figure.png"], ["labels.csv"]]
    made(tmp_path / "b", ["Train/Image/x.jpg", "Train/Mask/x.png", "Extra/Image/x.jpg", "Test/Image/x.jpg"])
    assert (
        "1 file not used (in a folder that is not for train): Extra/Image/x.jpg" in list_pairs(tmp_path / "b").notes()
    )


def test_a_folder_that_links_to_its_parent_is_read_once(tmp_path: Path) -> None:
    made(tmp_path, ["Imgs/x.jpg", "GT/x.png"])
    (tmp_path / "Imgs" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert [pair.stem for pair in list_pairs(tmp_path).pairs] == ["x"]


def test_the_same_image_is_held_out_whatever_folder_it_is_in(tmp_path: Path) -> None:
    names = [f"im{i}" for i in range(30)]
    made(tmp_path / "a", [f"{folder}/{name}.png" for name in names for folder in ("Imgs", "GT")])
    made(tmp_path / "b", [f"Train/{folder}/{name}.png" for name in names for folder in ("images", "masks")])
    one, other = ([pair.stem for pair in hold_out(list_pairs(tmp_path / each).pairs, 0.2)[1]] for each in "ab")
    assert one == other
