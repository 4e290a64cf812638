"""Pairs in the order in which they are worked on, cut into chunks."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import Pairs

Record = TypeVar("Record", bound=tuple[Any, ...])


class Segment(NamedTuple):
    """Pairs `start:stop` of a layout, whose draft rows lie in one source."""

    source: int
    start: int
    stop: int


class Chunk(NamedTuple):
    """Pairs `start:stop` of a layout, as segments, and the slice of the distinct target rows that they use."""

    start: int
    stop: int
    segments: tuple[Segment, ...]
    targets: slice

    @property
    def num_pairs(self) -> int:
        return self.stop - self.start

    @property
    def num_targets(self) -> int:
        return self.targets.stop - self.targets.start

    def of(self, record: Record) -> Record:
        """The chunk's part of a record whose tensors have one number per pair in their last dimension."""
        parts = (x[..., self.start : self.stop] if isinstance(x, Tensor) else x for x in record)
        return type(record)(*parts)


@dataclass(frozen=True)
class Layout:
    """Pairs in the order in which they are worked on.

    Attributes:
        flat_rows: int64 `[P]`, each pair's draft row, counted through all sources; None: pair i is row i.
        unique_targets: int64 `[M]`, the distinct target rows, in order; None: the rows `0..P`.
        unique_index: int64 `[P]`, the index of each pair's target row in `unique_targets`; None: pair i has index i.
        weights, positions, valid: `[P]` or None, as `Pairs` holds them.
    """

    rows_per_source: int
    flat_rows: Tensor | None
    unique_targets: Tensor | None
    unique_index: Tensor | None
    weights: Tensor | None
    positions: Tensor | None
    valid: Tensor | None
    chunks: tuple[Chunk, ...]
    num_pairs: int
    num_targets: int

    @classmethod
    def of(cls, pairs: Pairs, num_rows: int, num_sources: int, max_pairs: int, max_targets: int) -> Layout:
        """The pairs cut into chunks of at most `max_pairs` pairs and `max_targets` distinct target rows.

        The `num_rows` draft rows lie in `num_sources` tensors of equal length. In a chunk the pairs are sorted by
        source, so that one copy gathers what a source has. The pairs keep their last layout.
        """
        if pairs.draft_rows is None:
            return _of_all_rows(pairs, num_rows, num_sources, min(max_pairs, max_targets))
        key = (num_rows, num_sources, max_pairs, max_targets)
        if pairs.last_layout is None or pairs.last_layout[0] != key:
            with torch.inference_mode(False):
                pairs.last_layout = key, _of_pairs(pairs, *key)
        return pairs.last_layout[1]

    @classmethod
    def of_rows(cls, pairs: Pairs, num_rows: int, device: torch.device) -> Layout:
        """Every draft row as a pair of its own, without chunks."""
        weights, target_rows, positions, valid = pairs.weights, pairs.target_rows, pairs.positions, pairs.valid
        if pairs.draft_rows is not None:
            weights, target_rows, positions = pairs.dense(num_rows, device)
            valid = weights > 0
        return cls(num_rows, None, target_rows, None, weights, positions, valid, (), num_rows, num_rows)

    @property
    def in_order(self) -> bool:
        """Whether pair i is draft row i, and counts."""
        return self.flat_rows is None and self.valid is None

    @property
    def target_rows(self) -> Tensor | None:
        """int64 `[P]`, each pair's target row; None: pair i is scored against row i. (It is made only on request.)"""
        if self.unique_targets is None or self.unique_index is None:
            return self.unique_targets
        return self.unique_targets[self.unique_index]

    def rows_of(self, segment: Segment) -> slice | Tensor:
        """The segment's rows within its source."""
        first = segment.source * self.rows_per_source
        if self.flat_rows is None:
            return slice(segment.start - first, segment.stop - first)
        rows = self.flat_rows[segment.start : segment.stop]
        return rows if first == 0 else rows - first

    def whole(self) -> Chunk:
        """All pairs as one chunk."""
        return self.joined(0, len(self.chunks))

    def joined(self, first: int, last: int) -> Chunk:
        """The chunks `first:last` as one. Segments that a cut between chunks divided are one again."""
        segments: list[Segment] = []
        chunks = self.chunks[first:last]
        for segment in (segment for chunk in chunks for segment in chunk.segments):
            if segments and segments[-1].source == segment.source and segments[-1].stop == segment.start:
                segment = segments.pop()._replace(stop=segment.stop)
            segments.append(segment)
        if not chunks:
            return Chunk(0, 0, (), slice(0, 0))
        targets = slice(chunks[0].targets.start, chunks[-1].targets.stop)
        return Chunk(chunks[0].start, chunks[-1].stop, tuple(segments), targets)

    def per_pair(self, x: Tensor) -> Tensor:
        """`x` `[..., N]`, per draft row, as `[..., P]`, per pair."""
        return x if self.flat_rows is None else x[..., self.flat_rows]

    def per_row(self, x: Tensor, num_rows: int) -> Tensor:
        """`x` `[..., P]`, per pair, as `[..., N]`, per draft row; 0 where ignored. Differentiable."""
        if self.valid is not None:
            return torch.where(self.valid, x, 0)
        if self.flat_rows is None:
            return x
        empty = torch.zeros(*x.shape[:-1], num_rows, dtype=x.dtype, device=x.device)
        return empty.index_copy(-1, self.flat_rows, x)

    def of_target(self, x: Tensor) -> Tensor:
        """`x` `[M_all]`, per row of the target, as `[P]`, per pair."""
        return x[: self.num_pairs] if (rows := self.target_rows) is None else x[rows]


