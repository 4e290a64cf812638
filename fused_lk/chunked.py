"""The walks over the pairs: statistics, gradients by rows, gradients by vocabulary, and both in one pass.

By rows (a chunk of pairs at a time, full rows):

    z = h[chunk] @ W.T      t = target logits of the chunk's target rows, once for all pairs that share them
    row operations: statistics; gradient g, written over z
    dH[chunk] = g @ W       dW += g.T @ h[chunk]

By vocabulary (a block of columns at a time, statistics known): dW[block] = g.T @ h is written once in its final
dtype, dH += g @ W[block] accumulates.

Nothing here knows what the gradient is for: coefficients per pair come from outside, near unit scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from . import checks, gemm, plan
from .draft import LinearDraft, LinearGradients, LogitsDraft, LogitsGradients, times
from .layout import Chunk, Layout
from .pairs import Pairs
from .rows.interface import Coefficients, LogitRows, Normalizer, RowStats, accumulation_dtype
from .target import Target

Draft = LinearDraft | LogitsDraft


@dataclass(frozen=True)
class Work:
    """One call: everything but the draft's tensors, which autograd holds."""

    target: Target
    layout: Layout
    ops: ModuleType
    draft_scale: float
    target_scale: float
    budget: int | None
    wants_target_argmax: bool

    def owned(self) -> Work:
        """This work against a target whose tensors a backward may read again; see `Target.owned`."""
        return replace(self, target=self.target.owned())

    def accumulator(self, draft: Draft) -> torch.dtype:
        """float32, or float64 where either side is."""
        return torch.promote_types(accumulation_dtype(draft.sources[0]), self.target.dtype)

    def tile_costs(self, draft: Draft) -> plan.TileCosts:
        return tile_costs(draft, self.target, self.layout)

    def pair_normalizer(self) -> Normalizer | None:
        """The target's normaliser per pair."""
        normalizer = self.target.walk_normalizer()
        if normalizer is None:
            return None
        value = self.layout.of_target(normalizer.value)
        if self.layout.valid is not None:
            value = torch.where(self.layout.valid, value, 0)
        return normalizer._replace(value=value)

    def rows(self, z: Tensor, t: Tensor, t_index: Tensor | None, first_column: int = 0) -> LogitRows:
        """The tiles `z` and `t` as the row operations read them."""
        return LogitRows(z, t, t_index, self.draft_scale, self.target_scale, first_column)


def tile_costs(draft: Draft, target: Target, layout: Layout | Pairs) -> plan.TileCosts:
    """Bytes per column of the tiles a walk needs; 0 where logits are read where they lie."""
    draft_bytes = 0 if draft.tile_is_view(layout.in_order) else sum(dtype.itemsize for dtype in draft.tile_dtypes())
    return plan.TileCosts(draft_bytes, target.dtype.itemsize if _needs_target_tile(target, layout) else 0)


def _needs_target_tile(target: Target, layout: Layout | Pairs) -> bool:
    return not target.tiles.lie_in_place() or layout.valid is not None


class _Tiles:
    """The workspace of one walk: tiles for the largest chunk."""

    def __init__(self, work: Work, draft: Draft, rows: int, targets: int, columns: int) -> None:
        device = draft.sources[0].device
        dtypes = () if draft.tile_is_view(work.layout.in_order) else draft.tile_dtypes()
        tiles = [gemm.tile(rows, columns, dtype, device) for dtype in dtypes]
        self.z = tiles[0] if tiles else None
        self.gradient = tiles[1] if len(tiles) > 1 else None
        needs_target = _needs_target_tile(work.target, work.layout)
        self.t = gemm.tile(targets, columns, work.target.dtype, device) if needs_target else None

    @classmethod
    def by_rows(cls, work: Work, draft: Draft) -> _Tiles:
        chunks = work.layout.chunks
        rows = max((c.num_pairs for c in chunks), default=0)
        targets = max((c.num_targets for c in chunks), default=0)
        return cls(work, draft, rows, targets, draft.vocab_size)


def _walk(work: Work, draft: Draft, tiles: _Tiles) -> Iterator[tuple[Chunk, Tensor | None, LogitRows]]:
    """Per chunk: `(chunk, h, logits)`."""
    columns = slice(0, draft.vocab_size)
    for chunk in work.layout.chunks:
        z, h = draft.fill(work.layout, chunk, columns, tiles.z)
        t, index = work.target.tiles.fill(work.layout, chunk, columns, tiles.t)
        yield chunk, h, work.rows(z, t, index)


def statistics(work: Work, draft: Draft) -> RowStats:
    """The statistics of every pair."""
    out, normalizer = _empty_stats(work, draft), work.pair_normalizer()
    for chunk, _, rows in _walk(work, draft, _Tiles.by_rows(work, draft)):
        work.ops.stats(rows, _of_chunk(normalizer, chunk), out.rows(chunk.start, chunk.stop))
    _check_mass(normalizer, out, work.target_scale)
    return out


def one_pass(
    work: Work, draft: Draft, needs: Sequence[bool], coefficients: Coefficients
) -> tuple[RowStats, list[Tensor | None]]:
    """Statistics and gradients from the same tiles.

    `coefficients(start, stop, statistics)` gives (d log alpha, d KL) of pairs start:stop. The gradients are as
    `held` until a scale is known.
    """
    out, normalizer = _empty_stats(work, draft), work.pair_normalizer()

    def write(chunk: Chunk, rows: LogitRows, g: Tensor) -> None:
        def of_block(start: int, stop: int, stats: RowStats) -> tuple[Tensor, Tensor]:
            return coefficients(chunk.start + start, chunk.start + stop, stats)

        work.ops.stats_and_gradient(rows, _of_chunk(normalizer, chunk), out.rows(chunk.start, chunk.stop), g, of_block)

    held = _walk_gradients(work, draft, needs, write).held()
    _check_mass(normalizer, out, work.target_scale)
    return out, held


