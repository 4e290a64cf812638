"""Targets from their k best tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..rows.interface import NEG_INF, accumulation_dtype
from .probs import are_probs, zero_normalizer
from .tiles import Made, Tiles, flat_constant, given_normalizer
from .vocab import DraftVocab


class TopKTiles(Tiles):
    """Log-probabilities or logits `[N, k]` of draft tokens `[N, k]`. Other tokens have -inf.

    An id of -1 is no token of the draft vocabulary. A token that is listed twice has the larger value.
    """

    def __init__(self, tensors: Sequence[Tensor], vocab_size: int, restricts_draft: bool = False) -> None:
        self.kind = "restricting_topk" if restricts_draft else "topk"
        self.restricts_draft = restricts_draft
        self.log_probs, self.draft_ids = tensors
        super().__init__(tensors, vocab_size, accumulation_dtype(self.log_probs))

    def write(self, t: Tensor, rows: slice | Tensor, columns: slice) -> None:
        at, inside = self._columns(rows, columns)
        values = torch.where(inside, self.log_probs[rows].to(t.dtype), NEG_INF)
        t.fill_(NEG_INF).scatter_reduce_(1, at, values, "amax")

    def restrict(self, z: Tensor, rows: slice | Tensor, columns: slice) -> None:
        at, inside = self._columns(rows, columns)
        possible = self.log_probs[rows] != NEG_INF
        answered = ((self.draft_ids[rows] >= 0) & possible).any(1, keepdim=True)
        values = torch.where(inside & possible, z.gather(1, at), NEG_INF)
        z.masked_fill_(answered, NEG_INF).scatter_reduce_(1, at, values, "amax")

    def listed(self, labels: Tensor, rows: slice | Tensor) -> Tensor:
        found = (self.draft_ids[rows] == labels.unsqueeze(1)) & (self.log_probs[rows] != NEG_INF)
        return torch.where(found.any(1), labels, -1)

    def _columns(self, rows: slice | Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """`[n, k]`: the column of each token, and whether it is one of `columns`.

        All others are sent to column 0: there the maximum with -inf changes nothing.
        """
        ids = self.draft_ids[rows] - columns.start
        inside = (ids >= 0) & (ids < columns.stop - columns.start)
        return torch.where(inside, ids, 0), inside


def of_topk(
    token_ids: Tensor,
    log_probs: Tensor,
    vocab: DraftVocab | int,
    log_normalizer: Tensor | None,
    temperature: float,
    renormalize: bool,
    restrict_draft: bool,
) -> Made:
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
    ids = token_ids.reshape(-1, token_ids.shape[-1]).long()
    rows = log_probs.detach().reshape(ids.shape)
    normalizer = zero_normalizer(rows)
    if log_normalizer is not None:
        log_normalizer = flat_constant("log_normalizer", log_normalizer, log_probs, checks.FLOATS)
        normalizer = given_normalizer(log_normalizer, log_probs.dtype)
    elif temperature != 1.0 and not renormalize:
        checks.fail(
            "temperature=1 with log-probabilities over the full vocabulary",
            f"temperature={temperature}",
            "Pass log_normalizer, the logsumexp of all logits / temperature; or renormalize=True, which needs none.",
        )
    listed = torch.where(ids >= 0, rows, NEG_INF)
    if checks.checks_contents(token_ids):
        once = _listed_once(ids, listed, target_size)
        if renormalize:
            checks.finite_rows("log_probs", once, logits=True)
        elif checks.checks_contents(log_probs, only_if_asked=True):
            log_p = once / temperature - normalizer.value.unsqueeze(1)
            good = are_probs(log_p.amax(-1) <= 1e-3, log_p.exp())
            checks.all_rows("log_probs", good, "of entries <= 0 whose exponentials sum to at most 1")
    draft_ids = ids if draft_vocab is None else torch.where(ids >= 0, draft_vocab.draft_ids[ids.clamp(min=0)], -1)
    best, at = listed.max(1)
    argmax = torch.where(best == NEG_INF, -1, ids.gather(1, at.unsqueeze(1)).squeeze(1))
    tiles = TopKTiles((rows, draft_ids), draft_size, restrict_draft)
    full = None if draft_vocab is None else TopKTiles((rows, ids), target_size)
    known = (normalizer, normalizer.value, argmax)
    return Made(tiles, token_ids.shape[:-1], draft_vocab, *known, full=full, num_ranked=ids.shape[1])


def _listed_once(ids: Tensor, listed: Tensor, target_size: int) -> Tensor:
    """The values `listed` `[N, k]` in another order, with -inf in the place of all but the largest of each token.

    Raises:
        ValueError: an id below -1 or not of the target vocabulary; a token with two values that differ by more than
            rounding.
    """
    order = listed.argsort(1, descending=True)
    order = order.gather(1, ids.gather(1, order).argsort(dim=1, stable=True))
    ids, values = ids.gather(1, order), listed.gather(1, order)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ids.diff(dim=1) == 0
    drop, rounding = -values.diff(dim=1), 1e-3 if values.element_size() > 2 else 1e-2
    differs = repeated[:, 1:] & (drop > rounding * (1 + values[:, 1:].abs()))
    outside = (ids < -1) | (ids >= target_size)
    outside, differs = torch.stack([outside.any(), differs.any()]).tolist()
    if outside:
        expected, remedy = f"token_ids in [-1, {target_size})", "Use ids of the target vocabulary, and -1 for no token."
        checks.fail(expected, "ids outside", remedy)
    if differs:
        remedy = "Pass each token once; give id -1 or log-probability -inf to entries that count for nothing."
        checks.fail("one log-probability per token and row", "two that differ by more than rounding", remedy)
    return values.masked_fill(repeated, NEG_INF)
