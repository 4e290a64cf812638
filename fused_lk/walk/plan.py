"""What is chosen: plan, walk, chunks, tiles and row operations. The facts of a call decide; each choice has a reason.

    facts                            choice
    objective, reduction             one pass, or the logits made again in the backward
    pairs, vocabulary, frozen head   a walk by rows, or by vocabulary
    tiles, workspace                 pairs and target rows of a chunk, columns of a block
    chunks, `keep_mb`                how many chunks leave their logits to the backward, from the first on

A run carries out the very `Plan` that `explain` prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple

import torch

from .. import checks, gemm
from ..impls import row_ops
from ..pairs.layout import Chunk, Layout
from ..pairs.pairs import Pairs
from ..rows.interface import RowStats
from .problem import Problem

PLANS = ("auto", "one_pass", "recompute")

# In the walk by rows each chunk adds into all of dW in float32. With fewer rows a chunk than this, that traffic sets
# the pace of a GPU, not the arithmetic: 8 bytes of dW move for 2 * rows flops, so that 1,024 rows are 256 flops a byte.
ROWS_TO_HIDE_WEIGHT_TRAFFIC = 1024

# Below 128 rows a chunk the matrix products of a CPU lose more than a small tile gains.
MIN_CPU_ROWS = 128


class Tiles(NamedTuple):
    """The draft's logits, their gradient, and the target's logits: the dtypes of their tiles, or the tiles themselves.

    None for logits that are read where they lie, and for a gradient that is written over the draft's logits.
    """

    z: Any
    g: Any
    t: Any


NO_TILES = Tiles(None, None, None)


def tile_dtypes(
    dtype: torch.dtype, logits_dtype: torch.dtype | None, target: torch.dtype, in_place: tuple[bool, bool]
) -> Tiles:
    """The tiles of a draft that computes in `dtype`, and of a `target` with logits of that dtype.

    `in_place` says of draft and target whether their logits can stay where they are. A gradient has a tile of its own
    where the logits are kept in another dtype.
    """
    z = torch.promote_types(dtype, logits_dtype or dtype)
    return Tiles(None if in_place[0] else z, dtype if z != dtype else None, None if in_place[1] else target)


def kept_dtypes(z: torch.dtype | None, t: torch.dtype | None, linear: bool, of_product: bool) -> Tiles:
    """The tiles, of those with dtypes `z` and `t`, that are worth keeping for the backward: what products filled."""
    return Tiles(z if linear else None, None, t if of_product else None)


def kept_rows(kept: Tiles, num_rows: int, vocab_size: int, keep: int) -> int:
    """The rows of both tiles in a graph, whose shapes may not depend on the work list: each pair has its own target."""
    return torch.sym_min(num_rows, keep // max(1, sum(_row_bytes(kept, vocab_size))))


def _row_bytes(tiles: Tiles, columns: int) -> Tiles:
    """Bytes of a row of each tile; 0 without one."""
    stride = gemm.row_stride(columns)
    return Tiles(*(0 if dtype is None else stride * dtype.itemsize for dtype in tiles))


@dataclass(frozen=True)
class Facts:
    """The numbers that a choice depends on.

    Attributes:
        hidden_size: of the draft, and the rank of a second product added to it: what a product's inner size is in all.
        dtype: what the draft computes in.
        accumulator: the dtype of the statistics of a row.
        tiles: the dtypes of the tiles.
        needs_hidden, needs_weight: which gradients are wanted. (For logits of the caller, the first is theirs.)
        terms: the divergences that are computed.
        kept: the dtypes of the tiles that the backward can use again.
        keep: the bytes that these may take in all.
        static: whether shapes may depend on shapes alone, not on the work list.
    """

    pairs: Pairs
    num_rows: int
    num_sources: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    accumulator: torch.dtype
    tiles: Tiles
    needs_hidden: bool
    needs_weight: bool
    impl: str
    device: torch.device
    budget: int | None
    terms: tuple[str, ...]
    kept: Tiles = NO_TILES
    keep: int = 0
    static: bool = False

    @classmethod
    def of(cls, problem: Problem, static: bool = False) -> Facts:
        k, tensors, pairs = problem.num_sources, problem.tensors, problem.pairs
        x, target = tensors[0], problem.target.tiles
        every_row = pairs.valid is None
        rank = sum(y.shape[-1] for y in tensors[problem.low_rank][-1:])
        unit = not problem.linear and all(y.stride(-1) == 1 for y in tensors[:k]) and not target.restricts_draft
        in_place = (unit and every_row and pairs.draft_rows is None, target.in_place and every_row)
        tiles = tile_dtypes(x.dtype, problem.logits_dtype, target.dtype, in_place)
        return cls(
            pairs=pairs,
            num_rows=problem.num_rows,
            num_sources=k,
            hidden_size=x.shape[-1] + rank if problem.linear else 0,
            vocab_size=target.vocab_size,
            dtype=x.dtype,
            accumulator=problem.accumulator,
            tiles=tiles,
            needs_hidden=any(problem.needs[:k]),
            needs_weight=problem.linear and problem.needs[k],
            impl=problem.impl,
            device=x.device,
            budget=problem.budget,
            terms=problem.terms,
            kept=kept_dtypes(tiles.z, tiles.t, problem.linear, target.of_product),
            keep=problem.keep if any(problem.needs) else 0,
            static=static,
        )

    @property
    def num_pairs(self) -> int:
        return self.num_rows if self.pairs.num_pairs is None else self.pairs.num_pairs

    @property
    def num_targets(self) -> int:
        """Distinct target rows."""
        return self.num_rows if self.pairs.num_targets is None else self.pairs.num_targets

    def row_bytes(self, columns: int) -> tuple[int, int]:
        """Bytes of the tiles for one pair, and for one target row."""
        z, g, t = _row_bytes(self.tiles, columns)
        return z + g, t

    def kept_bytes(self, pairs: int, targets: int) -> int:
        """Bytes of the kept tiles for so many pairs and target rows."""
        z, _, t = _row_bytes(self.kept, self.vocab_size)
        return pairs * z + targets * t


@dataclass(frozen=True)
class Plan:
    """The choices for one call.

    Attributes:
        one_pass: whether the gradients are made in the forward.
        max_pairs, max_targets: the most that a chunk of the walk by rows has.
        block_columns: the columns of a block, where the walk by vocabulary makes the gradients; None: by rows.
        reasons: for the plan, for the walk, and for the chunks.
    """

    facts: Facts
    one_pass: bool
    max_pairs: int
    max_targets: int
    block_columns: int | None
    reasons: tuple[str, ...]

    @classmethod
    def of(cls, facts: Facts, one_pass: bool, why: str = "") -> Plan:
        by_vocabulary, walk = walks_by_vocabulary(facts, one_pass)
        max_pairs, max_targets, limit = _chunk(facts, accumulates_weight=facts.needs_weight and not by_vocabulary)
        pair_bytes, target_bytes = facts.row_bytes(facts.vocab_size)
        size = f"at most {max_pairs} pairs a chunk: {limit}, at {pair_bytes} bytes of logits a pair"
        reasons = (why, walk, f"{size} and {target_bytes} a target row")
        block = _block(facts) if by_vocabulary else None
        return cls(facts, one_pass, max_pairs, max_targets, block, reasons)

    @cached_property
    def layout(self) -> Layout:
        f = self.facts
        return Layout.of(f.pairs, f.num_rows, f.num_sources, self.max_pairs, self.max_targets)

    @property
    def ops(self) -> ModuleType:
        return row_ops(self.facts.impl, self.facts.device)

    def empty_statistics(self, problem: Problem) -> RowStats:
        """Unwritten statistics of every pair."""
        facts, argmax = self.facts, problem.scores_argmax or problem.learns_argmax
        return empty_statistics(self.layout.num_pairs, problem.terms, facts.accumulator, facts.device, argmax)

    @property
    def chunk(self) -> tuple[int, int]:
        """Pairs and target rows of the largest chunk."""
        chunks = self.layout.chunks
        targets = max((c.targets.stop - c.targets.start for c in chunks), default=0)
        return max((c.stop - c.start for c in chunks), default=0), targets

    @cached_property
    def num_kept(self) -> int:
        """How many chunks, from the first on, leave their logits to the backward."""
        f, chunks = self.facts, self.layout.chunks
        if self.one_pass or f.keep == 0 or f.kept_bytes(1, 1) == 0:
            return 0
        if f.static:
            rows = kept_rows(f.kept, f.num_rows, f.vocab_size, f.keep)
            return sum(c.stop <= rows for c in chunks)
        return sum(f.kept_bytes(c.stop, c.targets.stop) <= f.keep for c in chunks)

    @cached_property
    def kept(self) -> Chunk:
        """The chunks that leave their logits to the backward, as one."""
        return self.layout.joined(0, self.num_kept)

    @cached_property
    def rest(self) -> Chunk:
        """The other chunks, as one."""
        return self.layout.joined(self.num_kept, len(self.layout.chunks))

    @property
    def targets_again(self) -> Chunk:
        """What the backward makes target logits for, or reads them where they lie, as one chunk."""
        return self.layout.whole() if self.facts.kept.t is None else self.rest

    def workspace(self, gradient: bool) -> tuple[int, int]:
        """Pairs and target rows of the workspace of a walk by rows: of the largest chunk that has no tile of its own.

        A kept tile is never written again. So a gradient needs a place in the workspace.
        """
        chunks, kept = self.layout.chunks, self.facts.kept
        rest = chunks[self.num_kept :]
        pairs = (c.num_pairs for c in (chunks if gradient or kept.z is None else rest))
        targets = (c.num_targets for c in (chunks if kept.t is None else rest))
        return max(pairs, default=0), max(targets, default=0)

    def tiles(self, pairs: int, targets: int, columns: int) -> Tiles:
        """Unwritten tiles for that many pairs, target rows and columns."""
        return _unwritten(self.facts.tiles, pairs, targets, columns, self.facts.device)

    def kept_tiles(self) -> Tiles:
        """Unwritten tiles for the logits of the kept chunks; None for those that are not kept."""
        f = self.facts
        pairs, targets = self.kept.num_pairs, self.kept.num_targets
        if f.static and f.keep:
            pairs = targets = kept_rows(f.kept, f.num_rows, f.vocab_size, f.keep)
        dtypes = f.kept if pairs or (f.static and f.keep) else NO_TILES
        return _unwritten(dtypes, pairs, targets, f.vocab_size, f.device)


def _unwritten(dtypes: Tiles, pairs: int, targets: int, columns: int, device: torch.device) -> Tiles:
    made = (
        None if dtype is None else gemm.tile(rows, columns, dtype, device)
        for rows, dtype in zip((pairs, pairs, targets), dtypes, strict=True)
    )
    return Tiles(*made)


def empty_statistics(
    n: int, terms: tuple[str, ...], dtype: torch.dtype, device: torch.device, target_argmax: bool
) -> RowStats:
    """Unwritten statistics of `n` rows, in the accumulation dtype `dtype`."""
    shapes = ((5, n), (len(terms), n), (2, len(terms), n))
    argmaxes = [torch.empty(n, dtype=torch.long, device=device) for _ in range(1 + target_argmax)]
    return RowStats(*(torch.empty(shape, dtype=dtype, device=device) for shape in shapes), *argmaxes)


def resolve(requested: str, obstacle: str | None) -> tuple[bool, str]:
    """Whether to take one pass, and why. `obstacle` says why it cannot serve the request; None: it can.

    Raises:
        ValueError: an unknown plan, or "one_pass" with an obstacle.
    """
    checks.choice("plan", requested, PLANS)
    if requested == "one_pass" and obstacle is not None:
        checks.fail('a request that plan="one_pass" can serve', obstacle, 'Use plan="auto" or "recompute".')
    if requested != "auto":
        return requested == "one_pass", f"plan={requested!r} was asked for"
    if obstacle is not None:
        return False, f"recompute: one pass cannot serve {obstacle}"
    return True, "one pass: the factor of each row's gradient is known in the forward; a product less than recompute"


def walks_by_vocabulary(facts: Facts, one_pass: bool) -> tuple[bool, str]:
    """Whether a walk by vocabulary makes the gradients, and why. The smaller side is the one to accumulate.

    The walk by rows accumulates dW `[V, H]` in float32, and casts it at the end. The walk by vocabulary accumulates dH
    `[pairs, H]`, and writes dW once. With a frozen head there is no dW, and the walk by rows accumulates nothing.
    """
    pairs, tokens = facts.num_pairs, facts.vocab_size
    if one_pass:
        return False, "by rows: one pass has a chunk's full rows in hand, and no statistics of later ones"
    if not facts.needs_weight:
        return False, "by rows: the head is frozen, so there is no dW to accumulate"
    if tokens > pairs:
        return True, f"by vocabulary: dH of {pairs} pairs is smaller to accumulate than dW of {tokens} tokens"
    return False, f"by rows: dW of {tokens} tokens is no larger to accumulate than dH of {pairs} pairs"


def _chunk(facts: Facts, accumulates_weight: bool) -> tuple[int, int, str]:
    """The pairs and target rows of a chunk of full rows that fits the budget, and what limited the pairs."""
    draft_row, target_row = facts.row_bytes(facts.vocab_size)
    per_pair = max(draft_row + target_row * facts.num_targets / max(facts.num_pairs, 1), 1)
    budget, limit = gemm.bound(facts.budget, facts.device), "what the workspace holds"
    if facts.budget is None:
        cpu = gemm.is_cpu(facts.device)
        rows, why = ROWS_TO_HIDE_WEIGHT_TRAFFIC, "what hides the float32 traffic of dW on a GPU"
        if cpu:
            rows, why = MIN_CPU_ROWS, "the least that the products of a CPU want"
        if (cpu or accumulates_weight) and rows * per_pair > budget:
            budget, limit = int(rows * per_pair), why
    pairs = max(1, int(budget / per_pair))
    if pairs >= facts.num_pairs:
        pairs, limit = max(facts.num_pairs, 1), "all there are"
    # Pairs share target rows unevenly. The pairs take their part of the budget, and target rows may take the rest.
    targets = facts.num_targets if target_row == 0 else (budget - pairs * draft_row) // target_row
    return pairs, max(1, targets), limit


def _block(facts: Facts) -> int:
    """The columns of a block over all pairs that fits the budget."""
    budget = gemm.bound(facts.budget, facts.device)
    draft, target = facts.row_bytes(gemm.ROW_ALIGNMENT)
    columns = budget // max(1, facts.num_pairs * draft + facts.num_targets * target) * gemm.ROW_ALIGNMENT
    return min(max(columns, gemm.ROW_ALIGNMENT), facts.vocab_size)
