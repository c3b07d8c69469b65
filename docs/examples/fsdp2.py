"""FSDP2: every rank averages and swaps its own shards; a sharded checkpoint saves and resumes the average.

torchrun --nproc-per-node 2 docs/examples/fsdp2.py
"""

from __future__ import annotations

import shutil
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from fastema import FastEMA


def new_net() -> nn.Module:
    torch.manual_seed(0)  # every rank builds the same weights, then keeps its shards
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    mesh = dist.init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    return fully_shard(net, mesh=mesh)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    inputs = torch.randn(16, 8, generator=generator)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return inputs.to(device), inputs.sum(1, keepdim=True).to(device)


def main(steps: int = 100) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    net = new_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    ema = FastEMA(net, decay=0.9)
    ema.attach(optimizer)
    for step in range(steps):
        inputs, targets = batch(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(net(inputs), targets).backward()
        optimizer.step()

    inputs, targets = batch(steps)
    with torch.no_grad():
        base = nn.functional.mse_loss(net(inputs), targets)
        with ema.swapped():
            averaged = nn.functional.mse_loss(net(inputs), targets)
            # On every rank; the whole averaged model comes to rank 0.
            full = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            shapes = {name: tuple(tensor.shape) for name, tensor in full.items()}

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    dcp.save({"ema": ema.state_dict()}, checkpoint_id=folder[0])
    resumed = FastEMA(new_net(), decay=0.9)
    state = {"ema": resumed.state_dict()}
    dcp.load(state, checkpoint_id=folder[0])
    resumed.load_state_dict(state["ema"])
    if dist.get_rank() == 0:
        print(f"loss on rank 0: {base:.4f}, of the average {averaged:.4f}; resumed after {resumed.num_updates} updates")
        print(f"the whole average: {shapes}")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(str(folder[0]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
