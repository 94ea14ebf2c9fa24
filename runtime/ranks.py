"""The processes that train together, one a device, as torchrun starts them; alone, every method does nothing.

Data parallel: each process sees its own windows, and gradients are averaged before the update, so that all keep the
same weights. Knows torch.distributed; not what is trained.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

_BUCKET_BYTES = 256 << 20  # of gradients sent at once


@dataclass(frozen=True, slots=True)
class Ranks:
    """rank of `world`; `local`: which of this host's devices."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def join(cls, device: str) -> Ranks:
        """From WORLD_SIZE, RANK and LOCAL_RANK; joins the group when there is more than one."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        return cls(dist.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")))

    def leave(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def average(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
            tensor.div_(self.world)
        return tensor

    def share_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first process's tensor, in place."""
        if self.world > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Every parameter's gradient becomes the mean over all processes; all must have the same ones."""
        if self.world == 1:
            return
        bucket: list[torch.Tensor] = []
        for gradient in [p.grad for p in parameters if p.grad is not None]:
            bucket.append(gradient)
            if sum(g.nbytes for g in bucket) >= _BUCKET_BYTES:
                self._average_all(bucket)
                bucket = []
        self._average_all(bucket)

    def _average_all(self, tensors: list[torch.Tensor]) -> None:
        if not tensors:
            return
        flat = self.average(torch.cat([t.flatten() for t in tensors]))
        for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
