"""Keys and values of tokens, by position: what speculative decoding can take back.

A pass writes the keys of its tokens at their positions, and each token sees the positions up to its own. What a refused
token left behind lies at later positions, and the next pass over them writes over it. So nothing has to be taken back.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Cache:
    """For each layer, keys and values `[B, key heads, slots, head]`. (transformers' models call `update`.)"""

    def __init__(self, layers: int, batch: int, key_heads: int, slots: int, head: int, dtype: torch.dtype) -> None:
        shape = (batch, key_heads, slots, head)
        self.keys = [torch.zeros(shape, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype) for _ in range(layers)]
        self.slots = torch.arange(slots)

    def at(self, positions: Tensor) -> None:
        """The next pass is over tokens at `positions` `[B, m]`: consecutive, in each row."""
        self.positions = positions
        self.top = int(positions.max()) + 1
        self.mask = self.slots[: self.top] <= positions[:, None, :, None]  # [B, 1, m, top]
        self.rows = torch.arange(len(positions)).unsqueeze(-1)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Write the pass's keys and values `[B, key heads, m, head]`; all of them up to the last position."""
        both = ((self.keys[layer], keys), (self.values[layer], values))
        for kept, new in both:
            if len(kept) == 1:
                kept[:, :, self.top - new.shape[2] : self.top] = new
            else:
                kept[self.rows, :, self.positions] = new.transpose(1, 2)
        return self.keys[layer][:, :, : self.top], self.values[layer][:, :, : self.top]

    def keep(self, rows: Tensor) -> None:
        """Forget all rows of the batch but these."""
        self.keys, self.values = ([x[rows] for x in kept] for kept in (self.keys, self.values))

    def put(self, rows: Tensor, other: Cache) -> None:
        """Let these rows of the batch be those of another cache, of as many slots."""
        for kept, new in zip([*self.keys, *self.values], [*other.keys, *other.values], strict=True):
            kept[rows] = new
