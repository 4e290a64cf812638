"""What the row operations read and write. PyTorch (`rows.plain`) and Triton (`kernels.launch`) carry them out.

A row holds draft logits z and target logits t on the draft vocabulary. Scales are logit_scale / temperature; under a
softcap z and t stand for tanh of the logits (see `Transform`). Two numbers normalise each side: its largest logit, and
the log of the sum of exponentials relative to it. One number, their sum, would lose its digits as soon as the logits
share a large offset:

    log q  = z_scale * (z - draft_top)  - draft_log_total             (q = draft, p = target)
    log pt = t_scale * (t - target_top) - target_log_total            (p renormalised on the draft vocabulary)
    log p  = log pt + log_mass                                        log_mass = log sum_v p_v <= 0

A term is a divergence D = sum_v f(q_v, p_v). Its gradient in z_scale * z is c_v - sigma q_v, with c_v = q_v df/dq_v (or
that plus any multiple of q_v) and sigma = sum_v c_v. All terms are in `TERMS`; a call names those that it wants, in
`objective=` or `terms=`:

    term             value                           c                       sigma      top
    log_acceptance   log alpha                       w r                     sum c
    kl               sum pt (log pt - log q)         -pt                     -1         (1 - pt) - (1 - q)
    soft_ce          -sum pt log q                   -pt                     -1         (1 - pt) - (1 - q)
    ce               -log q[label]                   -1 at the label         -1         -(1 - q) at the label, else q
    rkl              sum q (log q - log pt)          q (log q - log pt)      value
    jsd              sum b pt log(pt / m)            (1 - b) q log(q / m)    sum c
                         + (1 - b) q log(q / m)
    skl              sum pt log(pt / m)              -(1 - b) pt q / m       sum c
    l1               sum |pt - q|                    (1 - 2 w') q            sum c

    alpha = sum min(p, q),   r = min(p, q) / alpha,   m = b pt + (1 - b) q,   b = jsd_beta
    top: c - sigma q in the column of draft_top; where no other form is given, c (1 - q) - q (sigma - c)

soft_ce is KL and the target's entropy. A row without a label has no cross-entropy. rkl is infinite, and has no
gradient, where q can say what p cannot. skl is the skewed KL of DistiLLM (arXiv 2402.03898). It is at most -log b, and
KL as b goes to 0; it shares b with jsd. l1 is 2 (1 - alpha) where p is pt, that is, where the target has all its mass
on the draft vocabulary; w' is the w of pt.

w is the derivative of min(p, q) with respect to q: 1 where q < p, 0 where q > p, 1/2 where they are equal. Rounding
must not flip it, because the gradient pass may see other last bits of z than the statistics pass did:

- In every column w is a ramp. It rises from 0 to 1 where log p - log q passes from -TIE to TIE. Other last bits move w
  a little, but they cannot flip it. Within rounding, any value in [0, 1] is a subgradient.
- In the column of the draft's argmax q may be near 1, and a flip would cost as much as the gradient itself. There w is
  decided once, in the statistics pass. Log q and log p keep their relative digits there, so that the ramp's width is
  TIE times the larger of the two. The statistics save the gradient in this column, `top`. It is made of the complements
  1 - q and 1 - p, so that it keeps its digits where q - pt is a difference of nearly equal numbers.

A row whose target has no mass on the draft vocabulary has target_top = -inf, log alpha = -inf, KL = 0 and no gradient.
Nobody concludes this from log alpha: that is -inf also where a draft excludes all that the target may say, and NaN
where the input is.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

MEASURED = ("log_acceptance", "kl")  # the terms of every call: lambda and the metrics are made of them
TERMS = (*MEASURED, "soft_ce", "ce", "rkl", "jsd", "skl", "l1")
NEG_INF = float("-inf")
EXCESS = 0.01  # in log: what a sum of probabilities may exceed 1 by, beside the rounding of its terms


class Transform(NamedTuple):
    """From the logits z that a head makes to those that its softmax sees: `scale * f(z)`, with f(z) = z, or
    `tanh(inner * z)` under a softcap. `checks.softmax` makes both numbers of a caller's options.

    Row operations take the row's largest f off before they multiply. So a common offset of z costs no digit, but under
    a softcap it is no offset any more. A logit of -inf is a token that cannot be drawn: f(-inf) = -inf, cap or not.
    """

    scale: float = 1.0
    inner: float | None = None

    @property
    def gain(self) -> float:
        """The derivative at z = 0. Elsewhere a softcap multiplies it by 1 - tanh^2."""
        return self.scale if self.inner is None else self.scale * self.inner

    @property
    def softcap(self) -> float | None:
        """The largest magnitude that the softmax may see."""
        return None if self.inner is None else self.scale


class Normalizer(NamedTuple):
    """How the target's probabilities on the draft vocabulary are normalised, per row.

    Attributes:
        value: `[n]`: log_mass itself where `is_mass`, else the log-normaliser L of `log p = t_scale * t - L`.
        is_mass: which of the two it is. The mass comes from one pass over the full vocabulary, and its digits survive
            any offset. L is what a caller gave.
        rounding: the relative rounding, in half units in the last place, of L and of the logits, which differ in it.
    """

    value: Tensor
    is_mass: bool
    rounding: float

    def rows(self, start: int, stop: int) -> Normalizer:
        """The normaliser of rows `start:stop`, as a view."""
        return self._replace(value=self.value[start:stop])

    def most_log_mass(self, value: Tensor, target_top: Tensor, t_scale: float) -> Tensor:
        """`[n]`, the largest log_mass that rounding can make of L given as `value` `[n]`. A row beyond it has
        "probabilities" that sum to more than 1, and gives NaN."""
        return EXCESS + self.rounding * ((t_scale * target_top).abs() + value.abs())


class LogitRows(NamedTuple):
    """Rows of logits as the row operations read them: `z` `[n, V]` against `t[t_index]` (`t` without an index).

    Without a normaliser p is pt. Gradients do not read it: they have log_mass. `first_column` says which column of the
    draft vocabulary the first one here is; statistics need whole rows. `labels` (int64 `[n]`, negative: none) are the
    columns that "ce" asks for; None: the target's argmax.
    """

    z: Tensor
    t: Tensor
    t_index: Tensor | None
    normalizer: Normalizer | None
    z_transform: Transform
    t_transform: Transform
    first_column: int = 0
    labels: Tensor | None = None
    jsd_beta: float = 0.5

    def rows(self, start: int, stop: int) -> LogitRows:
        """Rows `start:stop` of these, as views."""
        index, normalizer, labels = self.t_index, self.normalizer, self.labels
        return self._replace(
            z=self.z[start:stop],
            t=self.t[start:stop] if index is None else self.t,
            t_index=None if index is None else index[start:stop],
            normalizer=None if normalizer is None else normalizer.rows(start, stop),
            labels=None if labels is None else labels[start:stop],
        )


class RowStats(NamedTuple):
    """The statistics of rows: all that a gradient needs, and what the caller reads.

    Any of these may be columns of a larger tensor: the last dimension has stride 1, the others have any stride.

    Attributes:
        base: `[5, n]`: draft_top, draft_log_total, target_top, target_log_total, log_mass.
        values: `[T, n]`, of the `T` terms that the call named.
        saved: `[2, T, n]`: sigma, then top, of each term.
        draft_argmax: int64 `[n]`: the lowest column of the largest draft logit.
        target_argmax: the same of the target's logits here; None where nobody asks for it ("ce" without labels does).
    """

    base: Tensor
    values: Tensor
    saved: Tensor
    draft_argmax: Tensor
    target_argmax: Tensor | None = None

    def rows(self, start: int, stop: int) -> RowStats:
        """The same statistics of rows `start:stop`, as views."""
        return RowStats._make(None if x is None else x.narrow(-1, start, stop - start) for x in self)

    @property
    def draft_top(self) -> Tensor:
        return self.base[0]

    @property
    def draft_log_total(self) -> Tensor:
        return self.base[1]

    @property
    def target_top(self) -> Tensor:
        return self.base[2]

    @property
    def target_log_total(self) -> Tensor:
        return self.base[3]

    @property
    def log_mass(self) -> Tensor:
        return self.base[4]

    def supported(self) -> Tensor:  # no property, and none inside, which torch.compile of 2.8 cannot trace
        """bool `[n]`: the target has mass on the draft vocabulary. True for NaN, which has to reach the loss."""
        return self.base[2] != NEG_INF


class RowLoss(Protocol):
    """What one pass over the rows minimises, as data per row: `objective.Objective`, whose attributes these are."""

    mix: tuple[tuple[str, float], ...]
    eta: float
    kl_scale: float
    weights: Tensor
    kl_weight: Tensor | None

    def rows(self, start: int, stop: int) -> RowLoss:
        """The loss of rows `start:stop` alone."""

    def d_values(self, values: Tensor) -> Tensor:
        """`[T, n]`, the derivatives of the loss with respect to the terms, from their `values` `[T, n]`."""


@functools.cache
def tie_width(dtype: torch.dtype) -> float:
    """TIE: half the width of the ramp of w, in log p - log q.

    It is 16 units in the last place (1.9e-6 in float32), about as exactly as the logits themselves are known. A wider
    ramp leaves the gradient of the eager loss: with 256 units, one column in 60,000 of normal logits has a w between 0
    and 1. It is a power of two, so that the ramp is exact at its ends and in its middle.
    """
    return 16 * torch.finfo(dtype).eps


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The accumulation dtype for logits `x`: float32, float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
