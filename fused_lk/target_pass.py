"""The pass over the target's full vocabulary: log-normaliser and argmax of each row, streamed a workspace at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from . import gemm, plan
from .opaque import opaque
from .rowwise import accumulation_dtype, row_ops
from .workspace import Tile, row_stride


@opaque("(Tensor logits, float scale, str impl) -> (Tensor, Tensor)")
def over_logits(logits: Tensor, scale: float, impl: str) -> tuple[Tensor, Tensor]:
    """`(logsumexp(scale * logits), argmax)` of each row `[N]`; the lowest index where it is not unique."""
    lse = torch.empty(logits.shape[0], dtype=accumulation_dtype(logits), device=logits.device)
    argmax = torch.empty(logits.shape[0], dtype=torch.long, device=logits.device)
    row_ops(impl, logits.device).lse_argmax(logits, scale, lse, argmax)
    return lse, argmax


@over_logits.register_fake
def _(logits: Tensor, scale: float, impl: str) -> tuple[Tensor, Tensor]:
    n = logits.shape[0]
    return logits.new_empty(n, dtype=accumulation_dtype(logits)), logits.new_empty(n, dtype=torch.long)


@opaque(
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? mask, Tensor? cached_ids, bool cache, float scale, str impl, "
    "int? budget, bool exact=False) -> (Tensor, Tensor, Tensor)"
)
def over_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    cached_ids: Tensor | None,
    cache: bool,
    scale: float,
    impl: str,
    budget: int | None,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(logsumexp, argmax, cached)` of each row of `hidden @ weight.T + bias`, `[N]`, `[N]` and `[N, V_draft]`.

    Rows outside `mask` are not computed: NaN, 0 and zeros. With `cache`, `cached` holds the columns `cached_ids` (None:
    all) of the same logits, with a padded row stride; else it is empty. `exact` logits are the product's own float32.
    """
    n, size = hidden.shape[0], weight.shape[0]
    rows = None if mask is None else mask.nonzero().squeeze(1)
    count = n if rows is None else rows.shape[0]
    normalizer = torch.full((n,), float("nan"), dtype=accumulation_dtype(hidden), device=hidden.device)
    argmax = torch.zeros(n, dtype=torch.long, device=hidden.device)
    dtype = _logits_dtype(hidden, exact)
    cached = _cache(hidden, weight, cached_ids, cache, dtype)
    ops = row_ops(impl, hidden.device)
    step = plan.target_rows(size, count, dtype.itemsize, hidden.device, budget)
    tile = Tile(step, size, dtype, hidden.device)
    for start in range(0, count, step):
        stop = min(start + step, count)
        at = slice(start, stop) if rows is None else rows[start:stop]
        logits = tile.view(stop - start, size)
        gemm.linear_into(logits, hidden[at], weight, bias)
        lse, top = torch.empty_like(normalizer[start:stop]), torch.empty_like(argmax[start:stop])
        ops.lse_argmax(logits, scale, lse, top)
        normalizer[at], argmax[at] = lse, top
        if cache:
            cached[at] = logits if cached_ids is None else logits[:, cached_ids]
    return normalizer, argmax, cached


@over_hidden.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    cached_ids: Tensor | None,
    cache: bool,
    scale: float,
    impl: str,
    budget: int | None,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    n = hidden.shape[0]
    lse = hidden.new_empty(n, dtype=accumulation_dtype(hidden))
    cached = _cache(hidden, weight, cached_ids, cache, _logits_dtype(hidden, exact))
    return lse, hidden.new_empty(n, dtype=torch.long), cached


def _logits_dtype(hidden: Tensor, exact: bool) -> torch.dtype:
    return accumulation_dtype(hidden) if exact else hidden.dtype


def _cache(hidden: Tensor, weight: Tensor, ids: Tensor | None, wanted: bool, dtype: torch.dtype) -> Tensor:
    columns = weight.shape[0] if ids is None else ids.shape[0]
    rows = hidden.shape[0] if wanted else 0
    return hidden.new_zeros(rows, row_stride(columns), dtype=dtype)[:, :columns]
