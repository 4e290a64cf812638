"""The two tiles of logits: the only memory whose size has to do with the vocabulary, allocated once per walk."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements; a row of any vocabulary then starts on a 128-byte boundary in every dtype of two bytes or more, so that
# odd vocabularies load 128 bits at a time too.
ROW_ALIGNMENT = 64


def row_stride(columns: int) -> int:
    """Elements from one row of a tile to the next."""
    return -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT


class Tile:
    """A flat buffer that is handed out as `[rows, columns]` with a padded row stride."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self._flat = torch.empty(rows * row_stride(columns), dtype=dtype, device=device)

    @property
    def dtype(self) -> torch.dtype:
        return self._flat.dtype

    def view(self, rows: int, columns: int) -> Tensor:
        """The first `rows * row_stride(columns)` elements as `[rows, columns]`."""
        stride = row_stride(columns)
        return self._flat[: rows * stride].view(rows, stride)[:, :columns]
