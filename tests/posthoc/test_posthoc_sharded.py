"""Snapshots of models on several processes: shards written by all of them, read in one; one writer under DDP."""

from __future__ import annotations

import contextlib
import copy
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cases.distributed import Rank, on_ranks
from fastema import FastEMA
from fastema.posthoc import SnapshotError, Snapshots, synthesize
from fastema.posthoc import snapshot_files as files

pytest.importorskip("safetensors")

STORED = [0.05, 0.10]


class Net(nn.Module):
    """A layer of 7 rows over 2 ranks, and a scale that leaves one rank without a part."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 7)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))


def make_net(shard: bool) -> Net:
    torch.manual_seed(0)
    net = Net()
    if shard:
        fully_shard(net)
    return net


def run(folder: Path, net: Net, steps: int, dtype: torch.dtype = torch.float32) -> FastEMA:
    ema = FastEMA(net, decay_type="power", sigma_rel=STORED)
    snapshots = Snapshots(folder, ema, every=5, dtype=dtype, limit=3, verbose=False)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.01 * step
            net.calls += 1  # type: ignore[operator]
        ema.update()
        snapshots.save()
    return ema


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


@on_ranks(2)
def test_shards_are_read_in_one_process(rank: Rank) -> None:
    run(rank.folder / "sharded", make_net(shard=True), 20)
    if rank.rank == 0:
        assert len(files.paths_in(rank.folder / "sharded")) == 3
    dist.barrier()
    alone = rank.folder / f"alone-{rank.rank}"
    if rank.rank == 0:
        run(alone, make_net(shard=False), 20)
        for sigma_rel in (0.05, 0.07, 0.1):
            got, expected = (synthesize(each, sigma_rel=sigma_rel) for each in (rank.folder / "sharded", alone))
            assert got.error == expected.error
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6)
        make_net(shard=False).load_state_dict(got)


@on_ranks(2)
def test_a_stored_average_comes_back_exactly(rank: Rank) -> None:
    ema = run(rank.folder, make_net(shard=True), 10)
    for which, sigma_rel in enumerate(STORED):
        kept = whole(dict(ema.shadow_state_dict(which)))
        found = synthesize(rank.folder, sigma_rel=sigma_rel)
        assert found.error == 0.0 and all(torch.equal(found[name], value) for name, value in kept.items())


@on_ranks(2)
def test_float16_shards(rank: Rank) -> None:
    run(rank.folder / "16", make_net(shard=True), 10, torch.float16)
    run(rank.folder / "32", make_net(shard=True), 10)
    narrow, wide = synthesize(rank.folder / "16", sigma_rel=0.07), synthesize(rank.folder / "32", sigma_rel=0.07)
    assert 0 < narrow.rounding < 1e-3
    torch.testing.assert_close(narrow["enter.weight"], wide["enter.weight"], rtol=2e-3, atol=1e-3)


@on_ranks(2)
def test_what_float16_cannot_hold_is_refused_on_every_process(rank: Rank) -> None:
    net = make_net(shard=True)
    if rank.rank == 0:
        with torch.no_grad():
            net.enter.weight.to_local()[0] = 1e5  # type: ignore[union-attr, operator, index]
    with pytest.raises(ValueError, match=r"'0/enter.weight' has values beyond 65,504"):
        run(rank.folder, net, 10, torch.float16)
    assert not files.paths_in(rank.folder)


@on_ranks(2)
def test_a_damaged_shard_is_found(rank: Rank) -> None:
    run(rank.folder, make_net(shard=True), 10)
    dist.barrier()
    if rank.rank == 0:
        shard = sorted(files.paths_in(rank.folder)[10].glob("*.distcp"))[0]
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        with pytest.raises(SnapshotError, match="checksum does not match"):
            synthesize(rank.folder, sigma_rel=0.07)
        shard.unlink()
        with pytest.raises(SnapshotError, match="is missing"):
            synthesize(rank.folder, sigma_rel=0.07)


@on_ranks(2)
def test_a_resumed_sharded_run_sets_later_snapshots_aside(rank: Rank) -> None:
    run(rank.folder, make_net(shard=True), 20)
    dist.barrier()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run(rank.folder, make_net(shard=True), 5)
    told = [str(each.message) for each in seen if "later than this run" in str(each.message)]
    assert len(told) == (1 if rank.rank == 0 else 0)
    dist.barrier()
    assert list(files.paths_in(rank.folder)) == [5]


@on_ranks(2)
def test_only_the_process_that_writes_reads_the_folder(rank: Rank) -> None:
    for shard in (True, False):
        folder = rank.folder / str(shard)
        run(folder, make_net(shard), 10)
        dist.barrier()
        # On the others a snapshot that is being set aside, or deleted, would be an error.
        is_writer = rank.rank == 0
        reading = (
            contextlib.nullcontext() if is_writer else mock.patch.object(files, "manifest_of", side_effect=OSError)
        )
        with reading, pytest.warns(match="later than this run") if is_writer else contextlib.nullcontext():
            run(folder, make_net(shard), 5)
        dist.barrier()
        assert list(files.paths_in(folder)) == [5]


@on_ranks(2)
def test_snapshots_of_another_model_are_refused_on_every_process(rank: Rank) -> None:
    run(rank.folder, make_net(shard=True), 5)
    dist.barrier()
    other = nn.Linear(3, 3)
    fully_shard(other)
    with pytest.raises(SnapshotError, match="of another model or run"):
        Snapshots(rank.folder, FastEMA(other, decay_type="power", sigma_rel=STORED), verbose=False)


@on_ranks(2)
def test_one_process_writes_where_all_have_the_same(rank: Rank) -> None:
    ema = FastEMA(make_net(shard=False), decay_type="power", sigma_rel=STORED)
    snapshots = Snapshots(rank.folder, ema, verbose=False)
    ema.update()
    assert (snapshots.save() is None) == (rank.rank != 0)
    dist.barrier()
    found = synthesize(rank.folder, sigma_rel=0.05)
    assert all(torch.equal(found[name], value) for name, value in copy.deepcopy(ema.shadow_state_dict(0)).items())
