"""What the row operations read and write, and who carries them out: PyTorch (`rows.plain`), Triton (`kernels.launch`).

One row holds draft logits z and target logits t on the draft vocabulary. Scales are 1/temperature. A normaliser is
two numbers, the largest logit and the logarithm of the sum beside it; one number, their sum, would lose its digits as
soon as the logits share a large offset:

    log q  = z_scale * (z - draft_top)  - draft_log_total             (q = draft, p = target)
    log pt = t_scale * (t - target_top) - target_log_total            (p renormalised on the draft vocabulary)
    log p  = log pt + log_mass                                        log_mass = log sum_v p_v <= 0

    statistics   log alpha = log sum min(p, q),   KL = KL(pt || q),   sigma = sum w r,   argmaxes
    gradient     d_kl * (q - pt)  +  d_log_alpha * (w r - sigma q),    r = exp(min(log q, log p) - log alpha)

w is the derivative of min(p, q) with respect to q: 1 where q < p, 0 where q > p, 1/2 where they are equal. Rounding
must not flip it, because the gradient pass may see other last bits of z than the statistics pass did:

- In every column w is a ramp: it rises from 0 to 1 where log p - log q passes from -TIE to TIE. Other last bits move it
  a little; they cannot flip it. Within rounding any value in [0, 1] is a subgradient.
- In the column of the draft's argmax, where q may be near 1 and a flip would cost as much as the gradient itself, w is
  decided once, in the statistics pass, from log q and log p, which keep relative digits there: so the ramp is TIE times
  the larger of the two wide. What is saved is the gradient there, `top_log_acceptance` and `top_kl`; it comes from the
  complements 1 - q and 1 - p, and is exact where q - pt is a difference of nearly equal numbers.

A row whose target has no mass on the draft vocabulary has target_top = -inf: log alpha = -inf, KL = 0, zero gradient.
That is a fact of the target. It is never read off log alpha, which is -inf also where a draft excludes all that the
target may say, and NaN where the input is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks

NEG_INF = float("-inf")
EXCESS = 0.01  # in log: what a sum of probabilities may exceed 1 by, beside the rounding of its terms
IMPLS = ("auto", "triton", "torch", "reference")


class Normalizer(NamedTuple):
    """How the target's probabilities on the draft vocabulary are normalised, per row.

    Attributes:
        value: `[n]`: log_mass itself where `is_mass`, else the log-normaliser L of `log p = t_scale * t - L`.
        is_mass: which of the two. The mass comes from one pass over the full vocabulary, so that its digits survive any
            offset; L is what a caller was told.
        rounding: half a unit in the last place, relative, of L or of the logits here, which were rounded apart.
    """

    value: Tensor
    is_mass: bool
    rounding: float

    def most_log_mass(self, value: Tensor, target_top: Tensor, t_scale: float) -> Tensor:
        """`[n]`, the largest log_mass that rounding can make of given L, `value` `[n]`. Beyond it these are no
        probabilities: their sum exceeds 1, and the row gives NaN."""
        return EXCESS + self.rounding * ((t_scale * target_top).abs() + value.abs())


class LogitRows(NamedTuple):
    """Rows of logits as the row operations read them: `z` `[n, V]` against `t[t_index]` (`t` without an index).

    `first_column` says which column of the draft vocabulary the first one here is; statistics need whole rows.
    """

    z: Tensor
    t: Tensor
    t_index: Tensor | None
    z_scale: float
    t_scale: float
    first_column: int = 0


class RowStats(NamedTuple):
    """Per-row statistics `[n]`: all that a gradient needs (`SAVED`), and what the caller reads. Argmaxes are int64."""

    draft_top: Tensor
    draft_log_total: Tensor
    target_top: Tensor
    target_log_total: Tensor
    log_mass: Tensor
    log_acceptance: Tensor
    sigma: Tensor
    top_log_acceptance: Tensor
    top_kl: Tensor
    draft_argmax: Tensor
    kl: Tensor
    target_argmax: Tensor | None = None

    @classmethod
    def empty(cls, n: int, dtype: torch.dtype, device: torch.device, target_argmax: bool) -> RowStats:
        """Unwritten statistics of `n` rows."""
        dtypes = [torch.long if name == "draft_argmax" else dtype for name in cls._fields[:-1]]
        if target_argmax:
            dtypes.append(torch.long)
        return cls(*(torch.empty(n, dtype=x, device=device) for x in dtypes))

    def rows(self, start: int, stop: int) -> RowStats:
        """The same statistics of rows `start:stop`, as views."""
        return RowStats._make(None if x is None else x[start:stop] for x in self)

    def saved(self) -> tuple[Tensor, ...]:
        """What a gradient needs: `NUM_SAVED` tensors."""
        return self[:NUM_SAVED]  # type: ignore[return-value]

    @classmethod
    def of_saved(cls, saved: tuple[Tensor, ...]) -> RowStats:
        """The statistics of `saved()`, for a gradient, which reads no KL: what stands in its place means nothing."""
        return cls._make((*saved, saved[0], None))

    @property
    def supported(self) -> Tensor:
        """bool `[n]`: the target has mass on the draft vocabulary. True for NaN, which has to reach the loss."""
        return self.target_top != NEG_INF


NUM_SAVED = RowStats._fields.index("kl")

# d_log_alpha and d_kl, [n] each, from the statistics of rows start:stop
Coefficients = Callable[[int, int, RowStats], tuple[Tensor, Tensor]]


def tie_width(dtype: torch.dtype) -> float:
    """TIE: half the width of the ramp of w, in log p - log q.

    16 units in the last place (1.9e-6 in float32), about what the logits themselves are known to. Wider, the gradient
    would leave that of the eager loss: with 256 units, one column in 60,000 of normal logits has a w between 0 and 1.
    A power of two, so that the ramp is exact at its ends and in its middle.
    """
    return 16 * torch.finfo(dtype).eps


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The accumulation dtype for logits `x`: float32, float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def row_ops(impl: str, device: torch.device) -> ModuleType:
    """The module of row operations for `impl` on `device`.

    A named choice never falls back; "auto" takes Triton on a GPU and PyTorch elsewhere. (What the reference needs of
    them is the target's pass, in PyTorch.)

    Raises:
        ValueError: an unknown name; "triton" where Triton is not installed, or cannot run on `device`.
    """
    checks.choice("impl", impl, IMPLS)
    if impl == "auto":
        impl = "triton" if device.type in ("cuda", "xpu") and _triton_installed() else "torch"
    if impl in ("torch", "reference"):
        from . import plain

        return plain
    if not _triton_installed():
        checks.fail(
            'impl="triton" with Triton installed', "no module named triton", 'Install triton, or use impl="torch".'
        )
    from ..kernels import launch

    launch.check_device(device)
    return launch


def _triton_installed() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
