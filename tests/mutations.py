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


class Mutation(NamedTuple):
    """`original` occurs once in the files that `where` (globs) names; there it becomes `mutated`."""

    kind: str
    where: str
    original: str
    mutated: str
    tests: str
    quick: bool = False


SOFTMAX, STATS, GRAD, LSE = (f"kernels/{x}.py" for x in ("online_softmax", "row_stats", "row_grad", "lse_argmax"))
LAUNCH, ROWWISE = "kernels/launch.py", "fused_lk/rowwise.py"

# fmt: off
KERNELS = [
    Mutation("mask", SOFTMAX, 'other=float("-inf"))', "other=0.0)", TILES, True),
    Mutation("guard", SOFTMAX, "tl.load(x_ptr + offs_v, mask=offs_v < n_cols", "tl.load(x_ptr + offs_v, mask=offs_v <= n_cols", TILES),
    Mutation("scale", SOFTMAX, "x.to(scale.dtype) * scale", "x.to(scale.dtype) + 0 * scale", TILES),
    Mutation("scale", SOFTMAX, " + tl.full([], low, ACC)", "", TILES),
    Mutation("offset", SOFTMAX, "t - log_normalizer", "t", TILES),
    Mutation("tie weight", SOFTMAX, "tl.where(log_q == log_p, 0.5, 0.0)", "tl.where(log_q == log_p, 1.0, 0.0)", TIES, True),
    Mutation("sign", SOFTMAX, "tl.where(log_q < log_p, 1.0", "tl.where(log_q > log_p, 1.0", TILES),
    Mutation("sign", SOFTMAX, "tl.exp(-tl.abs(x - top))", "tl.exp(tl.abs(x - top))", TILES),
    Mutation("ties", SOFTMAX, "bigger = x > top", "bigger = x >= top", FUZZ),
    Mutation("off by one", SOFTMAX, "total * step + 1.0", "total * step", TILES),
    Mutation("index", SOFTMAX, "tl.where(bigger, start, at)", "tl.where(bigger, at, start)", TILES),
    Mutation("scale", SOFTMAX, "tl.sum(total * tl.exp(top - highest), 0)", "tl.sum(total, 0)", TILES),
    Mutation("ties", SOFTMAX, "tl.min(first, 0)", "tl.max(tl.where(top == tl.max(top, 0), first, -1), 0)", FUZZ),
    Mutation("tile loop", LSE, "for start in range(0, whole, BLOCK_V)", "for start in range(BLOCK_V, whole, BLOCK_V)", TILES, True),
    Mutation("tile loop", LSE, "if whole < n_cols", "if whole > n_cols", TILES),
    Mutation("offset", LSE, "x_ptr += row * x_row_stride", "x_ptr += row", TILES),
    Mutation("int32 offset", LSE, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)", "tests/test_offsets.py"),
    Mutation("offset", STATS, "z_ptr += row * z_row_stride", "z_ptr += row * t_row_stride", FUZZ),
    Mutation("index", STATS, "t_row = tl.load(t_index_ptr + row).to(tl.int64)", "t_row = row", TILES, True),
    Mutation("index", STATS, "t_ptr += t_row * t_row_stride", "t_ptr += row * t_row_stride", TILES),
    Mutation("int32 offset", STATS, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)", "tests/test_offsets.py"),
    Mutation("off by one", STATS, "whole = n_cols // BLOCK_V * BLOCK_V", "whole = (n_cols - 1) // BLOCK_V * BLOCK_V - BLOCK_V", TILES),
    Mutation("scale", STATS, "tl.where(bigger, sigma * step + w,", "tl.where(bigger, sigma + w,", TILES, True),
    Mutation("scale", STATS, "sum_sigma = tl.sum(sigma * rescale, 0)", "sum_sigma = tl.sum(sigma, 0)", TILES),
    Mutation("sign", STATS, "(t - z) + (draft_lse - target_lse)", "(t - z) - (draft_lse - target_lse)", TILES),
    Mutation("guard", STATS, "kl += tl.where(pt > 0, ", "kl += tl.where(pt >= 0, ", TILES),
    Mutation("guard", STATS, "tl.where(supported, tl.load(log_normalizer_ptr + row).to(ACC), 0.0)", "tl.load(log_normalizer_ptr + row).to(ACC)", FUZZ),
    Mutation("index", STATS, "tl.load(log_normalizer_ptr + row)", "tl.load(log_normalizer_ptr)", TILES),
    Mutation("min", STATS, "tl.minimum(log_q, log_p)", "tl.maximum(log_q, log_p)", TILES),
    Mutation("index", STATS, "tl.store(kl_ptr + row,", "tl.store(kl_ptr + row + 1,", TILES),
    Mutation("index", STATS, "argmax(t_top, t_at, lanes)", "argmax(z_top, t_at, lanes)", TILES),
    Mutation("guard", STATS, "tl.where(sum_alpha == 0, 0.0, sum_sigma / tl.where(sum_alpha == 0, 1.0, sum_alpha))", "sum_sigma / sum_alpha", FUZZ),
    Mutation("offset", GRAD, "start = tl.program_id(1) * BLOCK_V", "start = tl.program_id(1) * 0", TILES, True),
    Mutation("offset", GRAD, "gradient_ptr += row * gradient_row_stride", "gradient_ptr += row * z_row_stride", FUZZ),
    Mutation("index", GRAD, "t_row = tl.load(t_index_ptr + row).to(tl.int64)", "t_row = row", TILES),
    Mutation("int32 offset", GRAD, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)", "tests/test_offsets.py"),
    Mutation("guard", GRAD, "gradient, mask=offs_v < n_cols)", "gradient, mask=offs_v <= n_cols)", TILES, True),
    Mutation("guard", GRAD, "if start + BLOCK_V <= n_cols", "if start + BLOCK_V <= n_cols + 1", FUZZ),
    Mutation("sign", GRAD, "- of_pt * tl.exp(t - target_lse)", "+ of_pt * tl.exp(t - target_lse)", TILES, True),
    Mutation("sigma", GRAD, "of_pt - tl.load(sigma_ptr + row) * of_w_r", "of_pt", TILES, True),
    Mutation("overflow", GRAD, 'tl.exp(tl.where(w > 0, tl.minimum(log_q - log_alpha, 0.0), float("-inf")))', "tl.exp(log_q - log_alpha)", "tests/test_kernels.py::test_disjoint_rows_keep_their_gradient"),
    Mutation("guard", GRAD, "tl.where(supported, gradient, 0.0)", "gradient", TILES),
    Mutation("guard", GRAD, "tl.where(possible, log_alpha, 0.0)", "log_alpha", "tests/test_extremes.py::test_no_token_in_common"),
    Mutation("scale", GRAD, "tl.load(d_kl_ptr + row).to(ACC) * z_scale", "tl.load(d_kl_ptr + row).to(ACC)", TILES),
    Mutation("index", GRAD, "tl.load(d_log_acceptance_ptr + row)", "tl.load(d_log_acceptance_ptr)", TILES),
    Mutation("off by one", LAUNCH, 'triton.cdiv(size, meta["BLOCK_V"])', 'max(1, size // meta["BLOCK_V"])', TILES),
    Mutation("stride", LAUNCH, "None if x is None else x.contiguous()", "x", FUZZ),
    Mutation("stride", LAUNCH, "if x.stride(1) == 1 or x.shape[1] == 1", "if True", FUZZ),
    Mutation("stride", LAUNCH, "if into is not gradient_out", "if False", FUZZ),
    Mutation("scale", LAUNCH, "value - high if math.isfinite(high) else 0.0", "0.0", TILES),
    Mutation("index", LAUNCH, "into, into.stride(0), _vector(t_index)", "into, z.stride(0), _vector(t_index)", FUZZ),
]

