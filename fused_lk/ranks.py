"""Sums over the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks


def check(group: Any) -> None:
    """`group` is a process group that this rank belongs to.

    Raises:
        TypeError: it is something else, a device mesh among others.
    """
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        remedy = "Pass torch.distributed.group.WORLD, or mesh.get_group() of a device mesh."
        checks.fail("group to be a torch.distributed.ProcessGroup that this rank is in", group, remedy, TypeError)


def size(group: Any) -> int:
    """The number of ranks in the group."""
    return dist.get_world_size(group)


def summed(group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each tensor, summed over the ranks, without a gradient. All of them travel in one all-reduce.

    Float64 carries them, in which counts up to 2**53 are exact. Every rank gets the same bits.
    """
    packed = torch.cat([x.detach().double().reshape(-1) for x in tensors])
    dist.all_reduce(packed, group=group)
    parts = packed.split([x.numel() for x in tensors])
    return tuple(part.reshape(x.shape).to(x.dtype) for part, x in zip(parts, tensors, strict=True))
