"""The draft's side of a walk: where its logits come from, and where their gradient goes.

`LinearDraft` makes logits from hidden states and an `lm_head`, `LowRankDraft` makes them from two such products, and
`LogitsDraft` has the logits of a caller. Each fills a tile with the logits of a chunk of pairs and a block of columns.
Each has an object for the gradients, which either walk hands the gradient with respect to such a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import gemm
from ..pairs.layout import Chunk, Layout
from .plan import Plan
from .problem import Problem

Gradients = list[Tensor | None]


def draft_of(problem: Problem) -> LinearDraft | LowRankDraft | LogitsDraft:
    tensors, k, second = [x.detach() for x in problem.tensors], problem.num_sources, problem.low_rank
    sources = [x.reshape(-1, x.shape[-1]) for x in tensors[:k]]
    if not problem.linear:
        return LogitsDraft(sources)
    weight, *bias = tensors[k : second.start]
    draft = LinearDraft(sources, weight, bias[0] if bias else None)
    if not tensors[second]:
        return draft
    *sources, weight = tensors[second]
    return LowRankDraft(draft, LinearDraft([x.reshape(-1, x.shape[-1]) for x in sources], weight, None))


class LinearDraft:
    """Logits `h @ weight.T + bias` of hidden states `h` in one or more tensors `[R, H]`."""

    def __init__(self, sources: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> None:
        self.sources, self.weight, self.bias = sources, weight, bias

    def rows(self, layout: Layout, chunk: Chunk) -> Tensor:
        """The chunk's hidden states."""
        return _gather(self.sources, layout, chunk, None)

    def fill(self, layout: Layout, chunk: Chunk, h: Tensor, columns: slice, tile: Tensor | None) -> Tensor:
        """The logits of the hidden states `h` for a block of columns."""
        assert tile is not None  # these logits lie nowhere yet
        z = tile[: h.shape[0], : columns.stop - columns.start]
        gemm.linear_into(z, h, self.weight[columns], None if self.bias is None else self.bias[columns])
        return z

    def gradients(self, plan: Plan, needs: Sequence[bool], scale: Tensor | None = None) -> LinearGradients:
        return LinearGradients(self, plan, needs, scale)


class LinearGradients:
    """dH, dW and db. `needs` says which of `(*sources, weight[, bias])` want one.

    The tiles hold gradients near unit scale. They are multiplied by `scale` `[1]` on the way into their final dtypes.
    Without a `scale` they are held until it is known. A walk writes one of dH and dW a piece at a time, and adds up the
    other in the accumulation dtype.
    """

    def __init__(self, draft: LinearDraft, plan: Plan, needs: Sequence[bool], scale: Tensor | None) -> None:
        self.draft, self.layout, self.scale = draft, plan.layout, scale
        self.by_vocabulary = plan.block_columns is not None and scale is not None
        self.needs = needs[: len(draft.sources)]
        weight, wide = draft.weight, gemm.wide_dtype(draft.weight.dtype)
        needs_weight, needs_bias = (*needs[len(draft.sources) :], False)[:2]
        self.hidden: Gradients = [None] * len(self.needs)
        self.rows: Tensor | None = None
        if not self.by_vocabulary:
            self.hidden = _buffers(draft.sources, self.needs, self.layout)
        elif any(self.needs):
            self.rows = weight.new_zeros(self.layout.num_pairs, weight.shape[1], dtype=wide)
        self.weight = None
        if needs_weight and self.by_vocabulary:
            self.weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        elif needs_weight:
            self.weight = weight.new_zeros(weight.shape, dtype=wide)
        self.bias = weight.new_zeros(weight.shape[0], dtype=wide) if needs_bias else None

    def tile(self, chunk: Chunk, z: Tensor, tile: Tensor | None) -> Tensor:
        """Where the row operations write the gradient: over the logits, or into a tile of the compute dtype."""
        return z if tile is None else tile[: z.shape[0], : z.shape[1]]

    def add(self, chunk: Chunk, h: Tensor, columns: slice, g: Tensor) -> None:
        """Take the gradient `g` with respect to the chunk's logits in `columns`."""
        if self.rows is not None:
            gemm.accumulate(self.rows, g, self.draft.weight[columns])
        if any(x is not None for x in self.hidden):
            self._write_hidden(chunk, g)
        if self.weight is not None and self.by_vocabulary and self.scale is not None:
            block = self.weight[columns]
            held = gemm.held_dtype(block.dtype)
            product = block if held == block.dtype else torch.empty_like(block, dtype=held)
            gemm.product_into(product, g.t(), h)
            torch.mul(product, self.scale, out=block)
        elif self.weight is not None:
            gemm.accumulate(self.weight, g.t(), h)
        if self.bias is not None:
            self.bias[columns] += g.sum(0, dtype=self.bias.dtype)

    def _write_hidden(self, chunk: Chunk, g: Tensor) -> None:
        layout, weight = self.layout, self.draft.weight
        if layout.flat_rows is not None or len(chunk.segments) > 1:
            _scatter(self.hidden, layout, chunk, torch.mm(g, weight))
        elif (into := self.hidden[chunk.segments[0].source]) is not None:
            gemm.product_into(into[layout.rows_of(chunk.segments[0])], g, weight)

    def done(self) -> Gradients:
        """The gradients, in their final dtypes where the scale is known. Sums give up their memory on the way."""
        dtype, scale = self.draft.weight.dtype, self.scale
        head = [self.weight] if self.draft.bias is None else [self.weight, self.bias]
        by_vocabulary, self.weight, self.bias = self.by_vocabulary, None, None
        if scale is None:
            held = gemm.held_dtype(dtype)
            return [*self.hidden, *(x if x is None else x.to(held) for x in head)]
        if not by_vocabulary:
            return [times(x, scale, dtype) for x in (*self.hidden, *head)]
        rows, self.rows = times(self.rows, scale, dtype), None
        return [*self._to_sources(rows), head[0], *(times(x, scale, dtype) for x in head[1:])]

    def _to_sources(self, rows: Tensor | None) -> Gradients:
        """`rows` of all pairs as the gradients of the sources."""
        if rows is None or (self.layout.flat_rows is None and len(self.hidden) == 1):
            return [rows] * len(self.hidden)
        buffers = _buffers(self.draft.sources, self.needs, self.layout)
        _scatter(buffers, self.layout, self.layout.whole(), rows)
        return buffers


