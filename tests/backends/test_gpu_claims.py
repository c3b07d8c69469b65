"""README's claims about GPUs, each with a test that fails if it does not hold. `make gpu-test` runs those on "cuda".
tests/accelerator runs them on a device that is made up.

Where a claim makes sense on a CPU, the same body runs there too, so that a mistake in the test is found without a GPU;
streams are nothing there, and a captured graph is a function that reads the weights at the addresses they had.
Nothing here has run on a GPU yet.
"""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cases.gpu import BACKENDS, DEVICE, current_stream, gpu, needs_cuda, needs_gpu, new_stream, on, sleep
from fastema import FastEMA, backends
from fastema.backends.contract import UpdateArgs

BOTH = ["cpu", pytest.param(DEVICE, marks=needs_gpu)]
ON_CUDA = ["cpu", pytest.param(DEVICE, marks=[*needs_gpu, needs_cuda])]


def backends_on(device: str, *marks: Any) -> list[Any]:
    names = ["native", "torch"] if device == "cpu" else BACKENDS
    return [pytest.param(device, name, marks=[*marks, *(needs_gpu if device == DEVICE else [])]) for name in names]


KERNELS = backends_on("cpu") + backends_on(DEVICE)
KERNELS_ON_CUDA = backends_on("cpu") + backends_on(DEVICE, needs_cuda)


def needs(backend: str, device: str) -> None:
    reason = backends.BACKENDS[backend].why_unusable(device)
    if reason is not None:
        pytest.skip(reason)


def make_model(device: str, width: int = 16) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).to(device)


def move(model: nn.Module, seed: int) -> None:
    """The same change on every device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device))


def averages(ema: FastEMA, which: int = 0) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in ema.shadow_state_dict(which=which).items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Side:
    """A second stream; on a CPU everything is in order anyway."""

    def __init__(self, device: str) -> None:
        self._stream = None if device == "cpu" else new_stream()

    def entered(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else on(self._stream)

    def follows_main(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(current_stream())

    def precedes_main(self) -> None:
        if self._stream is not None:
            current_stream().wait_stream(self._stream)

    def is_late(self) -> None:
        """Make what is enqueued from now on run after what the host does next."""
        if self._stream is not None:
            with on(self._stream):
                sleep()


# ---- gradient scaler and autocast ----


@pytest.mark.parametrize("device", ON_CUDA)
def test_a_step_that_a_real_scaler_skips_inside_a_fused_optimizer_is_not_averaged(device: str) -> None:
    """A fused optimizer steps always, and skips in its kernel: the hook runs, and found_inf alone tells."""
    model = make_model(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    ema = FastEMA(model, decay=0.5, capturable=True)
    ema.attach(optimizer)
    skipped = []
    for number in range(6):
        before, weights = averages(ema), copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        features = torch.full((4, 16), float("inf") if number in (0, 3) else 0.5, device=device)
        scaler.scale(model(features).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        stands = all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
        assert equal(before, averages(ema)) == stands
        skipped.append(stands)
    assert getattr(optimizer, "_step_supports_amp_scaling", False), "the optimizer was given the scaler's verdict"
    assert skipped == [True, False, False, True, False, False]
    assert ema.num_updates == 4


@pytest.mark.parametrize("device", ON_CUDA)
def test_autocast_sees_the_averaged_weights(device: str) -> None:
    """Autocast keeps the casts of weights until its outermost block ends; a swap within it must not be served those."""
    model = make_model(device)
    ema = FastEMA(model, decay=0.0)
    move(model, 1)
    features = torch.randn(4, 16, device=device)
    twin = copy.deepcopy(model)
    twin.load_state_dict(ema.shadow_state_dict())

    def output(of: nn.Module) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return of(features).detach()

    live, averaged = output(model), output(twin)
    assert not torch.equal(live, averaged)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(model(features), live)
        for _ in range(2):
            with ema.swapped():
                assert torch.equal(model(features), averaged)
            assert torch.equal(model(features), live)
        ema.copy_to()
        assert torch.equal(model(features), averaged)


# ---- graphs ----


def recorded_forward(model: nn.Module, features: Tensor) -> Callable[[], Tensor]:
    """The model's output from a graph that holds addresses; on a CPU from NumPy arrays, which hold them as well."""
    if features.device.type == "cpu":
        first, second = (
            [torch.from_numpy(tensor.detach().numpy()) for tensor in model[index].parameters()] for index in (0, 2)
        )
        linear = torch.nn.functional.linear
        return lambda: linear(linear(features, *first).relu(), *second)
    with torch.no_grad():
        side = Side("cuda")
        side.follows_main()
        with side.entered():
            model(features)
        side.precedes_main()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(features)

    def replay() -> Tensor:
        graph.replay()
        return output.clone()

    return replay


