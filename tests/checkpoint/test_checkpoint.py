"""Checkpoints: whole at any moment, refused when wrong, and the right weights out of them."""

from __future__ import annotations

import os
import pathlib
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fastema.checkpoint as checkpoint_module
from fastema import FastEMA
from fastema.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def averaged(net: nn.Module) -> FastEMA:
    """An EMA that differs from its model."""
    ema = FastEMA(net, decay=0.5, decay_type="constant")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    ema.update()
    return ema


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def copied(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_everything_comes_back(tmp_path: pathlib.Path) -> None:
    net = model()
    ema = averaged(net)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "a.pth", net=net, ema=ema, optimizer=optimizer, epoch=3, note={"names": ["x"]})

    loaded = load_checkpoint(tmp_path / "a.pth")
    assert set(loaded) == {"net", "ema_net", "ema", "optimizer", "epoch", "note"}
    assert same(loaded["net"], net.state_dict())
    assert same(loaded["ema_net"], ema.shadow_state_dict())
    assert not torch.equal(loaded["net"]["0.weight"], loaded["ema_net"]["0.weight"])
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert (loaded["epoch"], loaded["note"]) == (3, {"names": ["x"]})

    other = model(seed=1)
    fresh = FastEMA(other, decay=0.5, decay_type="constant")
    fresh.load_state_dict(loaded["ema"])
    assert fresh.num_updates == ema.num_updates
    assert same(fresh.shadow_state_dict(), ema.shadow_state_dict())


def test_permissions_are_those_the_umask_asks_for(tmp_path: pathlib.Path) -> None:
    before = os.umask(0o027)
    try:
        save_checkpoint(tmp_path / "a.pth", net=model())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.pth").stat().st_mode) == 0o640


def test_a_symbolic_link_is_followed_not_replaced(tmp_path: pathlib.Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "latest.pth").symlink_to(tmp_path / "store" / "real.pth")
    save_checkpoint(tmp_path / "latest.pth", net=model())
    assert (tmp_path / "latest.pth").is_symlink()
    assert "net" in load_checkpoint(tmp_path / "store" / "real.pth")


# --- what is refused --------------------------------------------------------------------------------------------------


class OtherAverage:
    """An EMA of somebody else's, of which one side alone is known while it is applied."""

    is_applied = True

    def state_dict(self) -> dict[str, Any]:
        return {}

    shadow_state_dict = state_dict