class LowRankDraft:
    """Logits `h @ weight.T + bias + u @ M.T`: the head's product, and a second one of few columns r, `u` `[R, r]`."""

    def __init__(self, head: LinearDraft, second: LinearDraft) -> None:
        self.both = head, second

    def rows(self, layout: Layout, chunk: Chunk) -> tuple[Tensor, Tensor]:
        head, second = self.both
        return head.rows(layout, chunk), second.rows(layout, chunk)

    def fill(
        self, layout: Layout, chunk: Chunk, h: tuple[Tensor, Tensor], columns: slice, tile: Tensor | None
    ) -> Tensor:
        head, second = self.both
        z = head.fill(layout, chunk, h[0], columns, tile)
        gemm.accumulate(z, h[1], second.weight[columns].t())
        return z

    def gradients(self, plan: Plan, needs: Sequence[bool], scale: Tensor | None = None) -> LowRankGradients:
        head, second = self.both
        cut = len(needs) - len(second.sources) - 1
        return LowRankGradients(head.gradients(plan, needs[:cut], scale), second.gradients(plan, needs[cut:], scale))


class LowRankGradients:
    """The gradients of both products, which take the same gradient of the logits."""

    def __init__(self, head: LinearGradients, second: LinearGradients) -> None:
        self.both, self.tile = (head, second), head.tile

    def add(self, chunk: Chunk, h: tuple[Tensor, Tensor], columns: slice, g: Tensor) -> None:
        for made, rows in zip(self.both, h, strict=True):
            made.add(chunk, rows, columns, g)

    def done(self) -> Gradients:
        return [x for made in self.both for x in made.done()]


class LogitsDraft:
    """Logits that the caller holds, in one or more tensors `[R, V]`. They are never written."""

    def __init__(self, sources: Sequence[Tensor]) -> None:
        self.sources = sources

    def rows(self, layout: Layout, chunk: Chunk) -> None:
        return None

    def fill(self, layout: Layout, chunk: Chunk, h: None, columns: slice, tile: Tensor | None) -> Tensor:
        out = None if tile is None else tile[: chunk.stop - chunk.start]
        z = _gather(self.sources, layout, chunk, out)
        return z if out is None or z is out else out.copy_(z)

    def gradients(self, plan: Plan, needs: Sequence[bool], scale: Tensor | None = None) -> LogitsGradients:
        return LogitsGradients(self, plan, needs, scale)


