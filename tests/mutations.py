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


class Mutation(NamedTuple):
    """`original` occurs once in the files that `where` (globs) names; there it becomes `mutated`."""

    kind: str
    where: str
    original: str
    mutated: str
    tests: str
    quick: bool = False


SOFTMAX, STATS, GRAD, LSE = (f"kernels/{x}.py" for x in ("online_softmax", "row_stats", "row_grad", "lse_argmax"))
LAUNCH, PLAIN = "kernels/launch.py", "fused_lk/rows/plain.py"

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
    Mutation("index", STATS, "tl.store(kl_ptr + row,", "tl.store(kl_ptr + row + 1,", TILES),
    Mutation("index", STATS, "tl.store(target_argmax_ptr + row, t_column", "tl.store(target_argmax_ptr + row, z_column", TILES),
    Mutation("NaN swallowed", STATS, "broken = (z_rest != z_rest) | (t_rest != t_rest)", "broken = (z_rest != z_rest)", NAN.format("tv-{'plan': 'recompute'}-target nan-triton")),
    Mutation("NaN swallowed", STATS, "(t_top > LOWEST) | (t_rest != t_rest)", "t_top > LOWEST", "tests/test_not_a_number.py::test_targets_that_are_all_nan[triton]"),
    Mutation("mass", STATS, "(log_mass != log_mass) | excessive", "(log_mass != log_mass)", "tests/test_not_a_number.py::test_targets_that_are_no_probabilities[sum 1.5-triton]"),
    Mutation("offset", GRAD, "start = tl.program_id(1) * BLOCK_V", "start = tl.program_id(1) * 0", TILES, True),
    Mutation("offset", GRAD, "gradient_ptr += row * gradient_row_stride", "gradient_ptr += row * z_row_stride", FUZZ),
    Mutation("index", GRAD, "t_row = tl.load(t_index_ptr + row).to(tl.int64)", "t_row = row", TILES),
    Mutation("int32 offset", GRAD, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)", "tests/test_offsets.py"),
    Mutation("guard", GRAD, "gradient, mask=offs_v < n_cols)", "gradient, mask=offs_v <= n_cols)", TILES, True),
    Mutation("guard", GRAD, "if start + BLOCK_V <= n_cols", "if start + BLOCK_V <= n_cols + 1", FUZZ),
    Mutation("sign", GRAD, "- of_pt * tl.exp(log_pt)", "+ of_pt * tl.exp(log_pt)", TILES, True),
    Mutation("sigma", GRAD, "of_q = d_kl - tl.load(sigma_ptr + row) * d_log_alpha", "of_q = d_kl", TILES, True),
    Mutation("overflow", GRAD, "tl.exp(tl.minimum(smaller - log_alpha, 0.0))", "tl.exp(tl.maximum(log_q, log_p) - log_alpha)", "tests/test_kernels.py::test_disjoint_rows_keep_their_gradient"),
    Mutation("w decided twice", GRAD, "gradient = tl.where(offs_v == top_column, of_top, gradient)", "gradient = gradient + 0.0", DIGITS_TRITON, True),
    Mutation("index", GRAD, "(tl.load(draft_argmax_ptr + row) - first_column)", "tl.load(draft_argmax_ptr + row)", BLOCKS_TRITON),
    Mutation("guard", GRAD, "tl.where(supported, gradient, 0.0)", "gradient", TILES),
    Mutation("guard", GRAD, "tl.where(possible, log_alpha, 0.0)", "log_alpha", "tests/test_extremes.py::test_no_token_in_common"),
    Mutation("scale", GRAD, "d_kl = tl.load(d_kl_ptr + row).to(ACC) * z_scale", "d_kl = tl.load(d_kl_ptr + row).to(ACC)", TILES),
    Mutation("index", GRAD, "tl.load(d_log_acceptance_ptr + row)", "tl.load(d_log_acceptance_ptr)", TILES),
    Mutation("off by one", LAUNCH, 'triton.cdiv(size, meta["BLOCK_V"])', 'max(1, size // meta["BLOCK_V"])', TILES),
    Mutation("stride", LAUNCH, "None if x is None else x.contiguous()", "x", FUZZ),
    Mutation("stride", LAUNCH, "if x.stride(1) == 1 or x.shape[1] == 1", "if True", FUZZ),
    Mutation("stride", LAUNCH, "if into is not gradient_out", "if False", FUZZ),
    Mutation("scale", LAUNCH, "value - high if math.isfinite(high) else 0.0", "0.0", TILES),
    Mutation("index", LAUNCH, "into, into.stride(0), _vector(rows.t_index)", "into, z.stride(0), _vector(rows.t_index)", FUZZ),
]

