"""The gradient of each row with respect to its draft logits, from its statistics (see `row_stats` for the legend).

    sum over the terms of d_value * (c - sigma q), times z_scale; under a softcap times z_inner (1 - tanh^2), too

All of q, pt, w r and sigma lie in [0, 1]. log r is at most 0 before it is exponentiated: where w = 0, r may overflow,
and 0 * inf is NaN. Rows without an answer (target_top = -inf) get exact zeros, whatever their coefficients hold.
"""

import triton
import triton.language as tl

from .online_softmax import capped, full_scale, load_logits, log_mixture, log_prob, slope, tie_ramp


@triton.jit
def gradient_block(
    z_ptr, t_ptr, gradient_ptr, offs_v, n_cols, z_scale, t_scale, z_inner, t_inner,
    draft_top, draft_log_total, target_top, target_log_total, log_mass, log_alpha, supported,
    of_q, d_log_alpha, d_pt, d_ce, d_rkl, d_jsd, d_skl, d_l1, beta, label_column, top_column, of_top,
    LOG_ACCEPTANCE: tl.constexpr, KL: tl.constexpr, SOFT_CE: tl.constexpr, CE: tl.constexpr, RKL: tl.constexpr,
    JSD: tl.constexpr, SKL: tl.constexpr, L1: tl.constexpr, MASKED: tl.constexpr, TIE: tl.constexpr,
):  # fmt: skip
    """One block of columns of one row: of_q * q and d * c of each term, and of_top in the maximum's column."""
    z = load_logits(z_ptr, offs_v, n_cols, MASKED, of_q.dtype)
    t = capped(load_logits(t_ptr, offs_v, n_cols, MASKED, of_q.dtype), t_inner)
    log_q = log_prob(capped(z, z_inner), draft_top, draft_log_total, z_scale)
    log_pt = log_prob(t, target_top, target_log_total, t_scale)
    q = tl.exp(log_q)
    gradient = of_q * q
    if LOG_ACCEPTANCE >= 0:
        log_p = log_pt + log_mass
        smaller = tl.where(log_q < log_p, log_q, log_p)
        w_r = tie_ramp(log_q, log_p, smaller, TIE) * tl.exp(tl.minimum(smaller - log_alpha, 0.0))
        gradient += d_log_alpha * w_r
    if (KL >= 0) | (SOFT_CE >= 0):
        gradient -= d_pt * tl.exp(log_pt)
    if CE >= 0:
        gradient = tl.where(offs_v == label_column, gradient - d_ce, gradient)
    if RKL >= 0:
        ratio = log_q - log_pt
        gradient += d_rkl * tl.where((q > 0) & (ratio < float("inf")), q * ratio, 0.0)
    if JSD >= 0:
        m_q, _ = log_mixture(log_q, log_pt, beta)
        gradient += d_jsd * (beta - 1.0) * tl.where(q > 0, q * m_q, 0.0)
    if SKL >= 0:
        pt = tl.exp(log_pt)
        m = tl.maximum(beta * pt + (1.0 - beta) * q, 1e-37)  # where it is less, so is c
        gradient += d_skl * (beta - 1.0) * q * (pt / m)
    if L1 >= 0:
        smaller = tl.where(log_q < log_pt, log_q, log_pt)
        sign = tl.where(log_pt == float("-inf"), 1.0, 1.0 - 2.0 * tie_ramp(log_q, log_pt, smaller, TIE))
        gradient += d_l1 * q * sign
    gradient = tl.where(offs_v == top_column, of_top, gradient)
    if z_inner is not None:
        gradient *= slope(z, z_inner)
    gradient = tl.where(supported, gradient, 0.0)
    if gradient_ptr.dtype.element_ty == tl.bfloat16:  # Triton's interpreter does not cast float64 to it
        gradient = gradient.to(tl.float32)
    gradient = gradient.to(gradient_ptr.dtype.element_ty)
    if MASKED:
        tl.store(gradient_ptr + offs_v, gradient, mask=offs_v < n_cols)
    else:
        tl.store(gradient_ptr + offs_v, gradient)


@triton.jit
def _add_term(of_q, of_top, d, saved_ptr, saved_stride):
    """The factor of q, and the gradient in the maximum's column, with one more term; `d` is its d_value."""
    return of_q - d * tl.load(saved_ptr), of_top + d * tl.load(saved_ptr + saved_stride)


