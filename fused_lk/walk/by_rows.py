"""The walk by rows: a chunk of pairs at a time, full rows.

    z = h[chunk] @ W.T      t = target logits of the chunk's target rows, once for all pairs that share them
    row operations: statistics; gradient g, written over z
    dH[chunk] = g @ W       dW += g.T @ h[chunk]

The first chunks may leave their logits to the backward, which then makes those of the others alone. Kept logits are
never written again: the backward may come twice.

A walk does not know what the gradient is for. The coefficients of each pair come from outside, near unit scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..objective import Objective
from ..pairs.layout import Chunk, Layout
from ..rows.interface import NEG_INF, LogitRows, Normalizer, RowStats
from .draft import GradientsOfDraft, draft_of
from .plan import NO_TILES, Plan, Tiles
from .problem import Problem


def statistics(problem: Problem, plan: Plan, kept: Tiles = NO_TILES) -> RowStats:
    """The statistics of every pair. The logits of the plan's kept chunks are left in `kept`."""
    out, ops, draft = plan.empty_statistics(problem), plan.ops, draft_of(problem)
    tiles = plan.tiles(*plan.workspace(gradient=False), plan.facts.vocab_size)
    for chunk, _, rows in _chunks(problem, plan, draft, tiles, _normalizer(problem, plan), kept, filled=False):
        ops.stats(rows, problem.terms, chunk.of(out))
    _check_mass(problem, plan, out)
    return out


def one_pass(problem: Problem, plan: Plan, loss: Objective) -> tuple[RowStats, GradientsOfDraft]:
    """The statistics, and the gradients of `loss`, made from the same tiles."""
    out, ops, draft = plan.empty_statistics(problem), plan.ops, draft_of(problem)
    made, tiles = draft.gradients(plan, problem.needs), plan.tiles(*plan.chunk, plan.facts.vocab_size)
    for chunk, h, rows in _chunks(problem, plan, draft, tiles, _normalizer(problem, plan)):
        g = made.tile(chunk, rows.z, tiles.g)
        ops.stats_and_gradient(rows, problem.terms, chunk.of(out), chunk.of(loss), g)
        made.add(chunk, h, slice(0, plan.facts.vocab_size), g)
    _check_mass(problem, plan, out)
    return out, made


def gradients(
    problem: Problem, plan: Plan, stats: RowStats, d_values: Tensor, scale: Tensor, kept: Tiles
) -> GradientsOfDraft:
    """The gradients of `sum d_values * values`, times `scale` `[1]`."""
    ops, draft = plan.ops, draft_of(problem)
    made = draft.gradients(plan, problem.needs, scale)
    tiles = plan.tiles(*plan.workspace(gradient=True), plan.facts.vocab_size)
    place = tiles.g if kept.z is None or tiles.g is not None else tiles.z
    for chunk, h, rows in _chunks(problem, plan, draft, tiles, None, kept):
        g = made.tile(chunk, rows.z, place)
        ops.gradient(rows, problem.terms, chunk.of(stats), d_values[:, chunk.start : chunk.stop], g)
        made.add(chunk, h, slice(0, plan.facts.vocab_size), g)
    return made


def logit_rows(
    problem: Problem, plan: Plan, draft: Any, chunk: Chunk, h: Any, columns: slice, tiles: Tiles, filled: Tiles
) -> LogitRows:
    """The logits of draft and target for a chunk's pairs and a block of columns, in tiles or where they lie.

    `filled` are tiles that have the logits of all columns already.
    """
    if filled.z is None:
        z = draft_logits(problem, plan, draft, chunk, h, columns, tiles.z)
    else:
        z = filled.z[:, columns]
    if filled.t is None:
        t, index = target_logits(problem.target.tiles, plan.layout, chunk, columns, tiles.t)
    else:
        t, index = filled.t[:, columns], _index(plan.layout, chunk)
    labels = None if problem.labels is None else plan.layout.per_pair(problem.labels)[chunk.start : chunk.stop]
    if labels is not None and problem.target.tiles.restricts_draft:
        labels = problem.target.tiles.listed(labels, _target_rows(plan.layout, chunk))
    transforms = (problem.transform, problem.target.transform)
    return LogitRows(z, t, index, None, *transforms, columns.start, labels, problem.jsd_beta)


