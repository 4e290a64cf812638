"""The target of the loss in its four kinds: hidden states, logits, probabilities, top-k.

Each kind can fill a tile with target logits on the draft vocabulary (`log p` up to a constant per row), for any rows
and any block of draft columns. That is all the walks in `chunked` ask of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import gemm, validation
from .pairs import Chunk, Layout
from .rowwise import accumulation_dtype, row_ops
from .vocab import DraftVocab
from .workspace import Tile, row_stride

NEG_INF = float("-inf")
_MIB = 2**20


class TargetHead:
    """The target's `lm_head`, with the draft vocabulary's rows sliced once; keep it across batches.

    Args:
        lm_head_weight: `[V_target, H_target]`; detached, it never receives a gradient.
        vocab: the draft vocabulary; None: both models share one vocabulary (nothing is copied).
        bias: optional `[V_target]`.

    The slice is a copy: make a new head after the weight has changed.
    """

    def __init__(self, lm_head_weight: Tensor, vocab: DraftVocab | None = None, bias: Tensor | None = None) -> None:
        validation.tensor("lm_head_weight", lm_head_weight, ndim=2, dtypes=validation.FLOATS)
        _check_vocab(vocab, lm_head_weight.shape[0], "lm_head_weight")
        if bias is not None:
            validation.tensor("bias", bias, dtypes=[lm_head_weight.dtype])
            validation.shape("bias", bias, (lm_head_weight.shape[0],), "one per row of lm_head_weight")
            validation.same_device(lm_head_weight.device, bias=bias)
        self.weight = lm_head_weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.vocab = None if vocab is None else vocab.to(self.weight.device)
        ids = None if self.vocab is None else self.vocab.target_ids
        self.draft_weight = self.weight if ids is None else self.weight[ids]
        self.draft_bias = self.bias if ids is None or self.bias is None else self.bias[ids]


class Target:
    """What the draft is scored against; made by `from_hidden`, `from_logits`, `from_probs` or `from_topk`.

    Attributes:
        shape: leading shape of what was given; `num_tokens` rows when flattened.
        draft_vocab_size: size of the vocabulary that the draft's logits must have.
        log_normalizer: `[...]`, logsumexp over the full target vocabulary of logits / temperature (0 for probabilities
            and top-k; NaN for rows that `mask` leaves out).
        token_ids: int64 `[...]`, the target's argmax as target ids; None where it was neither given nor computed.
        in_draft_vocab: bool `[...]`, whether that argmax is in the draft vocabulary; None like `token_ids`.

    A target is a constant: nothing in it receives a gradient, and what requires one is refused.
    """

    def __init__(
        self, shape: torch.Size, device: torch.device, dtype: torch.dtype, vocab: DraftVocab | None, size: int
    ) -> None:
        self.shape = tuple(shape)
        self.device = device
        self.dtype = dtype  # of the tile, and of what is gathered into it
        self.vocab = vocab
        self.draft_vocab_size = size
        self.temperature = 1.0
        self.renormalize = False
        self.num_tokens = int(np.prod(self.shape, dtype=np.int64))
        self._computed: np.ndarray | None = None  # host bool [num_tokens]: rows whose normaliser was computed
        self._log_normalizer: Tensor | None = None  # flat
        self._token_ids: Tensor | None = None  # flat

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
    ) -> Target:
        """A target from its last hidden states: `p = softmax(hidden @ lm_head_weight.T / temperature)`.

        Over a truncated vocabulary, one streamed pass over the full head gives the normaliser and the argmax; logits
        of the draft vocabulary are made again, chunk by chunk, where the loss needs them. Over a shared vocabulary the
        loss finds both in the tiles it makes anyway, and no pass is needed.

        Args:
            hidden: `[..., H_target]`, of the head's dtype.
            head: a `TargetHead`, or a bare weight `[V_target, H_target]` with `vocab=` and `bias=`.
            mask: optional bool `[...]`; rows with False are not computed and may not be used by any pair.
            log_normalizer, token_ids: optional `[...]`, if known (from an inference engine): then no pass is made.
                With `log_normalizer` alone accuracy is not known and reported as NaN.
            cache: keep the draft-vocabulary logits of that same pass, `[rows, V_draft]`: no second target GEMM, at
                that much memory (the one place where full logits exist).
            temperature: of the target's softmax, > 0.
            renormalize: score alpha against p renormalised on the draft vocabulary (vLLM speculators).
            impl, workspace_mb: as in `lk_loss`, for the pass.

        Raises:
            TypeError, ValueError: wrong types, ranks, sizes, devices; `hidden` that requires grad.
        """
        if isinstance(head, Tensor):
            head = TargetHead(head, vocab, bias)
        elif not isinstance(head, TargetHead):
            validation.fail(
                "head to be a TargetHead or a weight tensor", head, "Build TargetHead(weight, vocab).", TypeError
            )
        elif vocab is not None or bias is not None:
            validation.fail("vocab and bias inside the TargetHead", "them beside it", "Pass them to TargetHead.")
        validation.tensor("hidden", hidden, min_ndim=1, dtypes=[head.weight.dtype])
        validation.is_constant("hidden", hidden)
        if hidden.shape[-1] != head.weight.shape[1]:
            validation.fail(
                f"hidden with last dimension {head.weight.shape[1]}, the hidden size of the target head",
                hidden,
                "Check that hidden states and head belong to one model.",
            )
        validation.same_device(head.weight.device, hidden=hidden)
        target = _HiddenTarget(hidden, head)
        target._score(temperature, renormalize)
        target._given(log_normalizer, token_ids)
        if mask is not None:
            validation.tensor("mask", mask, dtypes=[torch.bool], remedy="Target masks are bool: True = computed.")
            validation.shape("mask", mask, target.shape, "one per row of hidden")
            validation.same_device(hidden.device, mask=mask)
        known = target._log_normalizer is not None or (renormalize and token_ids is not None)
        if cache or (head.vocab is not None and not known):
            target._stream(None if mask is None else mask.reshape(-1), impl, workspace_mb, cache)
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
        validation.tensor("logits", logits, min_ndim=1, dtypes=validation.FLOATS)
        validation.is_constant("logits", logits)
        _check_vocab(vocab, logits.shape[-1], "logits")
        target = _LogitsTarget(logits, None if vocab is None else vocab.to(logits.device))
        target._score(temperature, renormalize)
        if vocab is not None:
            ops, n, acc = row_ops(impl, logits.device), target.num_tokens, accumulation_dtype(logits)
            target._log_normalizer = torch.empty(n, dtype=acc, device=logits.device)
            target._token_ids = torch.empty(n, dtype=torch.long, device=logits.device)
            ops.lse_argmax(target._logits, 1.0 / temperature, target._log_normalizer, target._token_ids)
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
        target's argmax as target ids; without it, the argmax on the draft vocabulary stands in.
        """
        validation.tensor("probs", probs, min_ndim=1, dtypes=validation.FLOATS)
        validation.is_constant("probs", probs)
        if vocab is not None and probs.shape[-1] != vocab.draft_size:
            validation.fail(
                f"probs with last dimension {vocab.draft_size}, the draft vocabulary",
                probs,
                "Select probs[..., vocab.t2d].",
            )
        _refuse_temperature(temperature)
        target = _ProbsTarget(probs, None if vocab is None else vocab.to(probs.device))
        target._score(1.0, renormalize)
        target._log_normalizer = torch.zeros(target.num_tokens, dtype=target.dtype, device=probs.device)
        target._given(None, token_ids)
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
        draft vocabulary, or the size of a shared one. Checking the ids costs one host synchronisation.

        Raises:
            ValueError: ids outside the target vocabulary, or twice in one row.
        """
        validation.tensor("token_ids", token_ids, min_ndim=1, dtypes=[torch.int64, torch.int32])
        validation.tensor("log_probs", log_probs, min_ndim=1, dtypes=validation.FLOATS)
        validation.shape("log_probs", log_probs, tuple(token_ids.shape), "the shape of token_ids")
        validation.same_device(token_ids.device, log_probs=log_probs)
        validation.is_constant("log_probs", log_probs)
        _refuse_temperature(temperature)
        if isinstance(vocab, bool) or not isinstance(vocab, int | DraftVocab):
            validation.fail("vocab to be a DraftVocab or a vocabulary size", vocab, "Pass DraftVocab(t2d).", TypeError)
        if token_ids.shape[-1] == 0:
            validation.fail("at least one token per row", token_ids, "Pass the target's k >= 1 best tokens.")
        size = vocab if isinstance(vocab, int) else vocab.target_size
        ordered = token_ids.long().sort(-1).values
        bad = torch.stack([((ordered < 0) | (ordered >= size)).any(), (ordered.diff(dim=-1) == 0).any()]).tolist()
        if bad[0]:
            validation.fail(f"token_ids in [0, {size})", "ids outside", "They are ids of the target vocabulary.")
        if bad[1]:
            validation.fail("each token id once per row", "a repeated id", "Merge or drop repeated entries.")
        target = _TopKTarget(token_ids, log_probs, vocab)
        target._score(1.0, renormalize)
        return target

    @property
    def log_normalizer(self) -> Tensor:
        if self._log_normalizer is None:
            self._stream(None, "auto", "auto", False)
        return self._log_normalizer.view(self.shape)

    @property
    def token_ids(self) -> Tensor | None:
        if self._token_ids is None and self._argmax_is_in_tiles:
            self._stream(None, "auto", "auto", False)
        return None if self._token_ids is None else self._token_ids.view(self.shape)

    @property
    def in_draft_vocab(self) -> Tensor | None:
        ids = self.token_ids
        if ids is None or self.vocab is None:
            return None if ids is None else torch.ones_like(ids, dtype=torch.bool)
        return self.vocab.t2d[ids]

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        """Draft ids as target ids."""
        return draft_ids if self.vocab is None else self.vocab.target_ids[draft_ids]

    def dense_log_probs(self) -> Tensor:
        """`log p` on the draft vocabulary, `[num_tokens, V_draft]`: full size, for the reference alone."""
        logits = self._dense() / self.temperature
        normalizer = logits.logsumexp(-1) if self.renormalize else self.log_normalizer.reshape(-1)
        return logits - torch.where(normalizer == NEG_INF, 0.0, normalizer).unsqueeze(-1)

    def argmax_of(self, layout: Layout, in_tiles: Tensor | None) -> Tensor | None:
        """The target's argmax per pair, as target ids; `in_tiles` is what the walk found, as draft ids."""
        if in_tiles is not None:
            return self.to_target_ids(in_tiles)
        return None if self._token_ids is None else layout.of_target(self._token_ids)

    # What the walks use.

    @property
    def computed(self) -> np.ndarray | None:
        """Host bool `[num_tokens]`: the rows that `mask` left in; None: all."""
        return self._computed

    @property
    def finds_argmax_in_tiles(self) -> bool:
        """Whether a walk has to look for the target's argmax, because nobody has yet."""
        return self._token_ids is None and self._argmax_is_in_tiles

    @property
    def _argmax_is_in_tiles(self) -> bool:
        """Whether the target's argmax is the argmax of its tile (it is not known otherwise)."""
        return self.vocab is None

    def walk_normalizer(self) -> Tensor | None:
        """`[num_tokens]`, or None where the normaliser is the tile's own logsumexp."""
        return None if self.renormalize else self._log_normalizer

    def tensors(self) -> tuple[Tensor, ...]:
        """What must not change between forward and backward."""
        raise NotImplementedError

    def tile_row_elements(self) -> int:
        """Elements of workspace that one target row needs; 0 where the caller holds the tile's contents already."""
        return row_stride(self.draft_vocab_size)

    def fill(self, layout: Layout, chunk: Chunk, columns: slice, tile: Tile | None) -> tuple[Tensor, Tensor | None]:
        """`(t, index)`: logits `[rows, columns]`, and for each pair of the chunk its row in them (None: in order).

        Without a tile, `t` is a view of what the caller holds.
        """
        pairs = slice(chunk.start, chunk.stop)
        if tile is None:
            if layout.target_rows is None:
                return self._view(chunk.targets, columns), None
            return self._view(slice(None), columns), layout.target_rows[pairs]
        rows = chunk.targets if layout.unique_targets is None else layout.unique_targets[chunk.targets]
        t = tile.view(chunk.num_targets, columns.stop - columns.start)
        self._write(t, rows, columns)
        if layout.valid is not None:
            t.masked_fill_(~layout.valid[pairs].unsqueeze(1), 0.0)
        return t, None if layout.unique_index is None else layout.unique_index[pairs] - chunk.targets.start

    def _view(self, rows: slice, columns: slice) -> Tensor:
        raise NotImplementedError

    def _write(self, t: Tensor, rows: slice | Tensor, columns: slice) -> None:
        raise NotImplementedError

    def _dense(self) -> Tensor:
        raise NotImplementedError

    def _stream(self, mask: Tensor | None, impl: str, workspace_mb: float | str, cache: bool) -> None:
        """Find log-normaliser and argmax."""
        raise NotImplementedError

    def _score(self, temperature: float, renormalize: bool) -> None:
        self.temperature = validation.number("temperature", temperature, above=0)
        self.renormalize = bool(renormalize)

    def _given(self, log_normalizer: Tensor | None, token_ids: Tensor | None) -> None:
        for name, value, dtypes in (
            ("log_normalizer", log_normalizer, validation.FLOATS),
            ("token_ids", token_ids, (torch.int64,)),
        ):
            if value is not None:
                validation.tensor(name, value, dtypes=dtypes)
                validation.shape(name, value, self.shape, "one per row of the target")
                validation.same_device(self.device, **{name: value})
                validation.is_constant(name, value)
        if log_normalizer is not None:
            self._log_normalizer = log_normalizer.reshape(-1)
        if token_ids is not None:
            self._token_ids = token_ids.reshape(-1)


