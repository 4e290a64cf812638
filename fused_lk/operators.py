"""The losses as operators of a graph: what `torch.compile` sees in place of the functions of `autograd`.

    fused_lk::row_divergences   the primitive, and all that its gradient needs, per draft row
    fused_lk::row_gradients     its gradient; logits are made again
    fused_lk::one_pass_loss     the loss, and its gradient as it waits for the upstream one

Shapes in a graph may depend on shapes alone. So everything here is per draft row, `[N]`, 0 where a row is ignored:
the operators compact the rows inside, at one host synchronisation each, and spread the results out again. The rest of
the loss, sums over `[N]`-sized tensors, is traced as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, chunked, target_tiles
from .autograd import DraftTensors, PairResults
from .call import Call
from .chunked import Work
from .layout import Layout
from .objective import MixRule
from .opaque import opaque
from .pairs import Pairs
from .rows.interface import NUM_SAVED, Normalizer, RowStats, accumulation_dtype
from .target import Target

_CALL = (
    "Tensor[] draft, int num_sources, bool linear, ScalarType? logits_dtype, float draft_temperature, Tensor[] target, "
    "str target_kind, float target_temperature, Tensor? normalizer, bool normalizer_is_mass, "
    "float normalizer_rounding, bool wants_target_argmax, Tensor? valid, Tensor? target_rows, bool skip_masked, "
    "str impl, int? budget"
)


class FlatCall(NamedTuple):
    """A `Call` as operators take it: the arguments that all three begin with."""

    draft: Sequence[Tensor]  # sources [R, H or V], then weight and bias of a linear draft
    num_sources: int
    linear: bool
    logits_dtype: torch.dtype | None
    draft_temperature: float
    target: Sequence[Tensor]
    target_kind: str
    target_temperature: float
    normalizer: Tensor | None
    normalizer_is_mass: bool
    normalizer_rounding: float
    wants_target_argmax: bool
    valid: Tensor | None
    target_rows: Tensor | None
    skip_masked: bool
    impl: str
    budget: int | None

    @classmethod
    def of(cls, call: Call, layout: Layout, wants_target_argmax: bool, saves: bool) -> FlatCall:
        """`saves`: whether a backward will read these tensors."""
        sources = [x.reshape(-1, x.shape[-1]) for x in call.tensors[: call.draft.num_sources]]
        target = call.target
        tiles = (target.owned() if saves else target).tiles
        normalizer = target.walk_normalizer()
        return cls(
            [*sources, *call.tensors[call.draft.num_sources :]], *call.draft, call.draft_temperature,
            list(tiles.tensors()), tiles.kind, target.temperature,
            None if normalizer is None else normalizer.value, normalizer is not None and normalizer.is_mass,
            0.0 if normalizer is None else normalizer.rounding, wants_target_argmax,
            layout.valid, layout.target_rows, call.pairs.skip_masked, call.impl, call.budget,
        )  # fmt: skip

    @property
    def layout(self) -> DraftTensors:
        return DraftTensors(self.num_sources, self.linear, self.logits_dtype)

    @property
    def num_rows(self) -> int:
        return sum(x.shape[0] for x in self.draft[: self.num_sources])

    def work(self, needs_weight: bool, *, in_one_pass: bool = False) -> Work:
        vocab_size = self.draft[self.num_sources].shape[0] if self.linear else self.draft[0].shape[1]
        tiles = target_tiles.rebuild(self.target_kind, self.target, vocab_size)
        target = Target(tiles, (tiles.num_rows,), None, self.target_temperature)
        if self.normalizer is not None:
            target._normalizer = Normalizer(self.normalizer, self.normalizer_is_mass, self.normalizer_rounding)
        pairs = Pairs(self.valid, self.target_rows, skip_masked=self.skip_masked)
        pairs.check_target(self.num_rows, tiles.num_rows, None)
        shape, temperature = (self.num_rows,), self.draft_temperature
        call = Call(tuple(self.draft), self.layout, shape, target, pairs, self.impl, temperature, self.budget)
        return call.work(needs_weight, in_one_pass=in_one_pass, wants_target_argmax=self.wants_target_argmax)

    def empty_stats(self) -> list[Tensor]:
        """Unwritten results per row, for tracing."""
        like = self.draft[0]
        acc = torch.promote_types(accumulation_dtype(like), accumulation_dtype(self.target[0]))
        stats = RowStats.empty(self.num_rows, acc, like.device, self.wants_target_argmax)
        return [x for x in stats if x is not None]


class Traced:
    """An `engine` whose pairs are all the draft rows."""

    def __init__(self, call: Call, one_pass: bool, wants_target_argmax: bool) -> None:
        self.call = call
        self.layout = call.pairs.row_layout(call.num_rows, call.device)
        self.flat = FlatCall.of(call, self.layout, wants_target_argmax, saves=call.needs_gradient and not one_pass)

    def divergences(self) -> PairResults:
        return PairResults.of(RowStats(*row_divergences(*self.flat)))

    def loss_in_one_pass(self, weights: Tensor, rule: MixRule) -> tuple[Tensor, PairResults]:
        needs = [x.requires_grad for x in self.call.tensors]
        loss, stats, _, _ = one_pass_loss(
            *self.flat, weights, rule.objective, rule.eta, rule.kl_scale, rule.kl_weight, needs
        )
        return loss, PairResults.of(RowStats(*stats))


@opaque(f"({_CALL}) -> Tensor[]")
def row_divergences(*arguments: Any) -> list[Tensor]:
    """`RowStats` as a list, per draft row."""
    flat = FlatCall(*arguments)
    work = flat.work(needs_weight=False)
    return _per_row(work.layout, chunked.statistics(work, flat.layout.build(flat.draft)), flat.num_rows)


@row_divergences.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return FlatCall(*arguments).empty_stats()


@opaque(f"({_CALL}, Tensor[] saved, Tensor d_log_acceptance, Tensor d_kl, bool[] needs) -> Tensor[]")
def row_gradients(*arguments: Any) -> list[Tensor]:
    """The gradients of the draft's tensors that `needs` names; `saved` are the statistics of that name."""
    *call, saved, d_log_acceptance, d_kl, needs = arguments
    flat = FlatCall(*call)
    needs_weight = flat.linear and needs[flat.num_sources]
    work = flat.work(needs_weight)
    stats = RowStats.of_saved(tuple(work.layout.per_pair(x) for x in saved))
    d_log_acceptance, d_kl = (work.layout.per_pair(x) for x in (d_log_acceptance, d_kl))
    gradients = autograd.divergence_gradients(work, flat.layout, flat.draft, needs, stats, d_log_acceptance, d_kl)
    return [x for x in gradients if x is not None]


