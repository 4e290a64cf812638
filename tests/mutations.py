# ruff: noqa: E501 (a table)
"""Do the tests see a bug? Each mutation breaks one line of a copy of the product and runs the tests that should notice.

    python tests/mutations.py [--quick] [--only TEXT] [--part I/N]

prints a Markdown table and exits with 1 if a mutation survives. The tests must pass on the unchanged copy first.
`tests/test_mutations.py` keeps the table in step with the sources.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: F401
import pytest
import torch  # noqa: F401
import triton  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 180

FUZZ = "tests/test_fuzz.py::test_row_operations[triton]"
FUZZ_TORCH = "tests/test_fuzz.py::test_row_operations[torch]"
TILES = "tests/test_kernels.py::test_many_tiles_per_row[1031-torch.float64]"
TIES = "tests/test_kernels.py::test_ties_have_half_weight"
EXACT_TIES = "tests/test_extremes.py::test_bitwise_ties_follow_torch_minimum"
HARD = "tests/test_hard_rows.py::test_{}"
DIGITS_TORCH, DIGITS_TRITON = (
    HARD.format(f"sure_rows_keep_their_digits[sure_alike-{x}-recompute]") for x in ("torch", "triton")
)
BLOCKS_TORCH, BLOCKS_TRITON = (
    HARD.format(f"sure_rows_keep_their_digits[sure_alike-{x}-recompute, blocks of columns]")
    for x in ("torch", "triton")
)
NAN = "tests/test_not_a_number.py::test_it_reaches_the_loss[{}]"
UNREASONABLE = "tests/test_not_a_number.py::test_targets_that_are_no_probabilities[{}]"
EACH_TERM = "tests/test_not_a_number.py::test_it_reaches_each_term_alone[{}]"
WITHOUT_ANSWER = "tests/test_not_a_number.py::test_it_stays_out_of_a_row_without_an_answer[{}]"
HEADS_TORCH, HEADS_TRITON = (f"tests/test_heads.py::test_gradcheck[capped-{x}]" for x in ("torch", "triton"))
DIGITS_OF_CAP_TRITON = "tests/test_heads.py::test_digits_of_the_cap[torch.float32-triton]"
IMPOSSIBLE = "tests/test_heads.py::test_a_token_that_cannot_be_drawn_stays_so[{}]"
ORDER_TORCH, ORDER_TRITON = (
    f"tests/test_kernels.py::test_a_term_is_the_same_without_the_others[37-{x}]" for x in ("torch", "triton")
)


class Mutation(NamedTuple):
    """`original` occurs once in the files that `where` (globs) names; there it becomes `mutated`."""

    kind: str
    where: str
    original: str
    mutated: str
    tests: str
    quick: bool = False


SOFTMAX, STATS, GRAD, LSE = (f"kernels/{x}.py" for x in ("online_softmax", "row_stats", "row_grad", "lse_argmax"))
LAUNCH, INTERFACE = "kernels/launch.py", "fused_lk/rows/interface.py"
PASS, ONE_KERNEL = "kernels/row_pass.py", "tests/test_one_kernel.py::test_it_is_that_of_two"
PLAIN = "fused_lk/rows/plain.py fused_lk/rows/terms.py"

# fmt: off
KERNELS = [
    Mutation("mask", SOFTMAX, 'other=float("-inf"))', "other=0.0)", TILES, True),
    Mutation("guard", SOFTMAX, "tl.load(x_ptr + offs_v, mask=offs_v < n_cols", "tl.load(x_ptr + offs_v, mask=offs_v <= n_cols", TILES),
    Mutation("scale", SOFTMAX, "return (x - top) * scale - log_total", "return (x - top) - log_total", TILES),
    Mutation("scale", SOFTMAX, " + tl.full([], low, ACC)", "", TILES),
    Mutation("one number", SOFTMAX, "return (x - top) * scale - log_total", "return x * scale - (top * scale + log_total)", HARD.format("a_common_offset_changes_nothing[trained-triton]")),
    Mutation("tie weight", SOFTMAX, "return 0.5 + 0.5 * tl.minimum(", "return 0.0 + 1.0 * tl.minimum(", TIES, True),
    Mutation("sign", SOFTMAX, 'float("-inf"), 0.0, log_p - log_q)', 'float("-inf"), 0.0, log_q - log_p)', TILES),
    Mutation("guard", SOFTMAX, 'tl.where(smaller == float("-inf"), 0.0, log_p - log_q)', "log_p - log_q", HARD.format("gradients_within_the_eager_error[impossible_tokens-triton-one pass]")),
    Mutation("sign", SOFTMAX, "step = tl.exp(-tl.abs(x - top) * scale)", "step = tl.exp(tl.abs(x - top) * scale)", TILES),
    Mutation("ties", SOFTMAX, "bigger = x > top", "bigger = x >= top", FUZZ),
    Mutation("off by one", SOFTMAX, "tl.where(bigger, rest * step, rest) + step", "tl.where(bigger, rest * step, rest)", TILES),
    Mutation("index", SOFTMAX, "tl.where(bigger, start, at)", "tl.where(bigger, at, start)", TILES),
    Mutation("scale", SOFTMAX, "(own + rest) * tl.exp((top - highest) * scale)", "(own + rest)", TILES),
    Mutation("ties", SOFTMAX, "column = tl.min(tl.where(top == highest, at + lanes, 2147483647), 0)", "column = tl.max(tl.where(top == highest, at + lanes, -1), 0)", FUZZ),
    Mutation("complement", SOFTMAX, "tl.log(u) * (x / tl.where(exact, 1.0, u - 1.0))", "tl.log(u)", "tests/test_hard_rows.py::test_total_variation_of_sure_rows[triton]"),
    Mutation("complement", SOFTMAX, "(u - 1.0) * (x / tl.where(simple, 1.0, log_u))", "u - 1.0", "tests/test_hard_rows.py::test_total_variation_of_sure_rows[triton]"),
    Mutation("tile loop", LSE, "for start in range(0, whole, BLOCK_V)", "for start in range(BLOCK_V, whole, BLOCK_V)", TILES, True),
    Mutation("tile loop", LSE, "if whole < n_cols", "if whole > n_cols", TILES),
    Mutation("offset", LSE, "x_ptr += row * x_row_stride", "x_ptr += row", TILES),
    Mutation("index", LSE, "tl.load(inside_ptr + offs_v) != 0", "tl.load(inside_ptr + lanes) != 0", TILES),
    Mutation("sign", LSE, "y = (outer_top - top) * scale + (outer_log_total - log_total)", "y = (outer_top - top) * scale - (outer_log_total - log_total)", TILES),
    Mutation("ties", LSE, "tl.minimum(column, outer_column)", "column", "tests/test_kernels.py::test_an_argmax_that_ties_inside_and_outside"),
    Mutation("int32 offset", LSE, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)", "tests/test_offsets.py"),
    Mutation("offset", STATS, "z_ptr += row * z_row_stride", "z_ptr += row * t_row_stride", FUZZ),
    Mutation("index", STATS, "t_row = tl.load(t_index_ptr + row).to(tl.int64)", "t_row = row", TILES, True),
    Mutation("index", STATS, "t_ptr += t_row * t_row_stride", "t_ptr += row * t_row_stride", TILES),
    Mutation("int32 offset", STATS, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)", "tests/test_offsets.py"),
    Mutation("off by one", STATS, "whole = n_cols // BLOCK_V * BLOCK_V", "whole = (n_cols - 1) // BLOCK_V * BLOCK_V - BLOCK_V", TILES),
    Mutation("scale", STATS, "tl.where(bigger, sigma * step + w,", "tl.where(bigger, sigma + w,", TILES, True),
    Mutation("scale", STATS, "sum_sigma = tl.sum(sigma * rescale, 0)", "sum_sigma = tl.sum(sigma, 0)", TILES),
    Mutation("w decided twice", STATS, 'smaller = tl.where(offs_v == z_column, float("-inf"), smaller)', "smaller = smaller + 0.0", TILES, True),
    Mutation("complement", STATS, "not_q = z_rest / (1.0 + z_rest)", "not_q = 1.0 - 1.0 / (1.0 + z_rest)", DIGITS_TRITON),
    Mutation("complement", STATS, "tl.where(missed < 0.5, log1p(-tl.minimum(missed, 0.5)), log_alpha)", "log_alpha", "tests/test_hard_rows.py::test_total_variation_of_sure_rows[triton]"),
    Mutation("tie weight", STATS, "tl.maximum(tl.abs(log_q), tl.abs(log_p)) * TIE, 1e-37)", "TIE, 1e-37)", DIGITS_TRITON),
    Mutation("guard", STATS, "kl += tl.where(pt > 0, ", "kl += tl.where(pt >= 0, ", TILES),
    Mutation("index", STATS, "tl.load(normalizer_ptr + row)", "tl.load(normalizer_ptr)", TILES),
    Mutation("sign", STATS, "(t_top * t_scale - log_mass) + t_log_total", "(t_top * t_scale - log_mass) - t_log_total", TILES),
    Mutation("min", STATS, "smaller = tl.where(log_q < log_p, log_q, log_p)", "smaller = tl.where(log_q > log_p, log_q, log_p)", TILES),
    Mutation("index", STATS, "values_ptr += row", "values_ptr += row + 1", TILES),
    Mutation("index", STATS, "saved_ptr += row", "saved_ptr += row + 1", TILES),
    Mutation("index", STATS, "base_ptr += row", "base_ptr += row + 1", TILES),
    Mutation("index", STATS, "tl.store(base_ptr + 4 * base_stride", "tl.store(base_ptr + 3 * base_stride", TILES),
    Mutation("stride", STATS, "tl.store(base_ptr + base_stride", "tl.store(base_ptr + values_stride.to(tl.int64)", FUZZ),
    Mutation("stride", STATS, "tl.store(values_ptr + TERM * values_stride", "tl.store(values_ptr + TERM * term_stride", FUZZ),
    Mutation("stride", STATS, "saved_ptr += TERM * term_stride", "saved_ptr += TERM * values_stride", FUZZ),
    Mutation("stride", STATS, "tl.store(saved_ptr + saved_stride", "tl.store(saved_ptr + term_stride", TILES),
    Mutation("term", STATS, "saved_ptr += TERM * term_stride", "saved_ptr += 0 * term_stride", TILES),
    Mutation("term", STATS, "saved_ptr, saved_stride, term_stride, LOG_ACCEPTANCE,", "saved_ptr, saved_stride, term_stride, 0,", ORDER_TRITON),
    Mutation("term", STATS, "saved_ptr, saved_stride, term_stride, KL,", "saved_ptr, saved_stride, term_stride, 1,", ORDER_TRITON),
    Mutation("term", STATS, "if LOG_ACCEPTANCE >= 0:\n        log_p", "if LOG_ACCEPTANCE == 0:\n        log_p", ORDER_TRITON),
    Mutation("term", STATS, "if LOG_ACCEPTANCE >= 0:\n        highest", "if LOG_ACCEPTANCE == 0:\n        highest", ORDER_TRITON),
    Mutation("term", STATS, "if KL >= 0:\n        #", "if KL > 0:\n        #", ORDER_TRITON),
    Mutation("term", STATS, "if KL >= 0:\n        _store", "if KL > 0:\n        _store", ORDER_TRITON),
    Mutation("sign", STATS, "tl.sum(kl, 0), -1.0,", "tl.sum(kl, 0), 1.0,", TILES),
    Mutation("sign", STATS, "w_r * not_q - w_r_rest / (1.0 + z_rest)", "w_r * not_q + w_r_rest / (1.0 + z_rest)", TILES),
    Mutation("complement", STATS, "tl.sum(kl, 0), -1.0, -expm1(log_pt) - not_q", "tl.sum(kl, 0), -1.0, tl.exp(log_q) - tl.exp(log_pt)", HARD.format("sure_rows_keep_their_digits[sure_of_the_same-triton-recompute]")),
    Mutation("without answer", STATS, "nan, supported, float(\"-inf\"),", "nan, supported, 0.0,", TILES),
    Mutation("without answer", STATS, "tl.sum(kl, 0), -1.0, -expm1(log_pt) - not_q, nan, supported, 0.0,", "tl.sum(kl, 0), -1.0, -expm1(log_pt) - not_q, nan, supported, float(\"-inf\"),", TILES),
    Mutation("without answer", STATS, "tl.where(supported, value + nan, without_answer)", "value + nan", WITHOUT_ANSWER.format("triton")),
    Mutation("without answer", STATS, "tl.store(saved_ptr, tl.where(supported, sigma + nan, 0.0))", "tl.store(saved_ptr, sigma + nan)", TILES),
    Mutation("without answer", STATS, "tl.where(supported, top + nan, 0.0)", "top + nan", FUZZ),
    Mutation("index", STATS, "tl.store(target_argmax_ptr + row, t_column", "tl.store(target_argmax_ptr + row, z_column", TILES),
    Mutation("NaN swallowed", STATS, "broken = (z_rest != z_rest) | (t_rest != t_rest)", "broken = (z_rest != z_rest)", NAN.format("tv-{'plan': 'recompute'}-target nan-triton")),
    Mutation("NaN swallowed", STATS, "(t_top > LOWEST) | (t_rest != t_rest)", "t_top > LOWEST", "tests/test_not_a_number.py::test_targets_that_are_all_nan[triton]"),
    Mutation("mass", STATS, "(log_mass != log_mass) | excessive", "(log_mass != log_mass)", "tests/test_not_a_number.py::test_targets_that_are_no_probabilities[sum 1.5-triton]"),
    Mutation("mass", STATS, "(log_mass != log_mass) | excessive", "excessive", UNREASONABLE.format("a normaliser that is NaN-triton")),
    Mutation("NaN swallowed", STATS, 'tl.where(broken, float("nan"), 0.0).to(ACC)', "tl.zeros([], ACC)", UNREASONABLE.format("sum 1.5-triton")),
    Mutation("NaN swallowed", STATS, "tl.where(supported, value + nan, without_answer)", "tl.where(supported, value, without_answer)", UNREASONABLE.format("a normaliser that is NaN-triton")),
    Mutation("NaN swallowed", STATS, "tl.store(saved_ptr, tl.where(supported, sigma + nan, 0.0))", "tl.store(saved_ptr, tl.where(supported, sigma, 0.0))", EACH_TERM.format("triton-('kl',)")),
    Mutation("NaN swallowed", STATS, "tl.where(supported, top + nan, 0.0)", "tl.where(supported, top, 0.0)", EACH_TERM.format("triton-('kl',)")),
    Mutation("offset", GRAD, "start = tl.program_id(1) * BLOCK_V", "start = tl.program_id(1) * 0", TILES, True),
    Mutation("offset", GRAD, "gradient_ptr += row * gradient_row_stride", "gradient_ptr += row * z_row_stride", FUZZ),
    Mutation("index", GRAD, "t_row = tl.load(t_index_ptr + row).to(tl.int64)", "t_row = row", TILES),
    Mutation("int32 offset", GRAD, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)", "tests/test_offsets.py"),
    Mutation("guard", GRAD, "gradient, mask=offs_v < n_cols)", "gradient, mask=offs_v <= n_cols)", TILES, True),
    Mutation("guard", GRAD, "if start + BLOCK_V <= n_cols", "if start + BLOCK_V <= n_cols + 1", FUZZ),
    Mutation("sign", GRAD, "gradient -= d_pt * tl.exp(log_pt)", "gradient += d_pt * tl.exp(log_pt)", TILES, True),
    Mutation("sign", GRAD, "gradient += d_log_alpha * w_r", "gradient -= d_log_alpha * w_r", TILES),
    Mutation("sigma", GRAD, "return of_q - d * tl.load(saved_ptr), ", "return of_q, ", TILES, True),
    Mutation("sign", GRAD, "return of_q - d * tl.load(saved_ptr), ", "return of_q + d * tl.load(saved_ptr), ", TILES),
    Mutation("sign", GRAD, "of_top + d * tl.load(saved_ptr + saved_stride)", "of_top - d * tl.load(saved_ptr + saved_stride)", TILES),
    Mutation("stride", GRAD, "of_top + d * tl.load(saved_ptr + saved_stride)", "of_top + d * tl.load(saved_ptr)", TILES),
    Mutation("overflow", GRAD, "tl.exp(tl.minimum(smaller - log_alpha, 0.0))", "tl.exp(tl.maximum(log_q, log_p) - log_alpha)", "tests/test_kernels.py::test_disjoint_rows_keep_their_gradient"),
    Mutation("w decided twice", GRAD, "gradient = tl.where(offs_v == top_column, of_top, gradient)", "gradient = gradient + 0.0", DIGITS_TRITON, True),
    Mutation("index", GRAD, "(tl.load(draft_argmax_ptr + row) - first_column)", "tl.load(draft_argmax_ptr + row)", BLOCKS_TRITON),
    Mutation("guard", GRAD, "tl.where(supported, gradient, 0.0)", "gradient", TILES),
    Mutation("guard", GRAD, "tl.where(possible, log_alpha, 0.0)", "log_alpha", "tests/test_extremes.py::test_no_token_in_common"),
    Mutation("scale", GRAD, "d_values_ptr + TERM * d_values_stride).to(ACC) * gain", "d_values_ptr + TERM * d_values_stride).to(ACC)", TILES),
    Mutation("scale", GRAD, "_d_value(d_values_ptr, d_values_stride, gain, LOG_ACCEPTANCE, ACC)", "_d_value(d_values_ptr, d_values_stride, 1.0, LOG_ACCEPTANCE, ACC)", TILES),
    Mutation("index", GRAD, "d_values_ptr += row", "d_values_ptr += 0", TILES),
    Mutation("index", GRAD, "    saved_ptr += row", "    saved_ptr += 0", TILES),
    Mutation("index", GRAD, "base_ptr += row", "base_ptr += 0", TILES),
    Mutation("index", GRAD, "values_ptr + row + LOG_ACCEPTANCE", "values_ptr + LOG_ACCEPTANCE", TILES),
    Mutation("index", GRAD, "tl.load(base_ptr + 4 * base_stride)", "tl.load(base_ptr + 3 * base_stride)", TILES),
    Mutation("stride", GRAD, "tl.load(base_ptr + base_stride)", "tl.load(base_ptr + values_stride.to(tl.int64))", FUZZ),
    Mutation("stride", GRAD, "LOG_ACCEPTANCE * values_stride)", "LOG_ACCEPTANCE * term_stride)", FUZZ),
    Mutation("stride", GRAD, "saved_ptr + LOG_ACCEPTANCE * term_stride", "saved_ptr + LOG_ACCEPTANCE * d_values_stride", FUZZ),
    Mutation("stride", GRAD, "saved_ptr + KL * term_stride", "saved_ptr + KL * saved_stride", FUZZ),
    Mutation("stride", GRAD, "_d_value(d_values_ptr, d_values_stride, gain, KL, ACC)", "_d_value(d_values_ptr, term_stride, gain, KL, ACC)", FUZZ),
    Mutation("stride", GRAD, "_d_value(d_values_ptr, d_values_stride, gain, LOG_ACCEPTANCE, ACC)", "_d_value(d_values_ptr, term_stride, gain, LOG_ACCEPTANCE, ACC)", FUZZ),
    Mutation("term", GRAD, "_d_value(d_values_ptr, d_values_stride, gain, LOG_ACCEPTANCE, ACC)", "_d_value(d_values_ptr, d_values_stride, gain, 0, ACC)", ORDER_TRITON),
    Mutation("term", GRAD, "if LOG_ACCEPTANCE >= 0:\n        log_p", "if LOG_ACCEPTANCE == 0:\n        log_p", ORDER_TRITON),
    Mutation("term", GRAD, "if LOG_ACCEPTANCE >= 0:\n        #", "if LOG_ACCEPTANCE == 0:\n        #", ORDER_TRITON),
    Mutation("term", GRAD, "if (KL >= 0) | (SOFT_CE >= 0):", "if (KL > 0) | (SOFT_CE > 0):", ORDER_TRITON),
    Mutation("term", GRAD, "if KL >= 0:\n        of_q", "if KL > 0:\n        of_q", ORDER_TRITON),
    Mutation("off by one", LAUNCH, 'triton.cdiv(size, meta["BLOCK_V"])', 'max(1, size // meta["BLOCK_V"])', TILES),
    Mutation("stride", LAUNCH, "None if x is None else x.contiguous()", "x", FUZZ),
    Mutation("stride", LAUNCH, "if x.stride(1) == 1 or x.shape[1] == 1", "if True", FUZZ),
    Mutation("stride", LAUNCH, "if into is not gradient_out", "if False", FUZZ),
    Mutation("scale", LAUNCH, "value - high if math.isfinite(high) else 0.0", "0.0", TILES),
    Mutation("index", LAUNCH, "into, into.stride(0), _vector(rows.t_index)", "into, z.stride(0), _vector(rows.t_index)", FUZZ),
    Mutation("stride", LAUNCH, "saved, saved.stride(0), saved.stride(1)", "saved, saved.stride(1), saved.stride(0)", TILES),
    Mutation("stride", LAUNCH, "return base, base.stride(0)", "return base, values.stride(0)", FUZZ),
    Mutation("stride", LAUNCH, "values, values.stride(0)", "values, base.stride(0)", FUZZ),
    Mutation("stride", LAUNCH, "d_values, d_values.stride(0)", "d_values, stats.values.stride(0)", FUZZ),
    Mutation("stride", LAUNCH, ", _unit_columns(d_values)", ", d_values", FUZZ),
    Mutation("term", LAUNCH, "terms.index(name) if name in terms", "TERMS.index(name) if name in terms", ORDER_TRITON),
    Mutation("index", LAUNCH, "z.shape[1], rows.first_column", "z.shape[1], 0", BLOCKS_TRITON),
    Mutation("mass", LAUNCH, "rows.normalizer is not None and rows.normalizer.is_mass", "False", "tests/test_kernels.py::test_kernels_agree_with_their_twin[torch.float64-37-False-mass]"),
    Mutation("sign", PASS, "d_log_alpha = -d *", "d_log_alpha = d *", ONE_KERNEL),
    Mutation("scale", PASS, "(1.0 - lam)) * alpha", "lam) * alpha", ONE_KERNEL),
    Mutation("scale", PASS, "kl_scale * tl.exp(", "tl.exp(", ONE_KERNEL),
    Mutation("scale", PASS, "gain = z_scale * z_inner", "gain = z_scale", ONE_KERNEL),
    Mutation("mask", PASS, "    if whole < n_cols:", "    if whole > n_cols:", ONE_KERNEL),
    Mutation("index", PASS, "d * of_rkl, d * of_jsd", "d * of_jsd, d * of_rkl", ONE_KERNEL),
    Mutation("index", PASS, "labels = label_ptr", "labels = target_argmax_ptr", ONE_KERNEL),
    Mutation("index", PASS, "kl_weight_ptr + row", "kl_weight_ptr", ONE_KERNEL),
]

TWIN = [
    Mutation("sign", PLAIN, "torch.sub(self.t, self.z, out=self.of_ratio)", "torch.sub(self.z, self.t, out=self.of_ratio)", FUZZ_TORCH, True),
    Mutation("sigma", PLAIN, "torch.div(w_top + w_rest, alpha, out=self.sigma)", "torch.div(w_top + 2 * w_rest, alpha, out=self.sigma)", FUZZ_TORCH),
    Mutation("underflow", PLAIN, "block.some(alpha < SMALLEST_LINEAR)", "block.some(alpha < 0)", "tests/test_extremes.py::test_disjoint_rows_have_finite_right_gradients"),
    Mutation("underflow", PLAIN, "block.some(~_is_linear(self.value))", "block.some(self.value > 0)", "tests/test_extremes.py::test_disjoint_rows_have_finite_right_gradients"),
    Mutation("guard", PLAIN, "block.some(~torch.isfinite(self.value))", "block.some(self.value < NEG_INF)", "tests/test_extremes.py::test_a_token_that_neither_side_can_say_in_float32"),
    Mutation("sigma", PLAIN, "torch.stack([sigma.neg(), ", "torch.stack([0 * sigma, ", FUZZ_TORCH, True),
    Mutation("sign", PLAIN, "torch.stack([sigma.neg(), ", "torch.stack([sigma, ", FUZZ_TORCH),
    Mutation("scale", PLAIN, "0.5 * d * torch.exp(-value), d)", "d * torch.exp(-value), d)", FUZZ_TORCH),
    Mutation("scale", PLAIN, "torch.where(stats.supported(), d_values * rows.z_transform.gain, 0.0)", "torch.where(stats.supported(), d_values, 0.0)", FUZZ_TORCH),
    Mutation("offset", PLAIN, "clamp_(max=size - group)", "clamp_(max=size - group - 1)", FUZZ_TORCH),
    Mutation("tile loop", PLAIN, "if whole < size:", "if False:", FUZZ_TORCH),
    Mutation("index", INTERFACE, "else index[start:stop]", "else index[0 : stop - start]", FUZZ_TORCH),
    Mutation("index", INTERFACE, "t=self.t[start:stop] if index is None else self.t", "t=self.t[start:stop]", FUZZ_TORCH),
    Mutation("index", INTERFACE, "x.narrow(-1, start, stop - start)", "x.narrow(-1, 0, stop - start)", FUZZ_TORCH),
    Mutation("index", PLAIN, "torch.index_select(x, 0, index, out=buffer)", "buffer.copy_(x[: len(index)])", FUZZ_TORCH),
    Mutation("index", PLAIN, "buffer.copy_(x[index])", "buffer.copy_(x[index.sort().values])", FUZZ_TORCH),
    Mutation("sign", PLAIN, "(t_scale * self.t_top - given) + self.t_log_total", "(t_scale * self.t_top - given) - self.t_log_total", FUZZ_TORCH),
    Mutation("index", INTERFACE, "value=self.value[start:stop]", "value=self.value[0 : stop - start]", FUZZ_TORCH),
    Mutation("sigma", PLAIN, "self.sigma[rows] = log_alpha, w_r.sum(1)", "self.sigma[rows] = log_alpha, w_r.amax(1)", "tests/test_extremes.py::test_disjoint_rows_have_finite_right_gradients"),
    Mutation("sigma", PLAIN, "at.squeeze(1)) - self.sigma[rows] *", "at.squeeze(1)) - 0 * self.sigma[rows] *", FUZZ_TORCH),
    Mutation("tie weight", PLAIN, "return (1 + ramp).mul_(0.5)", "return (ramp >= 0).to(log_q.dtype)", "tests/test_extremes.py::test_ties_of_almost_disjoint_rows"),
    Mutation("tie weight", PLAIN, "torch.addcmul(block.q, ramp, block.q, value=1 / tie, out=ramp)", "torch.addcmul(block.q, ramp.add_(tie / 2).sign_(), block.q, out=ramp)", EXACT_TIES),
    Mutation("w decided twice", PLAIN, "into.scatter_(1, column, torch.where(inside, top, into.gather(1, column)))", "pass", DIGITS_TORCH, True),
    Mutation("saved bit ignored", PLAIN, "is None else label]) - rows.first_column", "is None else label])", BLOCKS_TORCH),
    Mutation("off by one", PLAIN, "(columns < rows.z.shape[1])", "(columns <= rows.z.shape[1])", "tests/test_kernels.py::test_blocks_of_few_columns[torch]"),
    Mutation("offset", PLAIN, "torch.where(inside, top, into.gather(1, column))", "top", BLOCKS_TORCH),
    Mutation("complement", PLAIN, "return top, torch.where(top > 0.5, rest, 1 - top)", "return top, 1 - top", DIGITS_TORCH),
    Mutation("complement", PLAIN, "torch.sub(-torch.expm1(block.log_pt_top), block.q_rest, out=self.top)", "torch.sub(block.q_top, block.log_pt_top.exp(), out=self.top)", DIGITS_TORCH),
    Mutation("complement", PLAIN, "torch.where(missed < 0.5, torch.log1p(-missed), alpha.log(), out=self.value)", "torch.log(alpha, out=self.value)", "tests/test_hard_rows.py::test_total_variation_of_sure_rows[torch]"),
    Mutation("one number", PLAIN, "ratio.add_((self.z_log_total - self.t_log_total).unsqueeze(1))", "ratio.add_(((self.z_top + self.z_log_total) - (self.t_top + self.t_log_total) - self.z_top + self.t_top).unsqueeze(1))", HARD.format("a_common_offset_changes_nothing[trained-torch]")),
    Mutation("one number", PLAIN, "mass = -torch.log1p((probs * ~inside).sum(1) / share)", "mass = ((row + 1e6)[:, inside].logsumexp(1) - (row + 1e6).logsumexp(1))", HARD.format("an_offset_over_a_truncated_vocabulary[logits-torch]")),
    Mutation("NaN swallowed", PLAIN, 'out.values.masked_fill_(broken, float("nan"))', "pass", NAN.format("kl-{'plan': 'recompute'}-draft nan-torch")),
    Mutation("NaN swallowed", PLAIN, 'out.saved.masked_fill_(broken, float("nan"))', "pass", EACH_TERM.format("torch-('kl',)")),
    Mutation("NaN swallowed", PLAIN, "broken = self.z_log_total + self.t_log_total", "broken = self.t_log_total", NAN.format("kl-{'plan': 'recompute'}-draft nan-torch")),
    Mutation("NaN swallowed", PLAIN, "else broken + self.log_mass", "else broken", UNREASONABLE.format("a normaliser that is NaN-torch")),
    Mutation("mass", PLAIN, "out > normalizer.most_log_mass(given, self.t_top, t_scale)", "out > 1e9", UNREASONABLE.format("sum 1.5-torch")),
    Mutation("tile loop", PLAIN, "for start in range(0, n, step))", "for start in range(0, n - 1, step))", FUZZ_TORCH),
    Mutation("guard", PLAIN, ".mul_(log_r.clamp_(max=0.0).exp_())", ".mul_((log_q - log_alpha.unsqueeze(1)).exp_())", FUZZ_TORCH),
    Mutation("offset", PLAIN, "factors.rows(block.start, block.stop)", "factors.rows(0, block.stop - block.start)", FUZZ_TORCH),
    Mutation("offset", PLAIN, "loss.rows(block.start, block.stop)", "loss.rows(0, block.stop - block.start)", ORDER_TORCH),
    Mutation("offset", PLAIN, "block.gradient(factors, gradient_out[block.start : block.stop])", "block.gradient(factors, gradient_out[: block.stop - block.start])", ORDER_TORCH),
    Mutation("sign", PLAIN, "def make_columns(self, block: Any) -> Tensor:\n        return block.pt\n\n    @staticmethod\n    def factor(value: Tensor, d: Tensor) -> Tensor:\n        return -d", "def make_columns(self, block: Any) -> Tensor:\n        return block.pt\n\n    @staticmethod\n    def factor(value: Tensor, d: Tensor) -> Tensor:\n        return d", FUZZ_TORCH),
    Mutation("sign", PLAIN, "self.sigma.fill_(-1.0)", "self.sigma.fill_(1.0)", FUZZ_TORCH),
    Mutation("term", PLAIN, "del block.log_ratio", "pass", ORDER_TORCH),
    Mutation("term", PLAIN, "*self.out.saved, strict=True", "*self.out.saved.flip(0), strict=True", FUZZ_TORCH),
    Mutation("term", PLAIN, "zip(terms, stats.values, d_values", "zip(terms, stats.values.flip(0), d_values", FUZZ_TORCH),
    Mutation("term", PLAIN, "torch.addcmul(total, *dense[-1], out=into)", "torch.addcmul(total, dense[-1][0], dense[0][1], out=into)", FUZZ_TORCH),
    Mutation("term", PLAIN, "[of_terms.pop() for _ in range(term.num_buffers)]", "[self.of_pt] * term.num_buffers", FUZZ_TORCH),
    Mutation("scale", PLAIN, "(top - log_total).exp_() / out.amax(1)", "(top - log_total).exp_()", FUZZ_TORCH),
    Mutation("guard", PLAIN, "if any_row(impossible):", "if False:", "tests/test_kernels.py::test_blocks_of_few_columns[torch]"),
    Mutation("without answer", PLAIN, "without_answer = NEG_INF", "without_answer = 0.0", TILES),
    Mutation("without answer", PLAIN, "num_buffers, without_answer = 1, 0.0", "num_buffers, without_answer = 1, NEG_INF", TILES),
    Mutation("without answer", PLAIN, "term.value.masked_fill_(self.unsupported, term.without_answer)", "pass", WITHOUT_ANSWER.format("torch")),
    Mutation("without answer", PLAIN, "into.masked_fill_(self.unsupported.unsqueeze(1), 0.0)", "pass", WITHOUT_ANSWER.format("torch")),
    Mutation("without answer", PLAIN, "out.saved.masked_fill_(self.unsupported, 0.0)", "pass", TILES),
    Mutation("without answer", PLAIN, "    out.masked_fill_(self.unsupported, 0.0)", "    pass", TILES),
]

PAIRS = "tests/test_pairs.py"
CALLS = "tests/test_fuzz_calls.py::test_whole_calls[torch]"
CHUNKS = "tests/test_losses.py::test_several_chunks_and_several_blocks_a_chunk"
WORK = "fused_lk/pairs/*.py fused_lk/walk/problem.py"
LISTS = [
    Mutation("off by one", WORK, "torch.where(rows >= 0, rows, _IGNORED)", "torch.where(rows > 0, rows, _IGNORED)", PAIRS, True),
    Mutation("mask", WORK, "key = torch.where(mask > 0, key, _IGNORED)", "key = torch.where(mask >= 0, key, _IGNORED)", PAIRS, True),
    Mutation("sort", WORK, "self.weights = mask[draft_rows]", "self.weights = mask[draft_rows.sort().values]", PAIRS),
    Mutation("sort", WORK, "self.positions = positions[draft_rows]", "self.positions = positions[draft_rows.sort().values]", PAIRS),
    Mutation("off by one", WORK, "(positions >= self.num_positions)", "(positions > self.num_positions)", "tests/test_bad_objects.py::test_objects[pairs: positions]"),
    Mutation("off by one", WORK, "used.max() >= num_targets", "used.max() > num_targets", "tests/test_bad_input.py::test_calls[pairs: too far-lk_loss]"),
    Mutation("off by one", WORK, "(target_rows < -1).any()", "(target_rows < -2).any()", "tests/test_bad_objects.py::test_objects[pairs: rows]"),
    Mutation("limit", WORK, "min(start + max_pairs, ", "min(start + max_pairs + 1, ", PAIRS, True),
    Mutation("limit", WORK, "min(first + max_targets, len(starts) - 1)", "min(first + max_targets + 1, len(starts) - 1)", PAIRS),
    Mutation("sharing", WORK, "if stop < count and starts[last] > start:", "if False:", PAIRS),
    Mutation("index", WORK, "cuts.append((start, stop, slice(first, last)))", "cuts.append((start, stop, slice(first, last + 1)))", PAIRS),
    Mutation("index", WORK, "unique_index = is_new.cumsum(0) - 1", "unique_index = (is_new.cumsum(0) - 2).clamp(min=0)", PAIRS),
    Mutation("index", WORK, "Segment(k, int(end - n), int(end))", "Segment(k, int(end - n), int(end - n + 1))", PAIRS),
    Mutation("index", WORK, "return rows if first == 0 else rows - first", "return rows % self.rows_per_source // 2", PAIRS),
    Mutation("index", WORK, "chunk_of * num_sources + source", "chunk_of + source", PAIRS),
    Mutation("index", WORK, "arrange(pairs.weights)", "pairs.weights", PAIRS),
    Mutation("index", WORK, "x[: self.num_pairs] if (rows := self.target_rows) is None else x[rows]", "x[: self.num_pairs]", PAIRS),
    Mutation("guard", WORK, "target_rows.clamp(min=0)", "target_rows", PAIRS),
    Mutation("mask", WORK, "torch.where(self.valid, weights, 0)", "weights", PAIRS),
]

NEW_TERMS = "tests/test_terms.py::test_hard_rows[{}]"
ALONE = "tests/test_terms.py::test_each_term_alone_and_in_another_order[triton]"
FURTHER_TERMS = [
    Mutation("sign", PLAIN, "mul_(-1 / block.tie)", "mul_(1 / block.tie)", NEW_TERMS.format("trained-torch-0.5")),
    Mutation("sign", PLAIN, "q_part = (beta - 1)", "q_part = (1 - beta)", NEW_TERMS.format("trained-torch-0.5")),
    Mutation("complement", PLAIN, "torch.sub(top * block.q_rest, block.q_top * rest, out=self.top)", "torch.sub(top, block.q_top * self.sigma, out=self.top)", "tests/test_terms.py::test_sure_rows_keep_their_digits[sure_of_the_same-torch]"),
    Mutation("mask", PLAIN, "x.masked_fill_(self.value.isinf(), 0.0)", "x.masked_fill_(self.value.isnan(), 0.0)", "tests/test_terms.py::test_reverse_kl_of_what_the_target_cannot_say"),
    Mutation("index", PLAIN, "label = stats.target_argmax if rows.labels is None else rows.labels", "label = stats.draft_argmax", "tests/test_terms.py::test_gradcheck[ce-torch-recompute]"),
    Mutation("index", GRAD, "(tl.load(label_ptr + row) - first_column)", "tl.load(label_ptr + row)", "tests/test_terms.py::test_whole_calls[hidden-identity-recompute-blocks-triton]"),
    Mutation("support", GRAD, "tl.where(log_pt == float(\"-inf\"), 1.0, 1.0 - 2.0 * tie_ramp(log_q, log_pt, smaller, TIE))", "1.0 - 2.0 * tie_ramp(log_q, log_pt, smaller, TIE)", NEW_TERMS.format("impossible_tokens-triton-0.5")),
    Mutation("sign", STATS, "of_top = (beta - 1.0) * q * m_q", "of_top = (1.0 - beta) * q * m_q", NEW_TERMS.format("trained-triton-0.5")),
    Mutation("scale", "fused_lk/objective.py", "return {name: weight for", "return {name: 1.0 for", "tests/test_terms.py::test_a_mix_is_the_sum_of_its_parts[torch]"),
    Mutation("mask", "fused_lk/walk/problem.py", "inside = (ids >= 0) & (ids < size)", "inside = ids < size", "tests/test_terms.py::test_labels"),
    Mutation("complement", PLAIN, "share.new_full((), 1.0 - beta), share.new_full((), beta)", "share.new_full((), beta), share.new_full((), 1.0 - beta)", NEW_TERMS.format("trained-torch-0.1")),
    Mutation("memory", PLAIN, "(max(usual, buffers) * max(size, 1))", "(usual * max(size, 1))", "tests/test_memory.py::test_a_mix_holds_no_more_than_its_costliest_term[torch-cpu-one_pass]"),
    Mutation("support", "fused_lk/targets/topk.py", "(self.draft_ids[rows] == labels.unsqueeze(1)) & (self.log_probs[rows] != NEG_INF)", "self.draft_ids[rows] == labels.unsqueeze(1)", "tests/test_terms.py::test_labels_that_a_restricted_draft_cannot_say[one_pass-torch]"),
    Mutation("offset", "fused_lk/walk/by_rows.py", "return pairs if layout.target_rows is None else layout.target_rows[pairs]", "return pairs", "tests/test_fuzz_calls.py::test_whole_calls[triton]"),
    Mutation("sign", PLAIN, "torch.div(pt, m, out=out).mul_(q).mul_(beta - 1)", "torch.div(pt, m, out=out).mul_(q).mul_(1 - beta)", NEW_TERMS.format("trained-torch-0.5")),
    Mutation("scale", PLAIN, "add_(q, alpha=1 - beta)", "add_(q, alpha=beta)", NEW_TERMS.format("trained-torch-0.1")),
    Mutation("guard", PLAIN, ".clamp_(min=torch.finfo(q.dtype).tiny)", "", NEW_TERMS.format("impossible_tokens-torch-0.5")),
    Mutation("support", PLAIN, "pt_top * torch.where(pt_top > 0, of_top, 0.0)", "pt_top * of_top", NEW_TERMS.format("impossible_tokens-torch-0.5")),
    Mutation("term", STATS, "if SKL >= 0:\n            skl -= ", "if SKL > 0:\n            skl -= ", ALONE),
    Mutation("sign", STATS, "skl_c += (beta - 1.0) * q * tl.exp(-m_pt)", "skl_c += (beta - 1.0) * q * tl.exp(m_pt)", NEW_TERMS.format("normal-triton-0.5")),
    Mutation("sign", STATS, "tl.sum(skl, 0) - of_pt", "tl.sum(skl, 0) + of_pt", NEW_TERMS.format("trained-triton-0.5")),
    Mutation("support", STATS, "of_pt = tl.where(log_pt > float(\"-inf\"), tl.exp(log_pt) * m_pt, 0.0)", "of_pt = tl.exp(log_pt) * m_pt", NEW_TERMS.format("impossible_tokens-triton-0.5")),
    Mutation("complement", STATS, "of_top = (beta - 1.0) * q * tl.exp(-m_pt)", "of_top = (beta - 1.0) * q", NEW_TERMS.format("sure_of_different_ones-triton-0.5")),
    Mutation("term", GRAD, "if SKL >= 0:\n        of_q", "if SKL > 0:\n        of_q", ALONE),
    Mutation("index", GRAD, "d_skl, saved_ptr + SKL * term_stride", "d_skl, saved_ptr", NEW_TERMS.format("normal-triton-0.5")),
    Mutation("sign", GRAD, "gradient += d_skl * (beta - 1.0)", "gradient += d_skl * (1.0 - beta)", NEW_TERMS.format("normal-triton-0.5")),
    Mutation("guard", GRAD, "m = tl.maximum(beta * pt + (1.0 - beta) * q, 1e-37)", "m = beta * pt + (1.0 - beta) * q", NEW_TERMS.format("impossible_tokens-triton-0.5")),
    Mutation("mask", "fused_lk/pairs/patterns.py", "(counts != 0).cumprod(-1) == 0", "(counts != 0).cumprod(-2) == 0", "tests/test_work_lists.py::test_blocks"),
]

ROUNDED, PER_ROW = (f"tests/test_quantized.py::test_{x}" for x in ("the_weight_is_rounded_once", "rows_stay_quantised"))
QUANTIZED = [
    Mutation("offset", "fused_lk/targets/quantized.py", "whole.sub_(8)", "whole.sub_(7)", ROUNDED),
    Mutation("offset", "fused_lk/targets/quantized.py", "whole.sub_(128)", "whole.sub_(127)", ROUNDED),
    Mutation("sign", "fused_lk/targets/quantized.py", "groups.sub_(zero_point", "groups.add_(zero_point", ROUNDED),
    Mutation("sign", "fused_lk/targets/quantized.py", "(values << 4) >> 4 if signed", "values & 15 if signed", ROUNDED),
    Mutation("index", "fused_lk/targets/quantized.py", "whole[..., 1] = values >> 4", "whole[..., 1] = values & 15", ROUNDED),
    Mutation("scale", "fused_lk/targets/quantized.py", "repeat_interleave(sizes[1] // group, 1)", "repeat(1, sizes[1] // group)", ROUNDED),
    Mutation("index", "fused_lk/targets/quantized.py", "x if x.ndim == 1 else x[rows]", "x if x.ndim == 1 or x.shape[1] == 1 else x[rows]", PER_ROW),
    Mutation("offset", "fused_lk/targets/quantized.py", "None if bias is None else bias[columns]", "None if bias is None else bias[: columns.stop - columns.start]", "tests/test_quantized.py::test_the_loss_is_that_of_the_dequantised_weight"),
]

EVALUATE = "tests/test_evaluate.py::test_{}"
TIES_AT_LIMITS, FULL_CUT = EVALUATE.format("ties_at_the_limits"), EVALUATE.format("the_targets_sampler_cuts_its_full_vocabulary[hidden-k, p]")
SAMPLERS = [
    Mutation("support", "fused_lk/evaluate.py", "x.masked_fill_(x < last, NEG_INF)", "x.masked_fill_(x <= last, NEG_INF)", TIES_AT_LIMITS),
    Mutation("off by one", "fused_lk/evaluate.py", "p.cumsum(1).sub_(p) >= sampling.top_p", "p.cumsum(1) >= sampling.top_p", TIES_AT_LIMITS),
    Mutation("support", "fused_lk/evaluate.py", "p.cumsum(1).sub_(p) >= sampling.top_p", "p.cumsum(1).sub_(p) > sampling.top_p", TIES_AT_LIMITS),
    Mutation("index", "fused_lk/evaluate.py", "p if self.columns is None else p[:, self.columns]", "p if self.columns is None else p[:, : self.sizes[0]]", FULL_CUT),
    Mutation("scale", "fused_lk/evaluate.py", "if log_normalizer is None or sampling.cuts else", "if log_normalizer is None else", EVALUATE.format("what_a_target_does_not_know")),
    Mutation("index", "fused_lk/evaluate.py", "at = rows if index is None else index[rows]", "at = rows", EVALUATE.format("work_lists[ttt-True]")),
    Mutation("index", "fused_lk/evaluate.py", "found.double().mean(1), found[:, 0]", "found.double().mean(1), found[:, -1]", FULL_CUT),
    Mutation("digits", "fused_lk/evaluate.py", "x = x - top", "x = x - 0 * top", EVALUATE.format("a_common_offset_costs_no_digit")),
    Mutation("owned", "fused_lk/evaluate.py", "self.tiles.dtype, (False, False))", "self.tiles.dtype, (False, True))", EVALUATE.format("what_the_caller_holds_stays")),
]

GARBAGE, PACKAGE = "tests/test_extremes.py::test_garbage_in_ignored_rows_never_leaks", "fused_lk/*.py"
WALKS = [
    Mutation("guard", "fused_lk/walk/draft.py", "out.masked_fill_(~valid[chunk.start : chunk.stop].unsqueeze(1), 0.0)", "out", GARBAGE),
    Mutation("index", "fused_lk/walk/draft.py", "torch.index_select(source, 0, rows, out=into)", "into.copy_(source[: len(rows)])", CALLS),
    Mutation("index", "fused_lk/walk/draft.py", "into.index_copy_(0, at, part)", "into[: len(at)] = part", CALLS),
    Mutation("scale", "fused_lk/walk/draft.py", "gemm.accumulate(self.weight, g.t(), h)", "gemm.product_into(self.weight, g.t(), h.to(g.dtype))", CALLS, True),
    Mutation("scale", "fused_lk/graph/autograd.py", "scale = scale * d_loss", "scale = scale * 1.0", "tests/test_losses.py::test_upstream_gradients_scale_and_a_graph_can_be_kept", True),
    Mutation("scale", "fused_lk/graph/autograd.py", "stats, d_values / scale, scale, kept)", "stats, d_values, scale, kept)", CALLS),
    Mutation("offset", WORK, "x[..., self.start : self.stop] if isinstance(x, Tensor)", "x[..., : self.stop - self.start] if isinstance(x, Tensor)", CHUNKS, True),
    Mutation("offset", "fused_lk/walk/by_rows.py", "chunk.of(loss)", "loss.rows(0, chunk.num_pairs)", CHUNKS),
    Mutation("offset", "fused_lk/walk/by_rows.py", "chunk.of(stats)", "stats.rows(0, chunk.num_pairs)", CALLS),
    Mutation("offset", "fused_lk/walk/by_rows.py", "chunk.of(out))", "out.rows(0, chunk.num_pairs))", CHUNKS),
    Mutation("offset", "fused_lk/objective.py", "weights=self.weights[start:stop]", "weights=self.weights[0 : stop - start]", CHUNKS),
    Mutation("offset", "fused_lk/objective.py", "else lam[start:stop]", "else lam[0 : stop - start]", CHUNKS),
    Mutation("offset", "fused_lk/walk/by_rows.py", "chunk.of(normalizer)", "normalizer.rows(0, chunk.num_pairs)", CHUNKS),
    Mutation("saved bit ignored", "fused_lk/walk/by_rows.py", "*transforms, columns.start, labels, problem.jsd_beta)", "*transforms, 0, labels, problem.jsd_beta)", BLOCKS_TORCH),
    Mutation("NaN swallowed", "fused_lk/objective.py", "return (weight * x).masked_fill(weight == 0, 0.0)", "return torch.where(x.isfinite(), weight * x, 0.0)", NAN.format("tv-{'plan': 'recompute'}-draft nan-torch")),
    Mutation("guard", "fused_lk/objective.py", "return (weight * x).masked_fill(weight == 0, 0.0)", "return weight * x", "tests/test_extremes.py::test_a_lambda_of_0_takes_nothing_of_an_infinite_kl"),
    Mutation("digits", "fused_lk/objective.py", "torch.where(near_one, -torch.expm1(log_acceptance), 1 - log_acceptance.exp())", "-torch.expm1(log_acceptance)", HARD.format("gradients_of_small_alpha_keep_their_digits")),
    Mutation("support", INTERFACE, "return self.base[2] != NEG_INF", "return self.values[0] > NEG_INF", "tests/test_extremes.py::test_no_token_in_common"),
    Mutation("owned", "fused_lk/graph/autograd.py", "replace(problem, tensors=own, target=target)", "replace(problem)", "tests/test_owned.py::test_tensors_of_inference_mode_are_owned"),
    Mutation("owned", "fused_lk/graph/autograd.py", "given = (*problem.tensors, *problem.target.tiles.tensors())", "given = problem.tensors", "tests/test_owned.py::test_a_tensor_changed_between_forward_and_backward"),
    Mutation("offset", "fused_lk/walk/by_rows.py", "d_values[:, chunk.start : chunk.stop]", "d_values[:, : chunk.stop - chunk.start]", CALLS),
    Mutation("a name for a capability", "fused_lk/wide.py", 'return torch.equal(total, 4096 + (0.25 if product == "addmm" else 0) + torch.outer(n, n))', "return True", "tests/test_wide.py"),
    Mutation("a name for a capability", "fused_lk/gemm.py", 'elif wide.gives_float32("addmm", a.device, a.dtype):', 'elif wide.overload("addmm"):', "tests/test_wide.py"),
    Mutation("unwritten memory", "fused_lk/gemm.py", "whole[:, columns:].zero_()", "pass", "tests/test_not_a_number.py::test_the_padding_of_a_tile_is_zero"),
    Mutation("tile loop", "fused_lk/walk/by_vocabulary.py", "for start in range(0, size, step)", "for start in range(0, max(size - 1, 1), step)", "tests/test_losses.py::test_a_walk_by_vocabulary_in_blocks"),
    Mutation("scale", "fused_lk/walk/draft.py", "torch.mul(product, self.scale, out=block)", "block.copy_(product)", CALLS),
    Mutation("offset", "fused_lk/walk/by_rows.py", "index[chunk.start : chunk.stop] - chunk.targets.start", "index[chunk.start : chunk.stop] - chunk.targets.start * 0", CHUNKS, True),
    Mutation("kept logits written over", "fused_lk/walk/by_rows.py", "place = tiles.g if kept.z is None or tiles.g is not None else tiles.z", "place = tiles.g", "tests/test_keep.py::test_a_second_backward_sees_the_same_logits", True),
    Mutation("offset", "fused_lk/walk/by_rows.py", "z = filled.z[:, columns]", "z = filled.z[:, : columns.stop - columns.start]", "tests/test_keep.py::test_the_same_results"),
    Mutation("offset", "fused_lk/walk/by_vocabulary.py", "into = tiles._replace(z=tiles.z[at])", "into = tiles", "tests/test_keep.py::test_the_same_results"),
    Mutation("off by one", "fused_lk/walk/plan.py", "sum(c.stop <= rows for c in chunks)", "sum(c.start <= rows for c in chunks)", "tests/test_keep.py::test_in_a_graph"),
    Mutation("over the budget", "fused_lk/walk/plan.py", "f.kept_bytes(c.stop, c.targets.stop) <= f.keep", "f.kept_bytes(c.start, c.targets.start) <= f.keep", "tests/test_keep.py::test_what_explain_tells"),
    Mutation("offset", "fused_lk/targets/topk.py", "ids = self.draft_ids[rows] - columns.start", "ids = self.draft_ids[rows]", "tests/test_losses.py::test_a_walk_by_vocabulary_in_blocks"),
    Mutation("sign", "fused_lk/objective.py", "-of.pop(\"tv\")", "of.pop(\"tv\")", CALLS, True),
    Mutation("scale", "fused_lk/objective.py", "(\"tv\", 1.0 - lam)", "(\"tv\", lam)", CALLS),
    Mutation("sign", "fused_lk/objective.py", "torch.exp(-eta * acceptance.detach())", "torch.exp(eta * acceptance.detach())", "tests/test_losses.py::test_every_target_and_work_list[hidden-identity-lambda-plain]"),
    Mutation("index", "fused_lk/reduction.py", "x[0].expand(self.layout.num_pairs) if positions is None else x[positions]", "x[0].expand(self.layout.num_pairs)", CALLS),
    Mutation("scale", "fused_lk/reduction.py", "weights = self.weights * weights", "weights = weights * 1", CALLS),
    Mutation("off by one", "fused_lk/reduction.py", "options.position_decay**k", "options.position_decay ** (k + 1)", CALLS),
    Mutation("scale", "fused_lk/graph/autograd.py", "d_loss * ctx.objective.d_values(values)", "ctx.objective.d_values(values)", CALLS),
    Mutation("index", "fused_lk/reduction.py", "acceptance_sum, accuracy_sum, kl_sum,", "accuracy_sum, acceptance_sum, kl_sum,", CALLS),
]
# fmt: on
HEADS = [
    Mutation("softcap", "kernels/row_grad.py", "gradient *= slope(z, z_inner)", "gradient *= 1.0", HEADS_TRITON),
    Mutation("softcap", "kernels/row_grad.py", "gain = z_scale * z_inner", "gain = z_scale * 1.0", HEADS_TRITON),
    Mutation("softcap", "kernels/online_softmax.py", "tl.abs(y) < 0.625", "tl.abs(y) < 0.0", DIGITS_OF_CAP_TRITON),
    Mutation(
        "softcap",
        "kernels/online_softmax.py",
        "return 4.0 * y * (1.0 - y)",
        "return 1.0 - (1.0 - 2.0 * y) * (1.0 - 2.0 * y)",
        DIGITS_OF_CAP_TRITON,
    ),
    Mutation(
        "softcap",
        "kernels/online_softmax.py",
        'x = tl.where(x == float("-inf"), float("-inf"), y)',
        "x = y",
        IMPOSSIBLE.format("triton"),
    ),
    Mutation("softcap", "fused_lk/rows/plain.py", "into.mul_(of_cap)", "into.mul_(1.0)", HEADS_TORCH),
    Mutation(
        "softcap",
        "fused_lk/rows/plain.py",
        ".tanh_().masked_fill_(impossible, NEG_INF)",
        ".tanh_()",
        IMPOSSIBLE.format("torch"),
    ),
    Mutation("softcap", "fused_lk/rows/interface.py", "else self.scale * self.inner", "else self.scale", HEADS_TORCH),
    Mutation(
        "low rank",
        "fused_lk/walk/draft.py",
        "second.weight[columns].t()",
        "second.weight[: columns.stop - columns.start].t()",
        "tests/test_low_rank.py::test_losses_and_gradients[torch-by vocabulary-no bias]",
    ),
    Mutation(
        "low rank",
        "fused_lk/walk/problem.py",
        "num_tensors >= 2 * added",
        "num_tensors > 2 * added",
        "tests/test_low_rank.py::test_losses_and_gradients[torch-one pass-no bias]",
    ),
]
TABLE = [*KERNELS, *TWIN, *LISTS, *WALKS, *HEADS, *FURTHER_TERMS, *QUANTIZED, *SAMPLERS]


def sources(root: Path, mutation: Mutation) -> list[Path]:
    """The files of the tree at `root` that hold the original text, once per occurrence."""
    files = sorted({path for glob in mutation.where.split() for path in root.glob(glob)})
    return [path for path in files for _ in range(path.read_text().count(mutation.original))]


def copy_of_the_tree() -> Path:
    """A copy that imports its own kernels: `fused_lk.kernels` is otherwise found where the package was installed."""
    tree = Path(tempfile.mkdtemp(prefix="mutations-"))
    without = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
    for name in ("fused_lk", "kernels", "tests", "bench"):
        shutil.copytree(ROOT / name, tree / name, ignore=without)
    shutil.copy(ROOT / "pyproject.toml", tree)
    (tree / "fused_lk" / "kernels").symlink_to(tree / "kernels")
    return tree


def tests_fail(tree: Path, tests: str) -> str | None:
    """What noticed, or None if all tests passed. The tests run in a fork, which has torch and Triton loaded already."""
    with tempfile.TemporaryFile("w+") as output:
        child = multiprocessing.get_context("fork").Process(
            target=run_tests, args=(tree, split(tests), output.fileno())
        )
        child.start()
        child.join(SECONDS)
        if child.is_alive():
            child.kill()
            return f"no end within {SECONDS} s"
        output.seek(0)
        printed = output.read()
    if child.exitcode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", printed, re.MULTILINE)
    if child.exitcode == 1 and failed:
        return failed[1].removeprefix("tests/")
    if child.exitcode < 0:
        return f"the process died of signal {-child.exitcode}"
    raise RuntimeError(f"pytest could not run {tests}:\n{printed}")


def run_tests(tree: Path, tests: list[str], output: int) -> None:
    """In the fork: pytest in `tree`, with the package that lies there."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    # Bytecode is told apart by seconds and size, too coarse for what happens here.
    sys.dont_write_bytecode = True
    sys.path[0] = str(tree)
    launch = importlib.import_module("fused_lk.kernels.launch")
    assert all(str(tree) in sys.modules[name].__file__ for name in ("fused_lk", "fused_lk.rows.plain")), launch
    assert Path(launch.__file__).resolve().is_relative_to(tree), launch
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-profile", "first failure"]
    sys.exit(pytest.main([*options, *tests]))


