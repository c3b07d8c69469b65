"""Experts and their mixture: the seven kinds, and the mixture against a plain loop over images."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastema.segmentation.model.experts import (
    KINDS,
    Attention,
    Edge,
    Expert,
    Frequency,
    Mixture,
    Texture,
    _adaptive_pool,
    _replicate_pad,
    create_experts,
    expert_names,
)

WIDTH = 16
SIZES = [(1, 1), (3, 4), (17, 25)]


def seeded(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def experts(count: int, seed: int = 0) -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_experts(count, WIDTH)


# --- experts ----------------------------------------------------------------------------------------------------------


def test_names_go_round_with_the_kinds() -> None:
    assert expert_names(3) == ["texture", "attention", "local-global"]
    names = expert_names(15)
    assert len(set(names)) == 15
    assert names[6:8] == ["contrast", "texture 2"]
    assert names[14] == "texture 3"
    created = [type(expert.kind) for expert in create_experts(15, WIDTH) if isinstance(expert, Expert)]
    assert created == [*KINDS, *KINDS, KINDS[0]]
    assert expert_names(0) == create_experts(0, WIDTH) == []


@pytest.mark.parametrize("index", range(14), ids=expert_names(14))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_expert_keeps_the_shape_and_every_weight_learns(index: int, size: tuple[int, int]) -> None:
    expert = experts(14)[index]
    features = seeded((2, WIDTH, *size)).requires_grad_()
    added = expert(features)
    assert added.shape == features.shape
    assert bool(added.isfinite().all())
    (added * seeded(tuple(added.shape), seed=1)).sum().backward()
    assert features.grad is not None
    assert bool(features.grad.isfinite().all())
    idle = [
        name
        for name, weight in expert.named_parameters()
        if weight.grad is None or not bool(weight.grad.isfinite().all()) or not float(weight.grad.abs().sum())
    ]
    if size == SIZES[-1]:  # on one pixel there is nothing to attend to, no edge and no contrast
        assert not idle
    else:
        assert "gain" not in idle


@pytest.mark.parametrize("index", range(7), ids=expert_names(7))
def test_an_expert_sees_every_image_by_itself_in_training_too(index: int) -> None:
    expert = experts(7)[index]
    features = seeded((3, WIDTH, 9, 12))
    together = expert(features)
    for image in range(3):
        torch.testing.assert_close(together[image : image + 1], expert(features[image : image + 1]))


@pytest.mark.parametrize("index", range(7), ids=expert_names(7))
def test_an_expert_starts_small(index: int) -> None:
    features = seeded((2, WIDTH, 24, 24))
    with torch.no_grad():
        added = experts(7)[index](features)
    assert float(added.std()) < 0.5 * float(features.std())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("index", range(7), ids=expert_names(7))
def test_an_expert_under_autocast(index: int, dtype: torch.dtype) -> None:
    """The FFT has no half precision on a CPU, and on a GPU for powers of two only."""
    expert = experts(7)[index]
    features = seeded((2, WIDTH, 9, 13))
    with torch.no_grad():
        exact = expert(features)
        with torch.autocast("cpu", dtype=dtype):
            half = expert(features.to(dtype))
    assert float((half.float() - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_the_kinds_see_different_things() -> None:
    """Each on inputs that only some of the kinds can tell apart."""
    # In double: normalising what is left of a flat image would magnify rounding errors.
    kinds = [expert.kind.double() for expert in experts(7) if isinstance(expert, Expert)]
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    flat = seeded((1, WIDTH, 1, 1)).double().expand(-1, -1, 16, 16)
    ramp = seeded((1, WIDTH, 1, 1), seed=1) * (rows + 2 * columns)

    def tells_apart(kind: nn.Module, one: Tensor, other: Tensor) -> bool:
        with torch.no_grad():
            return float((kind(one) - kind(other)).abs().max()) > 1e-3

    names = expert_names(7)
    blind_to_flat = {name for name, kind in zip(names, kinds, strict=True) if not tells_apart(kind, flat, 3 - flat)}
    assert blind_to_flat == {"edge", "contrast"}, "both look at differences alone"

    # A slope: the same edge everywhere, but inside it nothing stands out from its surroundings.
    edge = Edge(WIDTH, 1)
    answers = nn.functional.conv2d(ramp, edge.filters, groups=WIDTH).unflatten(1, (WIDTH, 3))
    slope = seeded((1, WIDTH, 1, 1), seed=1)
    torch.testing.assert_close(answers[:, :, 0], (2 * slope).expand(1, WIDTH, 14, 14), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answers[:, :, 1], slope.expand(1, WIDTH, 14, 14), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answers[:, :, 2], torch.zeros(1, WIDTH, 14, 14), rtol=0, atol=1e-4)


def test_how_far_the_kinds_see() -> None:
    """Before the normalisation, which makes everything depend on everything a little."""
    reach = {}
    for name, expert in zip(expert_names(14), experts(14), strict=True):
        for module in expert.modules():
            for child_name, child in module.named_children():
                if isinstance(child, nn.GroupNorm):
                    setattr(module, child_name, nn.Identity())
        assert isinstance(expert, Expert)
        features = seeded((1, WIDTH, 33, 33)).requires_grad_()
        expert.kind(features)[..., 16, 16].abs().sum().backward()
        assert features.grad is not None
        seen = features.grad.abs().sum((0, 1)) > 0
        columns = seen[16].nonzero()
        reach[name] = "whole" if bool(seen[0, 0] and seen[-1, -1]) else int(columns.max() - columns.min()) + 1
    assert reach["texture"] == 7, "a 3 x 3 kernel at dilation 3"
    assert reach["texture 2"] == 13
    assert reach["edge"] == 5
    assert reach["edge 2"] == 7
    assert reach["contrast"] not in (3, 5, "whole")
    for name in ("attention", "local-global", "frequency", "pyramid"):
        assert reach[name] == reach[f"{name} 2"] == "whole"


def test_frequency_gains_act_on_their_band_at_any_size() -> None:
    """With all gains at 1 the filter changes nothing; with the lowest band alone it leaves the mean."""
    kind = Frequency(WIDTH, 1)
    for size in [(1, 1), (5, 8), (16, 16), (31, 12)]:
        features = seeded((1, WIDTH, *size))
        rings = kind._rings(features)
        torch.testing.assert_close(rings.sum(0), torch.ones(size[0], size[1] // 2 + 1))
        spectrum = torch.fft.rfft2(features)
        torch.testing.assert_close(torch.fft.irfft2(spectrum * rings.sum(0), s=size), features, rtol=1e-4, atol=1e-5)
        assert rings[0, 0, 0] == 1, "the mean is in the lowest band"
    assert kind._rings(seeded((1, WIDTH, 16, 16)))[-1, 8, 8] == pytest.approx(1), "the checkerboard in the highest"


def test_frequency_filters_by_its_gain() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind = Frequency(WIDTH, 1)
    joined: list[Tensor] = []
    kind.join.register_forward_pre_hook(lambda _, inputs: joined.append(inputs[0]))
    kind.deviation.data.fill_(-1)
    kind.deviation.data[:, 0] = 0
    with torch.no_grad():
        kind(seeded((1, WIDTH, 16, 16)))
    before, after = joined[0].chunk(2, 1)
    torch.testing.assert_close(after.mean((2, 3)), before.mean((2, 3)))
    assert float(after.std()) < 0.5 * float(before.std())


@pytest.mark.parametrize(
    ("size", "grid"), [((17, 25), (7, 6)), ((12, 12), (3, 12)), ((1, 5), (7, 2)), ((4, 3), (9, 9))]
)
def test_pooling_is_torchs(size: tuple[int, int], grid: tuple[int, int]) -> None:
    features = seeded((2, WIDTH, *size))
    torch.testing.assert_close(_adaptive_pool(features, grid), nn.functional.adaptive_avg_pool2d(features, grid))


@pytest.mark.parametrize("reach", [1, 3])
def test_extending_is_torchs_replicating_pad(reach: int) -> None:
    features = seeded((2, WIDTH, 1, 5))
    extended = _replicate_pad(_replicate_pad(features, reach, dim=2), reach, dim=3)
    assert torch.equal(extended, nn.functional.pad(features, [reach] * 4, mode="replicate"))


def test_attention_asks_as_few_tokens_at_any_size() -> None:
    (attention,) = [expert.kind for expert in experts(2)[1:] if isinstance(expert, Expert)]
    asked: list[tuple[int, ...]] = []
    attention.get_submodule("keys_values").register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].shape))
    for size in [(64, 64), (3, 40)]:
        attention(seeded((1, WIDTH, *size)))
    assert asked == [(1, WIDTH, 7, 7)] * 2


def test_attention_is_torchs() -> None:
    (attention,) = [expert.kind for expert in experts(2)[1:] if isinstance(expert, Expert)]
    assert isinstance(attention, Attention)
    attention.project = nn.Identity()
    attention.position.requires_grad_(False).weight.zero_()
    attention.position.bias.data.zero_()
    features = seeded((2, WIDTH, 9, 8))
    seen = attention.norm(features)
    tokens = nn.functional.adaptive_avg_pool2d(seen, 7)
    keys, values = attention.keys_values(tokens).chunk(2, 1)
    heads = [maps.unflatten(1, (4, -1)).flatten(3).transpose(2, 3) for maps in (attention.queries(seen), keys, values)]
    found = nn.functional.scaled_dot_product_attention(*heads).transpose(2, 3).reshape(features.shape)
    torch.testing.assert_close(attention(features), seen + found)


def test_texture_is_cheap_for_a_wide_view() -> None:
    """Three dilations of one kernel size: the weights do not grow with the scale."""
    counts = [sum(weight.numel() for weight in Texture(WIDTH, scale).parameters()) for scale in (1, 4)]
    assert counts[0] == counts[1]


# --- mixture ----------------------------------------------------------------------------------------------------------


def mixture(count: int = 5, top_k: int = 2, sharpness: float = 3.0) -> Mixture:
    built = Mixture(experts(count), WIDTH, top_k)
    with torch.no_grad():  # so that images differ in what they choose
        built.gate.weight.copy_(seeded((count, WIDTH), seed=2) * sharpness)
        built.gate.bias.zero_()
    return built


def images(count: int, size: tuple[int, int] = (6, 7)) -> Tensor:
    """Each with its own mean, by which the gate tells them apart."""
    return seeded((count, WIDTH, *size), seed=3) + seeded((count, WIDTH, 1, 1), seed=4)


def by_hand(mixture: Mixture, features: Tensor) -> Tensor:
    """One image after the other, and of each only what it chose."""
    results = []
    for image in features:
        logits = [
            sum(w * f for w, f in zip(row.tolist(), image.mean((1, 2)).tolist(), strict=True)) + bias
            for row, bias in zip(mixture.gate.weight, mixture.gate.bias.tolist(), strict=True)
        ]
        best = sorted(range(len(logits)), key=lambda expert: -logits[expert])[: mixture.top_k]
        total = sum(math.exp(logits[expert]) for expert in best)
        added = sum(mixture.experts[expert](image[None]) * (math.exp(logits[expert]) / total) for expert in best)
        results.append(image[None] + added)
    return torch.cat(results)


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_mixture_is_a_loop_over_images(count: int, top_k: int) -> None:
    built = mixture(top_k=top_k)
    features = images(count)
    mixed = built(features).features
    torch.testing.assert_close(mixed, by_hand(built, features), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_loop() -> None:
    built = mixture()
    features = images(6)
    names = [name for name, _ in built.named_parameters() if not name.startswith("gate")]
    gradients = []
    for forward in (lambda: built(features).features, lambda: by_hand(built, features)):
        built.zero_grad()
        forward().square().sum().backward()
        weights = dict(built.named_parameters())
        gradients.append({name: weights[name].grad for name in names})
    for name in names:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-4)


def test_the_gate_learns_from_the_task() -> None:
    built = mixture()
    (built(images(4)).features * seeded((4, WIDTH, 6, 7))).sum().backward()
    assert built.gate.weight.grad is not None
    assert float(built.gate.weight.grad.abs().sum()) > 0


def test_an_expert_that_nobody_chose_is_not_run() -> None:
    built = mixture()
    with torch.no_grad():
        built.gate.weight.zero_()
        built.gate.bias.copy_(torch.tensor([0.0, 9.0, 0.0, 8.0, 0.0]))
    ran: list[tuple[int, int]] = []
    for index, expert in enumerate(built.experts):
        expert.register_forward_pre_hook(lambda _, inputs, index=index: ran.append((index, len(inputs[0]))))
    mixed = built(images(4))
    assert ran == [(1, 4), (3, 4)], "each once, on all its images"
    assert mixed.usage.tolist() == [0, 1, 0, 1, 0]
    mixed.features.sum().backward()
    assert all(weight.grad is None for weight in built.experts[0].parameters())


def test_an_image_does_not_depend_on_its_batch() -> None:
    built = mixture().eval()
    features = images(7)
    with torch.no_grad():
        together = built(features).features
        for image in range(7):
            torch.testing.assert_close(together[image], built(features[image : image + 1]).features[0])
        torch.testing.assert_close(built(features.flip(0)).features, together.flip(0))


def test_usage_is_the_share_of_the_images() -> None:
    built = mixture()
    features = images(20)
    usage = built(features).usage
    with torch.no_grad():
        logits = features.mean((2, 3)) @ built.gate.weight.T
    chosen = logits.argsort(1, descending=True)[:, :2].flatten().tolist()
    assert usage.tolist() == pytest.approx([chosen.count(expert) / 20 for expert in range(5)])
    assert float(usage.sum()) == pytest.approx(2)
    assert not usage.requires_grad
    assert len(set(usage.tolist())) > 2, "the case should be one of uneven usage"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_mixture_under_autocast(dtype: torch.dtype) -> None:
    """The experts' results come in half precision, the features may come in either."""
    built = mixture().eval()
    features = images(5)
    exact = built(features)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(built(features).balance, exact.balance), "the gate stays in float32"
    for given in (features, features.to(dtype)):
        with torch.autocast("cpu", dtype=dtype):
            mixed = built(given)
        assert mixed.features.dtype == given.dtype
        assert mixed.balance.dtype == torch.float32
        assert torch.equal(mixed.usage, exact.usage)
        torch.testing.assert_close(mixed.features.float(), exact.features, rtol=0.05, atol=0.05)
        built.zero_grad()
        mixed.features.float().square().mean().backward()
        assert all(w.grad is None or bool(w.grad.isfinite().all()) for w in built.parameters())


