"""Every choice about how the work is done, in one place: plan, walk and chunk sizes, with the reason for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import validation
from .workspace import ROW_ALIGNMENT, row_stride

MIB = 2**20
PLANS = ("auto", "one_pass", "recompute")

# The bound on the two logits tiles together. Large enough for GEMMs at full speed, small beside any model.
DEFAULT_WORKSPACE_MB = 256

# Each chunk of the by-rows walk adds into all of dW in float32. Below about this many rows a chunk that traffic, not
# arithmetic, sets the pace of a GPU: 8 bytes of dW traffic per 2 * rows flops, 1,024 rows = 256 flops a byte.
ROWS_TO_HIDE_WEIGHT_TRAFFIC = 1024

# On a CPU tiles above 32 MiB go back to the kernel when freed (glibc's largest mmap threshold), and every page
# of the next one faults: 20 ms per 64 MiB, a quarter of a GEMM. Measured at 1,024 x 256 x 32,000: 256, 64, 48, 32 MiB
# take 1.30, 1.14, 1.16, 1.18 s of one thread for the recompute plan. Below 128 rows a chunk the GEMMs lose more.
CPU_WORKSPACE_MB = 64
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


def workspace_bytes(workspace_mb: float | str) -> int | None:
    """The bound in bytes; None for "auto"."""
    if isinstance(workspace_mb, str):
        if workspace_mb == "auto":
            return None
        validation.fail('workspace_mb to be "auto" or a number', workspace_mb, "Pass a size in MiB.", TypeError)
    return int(validation.number("workspace_mb", workspace_mb, above=0) * MIB)


def is_cpu(device: torch.device) -> bool:
    """Whether chunks are sized for a CPU's caches rather than for a GPU's memory traffic."""
    return device.type == "cpu"


def default_budget(device: torch.device) -> int:
    """Bytes of `workspace_mb="auto"`."""
    return MIB * (CPU_WORKSPACE_MB if is_cpu(device) else DEFAULT_WORKSPACE_MB)


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
        if not is_cpu(device):
            rows, why = ROWS_TO_HIDE_WEIGHT_TRAFFIC, "what hides the float32 traffic of dW on a GPU"
        if (is_cpu(device) or accumulates_weight) and rows * per_pair > budget:
            budget, reason = int(rows * per_pair), why
    pairs = max(1, int(budget / per_pair))
    if pairs >= num_pairs:
        pairs, reason = max(num_pairs, 1), "all there are"
    # Target rows are shared unevenly: give them what the pairs leave.
    targets = num_targets if target_row == 0 else max(1, (budget - pairs * draft_row) // target_row)
    return Chunking(pairs, max(1, targets), reason)


def target_rows(vocab_size: int, num_rows: int, itemsize: int, device: torch.device, budget: int | None) -> int:
    """Rows of a chunk of the pass over the target's full vocabulary, which holds one tile: equal pieces that fit."""
    budget = default_budget(device) if budget is None else budget
    most = max(1, budget // (row_stride(vocab_size) * itemsize))
    return max(1, -(-num_rows // max(1, -(-num_rows // most))))


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
    validation.choice("plan", requested, PLANS)
    if requested == "one_pass" and obstacle is not None:
        validation.fail('a request that plan="one_pass" can serve', obstacle, 'Use plan="auto" or "recompute".')
    if requested == "auto":
        return "recompute" if obstacle is not None else "one_pass"
    return requested