@pytest.mark.parametrize(("device", "backend"), KERNELS_ON_CUDA)
def test_a_graph_of_the_forward_replays_with_the_average_inside_swapped_in_place(device: str, backend: str) -> None:
    needs(backend, device)
    model = make_model(device)
    ema = FastEMA(model, decay=0.5, backend=backend)
    features = torch.randn(4, 16, device=device)
    replay = recorded_forward(model, features)
    move(model, 1)
    ema.update()
    twin = copy.deepcopy(model)
    twin.load_state_dict(ema.shadow_state_dict())
    live, averaged = model(features).detach(), twin(features).detach()
    for _ in range(2):
        torch.testing.assert_close(replay(), live)
        with ema.swapped(in_place=True):
            torch.testing.assert_close(replay(), averaged)
    torch.testing.assert_close(replay(), live)
    assert not torch.allclose(live, averaged)


@pytest.mark.parametrize(("device", "backend"), KERNELS_ON_CUDA)
def test_the_first_update_of_all_may_be_inside_a_capture(device: str, backend: str) -> None:
    """Whatever compiles or loads at a first launch did so when FastEMA was built."""
    needs(backend, device)
    if (device, backend) == ("cuda", "triton"):
        backends.triton.probe.cache_clear()
    model = make_model(device, width=33)
    twin = copy.deepcopy(model).cpu()
    ema = FastEMA(model, decay=[0.5, 0.9, 0.99], capturable=True, backend=backend)
    expected = FastEMA(twin, decay=[0.5, 0.9, 0.99], backend="torch")
    replay: Callable[[], object] = ema.update
    if device == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ema.update()
        replay = graph.replay
    assert ema.num_updates == 0
    for seed in range(3):
        move(model, seed)
        move(twin, seed)
        replay()
        expected.update()
    assert ema.num_updates == 3
    assert all(equal(averages(ema, which), averages(expected, which)) for which in range(3))


@pytest.mark.parametrize(("device", "backend"), KERNELS_ON_CUDA)
def test_what_was_captured_may_be_replayed_after_a_rebuild(device: str, backend: str) -> None:
    """It averages tensors that the model no longer has, into memory that nobody else was given."""
    needs(backend, device)
    model = make_model(device, width=256)
    ema = FastEMA(model, decay=0.5, capturable=True, backend=backend)
    if device == "cpu":
        ema.engine.averages.is_on_cpu = False
    shadow = ema.engine.averages
    replay: Callable[[], object] = lambda: shadow.plans.update(UpdateArgs([0.5], True))  # noqa: E731
    if device == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ema.update()
        replay = graph.replay
        del shadow
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    ema.update()
    average = averages(ema)
    gc.collect()
    others = [torch.full((256, 256), 7.0, device=device) for _ in range(8)]
    replay()
    assert all(bool((other == 7.0).all()) for other in others)
    assert equal(averages(ema), average)


@pytest.mark.parametrize("device", ON_CUDA)
def test_a_swap_under_reduce_overhead(device: str) -> None:
    model = make_model(device).eval()
    compiled: Any = (
        torch.compile(model, mode="reduce-overhead") if device == "cuda" else torch.compile(model, backend="eager")
    )
    ema = FastEMA(model, decay=0.5)
    features = torch.randn(4, 16, device=device)
    move(model, 1)
    ema.update()
    twin = copy.deepcopy(model)
    twin.load_state_dict(ema.shadow_state_dict())
    with torch.no_grad():
        live, averaged = model(features), twin(features)
        for _ in range(4):  # warm up, record, replay
            torch.testing.assert_close(compiled(features).clone(), live)
        for _ in range(3):
            with ema.swapped():
                for _ in range(3):
                    torch.testing.assert_close(compiled(features).clone(), averaged)
            for _ in range(3):
                torch.testing.assert_close(compiled(features).clone(), live)


