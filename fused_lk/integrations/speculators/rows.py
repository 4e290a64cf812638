"""Rows of logits that are never made, and what the published code may ask of them.

speculators' losses and metrics are written for logits `[1, T, V]`, of the draft and of the target. They run as
published on two `Rows` instead. These hold row numbers, which can be sliced and viewed, and a source that answers:

    asked of              the draft                                     the target
    losses, acceptance    one call of `lk_divergences`, kept            (the same call)
    argmax                the same call; rows that it leaves out apart  one streamed pass, kept
    logsumexp             -                                             the same pass
    + u                   a source with the bias of low rank `u M^T`    -
    topk, gather          some columns, some rows at a time             likewise
    cross_entropy         a call against the labels                     -

That one call computes every term of the mix, log alpha and KL, whatever is asked first. Anything else is a TypeError or
an AttributeError: nothing falls back on logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import Divergences, Pairs, Target, checks, gemm, lk_divergences
from . import columns, losses

LossConfig = Mapping[str, tuple[Callable[..., Tensor], float]]


class TargetLogits:
    """The logits of a frozen `head` on hidden states `[..., H]`, which flattened are T rows.

    Args:
        same: int64 `[T]`, the row that stands for each row, where several rows are equal: it alone is computed.
        needed: bool `[T]`, the rows among those that somebody asks for. The argmax of others is -1.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: nn.Linear,
        options: Mapping[str, Any],
        same: Tensor | None = None,
        needed: Tensor | None = None,
    ) -> None:
        self.hidden, self.head, self.options = hidden.detach().reshape(-1, hidden.shape[-1]), head, options
        self.same, self.needed = same, needed

    @cached_property
    def target(self) -> Target:
        head = self.head
        how = {"mask": self.needed, "bias": head.bias, "renormalize": True, **self.options}
        return Target.from_hidden(self.hidden, head.weight, **how)

    @property
    def token_ids(self) -> Tensor:
        return self._of_rows(self.target.token_ids)

    @property
    def log_normalizer(self) -> Tensor:
        return self._of_rows(self.target.log_normalizer)

    def _of_rows(self, found: Tensor | None) -> Tensor:
        assert found is not None  # A target from hidden states finds both.
        return found if self.same is None else found[self.same]


class DraftLogits:
    """The logits of the draft's `head` on K tensors of hidden states `[..., H]`, which flattened are T rows each.

    Args:
        target: whose rows they are scored against; None: they are not, and have an argmax alone.
        target_rows: int64 `[K, T]`, the target row of each row, or -1 for none.
        terms: of `lk_divergences`, to be computed with the rest.
        everywhere: whether the argmax of rows without a target row is asked for, too. Otherwise it is 0 there.
        second: a head without bias. Its product with `u` `[..., r]`, one for each tensor, is added to the logits.
    """

    def __init__(
        self,
        hidden: Sequence[Tensor],
        head: nn.Linear,
        options: Mapping[str, Any],
        target: TargetLogits | None = None,
        target_rows: Tensor | None = None,
        terms: tuple[str, ...] = (),
        everywhere: bool = True,
        second: nn.Linear | None = None,
        u: Sequence[Tensor] = (),
    ) -> None:
        self.hidden, self.head, self.options = [x.reshape(-1, x.shape[-1]) for x in hidden], head, options
        self.target, self.target_rows, self.terms, self.everywhere = target, target_rows, terms, everywhere
        self.second, self.u = second, [x.reshape(-1, x.shape[-1]) for x in u]

    def plus(self, u: Tensor) -> DraftLogits:
        """The logits with the bias of low rank that `second` makes of `u`."""
        rest = (self.target, self.target_rows, self.terms, self.everywhere, self.second, [u])
        return DraftLogits(self.hidden, self.head, self.options, *rest)

    @cached_property
    def divergences(self) -> Divergences:
        """Of every row, in flat order; rows without a target row are ignored ones."""
        assert self.target is not None and self.target_rows is not None
        rows: Any = _one_or_list(self.target_rows)
        return self._against(self.target.target, pairs=Pairs(target_rows=rows), terms=self.terms)

    @cached_property
    def token_ids(self) -> Tensor:
        if self.target_rows is None:
            return self._argmax([torch.ones_like(x[:, 0], dtype=torch.bool) for x in self.hidden])
        ids = self.divergences.draft_token_ids
        if not self.everywhere:
            return ids
        unscored = self.target_rows < 0
        return ids.masked_scatter(unscored.reshape(-1), self._argmax(unscored))

    @torch.no_grad()
    def _argmax(self, of: Sequence[Tensor] | Tensor) -> Tensor:
        """Of the rows `of`, bool `[K, T]`. A target without logits asks for them."""
        hidden = torch.cat([x[at] for x, at in zip(self.hidden, of, strict=True)])
        u = [torch.cat([x[at] for x, at in zip(self.u, of, strict=True)])] if self.u else []
        nothing = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        of_rows = DraftLogits([hidden], self.head, self.options, second=self.second, u=u)
        return of_rows._against(_one_hot(nothing, self.head)).draft_token_ids

    def cross_entropy(self, labels: Tensor) -> Tensor:
        """`-log q[label]` of every row that has a target row, and 0 elsewhere."""
        scored = None if self.target_rows is None else self.target_rows.reshape(-1) >= 0
        return self._against(_one_hot(labels, self.head), mask=scored).kl

    def _against(self, target: Target, **how: Any) -> Divergences:
        head, options = self.head, {**self.options, **how}
        second = None if not self.u else (_one_or_list(self.u), self.second.weight)  # type: ignore[union-attr]
        hidden = _one_or_list(self.hidden)
        return _flat(lk_divergences(hidden, head.weight, target, bias=head.bias, low_rank=second, **options))


