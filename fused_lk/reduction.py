"""From numbers per pair to the loss and its metrics: weights, lambda, positions and denominators."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import checks, ranks
from .graph import autograd, operators
from .objective import COMPONENTS, FURTHER, Mix, Objective, adaptive_kl_weight, weighted
from .output import Divergences, LKOutput, block_sums
from .pairs.layout import Layout, position_sums, ratio
from .rows.interface import RowStats
from .targets.tiles import owned
from .walk.plan import resolve
from .walk.problem import Problem

LAMBDA_PER = ("position", "token")
REDUCTIONS = ("mean", "position", "sum", "none")


@dataclass(frozen=True)
class LossOptions:
    """What is minimised, and how tokens are reduced. `fused_lk.lk_loss` documents each option.

    Raises:
        TypeError, ValueError: an unknown name, a number out of range, or a tensor of the wrong dtype or with an entry
            out of range. (Tensors on a device are read with FUSED_LK_VALIDATE=1 only, because that synchronises.)
    """

    objective: str | Mapping[str, float] | Callable[[Divergences], Tensor] = "lambda"
    eta: float = 3.0
    kl_scale: float = 1.0
    lambda_per: str = "position"
    kl_weight: float | Tensor | None = None
    position_decay: float = 1.0
    reduction: str = "mean"
    denominator: float | Tensor | None = None
    group: Any = None

    def __post_init__(self) -> None:
        self._keep("objective", _checked(self.objective))
        checks.choice("lambda_per", self.lambda_per, LAMBDA_PER)
        checks.choice("reduction", self.reduction, REDUCTIONS)
        for name in ("eta", "position_decay", "kl_scale"):
            self._keep(name, checks.number(name, getattr(self, name), minimum=0))
        if self.kl_scale > 1:
            warnings.warn(
                f"kl_scale={self.kl_scale:g} can make lambda exceed 1, where the TV term changes sign and acceptance "
                "is pushed down; use kl_scale <= 1.",
                stacklevel=4,
            )
        if isinstance(self.kl_weight, Tensor):
            checks.tensor("kl_weight", self.kl_weight, dtypes=checks.FLOATS)
            checks.non_negative("kl_weight", self.kl_weight)
        elif self.kl_weight is not None:
            self._keep("kl_weight", checks.number("kl_weight", self.kl_weight, minimum=0))
        # A count of 0 would silently make the loss 0. Only a position without tokens may have one.
        if isinstance(self.denominator, Tensor):
            checks.tensor("denominator", self.denominator, dtypes=(*checks.FLOATS, *checks.INTEGERS))
            if self.denominator.ndim:
                checks.non_negative("denominator", self.denominator)
            else:
                checks.positive(
                    "denominator", self.denominator, "For a count that may be 0 use denominator.clamp(min=1)."
                )
        elif self.denominator is not None:
            remedy = "For a count that may be 0 use max(denominator, 1)."
            self._keep("denominator", checks.number("denominator", self.denominator, above=0, remedy=remedy))
        if self.kl_weight is not None and not self.has_lambda:
            checks.fail(
                'kl_weight with objective="lambda" only', f"objective={self.objective!r}", "Leave kl_weight out."
            )
        if self.group is not None:
            ranks.check(self.group)

    def _keep(self, name: str, value: Any) -> None:
        """Store a Python number in place of a NumPy one, which operators of a graph refuse."""
        object.__setattr__(self, name, value)

    @property
    def mix(self) -> Mix:
        """The components and their weights; none where a callable makes the loss."""
        if callable(self.objective):
            return ()
        return ((self.objective, 1.0),) if isinstance(self.objective, str) else tuple(self.objective.items())

    @property
    def terms(self) -> tuple[str, ...]:
        """What is computed beyond the terms of every call."""
        return tuple(name for name, _ in self.mix if name in FURTHER)

    @property
    def has_lambda(self) -> bool:
        return dict(self.mix).get("lambda", 0.0) != 0

    @property
    def waits_for_batch(self) -> bool:
        """Whether a token's loss depends on other tokens' acceptance."""
        return self.has_lambda and self.kl_weight is None and self.lambda_per == "position"

    @property
    def obstacle_to_one_pass(self) -> str | None:
        """Why the gradients cannot be made in the forward; None where they can."""
        if callable(self.objective):
            return "an objective that is a function (its derivatives are known only when it was called)"
        if self.waits_for_batch:
            return 'lambda_per="position" without kl_weight (lambda is known only when all tokens are)'
        if self.reduction in ("position", "none"):
            return f'reduction="{self.reduction}" (the upstream gradient of each element is not known in the forward)'
        return None


def _checked(objective: Any) -> Any:
    """`objective`: a name, a function, or a dictionary of components with their weights as floats."""
    if callable(objective):
        return objective
    if not isinstance(objective, Mapping):
        checks.choice("objective", objective, COMPONENTS)
        return objective
    for name in objective:
        checks.choice("objective's components", name, COMPONENTS)
    weights = {name: checks.number(f"objective[{name!r}]", x, minimum=0) for name, x in objective.items()}
    if not any(weights.values()):
        remedy = 'Give at least one component a weight above 0: {"ce": 0.1, "l1": 0.9}.'
        checks.fail("objective with a positive weight", objective, remedy)
    return weights


def loss(problem: Problem, options: LossOptions, requested_plan: str) -> LKOutput:
    """See `fused_lk.lk_loss`."""
    one_pass = resolve(requested_plan, options.obstacle_to_one_pass)[0] and any(problem.needs)
    run = operators if torch.compiler.is_compiling() else autograd
    with torch.autocast(problem.device.type, enabled=False):
        plan, layout = run.prepare(problem, one_pass)
        if one_pass:
            tokens = _Tokens(problem, options, layout)
            objective = tokens.objective(tokens.given_kl_weight())
            total, tokens.losses, *results = run.one_pass(problem, plan, objective, *problem.tensors)
            return tokens.output(total, RowStats(*results), objective)
        stats = RowStats(*run.divergences(problem, plan, *problem.tensors))
        tokens = _Tokens(problem, options, layout)
        waits = options.waits_for_batch
        objective = tokens.objective(tokens.mean_kl_weight(stats) if waits else tokens.given_kl_weight())
        return tokens.output(tokens.reduce(stats, objective), stats, objective)


def divergences(problem: Problem, top1: bool) -> Divergences:
    """See `fused_lk.lk_divergences`."""
    run = operators if torch.compiler.is_compiling() else autograd
    with torch.autocast(problem.device.type, enabled=False):
        plan, layout = run.prepare(problem, False)
        stats = RowStats(*run.divergences(problem, plan, *problem.tensors))
        return _divergences(problem, layout, stats, top1)


def _divergences(problem: Problem, layout: Layout, stats: RowStats, top1: bool = False) -> Divergences:
    def per_row(x: Tensor) -> Tensor:
        return layout.per_row(x, problem.num_rows).view(problem.shape)

    log_acceptance, kl, *further = stats.values
    acceptance, ids = per_row(log_acceptance.exp()), per_row(problem.target.to_target_ids(stats.draft_argmax))
    terms = {name: per_row(x) for name, x in zip(problem.further_terms, further, strict=True)}
    tops: tuple[Tensor, ...] = ()
    if top1:
        target_top1 = torch.where(stats.supported(), (stats.log_mass - stats.target_log_total).exp(), 0)
        tops = (stats.draft_log_total.neg().exp(), target_top1, _target_ids(problem, layout, stats))
    return Divergences(per_row(log_acceptance), per_row(kl), acceptance, ids, terms, *map(per_row, tops))


def _target_ids(problem: Problem, layout: Layout, stats: RowStats) -> Tensor:
    """`[P]`, the target's argmax as target ids, -1 where it is not known."""
    target = problem.target
    if target.known_ids is not None:
        return layout.of_target(target.known_ids)
    if target.finds_argmax and stats.target_argmax is not None:
        return target.to_target_ids(stats.target_argmax)
    return torch.full_like(stats.draft_argmax, -1)


