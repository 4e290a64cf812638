"""The two autograd functions: the primitive (recompute plan), and the loss whose gradient is made in the forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import chunked, plan
from .chunked import Draft, Work
from .draft import LinearDraft, LogitsDraft, times
from .objective import Mix, coefficients, token_loss
from .rowwise import RowStats


class DraftTensors(NamedTuple):
    """How a flat list of tensors makes a draft: `num_sources` tensors, then the weight and bias of a linear one."""

    num_sources: int
    linear: bool
    logits_dtype: torch.dtype | None = None

    def build(self, tensors: Sequence[Tensor]) -> Draft:
        sources = [x.detach().reshape(-1, x.shape[-1]) for x in tensors[: self.num_sources]]
        if not self.linear:
            return LogitsDraft(sources)
        weight, *bias = (x.detach() for x in tensors[self.num_sources :])
        return LinearDraft(sources, weight, bias[0] if bias else None, self.logits_dtype)


class PairResults(NamedTuple):
    """Per pair `[P]`, in the layout's order."""

    log_acceptance: Tensor
    kl: Tensor
    target_lse: Tensor
    draft_argmax: Tensor
    target_argmax: Tensor | None


def divergences(work: Work, layout: DraftTensors, tensors: Sequence[Tensor]) -> PairResults:
    """`log_acceptance` and `kl`, differentiable in `tensors`; logits are made again in the backward."""
    return PairResults(*_Divergences.apply(work, layout, *tensors))


# The mix of pairs start:stop, from their log alpha.
MixOf = Callable[[int, int, Tensor], Mix]


def loss_in_one_pass(
    work: Work, layout: DraftTensors, tensors: Sequence[Tensor], weights: Tensor, mix_of: MixOf
) -> tuple[Tensor, PairResults]:
    """`sum_i weights_i * token_loss_i` with its gradient made in the forward; the rest is detached."""
    loss, *results = _OnePass.apply(work, layout, weights, mix_of, *tensors)
    return loss, PairResults(*results)


def near_unit_scale(*coefficients: Tensor) -> Tensor:
    """`[1]`: the power of two just above the largest finite magnitude; 1 where there is none.

    Row gradients are divided by it and their sums multiplied, both exactly, so that the weight 1/N of a mean does not
    flush a half-precision tile to zero.
    """
    if coefficients[0].numel() == 0:
        return coefficients[0].new_ones(1)
    largest = torch.stack([torch.where(x.isfinite(), x.abs(), 0).amax() for x in coefficients]).amax()
    _, exponent = torch.frexp(largest)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return torch.where(largest > 0, scale, torch.ones_like(scale)).reshape(1)


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: Work, layout: DraftTensors, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        stats = chunked.statistics(work, layout.build(tensors))
        ctx.work, ctx.layout = work, layout
        ctx.set_materialize_grads(False)
        # The target is saved only to be told of changes in place between forward and backward.
        ctx.save_for_backward(
            *tensors, stats.draft_lse, stats.target_lse, stats.log_acceptance, stats.sigma, stats.kl,
            *work.target.tiles.tensors(),
        )  # fmt: skip
        rest = (stats.target_lse, stats.draft_argmax, stats.target_argmax)
        ctx.mark_non_differentiable(*(x for x in rest if x is not None))
        return stats.log_acceptance, stats.kl, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_log_alpha: Tensor | None, d_kl: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        work, layout = ctx.work, ctx.layout
        num_tensors = len(ctx.needs_input_grad) - 2
        saved = ctx.saved_tensors
        tensors, (draft_lse, target_lse, log_alpha, sigma, kl) = saved[:num_tensors], saved[num_tensors:][:5]
        needs = ctx.needs_input_grad[2:]
        if (d_log_alpha is None and d_kl is None) or work.layout.num_pairs == 0:
            return None, None, *_zeros(tensors, needs)
        zero = torch.zeros_like(kl)
        supported = target_lse > float("-inf")
        d_log_alpha = zero if d_log_alpha is None else torch.where(supported, d_log_alpha, 0)
        d_kl = zero if d_kl is None else torch.where(supported, d_kl, 0)
        if work.layout.valid is not None:
            d_log_alpha = torch.where(work.layout.valid, d_log_alpha, 0)
            d_kl = torch.where(work.layout.valid, d_kl, 0)
        scale = near_unit_scale(d_log_alpha, d_kl)
        draft = layout.build(tensors)
        stats = RowStats(draft_lse, target_lse, log_alpha, sigma, kl, torch.empty(0))
        linear = layout.linear and needs[layout.num_sources]
        by_vocabulary = plan.walks_by_vocabulary(draft.vocab_size, work.layout.num_pairs, linear)
        walk = chunked.gradients_by_vocabulary if by_vocabulary else chunked.gradients_by_rows
        gradients = walk(work, draft, needs, stats, d_log_alpha / scale, d_kl / scale, scale)
        return None, None, *_shaped(gradients, [x.shape for x in tensors])


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, work: Work, layout: DraftTensors, weights: Tensor, mix_of: MixOf, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        scale = near_unit_scale(weights)
        near_unit = weights / scale

        def of_rows(start: int, stop: int, stats: RowStats) -> tuple[Tensor, Tensor]:
            d_log_alpha, d_kl = coefficients(mix_of(start, stop, stats.log_acceptance), stats.log_acceptance)
            c = near_unit[start:stop]
            return torch.where(c > 0, c * d_log_alpha, 0), c * d_kl

        needs = ctx.needs_input_grad[4:]
        stats, held = chunked.one_pass(work, layout.build(tensors), needs, of_rows)
        mix = mix_of(0, weights.shape[0], stats.log_acceptance)
        loss = (weights * token_loss(mix, stats.log_acceptance, stats.kl)).sum()
        ctx.like = [(x.dtype, x.shape) for x in tensors]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scale, *held)
        results = (stats.log_acceptance, stats.kl, stats.target_lse, stats.draft_argmax, stats.target_argmax)
        ctx.mark_non_differentiable(*(x for x in results if x is not None))
        return loss, *results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        scale, *held = ctx.saved_tensors
        if d_loss is None:
            return (None,) * (4 + len(held))
        scale = scale * d_loss
        gradients = [times(x, scale, dtype, in_place=False) for x, (dtype, _) in zip(held, ctx.like, strict=True)]
        return None, None, None, None, *_shaped(gradients, [shape for _, shape in ctx.like])


def _shaped(gradients: Sequence[Tensor | None], shapes: Sequence[torch.Size]) -> tuple[Tensor | None, ...]:
    """Gradients of flattened rows in the shapes that the caller's tensors have."""
    return tuple(x if x is None else x.view(shape) for x, shape in zip(gradients, shapes, strict=True))


def _zeros(tensors: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(torch.zeros_like(x) if need else None for x, need in zip(tensors, needs, strict=True))
