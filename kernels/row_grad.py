"""The gradient of each row with respect to its draft logits, from its statistics (see `row_stats` for the legend).

    term               coefficient          gradient with respect to z
    KL(pt || q)        d_kl                 q - pt
    log alpha          d_log_acceptance     w r - sigma q,   w r = select(w > 0, w exp(min(log q - log alpha, 0)), 0)
    z = scale * x      z_scale              times z_scale

All of q, pt, w r and sigma lie in [0, 1]. w r is selected before it is exponentiated: where w = 0, r may overflow, and
0 * inf is NaN. Rows without an answer (target_lse = -inf) get exact zeros, whatever their coefficients hold.
"""

import triton
import triton.language as tl

from .online_softmax import acceptance_weight, full_scale, load_logits, log_probs


@triton.jit
def _block(
    z_ptr,
    t_ptr,
    gradient_ptr,
    offs_v,
    n_cols,
    z_scale,
    t_scale,
    draft_lse,
    target_lse,
    log_normalizer,
    log_alpha,
    supported,
    of_q,
    of_pt,
    of_w_r,
    MASKED: tl.constexpr,
):
    """One block of columns of one row: of_q * q + of_w_r * w r - of_pt * pt."""
    z = load_logits(z_ptr, offs_v, n_cols, z_scale, MASKED)
    t = load_logits(t_ptr, offs_v, n_cols, t_scale, MASKED)
    log_q, log_p = log_probs(z, t, draft_lse, log_normalizer)
    w = acceptance_weight(log_q, log_p)
    w_r = w * tl.exp(tl.where(w > 0, tl.minimum(log_q - log_alpha, 0.0), float("-inf")))
    gradient = of_q * tl.exp(log_q) + of_w_r * w_r - of_pt * tl.exp(t - target_lse)
    gradient = tl.where(supported, gradient, 0.0)
    if gradient_ptr.dtype.element_ty == tl.bfloat16:  # Triton's interpreter does not cast float64 to it
        gradient = gradient.to(tl.float32)
    gradient = gradient.to(gradient_ptr.dtype.element_ty)
    if MASKED:
        tl.store(gradient_ptr + offs_v, gradient, mask=offs_v < n_cols)
    else:
        tl.store(gradient_ptr + offs_v, gradient)


@triton.jit(
    do_not_specialize_on_alignment=[
        "t_index_ptr",
        "log_normalizer_ptr",
        "draft_lse_ptr",
        "target_lse_ptr",
        "log_acceptance_ptr",
        "sigma_ptr",
        "d_log_acceptance_ptr",
        "d_kl_ptr",
    ]
)
def row_grad_kernel(
    z_ptr,
    z_row_stride,
    t_ptr,
    t_row_stride,
    gradient_ptr,
    gradient_row_stride,
    t_index_ptr,
    log_normalizer_ptr,
    draft_lse_ptr,
    target_lse_ptr,
    log_acceptance_ptr,
    sigma_ptr,
    d_log_acceptance_ptr,
    d_kl_ptr,
    n_cols,
    z_scale_high,
    z_scale_low,
    t_scale_high,
    t_scale_low,
    HAS_INDEX: tl.constexpr,
    HAS_NORMALIZER: tl.constexpr,
    ACC: tl.constexpr,
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

    draft_lse = tl.load(draft_lse_ptr + row)
    target_lse = tl.load(target_lse_ptr + row)
    supported = target_lse > float("-inf")
    target_lse = tl.where(supported, target_lse, 0.0)
    log_normalizer = target_lse
    if HAS_NORMALIZER:
        log_normalizer = tl.where(supported, tl.load(log_normalizer_ptr + row).to(ACC), 0.0)
    # log alpha is -inf also where q and p have no token in common; it has no gradient there.
    log_alpha = tl.load(log_acceptance_ptr + row)
    possible = log_alpha != float("-inf")
    log_alpha = tl.where(possible, log_alpha, 0.0)
    of_w_r = tl.where(possible, tl.load(d_log_acceptance_ptr + row).to(ACC) * z_scale, 0.0)
    of_pt = tl.load(d_kl_ptr + row).to(ACC) * z_scale
    of_q = of_pt - tl.load(sigma_ptr + row) * of_w_r

    offs_v = start + tl.arange(0, BLOCK_V)
    if start + BLOCK_V <= n_cols:
        _block(
            z_ptr,
            t_ptr,
            gradient_ptr,
            offs_v,
            n_cols,
            z_scale,
            t_scale,
            draft_lse,
            target_lse,
            log_normalizer,
            log_alpha,
            supported,
            of_q,
            of_pt,
            of_w_r,
            False,
        )
    else:
        _block(
            z_ptr,
            t_ptr,
            gradient_ptr,
            offs_v,
            n_cols,
            z_scale,
            t_scale,
            draft_lse,
            target_lse,
            log_normalizer,
            log_alpha,
            supported,
            of_q,
            of_pt,
            of_w_r,
            True,
        )
