"""Where target logits on the draft vocabulary come from: hidden states, logits, probabilities, top-k.

Each kind fills a tile with `log p` up to a constant per row, for any rows and any block of draft columns. That is all
the walks in `chunked` ask of a target. A kind is rebuilt from its name and its `tensors()`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gemm
from .layout import Chunk, Layout
from .rows.interface import NEG_INF, accumulation_dtype


class TargetTiles:
    """Target logits on the draft vocabulary, by rows and by blocks of columns.

    Attributes:
        dtype: of the tile, and of what is gathered into it.
        device, num_rows, vocab_size: of all that could be asked for.
    """

    kind: ClassVar[str]

    def __init__(self, like: Tensor, vocab_size: int, dtype: torch.dtype) -> None:
        self.device, self.num_rows = like.device, like.shape[0]
        self.vocab_size, self.dtype = vocab_size, dtype

    def tensors(self) -> tuple[Tensor, ...]:
        """What must not change between forward and backward, and what `rebuild` takes."""
        raise NotImplementedError

    def lie_in_place(self) -> bool:
        """Whether the caller holds the tile's contents already, so that no workspace is needed."""
        return False

    def fill(self, layout: Layout, chunk: Chunk, columns: slice, tile: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`(t, index)`: logits `[rows, columns]`, and for each pair of the chunk its row in them (None: in order).

        Without a tile, `t` is a view of what the caller holds.
        """
        pairs = slice(chunk.start, chunk.stop)
        if tile is None:
            if layout.target_rows is None:
                return self.view(chunk.targets, columns), None
            return self.view(slice(None), columns), layout.target_rows[pairs]
        rows = chunk.targets if layout.unique_targets is None else layout.unique_targets[chunk.targets]
        t = tile[: chunk.num_targets, : columns.stop - columns.start]
        self.write(t, rows, columns)
        if layout.valid is not None:
            # Ignored rows that are kept for shape have no answer: their gradient is 0, whatever else they meet.
            t.masked_fill_(~layout.valid[pairs].unsqueeze(1), NEG_INF)
        return t, None if layout.unique_index is None else layout.unique_index[pairs] - chunk.targets.start

    def view(self, rows: slice, columns: slice) -> Tensor:
        """Logits where they lie; only where `lie_in_place`."""
        raise NotImplementedError

    def write(self, t: Tensor, rows: slice | Tensor, columns: slice) -> None:
        """Write the logits of `rows` and `columns` into `t`."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """`[num_rows, vocab_size]` in the accumulation dtype: full size, for the reference alone."""
        raise NotImplementedError


class HiddenTiles(TargetTiles):
    """Made from hidden states `[N, H]` and the draft vocabulary's rows of the target's head."""

    kind = "hidden"

    def __init__(self, hidden: Tensor, draft_weight: Tensor, draft_bias: Tensor | None = None) -> None:
        super().__init__(hidden, draft_weight.shape[0], hidden.dtype)
        self.hidden, self.weight, self.bias = hidden, draft_weight, draft_bias

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.hidden, self.weight) if self.bias is None else (self.hidden, self.weight, self.bias)

    def write(self, t: Tensor, rows: slice | Tensor, columns: slice) -> None:
        bias = None if self.bias is None else self.bias[columns]
        gemm.linear_into(t, self.hidden[rows], self.weight[columns], bias)

    def dense(self) -> Tensor:
        logits = F.linear(self.hidden, self.weight, self.bias)
        return logits.to(accumulation_dtype(logits))


class ExactHiddenTiles(HiddenTiles):
    """The same with the products' float32 results in the tile."""

    kind = "exact_hidden"

    def __init__(self, hidden: Tensor, draft_weight: Tensor, draft_bias: Tensor | None = None) -> None:
        super().__init__(hidden, draft_weight, draft_bias)
        self.dtype = accumulation_dtype(hidden)

    def dense(self) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return F.linear(self.hidden.to(self.dtype), self.weight.to(self.dtype), bias)


class LogitsTiles(TargetTiles):
    """Logits in hand, `[N, V]`; with `target_ids` those of a larger vocabulary, of which these columns are wanted."""

    kind = "logits"

    def __init__(self, logits: Tensor, target_ids: Tensor | None = None) -> None:
        super().__init__(logits, (logits.shape[1] if target_ids is None else target_ids.shape[0]), logits.dtype)
        self.logits, self.target_ids = logits, target_ids

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.logits,) if self.target_ids is None else (self.logits, self.target_ids)

    def lie_in_place(self) -> bool:
        return self.target_ids is None and self.logits.stride(-1) == 1

    def view(self, rows: slice, columns: slice) -> Tensor:
        return self.logits[rows, columns]

    def write(self, t: Tensor, rows: slice | Tensor, columns: slice) -> None:
        if self.target_ids is None:
            t.copy_(self.logits[rows, columns])
        elif isinstance(rows, slice):
            torch.index_select(self.logits[rows], 1, self.target_ids[columns], out=t)
        else:  # both at once: no copy of full rows
            t.copy_(self.logits[rows.unsqueeze(1), self.target_ids[columns]])

    def dense(self) -> Tensor:
        logits = self.logits.to(accumulation_dtype(self.logits))
        return logits if self.target_ids is None else logits[:, self.target_ids]


