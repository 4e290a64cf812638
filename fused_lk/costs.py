"""Products and bytes of a call, from its shapes and the choices in `plan`, without running anything.

The walks of `chunked` say what is alive when; tests hold these sums against the accounting of real calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from . import gemm, plan
from .draft import LinearDraft
from .gemm import row_stride
from .layout import Layout
from .pairs import Pairs
from .rows import plain
from .rows.interface import NUM_SAVED, RowStats

TARGET_KINDS = ("hidden", "cached", "logits", "probs", "topk")

# Vectors per pair beside the statistics: weights, coefficients, gradients of the statistics.
_VECTORS = 6

Parts = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Shape:
    """A call without its tensors: a linear draft of `num_rows` rows in `num_sources` tensors, and a target."""

    pairs: Pairs
    num_rows: int
    num_sources: int
    num_targets: int
    hidden_size: int
    target_hidden_size: int
    draft_vocab_size: int
    target_vocab_size: int
    target: str
    normalizer_given: bool
    dtype: torch.dtype
    logits_dtype: torch.dtype | None
    needs_hidden: bool
    needs_weight: bool
    row_operations: str
    device: torch.device

    @property
    def shares_vocabulary(self) -> bool:
        return self.draft_vocab_size == self.target_vocab_size

    @property
    def accumulator(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def target_tile_bytes(self) -> int:
        """Per column: logits are in the compute dtype, logarithms of probabilities in the accumulator's; 0 where
        logits are read where they lie."""
        if self.target == "cached" or (self.target == "logits" and self.shares_vocabulary):
            return 0
        return (self.accumulator if self.target in ("probs", "topk") else self.dtype).itemsize

    @property
    def streams_normalizer(self) -> bool:
        """Whether a pass over the full target vocabulary is made from hidden states."""
        return self.target == "cached" or (
            self.target == "hidden" and not self.shares_vocabulary and not self.normalizer_given
        )


def _bytes_of(statistics: Sequence[str], accumulator: torch.dtype) -> int:
    """Bytes of these statistics of one pair."""
    return sum(8 if name.endswith("argmax") else accumulator.itemsize for name in statistics)


class Costs:
    """The choices for one call, and what they cost."""

    def __init__(self, shape: Shape, *, one_pass: bool, budget: int | None) -> None:
        self.shape, self.one_pass, self.budget = shape, one_pass, budget
        pairs = shape.pairs
        self.num_pairs = shape.num_rows if pairs.num_pairs is None else pairs.num_pairs
        self.num_targets = pairs.num_targets(shape.num_rows)
        empty = torch.empty(0, 0, dtype=shape.dtype, device="meta")
        draft = LinearDraft([empty], empty, None, shape.logits_dtype)
        self.tiles = plan.TileCosts(sum(x.itemsize for x in draft.tile_dtypes()), shape.target_tile_bytes)
        self.needs_gradient = shape.needs_hidden or shape.needs_weight
        by_vocabulary = not one_pass and plan.walks_by_vocabulary(
            shape.draft_vocab_size, self.num_pairs, shape.needs_weight
        )
        self.chunking = plan.by_rows(
            self.tiles,
            shape.draft_vocab_size,
            self.num_pairs,
            self.num_targets,
            shape.device,
            budget,
            accumulates_weight=shape.needs_weight and not by_vocabulary,
        )
        self.block_columns = (
            plan.by_vocabulary(
                self.tiles, shape.draft_vocab_size, self.num_pairs, self.num_targets, shape.device, budget
            )
            if by_vocabulary
            else None
        )
        self.one_gemm = 2 * self.num_pairs * shape.hidden_size * shape.draft_vocab_size

    @cached_property
    def layout(self) -> Layout:
        c = self.chunking
        return self.shape.pairs.layout(self.shape.num_rows, self.shape.num_sources, c.max_pairs, c.max_targets)

    @cached_property
    def chunk_pairs(self) -> int:
        return max((c.num_pairs for c in self.layout.chunks), default=0)

    @cached_property
    def chunk_targets(self) -> int:
        return max((c.num_targets for c in self.layout.chunks), default=0)

    @property
    def draft_gemms(self) -> int:
        gradients = self.shape.needs_hidden + self.shape.needs_weight
        return 1 + gradients + (self.needs_gradient and not self.one_pass)

    def target_flops(self) -> int:
        shape = self.shape
        passes = 0 if shape.target != "hidden" else 1 + (self.needs_gradient and not self.one_pass)
        logits = 2 * passes * self.num_targets * shape.target_hidden_size * shape.draft_vocab_size
        return logits + (self._stream_flops() if shape.streams_normalizer else 0)

    def _stream_flops(self) -> int:
        return 2 * self.shape.num_targets * self.shape.target_hidden_size * self.shape.target_vocab_size

    def floor_flops(self, from_hidden: bool) -> int:
        """Each draft product once, the target's logits once per target row (the pass for a normaliser has them)."""
        shape = self.shape
        draft = (1 + shape.needs_hidden + shape.needs_weight) * self.one_gemm
        if shape.target not in ("hidden", "cached"):
            return draft
        size = shape.target_vocab_size if from_hidden else shape.draft_vocab_size
        return draft + 2 * self.num_targets * shape.target_hidden_size * size

    def reasons(self) -> tuple[str, str]:
        """Of the walk, and of its chunks."""
        shape = self.shape
        draft_row, target_row = self.tiles.row_bytes(shape.draft_vocab_size)
        return (
            plan.walk_reason(shape.draft_vocab_size, self.num_pairs, shape.needs_weight, self.one_pass),
            f"at most {self.chunking.max_pairs} pairs a chunk: {self.chunking.reason}, at {draft_row} bytes of logits "
            f"a pair and {target_row} a target row",
        )

    # Bytes.

    @property
    def d_hidden(self) -> int:
        return (
            self.shape.num_rows * self.shape.hidden_size * self.shape.dtype.itemsize if self.shape.needs_hidden else 0
        )

    def d_weight(self, dtype: torch.dtype) -> int:
        return self.shape.draft_vocab_size * self.shape.hidden_size * dtype.itemsize if self.shape.needs_weight else 0

    def held_bytes(self) -> int:
        """One pass: the gradients themselves (in half precision's narrow range, dW in float32). Recompute: the
        statistics of each pair."""
        if not self.needs_gradient:
            return 0
        if self.one_pass:
            wide = self.shape.dtype == torch.float16
            return self.d_hidden + self.d_weight(self.shape.accumulator if wide else self.shape.dtype)
        return self.num_pairs * _bytes_of(RowStats._fields[:NUM_SAVED], self.shape.accumulator)

    def at_peak(self) -> Parts:
        """What is alive when the most is."""
        return max(self._moments(), key=lambda parts: sum(size for _, size in parts))

    def _moments(self) -> list[Parts]:
        shape, acc = self.shape, self.shape.accumulator
        always = (("statistics", self._vector_bytes()), ("cached logits", self._cached()))
        moments: list[Parts] = [(*always, *self._row_walk(self.needs_gradient and self.one_pass))]
        if shape.streams_normalizer:
            moments.append((*always, *self._stream()))
        if not self.needs_gradient:
            return moments
        dh, narrow, wide = self.d_hidden, self.d_weight(shape.dtype), self.d_weight(acc)
        cast = (*always, ("dH", dh), ("dW, accumulated", wide), ("dW", narrow if wide != narrow else 0))
        if self.one_pass:
            held = self.held_bytes()
            if shape.dtype != torch.float16:
                moments.append(cast)
            moments.append((*always, ("gradients, held", held), ("gradients", dh + narrow)))
            return moments
        if self.block_columns is None:
            return [*moments, (*always, *self._row_walk(True)), cast]
        rows = self.num_pairs * shape.hidden_size
        dh_acc = rows * acc.itemsize if shape.needs_hidden else 0
        gathered = 0 if self._in_one_run() else rows * shape.dtype.itemsize
        blocks = (
            ("tiles", self._tile_bytes(self.num_pairs, self.num_targets, self.block_columns)),
            ("hidden states, gathered", gathered),
            ("target states, gathered", self._target_states(self.num_targets)),
            ("rows", self._row_buffers(self.block_columns)),
        )
        scratch = (
            ("tiles", self._tile_bytes(self.num_pairs, self.num_targets, self.block_columns)),
            ("hidden states, gathered", gathered),
            ("upcast blocks", self._scratch(self.num_pairs, self.block_columns, shape.hidden_size)),
        )
        wide_block = acc.itemsize * self.block_columns * shape.hidden_size if shape.dtype == torch.float16 else 0
        sums = (("dH, accumulated", dh_acc), ("dW", narrow), ("dW of a block, in float32", wide_block))
        narrow_rows = dh_acc // acc.itemsize * shape.dtype.itemsize if acc != shape.dtype else 0
        scattered = dh if self.layout.flat_rows is not None or shape.num_sources > 1 else 0
        return [
            *moments,
            (*always, *sums, *blocks),
            (*always, *sums, *scratch),
            (*always, *sums, ("dH, rows", narrow_rows)),
            (*always, ("dH, rows", narrow_rows or dh_acc), ("dH", scattered), ("dW", narrow)),
        ]

    def _row_walk(self, makes_gradient: bool) -> Parts:
        """A chunk of full rows: the widest moment of it."""
        shape, n = self.shape, self.chunk_pairs
        parts = [
            ("tiles", self._tile_bytes(n, self.chunk_targets, shape.draft_vocab_size)),
            ("hidden states, gathered", 0 if self._in_order() else n * shape.hidden_size * shape.dtype.itemsize),
        ]
        logits = self._target_states(self.chunk_targets)
        rows = self._row_buffers(shape.draft_vocab_size)
        if not makes_gradient:
            return (*parts, ("target states, gathered", max(logits, rows) if logits > rows else 0), ("rows", rows))
        d_rows = 0 if self._in_order() or not shape.needs_hidden else n * shape.hidden_size * shape.dtype.itemsize
        upcast = self._scratch(shape.draft_vocab_size, n, shape.hidden_size) if shape.needs_weight else 0
        widest = max((("rows", rows), ("dH of the chunk", d_rows), ("upcast blocks", upcast)), key=lambda x: x[1])
        return (*parts, ("dH", self.d_hidden), ("dW, accumulated", self.d_weight(shape.accumulator)), widest)

    def _stream(self) -> Parts:
        shape = self.shape
        size = row_stride(shape.target_vocab_size) * shape.dtype.itemsize
        itemsize = shape.dtype.itemsize
        rows = gemm.rows_of_a_tile(shape.target_vocab_size, shape.num_targets, itemsize, shape.device, self.budget)
        return (
            ("target tile", rows * size),
            ("draft columns", rows * self._cached() // max(shape.num_targets, 1) if not shape.shares_vocabulary else 0),
            ("rows", self._row_buffers(shape.target_vocab_size) // plain.NUM_BUFFERS * 3),
        )

    def _cached(self) -> int:
        shape = self.shape
        if shape.target != "cached":
            return 0
        return row_stride(shape.draft_vocab_size) * shape.num_targets * shape.dtype.itemsize

    def _tile_bytes(self, pairs: int, targets: int, columns: int) -> int:
        draft_row, target_row = self.tiles.row_bytes(columns)
        return pairs * draft_row + targets * target_row

    def _target_states(self, targets: int) -> int:
        if self.shape.target != "hidden" or self.layout.unique_targets is None:
            return 0
        return targets * self.shape.target_hidden_size * self.shape.dtype.itemsize

    def _row_buffers(self, columns: int) -> int:
        """Temporaries of the PyTorch row operations; the kernels have none."""
        if self.shape.row_operations == "triton":
            return 0
        rows = max(1, plain.BLOCK_ELEMENTS // columns)
        return plain.NUM_BUFFERS * rows * columns * self.shape.accumulator.itemsize

    def _scratch(self, m: int, k: int, n: int) -> int:
        shape = self.shape
        return gemm.accumulate_scratch(m, k, n, shape.dtype, shape.accumulator, shape.device)

    def _vector_bytes(self) -> int:
        statistics = _bytes_of(RowStats._fields, self.shape.accumulator)
        return self.num_pairs * (statistics + _VECTORS * self.shape.accumulator.itemsize)

    def _in_order(self) -> bool:
        """Whether a chunk's hidden states are read where they lie."""
        return self.layout.flat_rows is None

    def _in_one_run(self) -> bool:
        return self._in_order() and self.shape.num_sources == 1