@triton.jit
def numbers_of_row(
    row, d_log_alpha, d_kl, d_soft_ce, d_ce, d_rkl, d_jsd, d_skl, d_l1,
    base_ptr, base_stride, values_ptr, values_stride, saved_ptr, saved_stride, term_stride, draft_argmax_ptr, label_ptr,
    first_column,
    LOG_ACCEPTANCE: tl.constexpr, KL: tl.constexpr, SOFT_CE: tl.constexpr, CE: tl.constexpr, RKL: tl.constexpr,
    JSD: tl.constexpr, SKL: tl.constexpr, L1: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What `gradient_block` needs to know of a row; d of each term is its d_value times the gain."""
    base_ptr += row
    base_stride = base_stride.to(tl.int64)
    draft_top = tl.load(base_ptr)
    draft_log_total = tl.load(base_ptr + base_stride)
    target_top = tl.load(base_ptr + 2 * base_stride)
    target_log_total = tl.load(base_ptr + 3 * base_stride)
    log_mass = tl.load(base_ptr + 4 * base_stride)
    supported = target_top != float("-inf")
    target_top = tl.where(supported, target_top, 0.0)

    saved_ptr += row
    values_stride, saved_stride = values_stride.to(tl.int64), saved_stride.to(tl.int64)
    term_stride = term_stride.to(tl.int64)
    of_q = tl.zeros([], ACC)
    of_top, log_alpha = of_q, of_q
    label_column = tl.full([], -1, tl.int32)
    if LOG_ACCEPTANCE >= 0:
        # log alpha is -inf also where q and p have no token in common; it has no gradient there.
        log_alpha = tl.load(values_ptr + row + LOG_ACCEPTANCE * values_stride)
        possible = log_alpha != float("-inf")
        log_alpha = tl.where(possible, log_alpha, 0.0)
        d_log_alpha = tl.where(possible, d_log_alpha, 0.0)
        of_q, of_top = _add_term(of_q, of_top, d_log_alpha, saved_ptr + LOG_ACCEPTANCE * term_stride, saved_stride)
    if KL >= 0:
        of_q, of_top = _add_term(of_q, of_top, d_kl, saved_ptr + KL * term_stride, saved_stride)
    if SOFT_CE >= 0:
        of_q, of_top = _add_term(of_q, of_top, d_soft_ce, saved_ptr + SOFT_CE * term_stride, saved_stride)
    if CE >= 0:
        of_q, of_top = _add_term(of_q, of_top, d_ce, saved_ptr + CE * term_stride, saved_stride)
        label_column = (tl.load(label_ptr + row) - first_column).to(tl.int32)
    if RKL >= 0:
        infinite = tl.load(values_ptr + row + RKL * values_stride) == float("inf")
        d_rkl = tl.where(infinite, 0.0, d_rkl)
        of_q, of_top = _add_term(of_q, of_top, d_rkl, saved_ptr + RKL * term_stride, saved_stride)
    if JSD >= 0:
        of_q, of_top = _add_term(of_q, of_top, d_jsd, saved_ptr + JSD * term_stride, saved_stride)
    if SKL >= 0:
        of_q, of_top = _add_term(of_q, of_top, d_skl, saved_ptr + SKL * term_stride, saved_stride)
    if L1 >= 0:
        of_q, of_top = _add_term(of_q, of_top, d_l1, saved_ptr + L1 * term_stride, saved_stride)
    top_column = (tl.load(draft_argmax_ptr + row) - first_column).to(tl.int32)
    return (
        draft_top, draft_log_total, target_top, target_log_total, log_mass, log_alpha, supported, of_q, d_log_alpha,
        d_kl + d_soft_ce, d_ce, d_rkl, d_jsd, d_skl, d_l1, label_column, top_column, of_top,
    )  # fmt: skip


@triton.jit
def _d_value(d_values_ptr, d_values_stride, gain, TERM: tl.constexpr, ACC: tl.constexpr):
    """The d_value of a term times the gain; 0 of a term that is not there."""
    d = tl.zeros([], ACC)
    if TERM >= 0:
        d = tl.load(d_values_ptr + TERM * d_values_stride).to(ACC) * gain
    return d


@triton.jit(
    do_not_specialize=[
        *("first_column", "base_stride", "values_stride", "saved_stride", "term_stride", "d_values_stride"),
    ],
    do_not_specialize_on_alignment=[
        *("t_index_ptr", "base_ptr", "values_ptr", "saved_ptr", "d_values_ptr", "draft_argmax_ptr"),
        "label_ptr",
    ],
)
def row_grad_kernel(
    z_ptr, z_row_stride, t_ptr, t_row_stride, gradient_ptr, gradient_row_stride, t_index_ptr,
    base_ptr, base_stride, values_ptr, values_stride, saved_ptr, saved_stride, term_stride,
    d_values_ptr, d_values_stride, draft_argmax_ptr, label_ptr, beta_high, beta_low,
    n_cols, first_column,
    z_scale_high, z_scale_low, z_inner_high, z_inner_low, t_scale_high, t_scale_low, t_inner_high, t_inner_low,
    LOG_ACCEPTANCE: tl.constexpr, KL: tl.constexpr, SOFT_CE: tl.constexpr, CE: tl.constexpr, RKL: tl.constexpr,
    JSD: tl.constexpr, SKL: tl.constexpr, L1: tl.constexpr, ACC: tl.constexpr, TIE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row and block of columns. `gradient_ptr` may be `z_ptr`: each element is read, then written."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK_V
    t_row = row
    if t_index_ptr is not None:
        t_row = tl.load(t_index_ptr + row).to(tl.int64)
    z_ptr += row * z_row_stride
    t_ptr += t_row * t_row_stride
    gradient_ptr += row * gradient_row_stride
    z_scale = full_scale(z_scale_high, z_scale_low, ACC)
    t_scale = full_scale(t_scale_high, t_scale_low, ACC)
    z_inner, t_inner = z_inner_high, t_inner_high
    if z_inner_high is not None:
        z_inner = full_scale(z_inner_high, z_inner_low, ACC)
    if t_inner_high is not None:
        t_inner = full_scale(t_inner_high, t_inner_low, ACC)
    gain = z_scale
    if z_inner is not None:
        gain = z_scale * z_inner

    d_values_ptr += row
    d_values_stride = d_values_stride.to(tl.int64)
    (
        draft_top, draft_log_total, target_top, target_log_total, log_mass, log_alpha, supported, of_q, d_log_alpha,
        d_pt, d_ce, d_rkl, d_jsd, d_skl, d_l1, label_column, top_column, of_top,
    ) = numbers_of_row(
        row,
        _d_value(d_values_ptr, d_values_stride, gain, LOG_ACCEPTANCE, ACC),
        _d_value(d_values_ptr, d_values_stride, gain, KL, ACC),
        _d_value(d_values_ptr, d_values_stride, gain, SOFT_CE, ACC),
        _d_value(d_values_ptr, d_values_stride, gain, CE, ACC),
        _d_value(d_values_ptr, d_values_stride, gain, RKL, ACC),
        _d_value(d_values_ptr, d_values_stride, gain, JSD, ACC),
        _d_value(d_values_ptr, d_values_stride, gain, SKL, ACC),
        _d_value(d_values_ptr, d_values_stride, gain, L1, ACC),
        base_ptr, base_stride, values_ptr, values_stride, saved_ptr, saved_stride, term_stride, draft_argmax_ptr,
        label_ptr, first_column, LOG_ACCEPTANCE, KL, SOFT_CE, CE, RKL, JSD, SKL, L1, ACC,
    )  # fmt: skip
    beta = full_scale(beta_high, beta_low, ACC)

    offs_v = start + tl.arange(0, BLOCK_V)
    if start + BLOCK_V <= n_cols:
        gradient_block(
            z_ptr, t_ptr, gradient_ptr, offs_v, n_cols, z_scale, t_scale, z_inner, t_inner, draft_top, draft_log_total,
            target_top, target_log_total, log_mass, log_alpha, supported, of_q, d_log_alpha, d_pt, d_ce, d_rkl, d_jsd,
            d_skl, d_l1, beta, label_column, top_column, of_top, LOG_ACCEPTANCE, KL, SOFT_CE, CE, RKL, JSD, SKL, L1,
            False, TIE,
        )  # fmt: skip
    else:
        gradient_block(
            z_ptr, t_ptr, gradient_ptr, offs_v, n_cols, z_scale, t_scale, z_inner, t_inner, draft_top, draft_log_total,
            target_top, target_log_total, log_mass, log_alpha, supported, of_q, d_log_alpha, d_pt, d_ce, d_rkl, d_jsd,
            d_skl, d_l1, beta, label_column, top_column, of_top, LOG_ACCEPTANCE, KL, SOFT_CE, CE, RKL, JSD, SKL, L1,
            True, TIE,
        )  # fmt: skip
