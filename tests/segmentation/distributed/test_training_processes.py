"""One training on two processes over gloo: the same as in one process; and failures of one of them.

Only the decoder trains where a run is held to one in a single process: the backbone's BatchNorm takes its statistics
from a process's own share of a batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from fastema.segmentation.train_extra import missing_packages

if missing_packages():
    pytest.skip(f"the train extra is not installed: {missing_packages()}", allow_module_level=True)

import torch
import torch.distributed as dist

from cases.distributed import Rank, on_ranks
from fastema import cli
from fastema.checkpoint import load_checkpoint
from fastema.errors import UserError
from fastema.segmentation.data.loaders import ValidationSet, validation_loader
from fastema.segmentation.data.synthetic import ensure_dataset
from fastema.segmentation.distributed.parallel import ParallelModel
from fastema.segmentation.distributed.process_group import Processes, pad_batches, process_group
from fastema.segmentation.eval.scores import evaluate
from fastema.segmentation.model.load import load_net, read_checkpoint
from fastema.segmentation.train import trainer as trainer_module
from fastema.segmentation.train.trainer import Trainer
from segmentation.commands import TIMEOUT, Command
from segmentation.runs import Pairs, tiny_options, tiny_pairs, tiny_run

CPU = torch.device("cpu")
# Nine images in batches of four: of the last one the second process has none.
UNEVEN = 9


def only_decoder(epochs: int) -> dict[str, Any]:
    """Return options whose rate does not depend on the number of epochs, for runs that resume each other.

    A gradient that is scaled wrongly shows in moments that nothing has clipped.
    """
    averages = {"use_ema": True, "ema_decay": 0.9}
    return {"epochs": epochs, "stage1_epochs": epochs, "scheduler": "none", "clip_grad": 0.0, **averages}


def uneven_pairs(folder: Path) -> Pairs:
    training, validation = tiny_pairs(folder)
    return training[:UNEVEN], [*validation, training[UNEVEN]]  # five to validate on


def trained(processes: Processes, folder: Path, **changes: Any) -> Trainer:
    """Train to the last epoch, without pictures."""
    for writer in ("write_curves", "write_predictions"):
        setattr(trainer_module, writer, lambda *_: None)
    pairs = processes.from_first(lambda: uneven_pairs(folder.parent))
    folder.mkdir(parents=True, exist_ok=True)
    run = tiny_run(pairs, tiny_options(folder, **changes), processes=processes)
    run.fit()
    return run


def group(rank: Rank) -> Processes:
    return Processes(rank.rank, rank.world, rank.rank, launched=True)


def assert_close_values(one: Any, other: Any, where: str = "") -> None:
    """Assert that nested values are equal up to rounding.

    Where a gradient is nothing but rounding, AdamW makes a whole step of its sign, so weights tell less than moments.
    """
    if isinstance(one, torch.Tensor):
        limit = 1e-6 if where.startswith("optimizer") else 1e-3
        torch.testing.assert_close(other, one, rtol=1e-3, atol=limit, msg=lambda text: f"{where}: {text}")
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_close_values(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_close_values(*pair, f"{where}/{index}")
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-4), where
    else:
        assert one == other, where


def assert_same_training(first: Path, second: Path) -> None:
    """Assert that two checkpoints are of the same training."""
    one, other = load_checkpoint(first), load_checkpoint(second)
    assert one.keys() == other.keys()
    for name in ("net", "ema_net", "ema", "optimizer", "scaler", "epoch", "ema_start_epoch", "bests"):
        assert_close_values(one[name], other[name], name)
    for ours, theirs in zip(one["history"], other["history"], strict=True):
        for name in ("epoch", "loss", "iou", "ema_iou", "lr", "expert_usage"):
            assert_close_values(ours[name], theirs[name], f"history/{name}")


def digest(tensors: dict[str, Any]) -> str:
    """Hash every bit of a state."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


# --- on two processes that are started once ---------------------------------------------------------------------------


