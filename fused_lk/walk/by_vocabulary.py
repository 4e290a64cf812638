"""The walk by vocabulary: a block of columns at a time, over all pairs. It needs the statistics.

dW[block] = g.T @ h     written once, in its final dtype
dH += g @ W[block]      accumulated
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..rows.interface import RowStats
from .by_rows import logit_rows
from .draft import GradientsOfDraft, LogitsDraft, draft_of
from .plan import Plan
from .problem import Problem


def gradients(problem: Problem, plan: Plan, stats: RowStats, d_values: Tensor, scale: Tensor) -> GradientsOfDraft:
    """As `by_rows.gradients`."""
    layout, step, size = plan.layout, plan.block_columns, plan.facts.vocab_size
    draft, whole = draft_of(problem), plan.layout.whole()
    assert not isinstance(draft, LogitsDraft) and step is not None
    made, tiles = draft.gradients(plan, problem.needs, scale), plan.tiles(layout.num_pairs, layout.num_targets, step)
    h: Any = draft.rows(layout, whole)
    ops = plan.ops
    for start in range(0, size, step):
        columns = slice(start, min(start + step, size))
        rows = logit_rows(problem, plan, draft, whole, h, columns, tiles)
        g = made.tile(whole, rows.z, tiles.g)
        ops.gradient(rows, problem.terms, stats, d_values, g)
        made.add(whole, h, columns, g)
    return made
