"""Some columns of logits that are not made whole: the best k of each row, and those that a caller names.

Both take a few rows at a time, so that what they hold is bounded by a budget in bytes (None: the default one).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import gemm


@torch.no_grad()
def best(hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, budget: int | None) -> Tensor:
    """The columns of the `k` largest logits of each row of `hidden [T, H] @ weight.T`, int64 `[T, k]`, best first."""
    dtype, (count, size) = gemm.compute_dtype(hidden), (hidden.shape[0], weight.shape[0])
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    ids = torch.empty(count, k, dtype=torch.long, device=hidden.device)
    step = gemm.rows_of_a_tile(size, count, hidden.itemsize, hidden.device, budget)
    tile = gemm.tile(step, size, dtype, hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _blocks(count, step):
            logits = tile[: rows.stop - rows.start]
            gemm.linear_into(logits, hidden[rows], weight, bias)
            ids[rows] = logits.topk(k, dim=-1).indices
    return ids


def named(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, budget: int | None) -> Tensor:
    """The logits `[T, k]` of `hidden [T, H] @ weight.T` in the columns `ids` `[T, k]`, differentiable."""
    logits = _Named.apply(hidden, weight, ids, gemm.compute_dtype(hidden), budget)
    return logits if bias is None else logits + bias[ids].to(logits.dtype)


class _Named(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype, budget: int | None
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, ids)
        ctx.dtype, ctx.step = dtype, _rows(ids, weight, budget)
        out = hidden.new_empty(ids.shape, dtype=dtype)
        for rows in _blocks(len(ids), ctx.step):
            columns = weight[ids[rows]].to(dtype)  # [n, k, H]
            out[rows] = torch.bmm(columns, hidden[rows].to(dtype).unsqueeze(-1)).squeeze(-1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = weight.new_zeros(weight.shape, dtype=gemm.wide_dtype(weight.dtype))
        for rows in _blocks(len(ids), ctx.step):
            if d_hidden is not None:
                columns = weight[ids[rows]].to(ctx.dtype)
                d_hidden[rows] = torch.bmm(g[rows].unsqueeze(1), columns).squeeze(1)
            if ctx.needs_input_grad[1]:
                of_columns = g[rows].unsqueeze(-1).to(d_weight) * hidden[rows].unsqueeze(1)
                d_weight.index_add_(0, ids[rows].reshape(-1), of_columns.reshape(-1, weight.shape[1]))
        return d_hidden, d_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None, None, None


def _rows(ids: Tensor, weight: Tensor, budget: int | None) -> int:
    """Rows whose columns of the weight fit the budget, twice."""
    return max(1, gemm.bound(budget, weight.device) // max(1, 2 * ids.shape[1] * weight.shape[1] * 4))


def _blocks(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
