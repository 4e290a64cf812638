"""Targets from their k best tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..rows.interface import NEG_INF, accumulation_dtype
from .probs import are_probs, zero_normalizer
from .tiles import Made, Tiles
from .vocab import DraftVocab


class TopKTiles(Tiles):
    """Log-probabilities `[N, k]` of draft tokens `[N, k]` (-1: not in the draft vocabulary). Other tokens have -inf."""

    kind = "topk"

    def __init__(self, tensors: Sequence[Tensor], vocab_size: int) -> None:
        self.log_probs, self.draft_ids = tensors
        super().__init__(tensors, vocab_size, accumulation_dtype(self.log_probs))

    def write(self, t: Tensor, rows: slice | Tensor, columns: slice) -> None:
        ids = self.draft_ids[rows] - columns.start
        inside = (ids >= 0) & (ids < columns.stop - columns.start)
        # The maximum with -inf changes nothing, so all ids outside the tile can go to column 0.
        values = torch.where(inside, self.log_probs[rows].to(t.dtype), NEG_INF)
        t.fill_(NEG_INF).scatter_reduce_(1, torch.where(inside, ids, 0), values, "amax")


def of_topk(token_ids: Tensor, log_probs: Tensor, vocab: DraftVocab | int) -> Made:
    """The target of `Target.from_topk`."""
    checks.tensor("token_ids", token_ids, min_ndim=1, dtypes=[torch.int64, torch.int32])
    checks.tensor("log_probs", log_probs, min_ndim=1, dtypes=checks.FLOATS)
    checks.shape("log_probs", log_probs, tuple(token_ids.shape), "the shape of token_ids")
    checks.same_device(token_ids.device, log_probs=log_probs)
    checks.is_constant("log_probs", log_probs)
    if isinstance(vocab, DraftVocab):
        draft_vocab, draft_size, target_size = vocab.to(token_ids.device), vocab.draft_size, vocab.target_size
    else:
        expected = "vocab to be a DraftVocab, or the size of a shared vocabulary (a positive int)"
        remedy = "Pass DraftVocab(t2d), or the size."
        draft_vocab, draft_size = None, checks.integer("vocab", vocab, expected=expected, remedy=remedy)
        target_size = draft_size
    if token_ids.shape[-1] == 0:
        checks.fail("at least one token per row", token_ids, "Pass the target's k >= 1 best tokens.")
    if checks.checks_contents(token_ids):
        ordered = token_ids.long().sort(-1).values
        outside = ((ordered < 0) | (ordered >= target_size)).any()
        outside, repeated = torch.stack([outside, (ordered.diff(dim=-1) == 0).any()]).tolist()
        if outside:
            checks.fail(f"token_ids in [0, {target_size})", "ids outside", "They are ids of the target vocabulary.")
        if repeated:
            checks.fail("each token id once per row", "a repeated id", "Merge or drop repeated entries.")
    if checks.checks_contents(log_probs, only_if_asked=True):
        good = are_probs(log_probs.amax(-1) <= 1e-3, log_probs.exp())
        checks.all_rows("log_probs", good, "of entries <= 0 whose exponentials sum to at most 1")
    ids = token_ids.reshape(-1, token_ids.shape[-1]).long()
    rows = log_probs.detach().reshape(ids.shape)
    draft_ids = ids if draft_vocab is None else draft_vocab.draft_ids[ids]
    argmax, zero = ids.gather(1, rows.argmax(1, keepdim=True)).squeeze(1), zero_normalizer(rows)
    return Made(TopKTiles((rows, draft_ids), draft_size), token_ids.shape[:-1], draft_vocab, zero, zero.value, argmax)
