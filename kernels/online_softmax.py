"""What the kernels share: log-probabilities of a tile of logits, and a logsumexp that is kept per lane.

A lane is one position of the tile: it meets the columns `lane, lane + BLOCK_V, ...` and keeps a maximum and a sum of
its own, so the loops over the vocabulary hold no reduction across threads; `logsumexp` joins the lanes once.
"""

import triton
import triton.language as tl

# A maximum before anything was seen. Finite: -inf - (-inf) is NaN, and -inf is a legal logit.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def load_logits(x_ptr, offs_v, n_cols, scale, MASKED: tl.constexpr):
    """`scale * x` in the dtype of `scale`; -inf, which weighs nothing, outside the row.

    Tiles that lie inside the row are loaded without a mask: one compared with an odd `n_cols` is not provably
    constant over 128 bits, and would be loaded an element at a time.
    """
    if MASKED:
        x = tl.load(x_ptr + offs_v, mask=offs_v < n_cols, other=float("-inf"))
    else:
        x = tl.load(x_ptr + offs_v)
    return x.to(scale.dtype) * scale


@triton.jit
def full_scale(high, low, ACC: tl.constexpr):
    """A float64 number that came as two float32 (Triton has no other kind of float argument)."""
    return tl.full([], high, ACC) + tl.full([], low, ACC)


@triton.jit
def log_probs(z, t, draft_lse, log_normalizer):
    """log q and log p. The only place where they are computed: ties have to be bitwise the same in every kernel."""
    return z - draft_lse, t - log_normalizer


@triton.jit
def acceptance_weight(log_q, log_p):
    """The derivative of min(p, q) with respect to q: 1 where q < p, 1/2 where they are equal, else 0."""
    return tl.where(log_q < log_p, 1.0, tl.where(log_q == log_p, 0.5, 0.0)).to(log_q.dtype)


@triton.jit
def update(top, total, x):
    """One more `x` per lane: `(top, total, step, bigger)`, total = sum exp(x - top).

    One exp serves both cases: step = exp(-|x - top|) rescales the sum where x is the bigger, else it is the new term.
    """
    bigger = x > top
    step = tl.exp(-tl.abs(x - top))
    return tl.where(bigger, x, top), tl.where(bigger, total * step + 1.0, total + step), step, bigger


@triton.jit
def update_argmax(top, total, at, x, start):
    """`update`, with the start of the first tile in which each lane met its maximum."""
    top, total, _, bigger = update(top, total, x)
    return top, total, tl.where(bigger, start, at)


@triton.jit
def logsumexp(top, total):
    """The lanes joined; -inf where nothing had weight."""
    highest = tl.max(top, 0)
    return highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))


@triton.jit
def argmax(top, at, lanes):
    """The lowest column that has the maximum of all lanes."""
    first = tl.where(top == tl.max(top, 0), at + lanes, 2147483647)
    return tl.min(first, 0)
