"""The losses as operators of a graph: what `torch.compile` sees in place of the functions of `autograd`.

    fused_lk::row_divergences   the primitive, and all that its gradient needs, per draft row
    fused_lk::row_gradients     the gradient of the primitive; it makes the logits again
    fused_lk::one_pass_loss     the loss, and its gradient, which is multiplied by the upstream one later

In a graph, shapes may depend on shapes alone. So all results here are per draft row, `[N]`, and 0 where it is ignored.
Inside, the operators compact the rows, at one host synchronisation each, and spread the results out again. The rest of
the loss, which sums `[N]`-sized tensors, is traced as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import gemm
from ..objective import Objective
from ..opaque import opaque
from ..pairs.layout import Layout
from ..pairs.pairs import Pairs
from ..rows.interface import Normalizer, RowStats, Transform
from ..targets.target import Target
from ..walk import by_rows
from ..walk.draft import near_unit_scale
from ..walk.plan import Facts, Plan, Tiles, empty_statistics, kept_dtypes, kept_rows
from ..walk.problem import Problem, check_target_rows, low_rank
from . import autograd

# A `Problem` as operators take it: the tensors first. `_flat` and `_problem` go there and back.
_PROBLEM = (
    "Tensor[] draft, Tensor[] target, Tensor? normalizer, Tensor? valid, Tensor? target_rows, Tensor? labels, "
    "int num_sources, bool linear, ScalarType? logits_dtype, float draft_scale, float? draft_inner, str target_kind, "
    "int target_vocab_size, float target_scale, float? target_inner, bool is_mass, float rounding, bool skip_masked, "
    "str impl, int? budget, int keep, bool[] needs, str[] terms, float jsd_beta, bool scores_argmax"
)
_NUM_ARGUMENTS, _NUM_TENSORS, _NUM_SOURCES, _NEEDS, _TERMS = 25, 6, 6, 21, 22


def _flat(problem: Problem, layout: Layout, saves: bool) -> tuple[Any, ...]:
    """`saves`: whether a backward will read these tensors."""
    k, target = problem.num_sources, problem.target
    tiles = target.owned_tiles() if saves and target.of_inference_mode else target.tiles
    normalizer = target.normalizer or Normalizer(None, False, 0.0)  # type: ignore[arg-type]
    has_rows = _has_rows(len(problem.tensors), k)
    draft = [x.reshape(-1, x.shape[-1]) if rows else x for x, rows in zip(problem.tensors, has_rows, strict=True)]
    return (
        *(draft, list(tiles.tensors()), normalizer.value, layout.valid, layout.target_rows, problem.labels),
        *(k, problem.linear, problem.logits_dtype, *problem.transform),
        *(tiles.kind, tiles.vocab_size, *target.transform, normalizer.is_mass, normalizer.rounding),
        *(problem.pairs.skip_masked, problem.impl, problem.budget, problem.keep, list(problem.needs)),
        *(list(problem.terms), problem.jsd_beta, problem.scores_argmax),
    )


def _has_rows(num_tensors: int, num_sources: int) -> list[bool]:
    """Which of a draft's tensors have a row per token: its sources, and those of a low-rank product."""
    second = range(num_tensors)[low_rank(num_tensors, num_sources)][:-1]
    return [i < num_sources or i in second for i in range(num_tensors)]


def _problem(arguments: Sequence[Any]) -> Problem:
    draft, target_tensors, value, valid, target_rows, labels, k, linear, logits_dtype, *transform = arguments[:11]
    kind, size, *of_target, is_mass, rounding, skip_masked, impl, budget, keep = arguments[11:_NEEDS]
    needs, terms, beta, argmax = arguments[_NEEDS:]
    normalizer = None if value is None else Normalizer(value, is_mass, rounding)
    target = Target.rebuilt(kind, target_tensors, size, Transform(*of_target), normalizer)
    pairs = Pairs(valid, target_rows, skip_masked=skip_masked)
    shape = (sum(x.shape[0] for x in draft[:k]),)
    given = (tuple(draft), k, linear, logits_dtype, Transform(*transform))
    of_terms = (tuple(terms), labels, beta, argmax, keep)
    return Problem(*given, target, pairs, shape, impl, budget, tuple(needs), *of_terms)


def _planned(arguments: Sequence[Any], one_pass: bool = False) -> tuple[Problem, Plan]:
    problem = _problem(arguments)
    check_target_rows(problem.pairs, problem.num_rows, problem.target.tiles.num_rows)
    return problem, Plan.of(Facts.of(problem, static=True), one_pass)


