"""The functions of `specforge.core.lk_loss`, by name and signature, for logits in hand.

They need no SpecForge. They differ from the originals in two cases, which those get wrong. Disjoint distributions have
a finite gradient here, because log alpha is taken in log space. The original `where(alpha > 0, log(alpha), 0)` gives
NaN there, because it also differentiates the branch that it does not take. Rows outside the mask never reach a sum,
whatever they hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ... import Divergences, Target, checks, lk_divergences_from_logits

# It sums a numerator and a denominator over ranks, and is called with the keywords local_correct and local_denom.
Reduce = Callable[..., tuple[Tensor, Tensor]]

LK_LOSS_TYPES = ("alpha", "lambda")


def expected_acceptance_rate(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """Return `sum_v min(p_v, q_v)` of each row: `[..., V]` probabilities give `[...]`.

    Raises:
        ValueError: the two shapes differ.
    """
    checks.shape("draft_probs", draft_probs, tuple(target_probs.shape), "the shape of target_probs")
    return torch.minimum(target_probs, draft_probs).sum(dim=-1)


def compute_acceptance_rate(
    *,
    logits: Tensor,
    target_probs: Tensor,
    position_mask: Tensor,
    eps: float = 1e-8,
    reduce_fn: Reduce | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the means of alpha and of log alpha over the tokens, weighted by `position_mask`.

    Args:
        logits: `[..., V]`, the draft's.
        target_probs: `[..., V]`, the target's on the draft vocabulary; they sum to at most 1, and get no gradient.
        position_mask: `[..., 1]` weights; rows of 0 are ignored.
        eps: lower bound of the mask's sum.
        reduce_fn: sums numerator and denominator over ranks.

    Returns:
        Two scalars in float32 (float64 for float64 inputs), differentiable in `logits`. A row whose target has no
        mass on the draft vocabulary counts 0 in both, and has no gradient.
    """
    supervised = position_mask.squeeze(-1) != 0
    divergences = lk_divergences_from_logits(logits, Target.from_probs(target_probs.detach()), mask=supervised)
    return acceptance_means(divergences, position_mask, eps, reduce_fn)


def compute_lk_loss(
    *,
    kl_loss: Tensor,
    acceptance_rate: Tensor,
    log_acceptance_rate: Tensor,
    lk_loss_type: str,
    kl_scale: float,
    kl_decay: float,
) -> Tensor:
    """Return `-log_acceptance_rate` for "alpha", `w * kl_loss + (1 - w) * (1 - acceptance_rate)` for "lambda".

    One weight `w = kl_scale * exp(-kl_decay * stop_grad(acceptance_rate))` serves the whole batch. `kl_scale` and
    `kl_decay` may be any numbers; where `w` is above 1, the second term changes sign.

    Raises:
        ValueError: `lk_loss_type` is neither of the two.
    """
    checks.choice("lk_loss_type", lk_loss_type, LK_LOSS_TYPES)
    if lk_loss_type == "alpha":
        return -log_acceptance_rate
    weight = kl_scale * torch.exp(-kl_decay * acceptance_rate.detach())
    return weight * kl_loss + (1 - weight) * (1 - acceptance_rate)


def acceptance_means(
    divergences: Divergences, position_mask: Tensor, eps: float = 1e-8, reduce_fn: Reduce | None = None
) -> tuple[Tensor, Tensor]:
    """Return the means of alpha and of log alpha, as `compute_acceptance_rate` gives them."""
    log_acceptance = divergences.log_acceptance
    log_acceptance = torch.where(log_acceptance > float("-inf"), log_acceptance, 0)
    weights = position_mask.squeeze(-1).to(log_acceptance.dtype)

    def mean(x: Tensor) -> Tensor:
        numerator, denominator = (x * weights).sum(), weights.sum().clamp_min(eps)
        if reduce_fn is not None:
            numerator, denominator = reduce_fn(local_correct=numerator, local_denom=denominator)
            denominator = denominator.clamp_min(eps)
        return numerator / denominator

    return mean(divergences.acceptance), mean(log_acceptance)
