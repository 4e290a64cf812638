"""Targets from probabilities on the draft vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .. import checks
from ..rows.interface import Normalizer, accumulation_dtype
from .tiles import Made, Tiles, flat_ids
from .vocab import DraftVocab, check_vocab


class ProbsTiles(Tiles):
    """Probabilities `[N, V]`. A tile holds log p in the accumulation dtype, because half precision has too few digits
    for a logarithm."""

    kind = "probs"

    def __init__(self, tensors: Sequence[Tensor], vocab_size: int) -> None:
        (self.probs,) = tensors
        super().__init__(tensors, vocab_size, accumulation_dtype(self.probs))

    def write(self, t: Tensor, rows: slice | Tensor, columns: slice) -> None:
        t.copy_(self.probs[rows, columns]).log_()


def of_probs(probs: Tensor, vocab: DraftVocab | None, token_ids: Tensor | None) -> Made:
    """The target of `Target.from_probs`."""
    checks.tensor("probs", probs, min_ndim=1, dtypes=checks.FLOATS)
    checks.is_constant("probs", probs)
    checks.not_empty("probs", probs, vocabulary=-1)
    check_vocab(vocab)
    size = target_size = probs.shape[-1]
    if vocab is not None:
        vocab, target_size = vocab.to(probs.device), vocab.target_size
        if size != vocab.draft_size:
            expected = f"probs with last dimension {vocab.draft_size}, the draft vocabulary"
            checks.fail(expected, probs, "Select probs[..., vocab.t2d].")
    if checks.checks_contents(probs, only_if_asked=True):
        checks.all_rows("probs", are_probs(probs.amin(-1) >= 0, probs), "of entries >= 0 that sum to at most 1")
    rows = probs.detach().reshape(-1, size)
    zero, ids = zero_normalizer(rows), flat_ids(token_ids, probs, target_size)
    find = partial(_find, zero.value, rows, vocab)
    num_ranked = None if vocab is None else 0  # a token outside the draft vocabulary may be likelier than all inside
    tiles = ProbsTiles((rows,), size)
    return Made(tiles, probs.shape[:-1], vocab, zero, zero.value, ids, find, num_ranked=num_ranked)


def _find(log_normalizer: Tensor, probs: Tensor, vocab: DraftVocab | None) -> tuple[Tensor, Tensor]:
    argmax = probs.argmax(-1)
    return log_normalizer, argmax if vocab is None else vocab.target_ids[argmax]


def are_probs(in_range: Tensor, probs: Tensor) -> Tensor:
    """bool per row: `in_range` (which NaN is not), with a sum of at most 1, to the rounding of the dtype."""
    tolerance = 1e-3 if probs.element_size() > 2 else 1e-2
    sums = probs.sum(-1, dtype=torch.promote_types(probs.dtype, torch.float32))
    return in_range & (sums <= 1 + tolerance)


def zero_normalizer(rows: Tensor) -> Normalizer:
    """The normaliser of probabilities or log-probabilities, `rows` `[N, ...]`: they are normalised already."""
    zeros = rows.new_zeros(rows.shape[0], dtype=accumulation_dtype(rows))
    return Normalizer(zeros, False, torch.finfo(rows.dtype).eps)