def gradients_by_rows(
    work: Work, draft: Draft, needs: Sequence[bool], stats: RowStats, d_log_alpha: Tensor, d_kl: Tensor, scale: Tensor
) -> list[Tensor | None]:
    """Gradients, times `scale` `[1]`, of `sum d_log_alpha * log alpha + d_kl * KL`."""

    def write(chunk: Chunk, rows: LogitRows, g: Tensor) -> None:
        a, b = chunk.start, chunk.stop
        work.ops.gradient(rows, stats.rows(a, b), d_log_alpha[a:b], d_kl[a:b], g)

    return _walk_gradients(work, draft, needs, write).scaled(scale)


def _walk_gradients(
    work: Work, draft: Draft, needs: Sequence[bool], write: Callable[[Chunk, LogitRows, Tensor], None]
) -> LinearGradients | LogitsGradients:
    """The gradients of all chunks, where `write` writes the gradient tile of one.

    The tiles end with this call: the final cast of the gradients needs memory of its own.
    """
    gradients = draft.gradients(work.layout, needs)
    tiles = _Tiles.by_rows(work, draft)
    for chunk, h, rows in _walk(work, draft, tiles):
        g = gradients.gradient_tile(chunk, rows.z, tiles.gradient)
        write(chunk, rows, g)
        gradients.add(chunk, h, g)
    return gradients


def gradients_by_vocabulary(
    work: Work,
    draft: LinearDraft,
    needs: Sequence[bool],
    stats: RowStats,
    d_log_alpha: Tensor,
    d_kl: Tensor,
    scale: Tensor,
) -> list[Tensor | None]:
    """As `gradients_by_rows`, a block of columns at a time over all pairs."""
    layout, k = work.layout, len(draft.sources)
    whole = layout.whole()
    costs = work.tile_costs(draft)
    device = draft.sources[0].device
    step = plan.by_vocabulary(costs, draft.vocab_size, layout.num_pairs, layout.num_targets, device, work.budget)
    tiles = _Tiles(work, draft, whole.num_pairs, whole.num_targets, step)
    acc = accumulation_dtype(draft.weight)
    hidden = draft.all_rows(layout, whole)
    d_hidden = hidden.new_zeros(hidden.shape, dtype=acc) if any(needs[:k]) else None
    d_weight = torch.empty_like(draft.weight, memory_format=torch.contiguous_format) if needs[k] else None
    d_bias = None
    if draft.bias is not None and needs[k + 1]:
        d_bias = draft.bias.new_empty(draft.bias.shape, dtype=acc)
    wide = acc if draft.dtype == torch.float16 else draft.dtype  # a block of dW, until its scale is applied

    for start in range(0, draft.vocab_size, step):
        columns = slice(start, min(start + step, draft.vocab_size))
        z, _ = draft.fill(layout, whole, columns, tiles.z, hidden)
        t, index = work.target.tiles.fill(layout, whole, columns, tiles.t)
        g = z if tiles.gradient is None else tiles.gradient[: z.shape[0], : z.shape[1]]
        rows = work.rows(z, t, index, start)
        work.ops.gradient(rows, stats, d_log_alpha, d_kl, g)
        if d_weight is not None:
            block = d_weight[columns]
            into = block if wide == block.dtype else torch.empty_like(block, dtype=wide)
            gemm.product_into(into, g.t(), hidden)
            torch.mul(into, scale, out=block)
        if d_hidden is not None:
            gemm.accumulate(d_hidden, g, draft.weight[columns])
        if d_bias is not None:
            d_bias[columns] = g.sum(0, dtype=acc)
    del tiles, rows, z, t, g, hidden
    d_sources = draft.hidden_gradients(layout, whole, d_hidden, scale, needs[:k])
    if d_bias is not None:
        d_bias = times(d_bias, scale, draft.dtype, in_place=True)
    return [*d_sources, d_weight] if draft.bias is None else [*d_sources, d_weight, d_bias]


def _of_chunk(normalizer: Normalizer | None, chunk: Chunk) -> Normalizer | None:
    return None if normalizer is None else normalizer._replace(value=normalizer.value[chunk.start : chunk.stop])


def _check_mass(normalizer: Normalizer | None, stats: RowStats, t_scale: float) -> None:
    """Refuse a target whose probabilities sum to more than 1; on a device, where reading waits, its rows give NaN."""
    if normalizer is None or normalizer.is_mass or not checks.checks_contents(stats.log_mass):
        return
    excessive = stats.log_mass > normalizer.most_log_mass(normalizer.value, stats.target_top, t_scale)
    if bool(excessive.any()):
        checks.fail(
            "a target whose probabilities on the draft vocabulary sum to at most 1 in each supervised row",
            f"{int(excessive.sum())} row(s) with more, up to {stats.log_mass[excessive].exp().max():.4g}",
            "Pass probabilities or log-probabilities, not logits; a log_normalizer must be logsumexp(logits / "
            "temperature) over the full vocabulary.",
        )


def _empty_stats(work: Work, draft: Draft) -> RowStats:
    device = draft.sources[0].device
    return RowStats.empty(work.layout.num_pairs, work.accumulator(draft), device, work.wants_target_argmax)
