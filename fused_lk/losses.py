"""The public losses: from a validated call to sums and means over tokens.

The primitive, two differentiable numbers per token, comes from `autograd`; everything here is arithmetic on
`[tokens]`-sized tensors around it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import call, reference, validation
from . import plan as plans
from .autograd import PairResults
from .call import Call
from .engine import engine
from .metrics import Divergences, LKOutput, position_sums, ratio
from .objective import FIXED, NEG_INF, MixRule, adaptive_kl_weight, token_loss
from .options import LossOptions, per_position
from .pairs import Pairs
from .target import Target


def lk_divergences(
    draft_hidden: Tensor | Sequence[Tensor],
    draft_lm_head_weight: Tensor,
    target: Target,
    *,
    bias: Tensor | None = None,
    draft_temperature: float = 1.0,
    mask: Tensor | None = None,
    target_rows: Tensor | None = None,
    pairs: Pairs | None = None,
    skip_masked: bool = True,
    impl: str = "auto",
    workspace_mb: float | str = "auto",
    logits_dtype: str | torch.dtype = "compute",
) -> Divergences:
    """Log acceptance rate and KL of each token, the primitive of every LK objective, without full logits.

        q = softmax(h W^T / draft_temperature)      p = the target on the draft vocabulary
        log_acceptance = log sum_v min(p_v, q_v)    kl = KL(pt || q),  pt = p renormalised

    Args:
        draft_hidden: `[..., H]` fp16, bf16, fp32 or fp64; or a list of such tensors of one shape, one per TTT step,
            which counts as their stack `[K, ..., H]` but is read in place.
        draft_lm_head_weight: `[V_draft, H]`, of that dtype (under `torch.autocast` both are cast, as by `F.linear`).
        target: what the draft is scored against; see `Target`.
        bias: optional `[V_draft]`.
        draft_temperature: > 0, divides the draft's logits.
        mask: bool, or weights >= 0, `[...]`; rows of 0 are ignored. (Weights do not scale the primitive.)
        target_rows: int64 `[...]`, row of the flattened target for each draft row; -1 ignores. Default: row i.
        pairs: a `Pairs` instead of `mask` and `target_rows`, to build it once.
        skip_masked: False keeps ignored rows in the matrix products, and spares the host synchronisation.
        impl: "auto" (Triton on a GPU, else PyTorch), "triton", "torch", or "reference" (eager, full logits: the
            oracle). A named choice never falls back.
        workspace_mb: bound in MiB on the logits held at any time, draft's and target's together.
        logits_dtype: "compute" rounds the draft's logits to the hidden states' dtype, as eager code does;
            `torch.float32` keeps the matrix product's own float32. `Target.from_hidden` has it for the target's:
            near alpha = 1 either rounding alone spoils the gradient.

    Returns:
        `Divergences`, each of the draft's shape without its last dimension, fp32 (fp64 for fp64 inputs). Gradients
        reach `draft_hidden`, `draft_lm_head_weight` and `bias` (those that require one), never the target.

    Raises:
        TypeError, ValueError: input that does not fit; the message says what was expected, what came, and the remedy.

    Source: arXiv 2602.23881.
    """
    return _divergences(
        call.linear(
            draft_hidden,
            draft_lm_head_weight,
            bias,
            target,
            logits_dtype,
            mask=mask,
            target_rows=target_rows,
            pairs=pairs,
            skip_masked=skip_masked,
            draft_temperature=draft_temperature,
            impl=impl,
            workspace_mb=workspace_mb,
        )
    )


def lk_divergences_from_logits(
    draft_logits: Tensor | Sequence[Tensor],
    target: Target,
    *,
    draft_temperature: float = 1.0,
    mask: Tensor | None = None,
    target_rows: Tensor | None = None,
    pairs: Pairs | None = None,
    skip_masked: bool = True,
    impl: str = "auto",
    workspace_mb: float | str = "auto",
) -> Divergences:
    """`lk_divergences` of logits in hand, `[..., V_draft]`: what is saved are the softmaxes, not the logits.

    The gradient has the logits' size and dtype; the logits themselves are never written.
    """
    return _divergences(
        call.from_logits(
            draft_logits,
            target,
            mask=mask,
            target_rows=target_rows,
            pairs=pairs,
            skip_masked=skip_masked,
            draft_temperature=draft_temperature,
            impl=impl,
            workspace_mb=workspace_mb,
        )
    )


def lk_loss(
    draft_hidden: Tensor | Sequence[Tensor],
    draft_lm_head_weight: Tensor,
    target: Target,
    *,
    objective: str = "lambda",
    eta: float = 3.0,
    kl_scale: float = 1.0,
    lambda_per: str = "position",
    kl_weight: float | Tensor | None = None,
    mask: Tensor | None = None,
    target_rows: Tensor | None = None,
    positions: Tensor | None = None,
    num_positions: int | None = None,
    pairs: Pairs | None = None,
    skip_masked: bool = True,
    position_decay: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    bias: Tensor | None = None,
    draft_temperature: float = 1.0,
    impl: str = "auto",
    plan: str = "auto",
    workspace_mb: float | str = "auto",
    logits_dtype: str | torch.dtype = "compute",
) -> LKOutput:
    """The LK loss of a draft model, and its gradient, without full logits.

        objective   loss of a token
        "kl"        KL(pt || q)
        "tv"        1 - alpha
        "alpha"     -log alpha
        "lambda"    lam * KL(pt || q) + (1 - lam) * (1 - alpha),  lam = kl_scale * exp(-eta * stop_grad(a))

    where alpha = sum_v min(p_v, q_v), and `a` is alpha averaged over all supervised tokens of the same draft position
    (`lambda_per="position"`, the paper) or the token's own (`lambda_per="token"`, vLLM speculators).

    Args (beyond those of `lk_divergences`):
        eta: >= 0, decay of lambda with acceptance. kl_scale: >= 0, its value at acceptance 0; above 1 warns.
        kl_weight: lambda itself, >= 0, instead of the formula: a float, `[num_positions]`, or one per token of the
            draft's shape (a shape that is both counts as `[num_positions]`). It receives no gradient.
        mask: weights enter the loss, lambda's mean acceptance, and the metrics alike.
        positions: int64 `[...]`, draft position (TTT step, 0-based) of each row; needs `num_positions` = K.
        position_decay: position k counts `position_decay ** k` (paper: 0.8); in "mean" and "sum".
        reduction: "mean" = sum_k decay^k * (weighted sum over position k) / denominator_k; "position" = these K means,
            not decayed; "sum" = "mean" without dividing; "none" = one weighted loss per token, 0 where ignored.
        denominator: instead of the position's sum of weights: a float or `[K]`, > 0 (the count of the whole batch under
            gradient accumulation or data parallelism). Tokens that the target cannot answer are in the sum of weights.
        plan: "one_pass" makes gradients in the forward (3 draft GEMMs; holds them until the backward), "recompute"
            makes logits again in the backward (4), "auto" takes one pass wherever it can serve.

    Returns:
        `LKOutput`; gradients flow from `loss` alone. Nothing supervised gives 0, with zero gradients.

    Raises:
        TypeError, ValueError: input that does not fit, or a `plan` that cannot serve the request.

    Sources: arXiv 2602.23881; `kl_scale`: SpecForge PR 492; per-token lambda: vLLM speculators.
    """
    options = LossOptions(objective, eta, kl_scale, lambda_per, kl_weight, position_decay, reduction, denominator)
    return _loss(
        call.linear(
            draft_hidden,
            draft_lm_head_weight,
            bias,
            target,
            logits_dtype,
            mask=mask,
            target_rows=target_rows,
            positions=positions,
            num_positions=num_positions,
            pairs=pairs,
            skip_masked=skip_masked,
            draft_temperature=draft_temperature,
            impl=impl,
            workspace_mb=workspace_mb,
        ),
        options,
        plan,
    )


def lk_loss_from_logits(
    draft_logits: Tensor | Sequence[Tensor],
    target: Target,
    *,
    objective: str = "lambda",
    eta: float = 3.0,
    kl_scale: float = 1.0,
    lambda_per: str = "position",
    kl_weight: float | Tensor | None = None,
    mask: Tensor | None = None,
    target_rows: Tensor | None = None,
    positions: Tensor | None = None,
    num_positions: int | None = None,
    pairs: Pairs | None = None,
    skip_masked: bool = True,
    position_decay: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    draft_temperature: float = 1.0,
    impl: str = "auto",
    plan: str = "auto",
    workspace_mb: float | str = "auto",
) -> LKOutput:
    """`lk_loss` of logits in hand, `[..., V_draft]`: what is saved are the softmaxes, not the logits.

    The gradient has the logits' size and dtype; the logits themselves are never written.
    """
    options = LossOptions(objective, eta, kl_scale, lambda_per, kl_weight, position_decay, reduction, denominator)
    return _loss(
        call.from_logits(
            draft_logits,
            target,
            mask=mask,
            target_rows=target_rows,
            positions=positions,
            num_positions=num_positions,
            pairs=pairs,
            skip_masked=skip_masked,
            draft_temperature=draft_temperature,
            impl=impl,
            workspace_mb=workspace_mb,
        ),
        options,
        plan,
    )


def _divergences(request: Call) -> Divergences:
    with torch.autocast(request.device.type, enabled=False):
        if request.impl == "reference":
            return _reference_divergences(request)
        by = engine(request)
        layout, pairs = by.layout, by.divergences()
    ids = request.target.to_target_ids(pairs.draft_argmax)
    per_pair = (pairs.log_acceptance, pairs.kl, pairs.log_acceptance.exp(), ids)
    return Divergences(*(layout.per_row(x, request.num_rows).view(request.shape) for x in per_pair))


def _loss(request: Call, options: LossOptions, requested_plan: str) -> LKOutput:
    one_pass = plans.resolve(requested_plan, options.obstacle_to_one_pass) == "one_pass" and request.needs_gradient
    with torch.autocast(request.device.type, enabled=False):
        if request.impl == "reference":
            return _reference_loss(request, options)
        return _Reduction(request, options, one_pass).run()


class _Reduction:
    """Weights, positions and denominators of one call's pairs, and the output made with them."""

    def __init__(self, request: Call, options: LossOptions, one_pass: bool) -> None:
        self.request, self.options, self.one_pass = request, options, one_pass
        wants_target_argmax = request.target.finds_argmax_in_tiles
        self.engine = engine(request, one_pass=one_pass, wants_target_argmax=wants_target_argmax)
        self.layout = layout = self.engine.layout
        self.num_positions = request.pairs.num_positions
        acc = torch.promote_types(torch.promote_types(request.tensors[0].dtype, torch.float32), request.target.dtype)
        ones = torch.ones(layout.num_pairs, dtype=acc, device=request.device)
        self.weights = ones if layout.weights is None else layout.weights.to(acc)
        self.weight_sum = self.sums(self.weights)
        self.kl_weight = None if options.kl_weight is None else self._given_kl_weight(options.kl_weight)

    def sums(self, x: Tensor) -> Tensor:
        return position_sums(x, self.layout.positions, self.num_positions)

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
        per_pair = token_loss(self.options.mix(kl_weight), pairs.log_acceptance, pairs.kl)
        return self._output(self._reduce(per_pair), pairs, kl_weight)

    def _given_kl_weight(self, given: float | Tensor) -> Tensor:
        """`[P]`, from a float, `[K]`, or one per token."""
        if isinstance(given, Tensor) and given.shape != (self.num_positions,) and given.shape == self.request.shape:
            validation.same_device(self.request.device, kl_weight=given)
            of_pair = self.layout.per_pair(given.detach().reshape(-1)).to(self.weights)
            return of_pair if self.layout.valid is None else torch.where(self.layout.valid, of_pair, 0)
        return self.of_pair(per_position("kl_weight", given, self.num_positions, self.weights))

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
            acceptance = self.of_pair(ratio(self.sums(self.weights * acceptance), self.weight_sum))
        return adaptive_kl_weight(acceptance, self.options.eta, self.options.kl_scale)

    def _reduce(self, per_pair: Tensor) -> Tensor:
        if self.options.reduction in ("mean", "sum"):  # a number per pair is held, not one per pair and position
            return (self._coefficients() * per_pair).sum()
        weighted = self.weights * per_pair
        if self.options.reduction == "none":
            return self.layout.per_row(weighted, self.request.num_rows).view(self.request.shape)
        return self._divide(self.sums(weighted))

    def _output(self, loss: Tensor, pairs: PairResults, kl_weight: Tensor | None) -> LKOutput:
        layout, target = self.layout, self.request.target
        log_acceptance, kl = pairs.log_acceptance.detach(), pairs.kl.detach()
        draft_ids = target.to_target_ids(pairs.draft_argmax)
        target_ids = target.argmax_of(layout, pairs.target_argmax)
        w = self.weights
        correct = torch.full_like(w, float("nan")) if target_ids is None else w * (draft_ids == target_ids)
        lam = FIXED[self.options.objective].kl if kl_weight is None else kl_weight
        supervised = torch.ones_like(w, dtype=torch.bool) if layout.valid is None else layout.valid

        def per_row(x: Tensor) -> Tensor:
            return layout.per_row(x, self.request.num_rows).view(self.request.shape)

        return LKOutput(
            loss=loss,
            acceptance_sum=self.sums(w * log_acceptance.exp()),
            accuracy_sum=self.sums(correct),
            kl_sum=self.sums(w * kl),
            weight_sum=self.weight_sum,
            kl_weight=ratio(self.sums(w * lam), self.weight_sum),
            num_tokens=self.sums(supervised.long()),
            num_unsupported=(supervised & (log_acceptance == NEG_INF)).sum(),
            token_log_acceptance=per_row(log_acceptance),
            draft_token_ids=per_row(draft_ids),
            loss_is_per_position=self.options.reduction == "position",
        )