def position_sums(x: Tensor, positions: Tensor | None, num_positions: int) -> Tensor:
    """`[..., K]`, the sums of `x` `[..., P]` by position. They are masked sums: scattered adds are not deterministic on
    a GPU."""
    if positions is None or num_positions == 1:
        total = x.sum(-1, keepdim=True)
        return total if num_positions == 1 else F.pad(total, (0, num_positions - 1))
    of = torch.arange(num_positions, device=x.device).unsqueeze(1)
    return torch.where(positions == of, x.unsqueeze(-2), 0).sum(-1)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """`numerator / denominator` of a finite numerator; 0 where the denominator is 0."""
    return numerator / torch.where(denominator > 0, denominator, math.inf)


def _of_all_rows(pairs: Pairs, num_rows: int, num_sources: int, max_rows: int) -> Layout:
    """Every draft row in order, each with a target row of its own. A chunk stays inside one source."""
    per_source, chunks = num_rows // num_sources, []
    for source in range(num_sources):
        for a, b in _balanced(source * per_source, per_source, max_rows):
            chunks.append(Chunk(a, b, (Segment(source, a, b),), slice(a, b)))
    of_pair = (pairs.weights, pairs.positions, pairs.valid)
    return Layout(per_source, None, pairs.target_rows, None, *of_pair, tuple(chunks), num_rows, num_rows)


def _of_pairs(pairs: Pairs, num_rows: int, num_sources: int, max_pairs: int, max_targets: int) -> Layout:
    """The compacted pairs. Cuts lie between target rows where possible, so that each target row is made once."""
    draft_rows, target_rows = pairs.draft_rows, pairs.target_rows
    assert draft_rows is not None and target_rows is not None
    count, targets = len(pairs.host_targets), pairs.host_targets
    new_target = np.ones(count, dtype=bool)
    new_target[1:] = targets[1:] != targets[:-1]
    starts = np.append(np.flatnonzero(new_target), count)  # the pair at which each distinct target row starts
    num_targets = len(starts) - 1
    cuts = _cut(starts, max_pairs, max_targets)

    per_source = num_rows // num_sources
    source = pairs.host_draft // max(per_source, 1)
    order = None
    if num_sources > 1:
        chunk_of = np.repeat(np.arange(len(cuts)), [b - a for a, b, _ in cuts])
        host_order = np.argsort(chunk_of * num_sources + source, kind="stable")
        source = source[host_order]
        order = torch.from_numpy(host_order).to(draft_rows.device)

    def arrange(x: Tensor | None) -> Tensor | None:
        return x if x is None or order is None else x[order]

    unique_targets, unique_index = target_rows, None
    if num_targets < count or order is not None:
        is_new = torch.ones_like(target_rows, dtype=torch.bool)
        is_new[1:] = target_rows[1:] != target_rows[:-1]
        unique_index = is_new.cumsum(0) - 1
        unique_targets = target_rows.new_empty(num_targets).scatter_(0, unique_index, target_rows)
        unique_index = arrange(unique_index)

    chunks = []
    for a, b, unique in cuts:
        counts = np.bincount(source[a:b], minlength=num_sources)
        ends = zip(counts, a + np.cumsum(counts), strict=True)
        segments = tuple(Segment(k, int(end - n), int(end)) for k, (n, end) in enumerate(ends) if n)
        chunks.append(Chunk(a, b, segments, unique))
    of_pair = (arrange(pairs.weights), arrange(pairs.positions), None)
    rows = (arrange(draft_rows), unique_targets, unique_index)
    return Layout(per_source, *rows, *of_pair, tuple(chunks), count, num_targets)


def _balanced(start: int, count: int, most: int) -> list[tuple[int, int]]:
    """`start .. start + count` in the fewest pieces of at most `most`, as equal as possible."""
    pieces = -(-count // max(most, 1))
    edges = [start + count * i // max(pieces, 1) for i in range(pieces + 1)]
    return list(itertools.pairwise(edges))


def _cut(starts: np.ndarray, max_pairs: int, max_targets: int) -> list[tuple[int, int, slice]]:
    """Chunks `(first pair, end, slice of distinct targets)`. A target row is divided only where it must be."""
    count = int(starts[-1])
    # The fewest chunks that respect the limit, and then no larger than needed, so that none is a small remainder.
    max_pairs = -(-count // max(-(-count // max_pairs), 1)) if count else max_pairs
    cuts, start = [], 0
    while start < count:
        first = int(np.searchsorted(starts, start, side="right")) - 1
        stop = min(start + max_pairs, int(starts[min(first + max_targets, len(starts) - 1)]))
        last = int(np.searchsorted(starts, stop, side="right")) - 1  # the target row that `stop` would split
        if stop < count and starts[last] > start:
            stop = int(starts[last])
        last = int(np.searchsorted(starts, stop, side="left"))
        cuts.append((start, stop, slice(first, last)))
        start = stop
    return cuts
