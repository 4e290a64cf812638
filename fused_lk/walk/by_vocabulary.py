"""The walk by vocabulary: a block of columns at a time, over all pairs. It needs the statistics.

dW[block] = g.T @ h     written once, in its final dtype
dH += g @ W[block]      accumulated

Pairs whose logits the forward kept go beside the others: their gradient is written into the same tile.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..rows.interface import RowStats
from .by_rows import logit_rows, part_of
from .draft import GradientsOfDraft, LogitsDraft, draft_of, narrowed
from .plan import NO_TILES, Plan, Tiles
from .problem import Problem


def gradients(
    problem: Problem, plan: Plan, stats: RowStats, d_values: Tensor, scale: Tensor, kept: Tiles
) -> GradientsOfDraft:
    """As `by_rows.gradients`."""
    layout, step, size = plan.layout, plan.block_columns, plan.facts.vocab_size
    draft, whole = draft_of(problem), plan.layout.whole()
    assert not isinstance(draft, LogitsDraft) and step is not None
    made = draft.gradients(plan, problem.needs, scale)
    tiles = plan.tiles(layout.num_pairs, plan.targets_again.num_targets, step)
    place = tiles.z if tiles.g is None else tiles.g
    parts = [(part, own) for part, own in ((plan.kept, kept), (plan.rest, NO_TILES)) if part.num_pairs]
    h: Any = draft.rows(layout, whole)
    ops = plan.ops
    for start in range(0, size, step):
        columns = slice(start, min(start + step, size))
        g = place[:, : columns.stop - start]
        for part, own in parts:
            at = slice(part.start, part.stop)
            into = tiles._replace(z=tiles.z[at])
            rows = logit_rows(problem, plan, draft, part, narrowed(h, at), columns, into, part_of(own, part))
            ops.gradient(rows, problem.terms, part.of(stats), d_values[:, at], g[at])
        made.add(whole, h, columns, g)
    return made