@pytest.mark.parametrize(("device", "backend"), KERNELS_ON_CUDA)
def test_update_in_a_compiled_step(device: str, backend: str) -> None:
    needs(backend, device)
    torch._dynamo.reset()
    model, twin = make_model(device), make_model("cpu")
    ema, expected = FastEMA(model, decay=0.9, backend=backend), FastEMA(twin, decay=0.9)
    parameters = list(model.parameters())

    def step(change: Tensor) -> None:
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(0.5).add_(change)
        ema.update()

    compiled = torch.compile(step, backend="inductor" if device == "cuda" else "aot_eager", fullgraph=True)
    for number in range(4):
        compiled(torch.tensor(float(number), device=device))
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(0.5).add_(float(number))
        expected.update()
    assert ema.num_updates == 4
    for got, wanted in zip(averages(ema).values(), averages(expected).values(), strict=True):
        torch.testing.assert_close(got, wanted)


# ---- streams ----


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(("device", "backend"), KERNELS)
def test_built_on_one_stream_updated_on_another_and_dropped(device: str, backend: str, capturable: bool) -> None:
    """The late update writes into its own memory, although the allocator of the first stream was free to reuse it."""
    needs(backend, device)
    if capturable and backend == "torch" and device != "cpu":
        pytest.skip("capturable=True needs kernels on a GPU")
    model = make_model(device, width=512)
    ema = FastEMA(model, decay=0.5, backend=backend, capturable=capturable)
    side = Side(device)
    side.follows_main()
    with side.entered():
        ema.update()  # compiled, loaded, and this stream recorded
    side.is_late()
    with side.entered():
        ema.update()
    del ema
    gc.collect()
    others = [torch.full((512, 512), 7.0, device=device) for _ in range(8)]
    others += [torch.full((64,), 7, dtype=torch.int64, device=device) for _ in range(64)]  # as small as a table
    side.precedes_main()
    assert all(bool((other == 7).all()) for other in others)


@pytest.mark.parametrize(("device", "backend"), KERNELS)
def test_a_rebuild_while_an_update_is_in_flight(device: str, backend: str) -> None:
    needs(backend, device)
    model, twin = make_model(device, width=256), make_model("cpu", width=256)
    ema, expected = FastEMA(model, decay=0.5, backend=backend), FastEMA(twin, decay=0.5)
    side = Side(device)
    for seed in range(3):
        move(model, seed)
        move(twin, seed)
        side.follows_main()
        side.is_late()
        with side.entered():
            ema.update()
        expected.update()
        side.precedes_main()  # of the device alone: the host goes on
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        ema.update()
        expected.update()
        others = [torch.full((256, 256), float("nan"), device=device) for _ in range(8)]
        del others
    assert equal(averages(ema), averages(expected))


