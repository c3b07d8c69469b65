"""The shadow mirrors storages: every layout a model can have is averaged right, swapped in, and given back."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from cases import LAYOUTS, as_applied, bits, move, raw, tensors_of, train, values
from cases.reference import ReferenceEMA
from fastema import FastEMA

pytestmark = pytest.mark.usefixtures("one_thread")

Named = Iterable[tuple[str, Tensor]]
MIXED = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def check(
    source: nn.Module | list[tuple[str, Tensor]],
    backend: str,
    moves: Callable[[int], None] | None = None,
    **arguments: object,
) -> FastEMA:
    """Three steps against the reference, then a swap: the average is in, and the live bits come back.

    Args:
        moves: what changes the weights at step 1, 2, 3; None: every tensor gets other values.
    """
    named = named_of(source)
    ema = FastEMA(source, decay=0.75, decay_type="constant", backend=backend, **arguments)  # type: ignore[arg-type]
    shadow = ema.state_dict()["shadow"]
    assert set(shadow) == set(named)
    floats = {name: t for name, t in named.items() if t.is_floating_point() or t.is_complex()}
    assert all(raw(shadow[name]) == raw(floats[name].to(shadow[name].dtype)) for name in floats), "it starts as a copy"
    reference = ReferenceEMA({name: shadow[name] for name in floats}, {name: shadow[name].dtype for name in floats})
    for step in (1, 2, 3):
        if moves is None:
            move(named.values(), seed=step)
        else:
            moves(step)
        reference.update(floats, 0.75)
        ema.update()
        reference.check(ema.state_dict()["shadow"])
    shadow = ema.state_dict()["shadow"]
    for name in set(named) - set(floats):
        assert raw(shadow[name]) == raw(named[name]), f"{name} was not copied"

    live = {name: raw(tensor) for name, tensor in named.items()}
    average = {name: raw(as_applied(tensor, named[name].dtype)) for name, tensor in ema.state_dict()["shadow"].items()}
    for _ in range(2):
        with ema.swapped():
            assert {name: raw(tensor) for name, tensor in named.items()} == average
        assert {name: raw(tensor) for name, tensor in named.items()} == live
    return ema


def named_of(source: nn.Module | Named) -> dict[str, Tensor]:
    if not isinstance(source, nn.Module):
        return dict(source)
    return {
        **dict(source.named_parameters(remove_duplicate=False)),
        **dict(source.named_buffers(remove_duplicate=False)),
    }


# ---- sharing ----


def test_tied_weights_are_averaged_once(backend: str) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embedding"].weight
    ema = check(model, backend)
    shadow = ema.state_dict()["shadow"]
    assert shadow["embedding.weight"].data_ptr() == shadow["head.weight"].data_ptr()
    with ema.swapped():
        assert model["head"].weight is model["embedding"].weight


def test_weights_tied_by_storage_are_averaged_once(backend: str) -> None:
    """Two parameters over one memory, one of them transposed: applied twice, the average would move too far."""
    first = nn.Parameter(values(4, 6))
    second = nn.Parameter(first.detach().t())
    check([("a", first), ("b", second)], backend, moves=lambda step: move([first], step))


def test_a_module_used_twice_is_averaged_once(backend: str) -> None:
    layer = nn.Linear(3, 3)
    ema = check(nn.Sequential(layer, nn.ReLU(), layer), backend)
    assert set(ema.state_dict()["shadow"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_two_overlapping_views_are_averaged_once(backend: str) -> None:
    room = values(20)
    views = [("a", room[2:12]), ("b", room[7:18])]
    ema = check(views, backend, moves=lambda step: move([room], step))
    shadow = ema.state_dict()["shadow"]
    assert raw(shadow["a"][5:]) == raw(shadow["b"][:5]), "the shared part has two averages"


def test_an_averaged_view_wins_over_a_copied_one(backend: str) -> None:
    room = values(20)
    ema = FastEMA(
        [("copied", room[:12]), ("averaged", room[8:])],
        decay=0.5,
        decay_type="constant",
        backend=backend,
        policy=lambda name, *_: "copy" if name == "copied" else "average",
    )
    old = room.clone()
    with torch.no_grad():
        room.add_(1)
    ema.update()
    shadow = ema.state_dict()["shadow"]
    assert torch.equal(shadow["copied"][:8], old[:8] + 1)
    torch.testing.assert_close(shadow["averaged"], old[8:] + 0.5, rtol=0, atol=1e-4)
    assert torch.equal(shadow["copied"][8:], shadow["averaged"][:4])


def test_a_view_of_another_dtype_follows(backend: str) -> None:
    """An integer view of an averaged weight: the average is taken of the floats, once."""
    weight = values(6)
    ema = FastEMA([("f", weight), ("i", weight.view(torch.int32))], decay=0.5, decay_type="constant", backend=backend)
    old = weight.clone()
    weight.add_(1)
    ema.update()
    shadow = ema.state_dict()["shadow"]
    torch.testing.assert_close(shadow["f"], old + 0.5)
    assert raw(shadow["i"]) == raw(shadow["f"])
    average = raw(shadow["f"])
    with ema.swapped():
        assert raw(weight.view(torch.int32)) == average


def test_views_of_two_float_dtypes_over_the_same_bytes_are_refused(backend: str) -> None:
    weight = values(6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"shares memory as torch\.float\d+ with a tensor that is torch\.float\d+"):
        FastEMA([("d", weight), ("f", weight.view(torch.float32))], backend=backend)


def test_several_dtypes_in_one_storage(backend: str) -> None:
    """One buffer that holds float64, float32 and int64 side by side, and some bytes of nobody."""
    room = torch.zeros(40, dtype=torch.float64)
    floats = room.view(torch.float32)
    integers = room.view(torch.int64)
    room[2:7] = values(5, dtype=torch.float64)
    floats[20:29] = values(9)
    integers[20:24] = torch.tensor([1, -2, 3, -4])
    outside = raw(torch.cat([room[:2], room[7:10], room[15:20], room[24:]]))
    ema = check([("d", room[2:7]), ("f", floats[20:29]), ("i", integers[20:24])], backend)
    assert ema.state_dict()["shadow"]["d"].dtype == torch.float64
    assert raw(torch.cat([room[:2], room[7:10], room[15:20], room[24:]])) == outside


def test_two_storages_over_one_memory_are_refused(backend: str) -> None:
    import numpy as np

    array = np.zeros(8, dtype=np.float32)
    with pytest.raises(ValueError, match=r"'a' and 'b' are different storages over the same memory.*clone\(\)"):
        FastEMA([("a", torch.from_numpy(array)), ("b", torch.from_numpy(array[2:]))], backend=backend)


# ---- layouts of one tensor ----


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_flat_recurrent_weights_stay_flat(backend: str, kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model = kind(3, 4, num_layers=2, bidirectional=True)
    features, twin = values(5, 2, 3), kind(3, 4, num_layers=2, bidirectional=True)
    ema = check(model, backend)
    addresses = [weight.data_ptr() for weight in model._flat_weights]
    twin.load_state_dict(ema.shadow_state_dict())
    with ema.swapped():
        assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))
        assert torch.equal(model(features)[0], twin(features)[0])
    assert [weight.data_ptr() for weight in model._flat_weights] == addresses


def test_weights_flattened_into_one_storage(backend: str) -> None:
    """cuDNN lays recurrent weights out so: every parameter a view of one buffer."""
    model = nn.GRU(3, 4)
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    begin = 0
    for parameter in model.parameters():
        parameter.data = flat[begin : begin + parameter.numel()].view_as(parameter)
        begin += parameter.numel()
    ema = check(model, backend)
    parameters = list(model.parameters())
    with ema.swapped():
        assert len({parameter.untyped_storage()._cdata for parameter in parameters}) == 1
        assert raw(flat) == b"".join(map(raw, parameters)), "the flat buffer did not follow"


def test_channels_last(backend: str) -> None:
    model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    ema = check(model, backend)
    shadow = ema.state_dict()["shadow"]["weight"]
    assert shadow.is_contiguous(memory_format=torch.channels_last)
    with ema.swapped():
        assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_transposed(backend: str) -> None:
    weight = nn.Parameter(values(4, 6).t())
    ema = check([("w", weight)], backend)
    assert ema.state_dict()["shadow"]["w"].stride() == weight.stride() == (1, 6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_non_contiguous(backend: str, layout: str, dtype: torch.dtype) -> None:
    weight = LAYOUTS[layout](dtype)
    room = torch.empty(0, dtype=dtype).set_(weight.untyped_storage())
    outside = torch.ones_like(room, dtype=torch.bool)
    outside.as_strided(weight.shape, weight.stride(), weight.storage_offset()).fill_(False)
    before = raw(room[outside])
    check([("w", weight)], backend)
    assert raw(room[outside]) == before


@pytest.mark.parametrize("shape", ["expanded", "unfolded"])
def test_expanded_is_refused(backend: str, shape: str) -> None:
    weight = torch.ones(4, 1).expand(4, 3) if shape == "expanded" else torch.ones(8).unfold(0, 4, 2)
    with pytest.raises(ValueError, match=r"'w' has overlapping elements .* expanded; make it contiguous\(\)"):
        FastEMA([("ok", torch.ones(3)), ("w", weight)], backend=backend)


def test_expanded_is_fine_where_it_is_skipped(backend: str) -> None:
    weight = torch.ones(1).expand(3)
    FastEMA(
        [("ok", torch.ones(3)), ("w", weight)],
        backend=backend,
        policy=lambda name, *_: "skip" if name == "w" else None,
    ).update()


def test_a_dimension_of_size_one_may_have_any_stride(backend: str) -> None:
    check([("w", values(12).as_strided((1, 4, 1), (0, 3, 1)))], backend)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0, 2)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    ema = check([("e", nn.Parameter(torch.empty(shape))), ("w", nn.Parameter(values(3)))], backend)
    assert ema.state_dict()["shadow"]["e"].shape == shape
    with ema.swapped(in_place=True):
        pass


def test_only_empty_tensors(backend: str) -> None:
    check([("e", nn.Parameter(torch.empty(0, 3)))], backend)


def test_zero_dim(backend: str) -> None:
    check([("scale", nn.Parameter(torch.tensor(3.5))), ("w", nn.Parameter(values(3)))], backend)


def test_one_element(backend: str) -> None:
    check([("w", nn.Parameter(torch.tensor([[3.5]])))], backend)


@pytest.mark.parametrize("size", [1, 3, 7, 17, 63, 65, 1025, 16385])
def test_odd_sized(backend: str, size: int) -> None:
    check([("a", nn.Parameter(values(size))), ("b", nn.Parameter(values(3, size)))], backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("begin", [1, 2, 3, 8])
def test_a_parameter_that_is_a_slice_of_a_larger_storage(backend: str, begin: int, dtype: torch.dtype) -> None:
    room = values(31, dtype=dtype)
    weight = nn.Parameter(room[begin : begin + 17])
    before = raw(room[:begin]) + raw(room[begin + 17 :])
    ema = check([("w", weight)], backend)
    assert raw(room[:begin]) + raw(room[begin + 17 :]) == before, "the rest of the storage was changed"
    with ema.swapped():
        assert raw(room[:begin]) + raw(room[begin + 17 :]) == before
        room[0] = 5.0  # belongs to somebody else, who writes it now
    assert room[0] == 5.0
    assert raw(room[1:begin]) + raw(room[begin + 17 :]) == before[dtype.itemsize :]


def test_many_slices_of_one_buffer_with_gaps(backend: str) -> None:
    room = values(200)
    slices = [(str(begin), nn.Parameter(room[begin : begin + 7])) for begin in range(1, 190, 9)]
    before = room.clone()
    check(slices, backend)
    covered = torch.zeros(200, dtype=torch.bool)
    for begin in range(1, 190, 9):
        covered[begin : begin + 7] = True
    assert torch.equal(room[~covered], before[~covered])


# ---- dtypes ----


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.complex32], ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_complex(backend: str, dtype: torch.dtype) -> None:
    ema = check([("w", nn.Parameter(values(5, 3, dtype=torch.complex128).to(dtype)))], backend)
    wanted = {torch.complex32: torch.complex64}.get(dtype, dtype)
    assert ema.state_dict()["shadow"]["w"].dtype == wanted


def test_complex_with_gaps_and_offset(backend: str) -> None:
    check([("w", values(5, 7, dtype=torch.complex64)[1:, 2:5])], backend)


def test_complex_with_a_wider_shadow(backend: str) -> None:
    ema = check([("w", values(5, dtype=torch.complex64))], backend, dtype=torch.float64)
    assert ema.state_dict()["shadow"]["w"].dtype == torch.complex128


def test_conjugated_and_negated_views(backend: str) -> None:
    """Lazy conjugation is a flag beside the memory: the average has to read like the weight does."""
    conjugated = values(5, dtype=torch.complex64).conj()
    negated = values(5, dtype=torch.complex64, seed=3).conj().imag
    assert conjugated.is_conj()
    assert negated.is_neg()
    check([("c", conjugated), ("n", negated)], backend)


@pytest.mark.parametrize("rotation", range(4))
def test_several_dtypes(backend: str, rotation: int) -> None:
    dtypes = MIXED[rotation:] + MIXED[:rotation]
    model = nn.ModuleDict({str(i): nn.Linear(5, 7).to(dtype) for i, dtype in enumerate(dtypes)})
    model.register_buffer("count", torch.tensor(0))
    ema = check(model, backend)
    shadow = ema.state_dict()["shadow"]
    for index, dtype in enumerate(dtypes):
        assert shadow[f"{index}.weight"].dtype == (dtype if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("shadow_dtype", MIXED, ids=str)
def test_several_dtypes_with_one_shadow_dtype(backend: str, shadow_dtype: torch.dtype) -> None:
    model = nn.ModuleDict({str(i): nn.Linear(5, 7).to(dtype) for i, dtype in enumerate(MIXED)})
    model.register_buffer("count", torch.tensor(0))
    ema = check(model, backend, dtype=shadow_dtype)
    assert {t.dtype for name, t in ema.state_dict()["shadow"].items() if name != "count"} == {shadow_dtype}
    assert ema.state_dict()["shadow"]["count"].dtype == torch.int64


def test_a_copied_neighbour_in_a_storage_that_is_widened(backend: str) -> None:
    """One bfloat16 buffer holds a weight, a copied mask and bytes of nobody; its shadow is float32."""
    room = values(30, dtype=torch.bfloat16)
    named = [("w", room[1:12]), ("mask", room[15:22])]
    ema = FastEMA(
        named,
        decay=0.5,
        decay_type="constant",
        backend=backend,
        policy=lambda name, *_: "copy" if name == "mask" else None,
    )
    before, mask = room.clone(), values(7, dtype=torch.bfloat16, seed=5)
    room[15:22] = mask
    ema.update()
    shadow = ema.state_dict()["shadow"]
    assert torch.equal(shadow["mask"], mask.float())
    with ema.swapped():
        assert torch.equal(room[15:22], mask)
        assert torch.equal(room[22:], before[22:])
        room[29] = 9.0
    assert room[29] == 9.0
    assert torch.equal(room[22:29], before[22:29])


def test_one_storage_with_two_dtypes_cannot_be_widened(backend: str) -> None:
    room = torch.zeros(16, dtype=torch.float32)
    named = [("f", room[:4]), ("h", room[8:].view(torch.bfloat16))]
    with pytest.raises(ValueError, match=r"'f', 'h' share one storage with different dtypes .*clone\(\) them apart"):
        FastEMA(named, backend=backend)


# ---- freezing, sharing with others ----


def test_frozen_then_unfrozen(backend: str) -> None:
    """A parameter that does not train yet is managed from the start; unfreezing is nothing special."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)

    def moves(step: int) -> None:
        if step == 2:
            model[0].requires_grad_(True)
        if step == 3:
            model[1].requires_grad_(False)
        move([p for p in model.parameters() if p.requires_grad], seed=step)

    ema = check(model, backend, moves=moves)
    assert model[0].weight.requires_grad
    assert not model[1].weight.requires_grad
    assert not any(tensor.requires_grad for tensor in ema.state_dict()["shadow"].values())


