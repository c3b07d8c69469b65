"""The network on all processes of a run: a replica in each (DistributedDataParallel) or a shard (fully_shard).

Either way a step's gradient is the mean over the images of all processes, and after every step all have the same
weights and buffers, and so the same averages.
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

from fastema.core.sharded import is_dtensor, local_part
from fastema.segmentation.devices import CPU
from fastema.segmentation.distributed.process_group import Processes
from fastema.segmentation.model.network import Decoded


class ParallelModel:
    """A network on the processes of a run; with a single one, just the network.

    Args:
        net: on its device, all of its parameters trainable, the same in every process.
        processes: of the run.
        device: the network's.
        shard: keep only a part of weights, gradients and moments in each process; `net` is a `SegmentationNet`.

    Attributes:
        processes: as given.
        forward: to call in training in place of the network.
    """

    def __init__(
        self, net: nn.Module, processes: Processes | None = None, device: torch.device = CPU, shard: bool = False
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
                warnings.simplefilter("ignore", FutureWarning)  # newer torch renames broadcast_buffers
                # Frozen levels and unchosen experts have no gradient. `sync_buffers` is for the buffers.
                self.forward = self._replicas = DistributedDataParallel(
                    _WithUnusedParameter(net),
                    device_ids=None if device.type == "cpu" else [device],
                    broadcast_buffers=False,
                    find_unused_parameters=True,
                )

    @property
    def is_sharded(self) -> bool:
        return bool(self._shards)

    @contextmanager
    def reduce_gradients(self, now: bool) -> Iterator[None]:
        """Run a batch's forward and backward in a block; average its gradients now, or with a later batch's.

        The average is over the processes, so a loss must be scaled by their number.
        """
        if self._replicas is not None and not now:
            with self._replicas.no_sync():
                yield
            return
        for part in self._shards:
            part.set_requires_gradient_sync(now, recurse=False)
        yield

    def sync_buffers(self, images: int) -> None:
        """Average the buffers over the processes, before an optimizer step.

        A batch's statistics are its process's own (there is no SyncBatchNorm); the running ones become everyone's.

        Args:
            images: of the step, in this process; the weight of its buffers.
        """
        if self.processes.world_size == 1 and not self.is_sharded:
            return
        # In float64, in which the weighted mean of equal float32 values is that value.
        parts = [buffer.flatten().double() * images for buffer in self._buffers]
        parts += [self._chosen.flatten().double(), torch.tensor([images], dtype=torch.float64)]
        device = self._chosen.device
        total = torch.cat([part.to(device) for part in parts])
        dist.all_reduce(total)
        *means, chosen, all_images = total.split([part.numel() for part in parts])
        for buffer, mean in zip(self._buffers, means, strict=True):
            mean = (mean / all_images).view_as(buffer)
            buffer.copy_(mean if buffer.is_floating_point() else mean.round())
        if self.is_sharded:
            self._drop_unchosen_gradients(chosen.view_as(self._chosen))

    # --- shards ------------------------------------------------------------------------------------------------------

    def _shard(self, net: Any, device: torch.device) -> None:
        # Not by expert: which ones run differs between processes, and all must gather the same. Not by level: backward
        # begins where forward ends, so gathering twice would save hardly any memory.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mixtures = net.decoder.mixtures
        if mixtures:
            self._experts = [list(mixture.experts) for mixture in mixtures]
            self._chosen = torch.zeros(len(mixtures), len(mixtures[0].experts), device=device)
            net.decoder.register_forward_hook(self._record_experts)  # before FSDP's own, while parameters are whole
        mesh = init_device_mesh(device.type, (self.processes.world_size,))
        for part in (net.decoder, net):
            fully_shard(part, mesh=mesh, reshard_after_forward=False)
        self._shards = [net, net.decoder]

    def _record_experts(self, decoder: nn.Module, inputs: Any, decoded: Decoded) -> Decoded | None:
        """Record the chosen experts, and give the others a gradient of 0, since all processes must reduce the same."""
        if not torch.is_grad_enabled():
            return None
        self._chosen += decoded.usage
        parameters = [parameter for level in self._experts for expert in level for parameter in expert.parameters()]
        zero = torch.stack([parameter.flatten()[0] for parameter in parameters]).sum() * 0
        return decoded._replace(balance=decoded.balance + zero)

    def _drop_unchosen_gradients(self, chosen: Tensor) -> None:
        # An expert that no process chose must not be stepped: AdamW would, with a gradient of 0.
        for level, shares in enumerate(chosen.tolist()):
            for expert, share in enumerate(shares):
                if share == 0:
                    self._experts[level][expert].zero_grad(set_to_none=True)
        self._chosen.zero_()

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Gather the parameters for a block, so that its forwards communicate nothing. All processes must enter it."""
        for part in self._shards:
            part.unshard()
        try:
            yield
        finally:
            for part in self._shards:
                part.reshard()

    def gather_state(self, state: Any) -> Any:
        """Return a nested state with whole tensors on the CPU, in other processes than the first with None.

        All processes must call this. Without shards, it returns the state as it is.
        """
        if not self.is_sharded:
            return state
        if isinstance(state, dict):
            return {key: self.gather_state(value) for key, value in state.items()}
        if isinstance(state, list | tuple):
            return type(state)(self.gather_state(value) for value in state)
        if not is_dtensor(state):
            return state
        tensor = state.full_tensor()
        return tensor.cpu() if self.processes.is_first else None

    def shard_optimizer_state(self, optimizer: Optimizer) -> None:
        """Replace whole moments, as loaded from a checkpoint, by this process's shards."""
        from torch.distributed.tensor import DTensor, Replicate

        for parameter, state in optimizer.state.items() if self.is_sharded else ():
            assert isinstance(parameter, DTensor)
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape == parameter.shape and not is_dtensor(value):
                    replicated = DTensor.from_local(value, parameter.device_mesh, [Replicate()], run_check=False)
                    state[name] = replicated.redistribute(placements=parameter.placements)


class _WithUnusedParameter(nn.Module):
    """A network with a parameter that is never used.

    DDP warns that `find_unused_parameters` is a waste where, by chance, every expert is chosen.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.unused = nn.Parameter(torch.zeros(1, device=next(net.parameters()).device))

    def forward(self, images: Tensor) -> Any:
        return self.net(images)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Do as `nn.utils.clip_grad_norm_`; with sharded parameters, all processes must call this.

    Returns:
        The norm before clipping, a scalar.
    """
    if not any(map(is_dtensor, parameters)):
        return nn.utils.clip_grad_norm_(parameters, limit)
    # torch's own plans it again, for seconds, whenever other experts have gradients than before.
    shards = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    square = nn.utils.get_total_norm(shards).square()
    dist.all_reduce(square)
    norm = square.sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for shard in shards:
        shard.mul_(scale)
    return norm


#: The parallel model of a single process.
ALONE = ParallelModel(nn.Identity())
