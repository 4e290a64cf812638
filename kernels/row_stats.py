"""The statistics of each row: everything that its gradient needs, and what the caller reads.

One row holds draft logits z and target logits t over the draft vocabulary, 1/temperature folded in:

    log q = z - draft_lse        log p = t - log_normalizer        log pt = t - target_lse

    saved            what it is                                                        gradient with respect to z
    draft_lse        logsumexp z
    target_lse       logsumexp t, over the draft vocabulary; -inf: an unsupported row  none, the target is constant
    log_acceptance   log alpha = logsumexp min(log q, log p); -inf: unsupported        w r - sigma q
    sigma            sum w r, in [0, 1]; 0 on unsupported rows
    kl               KL(pt || q); 0 on unsupported rows                                q - pt
    draft_argmax     the lowest index of the largest z                                 none
    target_argmax    the same of t, if asked for                                       none

    r = exp(log q - log alpha);  w = 1 where log q < log p, 1/2 where they are bitwise equal, else 0

Two passes over the row, the second mostly from the cache. All of it in log space: with p and q almost disjoint every
min(p, q) underflows in float32, and the gradient of log alpha would be 0 or NaN. Where w > 0, log q is
min(log q, log p), so sigma shares the running maximum of alpha, and w r costs no exp of its own.
"""

import triton
import triton.language as tl

from .online_softmax import (
    LOWEST,
    acceptance_weight,
    argmax,
    full_scale,
    load_logits,
    log_probs,
    logsumexp,
    update,
    update_argmax,
)


@triton.jit
def _first_pass(
    z_ptr,
    t_ptr,
    start,
    lanes,
    n_cols,
    z_scale,
    t_scale,
    z_top,
    z_total,
    z_at,
    t_top,
    t_total,
    t_at,
    MASKED: tl.constexpr,
):
    z = load_logits(z_ptr, start + lanes, n_cols, z_scale, MASKED)
    t = load_logits(t_ptr, start + lanes, n_cols, t_scale, MASKED)
    z_top, z_total, z_at = update_argmax(z_top, z_total, z_at, z, start)
    # Without a use of t_at the compiler drops it.
    t_top, t_total, t_at = update_argmax(t_top, t_total, t_at, t, start)
    return z_top, z_total, z_at, t_top, t_total, t_at


@triton.jit
def _second_pass(
    z_ptr,
    t_ptr,
    offs_v,
    n_cols,
    z_scale,
    t_scale,
    draft_lse,
    target_lse,
    log_normalizer,
    top,
    alpha,
    sigma,
    kl,
    MASKED: tl.constexpr,
):
    z = load_logits(z_ptr, offs_v, n_cols, z_scale, MASKED)
    t = load_logits(t_ptr, offs_v, n_cols, t_scale, MASKED)
    log_q, log_p = log_probs(z, t, draft_lse, log_normalizer)
    w = acceptance_weight(log_q, log_p)
    top, alpha, step, bigger = update(top, alpha, tl.minimum(log_q, log_p))
    sigma = tl.where(bigger, sigma * step + w, sigma + w * step)
    # t - z first: the two may share an offset that is large beside their difference. Where pt is 0 the logarithm may
    # be -inf, or -inf - (-inf).
    pt = tl.exp(t - target_lse)
    kl += tl.where(pt > 0, pt * ((t - z) + (draft_lse - target_lse)), 0.0)
    return top, alpha, sigma, kl


