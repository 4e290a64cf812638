"""The two autograd functions: the primitive (recompute plan), and the loss whose gradient is made in the forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import chunked, plan
from .chunked import Draft, Work
from .draft import LinearDraft, LogitsDraft, times
from .objective import MixRule, coefficients, token_loss, weighted
from .rows.interface import NUM_SAVED, RowStats
from .target_tiles import owned


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
    supported: Tensor
    draft_argmax: Tensor
    target_argmax: Tensor | None

    @classmethod
    def of(cls, stats: RowStats) -> PairResults:
        return cls(stats.log_acceptance, stats.kl, stats.supported, stats.draft_argmax, stats.target_argmax)


def divergences(work: Work, layout: DraftTensors, tensors: Sequence[Tensor]) -> PairResults:
    """`log_acceptance` and `kl`, differentiable in `tensors`; logits are made again in the backward."""
    return PairResults(*_Divergences.apply(work, layout, *tensors))


def loss_in_one_pass(
    work: Work, layout: DraftTensors, tensors: Sequence[Tensor], weights: Tensor, mix_of: MixRule
) -> tuple[Tensor, PairResults]:
    """`sum_i weights_i * token_loss_i` with its gradient made in the forward; the rest is detached."""
    loss, *results = _OnePass.apply(work, layout, weights, mix_of, *tensors)
    return loss, PairResults(*results)


def divergence_gradients(
    work: Work,
    layout: DraftTensors,
    tensors: Sequence[Tensor],
    needs: Sequence[bool],
    stats: RowStats,
    d_log_alpha: Tensor | None,
    d_kl: Tensor | None,
) -> list[Tensor | None]:
    """Gradients of `sum d_log_alpha * log alpha + d_kl * KL`, in the tensors' shapes; None where not needed."""
    if (d_log_alpha is None and d_kl is None) or work.layout.num_pairs == 0:
        return [torch.zeros_like(x) if need else None for x, need in zip(tensors, needs, strict=True)]
    supported = stats.supported
    zero = torch.zeros_like(stats.log_acceptance)
    d_log_alpha = zero if d_log_alpha is None else torch.where(supported, d_log_alpha, 0)
    d_kl = zero if d_kl is None else torch.where(supported, d_kl, 0)
    scale = near_unit_scale(d_log_alpha, d_kl)
    draft = layout.build(tensors)
    needs_weight = layout.linear and needs[layout.num_sources]
    arguments = (needs, stats, d_log_alpha / scale, d_kl / scale, scale)
    with torch.autocast(stats.log_acceptance.device.type, enabled=False):  # wherever the caller runs its backward
        if isinstance(draft, LinearDraft) and plan.walks_by_vocabulary(
            draft.vocab_size, work.layout.num_pairs, needs_weight
        ):
            gradients = chunked.gradients_by_vocabulary(work, draft, *arguments)
        else:
            gradients = chunked.gradients_by_rows(work, draft, *arguments)
    return _shaped(gradients, [x.shape for x in tensors])


class OnePass(NamedTuple):
    """What one pass over the logits gives: the loss, and its gradients as they wait for the upstream one.

    Attributes:
        scale: `[1]`, what `held` is to be multiplied by, beside the upstream gradient.
        held: of `(*sources, weight[, bias])`, rows flattened; None where not needed.
    """

    loss: Tensor
    stats: RowStats
    scale: Tensor
    held: list[Tensor | None]


def one_pass(
    work: Work, layout: DraftTensors, tensors: Sequence[Tensor], needs: Sequence[bool], weights: Tensor, mix_of: MixRule
) -> OnePass:
    """`sum_i weights_i * token_loss_i` and its gradients, near unit scale."""
    scale = near_unit_scale(weights)
    near_unit = weights / scale

    def of_rows(start: int, stop: int, stats: RowStats) -> tuple[Tensor, Tensor]:
        d_log_alpha, d_kl = coefficients(mix_of(start, stop, stats.log_acceptance), stats.log_acceptance)
        c = near_unit[start:stop]
        return weighted(c, d_log_alpha), weighted(c, d_kl)

    stats, held = chunked.one_pass(work, layout.build(tensors), needs, of_rows)
    mix = mix_of(0, weights.shape[0], stats.log_acceptance)
    loss = weighted(weights, token_loss(mix, stats.log_acceptance, stats.kl, stats.supported)).sum()
    return OnePass(loss, stats, scale, held)


def release(
    held: Sequence[Tensor | None], scale: Tensor, d_loss: Tensor, like: Sequence[tuple[torch.dtype, torch.Size]]
) -> list[Tensor | None]:
    """What one pass held, times its scale and the upstream gradient, in the dtypes and shapes of `like`."""
    scale = scale * d_loss
    gradients = [
        None if x is None else times(x, scale, dtype, in_place=False) for x, (dtype, _) in zip(held, like, strict=True)
    ]
    return _shaped(gradients, [shape for _, shape in like])


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
        ctx.set_materialize_grads(False)
        needs_backward = any(ctx.needs_input_grad)
        if needs_backward:
            work = work.owned()
        stats = chunked.statistics(work, layout.build(tensors))
        if needs_backward:
            ctx.work, ctx.layout = work, layout
            # The target is saved to be told of changes in place between forward and backward.
            ctx.save_for_backward(*(owned(x) for x in tensors), *stats.saved(), *work.target.tiles.tensors())
        results = PairResults.of(stats)
        ctx.mark_non_differentiable(*(x for x in results[2:] if x is not None))
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_log_alpha: Tensor | None, d_kl: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        saved = ctx.saved_tensors  # once: under activation checkpointing each look unpacks anew
        tensors, stats = saved[: len(needs)], RowStats.of_saved(saved[len(needs) :][:NUM_SAVED])
        gradients = divergence_gradients(ctx.work, ctx.layout, tensors, needs, stats, d_log_alpha, d_kl)
        return None, None, *gradients


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, work: Work, layout: DraftTensors, weights: Tensor, mix_of: MixRule, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        made = one_pass(work, layout, tensors, ctx.needs_input_grad[4:], weights, mix_of)
        ctx.like = [(x.dtype, x.shape) for x in tensors]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(made.scale, *made.held)
        results = PairResults.of(made.stats)
        ctx.mark_non_differentiable(*(x for x in results if x is not None))
        return made.loss, *results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        scale, *held = ctx.saved_tensors
        gradients = [None] * len(held) if d_loss is None else release(held, scale, d_loss, ctx.like)
        return None, None, None, None, *gradients


def _shaped(gradients: Sequence[Tensor | None], shapes: Sequence[torch.Size]) -> list[Tensor | None]:
    """Gradients of flattened rows in the shapes that the caller's tensors have."""
    return [x if x is None else x.view(shape) for x, shape in zip(gradients, shapes, strict=True)]
