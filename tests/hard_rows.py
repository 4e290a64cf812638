"""Rows of logits as models produce them, and as numerics break on: the one family that correctness tests draw from.

Every member gives `(z, t)`, draft and target logits `[N, V]` in float64, exactly representable in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fused_lk import reference
from fused_lk.rows.interface import tie_width

NEG_INF = float("-inf")
Member = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
FAMILY: dict[str, Member] = {}
ROOT = Path(__file__).parent


def _member(function: Member) -> Member:
    FAMILY[function.__name__] = function
    return function


def make(name: str, rows: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The member `name`, rounded to float32."""
    z, t = FAMILY[name](rows, size, torch.Generator().manual_seed(seed))
    return z.float().double(), t.float().double()


def _normal(rows: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, size, dtype=torch.float64, generator=generator)


def _spread(low: float, high: float, rows: int) -> Tensor:
    return torch.logspace(low, high, rows, 10.0, dtype=torch.float64).unsqueeze(1)


def _tops(rows: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(size, (rows, 1), generator=generator)


@_member
def normal(rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return _normal(rows, size, generator), _normal(rows, size, generator)


@_member
def temperatures(rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Temperatures from 0.1 to 50 on either side."""
    spread = _spread(-1.7, 1.0, rows)
    return _normal(rows, size, generator) * spread, _normal(rows, size, generator) * spread.flip(0)


@_member
def sure_of_the_same(rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """1 - q and 1 - p from about 1e-1 to 1e-12, each its own."""
    top = _tops(rows, size, generator)
    z, t = _normal(rows, size, generator), _normal(rows, size, generator)
    height = torch.linspace(8, 35, rows, dtype=torch.float64).unsqueeze(1)
    return z.scatter(1, top, height), t.scatter(1, top, height + _normal(rows, 1, generator))


@_member
def sure_alike(rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same, and 1 - q within 1e-2 to 1e-9 of 1 - p, relatively."""
    _, t = sure_of_the_same(rows, size, generator)
    return t + _normal(rows, size, generator) * _spread(-9, -2, rows), t


@_member
def sure_of_different_ones(rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """alpha from about 1e-1 to 1e-12."""
    height = torch.linspace(8, 35, rows, dtype=torch.float64).unsqueeze(1)
    z, t = _normal(rows, size, generator), _normal(rows, size, generator)
    top = _tops(rows, size, generator)
    return z.scatter(1, top, height), t.scatter(1, (top + 1) % size, height)


@_member
def trained(rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A draft that is its target but for 0.03 of noise, at temperatures 0.5 to 14."""
    t = _normal(rows, size, generator) * _spread(-0.3, 1.15, rows)
    return t + 0.03 * _normal(rows, size, generator), t


@_member
def near_ties(rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    t = _normal(rows, size, generator) * 3
    return t + _normal(rows, size, generator) * _spread(-7, -2, rows), t


@_member
def equal_up_to_rounding(rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    t = _normal(rows, size, generator) * _spread(-1, 1, rows)
    return t * (1 + torch.finfo(torch.float32).eps * _normal(rows, size, generator)), t


@_member
def equal(rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    t = _normal(rows, size, generator) * _spread(-1, 1, rows)
    return t, t


@_member
def two_tops(rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two tokens of exactly one half each, in draft and target."""
    top = torch.cat([_tops(rows, size // 2, generator), size // 2 + _tops(rows, size // 2, generator)], 1)
    height = torch.linspace(5, 30, rows, dtype=torch.float64).unsqueeze(1).expand(rows, 2)
    z, t = _normal(rows, size, generator), _normal(rows, size, generator)
    return z.scatter(1, top, height), t.scatter(1, top, height)


@_member
def impossible_tokens(rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Top-k targets, and a draft that some of those tokens are masked out of as well."""
    z, t = trained(rows, size, generator)
    t = t.masked_fill(torch.rand(rows, size, generator=generator) < 0.6, NEG_INF)
    return z.masked_fill((t == NEG_INF) & (torch.rand(rows, size, generator=generator) < 0.5), NEG_INF), t


@_member
def offsets(rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Common offsets up to 1e6; logits in steps of 1/16, which float32 holds there."""
    z, t = trained(rows, size, generator)
    z, t = (z * 16).round() / 16, (t * 16).round() / 16
    offset = torch.tensor([0.0, 1e4, -1e6, 1e6], dtype=torch.float64).repeat(rows)[:rows].unsqueeze(1)
    return z + offset, t + offset.flip(0)


class Truth:
    """float64 on the very numbers that a call reads: the mean loss, its gradient, and what ties leave open of it.

    Where q and p agree within rounding, min(p, q) has no derivative but an interval of them: w may be anything in
    [0, 1]. Then the gradient of log alpha may differ from any one choice by a sum over such columns u of
    delta_u r_u (1[v = u] - q_v), |delta_u| <= 1. That allows each choice, made once; it does not allow one w in sigma
    and another in the row.
    """

    def __init__(
        self, z: Tensor, log_p: Tensor, objective: str, noise: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        self.z = z.clone().requires_grad_()
        kept = reference.lk_loss(self.z, log_p, objective=objective, kl_weight=0.5 if objective == "lambda" else None)
        self.loss = kept.loss.detach()
        (self.gradient,) = torch.autograd.grad(kept.loss, self.z)
        log_q = self.z.detach().log_softmax(1)
        smaller = torch.minimum(log_q, log_p)
        finite = smaller.masked_fill(smaller == NEG_INF, 0)
        r = (finite - kept.log_acceptance.detach().unsqueeze(1)).exp().masked_fill(smaller == NEG_INF, 0)
        # log q and log p of a column carry the rounding of their distance to the top
        rounding = noise + 8 * torch.finfo(dtype).eps * (2 + finite.abs())
        width = tie_width(dtype) + rounding
        # At the draft's maximum they are told apart by their complements, which keep relative digits.
        top = log_q.argmax(1, keepdim=True)
        width.scatter_(1, top, noise + width.gather(1, top) * finite.gather(1, top).abs().clamp(max=1))
        close = (smaller != NEG_INF) & ((log_q - log_p).abs() <= width)
        self.r = torch.where(close, r, 0)
        weight = {"kl": 0.0, "tv": 1.0, "alpha": 1.0, "lambda": 0.5}[objective]
        log_alpha = kept.log_acceptance.detach()
        # |d loss / d log alpha| and |d loss / d KL| of a row, in the mean
        self.d = weight * (torch.ones_like(log_alpha) if objective == "alpha" else log_alpha.exp()) / len(z)
        self.factor = self.d + {"kl": 1.0, "lambda": 0.5}.get(objective, 0.0) / len(z)
        q = log_q.exp()
        # What other decisions in the gradient than in sigma could cost, where the draft's maximum is decided once.
        self.undecided = self.d * self.r.scatter(1, top, 0.0).sum(1)
        others = self.r.sum(1, keepdim=True) - self.r
        self.slack = self.d.unsqueeze(1) * (self.r * (1 - q) + q * others)

    def error(self, gradient: Tensor) -> Tensor:
        """By how much each element is off, beyond what ties leave open."""
        return ((gradient.double() - self.gradient).abs() - self.slack).clamp(min=0)


@functools.cache
def smollm2() -> dict[str, Tensor]:
    """A slice of a real model; see tests/data/README.md."""
    return torch.load(ROOT / "data/smollm2.pt", weights_only=True)