@on_ranks(2)
def test_two_processes_train_as_one(rank: Rank) -> None:
    ways: dict[str, dict[str, Any]] = {
        "replicas": {},
        "replicas-batches": {"batch_size": 2, "accumulation_steps": 2},
        "shards-batches": {"batch_size": 2, "accumulation_steps": 2, "fsdp": True},
    }
    for way, changes in ways.items():
        trained(group(rank), rank.folder / way, **{**only_decoder(1), **changes})
    if rank.rank == 0:
        trained(Processes(), rank.folder / "alone", **only_decoder(1))
        for way in ways:
            assert_same_training(rank.folder / "alone" / "last.pth", rank.folder / way / "last.pth")


@on_ranks(2)
def test_shadows_and_weights_are_the_same_on_all_replicas(rank: Rank) -> None:
    """Also with experts that one process did not choose, BatchNorm, and several averages."""
    processes = group(rank)
    experts = {"num_experts": 3, "top_k": 1}
    averages = {"use_ema": True, "ema_decays": (0.9, 0.5), "ema_decay_type": "constant"}
    run = trained(processes, rank.folder / "run", batch_size=2, epochs=1, **experts, **averages)
    assert run.ema is not None
    states = (run.net.state_dict(), run.ema.shadow_state_dict(0), run.ema.shadow_state_dict(1))
    digests = processes.gather([digest(state) for state in states])
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 3
    histories = processes.gather([replace(record, seconds=0.0, data_wait=0.0) for record in run.history])
    assert histories[0] == histories[1]
    if rank.rank == 0:
        assert_same_ious(run, rank.folder / "run" / "last.pth")


@on_ranks(2)
def test_buffers_become_their_mean_over_the_images(rank: Rank) -> None:
    net = torch.nn.BatchNorm1d(2)
    parallel = ParallelModel(net, group(rank))
    mean, batches = net.get_buffer("running_mean"), net.get_buffer("num_batches_tracked")
    mean.copy_(torch.tensor([rank.rank, 0.1]))
    batches.fill_(7)
    for images in ((3, 1), (1, 2), (5, 0)):  # what is alike stays so, to the bit
        parallel.sync_buffers(images[rank.rank])
    assert mean.tolist() == torch.tensor([0.25, 0.1]).tolist()
    assert batches.item() == 7
    mean.fill_(rank.rank)
    parallel.sync_buffers((5, 0)[rank.rank])
    assert mean.tolist() == [0, 0]


@on_ranks(2)
def test_experts_that_nobody_chose_are_left_alone_in_shards_as_in_replicas(rank: Rank) -> None:
    """Each parameter has been stepped as often, which the optimizer counts."""
    options = {"num_experts": 3, "top_k": 1, "use_ema": True, "batch_size": 2, "clip_grad": 0.5, "epochs": 1}
    options["stage1_epochs"] = 1
    for way in (False, True):
        run = trained(group(rank), rank.folder / f"shard-{way}", fsdp=way, **options)
    if rank.rank == 0:
        paths = [rank.folder / f"shard-{way}" / "last.pth" for way in (False, True)]
        assert_same_training(*paths)
        steps = {int(state["step"]) for state in load_checkpoint(paths[0])["optimizer"]["state"].values()}
        assert len(steps) > 1  # otherwise every expert was chosen
        assert_same_ious(run, paths[1])


@on_ranks(2)
def test_a_run_goes_on_with_another_number_of_processes(rank: Rank) -> None:
    """Two with replicas, then one, then two with shards: the same as one throughout."""
    processes, last = group(rank), rank.folder / "run" / "last.pth"
    trained(processes, last.parent, **only_decoder(1))
    processes.gather(None)  # it is written
    if rank.rank == 0:
        trained(Processes(), last.parent, resume_from=last, **only_decoder(2))
    processes.gather(None)
    trained(processes, last.parent, resume_from=last, fsdp=True, **only_decoder(3))
    if rank.rank == 0:
        trained(Processes(), rank.folder / "alone", **only_decoder(3))
        assert_same_training(rank.folder / "alone" / "last.pth", last)


def assert_same_ious(run: Trainer, path: Path) -> None:
    """Assert that an epoch's IoU is what one process finds with the checkpoint, to the last bit."""
    _, validation = uneven_pairs(path.parent.parent)
    loader = validation_loader(ValidationSet(validation, 64), 4, 0)
    checkpoint = read_checkpoint(path)
    found = [fmean(evaluate(load_net(checkpoint, CPU, name), loader, CPU)) for name in ("net", "ema_net")]
    assert found == [run.history[-1].iou, run.history[-1].ema_iou]


