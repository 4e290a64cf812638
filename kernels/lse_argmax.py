"""logsumexp and argmax of each row, in one pass over it."""

import triton
import triton.language as tl

from .online_softmax import LOWEST, argmax, full_scale, load_logits, logsumexp, update_argmax


@triton.jit(do_not_specialize_on_alignment=["lse_ptr", "argmax_ptr"])
def lse_argmax_kernel(
    x_ptr,
    x_row_stride,
    lse_ptr,
    argmax_ptr,
    n_cols,
    scale_high,
    scale_low,
    HAS_LSE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per row: logsumexp(scale * x), and the lowest index of the maximum."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_row_stride
    scale = full_scale(scale_high, scale_low, ACC)
    lanes = tl.arange(0, BLOCK_V)

    top = tl.full([BLOCK_V], LOWEST, ACC)
    total = tl.zeros([BLOCK_V], ACC)
    at = tl.zeros([BLOCK_V], tl.int32)
    whole = n_cols // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        x = load_logits(x_ptr, start + lanes, n_cols, scale, False)
        top, total, at = update_argmax(top, total, at, x, start)
    if whole < n_cols:
        x = load_logits(x_ptr, whole + lanes, n_cols, scale, True)
        top, total, at = update_argmax(top, total, at, x, whole)

    tl.store(argmax_ptr + row, argmax(top, at, lanes).to(tl.int64))
    if HAS_LSE:
        tl.store(lse_ptr + row, logsumexp(top, total))