def test_top_k_that_cannot_be() -> None:
    for top_k in (0, 6):
        with pytest.raises(ValueError, match=rf"between 1 and the number of experts \(5\), got {top_k}"):
            mixture(top_k=top_k)


# --- balance ----------------------------------------------------------------------------------------------------------


def test_balance_is_the_switch_transformers() -> None:
    built = mixture().eval()
    features = images(8)
    with torch.no_grad():
        mixed = built(features)
        probabilities = (features.mean((2, 3)) @ built.gate.weight.T).softmax(1).mean(0)
    by_formula = 5 * float((mixed.usage / 2 * probabilities).sum())
    assert float(mixed.balance) == pytest.approx(by_formula, rel=1e-5)
    assert by_formula > 1.05, "unbalanced"


def test_an_even_gate_has_balance_one() -> None:
    built = mixture(sharpness=0.0)
    assert built(images(8)).balance.item() == pytest.approx(1)


def test_the_balance_has_a_gradient_at_the_gate_and_at_the_gate_alone() -> None:
    built = mixture()
    built(images(8)).balance.backward()
    assert built.gate.weight.grad is not None
    assert built.gate.bias.grad is not None
    assert float(built.gate.weight.grad.abs().max()) > 1e-3
    assert all(weight.grad is None for weight in built.experts.parameters())