@triton.jit(
    do_not_specialize_on_alignment=[
        "t_index_ptr",
        "log_normalizer_ptr",
        "draft_lse_ptr",
        "target_lse_ptr",
        "log_acceptance_ptr",
        "sigma_ptr",
        "kl_ptr",
        "draft_argmax_ptr",
        "target_argmax_ptr",
    ]
)
def row_stats_kernel(
    z_ptr,
    z_row_stride,
    t_ptr,
    t_row_stride,
    t_index_ptr,
    log_normalizer_ptr,
    draft_lse_ptr,
    target_lse_ptr,
    log_acceptance_ptr,
    sigma_ptr,
    kl_ptr,
    draft_argmax_ptr,
    target_argmax_ptr,
    n_cols,
    z_scale_high,
    z_scale_low,
    t_scale_high,
    t_scale_low,
    HAS_INDEX: tl.constexpr,
    HAS_NORMALIZER: tl.constexpr,
    HAS_TARGET_ARGMAX: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per row of z; it is scored against row `t_index[row]` of t, or its own."""
    row = tl.program_id(0).to(tl.int64)
    t_row = row
    if HAS_INDEX:
        t_row = tl.load(t_index_ptr + row).to(tl.int64)
    z_ptr += row * z_row_stride
    t_ptr += t_row * t_row_stride
    z_scale = full_scale(z_scale_high, z_scale_low, ACC)
    t_scale = full_scale(t_scale_high, t_scale_low, ACC)
    lanes = tl.arange(0, BLOCK_V)
    whole = n_cols // BLOCK_V * BLOCK_V

    z_top = tl.full([BLOCK_V], LOWEST, ACC)
    z_total = tl.zeros([BLOCK_V], ACC)
    z_at = tl.zeros([BLOCK_V], tl.int32)
    t_top, t_total, t_at = z_top, z_total, z_at
    for start in range(0, whole, BLOCK_V):
        z_top, z_total, z_at, t_top, t_total, t_at = _first_pass(
            z_ptr, t_ptr, start, lanes, n_cols, z_scale, t_scale, z_top, z_total, z_at, t_top, t_total, t_at, False
        )
    if whole < n_cols:
        z_top, z_total, z_at, t_top, t_total, t_at = _first_pass(
            z_ptr, t_ptr, whole, lanes, n_cols, z_scale, t_scale, z_top, z_total, z_at, t_top, t_total, t_at, True
        )
    draft_lse = logsumexp(z_top, z_total)
    target_lse = logsumexp(t_top, t_total)
    tl.store(draft_lse_ptr + row, draft_lse)
    tl.store(target_lse_ptr + row, target_lse)
    tl.store(draft_argmax_ptr + row, argmax(z_top, z_at, lanes).to(tl.int64))
    if HAS_TARGET_ARGMAX:
        tl.store(target_argmax_ptr + row, argmax(t_top, t_at, lanes).to(tl.int64))

    # Without any mass all t are -inf, and stay so when nothing but 0 is taken off.
    supported = target_lse > float("-inf")
    target_lse = tl.where(supported, target_lse, 0.0)
    log_normalizer = target_lse
    if HAS_NORMALIZER:
        log_normalizer = tl.where(supported, tl.load(log_normalizer_ptr + row).to(ACC), 0.0)
    top = tl.full([BLOCK_V], LOWEST, ACC)
    alpha = tl.zeros([BLOCK_V], ACC)
    sigma, kl = alpha, alpha
    for start in range(0, whole, BLOCK_V):
        top, alpha, sigma, kl = _second_pass(
            z_ptr,
            t_ptr,
            start + lanes,
            n_cols,
            z_scale,
            t_scale,
            draft_lse,
            target_lse,
            log_normalizer,
            top,
            alpha,
            sigma,
            kl,
            False,
        )
    if whole < n_cols:
        top, alpha, sigma, kl = _second_pass(
            z_ptr,
            t_ptr,
            whole + lanes,
            n_cols,
            z_scale,
            t_scale,
            draft_lse,
            target_lse,
            log_normalizer,
            top,
            alpha,
            sigma,
            kl,
            True,
        )
    highest = tl.max(top, 0)
    rescale = tl.exp(top - highest)
    sum_alpha = tl.sum(alpha * rescale, 0)
    sum_sigma = tl.sum(sigma * rescale, 0)
    tl.store(log_acceptance_ptr + row, highest + tl.log(sum_alpha))
    # NaN where alpha is NaN; 0 where it is 0.
    tl.store(sigma_ptr + row, tl.where(sum_alpha == 0, 0.0, sum_sigma / tl.where(sum_alpha == 0, 1.0, sum_alpha)))
    tl.store(kl_ptr + row, tl.sum(kl, 0))
