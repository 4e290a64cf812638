"""The row operations in plain PyTorch; see `rows.interface` for the formulas and names.

On a CPU they are bound by exp and by cache: rows go in blocks of `BLOCK_ELEMENTS`, and alpha is taken in linear space,
where `torch.softmax` makes exp, sum and division in one pass. Rows that linear space cannot hold (p and q almost
disjoint, an infinite KL) are done again in log space.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .interface import NEG_INF, Coefficients, LogitRows, Normalizer, RowStats, accumulation_dtype, tie_width

# Elements of one block of rows. 2**19 float32 are 2 MiB a buffer, 12 MiB a block; larger ones fall out of a server's
# shared cache, smaller ones pay more for dispatch (AMD EPYC, 2 threads, V = 32,000, ns an element of statistics: 2.1,
# 1.7, 1.8 at 2**18, 2**19, 2**20).
BLOCK_ELEMENTS = 2**19

# Buffers of a block: centred z and t, q, pt, log pt - log q, 2 w q.
NUM_BUFFERS = 6

# Below this alpha a float32 sum of min(p, q) has lost terms to underflow; log space takes over.
SMALLEST_LINEAR = 1e-20

# Finite stand-in for -inf in log p - log q, where the factor pt is exactly zero: 0 * -1e30 = 0, but 0 * -inf = nan.
FLOOR = -1e30


def lse_argmax(
    x: Tensor, scale: float, inside: Tensor | None, lse: Tensor, log_mass: Tensor | None, argmax: Tensor
) -> None:
    """Write logsumexp(scale * x), and the lowest index of the maximum, of each row of `x` `[n, V]`.

    With `inside` (bool `[V]`), also `log_mass` = log sum of softmax(scale * x) over the columns inside: from the sums
    inside and outside, so that a share near 1 keeps the digits of what is missing.
    """
    acc = accumulation_dtype(x)
    for start, stop in _blocks(x):
        row = x[start:stop].to(acc)
        top, at = _argmax(row)
        argmax[start:stop] = at
        row = _centred(row, top, scale, torch.empty_like(row) if x.dtype == acc else row)
        probs = torch.softmax(row, 1)
        lse[start:stop] = torch.where(top == NEG_INF, top, scale * top - _at(probs, at).log())
        if inside is not None and log_mass is not None:
            log_mass[start:stop] = _log_mass(row, probs, inside)


def _log_mass(row: Tensor, probs: Tensor, inside: Tensor) -> Tensor:
    """log of the share of `probs` = softmax(row) in the columns `inside`; means nothing in a row of -inf alone."""
    share = (probs * inside).sum(1)
    mass = -torch.log1p((probs * ~inside).sum(1) / share)
    few = share < SMALLEST_LINEAR
    if _any(few):
        some = row[few]
        mass[few] = some[:, inside].logsumexp(1) - some.logsumexp(1)
    return mass


def stats(rows: LogitRows, normalizer: Normalizer | None, out: RowStats) -> None:
    """Write the statistics of whole rows into `out`. Without a normaliser p is pt."""
    for block in _blocks_of(rows, out):
        block.statistics(normalizer)


def stats_and_gradient(
    rows: LogitRows, normalizer: Normalizer | None, out: RowStats, gradient_out: Tensor, coefficients: Coefficients
) -> None:
    """`stats`, then `gradient` with `coefficients(start, stop, statistics)`, from the same exponentials."""
    for block in _blocks_of(rows, out):
        probabilities = block.statistics(normalizer)
        d_log_acceptance, d_kl = coefficients(block.start, block.stop, block.out)
        block.gradient(*probabilities, d_log_acceptance, d_kl, gradient_out[block.start : block.stop])


def gradient(rows: LogitRows, stats: RowStats, d_log_acceptance: Tensor, d_kl: Tensor, gradient_out: Tensor) -> None:
    """Write the gradient with respect to `rows.z` into `gradient_out`, which may be `rows.z` itself.

    `rows` may be any block of columns of the rows that `stats` describes.
    """
    for block in _blocks_of(rows, stats):
        part = slice(block.start, block.stop)
        block.gradient(*block.probabilities(), d_log_acceptance[part], d_kl[part], gradient_out[part])


def _blocks_of(rows: LogitRows, stats: RowStats) -> Iterator[_Block]:
    """The blocks of a call. Their buffers are allocated once: fresh pages cost more than what is written to them."""
    acc = stats.log_acceptance.dtype
    buffers: list[Tensor] = []
    for start, stop in _blocks(rows.z):
        if not buffers:  # the first block is the largest
            shape = (stop - start, rows.z.shape[1])
            buffers = [torch.empty(shape, dtype=acc, device=rows.z.device) for _ in range(NUM_BUFFERS)]
        yield _Block(rows, stats, start, stop, [x[: stop - start] for x in buffers])


class _Block:
    """A block of rows in the accumulation dtype, small enough for its buffers to stay in cache."""

    def __init__(self, rows: LogitRows, stats: RowStats, start: int, stop: int, buffers: list[Tensor]) -> None:
        self.rows, self.out, self.start, self.stop = rows, stats.rows(start, stop), start, stop
        self.acc = buffers[0].dtype
        self.unsupported: Tensor | None = None  # bool [b] where there are such rows, once the statistics are known
        self.tie = tie_width(self.acc)
        of_z, of_t, *self.buffers = buffers
        # The logits where they lie, or in the block's dtype; `_centre` makes them relative to their row's maximum.
        self.z = _load(rows.z[start:stop], None, of_z)
        index = rows.t_index
        t, index = (rows.t[start:stop], None) if index is None else (rows.t, index[start:stop])
        self.t = _load(t, index, of_t)
        self.of_z, self.of_t = of_z, of_t

    def statistics(self, normalizer: Normalizer | None) -> tuple[Tensor, Tensor, Tensor]:
        """Write the statistics; returns q, pt and 2 w q, each `[b, V]`, the last 0 in the column of q's maximum."""
        out, tie = self.out, self.tie
        z_top, z_at = _argmax(self.z)
        t_top, t_at = _argmax(self.t)
        out.draft_top.copy_(z_top)
        out.target_top.copy_(t_top)
        out.draft_argmax.copy_(z_at)
        if out.target_argmax is not None:
            out.target_argmax.copy_(t_at)
        self._centre()
        q, pt, ratio, ramp = self.buffers
        torch.softmax(self.z, 1, out=q)
        torch.softmax(self.t, 1, out=pt)
        if self.unsupported is not None:
            pt.masked_fill_(self.unsupported.unsqueeze(1), 0.0)
        q_top, q_rest = _top_and_rest(q, z_at)
        out.draft_log_total.copy_(_log_total(q_top, q_rest))
        out.target_log_total.copy_(_log_total(*_top_and_rest(pt, t_at)))
        if self.unsupported is not None:
            out.target_log_total.masked_fill_(self.unsupported, 0.0)
        log_mass = self._mass(normalizer)

        # The column of q's maximum, from complements: 1 - q and 1 - p keep the digits that q and p have lost there.
        log_q = -out.draft_log_total
        log_pt = _at(self.t, z_at) - out.target_log_total
        log_p = log_pt + log_mass
        w = _top_weight(log_q, log_p, tie)
        torch.sub(-torch.expm1(log_pt), q_rest, out=out.top_kl)  # (1 - pt) - (1 - q)

        p = pt if normalizer is None else torch.mul(pt, log_mass.exp().unsqueeze(1), out=ramp)
        rest = torch.minimum(p, q, out=ratio).scatter_(1, z_at.unsqueeze(1), 0.0).sum(1)
        top = torch.minimum(log_q, log_p)
        alpha = top.exp() + rest
        missed = (-torch.expm1(top) - rest).clamp_(min=0.0)  # 1 - alpha
        torch.where(missed < 0.5, torch.log1p(-missed), alpha.log(), out=out.log_acceptance)

        twice_w_q = self._twice_w_q(q, log_mass, normalizer is not None)
        torch.sum(ratio.mul_(pt), 1, out=out.kl)
        w_rest = twice_w_q.scatter_(1, z_at.unsqueeze(1), 0.0).sum(1).mul_(0.5)
        w_top = w * top.exp()
        torch.div(w_top + w_rest, alpha, out=out.sigma)
        torch.div(w_top * q_rest - q_top * w_rest, alpha, out=out.top_log_acceptance)

        careful = (alpha < SMALLEST_LINEAR) & out.supported
        if _any(careful):
            self._careful_acceptance(careful.nonzero().squeeze(1), w)
        careful = ~torch.isfinite(out.kl) & out.supported
        if _any(careful):
            self._careful_kl(careful.nonzero().squeeze(1))
        # A NaN of the draft, which the floor of log_ratio hides, or of the normaliser, which KL does not use.
        out.kl.masked_fill_(out.log_acceptance.isnan(), float("nan"))
        if self.unsupported is not None:
            for x in (out.sigma, out.top_log_acceptance, out.top_kl, out.kl):
                x.masked_fill_(self.unsupported, 0.0)
            out.log_acceptance.masked_fill_(self.unsupported, NEG_INF)
        return q, pt, twice_w_q

    def probabilities(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, pt, 2 w q, each `[b, V]`, from the statistics, for any block of columns."""
        self._centre()
        q, pt, _, _ = self.buffers
        _exp_minus(self.z, self.out.draft_log_total, q)
        _exp_minus(self.t, self.out.target_log_total, pt)
        return q, pt, self._twice_w_q(q, self.out.log_mass, True)

    def gradient(
        self, q: Tensor, pt: Tensor, twice_w_q: Tensor, d_log_alpha: Tensor, d_kl: Tensor, gradient_out: Tensor
    ) -> None:
        """Write the gradient; consumes `twice_w_q`."""
        out = self.out
        d_log_alpha = torch.where(out.supported, d_log_alpha * self.rows.z_scale, 0.0)
        d_kl = torch.where(out.supported, d_kl * self.rows.z_scale, 0.0)
        linear = out.log_acceptance > math.log(SMALLEST_LINEAR)
        careful = ~linear & out.supported
        rows = careful.nonzero().squeeze(1) if _any(careful) else None
        if rows is not None:  # before gradient_out, which may be z, is written
            careful_gradient = self._careful_gradient(rows, d_log_alpha[rows], d_kl[rows])

        # w q / alpha * d_log_alpha  +  q * (d_kl - sigma * d_log_alpha)  -  pt * d_kl
        half = torch.where(linear, 0.5 * d_log_alpha * torch.exp(-out.log_acceptance), 0.0)
        rest = d_kl - out.sigma * d_log_alpha
        total = twice_w_q.mul_(half.unsqueeze(1)).addcmul_(q, rest.unsqueeze(1))
        into = gradient_out if gradient_out.dtype == total.dtype else total
        torch.addcmul(total, pt, d_kl.neg().unsqueeze(1), out=into)
        if rows is not None:
            into[rows] = careful_gradient
        self._write_top(into, d_log_alpha * out.top_log_acceptance + d_kl * out.top_kl)
        if self.unsupported is not None:
            into.masked_fill_(self.unsupported.unsqueeze(1), 0.0)
        if into is total:
            gradient_out.copy_(total)

    def _centre(self) -> None:
        """Take the row's maximum off the logits, and scale: exact, whatever their common offset."""
        rows, out = self.rows, self.out
        unsupported = ~out.supported
        self.unsupported = unsupported if _any(unsupported) else None
        self.z = _centred(self.z, out.draft_top, rows.z_scale, self.of_z)
        self.t = _centred(self.t, out.target_top, rows.t_scale, self.of_t)

    def _mass(self, normalizer: Normalizer | None) -> Tensor:
        """log_mass as the formulas use it; `out.log_mass` keeps what a nonsensical normaliser gave."""
        out = self.out
        if normalizer is None:
            return out.log_mass.zero_()
        given, t_scale = normalizer.value[self.start : self.stop].to(self.acc), self.rows.t_scale
        if normalizer.is_mass:
            log_mass = torch.where(out.supported, given, 0.0)
            out.log_mass.copy_(log_mass)
        else:
            log_mass = torch.where(out.supported, (t_scale * out.target_top - given) + out.target_log_total, 0.0)
            out.log_mass.copy_(log_mass)
            most = normalizer.most_log_mass(given, out.target_top, t_scale)
            log_mass = log_mass.masked_fill(log_mass > most, float("nan"))
        return log_mass

    def _twice_w_q(self, q: Tensor, log_mass: Tensor, has_mass: bool) -> Tensor:
        """`2 w q` = q + ramp * q, in the last buffer: exactly 0 where q > p, however small the rest.

        The one before it holds log pt - log q then: finite where either is -inf, but +inf where only q is 0.
        """
        _, _, ratio, ramp = self.buffers
        constant = (self.out.draft_log_total - self.out.target_log_total).unsqueeze(1)
        torch.sub(self.t, self.z, out=ratio).add_(constant)
        ratio.nan_to_num_(nan=FLOOR, posinf=float("inf"), neginf=FLOOR)
        if has_mass:
            torch.add(ratio, log_mass.unsqueeze(1), out=ramp).clamp_(-self.tie, self.tie)
        else:
            torch.clamp(ratio, -self.tie, self.tie, out=ramp)
        return torch.addcmul(q, ramp, q, value=1 / self.tie, out=ramp)

    def _write_top(self, total: Tensor, values: Tensor) -> None:
        """Put the gradient of each row's column of q's maximum where that column is in this block."""
        column = self.out.draft_argmax - self.rows.first_column
        inside = (column >= 0) & (column < total.shape[1])
        column = torch.where(inside, column, 0).unsqueeze(1)
        values = values.unsqueeze(1)
        total.scatter_(1, column, torch.where(inside.unsqueeze(1), values, total.gather(1, column)))

    def _log_probs(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log q, log p and log pt of some rows."""
        out = self.out
        log_q = self.z[rows] - out.draft_log_total[rows].unsqueeze(1)
        log_pt = self.t[rows] - out.target_log_total[rows].unsqueeze(1)
        return log_q, log_pt + out.log_mass[rows].unsqueeze(1), log_pt

    def _careful_acceptance(self, rows: Tensor, w_top: Tensor) -> None:
        """log alpha, sigma and the gradient at the maximum in log space, where no term underflows before it is
        compared. No digits are lost at the maximum: alpha is far from 1."""
        out = self.out
        log_q, log_p, _ = self._log_probs(rows)
        at = out.draft_argmax[rows].unsqueeze(1)
        log_alpha = torch.minimum(log_q, log_p).logsumexp(1)
        w_r = _w_r(log_q, log_p, log_alpha, self.tie)
        r_top = (torch.minimum(log_q, log_p).gather(1, at).squeeze(1) - _finite(log_alpha)).clamp_(max=0.0).exp_()
        w_r.scatter_(1, at, (w_top[rows] * r_top).unsqueeze(1))
        out.log_acceptance[rows] = log_alpha
        out.sigma[rows] = w_r.sum(1)
        out.top_log_acceptance[rows] = _at(w_r, at.squeeze(1)) - out.sigma[rows] * _at(log_q, at.squeeze(1)).exp()

    def _careful_kl(self, rows: Tensor) -> None:
        """KL where some log q are -inf: only those count that the target may say."""
        log_q, _, log_pt = self._log_probs(rows)
        pt = log_pt.exp()
        self.out.kl[rows] = torch.where(pt == 0, 0.0, pt * (log_pt - log_q)).sum(1)

    def _careful_gradient(self, rows: Tensor, d_log_alpha: Tensor, d_kl: Tensor) -> Tensor:
        log_q, log_p, log_pt = self._log_probs(rows)
        out = self.out
        q, pt = log_q.exp(), log_pt.exp()
        d_alpha_z = _w_r(log_q, log_p, out.log_acceptance[rows], self.tie) - out.sigma[rows].unsqueeze(1) * q
        return d_kl.unsqueeze(1) * (q - pt) + d_log_alpha.unsqueeze(1) * d_alpha_z


def _w_r(log_q: Tensor, log_p: Tensor, log_alpha: Tensor, tie: float) -> Tensor:
    """`w r`; selected before it is exponentiated, because 0 * exp(large) is not 0. 0 where alpha is 0."""
    smaller = torch.minimum(log_q, log_p)
    log_r = torch.where(smaller == NEG_INF, NEG_INF, smaller - _finite(log_alpha).unsqueeze(1))
    # Where both are -inf their difference is NaN, and r is 0.
    ramp = torch.where(smaller == NEG_INF, 0.0, log_p - log_q).clamp_(-tie, tie).div_(tie)
    return (1 + ramp).mul_(0.5).mul_(log_r.clamp_(max=0.0).exp_())


def _top_weight(log_q: Tensor, log_p: Tensor, tie: float) -> Tensor:
    """w of the column of q's maximum: the ramp over the relative difference of log q and log p, both near 0 there."""
    width = torch.maximum(log_q.abs(), log_p.abs()).mul_(tie).clamp_(min=torch.finfo(log_q.dtype).tiny)
    ramp = torch.where(log_p == NEG_INF, -1.0, (log_p - log_q) / width)
    return ramp.clamp_(-1, 1).add_(1).mul_(0.5)


def _top_and_rest(probs: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probability of each row, and the sum of all others: added up where the largest is near 1 and has
    lost its digits, else what it leaves of 1, because `probs` sum to 1 only up to rounding."""
    top = _at(probs, at)
    if not _any(top > 0.5):
        return top, 1 - top
    at = at.unsqueeze(1)
    rest = probs.scatter_(1, at, 0.0).sum(1)
    probs.scatter_(1, at, top.unsqueeze(1))
    return top, torch.where(top > 0.5, rest, 1 - top)


def _log_total(top: Tensor, rest: Tensor) -> Tensor:
    """-log of the largest probability."""
    return torch.where(rest < 0.5, -torch.log1p(-rest), -top.log())


def _exp_minus(x: Tensor, log_total: Tensor, out: Tensor) -> None:
    """Write exp(x - log_total) of any columns `x`, relative to their row's maximum, that `log_total` `[b]` is of.

    As softmax(x) * exp(logsumexp(x) - log_total): `torch.softmax` takes max, exp, sum and quotient in less time than
    `torch.exp` alone (0.38 against 0.60 ns an element; AMD EPYC, one thread), and the sum's rounding cancels.
    """
    torch.softmax(x, 1, out=out)
    top = x.amax(1)
    impossible = top == NEG_INF
    factor = torch.where(impossible, 0.0, (top - log_total).exp_() / out.amax(1))
    if _any(impossible):
        out.masked_fill_(impossible.unsqueeze(1), 0.0)
    out.mul_(factor.unsqueeze(1))


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


def _load(x: Tensor, index: Tensor | None, buffer: Tensor) -> Tensor:
    """The rows `x`, or `x[index]`, in the buffer's dtype: in the buffer, unless they can be read where they lie."""
    if index is None:
        return x if x.dtype == buffer.dtype else buffer.copy_(x)
    return torch.index_select(x, 0, index, out=buffer) if x.dtype == buffer.dtype else buffer.copy_(x[index])


def _centred(x: Tensor, top: Tensor, scale: float, out: Tensor) -> Tensor:
    """`scale * (x - top)` in `out`."""
    centred = torch.sub(x, _finite(top).unsqueeze(1), out=out)
    return centred if scale == 1.0 else centred.mul_(scale)


def _blocks(x: Tensor) -> Iterator[tuple[int, int]]:
    n, size = x.shape
    step = max(1, BLOCK_ELEMENTS // max(size, 1))
    return ((start, min(start + step, n)) for start in range(0, n, step))


def _finite(x: Tensor) -> Tensor:
    """0 for -inf, so that -inf - x stays -inf."""
    return torch.where(x == NEG_INF, 0.0, x)


def _any(mask: Tensor) -> bool:
    """Whether any row needs another path; free on a CPU. (Memory accounting on fake tensors answers False.)"""
    return bool(mask.any())
