"""The public losses: the primitive, the loss, and their twins for logits in hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import by_reference, call
from . import plan as plans
from .call import Call
from .engine import engine
from .metrics import Divergences, LKOutput
from .options import LossOptions
from .pairs import Pairs
from .reduction import Reduction
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
        mask: bool, integers 0 and 1, or float weights >= 0, `[...]`; rows of 0 are ignored. (Weights do not scale the
            primitive.)
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
        positions: int64 `[...]`, draft position (TTT step, 0-based) of each row; needs `num_positions` = K. Default:
            tensor k of a list is position k (`num_positions=1` takes a list as one position), and a tensor is one
            position. With `pairs`, its positions count and nothing else.
        position_decay: position k counts `position_decay ** k` (paper: 0.8); in "mean" and "sum". A single position is
            position 0, which counts 1.
        reduction: "mean" = sum_k decay^k * (weighted sum over position k) / denominator_k; "position" = these K means,
            not decayed; "sum" = "mean" without dividing; "none" = one weighted loss per token, 0 where ignored.
        denominator: instead of the position's sum of weights: a number or a tensor, scalar or `[K]`, float or integer,
            > 0 (the count of the whole batch under gradient accumulation or data parallelism). Tokens that the target
            cannot answer are in the sum of weights.
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
            by_position=True,
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
            by_position=True,
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
            return by_reference.divergences(request)
        by = engine(request)
        layout, pairs = by.layout, by.divergences()
    ids = request.target.to_target_ids(pairs.draft_argmax)
    per_pair = (pairs.log_acceptance, pairs.kl, pairs.log_acceptance.exp(), ids)
    return Divergences(*(layout.per_row(x, request.num_rows).view(request.shape) for x in per_pair))


def _loss(request: Call, options: LossOptions, requested_plan: str) -> LKOutput:
    one_pass = plans.resolve(requested_plan, options.obstacle_to_one_pass) == "one_pass" and request.needs_gradient
    with torch.autocast(request.device.type, enabled=False):
        if request.impl == "reference":
            return by_reference.loss(request, options)
        return Reduction(request, options, one_pass).run()
