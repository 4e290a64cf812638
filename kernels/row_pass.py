"""Statistics and gradient of a row in one launch, where the loss is a mix of components: `FUSED_LK_ONE_KERNEL=1`.

Two launches read the logits three times, and the third comes when all other rows of the chunk have been through the
cache. Between them PyTorch makes the derivatives of the terms, in six operations a chunk. Here a row's gradient
follows its statistics, and the derivatives are made of the loss's numbers. It is off until a card has measured it.
"""

import triton
import triton.language as tl

from .online_softmax import full_scale
from .row_grad import gradient_block, numbers_of_row
from .row_stats import row_stats_kernel


@triton.jit(
    do_not_specialize=["base_stride", "values_stride", "saved_stride", "term_stride"],
    do_not_specialize_on_alignment=[
        *("t_index_ptr", "normalizer_ptr", "base_ptr", "values_ptr", "saved_ptr", "draft_argmax_ptr"),
        *("target_argmax_ptr", "label_ptr", "weights_ptr", "kl_weight_ptr"),
    ],
)
def row_pass_kernel(
    z_ptr, z_row_stride, t_ptr, t_row_stride, gradient_ptr, gradient_row_stride, t_index_ptr, normalizer_ptr,
    base_ptr, base_stride, values_ptr, values_stride, saved_ptr, saved_stride, term_stride,
    draft_argmax_ptr, target_argmax_ptr, label_ptr, beta_high, beta_low,
    n_cols, z_scale_high, z_scale_low, z_inner_high, z_inner_low, t_scale_high, t_scale_low, t_inner_high, t_inner_low,
    rounding, weights_ptr, kl_weight_ptr, eta, kl_scale,
    of_tv, of_alpha, of_lambda, of_kl, of_soft_ce, of_ce, of_rkl, of_jsd, of_skl, of_l1,
    LOG_ACCEPTANCE: tl.constexpr, KL: tl.constexpr, SOFT_CE: tl.constexpr, CE: tl.constexpr, RKL: tl.constexpr,
    JSD: tl.constexpr, SKL: tl.constexpr, L1: tl.constexpr, IS_MASS: tl.constexpr,
    ACC: tl.constexpr, TIE: tl.constexpr, EXCESS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per row of z. `of_*` are the weights of the components, `weights` those of the rows, and `kl_weight`
    is lambda where it is given. `gradient_ptr` may be `z_ptr`."""
    row = tl.program_id(0).to(tl.int64)
    row_stats_kernel(  # of this very row: it has the same program
        z_ptr, z_row_stride, t_ptr, t_row_stride, t_index_ptr, normalizer_ptr, base_ptr, base_stride, values_ptr,
        values_stride, saved_ptr, saved_stride, term_stride, draft_argmax_ptr, target_argmax_ptr, label_ptr, beta_high,
        beta_low, n_cols, z_scale_high, z_scale_low, z_inner_high, z_inner_low, t_scale_high, t_scale_low, t_inner_high,
        t_inner_low, rounding, LOG_ACCEPTANCE, KL, SOFT_CE, CE, RKL, JSD, SKL, L1, IS_MASS, ACC, TIE, EXCESS, BLOCK_V,
    )  # fmt: skip
    tl.debug_barrier()  # what one thread has stored the others load

    z_scale = full_scale(z_scale_high, z_scale_low, ACC)
    t_scale = full_scale(t_scale_high, t_scale_low, ACC)
    z_inner, t_inner = z_inner_high, t_inner_high
    gain = z_scale
    if z_inner_high is not None:
        z_inner = full_scale(z_inner_high, z_inner_low, ACC)
        gain = z_scale * z_inner
    if t_inner_high is not None:
        t_inner = full_scale(t_inner_high, t_inner_low, ACC)

    alpha = tl.exp(tl.load(values_ptr + row + LOG_ACCEPTANCE * values_stride.to(tl.int64)))
    if kl_weight_ptr is None:
        lam = kl_scale * tl.exp(-eta * alpha)
    else:
        lam = tl.load(kl_weight_ptr + row).to(ACC)
    weight = tl.load(weights_ptr + row).to(ACC)
    d = tl.where(weight == 0, 0.0, weight * gain)
    d_log_alpha = -d * ((of_tv + of_lambda * (1.0 - lam)) * alpha + of_alpha)
    d_log_alpha = tl.where(weight == 0, 0.0, d_log_alpha)
    d_kl = tl.where(weight == 0, 0.0, d * (of_kl + of_lambda * lam))
    labels = target_argmax_ptr
    if label_ptr is not None:
        labels = label_ptr
    (
        draft_top, draft_log_total, target_top, target_log_total, log_mass, log_alpha, supported, of_q, d_log_alpha,
        d_pt, d_ce, d_rkl, d_jsd, d_skl, d_l1, label_column, top_column, of_top,
    ) = numbers_of_row(
        row, d_log_alpha, d_kl, d * of_soft_ce, d * of_ce, d * of_rkl, d * of_jsd, d * of_skl, d * of_l1,
        base_ptr, base_stride, values_ptr, values_stride, saved_ptr, saved_stride, term_stride, draft_argmax_ptr,
        labels, 0, LOG_ACCEPTANCE, KL, SOFT_CE, CE, RKL, JSD, SKL, L1, ACC,
    )  # fmt: skip
    beta = full_scale(beta_high, beta_low, ACC)

    t_row = row
    if t_index_ptr is not None:
        t_row = tl.load(t_index_ptr + row).to(tl.int64)
    z_ptr += row * z_row_stride
    t_ptr += t_row * t_row_stride
    gradient_ptr += row * gradient_row_stride
    lanes = tl.arange(0, BLOCK_V)
    whole = n_cols // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        gradient_block(
            z_ptr, t_ptr, gradient_ptr, start + lanes, n_cols, z_scale, t_scale, z_inner, t_inner, draft_top,
            draft_log_total, target_top, target_log_total, log_mass, log_alpha, supported, of_q, d_log_alpha, d_pt,
            d_ce, d_rkl, d_jsd, d_skl, d_l1, beta, label_column, top_column, of_top, LOG_ACCEPTANCE, KL, SOFT_CE, CE,
            RKL, JSD, SKL, L1, False, TIE,
        )  # fmt: skip
    if whole < n_cols:
        gradient_block(
            z_ptr, t_ptr, gradient_ptr, whole + lanes, n_cols, z_scale, t_scale, z_inner, t_inner, draft_top,
            draft_log_total, target_top, target_log_total, log_mass, log_alpha, supported, of_q, d_log_alpha, d_pt,
            d_ce, d_rkl, d_jsd, d_skl, d_l1, beta, label_column, top_column, of_top, LOG_ACCEPTANCE, KL, SOFT_CE, CE,
            RKL, JSD, SKL, L1, True, TIE,
        )  # fmt: skip