def _empty_stats(arguments: Sequence[Any]) -> list[Tensor]:
    """Unwritten results per row, for tracing."""
    draft, target, labels, num_sources = (
        arguments[0],
        arguments[1],
        arguments[_NUM_TENSORS - 1],
        arguments[_NUM_SOURCES],
    )
    acc = gemm.wide_dtype(draft[0].dtype, target[0].dtype)
    num_rows = sum(x.shape[0] for x in draft[:num_sources])
    terms, _, scores_argmax = arguments[_TERMS:]
    finds_argmax = scores_argmax or ("ce" in terms and labels is None)
    stats = empty_statistics(num_rows, tuple(terms), acc, draft[0].device, finds_argmax)
    return [x for x in stats if x is not None]


def prepare(problem: Problem, one_pass: bool) -> tuple[Layout, Layout]:
    """Every draft row is a pair of its own; the plan is made inside the operators, where sizes are known."""
    layout = Layout.of_rows(problem.pairs, problem.num_rows, problem.device)
    return layout, layout


def divergences(problem: Problem, layout: Layout, *_: Tensor) -> list[Tensor]:
    return row_divergences(*_flat(problem, layout, saves=any(problem.needs)))[0]


def one_pass(problem: Problem, layout: Layout, objective: Objective, *tensors: Tensor) -> tuple[Tensor, ...]:
    mix, terms, eta, kl_scale, weights, kl_weight = objective
    assert terms == problem.terms
    of_mix = [name for name, _ in mix], [weight for _, weight in mix]
    given = _flat(problem, layout, saves=False)
    loss, losses, stats, *_ = one_pass_loss(*given, weights, kl_weight, *of_mix, eta, kl_scale)
    return loss, losses, *stats


def total(values: Tensor, supported: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    losses = objective.per_token(values, supported)
    return objective.total(losses), losses.detach()


@opaque(f"({_PROBLEM}) -> (Tensor[], Tensor[])")
def row_divergences(*arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    """`RowStats` as a list, per draft row, and the tiles that are kept for the backward."""
    problem, plan = _planned(arguments)
    kept = plan.kept_tiles()
    stats = by_rows.statistics(problem, plan, kept)
    return _per_row(plan.layout, stats, problem.num_rows), [x for x in kept if x is not None]


@row_divergences.register_fake
def _(*arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    return _empty_stats(arguments), _empty_kept(arguments)


def _empty_kept(arguments: Sequence[Any]) -> list[Tensor]:
    """Unwritten tiles for what a forward keeps, for tracing."""
    draft, target, *_, linear, logits_dtype, _, _, kind, size = arguments[: _NUM_SOURCES + 7]
    keep, needs = arguments[_NEEDS - 1], arguments[_NEEDS]
    if keep == 0 or not any(needs):
        return []
    tiles = Target.rebuilt(kind, target, size, Transform(), None).tiles
    z = torch.promote_types(draft[0].dtype, logits_dtype or draft[0].dtype)
    dtypes = kept_dtypes(z, tiles.dtype, linear, tiles.of_product)
    num_rows = sum(x.shape[0] for x in draft[: arguments[_NUM_SOURCES]])
    rows = kept_rows(dtypes, num_rows, size, keep)
    return [gemm.tile(rows, size, x, draft[0].device) for x in dtypes if x is not None]


@opaque(f"({_PROBLEM}, Tensor[] saved, Tensor[] kept, bool[] wanted, Tensor d_values) -> Tensor[]")
def row_gradients(*arguments: Any) -> list[Tensor]:
    """The gradients of the draft's tensors that are `wanted`; `saved` are the statistics. The plan is the forward's."""
    *call, saved, kept, wanted, d_values = arguments
    problem, plan = _planned(call)
    stats = RowStats(*(plan.layout.per_pair(x) for x in saved))
    left = iter(kept)
    tiles = Tiles(*(None if dtype is None else next(left, None) for dtype in plan.facts.kept))
    problem = replace(problem, needs=tuple(wanted))
    gradients = autograd.gradients(problem, plan, stats, plan.layout.per_pair(d_values), tiles)
    return [x for x in gradients if x is not None]


@row_gradients.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, need in zip(arguments[0], arguments[-2], strict=True) if need]


@opaque(
    f"({_PROBLEM}, Tensor weights, Tensor? kl_weight, str[] components, float[] of_components, float eta, "
    "float kl_scale) -> (Tensor, Tensor, Tensor[], Tensor, Tensor[])"
)
def one_pass_loss(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor], Tensor, list[Tensor]]:
    """`(loss, losses, RowStats as a list, scale, held)`: losses and statistics per draft row, and in `held` the
    gradients that are needed."""
    *call, weights, kl_weight, components, of_components, eta, kl_scale = arguments
    problem, plan = _planned(call, one_pass=True)
    of_pair = plan.layout.per_pair
    lam = None if kl_weight is None else of_pair(kl_weight)
    mix = tuple(zip(components, of_components, strict=True))
    objective = Objective(mix, problem.terms, eta, kl_scale, of_pair(weights), lam)
    scale = near_unit_scale(objective.weights)
    stats, made = by_rows.one_pass(problem, plan, objective._replace(weights=objective.weights / scale))
    held = [x for x in made.done() if x is not None]
    losses = objective.per_token(stats.values, stats.supported())
    of_rows, *stats_of_rows = _per_row(plan.layout, (losses, *stats), problem.num_rows)
    return objective.total(losses), of_rows, stats_of_rows, scale, held


@one_pass_loss.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor], Tensor, list[Tensor]]:
    *call, weights, _, _, _, _, _ = arguments
    draft, num_sources = call[0], call[_NUM_SOURCES]
    held = []
    for x, need, rows in zip(draft, call[_NEEDS], _has_rows(len(draft), num_sources), strict=True):
        if need:
            dtype = x.dtype if rows else gemm.held_dtype(x.dtype)
            held.append(x.new_empty(x.shape, dtype=dtype))
    stats = _empty_stats(call)
    return weights.new_empty(()), torch.empty_like(stats[0][0]), stats, weights.new_empty(1), held