# --- whole commands ---------------------------------------------------------------------------------------------------

TINY = "--backbone mobilenetv3_small_050 --no-pretrained --img-size 64 --batch-size 4 --val-fraction 0.3 --device cpu"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_dataset(tmp_path_factory.mktemp("data"), seed=0, count=15, size=64)


def environment(**more: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    # The host's own name may not resolve.
    return {**own, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"), **more}


def test_torchrun_trains_and_one_process_evaluates_the_same(data: Path, tmp_path: Path) -> None:
    arguments = f"train --dataset-path {data} --checkpoint-dir {tmp_path} {TINY} --num-experts 2 --use-ema --epochs 2"
    launcher = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 -m fastema"
    command = [sys.executable, *launcher.split(), *arguments.split()]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert "on cpu, on 2 processes" in done.stdout
    lines = re.findall(r"^Epoch (\d).* IoU: (\d\.\d{4}) \(base\) \| EMA IoU: (\d\.\d{4})", done.stdout, re.MULTILINE)
    assert [line[0] for line in lines] == ["1", "2"]  # said once, not by each
    assert "arning" not in done.stderr
    last = load_checkpoint(tmp_path / "last.pth")["history"][-1]
    scores = evaluated(tmp_path / "last.pth", data, tmp_path / "scores.json")
    assert scores == [last["iou"], last["ema_iou"]]
    assert [f"{score:.4f}" for score in scores] == [*lines[-1][1:]]
    assert (tmp_path / "predictions.png").exists()


def evaluated(checkpoint: Path, data: Path, scores: Path) -> list[float]:
    arguments = ["--dataset-path", str(data), "--split", "validation", "--device", "cpu", "--json", str(scores)]
    assert cli.main(["evaluate", str(checkpoint), *arguments]) == 0
    written = json.loads(scores.read_text())
    return [weights["means"]["iou"] for weights in written["weights"]]


class Run:
    """Two processes as torchrun starts them, of a training that does not end by itself."""

    def __init__(self, data: Path, folder: Path, *more: str) -> None:
        # As torchrun does, this process keeps the store, at a port that is free.
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        arguments = [
            "train",
            "--dataset-path",
            str(data),
            "--checkpoint-dir",
            str(folder / "run"),
            *TINY.split(),
            *more,
        ]
        launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
        self.ranks = [
            Command(
                folder / f"rank{rank}",
                [*arguments, "--num-experts", "0", "--epochs", "999"],
                environment(RANK=str(rank), LOCAL_RANK=str(rank), TORCHELASTIC_USE_AGENT_STORE="True", **launcher),
            )
            for rank in range(2)
        ]

    def ends(self) -> list[tuple[int, list[str]]]:
        """Return each process's status and its error lines."""
        ends = []
        for command in self.ranks:
            status = command.end()
            assert "Traceback" not in command.errors, command.errors
            ends.append((status, [line for line in command.errors.splitlines() if line.startswith("fastema:")]))
        return ends


@pytest.fixture
def started() -> Iterator[list[Run]]:
    """Kill the runs at the end of the test."""
    runs: list[Run] = []
    yield runs
    for run in runs:
        for command in run.ranks:
            command.process.kill()
            command.process.join()


def test_a_process_that_is_killed_ends_the_others(data: Path, tmp_path: Path, started: list[Run]) -> None:
    run = Run(data, tmp_path)
    started.append(run)
    run.ranks[0].wait_for("Epoch 2:")  # what the first left is written
    run.ranks[1].process.kill()
    (status, said), (killed, _) = run.ends()
    assert killed == -signal.SIGKILL
    assert status == 2
    assert len(said) == 1
    assert said[0].startswith("fastema: error: another process of this run is gone, killed or out of memory maybe (")
    assert load_checkpoint(tmp_path / "run" / "last.pth")["epoch"] >= 1


def test_an_error_in_one_process_is_said_once_and_ends_all(data: Path, tmp_path: Path, started: list[Run]) -> None:
    own = tmp_path / "data"
    own.mkdir()
    for folder in data.iterdir():
        (own / folder.name).symlink_to(folder)
    run = Run(own, tmp_path)
    started.append(run)
    run.ranks[0].wait_for("Epoch 2:")  # what the first left is written
    for folder in own.iterdir():
        folder.unlink()
    ends = run.ends()
    assert all(status for status, _ in ends)
    lines = [line for _, said in ends for line in said]
    assert len(lines) == 1, lines
    (line,) = lines
    assert line.startswith("fastema: error: ")
    assert str(own) in line


def test_a_terminated_run_says_once_how_to_go_on(data: Path, tmp_path: Path, started: list[Run]) -> None:
    run = Run(data, tmp_path, "--num-workers", "1")
    started.append(run)
    run.ranks[0].wait_for("Epoch 2:")  # what the first left is written
    for command in run.ranks:  # and to those that read images, as torchrun and schedulers do
        command.signal_group(signal.SIGTERM)
    ends = run.ends()
    assert sorted(status for status, _ in ends) == [1, 143]
    (line,) = [line for _, said in ends for line in said]
    assert line == f"fastema: terminated: go on with --resume-from {tmp_path / 'run' / 'last.pth'}"


def test_what_is_wrong_for_all_is_said_once(data: Path, tmp_path: Path, started: list[Run]) -> None:
    run = Run(data, tmp_path, "--lr", "0")
    started.append(run)
    ends = run.ends()
    assert sorted(status for status, _ in ends) == [1, 2]
    assert [line for _, said in ends for line in said] == ["fastema: error: --lr must be a number above 0, got 0.0"]


# --- alone ------------------------------------------------------------------------------------------------------------


def test_shards_need_torchrun(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--dataset-path", str(data), "--checkpoint-dir", str(tmp_path / "run"), *TINY.split()]
    assert cli.main([*arguments, "--fsdp"]) == 2
    assert "--fsdp spreads the network over processes, and this is only one" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "images", "message"),
    [
        ({"batch_size": 8}, 99, "--batch-size 8 cannot be shared evenly by 3 processes"),
        ({"batch_size": 6, "stage2_batch_size": 4}, 99, "--stage2-batch-size 4 cannot be shared evenly by 3"),
        ({"batch_size": 6}, 2, "3 processes cannot share 2 training images"),
    ],
)
def test_what_so_many_processes_cannot_share(
    changes: dict[str, int], images: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        Processes(world_size=3).check(tiny_options(tmp_path, **changes), images)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Processes(rank=3, world_size=4, local_rank=1)
    assert two.device("cpu") == CPU
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(UserError, match="there are 1 GPUs here, and process 2 of this machine needs one of its own"):
        two.device("cuda")
    with pytest.raises(UserError, match="--device cuda:0 is one GPU, and 4 processes need one each"):
        two.device("cuda:0")


@pytest.mark.parametrize(
    ("kind", "backend"), [("cuda", "cpu:gloo,cuda:nccl"), ("xpu", "cpu:gloo,xpu:xccl"), ("mps", "gloo")]
)
def test_tensors_are_sent_over_the_backend_of_their_accelerator(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 1)]))
    chosen: list[str] = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: chosen.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with process_group():
        assert chosen == [backend]


def test_shares_become_the_whole_again(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(range(7))
    for world_size in (1, 2, 3, 7, 9):
        shares = [whole[rank::world_size] for rank in range(world_size)]
        processes = Processes(world_size=world_size)
        monkeypatch.setattr(Processes, "gather", lambda self, share, shares=shares: shares)
        assert processes.gather_shares(shares[0]) == whole


def test_a_process_goes_along_with_its_last_batch() -> None:
    assert list(pad_batches("ab", 2)) == [("a", True), ("b", True)]
    assert list(pad_batches("ab", 4)) == [("a", True), ("b", True), ("b", False), ("b", False)]


def test_one_process_has_no_peers() -> None:
    alone = Processes()
    assert alone.is_first
    assert alone.gather("own") == ["own"]
    assert alone.from_first(lambda: "own") == "own"
    assert alone.gather_shares([1, 2]) == [1, 2]
    assert replace(alone, rank=1).is_first is False