@row_gradients.register_fake
def _(*arguments: Any) -> list[Tensor]:
    draft, needs = arguments[0], arguments[-1]
    return [x.new_empty(x.shape) for x, need in zip(draft, needs, strict=True) if need]


@opaque(
    f"({_CALL}, Tensor weights, str objective, float eta, float kl_scale, Tensor? kl_weight, bool[] needs) "
    "-> (Tensor, Tensor[], Tensor, Tensor[])"
)
def one_pass_loss(*arguments: Any) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """`(loss, RowStats as a list per draft row, scale, held)`, the last without those that are not needed."""
    *call, weights, objective, eta, kl_scale, kl_weight, needs = arguments
    flat = FlatCall(*call)
    work = flat.work(flat.linear and needs[flat.num_sources], in_one_pass=True)
    of_pair = work.layout.per_pair
    rule = MixRule(objective, eta, kl_scale, None if kl_weight is None else of_pair(kl_weight))
    made = autograd.one_pass(work, flat.layout, flat.draft, needs, of_pair(weights), rule)
    stats = _per_row(work.layout, made.stats, flat.num_rows)
    return made.loss, stats, made.scale, [x for x in made.held if x is not None]


@one_pass_loss.register_fake
def _(*arguments: Any) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    flat, weights, needs = FlatCall(*arguments[: len(FlatCall._fields)]), arguments[-6], arguments[-1]
    stats = flat.empty_stats()
    held = []
    for i, (x, need) in enumerate(zip(flat.draft, needs, strict=True)):
        wide = i >= flat.num_sources and x.dtype == torch.float16
        if need:
            held.append(x.new_empty(x.shape, dtype=torch.float32 if wide else x.dtype))
    return weights.new_empty(()), stats, weights.new_empty(1), held


def _per_row(layout: Layout, stats: RowStats, num_rows: int) -> list[Tensor]:
    """The statistics of every draft row: tensors of their own, as an operator's results must be.

    Rows that are kept for shape have theirs, which tell the backward that they have no answer; others are 0.
    """
    return [x if layout.valid is not None else layout.per_row(x, num_rows) for x in stats if x is not None]


def _save_divergences(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    flat = FlatCall(*inputs)
    differentiable = [RowStats._fields.index(name) for name in ("log_acceptance", "kl")]
    ctx.mark_non_differentiable(*(x for i, x in enumerate(output) if i not in differentiable))
    ctx.save_for_backward(*flat.draft, *flat.target, flat.valid, flat.target_rows, *output[:NUM_SAVED])
    ctx.num_draft, ctx.num_target = len(flat.draft), len(flat.target)
    ctx.flat = flat._replace(draft=(), target=(), normalizer=None, valid=None, target_rows=None)


def _divergences_backward(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    draft, saved = saved[: ctx.num_draft], saved[ctx.num_draft :]
    target, (valid, target_rows, *stats) = saved[: ctx.num_target], saved[ctx.num_target :]
    flat = ctx.flat._replace(draft=draft, target=target, valid=valid, target_rows=target_rows)
    needs = list(ctx.needs_input_grad[0])
    d_log_acceptance, d_kl = (gradients[RowStats._fields.index(name)] for name in ("log_acceptance", "kl"))
    made = row_gradients.operator(*flat, stats, d_log_acceptance, d_kl, needs)
    return _to_inputs(made, needs, flat.target, len(FlatCall._fields))


def _save_one_pass(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, stats, scale, held = output
    draft = inputs[0]
    ctx.mark_non_differentiable(*stats, scale, *held)
    ctx.save_for_backward(scale, *held)
    ctx.needs, ctx.num_inputs, ctx.num_target = inputs[-1], len(inputs), len(inputs[5])
    ctx.like = [(x.dtype, x.shape) for x, need in zip(draft, ctx.needs, strict=True) if need]


def _one_pass_backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    scale, *held = ctx.saved_tensors
    made = autograd.release(held, scale, d_loss, ctx.like)
    return _to_inputs(made, ctx.needs, [None] * ctx.num_target, ctx.num_inputs)


def _to_inputs(
    made: Sequence[Tensor | None], needs: Sequence[bool], target: Sequence[Any], num: int
) -> tuple[Any, ...]:
    """Gradients in the structure of an operator's `num` inputs, two of which are lists of tensors."""
    of_needed = iter(made)
    result: list[Any] = [None] * num
    result[0] = [next(of_needed) if need else None for need in needs]
    result[FlatCall._fields.index("target")] = [None] * len(target)
    return tuple(result)


row_divergences.register_autograd(_divergences_backward, setup_context=_save_divergences)
one_pass_loss.register_autograd(_one_pass_backward, setup_context=_save_one_pass)
