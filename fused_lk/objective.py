"""The objectives: weighted sums of the divergences of a token. No weight receives a gradient.

    "tv"       1 - alpha
    "alpha"    -log alpha
    "lambda"   lam * KL(pt || q) + (1 - lam) * (1 - alpha)

All other components are terms by themselves (`rows.interface`). A mix names components and gives each a weight. The
value, and the derivatives with respect to the terms, follow from these weights. Where the loss is a number the gradient
is made of `d_values`, in either plan. Autograd differentiates `per_token` where it is not, and in graphs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rows.interface import MEASURED, TERMS

OF_ACCEPTANCE = ("tv", "alpha", "lambda")
FURTHER = tuple(name for name in TERMS if name not in MEASURED)
COMPONENTS = ("kl", *OF_ACCEPTANCE, *FURTHER)

Mix = tuple[tuple[str, float], ...]


class Objective(NamedTuple):
    """`sum_i weights_i * loss_i` over the pairs i. It is data per pair, which a walk can cut into chunks.

    Attributes:
        mix, eta, kl_scale: as in `lk_loss`.
        terms: the names of the rows of `values`.
        weights: `[P]`, what each token's loss is multiplied by.
        kl_weight: `[P]`, lambda where it is given. None: each token has its own.
    """

    mix: Mix
    terms: tuple[str, ...]
    eta: float
    kl_scale: float
    weights: Tensor
    kl_weight: Tensor | None

    def rows(self, start: int, stop: int) -> Objective:
        """The objective of pairs start:stop."""
        lam = self.kl_weight
        return self._replace(weights=self.weights[start:stop], kl_weight=None if lam is None else lam[start:stop])

    def coefficients(self, log_acceptance: Tensor) -> dict[str, float | Tensor]:
        """The weights of KL, total variation, -log alpha and the further terms: floats, or one per pair `[P]`. Those
        that are 0 are left out."""
        given: dict[str, Any] = dict(self.mix)
        of_lambda = given.pop("lambda", 0.0)
        if of_lambda:
            lam = self.kl_weight
            if lam is None:
                lam = adaptive_kl_weight(log_acceptance.exp(), self.eta, self.kl_scale)
            for name, share in (("kl", lam), ("tv", 1.0 - lam)):
                share = weighted(of_lambda, share)
                given[name] = given[name] + share if name in given else share
        return {name: weight for name, weight in given.items() if isinstance(weight, Tensor) or weight != 0}

    def per_token(self, values: Tensor, supported: Tensor) -> Tensor:
        """The loss of each token, without its weight; 0 where the target has no mass on the draft vocabulary."""
        made = []
        for name, weight in self.coefficients(values[0]).items():
            if name == "tv":
                loss = total_variation(values[0])
            else:
                loss = -values[0] if name == "alpha" else values[self.terms.index(name)]
            # Log alpha and KL are infinite where the draft excludes what the target may say. 0 * inf would be NaN.
            made.append(weighted(weight, loss))
        return torch.where(supported, sum(made[1:], made[0]), 0.0)

    def total(self, losses: Tensor) -> Tensor:
        """The loss, from those of the tokens."""
        return weighted(self.weights, losses).sum()

    def d_values(self, values: Tensor) -> Tensor:
        """`[T, P]`, the derivatives with respect to the terms. (Rows without an answer have no gradient.)"""
        of, derivatives = self.coefficients(values[0]), torch.zeros_like(values)
        if "tv" in of:
            torch.mul(values[0].exp(), -of.pop("tv"), out=derivatives[0])
        if "alpha" in of:
            derivatives[0] -= of.pop("alpha")
        for name, weight in of.items():
            row = derivatives[self.terms.index(name)]
            row.copy_(weight) if isinstance(weight, Tensor) else row.fill_(weight)
        return weighted(self.weights, derivatives)


def adaptive_kl_weight(acceptance: Tensor, eta: float, kl_scale: float) -> Tensor:
    """`lam = kl_scale * exp(-eta * stop_grad(acceptance))` (arXiv 2602.23881; kl_scale: SpecForge)."""
    return weighted(kl_scale, torch.exp(-eta * acceptance.detach()))


def total_variation(log_acceptance: Tensor) -> Tensor:
    """1 - alpha.

    expm1 keeps the digits of a value near 0. PyTorch takes its derivative as expm1 + 1, which loses the digits of a
    small alpha; so there alpha is subtracted as it is.
    """
    if not log_acceptance.requires_grad:
        return -torch.expm1(log_acceptance)
    near_one = log_acceptance > -0.5
    return torch.where(near_one, -torch.expm1(log_acceptance), 1 - log_acceptance.exp())


def weighted(weight: float | Tensor, x: Tensor) -> Tensor:
    """`weight * x`. It is 0 where the weight is 0, whatever x holds, and NaN where the weight is NaN."""
    if isinstance(weight, Tensor):
        return (weight * x).masked_fill(weight == 0, 0.0)
    return x if weight == 1 else weight * x if weight != 0 else torch.zeros_like(x)
