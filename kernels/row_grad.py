"""The gradient of each row with respect to its draft logits, from its statistics (see `row_stats` for the legend).

    term               coefficient          gradient with respect to z           in the column of the draft's maximum
    KL(pt || q)        d_kl                 q - pt                               top_kl
    log alpha          d_log_acceptance     w r - sigma q                        top_log_acceptance
    z = scale * x      z_scale              times z_scale                        times z_scale

All of q, pt, w r and sigma lie in [0, 1]. log r is at most 0 before it is exponentiated: where w = 0, r may overflow,
and 0 * inf is NaN. Rows without an answer (target_top = -inf) get exact zeros, whatever their coefficients hold.
"""

import triton
import triton.language as tl

from .online_softmax import full_scale, load_logits, log_prob, tie_ramp


@triton.jit
def _block(
    z_ptr,
    t_ptr,
    gradient_ptr,
    offs_v,
    n_cols,
    z_scale,
    t_scale,
    draft_top,
    draft_log_total,
    target_top,
    target_log_total,
    log_mass,
    log_alpha,
    supported,
    of_q,
    of_pt,
    of_w_r,
    top_column,
    of_top,
    MASKED: tl.constexpr,
    TIE: tl.constexpr,
):
    """One block of columns of one row: of_q * q + of_w_r * w r - of_pt * pt, and of_top in the maximum's column."""
    z = load_logits(z_ptr, offs_v, n_cols, MASKED, of_q.dtype)
    t = load_logits(t_ptr, offs_v, n_cols, MASKED, of_q.dtype)
    log_q = log_prob(z, draft_top, draft_log_total, z_scale)
    log_pt = log_prob(t, target_top, target_log_total, t_scale)
    log_p = log_pt + log_mass
    smaller = tl.where(log_q < log_p, log_q, log_p)
    w_r = tie_ramp(log_q, log_p, smaller, TIE) * tl.exp(tl.minimum(smaller - log_alpha, 0.0))
    gradient = of_q * tl.exp(log_q) + of_w_r * w_r - of_pt * tl.exp(log_pt)
    gradient = tl.where(offs_v == top_column, of_top, gradient)
    gradient = tl.where(supported, gradient, 0.0)
    if gradient_ptr.dtype.element_ty == tl.bfloat16:  # Triton's interpreter does not cast float64 to it
        gradient = gradient.to(tl.float32)
    gradient = gradient.to(gradient_ptr.dtype.element_ty)
    if MASKED:
        tl.store(gradient_ptr + offs_v, gradient, mask=offs_v < n_cols)
    else:
        tl.store(gradient_ptr + offs_v, gradient)


@triton.jit(
    do_not_specialize=["first_column"],
    do_not_specialize_on_alignment=[
        "t_index_ptr",
        "draft_top_ptr",
        "draft_log_total_ptr",
        "target_top_ptr",
        "target_log_total_ptr",
        "log_mass_ptr",
        "log_acceptance_ptr",
        "sigma_ptr",
        "top_log_acceptance_ptr",
        "top_kl_ptr",
        "draft_argmax_ptr",
        "d_log_acceptance_ptr",
        "d_kl_ptr",
    ],
)
def row_grad_kernel(
    z_ptr,
    z_row_stride,
    t_ptr,
    t_row_stride,
    gradient_ptr,
    gradient_row_stride,
    t_index_ptr,
    draft_top_ptr,
    draft_log_total_ptr,
    target_top_ptr,
    target_log_total_ptr,
    log_mass_ptr,
    log_acceptance_ptr,
    sigma_ptr,
    top_log_acceptance_ptr,
    top_kl_ptr,
    draft_argmax_ptr,
    d_log_acceptance_ptr,
    d_kl_ptr,
    n_cols,
    first_column,
    z_scale_high,
    z_scale_low,
    t_scale_high,
    t_scale_low,
    HAS_INDEX: tl.constexpr,
    ACC: tl.constexpr,
    TIE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per row and block of columns. `gradient_ptr` may be `z_ptr`: each element is read, then written."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK_V
    t_row = row
    if HAS_INDEX:
        t_row = tl.load(t_index_ptr + row).to(tl.int64)
    z_ptr += row * z_row_stride
    t_ptr += t_row * t_row_stride
    gradient_ptr += row * gradient_row_stride
    z_scale = full_scale(z_scale_high, z_scale_low, ACC)
    t_scale = full_scale(t_scale_high, t_scale_low, ACC)

    draft_top = tl.load(draft_top_ptr + row)
    draft_log_total = tl.load(draft_log_total_ptr + row)
    target_top = tl.load(target_top_ptr + row)
    target_log_total = tl.load(target_log_total_ptr + row)
    log_mass = tl.load(log_mass_ptr + row)
    supported = target_top != float("-inf")
    target_top = tl.where(supported, target_top, 0.0)
    # log alpha is -inf also where q and p have no token in common; it has no gradient there.
    log_alpha = tl.load(log_acceptance_ptr + row)
    possible = log_alpha != float("-inf")
    log_alpha = tl.where(possible, log_alpha, 0.0)
    d_log_alpha = tl.where(possible, tl.load(d_log_acceptance_ptr + row).to(ACC) * z_scale, 0.0)
    d_kl = tl.load(d_kl_ptr + row).to(ACC) * z_scale
    of_q = d_kl - tl.load(sigma_ptr + row) * d_log_alpha
    of_top = d_log_alpha * tl.load(top_log_acceptance_ptr + row) + d_kl * tl.load(top_kl_ptr + row)
    top_column = (tl.load(draft_argmax_ptr + row) - first_column).to(tl.int32)

    offs_v = start + tl.arange(0, BLOCK_V)
    if start + BLOCK_V <= n_cols:
        _block(
            z_ptr, t_ptr, gradient_ptr, offs_v, n_cols, z_scale, t_scale, draft_top, draft_log_total, target_top,
            target_log_total, log_mass, log_alpha, supported, of_q, d_kl, d_log_alpha, top_column, of_top, False, TIE,
        )  # fmt: skip
    else:
        _block(
            z_ptr, t_ptr, gradient_ptr, offs_v, n_cols, z_scale, t_scale, draft_top, draft_log_total, target_top,
            target_log_total, log_mass, log_alpha, supported, of_q, d_kl, d_log_alpha, top_column, of_top, True, TIE,
        )  # fmt: skip
