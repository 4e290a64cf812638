"""From numbers per pair to the loss: weights, positions, lambda, denominators, and what is reported beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .autograd import PairResults
from .call import Call
from .engine import engine
from .metrics import LKOutput, position_sums, ratio
from .objective import FIXED, MixRule, adaptive_kl_weight, token_loss, weighted
from .options import LossOptions, per_position
from .rows.interface import accumulation_dtype
from .target_tiles import owned


class Reduction:
    """Weights, positions and denominators of one call's pairs, and the output made with them."""

    def __init__(self, request: Call, options: LossOptions, one_pass: bool) -> None:
        self.request, self.options, self.one_pass = request, options, one_pass
        wants_target_argmax = request.target.finds_argmax_in_tiles
        self.engine = engine(request, one_pass=one_pass, wants_target_argmax=wants_target_argmax)
        self.layout = layout = self.engine.layout
        self.num_positions = request.pairs.num_positions
        acc = torch.promote_types(accumulation_dtype(request.tensors[0]), request.target.dtype)
        ones = torch.ones(layout.num_pairs, dtype=acc, device=request.device)
        self.weights = ones if layout.weights is None else layout.weights.to(acc)
        self.weight_sum = self.sums(ones)
        self.kl_weight = None if options.kl_weight is None else self._given_kl_weight(options.kl_weight)

    def sums(self, x: Tensor) -> Tensor:
        """`[K]`, the weighted sums of `x` by position; ignored rows count nothing, whatever they hold."""
        return position_sums(weighted(self.weights, x), self.layout.positions, self.num_positions)

    def of_pair(self, x: Tensor) -> Tensor:
        """`x` `[K]`, per position, as `[P]`, per pair."""
        positions = self.layout.positions
        return x[0].expand(self.layout.num_pairs) if positions is None else x[positions]

    def run(self) -> LKOutput:
        if self.one_pass:
            loss, pairs = self.engine.loss_in_one_pass(self._coefficients(), self._mix_rule())
            return self._output(loss, pairs, self._kl_weights(pairs.log_acceptance))
        pairs = self.engine.divergences()
        kl_weight = self._kl_weights(pairs.log_acceptance.detach())
        per_pair = token_loss(self.options.mix(kl_weight), pairs.log_acceptance, pairs.kl, pairs.supported)
        return self._output(self._reduce(per_pair), pairs, kl_weight)

    def _given_kl_weight(self, given: float | Tensor) -> Tensor:
        """`[P]`, from a float, `[K]`, or one per token."""
        if isinstance(given, Tensor) and given.shape != (self.num_positions,) and given.shape == self.request.shape:
            checks.same_device(self.request.device, kl_weight=given)
            of_pair = self.layout.per_pair(owned(given.detach()).reshape(-1)).to(self.weights)
            return of_pair if self.layout.valid is None else torch.where(self.layout.valid, of_pair, 0)
        return self.of_pair(owned(per_position("kl_weight", given, self.num_positions, self.weights)))

    def _decay(self) -> Tensor:
        k = torch.arange(self.num_positions, dtype=self.weights.dtype, device=self.weights.device)
        return self.options.position_decay**k

    def _divide(self, x: Tensor) -> Tensor:
        """`x` `[K]` by the denominators; 0 where a denominator is."""
        given = self.options.denominator
        if given is None:
            return ratio(x, self.weight_sum)
        return ratio(x, per_position("denominator", given, self.num_positions, self.weights))

    def _coefficients(self) -> Tensor:
        """`[P]`, what each token's loss is multiplied by in the scalar loss."""
        of_position = self._decay()
        if self.options.reduction == "mean":
            of_position = self._divide(of_position)
        return self.weights * self.of_pair(of_position)

    def _mix_rule(self) -> MixRule:
        return MixRule(self.options.objective, self.options.eta, self.options.kl_scale, self.kl_weight)

    def _kl_weights(self, log_acceptance: Tensor) -> Tensor | None:
        """Lambda per pair; None for objectives that have none."""
        if self.options.objective != "lambda" or self.kl_weight is not None:
            return self.kl_weight
        acceptance = log_acceptance.exp()
        if self.options.waits_for_batch:
            acceptance = self.of_pair(ratio(self.sums(acceptance), self.weight_sum))
        return adaptive_kl_weight(acceptance, self.options.eta, self.options.kl_scale)

    def _reduce(self, per_pair: Tensor) -> Tensor:
        if self.options.reduction in ("mean", "sum"):  # a number per pair is held, not one per pair and position
            return weighted(self._coefficients(), per_pair).sum()
        if self.options.reduction == "none":
            per_row = self.layout.per_row(weighted(self.weights, per_pair), self.request.num_rows)
            return per_row.view(self.request.shape)
        return self._divide(self.sums(per_pair))

    def _output(self, loss: Tensor, pairs: PairResults, kl_weight: Tensor | None) -> LKOutput:
        layout, target = self.layout, self.request.target
        log_acceptance, kl = pairs.log_acceptance.detach(), pairs.kl.detach()
        draft_ids = target.to_target_ids(pairs.draft_argmax)
        target_ids = target.argmax_of(layout, pairs.target_argmax)
        w = self.weights
        correct = torch.full_like(w, float("nan")) if target_ids is None else (draft_ids == target_ids).to(w)
        lam = FIXED[self.options.objective].kl if kl_weight is None else kl_weight
        supervised = torch.ones_like(w, dtype=torch.bool) if layout.valid is None else layout.valid

        def per_row(x: Tensor) -> Tensor:
            return layout.per_row(x, self.request.num_rows).view(self.request.shape)

        return LKOutput(
            loss=loss,
            acceptance_sum=self.sums(log_acceptance.exp()),
            accuracy_sum=self.sums(correct),
            kl_sum=self.sums(kl),
            weight_sum=self.weight_sum,
            kl_weight=ratio(self.sums(lam + torch.zeros_like(w)), self.weight_sum),
            num_tokens=position_sums(supervised.long(), layout.positions, self.num_positions),
            num_unsupported=(supervised & ~pairs.supported).sum(),
            token_log_acceptance=per_row(log_acceptance),
            draft_token_ids=per_row(draft_ids),
            loss_is_per_position=self.options.reduction == "position",
        )
