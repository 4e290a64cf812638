"""The draft side of a walk: where its logits come from, and where their gradient goes.

`LinearDraft` makes logits from hidden states and an `lm_head`; `LogitsDraft` is handed them. Either fills a tile of
logits for a chunk of pairs, and its gradients take the tile back as the gradient with respect to those logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import gemm
from .layout import Chunk, Layout
from .rows.interface import accumulation_dtype


def _gather(sources: Sequence[Tensor], layout: Layout, chunk: Chunk, out: Tensor | None) -> Tensor:
    """The chunk's draft rows `[n, ...]`: a view where they are one run of one source, else a copy into `out`.

    Ignored rows that are kept for shape are zero-filled: a zero gradient times NaN is NaN.
    """
    n, valid = chunk.num_pairs, layout.valid
    if layout.flat_rows is None and valid is None and len(chunk.segments) == 1:
        segment = chunk.segments[0]
        return sources[segment.source][layout.rows_of(segment)]
    if out is None:
        out = sources[0].new_empty(n, sources[0].shape[1])
    for segment in chunk.segments:
        into = out[segment.start - chunk.start : segment.stop - chunk.start]
        source, rows = sources[segment.source], layout.rows_of(segment)
        if isinstance(rows, slice):
            into.copy_(source[rows])
        else:
            torch.index_select(source, 0, rows, out=into)
    return out if valid is None else out.masked_fill_(~valid[chunk.start : chunk.stop].unsqueeze(1), 0.0)


def _scatter(sources: Sequence[Tensor | None], layout: Layout, chunk: Chunk, rows: Tensor) -> None:
    """Write the chunk's `rows` to their places in `sources`; a draft row belongs to one pair at most."""
    for segment in chunk.segments:
        into, at = sources[segment.source], layout.rows_of(segment)
        if into is None:
            continue
        part = rows[segment.start - chunk.start : segment.stop - chunk.start]
        if isinstance(at, slice):
            into[at] = part
        else:
            into.index_copy_(0, at, part)


def _gradient_buffers(sources: Sequence[Tensor], needs: Sequence[bool], layout: Layout) -> list[Tensor | None]:
    """A buffer for each source that needs a gradient; zeroed unless every row will be written."""
    make = torch.empty_like if layout.flat_rows is None else torch.zeros_like
    return [
        make(x, memory_format=torch.contiguous_format) if need else None for x, need in zip(sources, needs, strict=True)
    ]