def losses_of(made: Any, shape: tuple[int, ...]) -> Tensor:
    """What a caller's objective returned, if it is the loss of each token."""
    checks.tensor("what objective returns", made, dtypes=checks.FLOATS)
    checks.shape("what objective returns", made, shape, "the loss of each token, in the draft's shape")
    return made


class _Tokens:
    """Weights, lambda and denominators of the pairs of one call."""

    def __init__(self, problem: Problem, options: LossOptions, layout: Layout) -> None:
        self.problem, self.options, self.layout = problem, options, layout
        self.num_positions = problem.pairs.num_positions
        self.losses: Tensor | None = None  # of each pair, once they are made
        if layout.weights is None:
            self.weights = torch.ones(layout.num_pairs, dtype=problem.accumulator, device=problem.device)
        else:
            self.weights = layout.weights.to(problem.accumulator)
        self.own_weight_sum = position_sums(self.weights, layout.positions, self.num_positions)
        self.weight_sum = self.of_all_ranks(self.own_weight_sum)

    def of_all_ranks(self, x: Tensor) -> Tensor:
        """`x`, summed over the ranks of the group. Every rank comes here, whatever its batch holds."""
        return x if self.options.group is None else ranks.summed(self.options.group, x)[0]

    def sums(self, x: Tensor) -> Tensor:
        """`[..., K]`, the weighted sums of `x` `[..., P]` by position. Ignored rows count nothing, whatever they
        hold."""
        x = x if self.layout.weights is None else weighted(self.weights, x)  # without weights all pairs count alike
        return position_sums(x, self.layout.positions, self.num_positions)

    def of_pair(self, x: Tensor) -> Tensor:
        """`x` `[K]`, per position, as `[P]`, per pair."""
        positions = self.layout.positions
        return x[0].expand(self.layout.num_pairs) if positions is None else x[positions]

    def per_row(self, x: Tensor) -> Tensor:
        """`x` `[P]`, per pair, in the draft's shape."""
        return self.layout.per_row(x, self.problem.num_rows).view(self.problem.shape)

    def given_kl_weight(self) -> Tensor | None:
        """Lambda `[P]`, made of a float, of `[K]`, or of one per token; None where it is not given."""
        given, layout = self.options.kl_weight, self.layout
        if given is None:
            return None
        if isinstance(given, Tensor) and given.shape != (self.num_positions,) and given.shape == self.problem.shape:
            checks.same_device(self.problem.device, kl_weight=given)
            of_pair = layout.per_pair(owned(given.detach()).reshape(-1)).to(self.weights)
            return of_pair if layout.valid is None else torch.where(layout.valid, of_pair, 0)
        return self.of_pair(owned(_per_position("kl_weight", given, self.num_positions, self.weights)))

    def mean_kl_weight(self, stats: RowStats) -> Tensor:
        """Lambda `[P]`, from the mean acceptance of each position."""
        acceptance = ratio(self.of_all_ranks(self.sums(stats.values[0].detach().exp())), self.weight_sum)
        return self.of_pair(adaptive_kl_weight(acceptance, self.options.eta, self.options.kl_scale))

    def divide(self, x: Tensor) -> Tensor:
        """`x` `[K]` divided by the denominators; 0 where nothing is supervised, NaN where a given one denies that."""
        given = self.options.denominator
        if given is None:
            return ratio(x, self.weight_sum)
        whole = _per_position("denominator", given, self.num_positions, self.weights)
        return torch.where((whole == 0) & (self.weight_sum > 0), float("nan"), ratio(x, whole))

    def share(self, x: Tensor) -> Tensor:
        """`x` times the number of ranks: the mean over ranks of such shares is the whole."""
        return x if self.options.group is None else x * ranks.size(self.options.group)

    def objective(self, kl_weight: Tensor | None) -> Objective:
        """The scalar loss. A token's loss is multiplied by its weight and its position's decay, and divided."""
        options = self.options
        of_position = self.weights.new_ones(self.num_positions)
        if options.position_decay != 1:
            k = torch.arange(self.num_positions, dtype=self.weights.dtype, device=self.weights.device)
            of_position = options.position_decay**k
        if options.reduction == "mean":
            of_position = self.divide(of_position)
        weights = self.of_pair(self.share(of_position))
        if self.layout.weights is not None:
            weights = self.weights * weights
        terms = self.problem.terms
        return Objective(options.mix, terms, options.eta, options.kl_scale, weights, kl_weight)

    def reduce(self, stats: RowStats, objective: Objective) -> Tensor:
        is_number = self.options.reduction in ("mean", "sum")
        if is_number and not callable(self.options.objective):
            run = operators if torch.compiler.is_compiling() else autograd
            loss, self.losses = run.total(stats.values, stats.supported(), objective)
            return loss
        per_pair = self.per_token(stats, objective)
        if is_number:  # holds a number per pair, not one per pair and position
            return objective.total(per_pair)
        if self.options.reduction == "none":
            return self.per_row(weighted(self.weights, per_pair))
        return self.share(self.divide(self.sums(per_pair)))

    def per_token(self, stats: RowStats, objective: Objective) -> Tensor:
        """The loss of each pair, without its weight; 0 where the target has no answer."""
        if self.losses is None:
            function = self.options.objective
            if callable(function):
                made = losses_of(function(_divergences(self.problem, self.layout, stats)), self.problem.shape)
                per_pair = self.layout.per_pair(made.reshape(-1)).to(self.weights.dtype)
                self.losses = torch.where(stats.supported(), per_pair, 0.0)
            else:
                self.losses = objective.per_token(stats.values, stats.supported())
        return self.losses

    def output(self, loss: Tensor, stats: RowStats, objective: Objective) -> LKOutput:
        layout, target, w = self.layout, self.problem.target, self.weights
        log_acceptance, kl, *further = stats.values.detach()
        acceptance = log_acceptance.exp()
        draft_ids = target.to_target_ids(stats.draft_argmax)
        if target.known_ids is None and not self.problem.scores_argmax:
            correct = torch.full_like(w, float("nan"))
        else:
            correct = (draft_ids == _target_ids(self.problem, layout, stats)).to(w)
        supervised = torch.ones_like(w, dtype=torch.bool) if layout.valid is None else layout.valid
        lam = objective.coefficients(log_acceptance).get("kl", 0.0)
        lam = lam if isinstance(lam, Tensor) else torch.full_like(w, lam)
        losses = self.per_token(stats, objective).detach()
        acceptance_sum, accuracy_sum, kl_sum, loss_sum, kl_weight_sum, *of_terms = self.sums(
            torch.stack([acceptance, correct, kl, losses, lam, *further])
        )
        token_acceptance = self.per_row(acceptance)
        out = LKOutput(
            loss=loss,
            acceptance_sum=acceptance_sum,
            accuracy_sum=accuracy_sum,
            kl_sum=kl_sum,
            term_sums=dict(zip(self.problem.further_terms, of_terms, strict=True)),
            loss_sum=loss_sum,
            kl_weight_sum=kl_weight_sum,
            weight_sum=self.own_weight_sum,
            num_tokens=position_sums(supervised, layout.positions, self.num_positions),
            num_unsupported=(supervised & ~stats.supported()).sum(),
            **block_sums(token_acceptance, self.per_row(correct), self.per_row(supervised), self.problem.pairs),
            position_decay=self.options.position_decay,
            token_log_acceptance=self.per_row(log_acceptance),
            token_acceptance=token_acceptance,
            draft_token_ids=self.per_row(draft_ids),
        )
        return out if self.options.group is None else out.all_reduced(self.options.group)


def _per_position(name: str, value: float | Tensor, num_positions: int, like: Tensor) -> Tensor:
    """A float or a `[num_positions]` tensor as the latter, in `like`'s dtype and device.

    Raises:
        ValueError: a tensor of another shape, or on another device.
    """
    if not isinstance(value, Tensor):
        return torch.full((num_positions,), float(value), dtype=like.dtype, device=like.device)
    value = value.detach()
    if value.ndim == 0:
        return value.to(like).expand(num_positions)
    checks.shape(name, value, (num_positions,), "one per position")
    checks.same_device(like.device, **{name: value})
    return value.to(like.dtype)
