"""The terms in plain PyTorch: what each computes on a block of rows; see `rows.interface` for formulas and names.

`block` is `rows.plain`'s block: the centred logits z and t `[b, V]`, q, pt and log pt - log q, made when they are asked
for, and numbers per row `[b]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .interface import NEG_INF

# Below this alpha a float32 sum of min(p, q) has lost terms to underflow; log space takes over.
SMALLEST_LINEAR = 1e-20


@dataclass
class _Term:
    """A term on a block of rows: its results `[b]`, and `num_buffers` buffers `[b, V]`.

    `statistics` writes the results. `factor(value, d) * columns(block)` is d * c, what the term adds to the gradient
    outside the column of q's maximum. (None for columns: only at the label.) `without_answer` is the value where the
    target has no mass. A term does not hold its block: two objects that refer to each other would keep their buffers
    until Python's next collection.
    """

    num_buffers, without_answer = 1, 0.0
    value: Tensor
    sigma: Tensor
    top: Tensor
    buffers: list[Tensor]
    made: Tensor | None = field(default=None, init=False)  # the columns, where the statistics have made them

    @property
    def buffer(self) -> Tensor:
        return self.buffers[0]

    @staticmethod
    def factor(value: Tensor, d: Tensor) -> Tensor:
        return d

    def columns(self, block: Any) -> Any:
        return self.make_columns(block) if self.made is None else self.made

    def make_columns(self, block: Any) -> Any:
        raise NotImplementedError

    def finish(self, block: Any, columns: Tensor, top: Tensor) -> None:
        """Sigma, and the gradient in the column of q's maximum, where c is `top`; there `columns` becomes 0."""
        self.made = columns
        rest = columns.scatter_(1, block.column, 0.0).sum(1)
        torch.add(top, rest, out=self.sigma)
        torch.sub(top * block.q_rest, block.q_top * rest, out=self.top)


class _LogAcceptance(_Term):
    """In linear space w r = 2 w q / (2 alpha), and the columns are 2 w q. Where alpha is too small, they are w r."""

    without_answer = NEG_INF

    def statistics(self, block: Any) -> None:
        tie = block.tie
        log_q, log_p, p = -block.z_log_total, block.log_pt_top, block.pt
        if block.log_mass is not None:
            log_p = log_p + block.log_mass
            p = torch.mul(p, block.log_mass.exp().unsqueeze(1), out=self.buffer)
        w = _top_weight(log_q, log_p, tie)
        rest = torch.minimum(p, block.q, out=self.buffer).scatter_(1, block.column, 0.0).sum(1)
        top = torch.minimum(log_q, log_p)
        alpha = top.exp() + rest
        missed = (-torch.expm1(top) - rest).clamp_(min=0.0)  # 1 - alpha
        torch.where(missed < 0.5, torch.log1p(-missed), alpha.log(), out=self.value)

        self.made = self.make_columns(block)
        w_rest = self.made.scatter_(1, block.column, 0.0).sum(1).mul_(0.5)
        w_top = w * top.exp()
        torch.div(w_top + w_rest, alpha, out=self.sigma)
        torch.div(w_top * block.q_rest - block.q_top * w_rest, alpha, out=self.top)
        if (rows := block.some(alpha < SMALLEST_LINEAR)) is not None:
            # No digits are lost at the maximum: alpha is far from 1.
            log_q, log_p, _ = block.log_probs(rows)
            at, smaller = block.column[rows], torch.minimum(log_q, log_p)
            log_alpha = smaller.logsumexp(1)
            w_r = _w_r(log_q, log_p, log_alpha, tie)
            r_top = (smaller.gather(1, at) - finite(log_alpha).unsqueeze(1)).clamp_(max=0.0).exp_()
            w_r.scatter_(1, at, w[rows].unsqueeze(1) * r_top)
            self.value[rows], self.sigma[rows] = log_alpha, w_r.sum(1)
            self.top[rows] = pick(w_r, at.squeeze(1)) - self.sigma[rows] * pick(log_q, at.squeeze(1)).exp()

    def make_columns(self, block: Any) -> Tensor:
        """`2 w q` = q + ramp * q. It is exactly 0 where q > p."""
        ramp, tie = self.buffer, block.tie
        if block.log_mass is None:
            torch.clamp(block.log_ratio, -tie, tie, out=ramp)
        else:
            torch.add(block.log_ratio, block.log_mass.unsqueeze(1), out=ramp).clamp_(-tie, tie)
        return torch.addcmul(block.q, ramp, block.q, value=1 / tie, out=ramp)

    def columns(self, block: Any) -> Tensor:
        columns = super().columns(block)
        if (rows := block.some(~_is_linear(self.value))) is not None:
            log_q, log_p, _ = block.log_probs(rows)
            columns[rows] = _w_r(log_q, log_p, self.value[rows], block.tie)
        return columns

    @staticmethod
    def factor(value: Tensor, d: Tensor) -> Tensor:
        return torch.where(_is_linear(value), 0.5 * d * torch.exp(-value), d)


