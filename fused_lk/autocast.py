"""What a matrix product computes in: its input's dtype, or that of the `torch.autocast` around it."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that `torch.nn.functional.linear` would compute `x` in; autocast leaves float64 alone."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