class LinearDraft:
    """Logits `z = h @ weight.T + bias` of hidden states `h` in one or more tensors `[R, H]`.

    `logits_dtype` float32 keeps the products' float32 results in the tile.
    """

    def __init__(
        self, sources: Sequence[Tensor], weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype | None = None
    ) -> None:
        self.sources, self.weight, self.bias = sources, weight, bias
        self.vocab_size = weight.shape[0]
        self.dtype = weight.dtype
        self.logits_dtype = torch.promote_types(weight.dtype, logits_dtype or weight.dtype)

    def tile_dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of the draft's tiles: logits, and gradient where that cannot lie over them."""
        return (self.logits_dtype,) if self.logits_dtype == self.dtype else (self.logits_dtype, self.dtype)

    def tile_is_view(self, in_order: bool) -> bool:
        return False

    def fill(
        self, layout: Layout, chunk: Chunk, columns: slice, tile: Tensor | None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`(z, h)` of the chunk's pairs for a block of columns; `h` may be handed in as `rows`."""
        assert tile is not None  # these logits lie nowhere yet
        h = _gather(self.sources, layout, chunk, None) if rows is None else rows
        z = tile[: chunk.num_pairs, : columns.stop - columns.start]
        gemm.linear_into(z, h, self.weight[columns], None if self.bias is None else self.bias[columns])
        return z, h

    def all_rows(self, layout: Layout, chunk: Chunk) -> Tensor:
        """`h` of all pairs at once, `[P, H]`."""
        return _gather(self.sources, layout, chunk, None)

    def hidden_gradients(
        self, layout: Layout, chunk: Chunk, rows: Tensor | None, scale: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """dH of each source from `rows` `[P, H]`, times `scale`."""
        if rows is None:
            return [None] * len(self.sources)
        scaled = times(rows, scale, self.dtype, in_place=True)
        if layout.flat_rows is None and len(self.sources) == 1:
            return [scaled]
        buffers = _gradient_buffers(self.sources, needs, layout)
        _scatter(buffers, layout, chunk, scaled)
        return buffers

    def gradients(self, layout: Layout, needs: Sequence[bool]) -> LinearGradients:
        return LinearGradients(self, layout, needs)


class LinearGradients:
    """dH, dW and db; `needs` says which of `(*sources, weight[, bias])` want one.

    The tiles hold gradients near unit scale; `scaled` applies the scale, on the way into the final dtype. dW and db
    are kept in the accumulation dtype until then.
    """

    def __init__(self, draft: LinearDraft, layout: Layout, needs: Sequence[bool]) -> None:
        self.draft, self.layout = draft, layout
        k = len(draft.sources)
        self.hidden = _gradient_buffers(draft.sources, needs[:k], layout)
        acc = accumulation_dtype(draft.weight)
        self.weight = draft.weight.new_zeros(draft.weight.shape, dtype=acc) if needs[k] else None
        wants_bias = draft.bias is not None and needs[k + 1]
        self.bias = draft.weight.new_zeros(draft.vocab_size, dtype=acc) if wants_bias else None

    def gradient_tile(self, chunk: Chunk, z: Tensor, tile: Tensor | None) -> Tensor:
        """Where the row operations write: over the logits, or a tile of the compute dtype."""
        return z if tile is None else tile[: z.shape[0], : z.shape[1]]

    def add(self, chunk: Chunk, h: Tensor | None, g: Tensor) -> None:
        """Take the gradient `g` `[n, V]` with respect to the chunk's logits."""
        draft, layout = self.draft, self.layout
        if any(x is not None for x in self.hidden):
            if layout.flat_rows is None and len(chunk.segments) == 1:
                into = self.hidden[chunk.segments[0].source]
                if into is not None:
                    gemm.product_into(into[layout.rows_of(chunk.segments[0])], g, draft.weight)
            else:
                _scatter(self.hidden, layout, chunk, torch.mm(g, draft.weight))
        if self.weight is not None and h is not None:
            gemm.accumulate(self.weight, g.t(), h)
        if self.bias is not None:
            self.bias.add_(g.sum(0, dtype=self.bias.dtype))

    def held(self) -> list[Tensor | None]:
        """The gradients as they wait for their scale: in their final dtype, half precision's narrow range excepted."""
        keep_wide = self.draft.dtype == torch.float16
        head = [x if x is None or keep_wide else x.to(self.draft.dtype) for x in self._release_head()]
        return [*self.hidden, *head]

    def scaled(self, scale: Tensor) -> list[Tensor | None]:
        """The gradients times `scale`, in their final dtypes, reusing their memory where that has the right dtype."""
        hidden = [_times(x, scale, self.draft.dtype) for x in self.hidden]
        return [*hidden, *(_times(x, scale, self.draft.dtype) for x in self._release_head())]

    def _release_head(self) -> list[Tensor | None]:
        head = [self.weight] if self.draft.bias is None else [self.weight, self.bias]
        self.weight = self.bias = None
        return head


class LogitsDraft:
    """Logits in hand, in one or more tensors `[R, V]`; read in place, never written."""

    def __init__(self, sources: Sequence[Tensor]) -> None:
        self.sources = sources
        self.vocab_size = sources[0].shape[1]
        self.dtype = self.logits_dtype = sources[0].dtype

    def tile_dtypes(self) -> tuple[torch.dtype, ...]:
        return (self.dtype,)

    def tile_is_view(self, in_order: bool) -> bool:
        """Whether chunks are runs of rows with unit stride, which the row operations read where they are."""
        return in_order and all(x.stride(1) == 1 for x in self.sources)

    def fill(
        self, layout: Layout, chunk: Chunk, columns: slice, tile: Tensor | None, rows: Tensor | None = None
    ) -> tuple[Tensor, None]:
        out = None if tile is None else tile[: chunk.num_pairs]
        z = _gather(self.sources, layout, chunk, out)
        return (z if out is None or z is out else out.copy_(z)), None

    def gradients(self, layout: Layout, needs: Sequence[bool]) -> LogitsGradients:
        return LogitsGradients(self, layout, needs)


class LogitsGradients:
    """The gradient with respect to logits in hand: as large as they are, and written nowhere else."""

    def __init__(self, draft: LogitsDraft, layout: Layout, needs: Sequence[bool]) -> None:
        self.layout = layout
        self.logits = _gradient_buffers(draft.sources, needs, layout)
        self.in_place = draft.tile_is_view(layout.in_order)

    def gradient_tile(self, chunk: Chunk, z: Tensor, tile: Tensor | None) -> Tensor:
        if not self.in_place:
            return z
        into = self.logits[chunk.segments[0].source]
        return torch.empty_like(z) if into is None else into[self.layout.rows_of(chunk.segments[0])]

    def add(self, chunk: Chunk, h: Tensor | None, g: Tensor) -> None:
        if not self.in_place:
            _scatter(self.logits, self.layout, chunk, g)

    def held(self) -> list[Tensor | None]:
        return list(self.logits)

    def scaled(self, scale: Tensor) -> list[Tensor | None]:
        return [x if x is None else times(x, scale, x.dtype, in_place=True) for x in self.logits]


def times(x: Tensor, scale: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """`x * scale` in `dtype`; over `x` where `in_place` and the dtype allow.

    `scale` is `[1]`, not a scalar tensor: that makes the product one of `scale`'s dtype, rounded once.
    """
    return torch.mul(x, scale, out=x if in_place and x.dtype == dtype else torch.empty_like(x, dtype=dtype))


def _times(x: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    return x if x is None else times(x, scale, dtype, in_place=True)