Logits = DraftLogits | TargetLogits


class TopK(NamedTuple):
    """What `topk` returns, less the values, which nobody asks for."""

    indices: Tensor


@dataclass(frozen=True)
class Rows:
    """It stands for logits `[..., V]`: those of the rows `at` `[...]`, int64, of a source."""

    source: Any  # Logits
    at: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.at.shape, self.source.head.weight.shape[0]])

    @property
    def device(self) -> torch.device:
        return self.at.device

    @property
    def dtype(self) -> torch.dtype:
        return gemm.compute_dtype(self.source.head.weight)

    def __getitem__(self, index: Any) -> Rows:
        return replace(self, at=self.at[index])

    def view(self, *shape: int) -> Rows:
        _require_vocabulary(shape[-1] in (-1, self.shape[-1]), f"a view of shape {shape}")
        return replace(self, at=self.at.reshape(shape[:-1]))

    reshape = view

    def detach(self) -> Rows:
        return self

    float = detach

    def new_zeros(self, *size: Any, **options: Any) -> Tensor:
        return torch.zeros(*size, **{"dtype": self.dtype, "device": self.device, **options})

    def __add__(self, u: Tensor) -> Rows:
        rows = replace(self, source=self.source.plus(u))
        _require_vocabulary(u.shape[:-1].numel() == self.at.numel(), f"the bias of {tuple(u.shape[:-1])} other rows")
        return rows

    @property
    def divergences(self) -> Divergences:
        return self.source.divergences[self.at]

    def argmax(self, dim: int) -> Tensor:
        _require_vocabulary(dim == -1, f"argmax along {dim}")
        return self.source.token_ids[self.at]

    def logsumexp(self, dim: int) -> Tensor:
        _require_vocabulary(dim == -1, f"logsumexp along {dim}")
        return self.source.log_normalizer[self.at]

    def topk(self, k: int, dim: int) -> TopK:
        _require_vocabulary(dim == -1, f"topk along {dim}")
        ids = columns.best(*self._of_head(), k, self._budget)
        return TopK(ids.view(*self.at.shape, k))

    def gather(self, dim: int, ids: Tensor) -> Tensor:
        _require_vocabulary(dim == -1, f"gather along {dim}")
        return columns.named(*self._of_head(), ids.reshape(-1, ids.shape[-1]), self._budget).view(ids.shape)

    def _of_head(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The hidden states of these rows, and the head, which has to be all there is."""
        source = self.source
        _require_vocabulary(not getattr(source, "u", ()), "columns of logits with a bias of low rank")
        hidden = source.hidden if isinstance(source.hidden, Tensor) else torch.cat(source.hidden)
        return hidden[self.at.reshape(-1)], source.head.weight, source.head.bias

    @property
    def _budget(self) -> int | None:
        return checks.workspace_bytes(self.source.options["workspace_mb"])

    def cross_entropy(self, labels: Tensor, reduction: str) -> Tensor:
        _require_vocabulary(reduction == "none", f"cross_entropy with reduction={reduction!r}")
        every = torch.zeros_like(self.source.token_ids).index_copy(0, self.at.reshape(-1), labels.reshape(-1))
        return self.source.cross_entropy(every)[self.at]

    def softmax(self, dim: int, **_: Any) -> _Softmax:
        _require_vocabulary(dim == -1, f"softmax along {dim}")
        return _Softmax(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = _ANSWERS.get(func)
        return NotImplemented if answer is None else answer(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Softmax:
    """It stands for probabilities `[..., V]`, of which the overlap with others can be asked."""

    rows: Rows

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _Overlap(args[0].rows) if func is torch.minimum else NotImplemented


@dataclass(frozen=True)
class _Overlap:
    """It stands for `min(p, q)` `[..., V]`, of which the sum can be asked."""

    draft: Rows

    def sum(self, dim: int) -> Tensor:
        _require_vocabulary(dim == -1, f"a sum along {dim}")
        return self.draft.divergences.acceptance


_ANSWERS: dict[Any, Callable[..., Any]] = {
    torch.argmax: Rows.argmax,
    torch.logsumexp: Rows.logsumexp,
    F.softmax: lambda rows, dim, **_: rows.softmax(dim),
    F.cross_entropy: lambda rows, labels, reduction, **_: rows.cross_entropy(labels, reduction),
}


def on_rows(loss_config: LossConfig) -> tuple[dict[str, tuple[Callable[..., Tensor], float]], tuple[str, ...]]:
    """A loss config whose functions take `Rows`, and the terms that they need.

    Raises:
        ValueError: one of its functions is none of speculators'.
    """
    found = losses.named(**{name: function for name, (function, _) in loss_config.items()})
    terms = dict.fromkeys(term for loss in found.values() for term in loss.terms)
    return {name: (of_rows(loss), loss_config[name][1]) for name, loss in found.items()}, tuple(terms)


def of_rows(loss: losses.Loss) -> Callable[[Rows, Rows], Tensor]:
    """The loss of draft rows; which target rows they meet, their source knows already."""
    return lambda draft, target: loss.of(draft.divergences)


def first_of_each(numbers: Tensor, size: int) -> Tensor:
    """int64 `[T]`: the first row with the same number, of rows with `numbers` `[T]` in `[0, size)`."""
    rows = torch.arange(len(numbers), device=numbers.device)
    return rows.new_full((size,), len(numbers)).scatter_reduce_(0, numbers, rows, "amin")[numbers]


def identity(hidden: Tensor) -> Tensor:
    """What replaces a head, whose logits are rows of its input as well as of its output."""
    return hidden


def _one_hot(labels: Tensor, head: nn.Linear) -> Target:
    """The target that says `labels` `[T]`, and knows no logits."""
    certain = torch.zeros(len(labels), 1, device=labels.device)
    return Target.from_topk(labels.unsqueeze(-1), certain, head.weight.shape[0])


def _one_or_list(tensors: Sequence[Tensor] | Tensor) -> Tensor | Sequence[Tensor]:
    return tensors[0] if len(tensors) == 1 else tensors


def _flat(d: Divergences) -> Divergences:
    own = {name: x.reshape(-1) for name, x in vars(d).items() if isinstance(x, Tensor)}
    return Divergences(**own, terms={name: x.reshape(-1) for name, x in d.terms.items()})


def _require_vocabulary(is_so: bool, asked: str) -> None:
    """These rows lie along the vocabulary, which is the last dimension, and is never cut."""
    if not is_so:
        checks.fail(
            "what speculators 0.9.0 asks of logits", asked, "unapply(model): then there are logits to ask.", TypeError
        )
