"""What the draft is scored against, in its four kinds: hidden states, logits, probabilities, top-k."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks, target_pass
from .gemm import compute_dtype
from .head import TargetHead, check_is_vocab, check_vocab
from .layout import Layout
from .rows.interface import IMPLS, NEG_INF, Normalizer
from .target_tiles import (
    ExactHiddenTiles,
    HiddenTiles,
    LogitsTiles,
    ProbsTiles,
    TargetTiles,
    TopKTiles,
    rebuild,
)
from .vocab import DraftVocab


class Target:
    """What the draft is scored against; made by `from_hidden`, `from_logits`, `from_probs` or `from_topk`.

    Attributes:
        shape: leading shape of what was given; `num_tokens` rows when flattened.
        draft_vocab_size: size of the vocabulary that the draft's logits must have.
        log_normalizer: `[...]`, logsumexp over the full target vocabulary of logits / temperature (0 for probabilities
            and top-k; NaN for rows that `mask` leaves out).
        token_ids: int64 `[...]`, the target's argmax as target ids, -1 where it was given as not known; None where it
            was neither given nor computed.
        in_draft_vocab: bool `[...]`, whether that argmax is in the draft vocabulary; None like `token_ids`.

    A target is a constant: nothing in it receives a gradient, and what requires one is refused. Hidden states, logits
    or probabilities that inference mode made are copied once, when the recompute plan first needs them in a backward.
    """

    def __init__(
        self,
        tiles: TargetTiles,
        shape: tuple[int, ...],
        vocab: DraftVocab | None,
        temperature: float = 1.0,
        renormalize: bool = False,
    ) -> None:
        self._owned: Target | None = None
        self._take(tiles)
        self.shape, self.vocab = tuple(shape), vocab
        self.temperature = checks.number("temperature", temperature, above=0)
        self.renormalize = checks.flag("renormalize", renormalize)
        self.computed: np.ndarray | None = None  # host bool [num_tokens]: the rows that `mask` left in; None: all
        # What a walk takes, flat. None: p is the softmax of the tile; the argmax is not known, or that of the tile.
        self._normalizer: Normalizer | None = None
        self._token_ids: Tensor | None = None
        # `(log_normalizer, argmax)`, as read by a caller who asks for attributes. Walks never look at what it found:
        # a loss must not depend on whether somebody looked.
        self._find: Callable[[], tuple[Tensor, Tensor]] | None = None
        self._found: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.tiles.device

    @property
    def dtype(self) -> torch.dtype:
        """What its logits are computed in."""
        return self.tiles.dtype

    @property
    def num_tokens(self) -> int:
        return self.tiles.num_rows

    @property
    def draft_vocab_size(self) -> int:
        return self.tiles.vocab_size

    @staticmethod
    def from_hidden(
        hidden: Tensor,
        head: TargetHead | Tensor,
        mask: Tensor | None = None,
        log_normalizer: Tensor | None = None,
        token_ids: Tensor | None = None,
        cache: bool = False,
        *,
        vocab: DraftVocab | None = None,
        bias: Tensor | None = None,
        temperature: float = 1.0,
        renormalize: bool = False,
        impl: str = "auto",
        workspace_mb: float | str = "auto",
        logits_dtype: str | torch.dtype = "compute",
    ) -> Target:
        """A target from its last hidden states: `p = softmax(hidden @ lm_head_weight.T / temperature)`.

        Over a truncated vocabulary, one streamed pass over the full head gives the normaliser and the argmax; logits
        of the draft vocabulary are made again, chunk by chunk, where the loss needs them. Over a shared vocabulary the
        loss finds both in the tiles it makes anyway, and no pass is needed.

        Args:
            hidden: `[..., H_target]`, of the head's dtype (under `torch.autocast` both are cast, as by `F.linear`).
            head: a `TargetHead`, or a bare weight `[V_target, H_target]` with `vocab=` and `bias=`.
            mask: optional bool (or integers 0 and 1) `[...]`; rows with False are not computed and may not be used by
                any pair.
            log_normalizer, token_ids: optional `[...]`, if known (from an inference engine): then no pass is made.
                With `log_normalizer` alone accuracy is not known and reported as NaN. An id of -1 is not known: it
                counts as wrong in accuracy, and as outside the draft vocabulary.
            cache: keep the draft-vocabulary logits of that same pass, `[rows, V_draft]`: no second target GEMM, at
                that much memory (the one place where full logits exist).
            temperature: of the target's softmax, > 0.
            renormalize: score alpha against p renormalised on the draft vocabulary (vLLM speculators).
            impl: "auto", "triton" or "torch", and workspace_mb: as in `lk_loss`, for the pass.
            logits_dtype: as in `lk_loss`, for the target's logits, wherever they are made.

        Raises:
            TypeError, ValueError: wrong types, ranks, sizes, devices; `hidden` that requires grad.
        """
        checks.choice("impl", impl, IMPLS)
        checks.workspace_bytes(workspace_mb)
        cache = checks.flag("cache", cache)
        if isinstance(head, Tensor):
            head = TargetHead(head, vocab, bias)
        elif not isinstance(head, TargetHead):
            remedy = checks.instead(head, "Build TargetHead(weight, vocab).")
            checks.fail("head to be a TargetHead or a weight tensor", head, remedy, TypeError)
        elif vocab is not None or bias is not None:
            checks.fail("vocab and bias inside the TargetHead", "them beside it", "Pass them to TargetHead.")
        checks.tensor("hidden", hidden, min_ndim=1, dtypes=checks.FLOATS)
        checks.is_constant("hidden", hidden)
        checks.same_device(head.weight.device, hidden=hidden)
        head, hidden = head.in_compute_dtype(), hidden.to(compute_dtype(hidden))
        checks.tensor("hidden", hidden, dtypes=[head.weight.dtype])
        if hidden.shape[-1] != head.weight.shape[1]:
            checks.fail(
                f"hidden with last dimension {head.weight.shape[1]}, the hidden size of the target head",
                hidden,
                "Check that hidden states and head belong to one model.",
            )
        rows = hidden.detach().reshape(-1, hidden.shape[-1])
        exact = checks.wide_logits(logits_dtype) is not None
        tiles = (ExactHiddenTiles if exact else HiddenTiles)(rows, head.draft_weight, head.draft_bias)
        target = Target(tiles, hidden.shape[:-1], head.vocab, temperature, renormalize)
        target._given(log_normalizer, token_ids)
        flat_mask = None
        if mask is not None:
            checks.tensor("mask", mask, dtypes=checks.MASKS, remedy="Target masks are bool: True = computed.")
            checks.shape("mask", mask, target.shape, "one per row of hidden")
            checks.same_device(hidden.device, mask=mask)
            flat_mask = checks.as_bool("mask", mask).reshape(-1)
            if not torch.compiler.is_compiling():
                target.computed = flat_mask.cpu().numpy().copy()
        checks.finite_rows("hidden", rows, counted=flat_mask)
        budget = checks.workspace_bytes(workspace_mb)
        t2d, ids = (None, None) if head.vocab is None else (head.vocab.t2d, head.vocab.target_ids)
        scale = 1.0 / target.temperature
        # A partial, not a closure: it is pickled and copied with the target.
        over_full_vocabulary = functools.partial(
            target_pass.over_hidden, rows, head.weight, head.bias, flat_mask, t2d, ids, scale, impl, budget, exact
        )

        known = log_normalizer is not None or (renormalize and token_ids is not None)
        if cache or (head.vocab is not None and not known):
            found, log_mass, cached = over_full_vocabulary(cache)
            target._knows(found, log_mass if head.vocab is not None else None)
            if cache:
                target._take(LogitsTiles(cached))
        elif head.vocab is None or token_ids is not None:
            target._find = functools.partial(_first, over_full_vocabulary, False)
        return target

    @staticmethod
    def from_logits(
        logits: Tensor,
        vocab: DraftVocab | None = None,
        *,
        temperature: float = 1.0,
        renormalize: bool = False,
        impl: str = "auto",
    ) -> Target:
        """A target from its logits `[..., V_target]`, read in place; -inf entries are tokens it cannot produce.

        Over a shared vocabulary (`vocab=None`) they are the draft vocabulary's logits already.
        """
        checks.choice("impl", impl, IMPLS)
        checks.tensor("logits", logits, min_ndim=1, dtypes=checks.FLOATS)
        checks.is_constant("logits", logits)
        checks.not_empty("logits", logits, vocabulary=-1)
        checks.finite_rows("logits", logits, logits=True)
        check_vocab(vocab, logits.shape[-1], "logits")
        vocab = None if vocab is None else vocab.to(logits.device)
        rows = logits.detach().reshape(-1, logits.shape[-1])
        tiles = LogitsTiles(rows, None if vocab is None else vocab.target_ids)
        target = Target(tiles, logits.shape[:-1], vocab, temperature, renormalize)
        t2d = None if vocab is None else vocab.t2d
        over_full_vocabulary = functools.partial(target_pass.over_logits, rows, t2d, 1.0 / target.temperature, impl)
        if vocab is None:
            target._find = functools.partial(_first, over_full_vocabulary)
        else:
            target._knows(*over_full_vocabulary())
        return target

    @staticmethod
    def from_probs(
        probs: Tensor,
        vocab: DraftVocab | None = None,
        token_ids: Tensor | None = None,
        *,
        temperature: float = 1.0,
        renormalize: bool = False,
    ) -> Target:
        """A target from probabilities on the draft vocabulary `[..., V_draft]`, >= 0, summing to at most 1 per row.

        The missing mass is what the target gives to tokens outside the draft vocabulary. `token_ids` `[...]` is the
        target's argmax as target ids, -1 where it is not known; without it, the argmax on the draft vocabulary stands
        in.
        """
        checks.tensor("probs", probs, min_ndim=1, dtypes=checks.FLOATS)
        checks.is_constant("probs", probs)
        checks.not_empty("probs", probs, vocabulary=-1)
        check_is_vocab(vocab)
        if vocab is not None and probs.shape[-1] != vocab.draft_size:
            checks.fail(
                f"probs with last dimension {vocab.draft_size}, the draft vocabulary",
                probs,
                "Select probs[..., vocab.t2d].",
            )
        _refuse_temperature(temperature)
        if checks.checks_contents(probs, only_if_asked=True):
            checks.all_rows("probs", _are_probs(probs.amin(-1) >= 0, probs), "of entries >= 0 that sum to at most 1")
        tiles = ProbsTiles(probs.detach().reshape(-1, probs.shape[-1]))
        vocab = None if vocab is None else vocab.to(probs.device)
        target = Target(tiles, probs.shape[:-1], vocab, renormalize=renormalize)
        normalizer = tiles.probs.new_zeros(target.num_tokens, dtype=tiles.dtype)
        target._normalizer = Normalizer(normalizer, False, torch.finfo(probs.dtype).eps)
        target._given(None, token_ids)
        target._find = functools.partial(_argmax_of_probs, normalizer, tiles.probs, vocab)
        return target

    @staticmethod
    def from_topk(
        token_ids: Tensor,
        log_probs: Tensor,
        vocab: DraftVocab | int,
        *,
        temperature: float = 1.0,
        renormalize: bool = False,
    ) -> Target:
        """A target from its top-k tokens: target ids and log-probabilities, `[..., k]` each, in any order.

        `log_probs` are normalised over the full vocabulary; every other token counts as impossible. `vocab` is the
        draft vocabulary, or the size of a shared one.

        Raises:
            ValueError: ids outside the target vocabulary, or twice in one row (on a device only with
                FUSED_LK_VALIDATE=1: reading them synchronises).
        """
        checks.tensor("token_ids", token_ids, min_ndim=1, dtypes=[torch.int64, torch.int32])
        checks.tensor("log_probs", log_probs, min_ndim=1, dtypes=checks.FLOATS)
        checks.shape("log_probs", log_probs, tuple(token_ids.shape), "the shape of token_ids")
        checks.same_device(token_ids.device, log_probs=log_probs)
        checks.is_constant("log_probs", log_probs)
        _refuse_temperature(temperature)
        if not isinstance(vocab, DraftVocab):
            expected = "vocab to be a DraftVocab, or the size of a shared vocabulary (a positive int)"
            vocab = checks.integer("vocab", vocab, expected=expected, remedy="Pass DraftVocab(t2d), or the size.")
        if token_ids.shape[-1] == 0:
            checks.fail("at least one token per row", token_ids, "Pass the target's k >= 1 best tokens.")
        size = vocab if isinstance(vocab, int) else vocab.target_size
        if checks.checks_contents(token_ids):
            ordered = token_ids.long().sort(-1).values
            bad = torch.stack([((ordered < 0) | (ordered >= size)).any(), (ordered.diff(dim=-1) == 0).any()]).tolist()
            if bad[0]:
                checks.fail(f"token_ids in [0, {size})", "ids outside", "They are ids of the target vocabulary.")
            if bad[1]:
                checks.fail("each token id once per row", "a repeated id", "Merge or drop repeated entries.")
        if checks.checks_contents(log_probs, only_if_asked=True):
            good = _are_probs(log_probs.amax(-1) <= 1e-3, log_probs.exp())
            checks.all_rows("log_probs", good, "of entries <= 0 whose exponentials sum to at most 1")
        draft_vocab = None if isinstance(vocab, int) else vocab.to(token_ids.device)
        ids = token_ids.reshape(-1, token_ids.shape[-1]).long()
        rows = log_probs.detach().reshape(ids.shape)
        draft_ids = ids if draft_vocab is None else draft_vocab.draft_ids[ids]
        tiles = TopKTiles(rows, draft_ids, vocab if isinstance(vocab, int) else vocab.draft_size)
        target = Target(tiles, token_ids.shape[:-1], draft_vocab, renormalize=renormalize)
        normalizer = rows.new_zeros(target.num_tokens, dtype=tiles.dtype)
        target._normalizer = Normalizer(normalizer, False, torch.finfo(log_probs.dtype).eps)
        target._token_ids = ids.gather(1, rows.argmax(1, keepdim=True)).squeeze(1)
        return target

    @property
    def log_normalizer(self) -> Tensor:
        if self._normalizer is not None and not self._normalizer.is_mass:
            return self._normalizer.value.view(self.shape)
        return self._look()[0].view(self.shape)

    @property
    def token_ids(self) -> Tensor | None:
        if self._token_ids is not None:
            return self._token_ids.view(self.shape)
        return None if self._find is None else self._look()[1].view(self.shape)

    @property
    def in_draft_vocab(self) -> Tensor | None:
        ids = self.token_ids
        if ids is None or self.vocab is None:
            return None if ids is None else ids >= 0
        inside = (ids >= 0) & (ids < self.vocab.target_size)
        return inside & self.vocab.t2d[torch.where(inside, ids, 0)]

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        """Draft ids as target ids."""
        return draft_ids if self.vocab is None else self.vocab.target_ids[draft_ids]

    def dense_log_probs(self) -> Tensor:
        """`log p` on the draft vocabulary, `[num_tokens, V_draft]`: full size, for the reference alone."""
        logits = self.tiles.dense() / self.temperature
        supported = (logits != NEG_INF).any(-1)
        log_pt = torch.where(supported.unsqueeze(-1), logits.log_softmax(-1), NEG_INF)
        normalizer = self.walk_normalizer()
        if normalizer is None:
            return log_pt
        given = normalizer.value.to(logits)
        log_mass = torch.where(supported, given if normalizer.is_mass else logits.logsumexp(-1) - given, 0.0)
        if not normalizer.is_mass:
            most = normalizer.most_log_mass(given, logits.amax(-1), 1.0)
            log_mass = log_mass.masked_fill(log_mass > most, float("nan"))
        return log_pt + log_mass.unsqueeze(-1)

    # What the loss uses.

    @property
    def finds_argmax_in_tiles(self) -> bool:
        """Whether a walk has to look for the target's argmax, because nobody has yet."""
        return self._token_ids is None and self._find is not None

    def argmax_of(self, layout: Layout, in_tiles: Tensor | None) -> Tensor | None:
        """The target's argmax per pair, as target ids; `in_tiles` is what the walk found, as draft ids."""
        if in_tiles is not None:
            return self.to_target_ids(in_tiles)
        return None if self._token_ids is None else layout.of_target(self._token_ids)

    def walk_normalizer(self) -> Normalizer | None:
        """Of `[num_tokens]` rows, or None where p is the softmax of the tile."""
        return None if self.renormalize else self._normalizer

    def owned(self) -> Target:
        """This target, with a copy of each tensor that a walk reads and that inference mode made.

        Those keep no count of changes in place, so that a backward that read one again could silently read something
        else; nor can autograd save them. The copies are made once, for all calls to come. What a head sliced is its
        own, and never copied.
        """
        if not any(self._of_inference_mode):
            return self
        if self._owned is not None:
            return self._owned
        target = copy.copy(self)
        tensors = zip(self.tiles.tensors(), self._of_inference_mode, strict=True)
        copies = [x.clone() if of_inference_mode else x for x, of_inference_mode in tensors]
        target._take(rebuild(self.tiles.kind, copies, self.tiles.vocab_size))
        if not torch.compiler.is_compiling():
            self._owned = target
        return target

    def _take(self, tiles: TargetTiles) -> None:
        """Set the tiles, and note which of their tensors inference mode made: a graph cannot ask that later."""
        self.tiles = tiles
        self._of_inference_mode = tuple(not torch.compiler.is_compiling() and x.is_inference() for x in tiles.tensors())
        self._owned = None

    def _look(self) -> tuple[Tensor, Tensor]:
        if self._found is None:
            assert self._find is not None
            self._found = self._find()
        return self._found

    def _knows(self, found: tuple[Tensor, Tensor], log_mass: Tensor | None) -> None:
        """Take what the pass over the full vocabulary found, where the caller has not said it."""
        self._found = found
        if self._normalizer is None and log_mass is not None:
            self._normalizer = Normalizer(log_mass, True, 0.0)
        if self._token_ids is None:
            self._token_ids = found[1]

    def _given(self, log_normalizer: Tensor | None, token_ids: Tensor | None) -> None:
        for name, value, dtypes in (
            ("log_normalizer", log_normalizer, checks.FLOATS),
            ("token_ids", token_ids, (torch.int64,)),
        ):
            if value is not None:
                checks.tensor(name, value, dtypes=dtypes)
                checks.shape(name, value, self.shape, "one per row of the target")
                checks.same_device(self.device, **{name: value})
                checks.is_constant(name, value)
        if log_normalizer is not None:
            rounding = max(torch.finfo(x).eps for x in (self.dtype, log_normalizer.dtype))
            self._normalizer = Normalizer(log_normalizer.reshape(-1), False, rounding)
        if token_ids is not None:
            size = self.draft_vocab_size if self.vocab is None else self.vocab.target_size
            if checks.checks_contents(token_ids) and bool(((token_ids < -1) | (token_ids >= size)).any()):
                checks.fail(
                    f"token_ids in [-1, {size}), ids of the target vocabulary",
                    "an id outside",
                    "Use -1 where the argmax is not known; give vocab where the target's vocabulary is the larger.",
                )
            self._token_ids = token_ids.reshape(-1)


def _first(function: Callable[..., tuple], *arguments: Any) -> Any:
    return function(*arguments)[0]


def _argmax_of_probs(normalizer: Tensor, probs: Tensor, vocab: DraftVocab | None) -> tuple[Tensor, Tensor]:
    argmax = probs.argmax(-1)
    return normalizer, argmax if vocab is None else vocab.target_ids[argmax]


def _are_probs(in_range: Tensor, probs: Tensor) -> Tensor:
    """bool per row: in range (which NaN is not), with a sum of at most 1, to the rounding of the dtype."""
    tolerance = 1e-3 if probs.element_size() > 2 else 1e-2
    sums = probs.sum(-1, dtype=torch.promote_types(probs.dtype, torch.float32))
    return in_range & (sums <= 1 + tolerance)


def _refuse_temperature(temperature: float) -> None:
    if checks.number("temperature", temperature, above=0) != 1.0:
        checks.fail(
            "temperature=1 with probabilities or top-k",
            f"temperature={temperature}",
            "Probabilities cannot be retempered; use from_logits or from_hidden.",
        )