TWIN = [
    Mutation("sign", PLAIN, "torch.sub(self.t, self.z, out=ratio)", "torch.sub(self.z, self.t, out=ratio)", FUZZ_TORCH, True),
    Mutation("sigma", PLAIN, "torch.div(w_top + w_rest, alpha, out=out.sigma)", "torch.div(w_top + 2 * w_rest, alpha, out=out.sigma)", FUZZ_TORCH),
    Mutation("underflow", PLAIN, "careful = (alpha < SMALLEST_LINEAR) & out.supported", "careful = (alpha < 0) & out.supported", "tests/test_extremes.py::test_disjoint_rows_have_finite_right_gradients"),
    Mutation("guard", PLAIN, "careful = ~torch.isfinite(out.kl) & out.supported", "careful = out.supported & ~out.supported", "tests/test_extremes.py::test_a_token_that_neither_side_can_say_in_float32"),
    Mutation("sigma", PLAIN, "rest = d_kl - out.sigma * d_log_alpha", "rest = d_kl.clone()", FUZZ_TORCH, True),
    Mutation("scale", PLAIN, "torch.where(linear, 0.5 * d_log_alpha", "torch.where(linear, d_log_alpha", FUZZ_TORCH),
    Mutation("scale", PLAIN, "torch.where(out.supported, d_kl * self.rows.z_scale, 0.0)", "torch.where(out.supported, d_kl, 0.0)", FUZZ_TORCH),
    Mutation("offset", PLAIN, "clamp_(max=size - group)", "clamp_(max=size - group - 1)", FUZZ_TORCH),
    Mutation("tile loop", PLAIN, "if whole < size:", "if False:", FUZZ_TORCH),
    Mutation("index", PLAIN, "else (rows.t, index[start:stop])", "else (rows.t, index[0 : stop - start])", FUZZ_TORCH),
    Mutation("sign", PLAIN, "(t_scale * out.target_top - given) + out.target_log_total", "(t_scale * out.target_top - given) - out.target_log_total", FUZZ_TORCH),
    Mutation("index", PLAIN, "normalizer.value[self.start : self.stop]", "normalizer.value[0 : self.stop - self.start]", FUZZ_TORCH),
    Mutation("sigma", PLAIN, "self.tie) - out.sigma[rows].unsqueeze(1) * q", "self.tie)", FUZZ_TORCH),
    Mutation("tie weight", PLAIN, "return (1 + ramp).mul_(0.5)", "return (ramp >= 0).to(log_q.dtype)", "tests/test_extremes.py::test_ties_of_almost_disjoint_rows"),
    Mutation("tie weight", PLAIN, "return torch.addcmul(q, ramp, q, value=1 / self.tie, out=ramp)", "return torch.addcmul(q, ramp.add_(self.tie / 2).sign_(), q, out=ramp)", EXACT_TIES),
    Mutation("w decided twice", PLAIN, "self._write_top(into, d_log_alpha * out.top_log_acceptance + d_kl * out.top_kl)", "pass", DIGITS_TORCH, True),
    Mutation("saved bit ignored", PLAIN, "column = self.out.draft_argmax - self.rows.first_column", "column = self.out.draft_argmax", BLOCKS_TORCH),
    Mutation("complement", PLAIN, "return top, torch.where(top > 0.5, rest, 1 - top)", "return top, 1 - top", DIGITS_TORCH),
    Mutation("complement", PLAIN, "torch.sub(-torch.expm1(log_pt), q_rest, out=out.top_kl)", "torch.sub(q_top, log_pt.exp(), out=out.top_kl)", DIGITS_TORCH),
    Mutation("complement", PLAIN, "torch.where(missed < 0.5, torch.log1p(-missed), alpha.log(), out=out.log_acceptance)", "torch.log(alpha, out=out.log_acceptance)", "tests/test_hard_rows.py::test_total_variation_of_sure_rows[torch]"),
    Mutation("one number", PLAIN, "constant = (self.out.draft_log_total - self.out.target_log_total).unsqueeze(1)", "constant = ((self.out.draft_top + self.out.draft_log_total) - (self.out.target_top + self.out.target_log_total) - self.out.draft_top + self.out.target_top).unsqueeze(1)", HARD.format("a_common_offset_changes_nothing[trained-torch]")),
    Mutation("one number", PLAIN, "mass = -torch.log1p((probs * ~inside).sum(1) / share)", "mass = ((row + 1e6)[:, inside].logsumexp(1) - (row + 1e6).logsumexp(1))", HARD.format("an_offset_over_a_truncated_vocabulary[logits-torch]")),
    Mutation("NaN swallowed", PLAIN, 'out.kl.masked_fill_(out.log_acceptance.isnan(), float("nan"))', "pass", NAN.format("kl-{'plan': 'recompute'}-draft nan-torch")),
    Mutation("mass", PLAIN, "log_mass.masked_fill(log_mass > most, ", "log_mass.masked_fill(log_mass > 1e9, ", "tests/test_not_a_number.py::test_targets_that_are_no_probabilities[sum 1.5-torch]"),
    Mutation("tile loop", PLAIN, "for start in range(0, n, step))", "for start in range(0, n - 1, step))", FUZZ_TORCH),
    Mutation("guard", PLAIN, ".mul_(log_r.clamp_(max=0.0).exp_())", ".mul_((log_q - log_alpha.unsqueeze(1)).exp_())", FUZZ_TORCH),
]