@pytest.mark.parametrize("batch_size", [1, 8])
def test_minimising_the_balance_alone_balances_the_usage(batch_size: int) -> None:
    """Of a batch of one, too: what counts is a window of recent images, not the batch."""
    built = Mixture([nn.Identity() for _ in range(5)], WIDTH, top_k=2)
    with torch.no_grad():
        built.gate.weight.copy_(seeded((5, WIDTH), seed=2) * 0.3)
        built.gate.bias.copy_(torch.tensor([8.0, 8.0, 0.0, 0.0, 0.0]))
    every = images(256, (1, 1))
    assert built.eval()(every).usage.tolist()[:2] == pytest.approx([1, 1], abs=0.02)
    built.train()
    optimizer = torch.optim.SGD(built.parameters(), lr=0.5)
    order = torch.Generator().manual_seed(0)
    used = []
    for _ in range(800):
        mixed = built(every[torch.randint(256, (batch_size,), generator=order)])
        optimizer.zero_grad()
        mixed.balance.backward()
        optimizer.step()
        used.append(mixed.usage)
    assert torch.stack(used[-300:]).mean(0).tolist() == pytest.approx([0.4] * 5, abs=0.15)


def test_the_window_is_part_of_the_state_and_still_in_evaluation() -> None:
    built, resumed = mixture(), mixture()
    assert built.recent_usage.tolist() == pytest.approx([0.2] * 5)
    for seed in range(3):
        built(images(8) + seed)
    assert float(built.recent_usage.sum()) == pytest.approx(1)
    assert float((built.recent_usage - 0.2).abs().max()) > 0.02
    resumed.load_state_dict(built.state_dict())
    assert torch.equal(resumed(images(8)).balance, built(images(8)).balance)
    before = built.recent_usage.clone()
    built.eval()(images(8))
    assert torch.equal(built.recent_usage, before)
