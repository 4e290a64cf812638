"""The objectives, as mixes of divergences with the weights of each token.

The loss of a token is a weighted sum. Its weights receive no gradient:

    loss = kl * KL(pt || q)  +  tv * (1 - alpha)  +  nla * (-log alpha)

The value, and the derivatives with respect to log alpha and KL, follow from these three weights. In the recompute plan
autograd differentiates `per_token`. The one-pass plan asks for `d_values`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Mix(NamedTuple):
    """The weights of KL, of total variation and of -log alpha: floats, or one per pair `[P]`."""

    kl: float | Tensor
    tv: float | Tensor
    nla: float | Tensor


MIXES = {"kl": Mix(1.0, 0.0, 0.0), "tv": Mix(0.0, 1.0, 0.0), "alpha": Mix(0.0, 0.0, 1.0)}
OBJECTIVES = (*MIXES, "lambda")


class Objective(NamedTuple):
    """`sum_i weights_i * loss_i` over the pairs i. It is data per pair, which a walk can cut into chunks.

    Attributes:
        name, eta, kl_scale: as in `lk_loss`.
        weights: `[P]`, what each token's loss is multiplied by.
        kl_weight: `[P]`, lambda where it is given. None: each token has its own.
    """

    name: str
    eta: float
    kl_scale: float
    weights: Tensor
    kl_weight: Tensor | None

    def rows(self, start: int, stop: int) -> Objective:
        """The objective of pairs start:stop."""
        lam = self.kl_weight
        return self._replace(weights=self.weights[start:stop], kl_weight=None if lam is None else lam[start:stop])

    def mix(self, log_acceptance: Tensor) -> Mix:
        """The mix of each pair. The objective "lambda" is lam * KL + (1 - lam) * TV."""
        if self.name != "lambda":
            return MIXES[self.name]
        lam = self.kl_weight
        if lam is None:
            lam = adaptive_kl_weight(log_acceptance.exp(), self.eta, self.kl_scale)
        return Mix(lam, 1.0 - lam, 0.0)

    def per_token(self, values: Tensor, supported: Tensor) -> Tensor:
        """The loss of each token, without its weight; 0 where the target has no mass on the draft vocabulary."""
        log_acceptance, kl = values
        log_acceptance = torch.where(supported, log_acceptance, 0.0)
        mix = self.mix(log_acceptance)
        # log alpha and KL are infinite where the draft excludes what the target may say. There 0 * inf would be NaN.
        loss = weighted(mix.tv, total_variation(log_acceptance)) + weighted(mix.kl, kl)
        return torch.where(supported, loss - weighted(mix.nla, log_acceptance), 0.0)

    def total(self, values: Tensor, supported: Tensor) -> Tensor:
        return weighted(self.weights, self.per_token(values, supported)).sum()

    def d_values(self, values: Tensor) -> Tensor:
        """`[2, P]`, the derivatives with respect to log alpha and KL. (Rows without an answer have no gradient.)"""
        log_acceptance = values[0]
        mix = self.mix(log_acceptance)
        d_log_acceptance = -(mix.tv * log_acceptance.exp() + mix.nla)
        d_kl = mix.kl + torch.zeros_like(log_acceptance)
        return weighted(self.weights, torch.stack([d_log_acceptance, d_kl]))


def adaptive_kl_weight(acceptance: Tensor, eta: float, kl_scale: float) -> Tensor:
    """`lam = kl_scale * exp(-eta * stop_grad(acceptance))` (arXiv 2602.23881; kl_scale: SpecForge)."""
    return kl_scale * torch.exp(-eta * acceptance.detach())


def total_variation(log_acceptance: Tensor) -> Tensor:
    """1 - alpha.

    expm1 keeps the digits of a value near 0. PyTorch takes its derivative as expm1 + 1, which loses the digits of a
    small alpha; so there alpha is subtracted as it is.
    """
    near_one = log_acceptance > -0.5
    return torch.where(near_one, -torch.expm1(log_acceptance), 1 - log_acceptance.exp())


def weighted(weight: float | Tensor, x: Tensor) -> Tensor:
    """`weight * x`. It is 0 where the weight is 0, whatever x holds, and NaN where the weight is NaN."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, weight * x)
    return weight * x if weight != 0 else torch.zeros_like(x)