class _KL(_Term):
    """c = -pt, sigma = -1: the gradient is q - pt."""

    num_buffers = 0

    def statistics(self, block: Any) -> None:
        self.value_of(block)
        self.sigma.fill_(-1.0)
        torch.sub(-torch.expm1(block.log_pt_top), block.q_rest, out=self.top)  # (1 - pt) - (1 - q)

    def value_of(self, block: Any) -> None:
        product = block.log_ratio.mul_(block.pt)
        del block.log_ratio  # A term that comes later makes it again.
        torch.sum(product, 1, out=self.value)
        if (rows := block.some(~torch.isfinite(self.value))) is not None:
            # Some log q are -inf: only those count that the target may say.
            log_q, _, log_pt = block.log_probs(rows)
            pt = log_pt.exp()
            self.value[rows] = torch.where(pt == 0, 0.0, pt * (log_pt - log_q)).sum(1)

    def make_columns(self, block: Any) -> Tensor:
        return block.pt

    @staticmethod
    def factor(value: Tensor, d: Tensor) -> Tensor:
        return -d


class _SoftCE(_KL):
    """The gradient is that of KL. The centred z are at most 0, so that the value is a sum of positive numbers."""

    num_buffers = 1

    def value_of(self, block: Any) -> None:
        surprise = torch.mul(block.pt, block.z, out=self.buffer).nan_to_num_(nan=0.0, neginf=NEG_INF).sum(1)
        torch.sub(block.z_log_total, surprise, out=self.value)


class _CE(_Term):
    """c = -1 at the label. A negative label asks for nothing."""

    num_buffers = 0

    def statistics(self, block: Any) -> None:
        labelled, at_top = block.label >= 0, block.label == block.column.squeeze(1)
        log_q = pick(block.z, block.label.clamp(min=0)) - block.z_log_total
        self.value.copy_(torch.where(labelled, -log_q, 0.0))
        self.sigma.copy_(-labelled.to(log_q.dtype))
        self.top.copy_(torch.where(labelled, torch.where(at_top, -block.q_rest, block.q_top), 0.0))

    def make_columns(self, block: Any) -> None:
        return None

    @staticmethod
    def factor(value: Tensor, d: Tensor) -> Tensor:
        return -d


class _ReverseKL(_Term):
    """c = q (log q - log pt). It is infinite where q can say what p cannot; there is no gradient then."""

    def statistics(self, block: Any) -> None:
        self.finish(block, self.make_columns(block), block.q_top * (-block.z_log_total - block.log_pt_top))
        self.value.copy_(self.sigma)
        for x in (self.sigma, self.top):
            x.masked_fill_(self.value.isinf(), 0.0)

    def make_columns(self, block: Any) -> Tensor:
        ratio = torch.sub(block.z, block.t, out=self.buffer)
        ratio.add_((block.t_log_total - block.z_log_total).unsqueeze(1)).mul_(block.q)
        return ratio.nan_to_num_(nan=0.0, posinf=math.inf)  # 0 where q is 0

    def columns(self, block: Any) -> Tensor:
        columns, infinite = super().columns(block), self.value.isinf()
        return columns.masked_fill_(infinite.unsqueeze(1), 0.0) if any_row(infinite) else columns


class _JensenShannon(_Term):
    """c = (1 - beta) q log(q / m).

    With d = log pt - log q and x = -|d|, log(m / q) = l + max(d, 0) and log(m / pt) = l + max(-d, 0), where
    l = log1p(b expm1(x)), and b is the share of the smaller of pt and q in m.
    """

    num_buffers = 3

    def statistics(self, block: Any) -> None:
        beta = block.rows.jsd_beta
        columns = self.make_columns(block)
        of_top = _log_mixture(block.log_pt_top + block.z_log_total, beta)
        q_part = (beta - 1) * block.q_top * of_top[0]
        p_part = -beta * block.log_pt_top.exp() * torch.where(block.log_pt_top == NEG_INF, 0.0, of_top[1])
        self.finish(block, columns, q_part)
        of_p = self.buffer.mul_(block.pt).mul_(-beta).nan_to_num_(nan=0.0).scatter_(1, block.column, 0.0)
        torch.add(self.sigma, of_p.sum(1).add_(p_part), out=self.value)

    def make_columns(self, block: Any) -> Tensor:
        """Leaves log(m / pt) in the first buffer."""
        return self.log_mixture(block).mul_(block.q).mul_(block.rows.jsd_beta - 1).nan_to_num_(nan=0.0)

    def log_mixture(self, block: Any) -> Tensor:
        """log(m / q), and log(m / pt) in the first buffer."""
        ratio = torch.sub(block.t, block.z, out=self.buffer)
        ratio.add_((block.z_log_total - block.t_log_total).unsqueeze(1))
        ratio.nan_to_num_(nan=0.0, posinf=math.inf, neginf=NEG_INF)
        return _log_mixture(ratio, block.rows.jsd_beta, *self.buffers[1:])[0]