class ProbsTiles(TargetTiles):
    """Probabilities `[N, V]`. The tile holds log p in the accumulation dtype: log of a half-precision number is not
    one."""

    kind = "probs"

    def __init__(self, probs: Tensor) -> None:
        super().__init__(probs, probs.shape[1], accumulation_dtype(probs))
        self.probs = probs

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.probs,)

    def write(self, t: Tensor, rows: slice | Tensor, columns: slice) -> None:
        t.copy_(self.probs[rows, columns]).log_()

    def dense(self) -> Tensor:
        return self.probs.to(self.dtype).log()


class TopKTiles(TargetTiles):
    """Log-probabilities `[N, k]` of draft tokens `[N, k]` (-1: not in the draft vocabulary); -inf everywhere else."""

    kind = "topk"

    def __init__(self, log_probs: Tensor, draft_ids: Tensor, vocab_size: int) -> None:
        super().__init__(log_probs, vocab_size, accumulation_dtype(log_probs))
        self.log_probs, self.draft_ids = log_probs, draft_ids

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.log_probs, self.draft_ids)

    def write(self, t: Tensor, rows: slice | Tensor, columns: slice) -> None:
        size = columns.stop - columns.start
        ids = self.draft_ids[rows] - columns.start
        inside = (ids >= 0) & (ids < size)
        # -inf leaves a token where it is (amax), so ids outside the tile can all go to column 0.
        values = torch.where(inside, self.log_probs[rows].to(t.dtype), NEG_INF)
        t.fill_(NEG_INF).scatter_reduce_(1, torch.where(inside, ids, 0), values, "amax")

    def dense(self) -> Tensor:
        dense = self.log_probs.new_empty(self.num_rows, self.vocab_size, dtype=self.dtype)
        self.write(dense, slice(None), slice(0, self.vocab_size))
        return dense


def owned(x: Tensor) -> Tensor:
    """`x`, or a copy of a tensor of inference mode, which counts no changes in place and which autograd cannot save.

    A graph cannot ask; there, what inference mode made is refused by PyTorch.
    """
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x


def rebuild(kind: str, tensors: Sequence[Tensor], vocab_size: int) -> TargetTiles:
    """The tiles whose `kind` and `tensors()` these are."""
    if kind == TopKTiles.kind:
        log_probs, draft_ids = tensors
        return TopKTiles(log_probs, draft_ids, vocab_size)
    kinds: dict[str, Callable[..., TargetTiles]] = {
        c.kind: c for c in (HiddenTiles, ExactHiddenTiles, LogitsTiles, ProbsTiles)
    }
    return kinds[kind](*tensors)
