"""Sums over processes for statistics that may live on another device than the process group can reach."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from dae.distributed import sum_over_processes, world_size


def summed(x: Tensor) -> Tensor:
    """The sum of `x` over all processes, on the device of `x`; NCCL, which only knows GPUs, gets a copy there."""
    device = "cuda" if world_size() > 1 and dist.get_backend() == "nccl" else x.device
    return sum_over_processes(x.to(device, copy=True)).to(x.device)