class _SkewedKL(_JensenShannon):
    """c = -(1 - beta) q pt / m. pt / m is at most 1 / beta; the logarithms are for the value alone."""

    def statistics(self, block: Any) -> None:
        pt_top = block.log_pt_top.exp()
        self.log_mixture(block)
        of_top = _log_mixture(block.log_pt_top + block.z_log_total, block.rows.jsd_beta)[1]
        surprise = self.buffer.mul_(block.pt).nan_to_num_(nan=0.0).scatter_(1, block.column, 0.0).sum(1)
        torch.add(surprise, pt_top * torch.where(pt_top > 0, of_top, 0.0), out=self.value).neg_()
        self.finish(block, self.make_columns(block), self.c(block, block.q_top, pt_top))

    def make_columns(self, block: Any) -> Tensor:
        return self.c(block, block.q, block.pt, self.buffer)

    @staticmethod
    def c(block: Any, q: Tensor, pt: Tensor, out: Tensor | None = None) -> Tensor:
        """m is kept a normal number. Where it would be none, -c, which is at most pt, is none, and 0 / 0 is NaN."""
        beta = block.rows.jsd_beta
        m = torch.mul(pt, beta, out=out).add_(q, alpha=1 - beta).clamp_(min=torch.finfo(q.dtype).tiny)
        return torch.div(pt, m, out=out).mul_(q).mul_(beta - 1)


class _L1(_Term):
    """c = (1 - 2 w) q, where w compares q with pt."""

    def statistics(self, block: Any) -> None:
        difference = torch.sub(block.pt, block.q, out=self.buffer).abs_().scatter_(1, block.column, 0.0).sum(1)
        of_top = (-torch.expm1(block.log_pt_top) - block.q_rest).abs_()
        torch.add(difference, of_top, out=self.value)
        w = _top_weight(-block.z_log_total, block.log_pt_top, block.tie)
        self.finish(block, self.make_columns(block), (1 - 2 * w) * block.q_top)

    def make_columns(self, block: Any) -> Tensor:
        ramp = torch.clamp(block.log_ratio, -block.tie, block.tie, out=self.buffer)
        return ramp.mul_(block.q).mul_(-1 / block.tie)


TERM_OF: dict[str, Any] = {
    "log_acceptance": _LogAcceptance,
    "kl": _KL,
    "soft_ce": _SoftCE,
    "ce": _CE,
    "rkl": _ReverseKL,
    "jsd": _JensenShannon,
    "skl": _SkewedKL,
    "l1": _L1,
}


def num_buffers(terms: tuple[str, ...]) -> int:
    """Buffers of a block: centred z and t, q, pt, log pt - log q; and those of the terms."""
    return 5 + sum(TERM_OF[name].num_buffers for name in terms)


def _log_mixture(d: Tensor, beta: float, larger: Tensor | None = None, share: Tensor | None = None) -> Any:
    """`(log(m / q), log(m / pt))` of `d` = log pt - log q, the second in `d`; two buffers for what lies between."""
    share = torch.lt(d, 0, out=torch.empty_like(d) if share is None else share)
    torch.lerp(share.new_full((), 1.0 - beta), share.new_full((), beta), share, out=share)  # exact at its ends
    larger = torch.abs(d, out=larger).neg_().expm1_().mul_(share).log1p_()
    of_q = torch.clamp(d, min=0.0, out=share).add_(larger)
    return of_q, d.clamp_(max=0.0).neg_().add_(larger)


def _is_linear(log_alpha: Tensor) -> Tensor:
    """Whether linear space holds such rows. (False for NaN.)"""
    return log_alpha > math.log(SMALLEST_LINEAR)


def _w_r(log_q: Tensor, log_p: Tensor, log_alpha: Tensor, tie: float) -> Tensor:
    """`w r`, and 0 where alpha is 0. The minimum is selected before exp, because 0 * exp(large) is not 0."""
    smaller = torch.minimum(log_q, log_p)
    log_r = torch.where(smaller == NEG_INF, NEG_INF, smaller - finite(log_alpha).unsqueeze(1))
    # Where both are -inf their difference is NaN, and r is 0.
    ramp = torch.where(smaller == NEG_INF, 0.0, log_p - log_q).clamp_(-tie, tie).div_(tie)
    return (1 + ramp).mul_(0.5).mul_(log_r.clamp_(max=0.0).exp_())


def _top_weight(log_q: Tensor, log_p: Tensor, tie: float) -> Tensor:
    """w in the column of q's maximum. Log q and log p may be near 0 there, so the ramp is relative to their size."""
    width = torch.maximum(log_q.abs(), log_p.abs()).mul_(tie).clamp_(min=torch.finfo(log_q.dtype).tiny)
    ramp = torch.where(log_p == NEG_INF, -1.0, (log_p - log_q) / width)
    return ramp.clamp_(-1, 1).add_(1).mul_(0.5)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """`x[i, index[i]]`."""
    return x.gather(1, index.unsqueeze(1)).squeeze(1)


def finite(x: Tensor) -> Tensor:
    """0 for -inf, so that -inf - x stays -inf."""
    return torch.where(x == NEG_INF, 0.0, x)


def any_row(mask: Tensor) -> bool:
    """Whether any row needs another path. This costs nothing on a CPU. (Accounting on fake tensors answers False.)"""
    return bool(mask.any())
