"""Every choice about how the work is done, in one place: plan, walk and chunk sizes, with the reason for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import checks, gemm
from .gemm import ROW_ALIGNMENT, default_budget, row_stride

PLANS = ("auto", "one_pass", "recompute")

# Each chunk of the by-rows walk adds into all of dW in float32. Below about this many rows a chunk that traffic, not
# arithmetic, sets the pace of a GPU: 8 bytes of dW traffic per 2 * rows flops, 1,024 rows = 256 flops a byte.
ROWS_TO_HIDE_WEIGHT_TRAFFIC = 1024

# Below 128 rows a chunk the matrix products of a CPU lose more than a small tile gains.
MIN_CPU_ROWS = 128


@dataclass(frozen=True)
class TileCosts:
    """What one row of a chunk needs: bytes per column of the draft's and the target's tile (0: no tile)."""

    draft_bytes: int
    target_bytes: int

    def row_bytes(self, columns: int) -> tuple[int, int]:
        stride = row_stride(columns)
        return stride * self.draft_bytes, stride * self.target_bytes


@dataclass(frozen=True)
class Chunking:
    """Sizes of a walk: at most so many pairs and distinct target rows a chunk; `reason` says what set the pairs."""

    max_pairs: int
    max_targets: int
    reason: str


def by_rows(
    costs: TileCosts,
    vocab_size: int,
    num_pairs: int,
    num_targets: int,
    device: torch.device,
    budget: int | None,
    accumulates_weight: bool,
) -> Chunking:
    """Chunks of full rows that fit the budget, a row at the least."""
    draft_row, target_row = costs.row_bytes(vocab_size)
    targets_per_pair = num_targets / max(num_pairs, 1)
    per_pair = max(draft_row + target_row * targets_per_pair, 1)
    reason = "what the workspace holds"
    if budget is None:
        budget = default_budget(device)
        rows, why = MIN_CPU_ROWS, "the least that GEMMs of a CPU want"
        if not gemm.is_cpu(device):
            rows, why = ROWS_TO_HIDE_WEIGHT_TRAFFIC, "what hides the float32 traffic of dW on a GPU"
        if (gemm.is_cpu(device) or accumulates_weight) and rows * per_pair > budget:
            budget, reason = int(rows * per_pair), why
    pairs = max(1, int(budget / per_pair))
    if pairs >= num_pairs:
        pairs, reason = max(num_pairs, 1), "all there are"
    # Target rows are shared unevenly: give them what the pairs leave.
    targets = num_targets if target_row == 0 else max(1, (budget - pairs * draft_row) // target_row)
    return Chunking(pairs, max(1, targets), reason)


def by_vocabulary(
    costs: TileCosts, vocab_size: int, num_pairs: int, num_targets: int, device: torch.device, budget: int | None
) -> int:
    """Columns of a block over all rows that fit the budget."""
    budget = default_budget(device) if budget is None else budget
    per_column = max(1, num_pairs * costs.draft_bytes + num_targets * costs.target_bytes)
    columns = budget // per_column // ROW_ALIGNMENT * ROW_ALIGNMENT
    return min(max(columns, ROW_ALIGNMENT), vocab_size)


def walks_by_vocabulary(vocab_size: int, num_pairs: int, needs_weight: bool) -> bool:
    """Whether the recompute backward goes by vocabulary: accumulate over the smaller side.

    By rows accumulates dW `[V, H]` in float32 and casts it; by vocabulary accumulates dH `[pairs, H]` and writes dW
    once. A frozen head has no dW, and rows need no accumulator.
    """
    return needs_weight and vocab_size > num_pairs


def walk_reason(vocab_size: int, num_pairs: int, needs_weight: bool, in_one_pass: bool) -> str:
    """The walk of the gradients, and why."""
    if in_one_pass:
        return "by rows: one pass has a chunk's full rows in hand, and no statistics of later ones"
    if not needs_weight:
        return "by rows: the head is frozen, so there is no dW to accumulate"
    if walks_by_vocabulary(vocab_size, num_pairs, needs_weight):
        return f"by vocabulary: dH of {num_pairs} pairs is smaller to accumulate than dW of {vocab_size} tokens"
    return f"by rows: dW of {vocab_size} tokens is no larger to accumulate than dH of {num_pairs} pairs"


def resolve(requested: str, obstacle: str | None) -> str:
    """The plan to use, where `obstacle` is why one pass cannot serve the request (None: it can).

    Raises:
        ValueError: an unknown plan, or "one_pass" with an obstacle.
    """
    checks.choice("plan", requested, PLANS)
    if requested == "one_pass" and obstacle is not None:
        checks.fail('a request that plan="one_pass" can serve', obstacle, 'Use plan="auto" or "recompute".')
    if requested == "auto":
        return "recompute" if obstacle is not None else "one_pass"
    return requested