def _per_row(layout: Layout, stats: Sequence[Tensor | None], num_rows: int) -> list[Tensor]:
    """The statistics of every draft row: tensors of their own, as an operator's results must be.

    Rows that are kept for shape have theirs, which tell the backward that they have no answer; others are 0.
    """
    return [x if layout.valid is not None else layout.per_row(x, num_rows) for x in stats if x is not None]


def _save_divergences(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], list[Tensor]]) -> None:
    stats, kept = output
    ctx.mark_non_differentiable(*(x for i, x in enumerate(stats) if i != RowStats._fields.index("values")), *kept)
    draft, target, _, valid, target_rows, labels, *ctx.static = inputs
    ctx.save_for_backward(*draft, *target, valid, target_rows, labels, *stats, *kept)
    ctx.num_draft, ctx.num_target, ctx.num_stats = len(draft), len(target), len(stats)


def _divergences_backward(ctx: Any, gradients: list[Tensor], _: list[Tensor]) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    draft, saved = saved[: ctx.num_draft], saved[ctx.num_draft :]
    target, (valid, target_rows, labels, *stats) = saved[: ctx.num_target], saved[ctx.num_target :]
    needs, kept = list(ctx.needs_input_grad[0]), stats[ctx.num_stats :]
    d_values = gradients[RowStats._fields.index("values")]
    call = (draft, target, None, valid, target_rows, labels, *ctx.static)
    made = row_gradients.operator(*call, stats[: ctx.num_stats], kept, needs, d_values)
    return _to_inputs(made, needs, len(target), _NUM_ARGUMENTS)


def _save_one_pass(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, losses, stats, scale, held = output
    ctx.mark_non_differentiable(losses, *stats, scale, *held)
    ctx.save_for_backward(scale, *held)
    ctx.needs, ctx.num_inputs, ctx.num_target = inputs[_NEEDS], len(inputs), len(inputs[1])
    ctx.like = [(x.dtype, x.shape) for x, need in zip(inputs[0], ctx.needs, strict=True) if need]


def _one_pass_backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    scale, *held = ctx.saved_tensors
    made = autograd.release(held, scale, d_loss, ctx.like)
    return _to_inputs(made, ctx.needs, ctx.num_target, ctx.num_inputs)


def _to_inputs(made: Sequence[Tensor | None], needs: Sequence[bool], num_target: int, num: int) -> tuple[Any, ...]:
    """Gradients in the structure of an operator's `num` inputs, the first two of which are lists of tensors."""
    of_needed = iter(made)
    return [next(of_needed) if need else None for need in needs], [None] * num_target, *[None] * (num - 2)


row_divergences.register_autograd(_divergences_backward, setup_context=_save_divergences)
one_pass_loss.register_autograd(_one_pass_backward, setup_context=_save_one_pass)
