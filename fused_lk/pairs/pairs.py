"""The work list: which draft row is scored against which target row.

Loss masks, padding, the shift of test-time-training steps, blocks and anchors of block drafters, packing: each is a
list of pairs. A row that is in no pair costs nothing.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks
from . import patterns

_IGNORED = torch.iinfo(torch.long).max


class Pairs:
    """The supervised (draft row, target row) pairs of a batch, sorted by target row. Build it once, use it many times.

    Args:
        mask: bool, integers 0 and 1 (as tokenizers give an attention mask), or float weights >= 0. Its shape `[...]` is
            that of the draft hidden states without the last dimension. False or 0 ignores a row. Default: each row
            counts 1.
        target_rows: int64 `[...]`: the row of the *flattened* target that each draft row is scored against; -1 ignores
            the draft row. Default: row i against row i.
        positions: int64 `[...]`: the draft position (TTT step) of each row, from 0 on. Default: one position.
        num_positions: how many positions there are. It is required with `positions`.
        position_dim: instead of both, the dimension of the shape along which the positions run, from 0 to its size - 1.
            Rows that differ in this dimension only are one block, such as the steps from one anchor. So the sums over
            blocks in `LKSums` are known.
        skip_masked: True compacts the rows, which costs one host synchronisation here. False keeps every row: there is
            no synchronisation, shapes are static (as CUDA graphs need), and ignored rows become exact zeros after the
            matrix products. Then the contents of tensors on a device are checked with FUSED_LK_VALIDATE=1 only. Under
            `torch.compile` the loss's operator compacts the rows, and checks the range of target rows only.

    Tensors are copied where needed, so that a tensor that changes later changes no pairs.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices; negative or NaN weights; integer masks of other than 0
            and 1; target rows below -1; positions outside `[0, num_positions)`; one of `positions` and
            `num_positions` without the other; `position_dim` with them, without a shape, or outside of it.
    """

    def __init__(
        self,
        mask: Tensor | None = None,
        target_rows: Tensor | None = None,
        positions: Tensor | None = None,
        num_positions: int | None = None,
        *,
        position_dim: int | None = None,
        skip_masked: bool = True,
    ) -> None:
        inputs = {"mask": mask, "target_rows": target_rows, "positions": positions}
        given = {name: x for name, x in inputs.items() if x is not None}
        for name, x in given.items():
            dtypes = (*checks.MASKS, *checks.FLOATS) if name == "mask" else (torch.int64,)
            checks.tensor(name, x, dtypes=dtypes)
        first, like = [*given.items(), ("", torch.empty(0))][0]
        for name, x in given.items():
            checks.shape(name, x, tuple(like.shape), f"the shape of {first}")
            checks.same_device(like.device, **{name: x})
        self.position_dim: int | None = None
        if position_dim is not None:
            self.position_dim = _dimension(position_dim, like if given else None, positions, num_positions)
            num_positions = like.shape[self.position_dim]
            along = [-1 if d == self.position_dim else 1 for d in range(like.ndim)]
            steps = torch.arange(num_positions, device=like.device)
            positions = given["positions"] = steps.view(along).expand(like.shape)
        if positions is not None and num_positions is None:
            remedy = "Pass num_positions, the number of draft positions."
            checks.fail("num_positions with positions", "positions alone", remedy)
        self.num_positions = 1 if num_positions is None else checks.integer("num_positions", num_positions)
        if positions is None and self.num_positions > 1:
            remedy = "Pass the position of each row."
            checks.fail("positions with num_positions > 1", "num_positions alone", remedy)

        self.shape = tuple(like.shape) if given else None
        self.device = like.device if given else None
        self.skip_masked = checks.flag("skip_masked", skip_masked)
        self.names_targets = target_rows is not None  # then the target may have more rows than the draft
        self.draft_rows: Tensor | None = None  # [P], None: pair i is row i
        self.target_rows: Tensor | None = None  # [P], None: pair i meets target row i
        self.weights: Tensor | None = None  # [P], None: each counts 1
        self.positions: Tensor | None = None
        self.valid: Tensor | None = None  # bool [P], where ignored rows are kept
        # Number of pairs, and of distinct target rows; None: as many as the draft has rows.
        self.num_pairs = math.prod(self.shape) if self.shape is not None else None
        self.num_targets: int | None = None
        self.last_layout: Any = None  # see `layout.Layout.of`
        if not given:
            return
        flat = {name: x.detach().reshape(-1) for name, x in given.items()}
        arrange = self._keep if torch.compiler.is_compiling() or not self.skip_masked else self._compact
        if torch.compiler.is_compiling():
            arrange(flat.get("mask"), flat.get("target_rows"), flat.get("positions"))
            return
        with torch.inference_mode(False):  # pairs that are made during an evaluation serve in training too
            arrange(flat.get("mask"), flat.get("target_rows"), flat.get("positions"))

    @classmethod
    def ttt(
        cls,
        loss_mask: Tensor,
        steps: int,
        shift: int = 1,
        *,
        sequence_ids: Tensor | None = None,
        draft_length: int | None = None,
        skip_masked: bool = True,
    ) -> Pairs:
        """The pairs of test-time training: draft row t of step k against target row t + shift + k.

        That target row predicts token t + shift + k + 1. The pair counts where this token is supervised, before the
        sequence ends. (In EAGLE-3 row t has seen the tokens up to t + 1 + k, so that shift is 1.)

        Args:
            loss_mask: bool, integers 0 and 1, or weights >= 0, `[B, S]`: the tokens that count as predictions.
            steps: number of TTT steps K, each a draft position.
            shift: target row less draft row in step 0, >= 0.
            sequence_ids: int64 `[B, S]`, where rows pack several sequences: a pair stays inside one sequence.
            draft_length: the draft has this many rows, the first of the S. Where a sequence is sharded over ranks
                (context parallelism), a rank's target and mask go on with the first `shift + steps` rows of the next
                rank, and its draft does not. Default: S.
            skip_masked: as in `Pairs`.

        Returns:
            Pairs of shape `[K, B, S]`: of a list of K hidden states `[B, S, H]` against a target of `[B, S]` rows.
            With `draft_length` it stands for S in the shape of the pairs, and in that of the hidden states.

        Raises:
            TypeError, ValueError: wrong types, shapes, devices or sizes.
        """
        counts, rows = patterns.ttt(loss_mask, steps, shift, sequence_ids, draft_length)
        return cls(counts, rows, position_dim=0, skip_masked=skip_masked)

    @classmethod
    def blocks(
        cls,
        anchors: Tensor,
        block_size: int,
        loss_mask: Tensor,
        *,
        sequence_ids: Tensor | None = None,
        ends_at_gap: bool = False,
        skip_masked: bool = True,
    ) -> Pairs:
        """The pairs of a block drafter: element j of the block at anchor a against target row a + j.

        That target row predicts token a + j + 1. The pair counts where this token is supervised, before the sequence
        ends. Element j is draft position j.

        Args:
            anchors: int64 `[B, A]`, the row of its sequence that each block starts from; -1 for no block.
            block_size: elements of a block.
            ends_at_gap: True ends a block at its first token that does not count, as DSpark does (SpecForge 0.2.0).
            loss_mask, sequence_ids, skip_masked: as in `ttt`. Anchors on a device are checked with FUSED_LK_VALIDATE=1
                only.

        Returns:
            Pairs of shape `[B, A, block_size]`, against a target of `[B, S]` rows.

        Raises:
            TypeError, ValueError: wrong types, shapes, devices or sizes; anchors outside `[-1, S)`.
        """
        counts, rows = patterns.blocks(anchors, block_size, loss_mask, sequence_ids, ends_at_gap)
        return cls(counts, rows, position_dim=-1, skip_masked=skip_masked)

    @property
    def weight_sum(self) -> Tensor:
        """`[K]`, the sum of the weights of each position, known before any forward; fp32 (fp64 for fp64 weights).

        Added up over micro-batches or ranks it is the `denominator` of the whole batch.

        Raises:
            ValueError: these are `Pairs()` of every row of any draft.
        """
        self._require_shape()
        weights = torch.ones(self.num_pairs or 0, device=self.device) if self.weights is None else self.weights
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
        if self.positions is None:
            return weights.sum().reshape(1)
        of = torch.arange(self.num_positions, device=self.device).unsqueeze(1)
        return torch.where(self.positions == of, weights, 0).sum(1)

    @property
    def supervised(self) -> Tensor:
        """bool, in the shape of the pairs: the draft rows that count.

        Raises:
            ValueError: these are `Pairs()` of every row of any draft.
        """
        shape, device = self._require_shape()
        return (self.dense(math.prod(shape), device)[0] > 0).view(shape)

    def _require_shape(self) -> tuple[tuple[int, ...], torch.device]:
        if self.shape is None:
            remedy = "Pass Pairs a mask, of ones if every row counts."
            checks.fail("pairs that were made for a shape", "Pairs() of every row of any draft", remedy)
        assert self.shape is not None and self.device is not None
        return self.shape, self.device

    def _compact(self, mask: Tensor | None, target_rows: Tensor | None, positions: Tensor | None) -> None:
        """Keep the rows that count, sorted by target row."""
        if mask is None and target_rows is None:  # nothing else reads the positions
            self._keep(mask, target_rows, positions)
            return
        num_rows = next(x.shape[0] for x in (mask, target_rows) if x is not None)
        rows = torch.arange(num_rows, device=self.device) if target_rows is None else target_rows
        key = torch.where(rows >= 0, rows, _IGNORED)
        if mask is not None:
            key = torch.where(mask > 0, key, _IGNORED)
        key, order = torch.sort(key, stable=True)
        bad = self._bad(mask, target_rows, positions)
        host = torch.cat([bad.long(), key, order]).cpu().numpy()  # the one synchronisation
        self._refuse(host[:3], mask)
        targets, draft = host[3 : 3 + num_rows], host[3 + num_rows :]
        count = int(np.searchsorted(targets, _IGNORED))
        self.host_targets, self.host_draft = targets[:count], draft[:count]
        draft_rows = order[:count]
        if mask is not None and mask.is_floating_point():
            self.weights = mask[draft_rows]
        if positions is not None:
            self.positions = positions[draft_rows]
        in_order = np.arange(num_rows)
        if not (np.array_equal(self.host_draft, in_order) and np.array_equal(self.host_targets, in_order)):
            self.draft_rows, self.target_rows = draft_rows, key[:count]
            self.num_pairs = count
            self.num_targets = int(np.count_nonzero(np.diff(self.host_targets))) + (count > 0)

    def _keep(self, mask: Tensor | None, target_rows: Tensor | None, positions: Tensor | None) -> None:
        """Keep every row, and mark those that count."""
        first = next(x for x in (mask, target_rows, positions) if x is not None)
        if checks.checks_contents(first):
            self._refuse(self._bad(mask, target_rows, positions).cpu().numpy(), mask)
        if mask is not None:
            self.valid = mask > 0
        if target_rows is not None:
            self.target_rows = target_rows.clamp(min=0)
            self.valid = target_rows >= 0 if self.valid is None else self.valid & (target_rows >= 0)
        if self.valid is not None:
            weights = mask if mask is not None and mask.is_floating_point() else None
            self.weights = self.valid.float() if weights is None else torch.where(self.valid, weights, 0)
        if positions is not None:
            self.positions = positions.clamp(0, self.num_positions - 1)  # a copy

    def _bad(self, mask: Tensor | None, target_rows: Tensor | None, positions: Tensor | None) -> Tensor:
        """bool `[3]`: whether each of the three has an entry that it may not have."""
        bad = [torch.zeros((), dtype=torch.bool, device=self.device)] * 3
        if mask is not None and mask.is_floating_point():
            bad[0] = ~(torch.isfinite(mask) & (mask >= 0)).all()
        elif mask is not None and mask.dtype != torch.bool:
            bad[0] = ((mask != 0) & (mask != 1)).any()
        if target_rows is not None:
            bad[1] = (target_rows < -1).any()
        if positions is not None:
            bad[2] = ((positions < 0) | (positions >= self.num_positions)).any()
        return torch.stack(bad)

    def _refuse(self, bad: np.ndarray, mask: Tensor | None) -> None:
        if bad[0] and mask is not None and not mask.is_floating_point():
            checks.fail("an integer mask of 0 and 1", "another entry", "Pass mask > 0, or weights as floats.")
        if bad[0]:
            got = "a negative, infinite or NaN weight"
            checks.fail("mask weights that are finite and >= 0", got, "Use 0 to ignore a row.")
        if bad[1]:
            checks.fail("target_rows >= -1", "an entry below -1", "Use -1 to ignore a row.")
        if bad[2]:
            remedy = "Positions are 0-based; check num_positions."
            checks.fail(f"positions in [0, {self.num_positions})", "an entry outside", remedy)

    def dense(self, num_rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """`(weights, target_rows, positions)` `[num_rows]`; weight 0 and target row 0 where a row is ignored."""
        count = num_rows if self.draft_rows is None else len(self.draft_rows)
        weights = torch.ones(count, device=device) if self.weights is None else self.weights
        rows = torch.arange(num_rows, device=device) if self.target_rows is None else self.target_rows
        positions = torch.zeros_like(rows) if self.positions is None else self.positions
        if self.draft_rows is None:
            return weights, rows, positions
        spread = [x.new_zeros(num_rows).index_copy(0, self.draft_rows, x) for x in (weights, rows, positions)]
        return spread[0], spread[1], spread[2]


def _dimension(dim: int, like: Tensor | None, positions: Tensor | None, num_positions: int | None) -> int:
    """`dim`, counted from the front, where nothing else gives the positions."""
    if positions is not None or num_positions is not None:
        checks.fail("position_dim, or positions with num_positions", "both", "Leave positions and num_positions out.")
    if like is None:
        checks.fail(
            "a mask or target_rows with position_dim", "neither", "Pass a mask, whose shape says how many rows."
        )
    ndim = like.ndim if like is not None else 0
    dim = checks.integer("position_dim", dim, minimum=-ndim)
    if dim >= ndim:
        remedy = "Choose the dimension along which the draft positions run."
        checks.fail(f"position_dim in [{-ndim}, {ndim})", dim, remedy)
    return dim % ndim


EVERY_ROW = Pairs()
