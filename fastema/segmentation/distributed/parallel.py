"""The network of a run on all its processes: a replica in each (DistributedDataParallel), or a shard (fully_shard).

Either way a step's gradient is the mean over the images of all processes, as it is in one; and after every step all
have the same weights, the same buffers, and so the same averages.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fastema.segmentation.distributed.process_group import Processes
from fastema.segmentation.model.network import Decoded
from fastema.sharded import is_dtensor, local_part

_CPU = torch.device("cpu")


class Spread:
    """One network on the processes of a run; in a single one, just the network.

    Args:
        net: with the weights to begin with, on its device, all of its parameters trainable.
        processes: that take part, each with such a network.
        device: the network's.
        shard: of weights, gradients and moments each process keeps a part only; the network is a `SegmentationNet`.

    Attributes:
        processes: as given.
        forward: what to call in training in place of the network.
    """

    def __init__(
        self, net: nn.Module, processes: Processes | None = None, device: torch.device = _CPU, shard: bool = False
    ) -> None:
        self.processes = processes or Processes()
        self.forward = net
        saved = net.state_dict().keys()
        self._buffers = [buffer for name, buffer in net.named_buffers() if name in saved]
        self._replicas: DistributedDataParallel | None = None
        self._shards: list[Any] = []
        self._experts: list[list[nn.Module]] = []
        self._chosen = torch.zeros(0, 0, device=device)  # [levels, experts], above 0 if chosen for an image
        if shard:
            self._shard(net, device)
        elif self.processes.world_size > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name in newer torch
                # Frozen levels, and experts that nobody chose, have no gradient. Buffers are seen to in `agree`.
                self.forward = self._replicas = DistributedDataParallel(
                    _NeverAllUsed(net),
                    device_ids=[device] if device.type == "cuda" else None,
                    broadcast_buffers=False,
                    find_unused_parameters=True,
                )

    @property
    def is_sharded(self) -> bool:
        return bool(self._shards)

    # --- training ----------------------------------------------------------------------------------------------------

    @contextmanager
    def exchanging(self, now: bool) -> Iterator[None]:
        """A block for the forward and the backward of a batch, whose gradients are exchanged now or with a later one's.

        The exchange takes the mean over the processes, so a loss must be scaled by their number.
        """
        if self._replicas is not None and not now:
            with self._replicas.no_sync():
                yield
            return
        for part in self._shards:
            part.set_requires_gradient_sync(now, recurse=False)
        yield

    def agree(self, images: int) -> None:
        """Before an optimizer step: buffers become their mean over the processes, by the images that each has had.

        Statistics of a batch are its process's own (there is no SyncBatchNorm); the running ones are everyone's.

        Args:
            images: how many of the step's images this process has had.
        """
        if self.processes.world_size == 1 and not self.is_sharded:
            return
        # In float64, in which the mean of equal float32 values is that value again, whatever the weights.
        parts = [buffer.flatten().double() * images for buffer in self._buffers]
        parts += [self._chosen.flatten().double(), torch.tensor([images], dtype=torch.float64)]
        device = self._chosen.device
        total = torch.cat([part.to(device) for part in parts])
        dist.all_reduce(total)
        *means, chosen, everywhere = total.split([part.numel() for part in parts])
        for buffer, mean in zip(self._buffers, means, strict=True):
            mean = (mean / everywhere).view_as(buffer)
            buffer.copy_(mean if buffer.is_floating_point() else mean.round())
        if self.is_sharded:
            self._forget_unchosen(chosen.view_as(self._chosen))

    # --- shards ------------------------------------------------------------------------------------------------------

    def _shard(self, net: Any, device: torch.device) -> None:
        # Not by expert: which of them run differs from process to process, and what is gathered must not. And not by
        # level: backward begins where forward ends, so to gather twice would save hardly any memory.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mixtures = net.decoder.mixtures
        if mixtures:
            self._experts = [list(mixture.experts) for mixture in mixtures]
            self._chosen = torch.zeros(len(mixtures), len(mixtures[0].experts), device=device)
            net.decoder.register_forward_hook(self._note_experts)  # before FSDP's own: the parameters are whole then
        mesh = init_device_mesh(device.type, (self.processes.world_size,))
        for part in (net.decoder, net):
            fully_shard(part, mesh=mesh, reshard_after_forward=False)
        self._shards = [net, net.decoder]

    def _note_experts(self, decoder: nn.Module, inputs: Any, decoded: Decoded) -> Decoded | None:
        """Notes who was chosen; and gives all others a gradient of 0, since every process must exchange the same."""
        if not torch.is_grad_enabled():
            return None
        self._chosen += decoded.usage
        parameters = [parameter for level in self._experts for expert in level for parameter in expert.parameters()]
        nothing = torch.stack([parameter.flatten()[0] for parameter in parameters]).sum() * 0
        return decoded._replace(balance=decoded.balance + nothing)

    def _forget_unchosen(self, chosen: Tensor) -> None:
        """Experts that no process chose have no gradient, as in a single one; with 0 they would be stepped."""
        for level, shares in enumerate(chosen.tolist()):
            for expert, share in enumerate(shares):
                if share == 0:
                    self._experts[level][expert].zero_grad(set_to_none=True)
        self._chosen.zero_()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A block in which forwards communicate nothing, so that processes may do different ones. All must enter it."""
        for part in self._shards:
            part.unshard()
        try:
            yield
        finally:
            for part in self._shards:
                part.reshard()

    def gathered(self, state: Any) -> Any:
        """A nested state with whole tensors, on the CPU of the first process; elsewhere with None. All must call it.

        Without shards, the state as it is.
        """
        if not self.is_sharded:
            return state
        if isinstance(state, dict):
            return {key: self.gathered(value) for key, value in state.items()}
        if isinstance(state, list | tuple):
            return type(state)(self.gathered(value) for value in state)
        if not is_dtensor(state):
            return state
        tensor = state.full_tensor()
        return tensor.cpu() if self.processes.is_first else None

    def take_shards(self, optimizer: Optimizer) -> None:
        """Of the whole moments that were loaded into an optimizer, keeps the own part."""
        from torch.distributed.tensor import DTensor, Replicate

        for parameter, state in optimizer.state.items() if self.is_sharded else ():
            assert isinstance(parameter, DTensor)
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape == parameter.shape and not is_dtensor(value):
                    mesh = parameter.device_mesh
                    everywhere = DTensor.from_local(value, mesh, [Replicate()], run_check=False)
                    state[name] = everywhere.redistribute(placements=parameter.placements)


class _NeverAllUsed(nn.Module):
    """A network and a parameter without any use.

    Where experts happen to be all chosen, every process would be warned that looking for unused ones is a waste.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.unused = nn.Parameter(torch.zeros(1, device=next(net.parameters()).device))

    def forward(self, images: Tensor) -> Any:
        return self.net(images)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """`nn.utils.clip_grad_norm_`, and the norm, a scalar, before; of sharded parameters all processes must call it."""
    if not any(map(is_dtensor, parameters)):
        return nn.utils.clip_grad_norm_(parameters, limit)
    # torch would do it too, but plans it anew, for seconds, whenever other experts have gradients than before.
    shards = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    square = nn.utils.get_total_norm(shards).square()
    dist.all_reduce(square)
    norm = square.sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for shard in shards:
        shard.mul_(scale)
    return norm


#: Of a single process.
ALONE = Spread(nn.Identity())
