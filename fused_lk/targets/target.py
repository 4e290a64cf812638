"""What the draft is scored against, in its four kinds: hidden states, logits, probabilities, top-k."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .. import checks
from ..impls import IMPLS
from ..reference import head_logits
from ..rows.interface import NEG_INF, Normalizer, Transform
from .head import TargetHead, as_head
from .hidden import HiddenTiles, of_hidden
from .logits import LogitsTiles, of_logits
from .probs import ProbsTiles, of_probs
from .quantized import QuantizedWeight
from .tiles import Made, Tiles, of_inference_mode
from .topk import TopKTiles, of_topk
from .vocab import DraftVocab

KINDS: dict[str, Callable[[Sequence[Tensor], int], Tiles]] = {
    "hidden": HiddenTiles,
    "exact_hidden": partial(HiddenTiles, exact=True),
    "logits": LogitsTiles,
    "probs": ProbsTiles,
    "topk": TopKTiles,
    "restricting_topk": partial(TopKTiles, restricts_draft=True),
}


class Target:
    """What the draft is scored against; made by `from_hidden`, `from_logits`, `from_probs` or `from_topk`.

    Attributes:
        shape: the leading shape of what was given. Flattened, it has `num_tokens` rows.
        draft_vocab_size: the size of the vocabulary that the draft's logits must have.
        device, dtype: where its logits are, and what they are computed in.
        log_normalizer: `[...]`, logsumexp over the full target vocabulary of what its softmax sees (0 for
            probabilities, and for top-k without one; NaN for rows that `mask` leaves out).
        token_ids: int64 `[...]`, the target's argmax as target ids, -1 where it was given as not known; None where it
            was neither given nor computed.
        in_draft_vocab: bool `[...]`, whether that argmax is in the draft vocabulary; None like `token_ids`.

    A target is a constant: nothing in it receives a gradient, and what requires one is refused. Hidden states, logits
    or probabilities that inference mode made are copied once, when the recompute plan first needs them in a backward.
    """

    def __init__(self, made: Made, transform: Transform, renormalize: bool) -> None:
        self.tiles, self.shape, self.vocab = made.tiles, tuple(made.shape), made.vocab
        self.device, self.dtype = made.tiles.device, made.tiles.dtype
        self.num_tokens, self.draft_vocab_size = made.tiles.num_rows, made.tiles.vocab_size
        self.transform, self.renormalize, self.computed = transform, renormalize, made.computed
        # What a walk takes: `[num_tokens]`, or None where p is the softmax of the tile.
        self.normalizer = None if renormalize else made.normalizer
        # The argmax as target ids, `[num_tokens]`, or None: then a walk looks for it, if it can be found at all.
        self.known_ids = made.known_ids
        self.finds_argmax = made.known_ids is None and made.find is not None
        # What an evaluation takes beside these: p renormalised on the draft vocabulary knows of no other token.
        self.full, self.num_ranked = (None, None) if renormalize else (made.full, made.num_ranked)
        # What only a caller reads. A walk never does: a loss must not depend on whether somebody looked.
        self._log_normalizer, self._find = made.log_normalizer, made.find
        self._found: tuple[Tensor, ...] | None = None
        # Noted for each of the tiles' tensors now, because a graph cannot ask later.
        self._of_inference_mode = [of_inference_mode(x) for x in made.tiles.tensors()]
        self.of_inference_mode = any(self._of_inference_mode)
        self._owned: Target | None = None

    @classmethod
    def rebuilt(
        cls, kind: str, tensors: Sequence[Tensor], vocab_size: int, transform: Transform, normalizer: Normalizer | None
    ) -> Target:
        """The target of a walk: one whose tiles have this `kind`, these `tensors()` and this `vocab_size`."""
        tiles = KINDS[kind](tensors, vocab_size)
        return cls(Made(tiles, (tiles.num_rows,), None, normalizer), transform, False)

    @staticmethod
    def from_hidden(
        hidden: Tensor,
        head: TargetHead | Tensor | QuantizedWeight,
        mask: Tensor | None = None,
        log_normalizer: Tensor | None = None,
        token_ids: Tensor | None = None,
        cache: bool = False,
        *,
        vocab: DraftVocab | None = None,
        bias: Tensor | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
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
            hidden: `[..., H_target]`, of the head's dtype, or of any where its weight is quantised (under
                `torch.autocast` both are cast, as by `F.linear`).
            head: a `TargetHead`, or a bare weight `[V_target, H_target]`, dense or quantised, with `vocab=`, `bias=`,
                `logit_scale=` and `softcap=`.
            mask: optional `[...]`: bool, integers 0 and 1, or float weights >= 0. Rows with False or 0 are not
                computed and may not be used by any pair.
            log_normalizer, token_ids: optional `[...]`, if known (from an inference engine): then no pass is made.
                With `log_normalizer` alone accuracy is not known and reported as NaN. An id of -1 is not known: it
                counts as wrong in accuracy, and as outside the draft vocabulary.
            cache: keep the draft-vocabulary logits of that same pass, `[rows, V_draft]`: no second target GEMM, at
                that much memory (the one place where full logits exist).
            logit_scale, softcap: of a bare weight; see `TargetHead`.
            temperature: of the target's softmax, > 0. It divides what `logit_scale` and `softcap` leave of the logits.
            renormalize: score alpha against p renormalised on the draft vocabulary (vLLM speculators).
            impl: "auto", "triton" or "torch", and workspace_mb: as in `lk_loss`, for the pass.
            logits_dtype: as in `lk_loss`, for the target's logits, wherever they are made.

        Raises:
            TypeError, ValueError: wrong types, ranks, sizes, devices; `hidden` that requires grad.
        """
        checks.choice("impl", impl, IMPLS)
        budget, cache = checks.workspace_bytes(workspace_mb), checks.flag("cache", cache)
        exact = checks.wide_logits(logits_dtype) is not None
        head = as_head(head, vocab, bias, logit_scale, softcap)
        transform, renormalize = _softmax(temperature, renormalize, head.logit_scale, head.softcap)
        how = (transform, renormalize, impl, budget, exact)
        made = of_hidden(hidden, head, mask, log_normalizer, token_ids, cache, *how)
        return Target(made, transform, renormalize)

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

        They are the logits that the model returns: any scale or softcap of its head has been applied. Over a shared
        vocabulary (`vocab=None`) they are the draft vocabulary's logits already.
        """
        transform, renormalize = _softmax(temperature, renormalize)
        return Target(of_logits(logits, vocab, transform, impl), transform, renormalize)

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
        transform, renormalize = _softmax_of_probs(temperature, renormalize)
        return Target(of_probs(probs, vocab, token_ids), transform, renormalize)

    @staticmethod
    def from_topk(
        token_ids: Tensor,
        log_probs: Tensor,
        vocab: DraftVocab | int,
        log_normalizer: Tensor | None = None,
        *,
        temperature: float = 1.0,
        renormalize: bool = False,
        restrict_draft: bool = False,
    ) -> Target:
        """A target from its top-k tokens. Every other token counts as impossible.

            log p_v = log_probs_v                                  log-probabilities over the full vocabulary
            log p_v = log_probs_v / temperature - log_normalizer   logits, with their normaliser
            p = softmax(log_probs / temperature)                   either, over the listed tokens of the draft
                                                                   vocabulary, with `renormalize=True`

        Rows may list fewer than k tokens: an id of -1, or a value of -inf, counts for nothing. A token may be listed
        twice, as engines append the token that was sampled: it counts once, and of two values that differ within
        rounding the larger counts. A row that lists nothing has a target without an answer.

        Truncation changes the loss. Where the listed tokens have the mass m, alpha is too low by at most 1 - m, and a
        draft that equals its target has a KL of -log m. On a real model with k = 16 (m = 0.946 on average) alpha is
        0.285 in place of 0.311, and KL 3.07 in place of 2.91; with p and q both renormalised they are 0.446 and 1.93
        (`python -m bench.truncation`).

        Args:
            token_ids: int64 or int32 `[..., k]`, target ids in any order, or -1.
            log_probs: `[..., k]`, any float dtype.
            vocab: the draft vocabulary, or the size of a shared one.
            log_normalizer: optional `[...]`, logsumexp(logits / temperature) over the full vocabulary, as in
                `from_hidden`. Then `log_probs` are the logits of the k.
            temperature: of the target's softmax, > 0. At another one than 1, log-probabilities alone do not say how
                much the tokens that are not listed have; so it needs `log_normalizer` or `renormalize`.
            renormalize: score alpha against p renormalised on the listed tokens of the draft vocabulary.
            restrict_draft: renormalise q on these tokens as well; AngelSpec's top-k losses do both. The draft's other
                logits count as -inf: they receive no gradient, and its argmax (accuracy, draft token ids) is that of
                the listed tokens. A row that lists none of the draft vocabulary has no answer, as ever.

        Raises:
            TypeError, ValueError: wrong types, shapes, devices; `log_probs` that require grad; ids outside the target
                vocabulary, or a token with two values that differ by more than rounding, 1e-3 (1e-2 in half precision)
                times 1 + |value| (these two on a device only with FUSED_LK_VALIDATE=1: reading them synchronises).
        """
        transform, renormalize = _softmax(temperature, renormalize)
        temperature = float(checks.scalar(temperature))
        restrict_draft = checks.flag("restrict_draft", restrict_draft)
        made = of_topk(token_ids, log_probs, vocab, log_normalizer, temperature, renormalize, restrict_draft)
        return Target(made, transform, renormalize)

    @property
    def log_normalizer(self) -> Tensor:
        return (self._look()[0] if self._log_normalizer is None else self._log_normalizer).view(self.shape)

    @property
    def token_ids(self) -> Tensor | None:
        ids = self._look()[1] if self.finds_argmax else self.known_ids
        return None if ids is None else ids.view(self.shape)

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
        logits = head_logits(self.tiles.dense(), self.transform.gain, self.transform.softcap)
        supported = (logits != NEG_INF).any(-1)
        log_pt = torch.where(supported.unsqueeze(-1), logits.log_softmax(-1), NEG_INF)
        if (normalizer := self.normalizer) is None:
            return log_pt
        given = normalizer.value.to(logits)
        log_mass = torch.where(supported, given if normalizer.is_mass else logits.logsumexp(-1) - given, 0.0)
        if not normalizer.is_mass:
            most = normalizer.most_log_mass(given, logits.amax(-1), 1.0)
            log_mass = log_mass.masked_fill(log_mass > most, float("nan"))
        return log_pt + log_mass.unsqueeze(-1)

    def owned(self) -> Target:
        """This target, with a copy of each tensor that a walk reads and that inference mode made.

        Those keep no count of changes in place. A backward that read one again could silently read something else, and
        autograd cannot save them. The copies are made once, for all calls to come. What a head sliced is its own, and
        is never copied.
        """
        if not self.of_inference_mode:
            return self
        if self._owned is not None:
            return self._owned
        self._owned = target = copy.copy(self)
        target.tiles, target.of_inference_mode = self.owned_tiles(), False
        return target

    def owned_tiles(self) -> Tiles:
        """Its tiles alone, copied anew. A graph asks for these."""
        tensors = zip(self.tiles.tensors(), self._of_inference_mode, strict=True)
        copies = [x.clone() if of_inference else x for x, of_inference in tensors]
        return KINDS[self.tiles.kind](copies, self.draft_vocab_size)

    def _look(self) -> tuple[Tensor, ...]:
        """`(log_normalizer, argmax)`, found once, for a caller who asks."""
        if self._found is None:
            assert self._find is not None  # or both would be known, or the argmax not be asked for
            self._found = self._find()[:2]
        return self._found


def _softmax(
    temperature: float, renormalize: bool, logit_scale: float = 1.0, softcap: float | None = None
) -> tuple[Transform, bool]:
    """What lies between logits and softmax, and `renormalize`: both checked."""
    transform = Transform(*checks.softmax("temperature", temperature, logit_scale, softcap))
    return transform, checks.flag("renormalize", renormalize)


def _softmax_of_probs(temperature: float, renormalize: bool) -> tuple[Transform, bool]:
    """The same of probabilities, whose temperature cannot be changed."""
    transform, renormalize = _softmax(temperature, renormalize)
    if transform.scale != 1.0:
        checks.fail(
            "temperature=1 with probabilities",
            f"temperature={checks.scalar(temperature)}",
            "Probabilities cannot be retempered; use from_logits, from_hidden or from_topk.",
        )
    return transform, renormalize
