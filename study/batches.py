"""Packed batches of texts and of the target's states of them, read from disk as they are needed.

A row of a batch holds whole sequences, as many as fit. Which ones depends on a seed and the number of the epoch alone,
so a training that goes on after a kill sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:  # which packs its rows with what is below
    from .features import Features

Row = list[slice]  # the sequences of a row, as slices of the texts


@dataclass(frozen=True)
class Batch:
    """Rows `[B, S]`, right-padded; padding is a sequence of its own that nothing supervises."""

    tokens: Tensor  # int64
    mask: Tensor  # bool
    sequence_ids: Tensor  # int64
    fused: Tensor  # [B, S, 3 H]
    last: Tensor  # [B, S, H]
    normalizer: Tensor | None = None  # [B, S], where the target's are known
    argmax: Tensor | None = None

    def to(self, device: str) -> Batch:
        return Batch(*(None if part is None else part.to(device) for part in vars(self).values()))  # type: ignore[arg-type]


def sequences(features: Features, most: int) -> list[slice]:
    """Where each sequence lies. Those longer than `most` are cut there."""
    ids = np.asarray(features.sequence_ids)
    starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1))
    ends = np.append(starts[1:], len(ids))
    return [slice(int(a), int(min(b, a + most))) for a, b in zip(starts, ends, strict=True) if ids[a] >= 0]


def packed(pieces: Sequence[slice], length: int) -> list[Row]:
    """Rows of at most `length` tokens: each sequence goes to the first of the open rows that has room for it."""
    rows: list[Row] = []
    open_rows: list[tuple[int, int]] = []  # (row, room)
    for piece in pieces:
        size = piece.stop - piece.start
        for i, (row, room) in enumerate(open_rows):
            if size <= room:
                rows[row].append(piece)
                open_rows[i] = (row, room - size)
                break
        else:
            rows.append([piece])
            open_rows.append((len(rows) - 1, length - size))
            del open_rows[:-64]
    return rows


def endless(pieces: Sequence[slice], length: int, batch: int, seed: int) -> Iterator[list[Row]]:
    """Batches of rows for ever; each epoch shuffles the sequences, and leaves out a last batch that is not full."""
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(len(pieces))
        rows = packed([pieces[i] for i in order], length)
        if len(rows) < batch:
            raise ValueError(f"expected texts for one batch of {batch} rows, got {len(rows)}. Make more answers.")
        yield from (rows[i : i + batch] for i in range(0, len(rows) - batch + 1, batch))
        epoch += 1


def read(features: Features, rows: Sequence[Row], length: int, scores: tuple[np.ndarray, np.ndarray] | None) -> Batch:
    """The batch of these rows, `length` tokens each; `scores` are the target's normaliser and argmax of all tokens."""

    def stacked(part, dtype: torch.dtype, padding: float = 0) -> Tensor:
        first = part(rows[0][0])
        out = torch.full((len(rows), length, *first.shape[1:]), padding, dtype=dtype, device="cpu")
        for row, pieces in zip(out, rows, strict=True):
            at = 0
            for piece in pieces:
                size = piece.stop - piece.start
                row[at : at + size] = part(piece)
                at += size
        return out

    def of(array: np.ndarray):
        return lambda at: torch.from_numpy(np.array(array[at]))

    # A sequence's id here is where it starts in the texts.
    return Batch(
        stacked(of(features.token_ids), torch.long),
        stacked(of(features.mask), torch.bool),
        stacked(lambda at: torch.full((at.stop - at.start,), at.start), torch.long, -1),
        stacked(features.fused, torch.bfloat16),
        stacked(features.last, torch.bfloat16),
        *(() if scores is None else (stacked(of(scores[0]), torch.float32), stacked(of(scores[1]), torch.long))),
    )