def part_of(kept: Tiles, chunk: Chunk) -> Tiles:
    """The rows of a chunk in the kept tiles."""
    z, t = kept.z, kept.t
    return Tiles(None if z is None else z[chunk.start : chunk.stop], None, None if t is None else t[chunk.targets])


def _chunks(
    problem: Problem,
    plan: Plan,
    draft: Any,
    tiles: Tiles,
    normalizer: Normalizer | None,
    kept: Tiles = NO_TILES,
    filled: bool = True,
) -> Iterator[tuple[Chunk, Any, LogitRows]]:
    """Per chunk: `(chunk, h, logits)`. Of the first ones the logits are in `kept`, or, not yet `filled`, made there."""
    columns = slice(0, plan.facts.vocab_size)
    for i, chunk in enumerate(plan.layout.chunks):
        h = draft.rows(plan.layout, chunk)
        own = part_of(kept if i < plan.num_kept else NO_TILES, chunk)
        into = tiles if filled else Tiles(*(x if y is None else y for x, y in zip(tiles, own, strict=True)))
        rows = logit_rows(problem, plan, draft, chunk, h, columns, into, own if filled else NO_TILES)
        if normalizer is not None:
            rows = rows._replace(normalizer=chunk.of(normalizer))
        yield chunk, h, rows


def draft_logits(
    problem: Problem, plan: Plan, draft: Any, chunk: Chunk, h: Any, columns: slice, tile: Tensor | None
) -> Tensor:
    """The draft's logits `[pairs, columns]`; -inf where the target's tiles restrict them."""
    z: Tensor = draft.fill(plan.layout, chunk, h, columns, tile)
    if problem.target.tiles.restricts_draft:
        problem.target.tiles.restrict(z, _target_rows(plan.layout, chunk), columns)
    return z


def _target_rows(layout: Layout, chunk: Chunk) -> slice | Tensor:
    """The target row of each pair of the chunk."""
    pairs = slice(chunk.start, chunk.stop)
    return pairs if layout.target_rows is None else layout.target_rows[pairs]


def target_logits(
    target: Any, layout: Layout, chunk: Chunk, columns: slice, tile: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`(t, index)`: logits `[rows, columns]`, and for each pair of the chunk its row in them (None: in order)."""
    pairs = slice(chunk.start, chunk.stop)
    if tile is None:  # they are read where the caller holds them
        if layout.target_rows is None:
            return target.view(chunk.targets, columns), None
        return target.view(slice(None), columns), layout.target_rows[pairs]
    rows = chunk.targets if layout.unique_targets is None else layout.unique_targets[chunk.targets]
    t = tile[: chunk.targets.stop - chunk.targets.start, : columns.stop - columns.start]
    target.write(t, rows, columns)
    if layout.valid is not None:
        # Ignored rows that are kept for shape have no answer: their gradient is 0, whatever else they meet.
        t.masked_fill_(~layout.valid[pairs].unsqueeze(1), NEG_INF)
    return t, _index(layout, chunk)


def _index(layout: Layout, chunk: Chunk) -> Tensor | None:
    """For each pair of the chunk, its row in a tile of the chunk's target rows; None: in order."""
    index = layout.unique_index
    return None if index is None else index[chunk.start : chunk.stop] - chunk.targets.start


def _normalizer(problem: Problem, plan: Plan) -> Normalizer | None:
    """The target's normaliser per pair."""
    normalizer, layout = problem.target.normalizer, plan.layout
    if normalizer is None:
        return None
    value = layout.of_target(normalizer.value)
    return normalizer._replace(value=value if layout.valid is None else torch.where(layout.valid, value, 0))


def _check_mass(problem: Problem, plan: Plan, stats: RowStats) -> None:
    """Refuse a target whose probabilities sum to more than 1. On a device nothing is read: such rows give NaN there."""
    normalizer = problem.target.normalizer
    if normalizer is None or normalizer.is_mass or not checks.checks_contents(stats.base):
        return
    given = _normalizer(problem, plan)
    assert given is not None
    most = given.most_log_mass(given.value, stats.target_top, problem.target.transform.scale)
    excessive = stats.log_mass > most
    if bool(excessive.any()):
        checks.fail(
            "a target whose probabilities on the draft vocabulary sum to at most 1 in each supervised row",
            f"{int(excessive.sum())} row(s) with more, up to {stats.log_mass[excessive].exp().max():.4g}",
            "Pass probabilities or log-probabilities, not logits; a log_normalizer must be logsumexp(logits / "
            "temperature) over the full vocabulary.",
        )
