"""Targets from logits in hand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .. import checks
from ..impls import IMPLS, row_ops
from ..opaque import opaque
from ..rows.interface import Normalizer, Transform, accumulation_dtype
from .tiles import Made, Tiles
from .vocab import DraftVocab, check_vocab


class LogitsTiles(Tiles):
    """Logits in hand, `[N, V]`. With `target_ids` `[V_draft]`, these columns of a larger vocabulary are wanted."""

    kind = "logits"

    def __init__(self, tensors: Sequence[Tensor], vocab_size: int) -> None:
        super().__init__(tensors, vocab_size, tensors[0].dtype)
        self.logits, *target_ids = tensors
        self.target_ids = target_ids[0] if target_ids else None
        self.in_place = self.target_ids is None and self.logits.stride(-1) == 1

    def view(self, rows: slice, columns: slice) -> Tensor:
        return self.logits[rows, columns]

    def write(self, t: Tensor, rows: slice | Tensor, columns: slice) -> None:
        if self.target_ids is None:
            t.copy_(self.logits[rows, columns])
        elif isinstance(rows, slice):
            torch.index_select(self.logits[rows], 1, self.target_ids[columns], out=t)
        else:  # One index for both dimensions makes no copy of full rows.
            t.copy_(self.logits[rows.unsqueeze(1), self.target_ids[columns]])


def of_logits(logits: Tensor, vocab: DraftVocab | None, transform: Transform, impl: str) -> Made:
    """The target of `Target.from_logits`."""
    checks.choice("impl", impl, IMPLS)
    checks.tensor("logits", logits, min_ndim=1, dtypes=checks.FLOATS)
    checks.is_constant("logits", logits)
    checks.not_empty("logits", logits, vocabulary=-1)
    checks.finite_rows("logits", logits, logits=True)
    check_vocab(vocab, logits.shape[-1], "logits")
    shape, rows, scale = logits.shape[:-1], logits.detach().reshape(-1, logits.shape[-1]), transform.scale
    if vocab is None:
        tiles = LogitsTiles((rows,), rows.shape[1])
        return Made(tiles, shape, None, find=partial(stream_logits, rows, None, scale, impl))
    vocab = vocab.to(logits.device)
    lse, argmax, log_mass = stream_logits(rows, vocab.t2d, scale, impl)
    tiles = LogitsTiles((rows, vocab.target_ids), vocab.draft_size)
    full = LogitsTiles((rows,), vocab.target_size)
    return Made(tiles, shape, vocab, Normalizer(log_mass, True, 0.0), lse, argmax, full=full)


@opaque("(Tensor logits, Tensor? t2d, float scale, str impl) -> (Tensor, Tensor, Tensor)")
def stream_logits(logits: Tensor, t2d: Tensor | None, scale: float, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """`(logsumexp(scale * logits), argmax, log_mass)` of each row `[N]`; the lowest index where a maximum is shared.

    `log_mass` is the log of the share of softmax(scale * logits) inside `t2d` (bool `[V]`). It is empty without one.
    It comes from the very logits of the logsumexp, so that p never sums to more than 1.
    """
    lse, argmax, log_mass = unwritten(logits, t2d)
    row_ops(impl, logits.device).lse_argmax(
        logits, Transform(scale), t2d, lse, None if t2d is None else log_mass, argmax
    )
    return lse, argmax, log_mass


@stream_logits.register_fake
def _(logits: Tensor, t2d: Tensor | None, scale: float, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    return unwritten(logits, t2d)


def unwritten(x: Tensor, t2d: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten results of a pass over the rows of `x`: logsumexp, argmax and log_mass."""
    n, acc = x.shape[0], accumulation_dtype(x)
    lse, argmax = x.new_empty(n, dtype=acc), x.new_empty(n, dtype=torch.long)
    return lse, argmax, x.new_empty(0 if t2d is None else n, dtype=acc)