def test_refused_while_another_average_is_applied(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RuntimeError, match="while the EMA weights are applied"):
        save_checkpoint(tmp_path / "a.pth", net=model(), ema=OtherAverage())
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_loaded_is_not_written(tmp_path: pathlib.Path) -> None:
    save_checkpoint(tmp_path / "a.pth", net=model(), epoch=1)
    with pytest.raises(TypeError, match="PosixPath"):
        save_checkpoint(tmp_path / "a.pth", net=model(), folder=pathlib.PosixPath("/data"))
    assert load_checkpoint(tmp_path / "a.pth")["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_ema_net_is_not_a_free_name(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="ema_net"):
        save_checkpoint(tmp_path / "a.pth", net=model(), ema_net={})


def test_a_folder_that_does_not_exist(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*nowhere.*No such file"):
        save_checkpoint(tmp_path / "nowhere" / "a.pth", net=model())


class Malicious:
    """Unpickling this would create a file."""

    def __init__(self, marker: pathlib.Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("writer", ["torch.save", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: pathlib.Path, writer: str) -> None:
    marker = tmp_path / "was_run"
    content = {"net": Malicious(marker)}
    if writer == "torch.save":
        torch.save(content, tmp_path / "evil.pth")
    else:
        (tmp_path / "evil.pth").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not marker.exists()


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file(tmp_path: pathlib.Path, part: float) -> None:
    save_checkpoint(tmp_path / "good.pth", net=model())
    content = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "bad.pth").write_bytes(content[: int(part * len(content))])
    with pytest.raises(CheckpointError, match=r"bad\.pth is not a checkpoint, or is cut short.*there is good\.pth"):
        load_checkpoint(tmp_path / "bad.pth")


def test_not_a_checkpoint(tmp_path: pathlib.Path) -> None:
    (tmp_path / "notes.pth").write_text("lr 0.1 was too high\n")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_checkpoint(tmp_path / "notes.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(CheckpointError, match="holds a Tensor"):
        load_checkpoint(tmp_path / "tensor.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(tmp_path)


def test_a_missing_file_says_what_is_there_instead(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no \*\.pth in"):
        load_checkpoint(tmp_path / "best.pth")
    save_checkpoint(tmp_path / "last.pth", net=model())
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*best\.pth: in .* there is last\.pth"):
        load_checkpoint(tmp_path / "best.pth")
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load_checkpoint(tmp_path / "nowhere" / "best.pth")


# --- atomic -----------------------------------------------------------------------------------------------------------


def test_an_error_during_the_save_leaves_the_old_file_and_nothing_else(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "a.pth", net=model(), epoch=1)
    before = (tmp_path / "a.pth").read_bytes()

    def disk_full(content: Any, file: Any) -> None:
        file.write(b"the first part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.torch, "save", disk_full)
    with pytest.raises(CheckpointError, match=r"No space left on device; what was there before is untouched"):
        save_checkpoint(tmp_path / "a.pth", net=model(), epoch=2)
    assert (tmp_path / "a.pth").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_a_disk_that_fills_up_in_the_middle(tmp_path: pathlib.Path) -> None:
    """The real thing, as far as it can be had: the system refuses to write on, and torch hides why."""
    resource = pytest.importorskip("resource", reason="needs limits on the size of files")
    save_checkpoint(tmp_path / "a.pth", net=model(), epoch=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large; what was there before is untouched"):
            save_checkpoint(tmp_path / "a.pth", net=nn.Linear(500, 500), epoch=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]
    assert load_checkpoint(tmp_path / "a.pth")["epoch"] == 1


# A process that imports torch once, and then forks savers and kills them, each at another moment.
_KILL_SAVERS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from fastema.checkpoint import load_checkpoint, save_checkpoint

torch.set_num_threads(1)
path = Path(sys.argv[1])
random.seed(0)
net = torch.nn.Linear(600, 600)

def save(number):
    with torch.no_grad():
        net.weight.fill_(number)
    save_checkpoint(path, net=net, number=number)

save(0)
killed_in_a_save = 0
for child_number in range(1, 31):
    child = os.fork()
    if child == 0:
        number = child_number * 1_000_000
        while True:
            number += 1
            save(number)
    time.sleep(random.uniform(0.002, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    killed_in_a_save += any(path.parent.glob(".*.tmp"))
    content = load_checkpoint(path)
    assert bool((content["net"]["weight"] == content["number"]).all()), content["number"]
assert content["number"] > 1_000_000, "no child ever finished a save: the test tests nothing"
assert killed_in_a_save > 0, "no child was killed in a save: the test tests nothing"
save(7)
assert [file.name for file in path.parent.iterdir()] == [path.name], "the leftovers of the killed ones are still there"
print("killed in a save:", killed_in_a_save)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_any_moment_the_file_always_loads(tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILL_SAVERS, str(tmp_path / "a.pth")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("killed in a save:")


# --- load_weights -----------------------------------------------------------------------------------------------------


def test_prefer(tmp_path: pathlib.Path) -> None:
    net = model()
    ema = averaged(net)
    save_checkpoint(tmp_path / "both.pth", net=net, ema=ema)
    save_checkpoint(tmp_path / "net.pth", net=net)

    for path, prefer, taken in [
        ("both.pth", "ema", "ema_net"),
        ("both.pth", "net", "net"),
        ("net.pth", "ema", "net"),
        ("net.pth", "net", "net"),
    ]:
        other = model(seed=1)
        assert load_weights(other, tmp_path / path, prefer=prefer) == taken
        expected = ema.shadow_state_dict() if taken == "ema_net" else net.state_dict()
        assert same(other.state_dict(), expected)

    with pytest.raises(ValueError, match="prefer must be 'ema' or 'net', got 'best'"):
        load_weights(model(), tmp_path / "both.pth", prefer="best")


def test_what_load_checkpoint_returned_is_a_source_too(tmp_path: pathlib.Path) -> None:
    net = model()
    save_checkpoint(tmp_path / "a.pth", net=net)
    other = model(seed=1)
    load_weights(other, load_checkpoint(tmp_path / "a.pth"))
    assert same(other.state_dict(), net.state_dict())


def test_weights_of_another_model_change_nothing(tmp_path: pathlib.Path) -> None:
    save_checkpoint(tmp_path / "a.pth", net=nn.Sequential(nn.Linear(3, 4), nn.Linear(7, 2)))
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    before = copied(net)
    with pytest.raises(CheckpointError) as caught:
        load_weights(net, tmp_path / "a.pth")
    message = str(caught.value)
    assert "(2 differences)" in message
    assert "1.weight: [2, 7] in the checkpoint, [2, 4] in the model" in message
    assert "1.bias: only in the checkpoint" in message
    assert same(net.state_dict(), before)


def test_only_the_first_few_differences_are_listed(tmp_path: pathlib.Path) -> None:
    save_checkpoint(tmp_path / "a.pth", net=nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        load_weights(model(), tmp_path / "a.pth")


def test_a_bare_state_dict_is_named_as_such(tmp_path: pathlib.Path) -> None:
    torch.save(model().state_dict(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"no weights under 'net'.*'0\.weight'.*bare state_dict"):
        load_weights(model(), tmp_path / "a.pth")


class Wrapped(nn.Module):
    """Prefixes every name, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net)  # type: ignore[return-value]  # wrapped only: nothing is compiled before a call


def inner_compiled(net: nn.Sequential) -> nn.Sequential:
    net[2] = compiled(net[2])
    return net


WRAPPERS = {
    "plain": lambda net: net,
    "compiled": compiled,
    "ddp": Wrapped,
    "compiled ddp": lambda net: compiled(Wrapped(net)),
    "ddp of compiled": lambda net: Wrapped(compiled(net)),
    "a compiled part": inner_compiled,
}


@pytest.mark.parametrize("loading", WRAPPERS)
@pytest.mark.parametrize("saving", WRAPPERS)
def test_wrapped_models_exchange_weights(tmp_path: pathlib.Path, saving: str, loading: str) -> None:
    save_checkpoint(tmp_path / "a.pth", net=WRAPPERS[saving](model()))
    other = WRAPPERS[loading](model(seed=1))
    load_weights(other, tmp_path / "a.pth")
    for loaded, expected in zip(other.parameters(), model().parameters(), strict=True):
        assert torch.equal(loaded, expected)


def test_a_model_whose_only_part_is_called_module(tmp_path: pathlib.Path) -> None:
    save_checkpoint(tmp_path / "a.pth", net=Wrapped(model()))
    other = Wrapped(model(seed=1))
    load_weights(other, tmp_path / "a.pth")
    assert torch.equal(other.module[0].weight, model()[0].weight)  # type: ignore[index]


def wrappers() -> dict[str, Callable[[nn.Module], nn.Module]]:
    class Engine(nn.Module):  # DeepSpeed's keeps the model as `module`
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    sys.modules["deepspeed"].DeepSpeedEngine = Engine  # type: ignore[attr-defined]
    return {
        "none": lambda model: model,
        "parallel": nn.DataParallel,
        "compiled": lambda model: torch.compile(model, backend="eager"),  # type: ignore[return-value]
        "both": lambda model: torch.compile(nn.DataParallel(torch.compile(model, backend="eager"))),  # type: ignore
        "engine": Engine,
        "engine of both": lambda model: Engine(nn.DataParallel(model)),
    }


@pytest.mark.parametrize("kind", ["none", "parallel", "compiled", "both", "engine", "engine of both"])
@pytest.mark.parametrize("given", ["wrapped", "inner"])
def test_one_rule_for_names(kind: str, given: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state has the keys of the model inside, whichever of the two the average and the file are made of."""
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    inner.add_module("module", nn.Linear(2, 2))
    wrapped = wrappers()[kind](inner)
    ema = FastEMA(wrapped, 0.5)
    expected = set(inner.state_dict())
    save_checkpoint(tmp_path / "c.pth", net=wrapped if given == "wrapped" else inner, ema=ema)
    content = load_checkpoint(tmp_path / "c.pth")
    states = [content["net"], content["ema_net"], content["ema"]["shadow"], ema.shadow_state_dict()]
    with ema.swapped():
        save_checkpoint(tmp_path / "inside.pth", net=wrapped if given == "wrapped" else inner, ema=ema)
        states += [ema.live_state_dict(), ema.live_state_dict(wrapped), load_checkpoint(tmp_path / "inside.pth")["net"]]
    save_checkpoint(tmp_path / "alone.pth", net=wrapped)
    states.append(load_checkpoint(tmp_path / "alone.pth")["net"])
    assert all(set(state) == expected for state in states)
    inner.load_state_dict(ema.shadow_state_dict())
    for model in (wrapped, inner):
        load_weights(model, content)
    if given == "wrapped":
        save_checkpoint(tmp_path / "c.pth", net=inner, ema=FastEMA(inner))
        load_weights(wrapped, tmp_path / "c.pth")
