"""The row operations in plain PyTorch; see `rows.interface` for the formulas and names.

On a CPU, exp and the cache set the pace. So rows go in blocks of `BLOCK_ELEMENTS`, and alpha is made in linear space,
where `torch.softmax` does exp, sum and division in one pass. Rows that linear space cannot hold are done again in log
space: those where p and q are almost disjoint, or where KL is infinite.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .interface import MEASURED, NEG_INF, LogitRows, RowLoss, RowStats, Transform, accumulation_dtype, tie_width
from .terms import SMALLEST_LINEAR, TERM_OF, any_row, finite, num_buffers, pick

# Elements of one block of rows. 2**20 float32 are 4 MiB a buffer, 24 MiB a block. Larger ones fall out of a server's
# shared cache, smaller ones pay more for dispatch. V = 32,000, 2 threads, at 2**18, 2**19, 2**20, 2**21: AMD EPYC 2.1,
# 1.7, 1.8 ns an element of statistics; Intel Xeon (AVX-512) 527, 489, 429, 451 ms for one pass over 1,024 x 256.
# Those are of the terms of every call; with further terms a block has fewer rows.
BLOCK_ELEMENTS = 2**20
LSE_BUFFERS = 3  # of a block of `lse_argmax`

# Finite stand-in for -inf in log p - log q, where the factor pt is exactly zero: 0 * -1e30 = 0, but 0 * -inf = nan.
FLOOR = -1e30


def lse_argmax(
    x: Tensor, transform: Transform, inside: Tensor | None, lse: Tensor, log_mass: Tensor | None, argmax: Tensor
) -> None:
    """Write logsumexp(s), and the lowest index of the maximum, of each row of `x` `[n, V]`, with s = `transform` of x.

    With `inside` (bool `[V]`), also write `log_mass` = log sum of softmax(s) over the columns inside. It comes from
    both sums, inside and outside, so that a share near 1 keeps the digits of what it lacks.
    """
    acc, scale, inner = accumulation_dtype(x), transform.scale, transform.inner
    for start, stop in _blocks(x, LSE_BUFFERS):
        own = torch.empty_like(x[start:stop], dtype=acc)
        row = _capped(_load(x[start:stop], None, own), inner, own)
        top, at = _argmax(row)
        argmax[start:stop] = at
        row = _centred(row, top, scale, own)
        probs = torch.softmax(row, 1)
        lse[start:stop] = torch.where(top == NEG_INF, top, scale * top - pick(probs, at).log())
        if inside is not None and log_mass is not None:
            log_mass[start:stop] = _log_mass(row, probs, inside)


def _log_mass(row: Tensor, probs: Tensor, inside: Tensor) -> Tensor:
    """The log of the share of `probs` = softmax(row) in the columns `inside`. A row of -inf alone has no such share."""
    share = (probs * inside).sum(1)
    mass = -torch.log1p((probs * ~inside).sum(1) / share)
    few = share < SMALLEST_LINEAR
    if any_row(few):
        some = row[few]
        mass[few] = some[:, inside].logsumexp(1) - some.logsumexp(1)
    return mass


def stats(rows: LogitRows, terms: tuple[str, ...], out: RowStats) -> None:
    """Write the statistics of whole rows into `out`."""
    for block in _blocks_of(rows, terms, out):
        block.statistics()


def stats_and_gradient(
    rows: LogitRows, terms: tuple[str, ...], out: RowStats, loss: RowLoss, gradient_out: Tensor
) -> None:
    """`stats`, then `gradient` of `loss`, from the same exponentials."""
    for block in _blocks_of(rows, terms, out):
        block.statistics()
        d_values = loss.rows(block.start, block.stop).d_values(block.out.values)
        factors = _Factors.of(block.rows, terms, block.out, d_values)
        block.gradient(factors, gradient_out[block.start : block.stop])


def gradient(rows: LogitRows, terms: tuple[str, ...], stats: RowStats, d_values: Tensor, gradient_out: Tensor) -> None:
    """Write the gradient with respect to `rows.z` into `gradient_out`, which may be `rows.z` itself.

    `rows` may be any block of columns of the rows that `stats` describes; `d_values` `[T, n]` are the derivatives with
    respect to the terms.
    """
    factors = _Factors.of(rows, terms, stats, d_values)
    for block in _blocks_of(rows, terms, stats):
        block.centre()
        block.gradient(factors.rows(block.start, block.stop), gradient_out[block.start : block.stop])


class _Factors(NamedTuple):
    """What a gradient needs per row. It is made once a call, because so many small operations take 0.2 ms."""

    numbers: Tensor  # [2 + T, n]: the factor of q, the gradient in the column of q's maximum, the factors of the terms
    columns: Tensor  # int64 [2, n], that column, and the label's, counted in this block of columns
    inside: Tensor  # bool [2, n], whether they lie there

    @classmethod
    def of(cls, rows: LogitRows, terms: tuple[str, ...], stats: RowStats, d_values: Tensor) -> _Factors:
        d_values = torch.where(stats.supported(), d_values * rows.z_transform.gain, 0.0)
        sigma, top = (stats.saved * d_values).sum(1)
        of_terms = [TERM_OF[name].factor(*x) for name, *x in zip(terms, stats.values, d_values, strict=True)]
        label = stats.target_argmax if rows.labels is None else rows.labels
        columns = torch.stack([stats.draft_argmax, stats.draft_argmax if label is None else label]) - rows.first_column
        inside = (columns >= 0) & (columns < rows.z.shape[1])
        return cls(torch.stack([sigma.neg(), top, *of_terms]), torch.where(inside, columns, 0), inside)

    def rows(self, start: int, stop: int) -> _Factors:
        return _Factors._make(x.narrow(-1, start, stop - start) for x in self)


def _blocks_of(rows: LogitRows, terms: tuple[str, ...], stats: RowStats) -> Iterator[_Block]:
    """The blocks of a call. They share buffers: fresh pages cost more time than what is written to them."""
    buffers: list[Tensor] = []
    count = num_buffers(terms)
    for start, stop in _blocks(rows.z, count):
        if not buffers:  # the first block is the largest
            buffers = [stats.base.new_empty(stop - start, rows.z.shape[1]) for _ in range(count)]
        yield _Block(rows, terms, stats, start, stop, [x[: stop - start] for x in buffers])


class _Block:
    """A block of rows in the accumulation dtype, small enough for its buffers to stay in cache.

    `z` and `t` are the logits in that dtype, where they lie or in a buffer. `centre` makes them relative to their row's
    maximum. After it, `unsupported` is bool `[b]`, or None without such rows. `log_mass` `[b]` is None where p is pt.
    """

    def __init__(
        self, rows: LogitRows, terms: tuple[str, ...], stats: RowStats, start: int, stop: int, buffers: list[Tensor]
    ) -> None:
        self.rows, self.out, self.start, self.stop = rows.rows(start, stop), stats.rows(start, stop), start, stop
        self.of_z, self.of_t, self.of_q, self.of_pt, self.of_ratio, *of_terms = buffers
        self.tie = tie_width(self.of_z.dtype)
        self.z_top, self.z_log_total, self.t_top, self.t_log_total, mass = self.out.base.unbind(0)
        self.log_mass: Tensor | None = mass
        self.z = _capped(_load(self.rows.z, None, self.of_z), self.rows.z_transform.inner, self.of_z)
        t = _load(self.rows.t, self.rows.t_index, self.of_t)
        self.t = _capped(t, self.rows.t_transform.inner, self.of_t)
        self.terms = []
        for name, value, sigma, top in zip(terms, self.out.values, *self.out.saved, strict=True):
            term = TERM_OF[name]
            self.terms.append(term(value, sigma, top, [of_terms.pop() for _ in range(term.num_buffers)]))

    def statistics(self) -> None:
        """Write the statistics."""
        out = self.out
        z_top, z_at = _argmax(self.z)
        t_top, t_at = _argmax(self.t)
        self.z_top.copy_(z_top)
        self.t_top.copy_(t_top)
        out.draft_argmax.copy_(z_at)
        if out.target_argmax is not None:
            out.target_argmax.copy_(t_at)
        self.centre()
        self.q = torch.softmax(self.z, 1, out=self.of_q)
        self.pt = torch.softmax(self.t, 1, out=self.of_pt)
        if self.unsupported is not None:
            self.pt.masked_fill_(self.unsupported.unsqueeze(1), 0.0)
        self.q_top, self.q_rest = _top_and_rest(self.q, z_at)
        self.z_log_total.copy_(_log_total(self.q_top, self.q_rest))
        self.t_log_total.copy_(_log_total(*_top_and_rest(self.pt, t_at)))
        if self.unsupported is not None:
            self.t_log_total.masked_fill_(self.unsupported, 0.0)
        self.log_mass = self._mass(out.log_mass)

        # In the column of q's maximum, 1 - q and 1 - p keep the digits that q and p have lost.
        self.column = z_at.unsqueeze(1)
        self.label = t_at if self.rows.labels is None else self.rows.labels
        self.log_pt_top = pick(self.t, z_at) - self.t_log_total
        for term in self.terms:
            term.statistics(self)
        # NaN of either side or of the normaliser has to reach all terms; FLOOR hides it, and KL uses no normaliser.
        broken = self.z_log_total + self.t_log_total
        broken = (broken if self.log_mass is None else broken + self.log_mass).isnan()
        out.values.masked_fill_(broken, float("nan"))
        out.saved.masked_fill_(broken, float("nan"))
        if self.unsupported is not None:
            out.saved.masked_fill_(self.unsupported, 0.0)
            for term in self.terms:
                term.value.masked_fill_(self.unsupported, term.without_answer)

    def gradient(self, factors: _Factors, gradient_out: Tensor) -> None:
        """Write the gradient. Nothing of q is left then."""
        of_q, top, *of_terms = factors.numbers.unsqueeze(2)
        columns = [(term.columns(self), d) for term, d in zip(self.terms, of_terms, strict=True)]
        dense = [(x, d) for x, d in columns if x is not None]
        total = self.q.mul_(of_q)
        for x, d in dense[:-1]:
            total.addcmul_(x, d)
        into = gradient_out if dense and gradient_out.dtype == total.dtype else total
        inner = self.rows.z_transform.inner
        # Before the gradient is written, perhaps over the logits. Nobody needs the centred ones any more.
        of_cap = None if inner is None else _slope(_load(self.rows.z, None, self.of_z), inner, self.of_z)
        if dense:
            torch.addcmul(total, *dense[-1], out=into)
        column, label = factors.columns.unsqueeze(2)
        inside, has_label = factors.inside.unsqueeze(2)
        for x, d in columns:
            if x is None:
                into.scatter_add_(1, label, torch.where(has_label, d, 0.0))
        into.scatter_(1, column, torch.where(inside, top, into.gather(1, column)))
        if of_cap is not None:
            into.mul_(of_cap)
        if self.unsupported is not None:
            into.masked_fill_(self.unsupported.unsqueeze(1), 0.0)
        if into is total:
            gradient_out.copy_(total)

    def centre(self) -> None:
        """Take each row's maximum off its logits, and scale them. This is exact, whatever their common offset."""
        self.unsupported: Tensor | None = self.t_top == NEG_INF
        if not any_row(self.unsupported):
            self.unsupported = None
        self.z = _centred(self.z, self.z_top, self.rows.z_transform.scale, self.of_z)
        self.t = _centred(self.t, self.t_top, self.rows.t_transform.scale, self.of_t)

    @cached_property
    def q(self) -> Tensor:
        return _exp_minus(self.z, self.z_log_total, self.of_q)

    @cached_property
    def pt(self) -> Tensor:
        return _exp_minus(self.t, self.t_log_total, self.of_pt)

    @cached_property
    def log_ratio(self) -> Tensor:
        """log pt - log q. It is finite where pt is 0, and +inf where only q is 0."""
        ratio = torch.sub(self.t, self.z, out=self.of_ratio)
        ratio.add_((self.z_log_total - self.t_log_total).unsqueeze(1))
        return ratio.nan_to_num_(nan=FLOOR, posinf=float("inf"), neginf=FLOOR)

    def log_probs(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log q, log p and log pt of some rows."""
        log_q = self.z[rows] - self.z_log_total[rows].unsqueeze(1)
        log_pt = self.t[rows] - self.t_log_total[rows].unsqueeze(1)
        return log_q, log_pt if self.log_mass is None else log_pt + self.log_mass[rows].unsqueeze(1), log_pt

    def some(self, careful: Tensor) -> Tensor | None:
        """The indices of the rows that `careful` marks and that have an answer, if there are any."""
        if self.unsupported is not None:
            careful = careful & ~self.unsupported
        return careful.nonzero().squeeze(1) if any_row(careful) else None

    def _mass(self, out: Tensor) -> Tensor | None:
        """log_mass as the formulas use it: NaN where the normaliser makes no sense. `out` keeps the number itself."""
        normalizer = self.rows.normalizer
        if normalizer is None:
            out.zero_()
            return None
        given, t_scale = normalizer.value.to(out.dtype), self.rows.t_transform.scale
        out.copy_(given if normalizer.is_mass else (t_scale * self.t_top - given) + self.t_log_total)
        if self.unsupported is not None:
            out.masked_fill_(self.unsupported, 0.0)
        if normalizer.is_mass:
            return out
        return out.masked_fill(out > normalizer.most_log_mass(given, self.t_top, t_scale), float("nan"))


def _top_and_rest(probs: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probability of each row, and the sum of all others.

    Where the largest is near 1, the others are added up, because 1 - top has lost its digits. Elsewhere the sum is
    1 - top, because `probs` sum to 1 only up to rounding.
    """
    top = pick(probs, at)
    if not any_row(top > 0.5):
        return top, 1 - top
    at = at.unsqueeze(1)
    rest = probs.scatter_(1, at, 0.0).sum(1)
    probs.scatter_(1, at, top.unsqueeze(1))
    return top, torch.where(top > 0.5, rest, 1 - top)


def _log_total(top: Tensor, rest: Tensor) -> Tensor:
    """-log of the largest probability."""
    return torch.where(rest < 0.5, -torch.log1p(-rest), -top.log())


def _exp_minus(x: Tensor, log_total: Tensor, out: Tensor) -> Tensor:
    """exp(x - log_total), in `out`: `x` are any columns, relative to their row's maximum, whose `log_total` is `[b]`.

    As softmax(x) * exp(logsumexp(x) - log_total): `torch.softmax` takes max, exp, sum and quotient in less time than
    `torch.exp` alone (0.38 against 0.60 ns an element; AMD EPYC, one thread), and the sum's rounding cancels.
    """
    torch.softmax(x, 1, out=out)
    top = x.amax(1)
    impossible = top == NEG_INF
    factor = torch.where(impossible, 0.0, (top - log_total).exp_() / out.amax(1))
    if any_row(impossible):
        out.masked_fill_(impossible.unsqueeze(1), 0.0)
    return out.mul_(factor.unsqueeze(1))


def _argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each row, and the lowest index that has it.

    `torch.argmax` is not vectorised on the CPU. The maxima of groups of 128 columns, and an argmax over those, are ten
    times faster at V = 32,000.
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
    """The rows `x`, or `x[index]`, in the buffer's dtype. They stay where they lie if they can be read there."""
    if index is None:
        return x if x.dtype == buffer.dtype else buffer.copy_(x)
    return torch.index_select(x, 0, index, out=buffer) if x.dtype == buffer.dtype else buffer.copy_(x[index])


def _capped(z: Tensor, inner: float | None, out: Tensor) -> Tensor:
    """f(z): tanh(inner * z) in `out`, which may be `z`; `z` itself without a cap."""
    if inner is None:
        return z
    impossible = z == NEG_INF
    return torch.mul(z, inner, out=out).tanh_().masked_fill_(impossible, NEG_INF)


def _slope(z: Tensor, inner: float, out: Tensor) -> Tensor:
    """1 - tanh(inner * z)^2 in `out`, as 1 / cosh^2. This keeps its digits where tanh is near 1."""
    return torch.mul(z, inner, out=out).cosh_().square_().reciprocal_()


def _centred(x: Tensor, top: Tensor, scale: float, out: Tensor) -> Tensor:
    """`scale * (x - top)` in `out`."""
    centred = torch.sub(x, finite(top).unsqueeze(1), out=out)
    return centred if scale == 1.0 else centred.mul_(scale)


def rows_of_a_block(size: int, buffers: int) -> int:
    """Rows of `size` columns: fewer with further terms, so that a mix of them holds no more than each alone."""
    usual = num_buffers(MEASURED)
    return max(1, BLOCK_ELEMENTS * usual // (max(usual, buffers) * max(size, 1)))


def _blocks(x: Tensor, buffers: int) -> Iterator[tuple[int, int]]:
    n, step = x.shape[0], rows_of_a_block(x.shape[1], buffers)
    return ((start, min(start + step, n)) for start in range(0, n, step))