@pytest.mark.parametrize("device", BOTH)
def test_scratch_of_a_swap_is_not_reused_while_a_forward_reads_it(device: str) -> None:
    """Entered on one stream, read and left on another that is late; then the first stream allocates."""
    model = make_model(device, width=512).to(torch.bfloat16)
    ema = FastEMA(model, decay=0.0)
    features = torch.randn(8, 512, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(features)
        move(model, 1)
        side = Side(device)
        ema.apply_shadow()
        side.follows_main()
        side.is_late()
        with side.entered():
            output = model(features)
            ema.restore()
        others = [torch.full((512, 512), 7.0, device=device, dtype=torch.bfloat16) for _ in range(8)]
        side.precedes_main()
        assert torch.equal(output, expected)
        assert all(bool((other == 7.0).all()) for other in others)


# ---- devices ----

# Only `device` is used; at the end no other GPU may hold a context, which costs some 500 MB of its memory.
_ONE_DEVICE = """
import sys, torch
sys.path.insert(0, "tests")
from accelerator.load import load_if_asked
load_if_asked()
from cases.gpu import IS_CUDA, gpu
from fastema import FastEMA
device = torch.device(sys.argv[1])
model = torch.nn.Linear(64, 64, device=device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for arguments in ({}, {"backend": sys.argv[2]}, {"device": "cpu"}, {"capturable": True}):
    ema = FastEMA(model, decay=0.5, **arguments)
    with torch.no_grad():
        model.weight.fill_(2.0)
    ema.update()
    ema.synchronize()
    with ema.swapped():
        pass
    ema.nonfinite_count(), ema.state_dict(), ema.num_updates
    if arguments.get("device") is None:
        with ema.swapped(in_place=True):
            pass
others = [index for index in range(gpu.device_count()) if index != device.index]
print("contexts", [i for i in others if (torch._C._cuda_hasPrimaryContext(i) if IS_CUDA else gpu.has_context(i))])
print("current", gpu.current_device() if gpu.is_available() else 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "native"), *(pytest.param(f"{DEVICE}:1", name, marks=needs_gpu) for name in BACKENDS)],
)
def test_no_other_gpu_is_touched(device: str, backend: str) -> None:
    if device != "cpu" and gpu.device_count() < 2:
        pytest.skip("one GPU")
    needs(backend, device.partition(":")[0])
    result = subprocess.run(
        [sys.executable, "-c", _ONE_DEVICE, device, backend],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["contexts []", "current 0"]


@pytest.mark.parametrize(("device", "backend"), KERNELS)
def test_more_averages_than_one_launch_holds(device: str, backend: str) -> None:
    """Triton takes 4 in a launch, native 8."""
    needs(backend, device)
    decays = [0.5 + 0.04 * index for index in range(11)]
    model, twin = make_model(device), make_model("cpu")
    together = FastEMA(model, decay=decays, backend=backend)
    apart = [FastEMA(twin, decay=decay) for decay in decays]
    for seed in range(3):
        for each in (model, twin):
            move(each, seed)
        with torch.no_grad():
            for each in (model, twin):
                each[0].bias[1] = float("nan")
        together.update()
        for ema in apart:
            ema.update()
        with torch.no_grad():
            for each in (model, twin):
                each[0].bias[1] = 0.0
    for which, ema in enumerate(apart):
        assert equal(averages(together, which), averages(ema))
    assert together.nonfinite_count() == apart[0].nonfinite_count() == 3


@pytest.mark.parametrize("device", BOTH)
def test_found_inf_of_a_model_on_a_gpu_and_the_cpu(device: str) -> None:
    """Either both parts are averaged or neither, wherever the verdict lies."""
    devices = [device, "cpu"]
    model = nn.ModuleList([nn.Linear(8, 8).to(device) for device in devices])
    ema = FastEMA(model, decay=0.5)
    for where in dict.fromkeys(devices):
        before = averages(ema)
        move(model, 1)
        ema.update(found_inf=torch.ones((), device=where))
        assert equal(averages(ema), before)
        ema.update(found_inf=torch.zeros((), device=where))
        after = averages(ema)
        assert not any(torch.equal(after[name], before[name]) for name in before)


# ---- NCCL ----


@contextmanager
def one_rank(backend: str) -> Iterator[None]:
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("device", "collectives"), [("cpu", "gloo"), pytest.param("cuda", "nccl", marks=[*needs_gpu, needs_cuda])]
)
def test_fsdp2_on_one_card(device: str, collectives: str) -> None:
    twin = make_model(device)
    model = copy.deepcopy(twin)
    features = torch.randn(4, 16, device=device)
    with one_rank(collectives):
        mesh = init_device_mesh(device, (1,))
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        emas = [FastEMA(each, decay=0.5) for each in (model, twin)]
        optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin)]
        for _ in range(3):
            for each, ema, optimizer in zip((model, twin), emas, optimizers, strict=True):
                optimizer.zero_grad()
                each(features).square().mean().backward()
                optimizer.step()
                ema.update()
        sharded, whole = (ema.shadow_state_dict() for ema in emas)
        for name, average in whole.items():
            torch.testing.assert_close(sharded[name].full_tensor(), average)
        live = model(features).detach().clone()
        with emas[0].swapped(), emas[1].swapped():
            torch.testing.assert_close(model(features), twin(features))
        torch.testing.assert_close(model(features).detach(), live)
