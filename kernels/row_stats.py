"""The statistics of each row: everything that its gradient needs, and what the caller reads.

One row holds draft logits z and target logits t over the draft vocabulary; scales are logit_scale / temperature. Under
a softcap z and t stand for tanh(z_inner * z), tanh(t_inner * t):

    log q  = z_scale * (z - draft_top)  - draft_log_total        log p = log pt + log_mass
    log pt = t_scale * (t - target_top) - target_log_total

    base, in rows of its own     draft_top, draft_log_total, target_top, target_log_total, log_mass
    values, saved of each term   its value; sigma, and top (see `fused_lk.rows.interface` for all three)
    draft_argmax, target_argmax  the columns of the largest z and t, the lowest if it is not unique

Without an answer target_top is -inf, and all that is saved of the terms is 0.

    r = exp(min(log q, log p) - log alpha);  w = 1 where q < p, 0 where q > p, a ramp of half width TIE between

In the column of the draft's maximum q may be near 1, and the gradient there a difference of nearly equal numbers. So
this column is kept out of all sums, its w is decided here alone (by a ramp that is relative to log q and log p), and
what it adds is made from the complements 1 - q and 1 - p. log alpha near 0 comes from 1 - alpha, for the same reason.

Two passes over the row, the second mostly from the cache. All of it in log space: with p and q almost disjoint every
min(p, q) underflows in float32, and the gradient of log alpha would be 0 or NaN. w r shares the running maximum of
alpha, and costs no exp of its own.
"""

import triton
import triton.language as tl

from .online_softmax import (
    LOWEST,
    capped,
    expm1,
    full_scale,
    join,
    load_logits,
    log1p,
    log_mixture,
    log_prob,
    tie_ramp,
    update_argmax,
)


@triton.jit
def _first_pass(
    z_ptr, t_ptr, start, lanes, n_cols, z_scale, t_scale, z_inner, t_inner,
    z_top, z_rest, z_at, t_top, t_rest, t_at, MASKED: tl.constexpr,
):  # fmt: skip
    z = capped(load_logits(z_ptr, start + lanes, n_cols, MASKED, z_top.dtype), z_inner)
    t = capped(load_logits(t_ptr, start + lanes, n_cols, MASKED, z_top.dtype), t_inner)
    z_top, z_rest, z_at = update_argmax(z_top, z_rest, z_at, z, start, z_scale)
    t_top, t_rest, t_at = update_argmax(t_top, t_rest, t_at, t, start, t_scale)
    return z_top, z_rest, z_at, t_top, t_rest, t_at


@triton.jit
def _second_pass(
    z_ptr, t_ptr, offs_v, n_cols, z_scale, t_scale, z_inner, t_inner, z_top, z_log_total, t_top, t_log_total,
    log_mass, z_column, beta,
    top, alpha, sigma, kl, soft_ce, rkl, jsd, jsd_c, skl, skl_c, l1, l1_c,
    LOG_ACCEPTANCE: tl.constexpr, KL: tl.constexpr, SOFT_CE: tl.constexpr, RKL: tl.constexpr, JSD: tl.constexpr,
    SKL: tl.constexpr, L1: tl.constexpr, MASKED: tl.constexpr, TIE: tl.constexpr,
):  # fmt: skip
    z = capped(load_logits(z_ptr, offs_v, n_cols, MASKED, top.dtype), z_inner)
    t = capped(load_logits(t_ptr, offs_v, n_cols, MASKED, top.dtype), t_inner)
    log_q = log_prob(z, z_top, z_log_total, z_scale)
    log_pt = log_prob(t, t_top, t_log_total, t_scale)
    if LOG_ACCEPTANCE >= 0:
        log_p = log_pt + log_mass
        smaller = tl.where(log_q < log_p, log_q, log_p)
        w = tie_ramp(log_q, log_p, smaller, TIE)
        smaller = tl.where(offs_v == z_column, float("-inf"), smaller)
        bigger = smaller > top
        step = tl.exp(-tl.abs(smaller - top))
        alpha = tl.where(bigger, alpha * step + 1.0, alpha + step)
        sigma = tl.where(bigger, sigma * step + w, sigma + w * step)
        top = tl.where(bigger, smaller, top)
    if KL >= 0:
        # Where pt is 0 the logarithm may be -inf, or -inf - (-inf).
        pt = tl.exp(log_pt)
        kl += tl.where(pt > 0, pt * (log_pt - log_q), 0.0)
    if SOFT_CE >= 0:
        pt = tl.exp(log_pt)
        soft_ce -= tl.where(pt > 0, pt * log_q, 0.0)
    if (RKL >= 0) | (JSD >= 0) | (SKL >= 0) | (L1 >= 0):
        # What the maximum's column adds is made from complements, at the end.
        q = tl.where(offs_v == z_column, 0.0, tl.exp(log_q))
        pt = tl.where(offs_v == z_column, 0.0, tl.exp(log_pt))
        if RKL >= 0:
            rkl += tl.where(q > 0, q * (log_q - log_pt), 0.0)
        if (JSD >= 0) | (SKL >= 0):
            m_q, m_pt = log_mixture(log_q, log_pt, beta)
        if JSD >= 0:
            c = (beta - 1.0) * tl.where(q > 0, q * m_q, 0.0)
            jsd_c += c
            jsd += c - beta * tl.where(pt > 0, pt * m_pt, 0.0)
        if SKL >= 0:
            skl -= tl.where(pt > 0, pt * m_pt, 0.0)
            skl_c += (beta - 1.0) * q * tl.exp(-m_pt)
        if L1 >= 0:
            l1 += tl.abs(pt - q)
            w = tie_ramp(log_q, log_pt, tl.where(log_q < log_pt, log_q, log_pt), TIE)
            l1_c += q * tl.where(log_pt == float("-inf"), 1.0, 1.0 - 2.0 * w)
    return top, alpha, sigma, kl, soft_ce, rkl, jsd, jsd_c, skl, skl_c, l1, l1_c


