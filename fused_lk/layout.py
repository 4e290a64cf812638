"""Pairs in the order in which they are worked on, cut into chunks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .pairs import Pairs


class Segment(NamedTuple):
    """Pairs `start:stop` of a layout, whose draft rows lie in one source."""

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class Chunk:
    """Pairs `start:stop` of a layout, by source, and the distinct target rows `targets` that they use."""

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


@dataclass(frozen=True)
class Layout:
    """Pairs in the order in which they are worked on.

    Attributes:
        flat_rows: int64 `[P]`, draft row counted through all sources; None: pair i is row i.
        unique_targets: int64 `[M]`, distinct target rows in order; None: the rows `0..P`.
        unique_index: int64 `[P]`, index of each pair's row in `unique_targets`; None: pair i uses the i-th.
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
    def of_all_rows(cls, pairs: Pairs, num_rows: int, per_source: int, max_rows: int) -> Layout:
        """Every draft row in order, each with a target row of its own; a chunk stays inside one source."""
        chunks = []
        for source in range(num_rows // max(per_source, 1)):
            base = source * per_source
            for a, b in _balanced(per_source, max_rows):
                a, b = a + base, b + base
                chunks.append(Chunk(a, b, (Segment(source, a, b),), slice(a, b)))
        return cls(
            per_source, None, pairs.target_rows, None, pairs.weights, pairs.positions, pairs.valid, tuple(chunks),
            num_rows, num_rows,
        )  # fmt: skip

    @classmethod
    def of_pairs(cls, pairs: Pairs, num_rows: int, num_sources: int, max_pairs: int, max_targets: int) -> Layout:
        """The compacted pairs, cut between target rows where possible, so that each target row is made once."""
        assert pairs.draft_rows is not None and pairs.target_rows is not None
        count, targets = len(pairs.draft_rows), pairs._host_targets
        new_target = np.ones(count, dtype=bool)
        new_target[1:] = targets[1:] != targets[:-1]
        starts = np.append(np.flatnonzero(new_target), count)  # pair at which each distinct target row starts
        num_targets = len(starts) - 1
        cuts = _cut(starts, max_pairs, max_targets)

        per_source = num_rows // num_sources
        source = pairs._host_draft // max(per_source, 1)
        chunk_of = np.repeat(np.arange(len(cuts)), [b - a for a, b, _ in cuts])
        order = None
        if num_sources > 1:
            host_order = np.argsort(chunk_of * num_sources + source, kind="stable")
            source = source[host_order]
            order = torch.from_numpy(host_order).to(pairs.device)

        def arrange(x: Tensor | None) -> Tensor | None:
            return x if x is None or order is None else x[order]

        unique_targets, unique_index = pairs.target_rows, None
        if num_targets < count or order is not None:
            is_new = torch.ones_like(pairs.target_rows, dtype=torch.bool)
            is_new[1:] = pairs.target_rows[1:] != pairs.target_rows[:-1]
            unique_index = is_new.cumsum(0) - 1
            unique_targets = pairs.target_rows.new_empty(num_targets).scatter_(0, unique_index, pairs.target_rows)
            unique_index = arrange(unique_index)

        chunks = []
        for a, b, unique in cuts:
            counts = np.bincount(source[a:b], minlength=num_sources)
            ends = a + np.cumsum(counts)
            segments = tuple(
                Segment(k, int(end - n), int(end)) for k, (n, end) in enumerate(zip(counts, ends, strict=True)) if n
            )
            chunks.append(Chunk(a, b, segments, unique))
        return cls(
            per_source,
            arrange(pairs.draft_rows),
            unique_targets,
            unique_index,
            arrange(pairs.weights),
            arrange(pairs.positions),
            None,
            tuple(chunks),
            count,
            num_targets,
        )

    @property
    def in_order(self) -> bool:
        """Whether pair i is draft row i, and counts."""
        return self.flat_rows is None and self.valid is None

    @property
    def target_rows(self) -> Tensor | None:
        """int64 `[P]`; None: pair i is scored against target row i. (Made when asked for: it is seldom needed.)"""
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
        """All pairs as one chunk; runs that a cut between chunks divided are one segment again."""
        segments: list[Segment] = []
        for segment in (segment for chunk in self.chunks for segment in chunk.segments):
            if segments and segments[-1].source == segment.source and segments[-1].stop == segment.start:
                segment = segments.pop()._replace(stop=segment.stop)
            segments.append(segment)
        return Chunk(0, self.num_pairs, tuple(segments), slice(0, self.num_targets))

    def per_pair(self, x: Tensor) -> Tensor:
        """`x` `[N]`, per draft row, as `[P]`, per pair."""
        return x if self.flat_rows is None else x[self.flat_rows]

    def per_row(self, x: Tensor, num_rows: int) -> Tensor:
        """`x` `[P]`, per pair, as `[N]`, per draft row; 0 where ignored. Differentiable."""
        if self.valid is not None:
            return torch.where(self.valid, x, 0)
        if self.flat_rows is None:
            return x
        return torch.zeros(num_rows, dtype=x.dtype, device=x.device).index_copy(0, self.flat_rows, x)

    def of_target(self, x: Tensor) -> Tensor:
        """`x` `[M_all]`, per row of the target, as `[P]`, per pair."""
        return x[: self.num_pairs] if (rows := self.target_rows) is None else x[rows]


def _balanced(count: int, most: int) -> list[tuple[int, int]]:
    """`[0, count)` in the fewest pieces of at most `most`, as equal as can be."""
    pieces = -(-count // max(most, 1))
    edges = [count * i // max(pieces, 1) for i in range(pieces + 1)]
    return list(itertools.pairwise(edges))


def _cut(starts: np.ndarray, max_pairs: int, max_targets: int) -> list[tuple[int, int, slice]]:
    """Chunks `(first pair, end, slice of distinct targets)`; one target row is split only if it must be."""
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
