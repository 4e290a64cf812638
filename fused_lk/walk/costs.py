"""The products and bytes of a plan, without running it.

Each moment below lists what a walk holds then. Tests compare the sums with the accounting of real calls.
"""

from __future__ import annotations

from typing import NamedTuple

from .. import gemm
from ..rows import plain
from .plan import Plan

# Numbers per pair beside the statistics: weights, coefficients, gradients.
_VECTORS = 6

Parts = tuple[tuple[str, int], ...]


class TargetFacts(NamedTuple):
    """The numbers of a target beyond its tile: its kind, its rows, and the sizes of its head."""

    kind: str
    num_rows: int
    hidden_size: int
    vocab_size: int
    itemsize: int  # of its logits
    streams: bool  # whether a pass over its full vocabulary is made from hidden states
    cached: bool
    quantized: bool = False  # whether its head's weight is


class Costs:
    """What one call costs: `plan` carried out against `target`."""

    def __init__(self, plan: Plan, target: TargetFacts) -> None:
        self.plan, self.target, self.facts = plan, target, plan.facts
        f = self.facts
        self.needs_gradient = f.needs_hidden or f.needs_weight
        self.one_gemm = 2 * f.num_pairs * f.hidden_size * f.vocab_size
        self.pairs, self.targets = plan.chunk
        self.gathers = plan.layout.flat_rows is not None
        self.saved = 5 + 3 * len(f.terms)  # numbers per pair: `base [5]`, `values [T]` and `saved [2, T]`

    @property
    def draft_flops(self) -> int:
        f = self.facts
        return (1 + f.needs_hidden + f.needs_weight) * self.one_gemm + self.again * self.one_gemm // max(f.num_pairs, 1)

    @property
    def again(self) -> int:
        """The pairs whose logits are made again in the backward."""
        if self.plan.one_pass or not self.needs_gradient:
            return 0
        return self.facts.num_pairs if self.facts.kept.z is None else self.plan.rest.num_pairs

    @property
    def kept_bytes(self) -> int:
        return self.facts.kept_bytes(self.plan.kept.num_pairs, self.plan.kept.num_targets)

    def saved_by_a_mib(self) -> float:
        """The share of a draft product that a further MiB of kept logits saves, while there is one to save."""
        f = self.facts
        saved = self.one_gemm + (f.kept.t is not None) * self._of_target(f.num_targets)
        return saved / max(self.one_gemm, 1) * gemm.MIB / max(f.kept_bytes(f.num_pairs, f.num_targets), 1)

    def _of_target(self, rows: int) -> int:
        return 2 * rows * self.target.hidden_size * self.facts.vocab_size

    def target_flops(self) -> int:
        """The flops of the target's logits on the draft vocabulary, and of the pass over its full vocabulary."""
        target, flops = self.target, 0
        if target.kind == "hidden":
            again = self.plan.targets_again.num_targets if self.needs_gradient and not self.plan.one_pass else 0
            flops = self._of_target(self.facts.num_targets + again)
        return flops + target.streams * 2 * target.num_rows * target.hidden_size * target.vocab_size

    def floor_flops(self, from_hidden: bool) -> int:
        """Each draft product once, and the target's logits once per target row: a pass for a normaliser makes them."""
        f, target = self.facts, self.target
        draft = (1 + f.needs_hidden + f.needs_weight) * self.one_gemm
        if target.kind != "hidden" and not target.cached:
            return draft
        size = target.vocab_size if from_hidden else f.vocab_size
        return draft + 2 * f.num_targets * target.hidden_size * size

    def held_bytes(self) -> int:
        """What is held between forward and backward: the gradients in one pass, else the statistics of each pair."""
        if not self.needs_gradient:
            return 0
        if self.plan.one_pass:
            return self.d_hidden + self.d_weight(gemm.held_dtype(self.facts.dtype).itemsize)
        columns = 8 * (1 + ("ce" in self.facts.terms))  # the draft's argmax, and the label
        return self.facts.num_pairs * (self.saved * self.facts.accumulator.itemsize + columns) + self.kept_bytes

    def at_peak(self) -> Parts:
        """What is alive when the most is."""
        return max(self._moments(), key=lambda parts: sum(size for _, size in parts))

    @property
    def d_hidden(self) -> int:
        f = self.facts
        return f.num_rows * f.hidden_size * f.dtype.itemsize if f.needs_hidden else 0

    def d_weight(self, itemsize: int) -> int:
        return self.facts.vocab_size * self.facts.hidden_size * itemsize if self.facts.needs_weight else 0

    def _moments(self) -> list[Parts]:
        f, plan = self.facts, self.plan
        wide = gemm.wide_dtype(f.dtype)
        always: Parts = (("statistics", self._vector_bytes()), ("cached logits", self._cached()))
        moments: list[Parts] = [(*always, *self._stream())] if self.target.streams else []
        always = (*always, ("kept logits", self.kept_bytes))
        moments.append((*always, *self._row_walk(self.needs_gradient and plan.one_pass)))
        if not self.needs_gradient:
            return moments
        dh, dw, dw_wide = self.d_hidden, self.d_weight(f.dtype.itemsize), self.d_weight(wide.itemsize)
        cast = (*always, ("dH", dh), ("dW, accumulated", dw_wide), ("dW", dw if dw_wide != dw else 0))
        if plan.one_pass:
            if gemm.held_dtype(f.dtype) == f.dtype:
                moments.append(cast)
            return [*moments, (*always, ("gradients, held", self.held_bytes()), ("gradients", dh + dw))]
        if plan.block_columns is None:
            return [*moments, (*always, *self._row_walk(True)), cast]
        rows = f.num_pairs * f.hidden_size
        dh_wide = rows * wide.itemsize if f.needs_hidden else 0
        gathered = rows * f.dtype.itemsize if self.gathers or f.num_sources > 1 else 0
        targets = plan.targets_again.num_targets
        walk = (
            ("tiles", self._tile_bytes(f.num_pairs, targets, plan.block_columns)),
            ("hidden states, gathered", gathered),
        )
        widest = max(self._rows(plan.block_columns), self._dequantized(plan.block_columns), key=_size)
        blocks = (("target states, gathered", self._target_states(targets)), widest)
        scratch = ("upcast blocks", self._scratch(f.num_pairs, plan.block_columns, f.hidden_size))
        held_wide = gemm.held_dtype(f.dtype) != f.dtype
        wide_block = wide.itemsize * plan.block_columns * f.hidden_size if held_wide else 0
        sums = (("dH, accumulated", dh_wide), ("dW", dw), ("dW of a block, in float32", wide_block))
        narrow = rows * f.dtype.itemsize if f.needs_hidden and wide != f.dtype else 0
        scattered = dh if self.gathers or f.num_sources > 1 else 0
        return [
            *moments,
            (*always, *sums, *walk, *blocks),
            (*always, *sums, *walk, scratch),
            (*always, *sums, ("dH, rows", narrow)),
            (*always, ("dH, rows", narrow or dh_wide), ("dH", scattered), ("dW", dw)),
        ]

    def _row_walk(self, makes_gradient: bool) -> Parts:
        """What a chunk of full rows holds at its widest moment."""
        f, n = self.facts, self.pairs
        hidden = n * f.hidden_size * f.dtype.itemsize if self.gathers else 0
        tiles = self._tile_bytes(*self.plan.workspace(makes_gradient), f.vocab_size)
        parts = (("tiles", tiles), ("hidden states, gathered", hidden))
        rows, block = self._rows(f.vocab_size), self._dequantized(f.vocab_size)
        if not makes_gradient:
            of_target = (("target states, gathered", self._target_states(self.targets)), block)
            return (*parts, *max((rows,), of_target, key=lambda x: sum(map(_size, x))))
        upcast = self._scratch(f.vocab_size, n, f.hidden_size) if f.needs_weight else 0
        d_rows = hidden if f.needs_hidden else 0
        widest = max(rows, block, ("dH of the chunk", d_rows), ("upcast blocks", upcast), key=_size)
        wide = gemm.wide_dtype(f.dtype).itemsize
        return (*parts, ("dH", self.d_hidden), ("dW, accumulated", self.d_weight(wide)), widest)

    def _stream(self) -> Parts:
        f, target = self.facts, self.target
        itemsize = target.itemsize
        rows = gemm.rows_of_a_tile(target.vocab_size, target.num_rows, itemsize, f.device, f.budget)
        draft_columns = rows * self._cached() // max(target.num_rows, 1) if target.vocab_size != f.vocab_size else 0
        of_rows = self._rows(target.vocab_size, plain.LSE_BUFFERS)
        return (
            ("target tile", rows * gemm.row_stride(target.vocab_size) * itemsize),
            ("draft columns", draft_columns),
            max(of_rows, self._dequantized(target.vocab_size), key=_size),
        )

    def _cached(self) -> int:
        f, target = self.facts, self.target
        return target.cached * gemm.row_stride(f.vocab_size) * target.num_rows * target.itemsize

    def _tile_bytes(self, pairs: int, targets: int, columns: int) -> int:
        draft_row, target_row = self.facts.row_bytes(columns)
        return pairs * draft_row + targets * target_row

    def _target_states(self, targets: int) -> int:
        if self.target.kind != "hidden" or self.plan.layout.unique_targets is None:
            return 0
        return targets * self.target.hidden_size * self.facts.dtype.itemsize

    def _rows(self, columns: int, buffers: int | None = None) -> tuple[str, int]:
        """The buffers of the PyTorch row operations. The kernels have none."""
        on_gpu = self.facts.impl == "auto" and not gemm.is_cpu(self.facts.device)
        if self.facts.impl == "triton" or on_gpu:
            return "rows", 0
        buffers = plain.num_buffers(self.facts.terms) if buffers is None else buffers
        rows = plain.rows_of_a_block(columns, buffers)
        return "rows", buffers * rows * columns * self.facts.accumulator.itemsize

    def _dequantized(self, columns: int) -> tuple[str, int]:
        """A block of a quantised head, in float32 and in the dtype of the product."""
        h, dtype = self.target.hidden_size, self.facts.dtype
        wide = gemm.wide_dtype(dtype)
        itemsize = wide.itemsize + (dtype.itemsize if dtype != wide else 0)
        return "dequantised block", self.target.quantized * min(gemm.block_rows(h), columns) * h * itemsize

    def _scratch(self, m: int, k: int, n: int) -> int:
        f = self.facts
        return gemm.accumulate_scratch(m, k, n, f.dtype, gemm.wide_dtype(f.dtype), f.device)

    def _vector_bytes(self) -> int:
        argmaxes = 2 * 8
        return self.facts.num_pairs * ((self.saved + _VECTORS) * self.facts.accumulator.itemsize + argmaxes)


def _size(part: tuple[str, int]) -> int:
    return part[1]
