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
NEG_INF = float("-inf")


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


def token_loss(mix: Mix, log_acceptance: Tensor, kl: Tensor) -> Tensor:
    """The loss per token; 0 where the target has no mass on the draft vocabulary."""
    supported = log_acceptance > NEG_INF
    log_acceptance = torch.where(supported, log_acceptance, 0.0)
    loss = mix.tv * -torch.expm1(log_acceptance) - mix.nla * log_acceptance
    if isinstance(mix.kl, Tensor) or mix.kl != 0:  # KL is infinite where the draft excludes what the target may say
        loss = loss + mix.kl * kl
    return torch.where(supported, loss, 0.0)


def coefficients(mix: Mix, log_acceptance: Tensor) -> tuple[Tensor, Tensor]:
    """`(d loss / d log alpha, d loss / d KL)` per token; 0 where `token_loss` is."""
    supported = log_acceptance > NEG_INF
    d_log_alpha = torch.where(supported, -(mix.tv * log_acceptance.exp() + mix.nla), 0.0)
    return d_log_alpha, torch.where(supported, mix.kl, torch.zeros_like(d_log_alpha))