@triton.jit
def _top_weight(log_q, log_p, TIE: tl.constexpr):
    """w in the column of the draft's maximum: the ramp is relative to the larger of both, which may be near 0."""
    width = tl.maximum(tl.maximum(tl.abs(log_q), tl.abs(log_p)) * TIE, 1e-37)
    difference = tl.where(log_p == float("-inf"), -1.0, (log_p - log_q) / width)
    return 0.5 + 0.5 * tl.minimum(tl.maximum(difference, -1.0), 1.0)


@triton.jit
def _store(
    values_ptr, values_stride, saved_ptr, saved_stride, term_stride, TERM: tl.constexpr,
    value, sigma, top, nan, supported, without_answer,
):  # fmt: skip
    """Write the results of one term for this row; `nan` is NaN if they have to be."""
    saved_ptr += TERM * term_stride
    tl.store(values_ptr + TERM * values_stride, tl.where(supported, value + nan, without_answer))
    tl.store(saved_ptr, tl.where(supported, sigma + nan, 0.0))
    tl.store(saved_ptr + saved_stride, tl.where(supported, top + nan, 0.0))


@triton.jit(
    do_not_specialize=["base_stride", "values_stride", "saved_stride", "term_stride"],
    do_not_specialize_on_alignment=[
        *("t_index_ptr", "normalizer_ptr", "base_ptr", "values_ptr", "saved_ptr", "draft_argmax_ptr"),
        *("target_argmax_ptr", "label_ptr"),
    ],
)
def row_stats_kernel(
    z_ptr, z_row_stride, t_ptr, t_row_stride, t_index_ptr, normalizer_ptr,
    base_ptr, base_stride, values_ptr, values_stride, saved_ptr, saved_stride, term_stride,
    draft_argmax_ptr, target_argmax_ptr, label_ptr, beta_high, beta_low,
    n_cols, z_scale_high, z_scale_low, z_inner_high, z_inner_low, t_scale_high, t_scale_low, t_inner_high, t_inner_low,
    rounding,
    LOG_ACCEPTANCE: tl.constexpr, KL: tl.constexpr, SOFT_CE: tl.constexpr, CE: tl.constexpr, RKL: tl.constexpr,
    JSD: tl.constexpr, SKL: tl.constexpr, L1: tl.constexpr, IS_MASS: tl.constexpr,
    ACC: tl.constexpr, TIE: tl.constexpr, EXCESS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row of z; it is scored against row `t_index[row]` of t, or its own. A term is
    compiled if its number, its row of values and saved, is not -1."""
    row = tl.program_id(0).to(tl.int64)
    t_row = row
    if t_index_ptr is not None:
        t_row = tl.load(t_index_ptr + row).to(tl.int64)
    z_ptr += row * z_row_stride
    t_ptr += t_row * t_row_stride
    z_scale = full_scale(z_scale_high, z_scale_low, ACC)
    t_scale = full_scale(t_scale_high, t_scale_low, ACC)
    z_inner, t_inner = z_inner_high, t_inner_high
    if z_inner_high is not None:
        z_inner = full_scale(z_inner_high, z_inner_low, ACC)
    if t_inner_high is not None:
        t_inner = full_scale(t_inner_high, t_inner_low, ACC)
    lanes = tl.arange(0, BLOCK_V)
    whole = n_cols // BLOCK_V * BLOCK_V

    z_top = tl.full([BLOCK_V], LOWEST, ACC)
    z_rest = tl.zeros([BLOCK_V], ACC)
    z_at = tl.zeros([BLOCK_V], tl.int32)
    t_top, t_rest, t_at = z_top, z_rest, z_at
    for start in range(0, whole, BLOCK_V):
        z_top, z_rest, z_at, t_top, t_rest, t_at = _first_pass(
            z_ptr, t_ptr, start, lanes, n_cols, z_scale, t_scale, z_inner, t_inner,
            z_top, z_rest, z_at, t_top, t_rest, t_at, False,
        )  # fmt: skip
    if whole < n_cols:
        z_top, z_rest, z_at, t_top, t_rest, t_at = _first_pass(
            z_ptr, t_ptr, whole, lanes, n_cols, z_scale, t_scale, z_inner, t_inner,
            z_top, z_rest, z_at, t_top, t_rest, t_at, True,
        )  # fmt: skip
    z_top, z_rest, z_column = join(z_top, z_rest, z_at, lanes, z_scale)
    t_top, t_rest, t_column = join(t_top, t_rest, t_at, lanes, t_scale)
    z_rest = tl.where(z_top > LOWEST, z_rest, float("nan"))  # a draft that can say nothing
    supported = (t_top > LOWEST) | (t_rest != t_rest)
    t_rest = tl.where(supported, t_rest, 0.0)
    z_log_total, t_log_total = log1p(z_rest), log1p(t_rest)
    log_mass = tl.zeros([], ACC)
    excessive = log_mass > 0
    if normalizer_ptr is not None:
        log_mass = tl.load(normalizer_ptr + row).to(ACC)
        if not IS_MASS:
            largest = EXCESS + rounding * (tl.abs(t_top * t_scale) + tl.abs(log_mass))
            log_mass = (t_top * t_scale - log_mass) + t_log_total
            excessive = log_mass > largest
        log_mass = tl.where(supported, log_mass, 0.0)
    base_ptr += row
    base_stride = base_stride.to(tl.int64)
    tl.store(base_ptr, z_top)
    tl.store(base_ptr + base_stride, z_log_total)
    tl.store(base_ptr + 2 * base_stride, tl.where(supported, t_top, float("-inf")))
    tl.store(base_ptr + 3 * base_stride, t_log_total)
    tl.store(base_ptr + 4 * base_stride, log_mass)
    tl.store(draft_argmax_ptr + row, z_column.to(tl.int64))
    if target_argmax_ptr is not None:
        tl.store(target_argmax_ptr + row, t_column.to(tl.int64))

    # Comparisons drop NaN; one anywhere in the row, or a target that sums to more than 1, has to reach all results.
    broken = (z_rest != z_rest) | (t_rest != t_rest) | (log_mass != log_mass) | excessive
    top = tl.full([BLOCK_V], LOWEST, ACC)
    alpha = tl.zeros([BLOCK_V], ACC)
    sigma, kl, soft_ce, rkl, jsd = alpha, alpha, alpha, alpha, alpha
    jsd_c, skl, skl_c, l1, l1_c = alpha, alpha, alpha, alpha, alpha
    beta = full_scale(beta_high, beta_low, ACC)
    for start in range(0, whole, BLOCK_V):
        top, alpha, sigma, kl, soft_ce, rkl, jsd, jsd_c, skl, skl_c, l1, l1_c = _second_pass(
            z_ptr, t_ptr, start + lanes, n_cols, z_scale, t_scale, z_inner, t_inner, z_top, z_log_total, t_top,
            t_log_total, log_mass, z_column, beta, top, alpha, sigma, kl, soft_ce, rkl, jsd, jsd_c, skl, skl_c, l1,
            l1_c, LOG_ACCEPTANCE, KL, SOFT_CE, RKL, JSD, SKL, L1, False, TIE,
        )  # fmt: skip
    if whole < n_cols:
        top, alpha, sigma, kl, soft_ce, rkl, jsd, jsd_c, skl, skl_c, l1, l1_c = _second_pass(
            z_ptr, t_ptr, whole + lanes, n_cols, z_scale, t_scale, z_inner, t_inner, z_top, z_log_total, t_top,
            t_log_total, log_mass, z_column, beta, top, alpha, sigma, kl, soft_ce, rkl, jsd, jsd_c, skl, skl_c, l1,
            l1_c, LOG_ACCEPTANCE, KL, SOFT_CE, RKL, JSD, SKL, L1, True, TIE,
        )  # fmt: skip

    # The column of the draft's maximum.
    log_q = -z_log_total
    log_pt = log_prob(capped(tl.load(t_ptr + z_column.to(tl.int64)).to(ACC), t_inner), t_top, t_log_total, t_scale)
    not_q = z_rest / (1.0 + z_rest)

    nan = tl.where(broken, float("nan"), 0.0).to(ACC)
    values_ptr += row
    saved_ptr += row
    values_stride, saved_stride = values_stride.to(tl.int64), saved_stride.to(tl.int64)
    term_stride = term_stride.to(tl.int64)
    if LOG_ACCEPTANCE >= 0:
        highest = tl.max(top, 0)
        rescale = tl.exp(top - highest)
        sum_sigma = tl.sum(sigma * rescale, 0)
        log_rest = highest + tl.log(tl.sum(alpha * rescale, 0))
        log_p = log_pt + log_mass
        w = _top_weight(log_q, log_p, TIE)
        smaller = tl.minimum(log_q, log_p)
        missed = tl.maximum(-expm1(smaller) - tl.exp(log_rest), 0.0)  # 1 - alpha
        larger = tl.maximum(smaller, log_rest)
        possible = larger > float("-inf")
        base = tl.where(possible, larger, 0.0)
        log_alpha = base + tl.log(tl.exp(smaller - base) + tl.exp(log_rest - base))
        log_alpha = tl.where(missed < 0.5, log1p(-tl.minimum(missed, 0.5)), log_alpha)
        base = tl.where(possible, log_alpha, 0.0)
        w_r = w * tl.exp(tl.minimum(smaller - base, 0.0))
        w_r_rest = sum_sigma * tl.exp(tl.minimum(highest - base, 0.0))
        _store(
            values_ptr, values_stride, saved_ptr, saved_stride, term_stride, LOG_ACCEPTANCE,
            log_alpha, w_r + w_r_rest, w_r * not_q - w_r_rest / (1.0 + z_rest), nan, supported, float("-inf"),
        )  # fmt: skip
    if KL >= 0:
        _store(
            values_ptr, values_stride, saved_ptr, saved_stride, term_stride, KL,
            tl.sum(kl, 0), -1.0, -expm1(log_pt) - not_q, nan, supported, 0.0,
        )  # fmt: skip
    if SOFT_CE >= 0:
        _store(
            values_ptr, values_stride, saved_ptr, saved_stride, term_stride, SOFT_CE,
            tl.sum(soft_ce, 0), -1.0, -expm1(log_pt) - not_q, nan, supported, 0.0,
        )  # fmt: skip
    q = 1.0 / (1.0 + z_rest)
    if CE >= 0:
        label = t_column.to(tl.int64)
        if label_ptr is not None:
            label = tl.load(label_ptr + row)
        labelled = label >= 0
        z_label = capped(tl.load(z_ptr + tl.where(labelled, label, 0)).to(ACC), z_inner)
        value = tl.where(labelled, -log_prob(z_label, z_top, z_log_total, z_scale), 0.0)
        of_top = tl.where(labelled, tl.where(label == z_column, -not_q, q), 0.0)
        _store(
            values_ptr, values_stride, saved_ptr, saved_stride, term_stride, CE,
            value, tl.where(labelled, -1.0, 0.0), of_top, nan, supported, 0.0,
        )  # fmt: skip
    if RKL >= 0:
        rest = tl.sum(rkl, 0)
        of_top = q * (log_q - log_pt)
        value = of_top + rest
        possible = value != float("inf")
        _store(
            values_ptr, values_stride, saved_ptr, saved_stride, term_stride, RKL, value,
            tl.where(possible, value, 0.0), tl.where(possible, of_top * not_q - q * rest, 0.0), nan, supported, 0.0,
        )  # fmt: skip
    if (JSD >= 0) | (SKL >= 0):
        m_q, m_pt = log_mixture(log_q, log_pt, beta)
        of_pt = tl.where(log_pt > float("-inf"), tl.exp(log_pt) * m_pt, 0.0)
    if JSD >= 0:
        of_top = (beta - 1.0) * q * m_q
        rest = tl.sum(jsd_c, 0)
        _store(
            values_ptr, values_stride, saved_ptr, saved_stride, term_stride, JSD,
            tl.sum(jsd, 0) + (of_top - beta * of_pt), of_top + rest, of_top * not_q - q * rest, nan, supported, 0.0,
        )  # fmt: skip
    if SKL >= 0:
        of_top = (beta - 1.0) * q * tl.exp(-m_pt)
        rest = tl.sum(skl_c, 0)
        _store(
            values_ptr, values_stride, saved_ptr, saved_stride, term_stride, SKL,
            tl.sum(skl, 0) - of_pt, of_top + rest, of_top * not_q - q * rest, nan, supported, 0.0,
        )  # fmt: skip
    if L1 >= 0:
        of_top = q * (1.0 - 2.0 * _top_weight(log_q, log_pt, TIE))
        rest = tl.sum(l1_c, 0)
        _store(
            values_ptr, values_stride, saved_ptr, saved_stride, term_stride, L1,
            tl.sum(l1, 0) + tl.abs(-expm1(log_pt) - not_q), of_top + rest, of_top * not_q - q * rest,
            nan, supported, 0.0,
        )  # fmt: skip