class LogitsGradients:
    """The gradient with respect to the caller's logits. It is as large as they are, and is written in its own place."""

    def __init__(self, draft: LogitsDraft, plan: Plan, needs: Sequence[bool], scale: Tensor | None) -> None:
        self.layout, self.scale = plan.layout, scale
        self.logits = _buffers(draft.sources, needs, plan.layout)
        self.in_place = plan.facts.tiles.z is None

    def tile(self, chunk: Chunk, z: Tensor, tile: Tensor | None) -> Tensor:
        if not self.in_place:
            return z
        into = self.logits[chunk.segments[0].source]
        return torch.empty_like(z) if into is None else into[self.layout.rows_of(chunk.segments[0])]

    def add(self, chunk: Chunk, h: None, columns: slice, g: Tensor) -> None:
        if not self.in_place:
            _scatter(self.logits, self.layout, chunk, g)

    def done(self) -> Gradients:
        if self.scale is None:
            return self.logits
        return [x if x is None else times(x, self.scale, x.dtype) for x in self.logits]


GradientsOfDraft = LinearGradients | LowRankGradients | LogitsGradients


def narrowed(h: Tensor | tuple[Tensor, ...], pairs: slice) -> Tensor | tuple[Tensor, ...]:
    """The hidden states of some of the pairs that `h`, the `rows` of a draft, has."""
    return h[pairs] if isinstance(h, Tensor) else tuple(x[pairs] for x in h)


def near_unit_scale(coefficients: Tensor) -> Tensor:
    """`[1]`: the power of two just above the largest finite magnitude; 1 where there is none.

    The gradients of rows are divided by it, and their sums are multiplied by it. Both are exact. Without this, the
    weight 1/N of a mean would flush the tiles of half precision to zero.
    """
    one = coefficients.new_ones(1)
    if coefficients.numel() == 0:
        return one
    _, exponent = torch.frexp(coefficients.nan_to_num(0.0, 0.0, 0.0).abs().amax())  # 0 of 0
    return torch.ldexp(one, exponent).to(one.dtype)  # of torch 2.6 in the default dtype


def times(x: Tensor | None, scale: Tensor | None, dtype: torch.dtype, *, in_place: bool = True) -> Tensor | None:
    """`x * scale` in `dtype`, written over `x` where `in_place` and the dtype allow it.

    `scale` has shape `[1]`. A scalar tensor would leave the product in the dtype of `x`; this one rounds once.
    """
    if x is None or scale is None:
        return x
    return torch.mul(x, scale, out=x if in_place and x.dtype == dtype else torch.empty_like(x, dtype=dtype))


def _gather(sources: Sequence[Tensor], layout: Layout, chunk: Chunk, out: Tensor | None) -> Tensor:
    """The chunk's draft rows `[n, ...]`: a view where they lie together in one source, else a copy in `out`.

    Ignored rows that are kept for their shape become 0, because a zero gradient times NaN is NaN.
    """
    valid = layout.valid
    if layout.flat_rows is None and valid is None and len(chunk.segments) == 1:
        segment = chunk.segments[0]
        return sources[segment.source][layout.rows_of(segment)]
    if out is None:
        out = sources[0].new_empty(chunk.stop - chunk.start, sources[0].shape[1])
    for segment in chunk.segments:
        into = out[segment.start - chunk.start : segment.stop - chunk.start]
        source, rows = sources[segment.source], layout.rows_of(segment)
        if isinstance(rows, slice):
            into.copy_(source[rows])
        else:
            torch.index_select(source, 0, rows, out=into)
    return out if valid is None else out.masked_fill_(~valid[chunk.start : chunk.stop].unsqueeze(1), 0.0)


def _scatter(sources: Gradients, layout: Layout, chunk: Chunk, rows: Tensor) -> None:
    """Write the chunk's `rows` to their places in `sources`. A draft row belongs to one pair at most."""
    for segment in chunk.segments:
        into, at = sources[segment.source], layout.rows_of(segment)
        if into is None:
            continue
        part = rows[segment.start - chunk.start : segment.stop - chunk.start]
        if isinstance(at, slice):
            into[at] = part
        else:
            into.index_copy_(0, at, part)


def _buffers(sources: Sequence[Tensor], needs: Sequence[bool], layout: Layout) -> Gradients:
    """A buffer for each source that needs a gradient. It is zeroed unless every row will be written."""
    make = torch.empty_like if layout.flat_rows is None else torch.zeros_like
    return [
        make(x, memory_format=torch.contiguous_format) if need else None for x, need in zip(sources, needs, strict=True)
    ]
