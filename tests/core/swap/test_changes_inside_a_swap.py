"""A model that is changed inside a swap gets its trained weights back, or says that it cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastema import FastEMA
from fastema.backends import native
from fastema.core.swap import SwapError
from fastema.swa_utils import AveragedModel

pytestmark = pytest.mark.usefixtures("one_thread")
Swapped = Callable[[], AbstractContextManager[Any]]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def shift(model: nn.Module, by: float = 1.0) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(int(by) if tensor.dtype == torch.int64 else by)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def model() -> nn.Sequential:
    return network()


@pytest.fixture(params=["native", "torch", "in_place", "averaged_model"])
def swapped(request: pytest.FixtureRequest, model: nn.Sequential) -> Iterator[Swapped]:
    """Opens a block with averages that differ from the model by 0.5, or by 1 (AveragedModel)."""
    if request.param == "averaged_model":
        averaged = AveragedModel(model)
        averaged.update_parameters(model)
        shift(model)
        yield lambda: averaged.swapped(model)
    else:
        in_place = request.param == "in_place"
        if request.param == "native" and (reason := native.why_unusable("cpu")) is not None:
            pytest.skip(reason)
        ema = FastEMA(model, decay=0.5, decay_type="constant", backend="auto" if in_place else request.param)
        shift(model)
        ema.update()
        shift(model)
        yield lambda: ema.swapped(in_place=in_place)


def replace_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.zeros_like(model[0].weight))


def replace_data(model: nn.Sequential) -> None:
    model[0].weight.data = torch.zeros_like(model[0].weight)


def replace_buffer(model: nn.Sequential) -> None:
    model[1].running_mean = torch.zeros(4)


def assign_state(model: nn.Sequential) -> None:
    model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}, assign=True)


def to_inference_tensor(model: nn.Sequential) -> None:
    with torch.inference_mode():
        model[0].weight.data = torch.zeros_like(model[0].weight)


MOVES: dict[str, Callable[[nn.Sequential], Any]] = {
    "half_and_back": lambda model: model.half().float(),
    "double_and_back": lambda model: model.double().float(),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "new_parameter": replace_parameter,
    "other_data": replace_data,
    "new_buffer": replace_buffer,
    "load_state_dict_assign": assign_state,
    "inference_tensor": to_inference_tensor,
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
@pytest.mark.filterwarnings("ignore:the model was changed")
def test_the_trained_values_follow_to_where_the_tensors_are_now(
    model: nn.Sequential, swapped: Swapped, move: Callable[[nn.Sequential], Any]
) -> None:
    trained = values(model)
    with swapped():
        averaged = values(model)
        move(model)
    assert not all(torch.equal(trained[name], averaged[name]) for name in trained)
    for name, value in values(model).items():
        assert torch.equal(value, trained[name]), name


def test_another_dtype_takes_the_trained_values_rounded(model: nn.Sequential, swapped: Swapped) -> None:
    trained = values(model)
    with pytest.warns(UserWarning, match="'0.weight' was replaced or moved"), swapped():
        model.half()
    assert model[0].weight.dtype == torch.float16
    assert torch.equal(model[0].weight, trained["0.weight"].half())
    assert torch.equal(model[1].num_batches_tracked, trained["1.num_batches_tracked"])


def test_the_average_goes_on_after_it(model: nn.Sequential, backend: str) -> None:
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    before = ema.shadow_state_dict()["0.weight"].clone()
    shift(model)
    with pytest.warns(UserWarning, match="replaced or moved"), ema.swapped():
        model.double().float()
    ema.update()
    average = torch.lerp(before, model[0].weight.detach(), 0.5)
    assert torch.equal(ema.shadow_state_dict()["0.weight"], average)
    with ema.swapped():
        assert torch.equal(model[0].weight, average)


def test_unchanged_models_give_no_warning(model: nn.Sequential, swapped: Swapped) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with swapped():
            model.eval()
            model(torch.randn(1, 2, 5, 5))


def test_tied_weights_that_are_untied_all_get_their_value(backend: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    shift(model)
    trained = values(model)
    with pytest.warns(UserWarning, match=r"'b\.weight' was replaced"), ema.swapped():
        model["b"].weight = nn.Parameter(torch.zeros(3, 3))
    assert torch.equal(model["a"].weight, trained["a.weight"])
    assert torch.equal(model["b"].weight, trained["b.weight"])


# ---- what cannot take its value back ----


def other_shape(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.zeros(4, 5))


def fused(model: nn.Sequential) -> None:
    model.eval()
    model[0] = nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    model[1] = nn.Identity()


def resized(model: nn.Sequential) -> None:
    model[0].weight.data.resize_(100, 100)


def freed(model: nn.Sequential) -> None:
    model[0].weight.untyped_storage().resize_(0)


def on_meta(model: nn.Sequential) -> None:
    model.to("meta")


def into_another(model: nn.Sequential) -> None:
    model[2].bias = nn.Parameter(model[1].running_mean[:2])


REFUSED = {
    "other_shape": (other_shape, r"'0\.weight' has shape \(4, 5\) now, was \(4, 2, 3, 3\)"),
    "fused": (fused, r"'1\.weight' is gone"),
    "resized": (resized, r"'0\.weight' .*40,000 bytes now, had 288"),
    "freed": (freed, r"'0\.weight' is in a storage of 0 bytes now, had 288"),
    "on_meta": (on_meta, r"'0\.weight' is on the meta device now"),
    "into_another": (into_another, r"'2\.bias' is in the memory of other weights"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.filterwarnings("ignore:.*was deleted while")
def test_what_cannot_take_its_value_is_named_and_nothing_is_lost(
    model: nn.Sequential, swapped: Swapped, change: Callable[[nn.Sequential], Any], message: str
) -> None:
    trained = values(model)
    others = {name: tensor for name, tensor in model.named_parameters() if name == "2.weight"}
    with pytest.raises(SwapError, match=message) as caught, swapped():
        averaged = values(model)
        change(model)
        raise ZeroDivisionError
    assert isinstance(caught.value.__context__, ZeroDivisionError), "the block's own exception must stay visible"
    assert caught.value.live.keys() == trained.keys()
    for name, value in caught.value.live.items():
        assert torch.equal(value, trained[name]), name
    if "meta" not in message:
        assert torch.equal(others["2.weight"], averaged["2.weight"]), "nothing changes where not all can"


@pytest.mark.parametrize("kind", ["FastEMA", "AveragedModel"])
def test_restore_works_once_the_change_is_undone(
    kind: str, model: nn.Sequential, backend: str, monkeypatch: Any
) -> None:
    monkeypatch.setenv("FASTEMA_BACKEND", backend)
    if kind == "FastEMA":
        ema: Any = FastEMA(model, decay=0.5, decay_type="constant")
        swapped, update = ema.swapped, ema.update
    else:
        ema = AveragedModel(model)
        swapped, update = partial(ema.swapped, model), partial(ema.update_parameters, model)
        update()
    shift(model)
    trained, weight = values(model), model[0].weight
    with pytest.raises(SwapError, match=r"undo the change and call restore\(\) again"), swapped():
        averaged = values(model)
        model[0].weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"call restore\(\)"):
        update()
    with pytest.raises(SwapError):
        ema.restore()
    model[0].weight = weight
    ema.restore()
    assert all(torch.equal(value, trained[name]) for name, value in values(model).items())
    with pytest.raises(RuntimeError, match=r"restore\(\) .* in place"):
        ema.restore()
    with swapped():
        assert all(torch.equal(value, averaged[name]) for name, value in values(model).items())
        ema.restore()  # early; the end of the block does nothing then
        assert all(torch.equal(value, trained[name]) for name, value in values(model).items())
    update()


def test_a_copied_buffer_that_was_resized_keeps_the_blocks_value(model: nn.Sequential, backend: str) -> None:
    model.register_buffer("seen", torch.zeros(2))
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    shift(model)
    trained = values(model)
    with pytest.warns(UserWarning, match=r"'seen' has shape \(1000,\) now, was \(2,\) and keeps"), ema.swapped():
        model.seen.resize_(1000).fill_(7)
    assert torch.equal(model.seen, torch.full((1000,), 7.0))
    assert torch.equal(model[0].weight, trained["0.weight"])
    ema.update()
    assert torch.equal(ema.shadow_state_dict()["seen"], model.seen)


def test_storage_that_is_freed_and_filled_again(model: nn.Sequential, swapped: Swapped, request: Any) -> None:
    if request.node.callspec.params["swapped"] == "in_place":
        pytest.skip("addresses must not move there")
    trained = values(model)
    with swapped():
        storage = model[0].weight.untyped_storage()
        size, content = storage.nbytes(), model[0].weight.detach().clone()
        storage.resize_(0)
        storage.resize_(size)
        model[0].weight.data.copy_(content)
    assert all(torch.equal(value, trained[name]) for name, value in values(model).items())


def test_contents_that_were_exchanged_in_place_need_their_addresses(model: nn.Sequential) -> None:
    ema = FastEMA(model, decay=0.5, decay_type="constant")
    shift(model)
    trained = values(model)
    with pytest.raises(SwapError, match="contents were exchanged in place") as caught, ema.swapped(in_place=True):
        model.share_memory()
    assert all(torch.equal(value, trained[name]) for name, value in caught.value.live.items())
    del ema, caught


@pytest.mark.filterwarnings("ignore:the model was changed")
def test_an_averaged_model_in_another_dtype_gives_the_exact_bits_back() -> None:
    model = network().to(torch.bfloat16)
    averaged = AveragedModel(model)
    averaged.module.float()
    averaged.update_parameters(model)
    shift(model)
    trained = values(model)
    for change in (replace_parameter, replace_data):
        with averaged.swapped(model):
            assert not torch.equal(model[0].weight, trained["0.weight"])
            change(model)
        assert all(torch.equal(value, trained[name]) for name, value in values(model).items())


def test_a_lower_precision_model_gets_its_exact_bits_back(backend: str) -> None:
    model = network().to(torch.bfloat16)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    shift(model)
    trained = values(model)
    with pytest.warns(UserWarning, match="replaced or moved"), ema.swapped():
        model.float().bfloat16()
    assert all(torch.equal(value, trained[name]) for name, value in values(model).items())


# ---- autocast ----


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def test_autocast_forgets_its_casts_on_the_way_in_and_out(backend: str) -> None:
    model = nn.Linear(4, 4)
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    shift(model)
    x = torch.ones(1, 4)
    with autocast():
        live = model(x)
        with ema.swapped():
            averaged = model(x)
        assert not torch.equal(live, averaged)
        assert torch.equal(model(x), live)
        ema.copy_to()
        assert torch.equal(model(x), averaged)


def test_autocast_forgets_its_casts_with_averaged_model() -> None:
    model = nn.Linear(4, 4)
    averaged_model = AveragedModel(model)
    averaged_model.update_parameters(model)
    shift(model)
    x = torch.ones(1, 4)
    with autocast():
        live = model(x)
        with averaged_model.swapped(model):
            assert not torch.equal(model(x), live)
        assert torch.equal(model(x), live)


# ---- other classes of tensors, put into the model inside a swap ----


class Packed(torch.Tensor):
    """A wrapper as torchao's quantised tensors are; nothing can be copied into it."""

    @staticmethod
    def __new__(cls, of: Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, of.shape, dtype=of.dtype)

    def __init__(self, of: Tensor) -> None:
        self.of = of

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].of)
        raise AttributeError(f"{cls.__name__} has no {func}")


