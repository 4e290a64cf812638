"""What every kind of target has in common: how a walk reads its logits, and what is known of its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..rows.interface import Normalizer, accumulation_dtype
from .vocab import DraftVocab


class Tiles:
    """The logits of a target on the draft vocabulary: `log p` up to a constant per row.

    A walk reads them by rows and by blocks of columns. They can be made again from `kind`, `tensors()`, `vocab_size`.

    Attributes:
        dtype: the dtype of the logits, wherever they are written.
        device, num_rows, vocab_size: of all the logits that a walk may ask for.
        in_place: whether the caller holds these very logits, so that a walk needs no workspace for them.
        of_product: whether writing them takes a matrix product.
        restricts_draft: whether the draft, too, is renormalised on the tokens that the target can say.
    """

    kind: str
    in_place = False
    of_product = False
    restricts_draft = False

    def __init__(self, tensors: Sequence[Tensor], vocab_size: int, dtype: torch.dtype) -> None:
        self._tensors = tuple(tensors)
        self.device, self.num_rows = tensors[0].device, tensors[0].shape[0]
        self.vocab_size, self.dtype = vocab_size, dtype

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that must not change between forward and backward; the first one has a row per token."""
        return self._tensors

    def view(self, rows: slice, columns: slice) -> Tensor:
        """The logits where they lie. Only tiles with `in_place` have them."""
        raise NotImplementedError

    def write(self, t: Tensor, rows: slice | Tensor, columns: slice) -> None:
        """Write the logits of `rows` (a slice, or int64 indices) and `columns` into `t`."""
        raise NotImplementedError

    def restrict(self, z: Tensor, rows: slice | Tensor, columns: slice) -> None:
        """Make -inf, in place, of the draft's logits `z` of all tokens that the target's `rows` cannot say.

        A row whose target can say nothing stays as it is. Only tiles with `restricts_draft` do this.
        """
        raise NotImplementedError

    def listed(self, labels: Tensor, rows: slice | Tensor) -> Tensor:
        """The `labels` `[n]`, columns, that the target's `rows` can say, and -1 for others. (As `restrict`.)"""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """All logits, `[num_rows, vocab_size]`, in the accumulation dtype. Only the reference needs them at once."""
        t = self._tensors[0].new_empty(self.num_rows, self.vocab_size, dtype=self.dtype)
        self.write(t, slice(None), slice(0, self.vocab_size))
        return t.to(accumulation_dtype(t))


class Made(NamedTuple):
    """What a kind of target makes of the caller's tensors, with every row in flat order.

    Attributes:
        normalizer: how the probabilities on the draft vocabulary are normalised; None: p is the softmax of a tile.
        log_normalizer, known_ids: `[num_rows]`, the full log-normaliser and the argmax as a target id, where known.
        find: makes `(log_normalizer, argmax, ...)` where a caller asks for what is not known; None: it stays unknown.
            It is a partial, not a closure, so that targets can be pickled and copied.
        computed: bool `[num_rows]` on the host, the rows that the target's own mask left in; None: all of them.
        full: the logits over the target's own vocabulary, where `tiles` are columns of it; None: `tiles` are all there
            is.
        num_ranked: how many of a row's best tokens over the target's vocabulary are known to be so; None: all.
    """

    tiles: Tiles
    shape: tuple[int, ...]
    vocab: DraftVocab | None
    normalizer: Normalizer | None = None
    log_normalizer: Tensor | None = None
    known_ids: Tensor | None = None
    find: Callable[[], tuple[Tensor, ...]] | None = None
    computed: np.ndarray | None = None
    full: Tiles | None = None
    num_ranked: int | None = None


def flat_constant(name: str, value: Tensor, like: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """A caller's `value`, one per row of the target's activations `like`, in flat order."""
    checks.tensor(name, value, dtypes=dtypes)
    checks.shape(name, value, tuple(like.shape[:-1]), "one per row of the target")
    checks.same_device(like.device, **{name: value})
    checks.is_constant(name, value)
    return value.reshape(-1)


def given_normalizer(log_normalizer: Tensor, logits_dtype: torch.dtype) -> Normalizer:
    """A caller's logsumexp over the full vocabulary, `[N]`, of logits of that dtype."""
    rounding = max(torch.finfo(x).eps for x in (logits_dtype, log_normalizer.dtype))
    return Normalizer(log_normalizer, False, rounding)


def flat_ids(token_ids: Tensor | None, like: Tensor, target_size: int) -> Tensor | None:
    """A caller's argmaxes, if given: target ids, or -1 where the argmax is not known."""
    if token_ids is None:
        return None
    ids = flat_constant("token_ids", token_ids, like, [torch.int64])
    if checks.checks_contents(token_ids) and bool(((ids < -1) | (ids >= target_size)).any()):
        checks.fail(
            f"token_ids in [-1, {target_size}), ids of the target vocabulary",
            "an id outside",
            "Use -1 where the argmax is not known; give vocab where the target's vocabulary is the larger.",
        )
    return ids


def of_inference_mode(x: Tensor) -> bool:
    """Whether inference mode made `x`. Such a tensor counts no changes in place, and autograd cannot save it.

    A graph cannot ask. There the answer is False, and PyTorch itself refuses what it cannot save.
    """
    return not torch.compiler.is_compiling() and x.is_inference()


def owned(x: Tensor) -> Tensor:
    """`x`, or a copy of it where inference mode made it."""
    return x.clone() if of_inference_mode(x) else x
