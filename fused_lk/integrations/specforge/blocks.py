"""SpecForge's block drafters (`OnlineDFlashModel`, `OnlineDominoModel`, `OnlineDSparkModel`), without their logits.

`forward` runs as published, and so does the method that makes sums of a chunk of blocks. It is called once, on `Rows`
in the place of logits:

    seam                             before                                          now
    lm_head                          [B, blocks * size, V] logits                    `Rows`
    draft_model.apply_logits_head    the same, and a bias of low rank                `Rows`, of a call with `low_rank=`
    objective_chunk_blocks           chunks of blocks, made again in the backward    0: `workspace_mb` bounds the logits

The published head makes u of the bias `u M^T` itself: it is given zeros of u's width in the place of logits, and its
last linear, whose weight is M, is left out.

Losses, metrics and all gradients stay the same, for every `loss_type`, decay, and Markov head. Two things differ.
Cross-entropies are float32, where the originals have the dtype of the logits. Rows that do not count are not computed,
where the originals multiply by 0, which is NaN for an infinite one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import Divergences, Target, lk_divergences
from .. import seams
from .rows import Asked, Rows

_DFLASH, _DOMINO, _DSPARK = (f"specforge.modeling.draft.{x}" for x in ("dflash", "domino", "dspark"))
_NO_BIAS = f"{_DFLASH}:DFlashDraftModel.apply_logits_head"
_MARKOV_HEADS = tuple(f"{_DSPARK}:{x}MarkovHead" for x in ("Vanilla", "Gated", "RNN"))


class DFlash(seams.Forward):
    """DFlash and D-PACE, whose weights are made by the published code."""

    sums = "_dflash_objective_chunk_terms"
    methods: tuple[tuple[str, ...], ...] = (
        ("forward", "checkpointed_chunk_reduce", "objective_chunk_blocks", sums),
        (sums, "lm_head", "cross_entropy", "argmax"),
    )
    heads: tuple[str, ...] = ("lm_head",)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.__signature__.bind(*args, **kwargs)
        call.apply_defaults()
        own = {self.sums: lambda *blocks: self.of_blocks(call.arguments, *blocks)}
        return self.published(seams.shadow(self.model, objective_chunk_blocks=0, **own), *args, **kwargs)

    def of_blocks(self, call: dict[str, Any], hidden: Tensor, labels: Tensor, weights: Tensor) -> Any:
        rows = _rows(self.scored(hidden, labels, weights != 0), self.model.lm_head.out_features)
        return self.published_sums(hidden, labels, weights, lm_head=lambda _: rows)

    def published_sums(self, *blocks: Tensor | None, **own: Any) -> Any:
        return getattr(type(self.model), self.sums)(seams.shadow(self.model, **own), *blocks)

    def scored(
        self,
        hidden: Tensor,
        labels: Tensor,
        mask: Tensor,
        low_rank: tuple[Tensor, Tensor] | None = None,
        target_hidden: Tensor | None = None,
    ) -> Divergences:
        """Of each row that `mask` leaves in. Without `target_hidden` only cross-entropy and argmax mean anything.

        Then the target is one row of zeros, which all rows read in place: `V` numbers, without a product or a tile.
        """
        head = seams.linear_head(self.model, "lm_head")
        if target_hidden is None:
            uniform = hidden.new_zeros(1, head.out_features, dtype=head.weight.dtype)
            target = Target.from_logits(uniform.expand(labels.numel(), -1))
            more: dict[str, Any] = {"terms": ("ce",)}
        else:
            target = Target.from_hidden(target_hidden, head.weight, mask, bias=head.bias, **self.options)
            more = {"terms": ("ce", "l1"), "top1": True}
        more |= {"labels": labels, "low_rank": low_rank, "mask": mask, **self.of_losses}
        return lk_divergences(hidden, head.weight, target, bias=head.bias, **more)


class Domino(DFlash):
    """Two calls: of the base logits, and of those that the head corrects. A base without weight takes no gradient."""

    sums = "_domino_objective_chunk_terms"
    methods = (
        ("forward", "checkpointed_chunk_reduce", "objective_chunk_blocks", sums),
        ("_apply_domino_head", "draft_model", "apply_logits_head"),
        (sums, "lm_head", "_apply_domino_head", "cross_entropy", "argmax"),
    )
    last = "draft_model.embed_proj.2"

    def check(self) -> None:
        seams.linear_head(self.model, self.last, bias=False)
        head = self.model.draft_model.apply_logits_head
        seams.require_published(head, f"{_DOMINO}:DominoDraftModel.apply_logits_head")

    def of_blocks(self, call: dict[str, Any], hidden: Tensor, *blocks: Tensor) -> Any:
        _, labels, _, weights = blocks
        mask, draft, size = weights != 0, self.model.draft_model, self.model.lm_head.out_features
        with torch.set_grad_enabled(torch.is_grad_enabled() and call["lambda_base"] != 0):
            base = _rows(self.scored(hidden, labels, mask), size)

        def apply_logits_head(_: Rows, **given: Any) -> Rows:
            like = seams.shadow(draft, embed_proj=draft.embed_proj[:-1])
            second = _low_rank(like, seams.linear_head(self.model, self.last).weight, **given)
            return _rows(self.scored(hidden, labels, mask, second), size)

        final = seams.shadow(draft, apply_logits_head=apply_logits_head)
        return self.published_sums(hidden, *blocks, lm_head=lambda _: base, draft_model=final)


class DSpark(DFlash):
    """One call for draft and target."""

    sums = "_dspark_objective_chunk_terms"
    methods = (
        ("forward",),
        ("_compute_dspark_loss", "checkpointed_chunk_reduce", "objective_chunk_blocks", sums),
        (sums, "lm_head", "apply_logits_head", "cross_entropy", "softmax", "abs", "max", "argmax"),
    )
    last = "draft_model.markov_head.markov_w2"

    def check(self) -> None:
        draft = self.model.draft_model
        seams.require_published(draft.apply_logits_head, f"{_DSPARK}:DSparkDraftModel.apply_logits_head", _NO_BIAS)
        if getattr(draft, "markov_head", None) is not None:
            seams.require_published(type(draft.markov_head), *_MARKOV_HEADS)
            seams.linear_head(self.model, self.last, bias=False)

    def of_blocks(self, call: dict[str, Any], hidden: Tensor, *blocks: Any) -> Any:
        previous, labels, _, mask, target_hidden = blocks
        second, draft = None, self.model.draft_model
        if getattr(draft, "markov_head", None) is not None:
            like = seams.shadow(draft, markov_head=seams.shadow(draft.markov_head, markov_w2=lambda u: u))
            weight = seams.linear_head(self.model, self.last).weight
            second = _low_rank(like, weight, hidden_states=hidden, prev_token_ids=previous)
        d = self.scored(hidden, labels, mask, second, target_hidden)
        rows = [_rows(d, self.model.lm_head.out_features)]  # draft and target, in the order of the calls
        if target_hidden is not None:
            answers: Any = {("argmax",): d.target_token_ids, ("softmax", "max", "values"): d.target_top1}
            rows.append(Rows(rows[0].shape, answers))
        heads = iter(rows)
        draft = seams.shadow(draft, apply_logits_head=lambda rows, **_: rows)
        return self.published_sums(hidden, *blocks, lm_head=lambda _: next(heads), draft_model=draft)


def _low_rank(draft: Any, weight: Tensor, *, hidden_states: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """`(u, M)`, of a `draft` whose head ends before its last linear, and adds what it made to the logits."""
    nothing = hidden_states.new_zeros(*hidden_states.shape[:-1], weight.shape[1])
    return draft.apply_logits_head(nothing, hidden_states=hidden_states, **given), weight


def _rows(d: Divergences, size: int) -> Rows:
    """The draft's rows of `size` logits. What is subtracted from their softmax is that of the target in `d`."""
    answers: dict[Asked, Tensor] = {("cross_entropy",): d.terms["ce"], ("argmax",): d.draft_token_ids}
    if d.draft_top1 is not None:
        answers |= {("softmax", "max", "values"): d.draft_top1, ("softmax", "sub", "abs", "sum"): d.terms["l1"]}
    return Rows((*d.kl.shape, size), answers)
