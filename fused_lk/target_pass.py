"""The pass over the target's full vocabulary: log-normaliser and argmax of each row, streamed a workspace at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from . import gemm
from .opaque import opaque
from .rows.interface import accumulation_dtype, row_ops

Found = tuple[Tensor, Tensor]  # logsumexp and argmax, [N] each; the lowest index where it is not unique


def over_logits(logits: Tensor, t2d: Tensor | None, scale: float, impl: str) -> tuple[Found, Tensor]:
    """`((logsumexp(scale * logits), argmax), log_mass)` of each row `[N]`.

    `log_mass` is the log of the share of softmax(scale * logits) inside `t2d` (bool `[V]`); empty without one.
    """
    lse, argmax, log_mass = stream_logits(logits, t2d, scale, impl)
    return (lse, argmax), log_mass


def over_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    t2d: Tensor | None,
    cached_ids: Tensor | None,
    scale: float,
    impl: str,
    budget: int | None,
    exact: bool,
    cache: bool,
) -> tuple[Found, Tensor, Tensor]:
    """`((logsumexp, argmax), log_mass, cached)` of each row of `hidden @ weight.T + bias`, `[N]` and `[N, V_draft]`.

    Rows outside `mask` are not computed: NaN, -1 and zeros. With `cache`, `cached` holds the columns `cached_ids`
    (None: all) of the same logits, with a padded row stride; else it is empty. `exact` logits are the product's own
    float32.
    `log_mass` as in `over_logits`: from the very logits of the logsumexp, so that p never sums to more than 1.
    """
    lse, argmax, log_mass, cached = stream_hidden(
        hidden, weight, bias, mask, t2d, cached_ids, scale, impl, budget, exact, cache
    )
    return (lse, argmax), log_mass, cached


@opaque("(Tensor logits, Tensor? t2d, float scale, str impl) -> (Tensor, Tensor, Tensor)")
def stream_logits(logits: Tensor, t2d: Tensor | None, scale: float, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    lse, argmax, log_mass = _empty(logits, t2d)
    row_ops(impl, logits.device).lse_argmax(logits, scale, t2d, lse, None if t2d is None else log_mass, argmax)
    return lse, argmax, log_mass


@stream_logits.register_fake
def _(logits: Tensor, t2d: Tensor | None, scale: float, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(logits, t2d)


@opaque(
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? mask, Tensor? t2d, Tensor? cached_ids, float scale, "
    "str impl, int? budget, bool exact, bool cache) -> (Tensor, Tensor, Tensor, Tensor)"
)
def stream_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    t2d: Tensor | None,
    cached_ids: Tensor | None,
    scale: float,
    impl: str,
    budget: int | None,
    exact: bool,
    cache: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, size = hidden.shape[0], weight.shape[0]
    rows = None if mask is None else mask.nonzero().squeeze(1)
    count = n if rows is None else rows.shape[0]
    lse, argmax, log_mass = (x.fill_(float("nan") if x.is_floating_point() else -1) for x in _empty(hidden, t2d))
    dtype = _logits_dtype(hidden, exact)
    cached = _cache(hidden, weight, cached_ids, cache, dtype)
    ops = row_ops(impl, hidden.device)
    step = gemm.rows_of_a_tile(size, count, dtype.itemsize, hidden.device, budget)
    tile = gemm.tile(step, size, dtype, hidden.device)
    for start in range(0, count, step):
        stop = min(start + step, count)
        at = slice(start, stop) if rows is None else rows[start:stop]
        logits = tile[: stop - start]
        gemm.linear_into(logits, hidden[at], weight, bias)
        found = [torch.empty_like(x[start:stop]) for x in (lse, log_mass, argmax)]
        ops.lse_argmax(logits, scale, t2d, found[0], None if t2d is None else found[1], found[2])
        lse[at], argmax[at] = found[0], found[2]
        if t2d is not None:
            log_mass[at] = found[1]
        if cache:
            cached[at] = logits if cached_ids is None else logits[:, cached_ids]
    return lse, argmax, log_mass, cached


@stream_hidden.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    t2d: Tensor | None,
    cached_ids: Tensor | None,
    scale: float,
    impl: str,
    budget: int | None,
    exact: bool,
    cache: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cached = _cache(hidden, weight, cached_ids, cache, _logits_dtype(hidden, exact))
    return *_empty(hidden, t2d), cached


def _empty(x: Tensor, t2d: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten logsumexp, argmax and log_mass of the rows of `x`; the last has no rows without a vocabulary."""
    n, acc = x.shape[0], accumulation_dtype(x)
    return (
        x.new_empty(n, dtype=acc),
        x.new_empty(n, dtype=torch.long),
        x.new_empty(0 if t2d is None else n, dtype=acc),
    )


def _logits_dtype(hidden: Tensor, exact: bool) -> torch.dtype:
    return accumulation_dtype(hidden) if exact else hidden.dtype


def _cache(hidden: Tensor, weight: Tensor, ids: Tensor | None, wanted: bool, dtype: torch.dtype) -> Tensor:
    columns = weight.shape[0] if ids is None else ids.shape[0]
    rows = hidden.shape[0] if wanted else 0
    return hidden.new_zeros(rows, gemm.row_stride(columns), dtype=dtype)[:, :columns]
