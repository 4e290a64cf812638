"""Row operations on tiles of logits, in plain PyTorch; `row_ops` hands out these or the Triton kernels.

One row holds draft logits z and target logits t on the draft vocabulary. With scales 1/temperature folded in,

    log q = z - draft_lse      log p = t - log_normalizer      log pt = t - target_lse      (q = draft, p = target)

    statistics   draft_lse, target_lse, log alpha, sigma, KL, argmax;  alpha = sum min(p, q),  KL = KL(pt || q)
    gradient     d_kl * (q - pt)  +  d_log_alpha * (w r - sigma q),    r = exp(log q - log alpha)
                 w = 1 where q < p, 1/2 where they are equal (as torch.minimum), else 0;   sigma = sum w r

`log_normalizer=None` scores alpha against pt. A row whose target has no mass gives log alpha = -inf, KL = 0 and a
zero gradient. A module of row operations has the four functions below; nothing here knows of masks or objectives.

On a CPU these are bound by exp and by cache: rows go in blocks of `BLOCK_ELEMENTS`, and alpha is taken in linear
space, where `torch.softmax` makes exp, sum and division in one pass. Rows that linear space cannot hold (p and q
almost disjoint, -inf against -inf) are done again in log space.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import validation

NEG_INF = float("-inf")
IMPLS = ("auto", "triton", "torch", "reference")

# Elements of one block of rows. 2**20 float32 are 4 MiB a buffer; larger blocks fall out of a server's shared cache,
# smaller ones pay more for dispatch (measured at V = 32,000: 8, 16, 32, 64 rows within 15 % of one another).
BLOCK_ELEMENTS = 2**20

# Below this alpha a float32 sum of min(p, q) has lost terms to underflow; log space takes over.
SMALLEST_LINEAR = 1e-20

# Finite stand-in for -inf in t - z, where the factor pt is exactly zero: 0 * -1e30 = 0, but 0 * -inf = nan.
FLOOR = -1e30


class RowStats(NamedTuple):
    """Per-row statistics `[n]`: all that a gradient needs, and what the caller reads. Argmaxes are int64."""

    draft_lse: Tensor
    target_lse: Tensor
    log_acceptance: Tensor
    sigma: Tensor
    kl: Tensor
    draft_argmax: Tensor
    target_argmax: Tensor | None = None

    @classmethod
    def empty(cls, n: int, dtype: torch.dtype, device: torch.device, target_argmax: bool) -> RowStats:
        """Unwritten statistics of `n` rows."""
        floats = [torch.empty(n, dtype=dtype, device=device) for _ in range(5)]
        indices = [torch.empty(n, dtype=torch.long, device=device) for _ in range(1 + target_argmax)]
        return cls(*floats, *indices)

    @classmethod
    def without_argmax(cls, floats: Sequence[Tensor]) -> RowStats:
        """The five statistics that a gradient needs."""
        draft_lse, target_lse, log_acceptance, sigma, kl = floats
        return cls(draft_lse, target_lse, log_acceptance, sigma, kl, torch.empty(0, dtype=torch.long))

    def rows(self, start: int, stop: int) -> RowStats:
        """The same statistics of rows `start:stop`, as views."""
        return RowStats._make(None if x is None else x[start:stop] for x in self)


# d_log_alpha and d_kl, [n] each, from the statistics of rows start:stop
Coefficients = Callable[[int, int, RowStats], tuple[Tensor, Tensor]]


def row_ops(impl: str, device: torch.device) -> ModuleType:
    """The module of row operations for `impl` on `device`.

    A named choice never falls back; "auto" takes Triton on a GPU and PyTorch elsewhere. (What the reference needs of
    them is the target's pass, in PyTorch.)

    Raises:
        ValueError: an unknown name; "triton" where Triton is not installed, or cannot run on `device`.
    """
    validation.choice("impl", impl, IMPLS)
    if impl == "auto":
        impl = "triton" if device.type in ("cuda", "xpu") and _triton_installed() else "torch"
    if impl in ("torch", "reference"):
        return sys.modules[__name__]
    if not _triton_installed():
        validation.fail(
            'impl="triton" with Triton installed', "no module named triton", 'Install triton, or use impl="torch".'
        )
    from .kernels import launch

    launch.check_device(device)
    return launch


def _triton_installed() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def lse_argmax(x: Tensor, scale: float, lse: Tensor | None, argmax: Tensor) -> None:
    """Write logsumexp(scale * x) and the lowest index of the maximum of each row of `x` `[n, V]`."""
    for start, stop in _blocks(x):
        block = _load(x, start, stop, None, scale, accumulation_dtype(x))
        top, where = _argmax(block)
        argmax[start:stop] = where
        if lse is not None:
            lse[start:stop] = torch.where(top == NEG_INF, top, top - _at(torch.softmax(block, 1), where).log())


def stats(
    z: Tensor,
    t: Tensor,
    t_index: Tensor | None,
    log_normalizer: Tensor | None,
    z_scale: float,
    t_scale: float,
    out: RowStats,
) -> None:
    """Write the statistics of the rows of `z` `[n, V]` into `out`.

    Row i is scored against `t[t_index[i]]` (`t[i]` without an index); `log_normalizer` is `[n]`.
    """
    for start, stop in _blocks(z):
        _Block(z, t, t_index, log_normalizer, z_scale, t_scale, out, start, stop).statistics()


def stats_and_gradient(
    z: Tensor,
    t: Tensor,
    t_index: Tensor | None,
    log_normalizer: Tensor | None,
    z_scale: float,
    t_scale: float,
    out: RowStats,
    gradient_out: Tensor,
    coefficients: Coefficients,
) -> None:
    """`stats`, then `gradient` with `coefficients(start, stop, statistics)`, from the same exponentials."""
    for start, stop in _blocks(z):
        block = _Block(z, t, t_index, log_normalizer, z_scale, t_scale, out, start, stop)
        probabilities = block.statistics()
        block.gradient(*probabilities, *coefficients(start, stop, block.out), gradient_out[start:stop])


def gradient(
    z: Tensor,
    t: Tensor,
    t_index: Tensor | None,
    log_normalizer: Tensor | None,
    z_scale: float,
    t_scale: float,
    stats: RowStats,
    d_log_acceptance: Tensor,
    d_kl: Tensor,
    gradient_out: Tensor,
) -> None:
    """Write the gradient with respect to `z` into `gradient_out`, which may be `z` itself.

    `z` and `t` may be any block of columns of the rows that `stats` describes.
    """
    for start, stop in _blocks(z):
        block = _Block(z, t, t_index, log_normalizer, z_scale, t_scale, stats, start, stop)
        probabilities = block.probabilities()
        block.gradient(*probabilities, d_log_acceptance[start:stop], d_kl[start:stop], gradient_out[start:stop])


class _Block:
    """A block of rows in the accumulation dtype, small enough for its temporaries to stay in cache."""

    def __init__(
        self,
        z: Tensor,
        t: Tensor,
        t_index: Tensor | None,
        log_normalizer: Tensor | None,
        z_scale: float,
        t_scale: float,
        stats: RowStats,
        start: int,
        stop: int,
    ) -> None:
        self.out = stats.rows(start, stop)
        acc = stats.kl.dtype
        self.z = _load(z, start, stop, None, z_scale, acc)
        self.t = _load(t, start, stop, t_index, t_scale, acc)
        self.z_scale = z_scale
        self.normalizer = None if log_normalizer is None else log_normalizer[start:stop].to(acc)

    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Write the statistics; returns q, pt, 2 w q, each `[b, V]`."""
        out = self.out
        z_max, draft_argmax = _argmax(self.z)
        out.draft_argmax.copy_(draft_argmax)
        t_max, target_argmax = _argmax(self.t)
        if out.target_argmax is not None:
            out.target_argmax.copy_(target_argmax)
        q = torch.softmax(self.z, 1)
        pt = torch.softmax(self.t, 1)
        unsupported = t_max == NEG_INF
        if _any(unsupported):
            pt.masked_fill_(unsupported.unsqueeze(1), 0.0)
        # The largest probability is exp(0) / sum: its log gives the logsumexp without another pass of exp.
        torch.sub(z_max, _at(q, draft_argmax).log_(), out=out.draft_lse)
        torch.sub(t_max, _at(pt, target_argmax).log_(), out=out.target_lse)
        if _any(unsupported):
            out.target_lse.masked_fill_(unsupported, NEG_INF)
        p = self._p(pt)

        scratch = torch.minimum(p, q)
        alpha = scratch.sum(1)
        torch.log(alpha, out=out.log_acceptance)
        # sum pt (log pt - log q), the constants taken off first: t and z may share a large offset
        constants = (out.draft_lse - _finite(out.target_lse)).unsqueeze(1)
        torch.sub(self.t, self.z, out=scratch).add_(constants).clamp_(min=FLOOR).mul_(pt)
        torch.sum(scratch, 1, out=out.kl)
        twice_w_q = self._twice_w_q(p, q, scratch)
        torch.sum(twice_w_q, 1, out=out.sigma).mul_(0.5).div_(alpha)

        careful = (alpha < SMALLEST_LINEAR) | ~torch.isfinite(out.kl)
        if _any(careful):
            self._careful_statistics(careful.nonzero().squeeze(1))
        return q, pt, twice_w_q

    def probabilities(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, pt, 2 w q, each `[b, V]`, from the statistics, for any block of columns."""
        q = _exp_minus(self.z, self.out.draft_lse)
        pt = _exp_minus(self.t, _finite(self.out.target_lse))
        p = self._p(pt)
        return q, pt, self._twice_w_q(p, q, p if p is not pt else torch.empty_like(p))

    def gradient(
        self, q: Tensor, pt: Tensor, twice_w_q: Tensor, d_log_alpha: Tensor, d_kl: Tensor, gradient_out: Tensor
    ) -> None:
        """Write the gradient; consumes `twice_w_q`."""
        out = self.out
        supported = out.target_lse > NEG_INF
        d_log_alpha = torch.where(supported, d_log_alpha * self.z_scale, 0.0)
        d_kl = torch.where(supported, d_kl * self.z_scale, 0.0)
        linear = out.log_acceptance > math.log(SMALLEST_LINEAR)
        careful = (supported & ~linear).nonzero().squeeze(1) if _any(~linear) else None
        if careful is not None:  # before gradient_out, which may be z, is written
            careful_gradient = self._careful_gradient(careful, d_log_alpha[careful], d_kl[careful])

        # w q / alpha * d_log_alpha  +  q * (d_kl - sigma * d_log_alpha)  -  pt * d_kl
        half = torch.where(linear, 0.5 * d_log_alpha * torch.exp(-out.log_acceptance), 0.0)
        rest = d_kl - torch.where(supported, out.sigma, 0.0) * d_log_alpha
        total = twice_w_q.mul_(half.unsqueeze(1)).addcmul_(q, rest.unsqueeze(1))
        minus_d_kl = d_kl.neg().unsqueeze(1)
        if gradient_out.dtype == total.dtype:
            torch.addcmul(total, pt, minus_d_kl, out=gradient_out)
        else:
            gradient_out.copy_(total.addcmul_(pt, minus_d_kl))
        if careful is not None:
            gradient_out[careful] = careful_gradient.to(gradient_out.dtype)

    @staticmethod
    def _twice_w_q(p: Tensor, q: Tensor, out: Tensor) -> Tensor:
        """`2 w q` = q + sign(p - q) q, into `out`: exactly 0 where q > p, however small the rest."""
        torch.sub(p, q, out=out).sign_()
        return torch.addcmul(q, out, q, out=out)

    def _p(self, pt: Tensor) -> Tensor:
        if self.normalizer is None:
            return pt
        # exp(t - L) = pt * exp(target_lse - L); the factor is the target's mass on the draft vocabulary.
        mass = torch.where(self.out.target_lse > NEG_INF, self.out.target_lse - self.normalizer, NEG_INF)
        return pt * mass.exp_().unsqueeze(1)

    def _log_probs(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_q = self.z[rows] - self.out.draft_lse[rows].unsqueeze(1)
        target_lse = _finite(self.out.target_lse[rows])
        normalizer = target_lse if self.normalizer is None else _finite(self.normalizer[rows])
        return log_q, self.t[rows] - target_lse.unsqueeze(1), self.t[rows] - normalizer.unsqueeze(1)

    def _careful_statistics(self, rows: Tensor) -> None:
        """log alpha, sigma and KL in log space, where no term underflows before it is compared."""
        out = self.out
        log_q, log_pt, log_p = self._log_probs(rows)
        log_alpha = torch.minimum(log_q, log_p).logsumexp(1)
        out.log_acceptance[rows] = log_alpha
        out.sigma[rows] = _w_r(log_q, log_p, log_alpha).sum(1)
        pt = log_pt.exp()
        out.kl[rows] = torch.where(pt > 0, pt * (log_pt - log_q), 0.0).sum(1)

    def _careful_gradient(self, rows: Tensor, d_log_alpha: Tensor, d_kl: Tensor) -> Tensor:
        log_q, log_pt, log_p = self._log_probs(rows)
        q = log_q.exp()
        w_r = _w_r(log_q, log_p, self.out.log_acceptance[rows])
        d_alpha_z = w_r - self.out.sigma[rows].unsqueeze(1) * q
        return d_kl.unsqueeze(1) * (q - log_pt.exp()) + d_log_alpha.unsqueeze(1) * d_alpha_z


def _w_r(log_q: Tensor, log_p: Tensor, log_alpha: Tensor) -> Tensor:
    """`w r`; selected before it is exponentiated, because 0 * exp(large) is not 0."""
    w = (1 + torch.sign(log_p - log_q)).mul_(0.5)
    r = torch.where(w > 0, log_q - _finite(log_alpha).unsqueeze(1), NEG_INF).clamp_(max=0.0).exp_()
    return torch.nan_to_num(w) * r


def _exp_minus(x: Tensor, lse: Tensor) -> Tensor:
    """exp(x - lse) of any columns of the rows that `lse` `[b]` is of.

    As softmax(x) * exp(logsumexp(x) - lse): `torch.softmax` takes max, exp, sum and quotient in less time than
    `torch.exp` alone (0.35 against 0.56 ns an element; AMD EPYC, one thread), and the sum's rounding cancels.
    """
    probs = torch.softmax(x, 1)
    top = x.amax(1)
    impossible = top == NEG_INF
    factor = torch.where(impossible, 0.0, (top - probs.amax(1).log_() - lse).exp_())
    if _any(impossible):
        probs.masked_fill_(impossible.unsqueeze(1), 0.0)
    return probs.mul_(factor.unsqueeze(1))


def _at(x: Tensor, index: Tensor) -> Tensor:
    """`x[i, index[i]]`."""
    return x.gather(1, index.unsqueeze(1)).squeeze(1)


def _argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each row and the lowest index that has it.

    `torch.argmax` is not vectorised on the CPU; a maximum of 128-wide groups and an argmax over those is (ten times
    faster at V = 32,000).
    """
    size = x.shape[1]
    group = 128
    if size < 8 * group:
        return torch.max(x, 1)
    whole = size // group * group
    tops = x[:, :whole].unflatten(1, (-1, group)).amax(2)
    if whole < size:
        tops = torch.cat([tops, x[:, whole:].amax(1, keepdim=True)], 1)
    top, at = tops.max(1)
    # The last group is shifted to end at `size`; its first columns belong to a group that came earlier and lost.
    first = (at * group).clamp_(max=size - group)
    columns = first.unsqueeze(1) + torch.arange(group, device=x.device)
    return top, first + x.gather(1, columns).argmax(1)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The accumulation dtype for logits `x`: float32, float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def _load(x: Tensor, start: int, stop: int, index: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    rows = x[start:stop] if index is None else x[index[start:stop]]
    rows = rows.to(dtype)
    return rows if scale == 1.0 else rows * scale


def _blocks(x: Tensor) -> Iterator[tuple[int, int]]:
    n, size = x.shape
    step = max(1, BLOCK_ELEMENTS // max(size, 1))
    return ((start, min(start + step, n)) for start in range(0, n, step))


def _finite(lse: Tensor) -> Tensor:
    """0 for -inf, so that -inf - lse stays -inf."""
    return torch.where(lse > NEG_INF, lse, 0.0)


def _any(mask: Tensor) -> bool:
    """Whether any row needs another path; free on a CPU. (Memory accounting on fake tensors answers False.)"""
    return bool(mask.any())