class Transparent(Packed):
    """The same, as torch.compile wants it."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["of"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> Transparent:
        return Transparent(inner["of"])


class Scaled(nn.Parameter):
    """As bitsandbytes' parameters: ordinary memory, with a meaning of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def weight_of(kind: Callable[[Tensor], Any]) -> Callable[[nn.Sequential], None]:
    def change(model: nn.Sequential) -> None:
        model[0].bias.data = model[0].bias.data.clone()  # moved: it can take its value by copy
        model[2].weight = nn.Parameter(kind(model[2].weight.detach()), requires_grad=False)

    return change


def tied_anew(model: nn.Sequential) -> None:
    model[1].weight = model[1].bias = nn.Parameter(torch.zeros(4))


def into_what_is_skipped(model: nn.Sequential) -> None:
    model.register_parameter("other", nn.Parameter(torch.zeros(4)))
    model[1].weight = nn.Parameter(model.other.detach())


def swapped_objects(model: nn.Sequential) -> None:
    model[2].weight.requires_grad_(False)
    torch.utils.swap_tensors(model[2].weight, nn.Parameter(Packed(model[2].weight.detach()), requires_grad=False))


NOT_WRITABLE: dict[str, tuple[Callable[[nn.Sequential], Any], str]] = {
    "wrapper": (weight_of(Packed), r"'2\.weight' is a Packed now"),
    "traceable_wrapper": (weight_of(Transparent), r"'2\.weight' is a Transparent now"),
    "object_swapped": (swapped_objects, r"'2\.weight' is a Packed now"),
    "operations_of_its_own": (
        lambda model: model[2].register_parameter("weight", Scaled(torch.zeros(2, 4, 1, 1))),
        r"'2\.weight' is a Scaled now",
    ),
    "integers": (weight_of(lambda weight: weight.to(torch.int8)), r"'2\.weight' is of dtype torch\.int8 now"),
    "expanded": (weight_of(lambda w: torch.zeros(1).expand(w.shape)), r"'2\.weight' has overlapping elements"),
    "quantised": (
        weight_of(lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)),
        r"'2\.weight' is quantised",
    ),
    "lazy": (
        lambda model: model[2].register_parameter("weight", nn.UninitializedParameter()),
        r"'2\.weight' is not initialised now",
    ),
    "sparse": (weight_of(lambda weight: weight.to_sparse()), r"'2\.weight' is quantised or of layout"),
    "one_for_two": (tied_anew, r"'1\.\w+' shares its memory with '1\.\w+' now"),
    "in_other_weights": (into_what_is_skipped, r"'1\.weight' is in the memory of other weights"),
}


