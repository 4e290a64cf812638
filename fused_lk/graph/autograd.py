"""The two autograd functions: the primitive (recompute plan), and the loss whose gradient is made in the forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..objective import Objective
from ..pairs.layout import Layout
from ..rows.interface import RowStats
from ..walk import by_rows, by_vocabulary
from ..walk.draft import Gradients, near_unit_scale, times
from ..walk.plan import Facts, Plan, Tiles
from ..walk.problem import Problem


def prepare(problem: Problem, one_pass: bool) -> tuple[Plan, Layout]:
    """The plan of a problem, and the order of the pairs in its results."""
    plan = Plan.of(Facts.of(problem), one_pass)
    return plan, plan.layout


def gradients(problem: Problem, plan: Plan, stats: RowStats, d_values: Tensor | None, kept: Tiles) -> Gradients:
    """The gradients of `sum d_values * values`, in the shapes of the problem's tensors; None where not needed."""
    if d_values is None or plan.layout.num_pairs == 0:
        return [torch.zeros_like(x) if need else None for x, need in zip(problem.tensors, problem.needs, strict=True)]
    d_values = torch.where(stats.supported(), d_values, 0)
    scale = near_unit_scale(d_values)
    walk = by_rows if plan.block_columns is None else by_vocabulary
    with torch.autocast(problem.device.type, enabled=False):  # wherever the caller runs its backward
        made = walk.gradients(problem, plan, stats, d_values / scale, scale, kept)
    return _shaped(made.done(), [x.shape for x in problem.tensors])


def release(
    held: Sequence[Tensor | None], scale: Tensor, d_loss: Tensor, like: Sequence[tuple[torch.dtype, torch.Size]]
) -> Gradients:
    """The gradients that one pass held, times their scale and the upstream one, in the dtypes and shapes of `like`."""
    scale = scale * d_loss
    scaled = [times(x, scale, dtype, in_place=False) for x, (dtype, _) in zip(held, like, strict=True)]
    return _shaped(scaled, [shape for _, shape in like])


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, plan: Plan, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        if any(problem.needs):
            # Tensors of inference mode count no changes in place, and autograd cannot save them.
            target = problem.target.owned() if problem.target.of_inference_mode else problem.target
            own = tuple(x.clone() if x.is_inference() else x for x in problem.tensors)
            problem = replace(problem, tensors=own, target=target)
        kept = plan.kept_tiles()
        stats = by_rows.statistics(problem, plan, kept)
        if any(problem.needs):
            ctx.problem, ctx.plan, ctx.num_tensors = replace(problem, tensors=()), plan, len(tensors)
            # Autograd refuses a saved tensor that changed in place before the backward. So the target is saved too.
            ctx.num_stats = 4 + problem.learns_argmax
            given = (*problem.tensors, *problem.target.tiles.tensors())
            ctx.save_for_backward(kept.z, kept.t, *stats[: ctx.num_stats], *given)
        ctx.mark_non_differentiable(*(x for x in stats if x is not None and x is not stats.values))
        return tuple(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _base: None, d_values: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        z, t, *saved = ctx.saved_tensors  # asked once: under activation checkpointing, each time unpacks all anew
        stats, given = RowStats(*saved[: ctx.num_stats]), tuple(saved[ctx.num_stats :][: ctx.num_tensors])
        problem = replace(ctx.problem, tensors=given, needs=ctx.needs_input_grad[2:])
        return None, None, *gradients(problem, ctx.plan, stats, d_values, Tiles(z, None, t))


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, problem: Problem, plan: Plan, objective: Objective, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        scale = near_unit_scale(objective.weights)
        stats, made = by_rows.one_pass(problem, plan, objective._replace(weights=objective.weights / scale))
        ctx.like = [(x.dtype, x.shape) for x in tensors]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scale, *made.done())
        losses = objective.per_token(stats.values, stats.supported())
        ctx.mark_non_differentiable(losses, *(x for x in stats if x is not None))
        return objective.total(losses), losses, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        scale, *held = ctx.saved_tensors
        made = [None] * len(held) if d_loss is None else release(held, scale, d_loss, ctx.like)
        return None, None, None, *made


class _Total(torch.autograd.Function):
    """The loss and the tokens' losses, of the statistics. A third of the operations that autograd would do here."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, supported: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        losses = objective.per_token(values, supported)
        ctx.objective = objective
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values)
        ctx.mark_non_differentiable(losses)
        return objective.total(losses), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
        (values,) = ctx.saved_tensors
        return None if d_loss is None else d_loss * ctx.objective.d_values(values), None, None


def _shaped(gradients: Sequence[Tensor | None], shapes: Sequence[torch.Size]) -> Gradients:
    """Gradients of flattened rows in the shapes that the caller's tensors have."""
    return [x if x is None else x.view(shape) for x, shape in zip(gradients, shapes, strict=True)]


# `divergences(problem, plan, *problem.tensors)`: the fields of `RowStats`; `values` are differentiable.
divergences = _Divergences.apply
# `one_pass(problem, plan, objective, *problem.tensors)`: the loss, whose gradient is made now; each pair's; the fields.
one_pass = _OnePass.apply
# `total(values, supported, objective)`: the loss, and each pair's; `values` get the gradient.
total = _Total.apply
