"""logsumexp and argmax of each row, and the share of a subset of the columns, in one pass over it."""

import triton
import triton.language as tl

from .online_softmax import LOWEST, capped, full_scale, join, load_logits, log1p, update_argmax


@triton.jit
def _next(
    x_ptr, inside_ptr, start, lanes, n_cols, scale, inner,
    top, rest, at, outer_top, outer_rest, outer_at, MASKED: tl.constexpr,
):  # fmt: skip
    """One more tile. With a subset the first three are of the columns inside, the last three of those outside."""
    offs_v = start + lanes
    x = capped(load_logits(x_ptr, offs_v, n_cols, MASKED, top.dtype), inner)
    if inside_ptr is not None:
        if MASKED:
            inside = tl.load(inside_ptr + offs_v, mask=offs_v < n_cols, other=0) != 0
        else:
            inside = tl.load(inside_ptr + offs_v) != 0
        # A column is in one of the two, so one exp serves both.
        new_top, new_rest, new_at = update_argmax(
            tl.where(inside, top, outer_top),
            tl.where(inside, rest, outer_rest),
            tl.where(inside, at, outer_at),
            x,
            start,
            scale,
        )
        top, outer_top = tl.where(inside, new_top, top), tl.where(inside, outer_top, new_top)
        rest, outer_rest = tl.where(inside, new_rest, rest), tl.where(inside, outer_rest, new_rest)
        at, outer_at = tl.where(inside, new_at, at), tl.where(inside, outer_at, new_at)
    else:
        top, rest, at = update_argmax(top, rest, at, x, start, scale)
    return top, rest, at, outer_top, outer_rest, outer_at


@triton.jit(do_not_specialize_on_alignment=["lse_ptr", "log_mass_ptr", "argmax_ptr"])
def lse_argmax_kernel(
    x_ptr, x_row_stride, inside_ptr, lse_ptr, log_mass_ptr, argmax_ptr, n_cols,
    scale_high, scale_low, inner_high, inner_low,
    ACC: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row: logsumexp(scale * f(x)), the lowest index of the maximum, and with `inside` the log of
    the share of the columns that it marks. f is tanh(inner * x), or nothing without `inner`."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_row_stride
    scale = full_scale(scale_high, scale_low, ACC)
    inner = inner_high
    if inner_high is not None:
        inner = full_scale(inner_high, inner_low, ACC)
    lanes = tl.arange(0, BLOCK_V)

    top = tl.full([BLOCK_V], LOWEST, ACC)
    rest = tl.zeros([BLOCK_V], ACC)
    at = tl.zeros([BLOCK_V], tl.int32)
    outer_top, outer_rest, outer_at = top, rest, at
    whole = n_cols // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        top, rest, at, outer_top, outer_rest, outer_at = _next(
            x_ptr, inside_ptr, start, lanes, n_cols, scale, inner,
            top, rest, at, outer_top, outer_rest, outer_at, False,
        )  # fmt: skip
    if whole < n_cols:
        top, rest, at, outer_top, outer_rest, outer_at = _next(
            x_ptr, inside_ptr, whole, lanes, n_cols, scale, inner,
            top, rest, at, outer_top, outer_rest, outer_at, True,
        )  # fmt: skip

    top, rest, column = join(top, rest, at, lanes, scale)
    log_total = log1p(rest)
    if inside_ptr is not None:
        outer_top, outer_rest, outer_column = join(outer_top, outer_rest, outer_at, lanes, scale)
        outer_log_total = log1p(outer_rest)
        # y = log (outside / inside); log_mass = -log(1 + exp(y)); the sum of both from the side that has more
        y = (outer_top - top) * scale + (outer_log_total - log_total)
        beside = log1p(tl.exp(-tl.abs(y)))
        nothing = (top <= LOWEST) & (y == y)
        tl.store(log_mass_ptr + row, tl.where(nothing, float("-inf"), -(tl.maximum(y, 0.0) + beside)))
        inner = top >= outer_top
        log_total = beside + tl.where(inner, log_total + tl.maximum(y, 0.0), outer_log_total + tl.maximum(-y, 0.0))
        column = tl.where(top == outer_top, tl.minimum(column, outer_column), tl.where(inner, column, outer_column))
        top = tl.where(inner, top, outer_top)
    tl.store(argmax_ptr + row, column.to(tl.int64))
    empty = (top <= LOWEST) & (log_total == log_total)  # -inf alone; NaN stays
    tl.store(lse_ptr + row, tl.where(empty, float("-inf"), top * scale + log_total))