@pytest.mark.parametrize(("change", "message"), NOT_WRITABLE.values(), ids=NOT_WRITABLE.keys())
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_written_to_is_found_before_anything_changes(
    model: nn.Sequential, swapped: Swapped, change: Callable[[nn.Sequential], Any], message: str
) -> None:
    trained = values(model)
    with pytest.raises(SwapError, match=message) as caught, swapped():
        bias = model[0].bias.detach().clone()
        change(model)
    assert caught.value.live.keys() == trained.keys()
    assert all(torch.equal(value, trained[name]) for name, value in caught.value.live.items())
    assert torch.equal(model[0].bias, bias), "nothing changes where not all can"


@pytest.mark.parametrize("kind", [Packed, Transparent])
def test_the_trained_state_is_right_while_a_wrapper_is_in_the_model(kind: type, backend: str) -> None:
    model = network()
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    shift(model)
    ema.update()
    trained = values(model)
    ema.apply_shadow()
    averaged, weight = values(model), model[2].weight
    model[2].weight = nn.Parameter(kind(weight.detach()), requires_grad=False)
    assert all(torch.equal(value, trained[name]) for name, value in ema.live_state_dict().items())
    assert all(torch.equal(value, averaged[name]) for name, value in ema.shadow_state_dict().items())
    with pytest.raises(SwapError):
        ema.restore()
    model[2].weight = weight
    ema.restore()
    assert all(torch.equal(value, trained[name]) for name, value in values(model).items())