TWIN = [
    Mutation("sign", ROWWISE, "torch.sub(p, q, out=out).sign_()", "torch.sub(q, p, out=out).sign_()", FUZZ_TORCH, True),
    Mutation("sigma", ROWWISE, "out=out.sigma).mul_(0.5).div_(alpha)", "out=out.sigma).div_(alpha)", FUZZ_TORCH),
    Mutation("underflow", ROWWISE, "(alpha < SMALLEST_LINEAR) | ~torch.isfinite(out.kl)", "~torch.isfinite(out.kl)", "tests/test_extremes.py::test_disjoint_rows_have_finite_right_gradients"),
    Mutation("guard", ROWWISE, "(alpha < SMALLEST_LINEAR) | ~torch.isfinite(out.kl)", "(alpha < SMALLEST_LINEAR)", "tests/test_extremes.py::test_impossible_draft_tokens"),
    Mutation("sigma", ROWWISE, "d_kl - torch.where(supported, out.sigma, 0.0) * d_log_alpha", "d_kl.clone()", FUZZ_TORCH, True),
    Mutation("scale", ROWWISE, "torch.where(linear, 0.5 * d_log_alpha", "torch.where(linear, d_log_alpha", FUZZ_TORCH),
    Mutation("scale", ROWWISE, "torch.where(supported, d_kl * self.z_scale, 0.0)", "torch.where(supported, d_kl, 0.0)", FUZZ_TORCH),
    Mutation("offset", ROWWISE, "clamp_(max=size - group)", "clamp_(max=size - group - 1)", FUZZ_TORCH),
    Mutation("tile loop", ROWWISE, "if whole < size:", "if False:", FUZZ_TORCH),
    Mutation("index", ROWWISE, "x[start:stop] if index is None else x[index[start:stop]]", "x[start:stop] if index is None else x[index[0:stop - start]]", FUZZ_TORCH),
    Mutation("sign", ROWWISE, "self.out.target_lse - self.normalizer", "self.normalizer - self.out.target_lse", FUZZ_TORCH),
    Mutation("index", ROWWISE, "log_normalizer[start:stop].to(acc)", "log_normalizer[0:stop - start].to(acc)", FUZZ_TORCH),
    Mutation("sigma", ROWWISE, "w_r - self.out.sigma[rows].unsqueeze(1) * q", "w_r", FUZZ_TORCH),
    Mutation("tie weight", ROWWISE, "(1 + torch.sign(log_p - log_q)).mul_(0.5)", "(log_p >= log_q).to(log_q.dtype)", EXACT_TIES),
    Mutation("tie weight", ROWWISE, "return torch.addcmul(q, out, q, out=out)", "return torch.addcmul(q, out.add_(0.5).sign_(), q, out=out)", EXACT_TIES),
    Mutation("tile loop", ROWWISE, "for start in range(0, n, step))", "for start in range(0, n - 1, step))", FUZZ_TORCH),
    Mutation("guard", ROWWISE, "torch.where(w > 0, log_q - _finite(log_alpha).unsqueeze(1), NEG_INF).clamp_(max=0.0)", "(log_q - _finite(log_alpha).unsqueeze(1))", FUZZ_TORCH),
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
    Mutation("offset", "fused_lk/chunked.py", "normalizer[chunk.start : chunk.stop]", "normalizer[: chunk.num_pairs]", CALLS),
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
    assert all(str(tree) in sys.modules[name].__file__ for name in ("fused_lk", "fused_lk.rowwise")), launch
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