PAIRS = "tests/test_pairs.py"
CALLS = "tests/test_fuzz_calls.py::test_whole_calls[torch]"
WORK = "fused_lk/pairs.py fused_lk/layout.py"
LISTS = [
    Mutation("off by one", WORK, "torch.where(rows >= 0, rows, _IGNORED)", "torch.where(rows > 0, rows, _IGNORED)", PAIRS, True),
    Mutation("mask", WORK, "key = torch.where(mask > 0, key, _IGNORED)", "key = torch.where(mask >= 0, key, _IGNORED)", PAIRS, True),
    Mutation("sort", WORK, "self.weights = weights[self.draft_rows]", "self.weights = weights[self.draft_rows.sort().values]", PAIRS),
    Mutation("sort", WORK, "self.positions = positions[self.draft_rows]", "self.positions = positions[self.draft_rows.sort().values]", PAIRS),
    Mutation("off by one", WORK, "(positions >= self.num_positions)", "(positions > self.num_positions)", "tests/test_bad_input.py::test_calls[positions: far-lk_loss]"),
    Mutation("off by one", WORK, "used.max() >= num_targets", "used.max() > num_targets", "tests/test_bad_input.py::test_calls[rows: too large-lk_loss]"),
    Mutation("off by one", WORK, "(target_rows < -1).any()", "(target_rows < -2).any()", "tests/test_bad_input.py::test_calls[rows: below -1-lk_loss]"),
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

GARBAGE, PACKAGE = "tests/test_extremes.py::test_garbage_in_ignored_rows_never_leaks", "fused_lk/*.py"
WALKS = [
    Mutation("guard", "fused_lk/draft.py", "out.masked_fill_(~valid[chunk.start : chunk.stop].unsqueeze(1), 0.0)", "out", GARBAGE),
    Mutation("index", "fused_lk/draft.py", "torch.index_select(source, 0, rows, out=into)", "into.copy_(source[: len(rows)])", CALLS),
    Mutation("index", "fused_lk/draft.py", "into.index_copy_(0, at, part)", "into[: len(at)] = part", CALLS),
    Mutation("scale", "fused_lk/draft.py", "gemm.accumulate(self.weight, g.t(), h)", "gemm.product_into(self.weight, g.t(), h.to(g.dtype))", CALLS, True),
    Mutation("scale", "fused_lk/autograd.py", "scale = scale * d_loss", "scale = scale * 1.0", "tests/test_losses.py::test_upstream_gradients_scale_and_a_graph_can_be_kept", True),
    Mutation("scale", "fused_lk/autograd.py", "d_log_alpha / scale, d_kl / scale, scale)", "d_log_alpha, d_kl / scale, scale)", CALLS),
    Mutation("offset", "fused_lk/chunked.py", "coefficients(chunk.start + start, chunk.start + stop, stats)", "coefficients(start, stop, stats)", CALLS, True),
    Mutation("offset", "fused_lk/chunked.py", "normalizer.value[chunk.start : chunk.stop]", "normalizer.value[: chunk.num_pairs]", CALLS),
    Mutation("saved bit ignored", "fused_lk/chunked.py", "rows = work.rows(z, t, index, start)", "rows = work.rows(z, t, index)", BLOCKS_TORCH),
    Mutation("NaN swallowed", "fused_lk/objective.py", "return torch.where(weight == 0, 0.0, weight * x)", "return torch.where(x.isfinite(), weight * x, 0.0)", NAN.format("tv-{'plan': 'recompute'}-draft nan-torch")),
    Mutation("guard", "fused_lk/objective.py", "return torch.where(weight == 0, 0.0, weight * x)", "return weight * x", "tests/test_extremes.py::test_a_lambda_of_0_takes_nothing_of_an_infinite_kl"),
    Mutation("digits", "fused_lk/objective.py", "torch.where(near_one, -torch.expm1(log_acceptance), 1 - log_acceptance.exp())", "-torch.expm1(log_acceptance)", HARD.format("gradients_of_small_alpha_keep_their_digits")),
    Mutation("support", "fused_lk/rows/interface.py", "return self.target_top != NEG_INF", "return self.log_acceptance > NEG_INF", "tests/test_extremes.py::test_no_token_in_common"),
    Mutation("owned", "fused_lk/autograd.py", "work = work.owned()", "work = work", "tests/test_owned.py::test_tensors_of_inference_mode_are_owned"),
    Mutation("owned", "fused_lk/autograd.py", "*stats.saved(), *work.target.tiles.tensors())", "*stats.saved())", "tests/test_owned.py::test_a_tensor_changed_between_forward_and_backward"),
    Mutation("offset", "fused_lk/chunked.py", "stats.rows(a, b), d_log_alpha[a:b], d_kl[a:b], g)", "stats.rows(a, b), d_log_alpha[a:b], d_kl[: b - a], g)", CALLS),
    Mutation("tile loop", "fused_lk/chunked.py", "for start in range(0, draft.vocab_size, step)", "for start in range(0, max(draft.vocab_size - 1, 1), step)", "tests/test_losses.py::test_a_walk_by_vocabulary_in_blocks"),
    Mutation("scale", "fused_lk/chunked.py", "torch.mul(into, scale, out=block)", "block.copy_(into)", CALLS),
    Mutation("offset", "fused_lk/target_tiles.py", "layout.unique_index[pairs] - chunk.targets.start", "layout.unique_index[pairs] - chunk.targets.start * 0", CALLS, True),
    Mutation("offset", "fused_lk/target_tiles.py", "ids = self.draft_ids[rows] - columns.start", "ids = self.draft_ids[rows]", "tests/test_losses.py::test_a_walk_by_vocabulary_in_blocks"),
    Mutation("sign", "fused_lk/objective.py", "-(mix.tv * log_acceptance.exp()", "(mix.tv * log_acceptance.exp()", CALLS, True),
    Mutation("scale", "fused_lk/objective.py", "Mix(kl_weight, 1.0 - kl_weight, 0.0)", "Mix(kl_weight, 1.0, 0.0)", CALLS),
    Mutation("sign", "fused_lk/objective.py", "torch.exp(-eta * acceptance.detach())", "torch.exp(eta * acceptance.detach())", CALLS),
    Mutation("index", "fused_lk/reduction.py", "x[0].expand(self.layout.num_pairs) if positions is None else x[positions]", "x[0].expand(self.layout.num_pairs)", CALLS),
    Mutation("scale", "fused_lk/reduction.py", "return self.weights * self.of_pair(of_position)", "return self.of_pair(of_position)", CALLS),
    Mutation("off by one", "fused_lk/reduction.py", "return self.options.position_decay**k", "return self.options.position_decay**(k + 1)", CALLS),
]
# fmt: on
TABLE = [*KERNELS, *TWIN, *LISTS, *WALKS]


def sources(root: Path, mutation: Mutation) -> list[Path]:
    """The files of the tree at `root` that hold the original text, once per occurrence."""
    files = sorted({path for glob in mutation.where.split() for path in root.glob(glob)})
    return [path for path in files for _ in range(path.read_text().count(mutation.original))]


def copy_of_the_tree() -> Path:
    """A copy that imports its own kernels: `fused_lk.kernels` is otherwise found where the package was installed."""
    tree = Path(tempfile.mkdtemp(prefix="mutations-"))
    without = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
    for name in ("fused_lk", "kernels", "tests"):
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
    return f"`{text.strip()}`".replace("|", "\\|") if text.strip() else "(nothing)"


if __name__ == "__main__":
    sys.exit(main())
