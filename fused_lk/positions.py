"""Objectives and weights over draft positions, as compositions of the primitive.

They are ordinary PyTorch on what `lk_divergences` gives per token, in the draft's shape. Positions run along the
dimension `dim`: 0 for `Pairs.ttt` and lists, -1 for `Pairs.blocks`. The other dimensions number the blocks.
`supervised` (bool, the same shape; `Pairs.supervised`) says which tokens count. The others are left out of all products
and sums. Nothing here waits for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks


def accepted_prefixes(acceptance: Tensor, supervised: Tensor, dim: int = 0) -> Tensor:
    """`prod_{j <= k} alpha_j`, how likely a step accepts token k with all before it; 0 on tokens that do not count.

    Args:
        acceptance: `[..., K, ...]`, alpha of each token, such as `lk_divergences(...).acceptance`.
        supervised: bool, the same shape.
        dim: the dimension of the K positions.

    Returns:
        `[K, ...]`, positions first. It is differentiable in `acceptance`, also where an alpha is 0.
    """
    alpha, counts = _positions_first(acceptance, supervised, dim)
    reached, prefixes = torch.ones_like(alpha[0]), []
    for now, counted in zip(alpha, counts, strict=True):  # the derivative of cumprod synchronises, to look for zeros
        reached = reached * torch.where(counted, now, 1)
        prefixes.append(torch.where(counted, reached, 0))
    return torch.stack(prefixes)


def acceptance_length(acceptance: Tensor, supervised: Tensor, dim: int = 0) -> Tensor:
    """`1 + sum_k prod_{j <= k} alpha_j` of each block `[...]`, in tokens per step of the target; to be maximised.

    The arguments are those of `accepted_prefixes`.
    """
    return 1 + accepted_prefixes(acceptance, supervised, dim).sum(0)


def end_to_end_tv(acceptance: Tensor, supervised: Tensor, dim: int = 0) -> Tensor:
    """`1 - (1 / n) sum_k prod_{j <= k} alpha_j` of each block `[...]`, where n of its tokens count; 0 where none does.

    It is the share of the block's tokens that a step is expected to reject, in [0, 1] (AngelSpec's end-to-end TV). The
    arguments are those of `accepted_prefixes`.
    """
    _, counts = _positions_first(acceptance, supervised, dim)
    n = counts.sum(0)
    return torch.where(n > 0, 1 - accepted_prefixes(acceptance, supervised, dim).sum(0) / n.clamp(min=1), 0)


def dflash_weights(num_positions: int, gamma: float, first: int = 1, device: torch.device | str = "cpu") -> Tensor:
    """`exp(-max(k - first, 0) / gamma)`, `[K]` in float32: the weights of DFlash's positions.

    Args:
        num_positions: K, the block size.
        gamma: > 0; how slowly they fall.
        first: the first position that is drafted: 1 where slot 0 is the anchor, and 0 where it is drafted too.
        device: where they are made.

    Source: SpecForge 0.2.0, `specforge.algorithms.common.dflash_family_model` (`loss_decay_gamma`). The paper's weights
    (arXiv 2602.23881), gamma^k, are `position_decay=` of `lk_loss`.
    """
    gamma = checks.number("gamma", gamma, above=0)
    k = torch.arange(checks.integer("num_positions", num_positions), device=device)
    return torch.exp(-(k - checks.integer("first", first, minimum=0)).clamp(min=0).float() / gamma)


def dpace_weights(confidence: Tensor, supervised: Tensor, smoothing: float = 0.5, dim: int = 0) -> Tensor:
    """`sum_{j >= k} prod_{i <= j} s_i` with `s = (1 - smoothing) * confidence + smoothing`: the weights of D-PACE.

    Token k counts by how likely the tokens up to it are accepted, and by how much hangs on it after.

    Args:
        confidence: `[..., K, ...]` in [0, 1]: what the draft gives to the label (D-PACE), or alpha.
        supervised: bool, the same shape.
        smoothing: in [0, 1]; D-PACE's alpha. 1 makes the weights count the tokens that follow.
        dim: the dimension of the K positions.

    Returns:
        The weights in the shape of `confidence`, without a gradient; 0 on tokens that do not count.

    Sources: `dpace_loss_decay` of speculators 0.9.0 (`speculators.losses.utils`); `_dpace_weight` of SpecForge 0.2.0.
    """
    if not 0 <= checks.number("smoothing", smoothing) <= 1:
        checks.fail("smoothing to be a number in [0, 1]", smoothing, "D-PACE uses 0.5.")
    smooth = (1 - smoothing) * confidence.detach() + smoothing
    prefixes = accepted_prefixes(smooth, supervised, dim)
    # cumsum of floats is not deterministic on CUDA, and refused there under `use_deterministic_algorithms`.
    rest = torch.stack([prefixes[k:].sum(0) for k in range(len(prefixes))])
    return torch.where(supervised, rest.movedim(0, dim), 0)


def _positions_first(x: Tensor, supervised: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    checks.tensor("supervised", supervised, dtypes=[torch.bool])
    checks.shape("supervised", supervised, tuple(x.shape), "one for each token")
    return x.movedim(dim, 0), supervised.movedim(dim, 0)
