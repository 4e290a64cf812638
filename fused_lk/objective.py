"""The objectives, as mixes of the three divergences.

Every objective is, per token, a weighted sum with weights that receive no gradient:

    loss = kl * KL(pt || q)  +  tv * (1 - alpha)  +  nla * (-log alpha)

so its value, and its derivatives with respect to the primitive (log alpha, KL), follow from the mix alone. The
recompute plan differentiates `token_loss` by autograd, the one-pass plan asks `coefficients`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

OBJECTIVES = ("kl", "tv", "alpha", "lambda")


class Mix(NamedTuple):
    """Weights of KL, total variation and negative log acceptance: floats, or per pair `[P]`."""

    kl: float | Tensor
    tv: float | Tensor
    nla: float | Tensor


FIXED = {"kl": Mix(1.0, 0.0, 0.0), "tv": Mix(0.0, 1.0, 0.0), "alpha": Mix(0.0, 0.0, 1.0)}


def blend(kl_weight: Tensor | float) -> Mix:
    """The "lambda" objective, `lam * KL + (1 - lam) * TV`."""
    return Mix(kl_weight, 1.0 - kl_weight, 0.0)


def adaptive_kl_weight(acceptance: Tensor, eta: float, kl_scale: float) -> Tensor:
    """`lam = kl_scale * exp(-eta * stop_grad(acceptance))` (arXiv 2602.23881; kl_scale: SpecForge)."""
    return kl_scale * torch.exp(-eta * acceptance.detach())


@dataclass(frozen=True)
class MixRule:
    """The mix of each pair as a function of its own log alpha: all that the one-pass plan knows of the options.

    Attributes:
        objective, eta, kl_scale: as in `lk_loss`.
        kl_weight: `[P]`, lambda given; None: each token's own.
    """

    objective: str
    eta: float
    kl_scale: float
    kl_weight: Tensor | None

    def __call__(self, start: int, stop: int, log_acceptance: Tensor) -> Mix:
        """The mix of pairs start:stop."""
        if self.objective != "lambda":
            return FIXED[self.objective]
        if self.kl_weight is not None:
            return blend(self.kl_weight[start:stop])
        return blend(adaptive_kl_weight(log_acceptance.exp(), self.eta, self.kl_scale))


def token_loss(mix: Mix, log_acceptance: Tensor, kl: Tensor, supported: Tensor) -> Tensor:
    """The loss per token; 0 where the target has no mass on the draft vocabulary (`supported` is False)."""
    log_acceptance = torch.where(supported, log_acceptance, 0.0)
    # log alpha and KL are infinite where the draft excludes what the target may say, and 0 * inf is NaN.
    loss = weighted(mix.tv, total_variation(log_acceptance)) + weighted(mix.kl, kl) - weighted(mix.nla, log_acceptance)
    return torch.where(supported, loss, 0.0)


def total_variation(log_acceptance: Tensor) -> Tensor:
    """1 - alpha, with all its digits where alpha is near 1, and all the digits of its gradient where alpha is near 0
    (the derivative of expm1 is taken as expm1 + 1)."""
    near_one = log_acceptance > -0.5
    return torch.where(near_one, -torch.expm1(log_acceptance), 1 - log_acceptance.exp())


def weighted(weight: float | Tensor, x: Tensor) -> Tensor:
    """`weight * x`, 0 where the weight is 0, whatever x holds; NaN where the weight is."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, weight * x)
    return weight * x if weight != 0 else torch.zeros_like(x)


def coefficients(mix: Mix, log_acceptance: Tensor) -> tuple[Tensor, Tensor]:
    """`(d loss / d log alpha, d loss / d KL)` per token; rows without an answer have no gradient, whatever they are."""
    d_log_alpha = -(mix.tv * log_acceptance.exp() + mix.nla)
    return d_log_alpha, mix.kl + torch.zeros_like(d_log_alpha)
