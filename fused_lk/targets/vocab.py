"""The draft vocabulary as a subset of the target's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks


class DraftVocab:
    """Which target tokens the draft model can propose, and their order in the draft's `lm_head`.

    Args:
        t2d: bool `[V_target]`; True where the target token is in the draft vocabulary. Draft tokens are numbered
            in increasing target id, as in EAGLE-3 checkpoints.
        d2t: optional int `[V_draft]`, the checkpoint's *offsets* (target id = draft id + d2t[draft id]); only
            checked against `t2d`.

    Attributes:
        t2d: bool `[V_target]`.
        target_ids: int64 `[V_draft]`, the target id of each draft token.
        draft_ids: int64 `[V_target]`, the draft id of each target token, -1 where it is not in the draft vocabulary.
        draft_size, target_size: the two vocabulary sizes.

    Raises:
        TypeError: `t2d` is not bool, `d2t` is not an integer tensor.
        ValueError: wrong rank, an empty draft vocabulary, or `d2t` that contradicts `t2d`.

    Reading the mask costs one host synchronisation; make the object once and keep it.
    """

    def __init__(self, t2d: Tensor, d2t: Tensor | None = None) -> None:
        checks.tensor(
            "t2d",
            t2d,
            dtypes=[torch.bool],
            ndim=1,
            remedy="t2d is a bool mask of the target vocabulary; offsets go to DraftVocab.from_d2t(d2t, target_size).",
        )
        target_ids = t2d.detach().nonzero().squeeze(-1)
        if target_ids.numel() == 0:
            checks.fail("t2d to keep at least one token", t2d, "An all-False mask leaves nothing to propose.")
        if d2t is not None:
            other = DraftVocab.from_d2t(d2t, t2d.shape[0])
            if not torch.equal(other.target_ids.to(target_ids.device), target_ids):
                checks.fail(
                    "d2t to name exactly the tokens that t2d keeps, in increasing order",
                    d2t,
                    "Take both from the same checkpoint; d2t[i] is an offset: target id = i + d2t[i].",
                )
        self._set(target_ids, t2d.shape[0])

    @classmethod
    def from_d2t(cls, d2t: Tensor, target_size: int) -> DraftVocab:
        """From `d2t`, int `[V_draft]` *offsets* (target id = draft id + d2t[draft id]), in any order.

        Raises:
            ValueError: an id outside `[0, target_size)`, or two draft tokens with one target id.
        """
        checks.tensor("d2t", d2t, dtypes=[torch.int64, torch.int32], ndim=1)
        target_size = checks.integer("target_size", target_size, remedy="Pass the target's vocabulary size.")
        target_ids = torch.arange(d2t.shape[0], device=d2t.device) + d2t.detach().long()
        if target_ids.numel() == 0:
            checks.fail("d2t with at least one token", d2t, "An empty draft vocabulary proposes nothing.")
        low, high, distinct = int(target_ids.min()), int(target_ids.max()), target_ids.unique().numel()
        remedy = "d2t holds offsets, not target ids; for target ids subtract torch.arange(len(d2t))."
        if low < 0 or high >= target_size:
            expected = f"draft id + d2t[draft id] in [0, {target_size})"
            checks.fail(expected, f"target ids from {low} to {high}", remedy)
        if distinct != target_ids.numel():
            repeated = f"{target_ids.numel() - distinct} repeated target id(s)"
            checks.fail("one target id per draft token", repeated, remedy)
        return cls.__new__(cls)._set(target_ids, target_size)

    def _set(self, target_ids: Tensor, target_size: int) -> DraftVocab:
        self.target_ids = target_ids
        self.target_size = target_size
        self.draft_size = target_ids.numel()
        self.draft_ids = torch.full((target_size,), -1, dtype=torch.long, device=target_ids.device)
        self.draft_ids[target_ids] = torch.arange(self.draft_size, device=target_ids.device)
        self.t2d = self.draft_ids >= 0
        return self

    @property
    def d2t(self) -> Tensor:
        """int64 `[V_draft]` offsets, as checkpoints store them."""
        return self.target_ids - torch.arange(self.draft_size, device=self.target_ids.device)

    def to(self, device: torch.device | str) -> DraftVocab:
        """This vocabulary on `device` (itself if it is there already)."""
        if self.target_ids.device == torch.device(device):
            return self
        return DraftVocab.__new__(DraftVocab)._set(self.target_ids.to(device), self.target_size)

    def __repr__(self) -> str:
        return f"DraftVocab({self.draft_size} of {self.target_size} tokens, {self.target_ids.device})"


def check_vocab(vocab: Any, size: int | None = None, name: str = "") -> None:
    """`vocab` is None, or a `DraftVocab`: over `size` target tokens, as `name` has, where a size is given."""
    if vocab is None:
        return
    if not isinstance(vocab, DraftVocab):
        checks.fail("vocab to be a DraftVocab", vocab, "Build DraftVocab(t2d) from the bool mask.", TypeError)
    if size is not None and vocab.target_size != size:
        expected = f"a DraftVocab over {size} target tokens, as {name} has"
        checks.fail(expected, vocab, "Pad t2d with False, or slice padded rows off the head: weight[:vocab_size].")