def test_parameters_from_numpy(backend: str) -> None:
    """Memory that torch's allocator does not own changes places like any other."""
    array = values(12).numpy()
    weight = nn.Parameter(torch.from_numpy(array))
    check([("w", weight)], backend)
    assert raw(weight) == array.tobytes()


def test_copy_on_write_weights(backend: str) -> None:
    source = values(16)
    weight = torch._lazy_clone(source)
    before = raw(source)
    ema = FastEMA([("w", weight)], decay=0.5, decay_type="constant", backend=backend)
    with ema.swapped():
        weight.add_(100)  # writes the average; neither the source nor the live weight
    assert raw(source) == before
    assert raw(weight) == before
    weight.add_(1)
    ema.update()
    assert raw(source) == before


def test_shared_memory_weights(backend: str) -> None:
    model = nn.Linear(3, 2).share_memory()
    check(model, backend)
    assert model.weight.is_shared()


def test_spectral_norm_and_parametrised_weights(backend: str) -> None:
    spectral_norm, weight_norm = nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm
    model = nn.Sequential(spectral_norm(nn.Linear(4, 3)), weight_norm(nn.Linear(3, 2)))
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    model(values(5, 4)).sum().backward()
    train(model)
    ema.update()
    twin = nn.Sequential(spectral_norm(nn.Linear(4, 3)), weight_norm(nn.Linear(3, 2)))
    twin.load_state_dict(ema.shadow_state_dict())
    live = bits(model)
    with ema.swapped():
        assert torch.equal(model.eval()(values(5, 4)), twin.eval()(values(5, 4)))
    assert bits(model) == live


@pytest.mark.pointers
def test_a_convolutional_net_in_every_respect(backend: str) -> None:
    """Convolution, batch norm, embedding, recurrent and attention layers in one model."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 5, 3, bias=False),
            "norm": nn.BatchNorm2d(5),
            "words": nn.Embedding(11, 3, padding_idx=0),
            "lstm": nn.LSTM(3, 5),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )
    ema = check(model, backend, buffers="average")
    addresses = [tensor.data_ptr() for tensor in tensors_of(model)]
    with ema.swapped():
        assert all(a != b for a, b in zip(addresses, (t.data_ptr() for t in tensors_of(model)), strict=True))