def _reference_divergences(request: Call) -> Divergences:
    rows = _ReferenceRows(request)
    log_acceptance, kl = reference.masked_divergences(
        rows.draft_logits, rows.log_p, rows.weights > 0, request.draft_temperature
    )
    acceptance = torch.where(rows.weights > 0, log_acceptance.exp(), 0)
    return Divergences(*(x.view(request.shape) for x in (log_acceptance, kl, acceptance, rows.draft_ids)))


def _reference_loss(request: Call, options: LossOptions) -> LKOutput:
    rows, target, num_positions = _ReferenceRows(request), request.target, request.pairs.num_positions
    kl_weight = options.kl_weight
    if isinstance(kl_weight, Tensor) and kl_weight.shape != (num_positions,) and kl_weight.shape == request.shape:
        kl_weight = kl_weight.reshape(-1)
    out = reference.lk_loss(
        rows.draft_logits,
        rows.log_p,
        objective=options.objective,
        eta=options.eta,
        kl_scale=options.kl_scale,
        lambda_per=options.lambda_per,
        kl_weight=kl_weight,
        weights=rows.weights,
        positions=rows.positions,
        num_positions=num_positions,
        position_decay=options.position_decay,
        reduction=options.reduction,
        denominator=options.denominator,
        draft_temperature=request.draft_temperature,
    )
    target_ids = target.token_ids
    if target_ids is None:
        correct = torch.full_like(rows.weights, float("nan"))
    else:
        correct = rows.weights * (rows.draft_ids == target_ids.reshape(-1)[rows.target_rows])
    return LKOutput(
        loss=out.loss.view(request.shape) if options.reduction == "none" else out.loss,
        acceptance_sum=out.acceptance_sum,
        accuracy_sum=position_sums(correct, rows.positions, num_positions),
        kl_sum=out.kl_sum,
        weight_sum=out.weight_sum,
        kl_weight=out.kl_weight,
        num_tokens=out.num_tokens,
        num_unsupported=out.num_unsupported,
        token_log_acceptance=out.log_acceptance.detach().view(request.shape),
        draft_token_ids=rows.draft_ids.view(request.shape),
        loss_is_per_position=options.reduction == "position",
    )


class _ReferenceRows:
    """One call for the oracle: full logits, one row per draft row."""

    def __init__(self, request: Call) -> None:
        draft, target = request.draft, request.target
        rows = [x.reshape(-1, x.shape[-1]) for x in request.tensors[: draft.num_sources]]
        self.draft_logits = reference.promote(torch.cat(rows))
        if draft.linear:
            weight, *bias = (reference.promote(x) for x in request.tensors[draft.num_sources :])
            self.draft_logits = F.linear(self.draft_logits, weight, *bias)
        self.weights, self.target_rows, self.positions = request.pairs.dense(request.num_rows, request.device)
        acc = torch.promote_types(self.draft_logits.dtype, target.dtype)
        self.weights = self.weights.to(torch.promote_types(acc, torch.float32))
        self.log_p = target.dense_log_probs()[self.target_rows]
        self.draft_ids = torch.where(self.weights > 0, target.to_target_ids(self.draft_logits.argmax(-1)), 0)