def test_a_class_of_its_own_that_was_there_before_takes_its_value_by_copy(backend: str) -> None:
    model = nn.Linear(3, 3)
    model.weight = Scaled(model.weight.detach().clone())
    ema = FastEMA(model, decay=0.5, decay_type="constant", backend=backend)
    shift(model)
    trained = values(model)
    with pytest.warns(UserWarning, match="'weight' was replaced or moved"), ema.swapped():
        model.weight = Scaled(torch.zeros(3, 3))
        version = model.weight._version
    assert torch.equal(model.weight.detach(), trained["weight"])
    assert model.weight._version > version, "a graph recorded inside must not be differentiated with other weights"


# ---- what is computed from the weights and kept ----


def both_kinds(model: nn.Module) -> list[Swapped]:
    ema = FastEMA(model, decay=0.5, decay_type="constant")
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    shift(model)
    ema.update()
    return [ema.swapped, lambda: averaged.swapped(model)]


def test_a_swap_inside_of_cached_parametrizations_shows_the_average() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    x = torch.ones(2, 4)
    for swapped in both_kinds(model):
        trained = model(x)
        with swapped():
            average = model(x)
        with nn.utils.parametrize.cached():
            assert torch.equal(model(x), trained)
            with swapped():
                assert torch.equal(model(x), average)
            assert torch.equal(model(x), trained)
        assert not torch.equal(average, trained)


class Adapted(nn.Module):
    """A layer as PEFT has it: `merged`, `merge()` and `unmerge()`."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.adapter, self.merged = nn.Linear(3, 3), nn.Linear(3, 3, bias=False), False

    def merge(self) -> None:
        self.base.weight.data += self.adapter.weight.data
        self.merged = True

    def unmerge(self) -> None:
        self.base.weight.data -= self.adapter.weight.data
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.merged else self.base(x) + self.adapter(x)


@pytest.mark.filterwarnings("ignore:.*was deleted while")
@pytest.mark.parametrize("policy", [None, lambda name, *_: "skip" if "base" in name else None])
def test_an_adapter_left_merged_at_the_end_of_a_swap_is_an_error(policy: Any) -> None:
    model = nn.Sequential(Adapted())
    ema = FastEMA(model, decay=0.5, decay_type="constant", policy=policy)
    shift(model)
    trained = values(model)
    with pytest.raises(SwapError, match=r"merged into a Adapted.*unmerge") as caught, ema.swapped():
        model[0].merge()
    assert all(torch.equal(value, trained[name]) for name, value in caught.value.live.items())
    assert ema.is_applied
    model[0].unmerge()
    ema.restore()
    for name, value in values(model).items():
        torch.testing.assert_close(value, trained[name])
    with ema.swapped():
        model[0].merge()
        model[0].unmerge()


def test_a_swap_of_a_merged_adapter_is_refused() -> None:
    model = nn.Sequential(Adapted())
    for swapped in both_kinds(model):
        model[0].merge()
        with pytest.raises(RuntimeError, match=r"merged into a Adapted.*Unmerge it first"), swapped():
            pytest.fail("the block was entered")
        model[0].unmerge()
        with swapped():
            pass


def test_a_flag_of_this_name_that_means_something_else_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].merged = True
    with FastEMA(model).swapped():
        model[0].merged = False
