"""Rows of logits as models produce them, and as numerics break on: the one family that correctness tests draw from.

Every member gives `(z, t)`, draft and target logits `[N, V]` in float64, exactly representable in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

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
    z, t = sure_of_the_same(rows, size, generator)
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


@functools.cache
def smollm2() -> dict[str, Tensor]:
    """A slice of a real model; see tests/data/README.md."""
    return torch.load(ROOT / "data/smollm2.pt", weights_only=True)
