"""The public losses: the primitive, the loss, and the same two for logits that the caller holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import by_reference, checks
from . import reduction as by_walks
from .output import Divergences, LKOutput
from .pairs.pairs import Pairs
from .reduction import LossOptions
from .targets.target import Target
from .walk import problem
from .walk.problem import Problem


def lk_divergences(
    draft_hidden: Tensor | Sequence[Tensor],
    draft_lm_head_weight: Tensor,
    target: Target,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor | Sequence[Tensor], Tensor] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    draft_temperature: float = 1.0,
    mask: Tensor | None = None,
    pairs: Pairs | None = None,
    impl: str = "auto",
    workspace_mb: float | str = "auto",
    keep_mb: float | str = 0,
    logits_dtype: str | torch.dtype = "compute",
    terms: Sequence[str] = (),
    labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    top1: bool = False,
) -> Divergences:
    """The log acceptance rate and the KL divergence of each token: the primitive of every LK objective.

    Full logits never exist.

        q = softmax(f(h W^T) / draft_temperature)   p = the target on the draft vocabulary
        log_acceptance = log sum_v min(p_v, q_v)    kl = KL(pt || q),  pt = p renormalised

    Args:
        draft_hidden: `[..., H]` in fp16, bf16, fp32 or fp64. A list of such tensors, all of one shape and one per TTT
            step, counts as their stack `[K, ..., H]`; it is read in place.
        draft_lm_head_weight: `[V_draft, H]`, of the same dtype. Under `torch.autocast` both are cast, as by `F.linear`.
        target: what the draft is scored against; see `Target`.
        bias: optional `[V_draft]`.
        low_rank: optional `(u, M)`: the logits are `h W^T + bias + u M^T`. `u` is `[..., r]`, given as the hidden
            states are (a list if they are one), and `M` `[V_draft, r]`, both of their dtype. This is the bias of low
            rank, from the previous token, of DSpark's Markov heads and of Domino. It is never made for all tokens.
        logit_scale, softcap: what the model does to the logits z of its head, both > 0. They become `logit_scale * z`,
            and with a softcap `softcap * tanh(logit_scale * z / softcap)`. A target has its own, in its `TargetHead`.
        draft_temperature: > 0; it divides the draft's logits, after that.
        mask: bool, integers 0 and 1, or float weights >= 0, of shape `[...]`. Rows of 0 are ignored. (Weights do not
            scale the primitive.)
        pairs: a `Pairs`, instead of `mask`. It says which draft row is scored against which row of the flattened
            target, and at which draft position. Without it, row i is scored against row i.
        impl: "auto" (Triton on a GPU, PyTorch elsewhere), "triton", "torch", or "reference" (the oracle: eager code
            with full logits). A choice by name never falls back.
        workspace_mb: a bound in MiB on the logits held at any time, of draft and target together.
        keep_mb: a bound in MiB on the logits, of draft and of a target from hidden states, that the forward keeps for
            the backward beyond this. What does not fit is made again there. If all fits, that saves a draft product
            and a target product; `explain` tells what each MiB saves. "auto" keeps as much as the workspace holds, and
            0 nothing. Where the gradients are made in the forward, nothing is kept.
        logits_dtype: "compute" rounds the draft's logits to the dtype of the hidden states, as eager code does.
            `torch.float32` keeps the float32 results of the matrix product. `Target.from_hidden` has the same option
            for the target's logits: near alpha = 1, rounding on either side spoils the gradient.
        terms: further divergences to compute in the same pass, by name; results are in `terms` of what is returned.
            Names and formulas: `help(fused_lk.rows.interface)`, and docs/semantics.md.
        labels: integers `[...]`, the target ids that "ce" asks for. A negative one (-100), or one that the draft
            vocabulary lacks (or, with `restrict_draft`, the target's list), asks for nothing: 0 and no gradient.
            Without `labels` they are the target's argmax on the draft vocabulary.
        jsd_beta: in (0, 1), the share b of pt in the mixture m = b pt + (1 - b) q of those terms that have one.
        top1: whether to return the largest probability of each side, and the target's argmax, from the same pass.

    Returns:
        `Divergences`, in the draft's shape without its last dimension, in fp32 (fp64 for fp64 inputs). Gradients reach
        `draft_hidden`, `draft_lm_head_weight`, `bias` and both of `low_rank` where these require one. They never reach
        the target.

    Raises:
        TypeError, ValueError: the input does not fit. The message says what was expected, what came, and the remedy.

    Source: arXiv 2602.23881.
    """
    how = (mask, pairs, draft_temperature, impl, workspace_mb, (terms,), labels, jsd_beta, logit_scale, softcap)
    of_draft, top1 = (draft_hidden, draft_lm_head_weight, bias), checks.flag("top1", top1)
    asked = problem.linear(*of_draft, target, logits_dtype, *how, second=low_rank, scores=top1, keep_mb=keep_mb)
    return _by(asked).divergences(asked, top1)


def lk_divergences_from_logits(
    draft_logits: Tensor | Sequence[Tensor],
    target: Target,
    *,
    draft_temperature: float = 1.0,
    mask: Tensor | None = None,
    pairs: Pairs | None = None,
    impl: str = "auto",
    workspace_mb: float | str = "auto",
    keep_mb: float | str = 0,
    terms: Sequence[str] = (),
    labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    top1: bool = False,
) -> Divergences:
    """`lk_divergences` of logits `[..., V_draft]` that the caller holds.

    They are those that the softmax sees, with any scale or softcap of the head applied.

    The logits exist already, so this function cannot avoid them. It avoids the softmaxes that eager code makes of them.
    The gradient has the size and dtype of the logits. The logits themselves are never written.
    """
    how = (mask, pairs, draft_temperature, impl, workspace_mb, (terms,), labels, jsd_beta)
    top1 = checks.flag("top1", top1)
    return _by(asked := problem.from_logits(draft_logits, target, *how, scores=top1, keep_mb=keep_mb)).divergences(
        asked, top1
    )


def lk_loss(
    draft_hidden: Tensor | Sequence[Tensor],
    draft_lm_head_weight: Tensor,
    target: Target,
    *,
    objective: str | Mapping[str, float] | Callable[[Divergences], Tensor] = "lambda",
    eta: float = 3.0,
    kl_scale: float = 1.0,
    lambda_per: str = "position",
    kl_weight: float | Tensor | None = None,
    mask: Tensor | None = None,
    pairs: Pairs | None = None,
    position_decay: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    group: Any = None,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor | Sequence[Tensor], Tensor] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    draft_temperature: float = 1.0,
    impl: str = "auto",
    plan: str = "auto",
    workspace_mb: float | str = "auto",
    keep_mb: float | str = 0,
    logits_dtype: str | torch.dtype = "compute",
    terms: Sequence[str] = (),
    labels: Tensor | None = None,
    jsd_beta: float = 0.5,
) -> LKOutput:
    """The LK loss of a draft model, and its gradient. Full logits never exist.

        objective   loss of a token
        "kl"        KL(pt || q)
        "tv"        1 - alpha
        "alpha"     -log alpha
        "lambda"    lam * KL(pt || q) + (1 - lam) * (1 - alpha),  lam = kl_scale * exp(-eta * stop_grad(a))

    and each of the `terms` of `lk_divergences`. A dictionary `{name: weight}` of these is the weighted sum of such
    losses, in one pass. A function is called with the `Divergences`, and returns the loss of each token in the draft's
    shape; the divergences have in `terms` what `terms=` names.

    Here alpha = sum_v min(p_v, q_v). `a` is the mean alpha of all supervised tokens of the same draft position
    (`lambda_per="position"`, the paper), or the alpha of the token itself (`lambda_per="token"`, vLLM speculators).

    Args (beyond those of `lk_divergences`):
        eta: >= 0; how fast lambda decays as acceptance grows.
        kl_scale: >= 0; lambda at acceptance 0. A value above 1 gives a warning.
        kl_weight: lambda itself, >= 0, instead of the formula: a float, `[num_positions]`, or one per token in the
            draft's shape. (A shape that could be both counts as `[num_positions]`.) It receives no gradient.
        mask: weights count in the loss, in the mean acceptance for lambda, and in the metrics.
        pairs: they carry the draft positions 0..K-1. Without `pairs` a list has one position per tensor, and a tensor
            has a single one.
        position_decay: position k counts `position_decay ** k` (paper: 0.8), in the reductions "mean" and "sum".
        reduction: "mean" = sum_k decay^k * (weighted sum over position k) / denominator_k. "position" = these K means,
            without decay. "sum" = "mean" without the division. "none" = one weighted loss per token, 0 where ignored.
        denominator: replaces each position's sum of weights: a number, or a tensor (a scalar or `[K]`; float or
            integer), > 0. For a micro-batch it is the sum of `Pairs.weight_sum` over the whole batch; there a position
            without tokens has 0. (0 for a position with tokens gives NaN.) Tokens that the target cannot answer are
            part of the sum of weights.
        group: a `torch.distributed.ProcessGroup` over which the batch is spread, None for this process alone. The
            default denominators, lambda's mean acceptance, and the sums in the output are then those of all its ranks.
            The loss is this rank's share times the number of ranks, so that its *mean* over the ranks is the loss of
            the whole batch. DDP and FSDP take the mean of gradients, which makes them the whole batch's. (Divide the
            loss by the number of ranks where you sum gradients yourself. reduction="none" is not multiplied.) Every
            rank has to make the call, with the same options and number of positions. Its batch may be empty. The call
            does two all-reduces of K-sized tensors; three where lambda waits for the acceptance.
        plan: "one_pass" makes the gradients in the forward, with 3 draft GEMMs, and holds them until the backward.
            "recompute" makes the logits again in the backward, with 4. "auto" takes one pass wherever it can serve.

    Returns:
        `LKOutput`; gradients flow from `loss` alone. Without a supervised token the loss is 0, with zero gradients.

    Raises:
        TypeError, ValueError: the input does not fit, or the `plan` cannot serve the request.

    Sources: arXiv 2602.23881; `kl_scale`: SpecForge PR 492; per-token lambda: vLLM speculators.
    """
    options = LossOptions(
        objective, eta, kl_scale, lambda_per, kl_weight, position_decay, reduction, denominator, group
    )
    of_terms = ((options.terms, terms), labels, jsd_beta)
    how = (mask, pairs, draft_temperature, impl, workspace_mb, *of_terms, logit_scale, softcap)
    of_draft = (draft_hidden, draft_lm_head_weight, bias)
    asked = problem.linear(*of_draft, target, logits_dtype, *how, second=low_rank, scores=True, keep_mb=keep_mb)
    return _by(asked).loss(asked, options, plan)


def lk_loss_from_logits(
    draft_logits: Tensor | Sequence[Tensor],
    target: Target,
    *,
    objective: str | Mapping[str, float] | Callable[[Divergences], Tensor] = "lambda",
    eta: float = 3.0,
    kl_scale: float = 1.0,
    lambda_per: str = "position",
    kl_weight: float | Tensor | None = None,
    mask: Tensor | None = None,
    pairs: Pairs | None = None,
    position_decay: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    group: Any = None,
    draft_temperature: float = 1.0,
    impl: str = "auto",
    plan: str = "auto",
    workspace_mb: float | str = "auto",
    keep_mb: float | str = 0,
    terms: Sequence[str] = (),
    labels: Tensor | None = None,
    jsd_beta: float = 0.5,
) -> LKOutput:
    """`lk_loss` of logits `[..., V_draft]` that the caller holds; see `lk_divergences_from_logits`."""
    options = LossOptions(
        objective, eta, kl_scale, lambda_per, kl_weight, position_decay, reduction, denominator, group
    )
    how = (mask, pairs, draft_temperature, impl, workspace_mb, (options.terms, terms), labels, jsd_beta)
    asked = problem.from_logits(draft_logits, target, *how, scores=True, keep_mb=keep_mb)
    return _by(asked).loss(asked, options, plan)


def _by(asked: Problem) -> ModuleType:
    """Who answers: the oracle, or the walks."""
    return by_reference if asked.impl == "reference" else by_walks
