"""The work list: which draft row is scored against which target row, and how it is cut into chunks.

Loss masks, padding, the shift of test-time-training steps, blocks and anchors of block drafters, packing: each is a
list of pairs. Rows that are not in it cost nothing.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import validation

_IGNORED = torch.iinfo(torch.long).max


class Pairs:
    """The supervised (draft row, target row) pairs of a batch, sorted by target row. Build once, use many times.

    Args:
        mask: bool, or float weights >= 0, `[...]` = the draft hidden states' shape without the last dimension;
            False or 0 ignores the row. Default: every row counts 1.
        target_rows: int64, same shape: row of the *flattened* target that each draft row is scored against,
            -1 ignores the row. Default: row i against row i.
        positions: int64, same shape: draft position (TTT step) of each row, 0-based.
        num_positions: how many positions there are; required with `positions`.
        skip_masked: compact the rows, at the price of one host synchronisation here. False keeps every row (no
            synchronisation, static shapes, as CUDA graphs need) and gives ignored rows exact zeros after the GEMMs;
            contents are then not checked. Under `torch.compile` rows are compacted inside the loss's operator, and
            the target rows' range is all that is checked.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices; negative or NaN weights; target rows below -1;
            positions outside `[0, num_positions)`; `positions` without `num_positions`.
    """

    def __init__(
        self,
        mask: Tensor | None = None,
        target_rows: Tensor | None = None,
        positions: Tensor | None = None,
        num_positions: int | None = None,
        *,
        skip_masked: bool = True,
    ) -> None:
        given = {"mask": mask, "target_rows": target_rows, "positions": positions}
        given = {name: x for name, x in given.items() if x is not None}
        for name, x in given.items():
            dtypes = (torch.bool, *validation.FLOATS) if name == "mask" else (torch.int64,)
            validation.tensor(name, x, dtypes=dtypes)
        first = next(iter(given.items()), None)
        for name, x in given.items():
            validation.shape(name, x, tuple(first[1].shape), f"the shape of {first[0]}")
            validation.same_device(first[1].device, **{name: x})
        if positions is not None and num_positions is None:
            validation.fail(
                "num_positions with positions", "positions alone", "Pass num_positions, the number of draft positions."
            )
        if num_positions is not None and (
            isinstance(num_positions, bool) or not isinstance(num_positions, int) or num_positions < 1
        ):
            validation.fail("num_positions to be a positive int", num_positions, "Pass the number of draft positions.")

        self.num_positions = num_positions or 1
        self.shape = None if first is None else tuple(first[1].shape)
        self.device = None if first is None else first[1].device
        self.is_identity = mask is None and target_rows is None
        self.skip_masked = skip_masked
        flat = {name: x.detach().reshape(-1) for name, x in given.items()}
        mask, target_rows, positions = (flat.get(name) for name in ("mask", "target_rows", "positions"))
        weights = None if mask is None or mask.dtype == torch.bool else mask
        if torch.compiler.is_compiling():
            self._keep(mask, target_rows, positions, weights)
            return
        with torch.inference_mode(False):  # pairs made during an evaluation serve in training too
            if skip_masked:
                self._compact(mask, target_rows, positions, weights)
            else:
                self._keep(mask, target_rows, positions, weights)

    def _compact(self, mask, target_rows, positions, weights) -> None:
        self.valid = self.draft_rows = self.target_rows = None
        self.weights, self.positions = weights, positions
        self._layouts: dict[tuple[int, ...], Layout] = {}
        if self.shape is None:
            return
        device = self.device
        reports = [torch.zeros((), dtype=torch.bool, device=device)] * 3
        if weights is not None:
            reports[0] = ~(torch.isfinite(weights) & (weights >= 0)).all()
        if target_rows is not None:
            reports[1] = (target_rows < -1).any()
        if positions is not None:
            reports[2] = ((positions < 0) | (positions >= self.num_positions)).any()
        report = torch.stack(reports).long()
        if self.is_identity:
            self._check(report.cpu().numpy())
            return
        num_rows = next(x for x in (mask, target_rows) if x is not None).shape[0]
        rows = torch.arange(num_rows, device=device) if target_rows is None else target_rows
        key = torch.where(rows >= 0, rows, _IGNORED)
        if mask is not None:
            key = torch.where(mask > 0, key, _IGNORED)
        key, order = torch.sort(key, stable=True)
        host = torch.cat([report, key, order]).cpu().numpy()  # the one synchronisation
        self._check(host[:3])
        self._host_targets, self._host_draft = host[3 : 3 + num_rows], host[3 + num_rows :]
        count = int(np.searchsorted(self._host_targets, _IGNORED))
        self._host_targets, self._host_draft = self._host_targets[:count], self._host_draft[:count]
        self.draft_rows, self.target_rows = order[:count], key[:count]
        if weights is not None:
            self.weights = weights[self.draft_rows]
        if positions is not None:
            self.positions = positions[self.draft_rows]
        if count == num_rows and np.array_equal(self._host_draft, np.arange(num_rows)) and self._is_arange():
            self.is_identity, self.draft_rows, self.target_rows = True, None, None

    def _is_arange(self) -> bool:
        return np.array_equal(self._host_targets, np.arange(len(self._host_targets)))

    def _keep(self, mask, target_rows, positions, weights) -> None:
        self.draft_rows = None
        self.target_rows = None if target_rows is None else target_rows.clamp(min=0)
        self.valid = None if mask is None else mask > 0
        if target_rows is not None:
            self.valid = target_rows >= 0 if self.valid is None else self.valid & (target_rows >= 0)
        self.weights = weights
        if self.valid is not None:
            ones = self.valid.float()
            self.weights = ones if weights is None else torch.where(self.valid, weights, 0)
        self.positions = None if positions is None else positions.clamp(0, self.num_positions - 1)
        self._layouts = {}

    def _check(self, report: np.ndarray) -> None:
        if report[0]:
            validation.fail(
                "mask weights that are finite and >= 0", "a negative, infinite or NaN weight", "Use 0 to ignore."
            )
        if report[1]:
            validation.fail("target_rows >= -1", "an entry below -1", "Use -1 to ignore a row.")
        if report[2]:
            validation.fail(
                f"positions in [0, {self.num_positions})",
                "an entry outside",
                "Positions are 0-based; check num_positions.",
            )

    @property
    def num_pairs(self) -> int | None:
        """Number of pairs (of rows, with `skip_masked=False`); None if that depends on the draft."""
        if self.draft_rows is not None:
            return self.draft_rows.shape[0]
        return None if self.shape is None else math.prod(self.shape)

    @property
    def in_order(self) -> bool:
        """Whether pair i is draft row i, and counts."""
        return self.draft_rows is None and self.valid is None

    def num_targets(self, num_rows: int) -> int:
        """Number of distinct target rows (where they are not compacted: one per row)."""
        if self.draft_rows is None:
            return num_rows
        return int(np.count_nonzero(np.diff(self._host_targets))) + (len(self._host_targets) > 0)

    def dense(self, num_rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """`(weights, target_rows, positions)` `[num_rows]`, with weight 0 and row 0 where ignored."""
        weights = (
            self.weights
            if self.weights is not None
            else torch.ones(num_rows if self.num_pairs is None else self.num_pairs, device=device)
        )
        rows = torch.arange(num_rows, device=device) if self.target_rows is None else self.target_rows
        positions = torch.zeros_like(rows) if self.positions is None else self.positions
        if self.draft_rows is None:
            return weights[:num_rows], rows, positions
        return tuple(x.new_zeros(num_rows).index_copy(0, self.draft_rows, x) for x in (weights, rows, positions))

    def check_target(self, num_rows: int, num_targets: int, computed: np.ndarray | None) -> None:
        """Every pair's target row exists (and was computed, where the target says which rows were).

        Raises:
            ValueError: an identity list of another length than the target, a row out of range, a row left out by
                the target's own mask.
        """
        if self.target_rows is None:
            if num_rows != num_targets:
                validation.fail(
                    f"as many target rows as draft rows ({num_rows}) without target_rows",
                    f"{num_targets} target rows",
                    "Pass target_rows: for each draft row, the row of the flattened target.",
                )
            used = slice(None)
        elif self.draft_rows is None or self.num_pairs == 0 or torch.compiler.is_compiling():
            return
        else:
            used = self._host_targets
            if used[-1] >= num_targets:
                validation.fail(
                    f"target_rows below {num_targets}, the number of rows of the flattened target",
                    f"a target row {int(used[-1])}",
                    "Use -1 for rows that have no target.",
                )
        if computed is not None and not computed[used].all():
            validation.fail(
                "every supervised pair's target row inside the target's own mask",
                f"{int((~computed[used]).sum())} pair(s) outside",
                "Pass Target.from_hidden a mask that covers them.",
            )

    def row_layout(self, num_rows: int, device: torch.device) -> Layout:
        """Every draft row as a pair of its own, without chunks: what is left to do around an operator's results."""
        weights, target_rows, positions, valid = self.weights, self.target_rows, self.positions, self.valid
        if self.draft_rows is not None:
            weights, target_rows, positions = self.dense(num_rows, device)
            valid = weights > 0
        return Layout(
            num_rows, None, None, target_rows, target_rows, None, weights, positions, valid, (), num_rows, num_rows
        )

    def layout(self, num_rows: int, num_sources: int, max_pairs: int, max_targets: int) -> Layout:
        """The pairs cut into chunks of at most `max_pairs` pairs and `max_targets` distinct target rows.

        The `num_rows` draft rows lie in `num_sources` tensors of equal length; within a chunk, pairs are grouped by
        source, so that each is gathered with one copy.
        """
        if self.draft_rows is None:
            per_source = num_rows // num_sources
            return Layout.of_all_rows(self, num_rows, per_source, min(max_pairs, max_targets))
        key = (num_rows, num_sources, max_pairs, max_targets)
        if key not in self._layouts:
            with torch.inference_mode(False):
                self._layouts = {key: Layout.of_pairs(self, *key)}
        return self._layouts[key]


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
        rows: int64 `[P]`, draft row within its source; None: the rows of a segment are `row_of(start)` and on.
        flat_rows: int64 `[P]`, draft row counted through all sources; None: pair i is row i.
        target_rows: int64 `[P]`; None: pair i is scored against target row i.
        unique_targets: int64 `[M]`, distinct target rows in order; None: the rows `0..P`, or `target_rows` itself.
        unique_index: int64 `[P]`, index of each pair's row in `unique_targets`; None: pair i uses the i-th.
        weights, positions, valid: `[P]` or None, as `Pairs` holds them.
    """

    rows_per_source: int
    rows: Tensor | None
    flat_rows: Tensor | None
    target_rows: Tensor | None
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
            per_source, None, None, pairs.target_rows, pairs.target_rows, None, pairs.weights, pairs.positions,
            pairs.valid, tuple(chunks), num_rows, num_rows,
        )  # fmt: skip

    @classmethod
    def of_pairs(cls, pairs: Pairs, num_rows: int, num_sources: int, max_pairs: int, max_targets: int) -> Layout:
        """The compacted pairs, cut between target rows where possible, so that each target row is made once."""
        count, targets = pairs.num_pairs, pairs._host_targets
        new_target = np.ones(count, dtype=bool)
        new_target[1:] = targets[1:] != targets[:-1]
        starts = np.append(np.flatnonzero(new_target), count)  # pair at which each distinct target row starts
        num_targets = len(starts) - 1
        cuts = _cut(starts, max_pairs, max_targets)

        per_source = num_rows // num_sources
        source = pairs._host_draft // max(per_source, 1)
        chunk_of = np.repeat(np.arange(len(cuts)), [b - a for a, b, _ in cuts])
        draft_rows, order = pairs.draft_rows, None
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

        flat_rows = arrange(draft_rows)
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
            flat_rows if num_sources == 1 else flat_rows % per_source,
            flat_rows,
            arrange(pairs.target_rows),
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

    def whole(self) -> Chunk:
        """All pairs as one chunk."""
        segments = tuple(segment for chunk in self.chunks for segment in chunk.segments)
        return Chunk(0, self.num_pairs, segments, slice(0, self.num_targets))

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
        return x if self.target_rows is None else x[self.target_rows]


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