def split(tests: str) -> list[str]:
    """Test ids, which hold spaces inside brackets only."""
    return re.findall(r"(?:[^\s\[]|\[[^\]]*\])+", tests)


def try_mutation(tree: Path, mutation: Mutation) -> str | None:
    """The test that notices `mutation`, or None."""
    (path,) = sources(tree, mutation)
    original = path.read_text()
    path.write_text(original.replace(mutation.original, mutation.mutated))
    try:
        return tests_fail(tree, mutation.tests)
    finally:
        path.write_text(original)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a dozen mutations, one or two of each kind")
    parser.add_argument("--only", default="", help="mutations whose text or file contains this")
    parser.add_argument("--part", default="1/1", help="I/N: the I-th of N parts, for as many machines")
    arguments = parser.parse_args()
    chosen = [m for m in TABLE if (m.quick or not arguments.quick) and arguments.only in f"{m.where} {m.original}"]
    part, parts = map(int, arguments.part.split("/"))
    chosen = chosen[len(chosen) * (part - 1) // parts : len(chosen) * part // parts]

    tree = copy_of_the_tree()
    try:
        for tests in sorted({m.tests for m in chosen}):
            if failure := tests_fail(tree, tests):
                print(f"{tests} fails on the unchanged sources: {failure}")
                return 2
        print("| kind | file | original | mutated | caught by |\n|---|---|---|---|---|")
        survivors = 0
        for m in chosen:
            noticed = try_mutation(tree, m)
            survivors += noticed is None
            file = sources(ROOT, m)[0].relative_to(ROOT)
            cells = (m.kind, file, code(m.original), code(m.mutated), noticed or "**SURVIVED**")
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    finally:
        shutil.rmtree(tree)
    print(f"\n{len(chosen) - survivors} of {len(chosen)} mutations caught.")
    return 1 if survivors else 0


def code(text: str) -> str:
    text = " ".join(text.split())
    return f"`{text}`".replace("|", "\\|") if text else "(nothing)"


if __name__ == "__main__":
    sys.exit(main())
