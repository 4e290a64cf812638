"""What the kernels share: logits relative to their row's maximum, and sums of their exponentials, kept per lane.

A lane is one position of the tile: it meets the columns `lane, lane + BLOCK_V, ...` and keeps a maximum and a sum of
its own, so the loops over the vocabulary hold no reduction across threads; the lanes are joined once.

Sums leave out the maximum's own term, which is 1: beside it the terms of a row that is sure of one token (1e-3 to 1e-9)
would lose their digits.
"""

import triton
import triton.language as tl

# A maximum before anything was seen. Finite: -inf - (-inf) is NaN, and -inf is a legal logit.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def load_logits(x_ptr, offs_v, n_cols, MASKED: tl.constexpr, ACC: tl.constexpr):
    """Logits in ACC; -inf, which weighs nothing, outside the row.

    Tiles that lie inside the row are loaded without a mask: one compared with an odd `n_cols` is not provably
    constant over 128 bits, and would be loaded an element at a time.
    """
    if MASKED:
        x = tl.load(x_ptr + offs_v, mask=offs_v < n_cols, other=float("-inf"))
    else:
        x = tl.load(x_ptr + offs_v)
    return x.to(ACC)


@triton.jit
def capped(x, inner):
    """tanh(inner * x) to a few units in its last place, the softcap; `x` itself without `inner`. -inf stays -inf.

    A rational function below 0.625 (S. Moshier, Cephes, tanh.c), where 1 - 2 / (exp(2 |x|) + 1) loses its digits.
    """
    if inner is not None:
        y = x * inner
        square = y * y
        above = (-9.64399179425052238628e-1 * square - 9.92877231001918586564e1) * square - 1.61468768441708447952e3
        below = ((square + 1.12811678491632931402e2) * square + 2.23548839060100448583e3) * square
        small = y + y * (square * (above / (below + 4.84406305325125486048e3)))
        large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(y)) + 1.0)
        y = tl.where(tl.abs(y) < 0.625, small, tl.where(y < 0, -large, large))
        x = tl.where(x == float("-inf"), float("-inf"), y)
    return x


@triton.jit
def slope(x, inner):
    """1 - tanh(inner * x)^2, all its digits also where tanh is near 1: with y = 1 / (exp(2 |x|) + 1), 4 y (1 - y)."""
    y = 1.0 / (tl.exp(2.0 * tl.abs(x * inner)) + 1.0)
    return 4.0 * y * (1.0 - y)


@triton.jit
def full_scale(high, low, ACC: tl.constexpr):
    """A float64 number that came as two float32 (Triton has no other kind of float argument)."""
    return tl.full([], high, ACC) + tl.full([], low, ACC)


@triton.jit
def log_prob(x, top, log_total, scale):
    """The log-probability of a logit; exact at any common offset, because the maximum is taken off first."""
    return (x - top) * scale - log_total


@triton.jit
def tie_ramp(log_q, log_p, smaller, TIE: tl.constexpr):
    """The derivative of min(p, q) with respect to q: 1 where q < p, 0 where q > p, and between them a ramp of half
    width TIE in log p - log q, which rounding cannot flip. `smaller` is the smaller of the two."""
    difference = tl.where(smaller == float("-inf"), 0.0, log_p - log_q)  # both -inf: their difference is NaN
    return 0.5 + 0.5 * tl.minimum(tl.maximum(difference * (1.0 / TIE), -1.0), 1.0)


@triton.jit
def log_mixture(log_q, log_pt, beta):
    """`(log(m / q), log(m / pt))` of m = beta pt + (1 - beta) q. Where a probability is 0, its own may be infinite.

    With d = log pt - log q: log1p(b expm1(-|d|)), where b is the share of the smaller of pt and q; plus max(d, 0) for
    q, or max(-d, 0) for pt.
    """
    neither = (log_q == float("-inf")) & (log_pt == float("-inf"))
    d = tl.where(neither, 0.0, log_pt - log_q)
    larger = log1p(tl.where(d < 0, beta, 1.0 - beta) * expm1(-tl.abs(d)))
    return larger + tl.maximum(d, 0.0), larger - tl.minimum(d, 0.0)


@triton.jit
def update(top, rest, x, scale):
    """One more `x` per lane: `(top, rest, bigger)`; rest = the sum of exp(scale * (x - top)) but for the maximum's own.

    One exp serves both cases: exp(-scale * |x - top|) rescales the sum and is the old maximum's term where x is the
    bigger, else it is the new term.
    """
    bigger = x > top
    step = tl.exp(-tl.abs(x - top) * scale)
    return tl.where(bigger, x, top), tl.where(bigger, rest * step, rest) + step, bigger


@triton.jit
def update_argmax(top, rest, at, x, start, scale):
    """`update`, with the start of the first tile in which each lane met its maximum."""
    top, rest, bigger = update(top, rest, x, scale)
    return top, rest, tl.where(bigger, start, at)


@triton.jit
def join(top, rest, at, lanes, scale):
    """The lanes joined: `(maximum, rest, lowest column of the maximum)`; LOWEST, and no more, where nothing had weight.

    NaN logits are no maximum; they are in the rest.
    """
    highest = tl.max(top, 0)
    column = tl.min(tl.where(top == highest, at + lanes, 2147483647), 0)
    own = tl.where((at + lanes == column) | (top <= LOWEST), 0.0, 1.0).to(rest.dtype)
    return highest, tl.sum((own + rest) * tl.exp((top - highest) * scale), 0), column


@triton.jit
def log1p(x):
    """log(1 + x) with all digits of a small x (W. Kahan's correction of what 1 + x rounds away)."""
    u = 1.0 + x
    exact = (u - 1.0 == 0.0) | (u == float("inf"))
    return tl.where(exact, tl.where(u == float("inf"), u, x), tl.log(u) * (x / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1 of x <= 0 with all digits of a small x (likewise)."""
    u = tl.exp(x)
    log_u = tl.log(u)
    simple = (u == 1.0) | (u == 0.0)
    return tl.where(simple, tl.where(u == 0.0, -1.0, x), (u - 1.0) * (x / tl.where(simple, 1.0, log_u)))