class _HiddenTarget(Target):
    def __init__(self, hidden: Tensor, head: TargetHead) -> None:
        super().__init__(hidden.shape[:-1], hidden.device, hidden.dtype, head.vocab, head.draft_weight.shape[0])
        self._hidden = hidden.detach().reshape(-1, hidden.shape[-1])
        self._head = head
        self._cached: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        return (self._hidden, self._head.draft_weight) if self._cached is None else (self._cached,)

    def tile_row_elements(self) -> int:
        return super().tile_row_elements() if self._cached is None else 0

    def _view(self, rows: slice, columns: slice) -> Tensor:
        return self._cached[rows, columns]

    def _write(self, t: Tensor, rows: slice | Tensor, columns: slice) -> None:
        if self._cached is not None:
            t.copy_(self._cached[rows, columns])
            return
        bias = self._head.draft_bias
        bias = None if bias is None else bias[columns]
        gemm.linear_into(t, self._hidden[rows], self._head.draft_weight[columns], bias)

    def _dense(self) -> Tensor:
        logits = F.linear(self._hidden, self._head.draft_weight, self._head.draft_bias)
        return logits.to(accumulation_dtype(logits))

    def _stream(self, mask: Tensor | None, impl: str, workspace_mb: float | str, cache: bool) -> None:
        """Full rows of the full vocabulary, a workspace at a time."""
        hidden, head = self._hidden, self._head
        n, size = self.num_tokens, head.weight.shape[0]
        acc = accumulation_dtype(hidden)
        rows = None if mask is None else mask.nonzero().squeeze(1)
        count = n if rows is None else rows.shape[0]
        if rows is not None:
            self._computed = mask.cpu().numpy()
        normalizer = torch.full((n,), float("nan"), dtype=acc, device=hidden.device)
        argmax = torch.zeros(n, dtype=torch.long, device=hidden.device)
        if cache:
            self._cached = hidden.new_zeros(n, row_stride(self.draft_vocab_size))[:, : self.draft_vocab_size]
        ops = row_ops(impl, hidden.device)
        budget = _MIB * (256 if workspace_mb == "auto" else validation.number("workspace_mb", workspace_mb, above=0))
        step = max(1, min(count, int(budget) // (row_stride(size) * hidden.element_size())))
        step = -(-count // max(1, -(-count // step)))  # equal pieces
        tile = Tile(step, size, hidden.dtype, hidden.device)
        for start in range(0, count, max(step, 1)):
            stop = min(start + step, count)
            at = slice(start, stop) if rows is None else rows[start:stop]
            logits = tile.view(stop - start, size)
            gemm.linear_into(logits, hidden[at], head.weight, head.bias)
            lse, top = torch.empty_like(normalizer[start:stop]), torch.empty_like(argmax[start:stop])
            ops.lse_argmax(logits, 1.0 / self.temperature, lse, top)
            normalizer[at], argmax[at] = lse, top
            if cache:
                self._cached[at] = logits if self.vocab is None else logits[:, self.vocab.target_ids]
        if self._log_normalizer is None:
            self._log_normalizer = normalizer
        if self._token_ids is None:
            self._token_ids = argmax


class _LogitsTarget(Target):
    def __init__(self, logits: Tensor, vocab: DraftVocab | None) -> None:
        size = logits.shape[-1] if vocab is None else vocab.draft_size
        super().__init__(logits.shape[:-1], logits.device, logits.dtype, vocab, size)
        self._logits = logits.detach().reshape(-1, logits.shape[-1])

    def tensors(self) -> tuple[Tensor, ...]:
        return (self._logits,)

    def tile_row_elements(self) -> int:
        return 0 if self.vocab is None and self._logits.stride(-1) == 1 else super().tile_row_elements()

    def _view(self, rows: slice, columns: slice) -> Tensor:
        return self._logits[rows, columns]

    def _write(self, t: Tensor, rows: slice | Tensor, columns: slice) -> None:
        logits = self._logits
        if self.vocab is None:
            t.copy_(logits[rows, columns])
        elif isinstance(rows, slice):
            torch.index_select(logits[rows], 1, self.vocab.target_ids[columns], out=t)
        else:  # both at once: no copy of full rows
            t.copy_(logits[rows.unsqueeze(1), self.vocab.target_ids[columns]])

    def _dense(self) -> Tensor:
        logits = self._logits.to(accumulation_dtype(self._logits))
        return logits if self.vocab is None else logits[:, self.vocab.target_ids]

    def _stream(self, mask: Tensor | None, impl: str, workspace_mb: float | str, cache: bool) -> None:
        self._log_normalizer = torch.empty(self.num_tokens, dtype=accumulation_dtype(self._logits), device=self.device)
        self._token_ids = torch.empty(self.num_tokens, dtype=torch.long, device=self.device)
        row_ops(impl, self.device).lse_argmax(
            self._logits, 1.0 / self.temperature, self._log_normalizer, self._token_ids
        )


class _ProbsTarget(Target):
    """Tiles hold log p in the accumulation dtype: log of a half-precision number is not one."""

    def __init__(self, probs: Tensor, vocab: DraftVocab | None) -> None:
        super().__init__(probs.shape[:-1], probs.device, accumulation_dtype(probs), vocab, probs.shape[-1])
        self._probs = probs.detach().reshape(-1, probs.shape[-1])

    @property
    def _argmax_is_in_tiles(self) -> bool:
        return True

    def tensors(self) -> tuple[Tensor, ...]:
        return (self._probs,)

    def _write(self, t: Tensor, rows: slice | Tensor, columns: slice) -> None:
        t.copy_(self._probs[rows, columns]).log_()

    def _dense(self) -> Tensor:
        return self._probs.to(self.dtype).log()

    def _stream(self, mask: Tensor | None, impl: str, workspace_mb: float | str, cache: bool) -> None:
        self._token_ids = self.to_target_ids(self._probs.argmax(-1))


class _TopKTarget(Target):
    """Tiles hold the log-probabilities where the draft has the token, -inf elsewhere."""

    def __init__(self, token_ids: Tensor, log_probs: Tensor, vocab: DraftVocab | int) -> None:
        draft_vocab = None if isinstance(vocab, int) else vocab.to(token_ids.device)
        size = vocab if isinstance(vocab, int) else vocab.draft_size
        dtype = accumulation_dtype(log_probs)
        super().__init__(token_ids.shape[:-1], token_ids.device, dtype, draft_vocab, size)
        k = token_ids.shape[-1]
        ids = token_ids.reshape(-1, k).long()
        self._log_probs = log_probs.detach().reshape(-1, k)
        self._draft_ids = ids if draft_vocab is None else draft_vocab.draft_ids[ids]
        self._log_normalizer = torch.zeros(self.num_tokens, dtype=dtype, device=token_ids.device)
        self._token_ids = ids.gather(1, self._log_probs.argmax(1, keepdim=True)).squeeze(1)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self._log_probs, self._draft_ids)

    def _write(self, t: Tensor, rows: slice | Tensor, columns: slice) -> None:
        size = columns.stop - columns.start
        ids = self._draft_ids[rows] - columns.start
        inside = (ids >= 0) & (ids < size)
        # -inf leaves a token where it is (amax), so ids outside the tile can all go to column 0.
        values = torch.where(inside, self._log_probs[rows].to(t.dtype), NEG_INF)
        t.fill_(NEG_INF).scatter_reduce_(1, torch.where(inside, ids, 0), values, "amax")

    def _dense(self) -> Tensor:
        dense = torch.empty(self.num_tokens, self.draft_vocab_size, dtype=self.dtype, device=self.device)
        self._write(dense, slice(None), slice(0, self.draft_vocab_size))
        return dense


def _check_vocab(vocab: Any, size: int, name: str) -> None:
    if vocab is None:
        return
    if not isinstance(vocab, DraftVocab):
        validation.fail("vocab to be a DraftVocab", vocab, "Build DraftVocab(t2d) from the bool mask.", TypeError)
    if vocab.target_size != size:
        validation.fail(
            f"a DraftVocab over {size} target tokens, as {name} has",
            vocab,
            "Pad or trim t2d to the target's vocabulary.",
        )


def _refuse_temperature(temperature: float) -> None:
    if validation.number("temperature", temperature, above=0) != 1.0:
        validation.fail(
            "temperature=1 with probabilities or top-k",
            f"temperature={temperature}",
            "Probabilities cannot be retempered; use from_logits or from_hidden.",
        )
