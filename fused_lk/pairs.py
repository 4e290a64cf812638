"""The work list: which draft row is scored against which target row.

Loss masks, padding, the shift of test-time-training steps, blocks and anchors of block drafters, packing: each is a
list of pairs. Rows that are not in it cost nothing.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from . import checks
from .layout import Layout

_IGNORED = torch.iinfo(torch.long).max


class Pairs:
    """The supervised (draft row, target row) pairs of a batch, sorted by target row. Build once, use many times.

    Args:
        mask: bool, integers 0 and 1 (as tokenizers give an attention mask), or float weights >= 0, `[...]` = the draft
            hidden states' shape without the last dimension; False or 0 ignores the row. Default: every row counts 1.
        target_rows: int64, same shape: row of the *flattened* target that each draft row is scored against,
            -1 ignores the row. Default: row i against row i.
        positions: int64, same shape: draft position (TTT step) of each row, 0-based.
        num_positions: how many positions there are; required with `positions`, and 1 without.
        skip_masked: compact the rows, at the price of one host synchronisation here. False keeps every row (no
            synchronisation, static shapes, as CUDA graphs need) and gives ignored rows exact zeros after the GEMMs;
            contents on a device are then checked with FUSED_LK_VALIDATE=1 only. Under `torch.compile` rows are
            compacted inside the loss's operator, and the target rows' range is all that is checked.

    Nothing of the caller's is kept: tensors that change later change no pairs.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices; negative or NaN weights; integer masks of other than 0
            and 1; target rows below -1; positions outside `[0, num_positions)`; one of `positions` and
            `num_positions` without the other.
    """

    def __init__(
        self,
        mask: Tensor | None = None,
        target_rows: Tensor | None = None,
        positions: Tensor | None = None,
        num_positions: int | None = None,
        *,
        skip_masked: bool = True,
    ) -> None:
        inputs = {"mask": mask, "target_rows": target_rows, "positions": positions}
        given = {name: x for name, x in inputs.items() if x is not None}
        for name, x in given.items():
            dtypes = (*checks.MASKS, *checks.FLOATS) if name == "mask" else (torch.int64,)
            checks.tensor(name, x, dtypes=dtypes)
        first, like = next(iter(given.items()), ("", torch.empty(0)))
        for name, x in given.items():
            checks.shape(name, x, tuple(like.shape), f"the shape of {first}")
            checks.same_device(like.device, **{name: x})
        if positions is not None and num_positions is None:
            checks.fail(
                "num_positions with positions", "positions alone", "Pass num_positions, the number of draft positions."
            )
        num_positions = 1 if num_positions is None else checks.integer("num_positions", num_positions)
        if positions is None and num_positions > 1:
            checks.fail(
                "positions with num_positions > 1", "num_positions alone", "Pass the position of each row, or a list."
            )

        self.num_positions = num_positions
        self.shape = tuple(like.shape) if given else None
        self.device = like.device if given else None
        self.is_identity = mask is None and target_rows is None
        self.skip_masked = checks.flag("skip_masked", skip_masked)
        self._names_targets = target_rows is not None  # then the target may have more rows than the draft
        flat = {name: x.detach().reshape(-1) for name, x in given.items()}
        mask, target_rows, positions = (flat.get(name) for name in ("mask", "target_rows", "positions"))
        weights = mask if mask is not None and mask.is_floating_point() else None
        if torch.compiler.is_compiling():
            self._keep(mask, target_rows, positions, weights)
            return
        with torch.inference_mode(False):  # pairs made during an evaluation serve in training too
            if self.skip_masked:
                self._compact(mask, target_rows, positions, weights)
            else:
                self._keep(mask, target_rows, positions, weights)

    @classmethod
    def ttt(
        cls,
        loss_mask: Tensor,
        steps: int,
        shift: int = 1,
        *,
        sequence_ids: Tensor | None = None,
        skip_masked: bool = True,
    ) -> Pairs:
        """The pairs of test-time training: draft row t of step k against target row t + shift + k.

        That target row predicts token t + shift + k + 1; the pair counts where this token is supervised and the
        sequence has not ended. (EAGLE-3: row t has seen tokens up to t + 1 + k: shift 1.)

        Args:
            loss_mask: bool, integers 0 and 1, or weights >= 0, `[B, S]`: the tokens that count as predictions.
            steps: number of TTT steps K, each a draft position.
            shift: target row less draft row in step 0, >= 0.
            sequence_ids: int64 `[B, S]`, for packed rows: a pair stays inside one sequence.
            skip_masked: as in `Pairs`.

        Returns:
            Pairs of shape `[K, B, S]`: of a list of K hidden states `[B, S, H]` against a target of `[B, S]` rows.

        Raises:
            TypeError, ValueError: wrong types, shapes, devices or sizes.
        """
        _check_tokens(loss_mask, sequence_ids)
        steps, shift = checks.integer("steps", steps), checks.integer("shift", shift, minimum=0)
        batch, length = loss_mask.shape
        step, sequence, own = torch.meshgrid(
            *(torch.arange(n, device=loss_mask.device) for n in (steps, batch, length)), indexing="ij"
        )
        return cls._in_sequences(
            loss_mask, sequence_ids, sequence, own, own + (step + shift), step, steps, skip_masked=skip_masked
        )

    @classmethod
    def blocks(
        cls,
        anchors: Tensor,
        block_size: int,
        loss_mask: Tensor,
        *,
        sequence_ids: Tensor | None = None,
        skip_masked: bool = True,
    ) -> Pairs:
        """The pairs of a block drafter: element j of the block at anchor a against target row a + j.

        That target row predicts token a + j + 1; the pair counts where this token is supervised and the sequence has
        not ended. Element j is draft position j.

        Args:
            anchors: int64 `[B, A]`, the row of its sequence that each block starts from; -1: no block.
            block_size: elements of a block.
            loss_mask, sequence_ids, skip_masked: as in `ttt`. Checking the anchors costs one more host
                synchronisation; with `skip_masked=False` they are not checked.

        Returns:
            Pairs of shape `[B, A, block_size]`, against a target of `[B, S]` rows.

        Raises:
            TypeError, ValueError: wrong types, shapes, devices or sizes; anchors outside `[-1, S)`.
        """
        _check_tokens(loss_mask, sequence_ids)
        block_size = checks.integer("block_size", block_size)
        batch, length = loss_mask.shape
        checks.tensor("anchors", anchors, ndim=2, dtypes=[torch.int64])
        checks.shape("anchors", anchors, (batch, anchors.shape[1]), "a row for each row of loss_mask")
        checks.same_device(loss_mask.device, anchors=anchors)
        if checks.checks_contents(anchors) and bool(((anchors < -1) | (anchors >= length)).any()):
            checks.fail(f"anchors in [-1, {length})", "an entry outside", "They are rows of loss_mask; -1: none.")
        sequence, block, element = torch.meshgrid(
            *(torch.arange(n, device=anchors.device) for n in (batch, anchors.shape[1], block_size)), indexing="ij"
        )
        own = anchors[sequence, block]
        rows = torch.where(own >= 0, own + element, length)
        return cls._in_sequences(
            loss_mask, sequence_ids, sequence, own, rows, element, block_size, skip_masked=skip_masked
        )

    @classmethod
    def _in_sequences(
        cls,
        loss_mask: Tensor,
        sequence_ids: Tensor | None,
        sequence: Tensor,
        own: Tensor,
        rows: Tensor,
        positions: Tensor,
        num_positions: int,
        *,
        skip_masked: bool,
    ) -> Pairs:
        """Draft rows at row `own` of `sequence`, each against row `rows` of it, which predicts the token after."""
        length = loss_mask.shape[1]
        ends = rows + 1 >= length
        predicted = (rows + 1).clamp(max=length - 1)
        counts = loss_mask[sequence, predicted].masked_fill(ends, 0)
        if sequence_ids is not None:
            left = sequence_ids[sequence, own.clamp(0, length - 1)] != sequence_ids[sequence, predicted]
            counts = counts.masked_fill(left, 0)
        target_rows = (sequence * length + rows).masked_fill(ends, -1)
        return cls(counts, target_rows, positions.contiguous(), num_positions, skip_masked=skip_masked)

    def _compact(
        self, mask: Tensor | None, target_rows: Tensor | None, positions: Tensor | None, weights: Tensor | None
    ) -> None:
        self.valid: Tensor | None = None
        self.draft_rows: Tensor | None = None
        self.target_rows: Tensor | None = None
        self.weights, self.positions = weights, positions
        self._layouts: dict[tuple[int, ...], Layout] = {}
        if self.shape is None:
            return
        if self.is_identity:
            self._check_where_read(mask, target_rows, positions)
            assert positions is not None
            self.positions = positions.clamp(0, self.num_positions - 1)  # a copy
            return
        device, bad = self.device, self._bad(mask, target_rows, positions)
        num_rows = next(x for x in (mask, target_rows) if x is not None).shape[0]
        rows = torch.arange(num_rows, device=device) if target_rows is None else target_rows
        key = torch.where(rows >= 0, rows, _IGNORED)
        if mask is not None:
            key = torch.where(mask > 0, key, _IGNORED)
        key, order = torch.sort(key, stable=True)
        host = torch.cat([bad.long(), key, order]).cpu().numpy()  # the one synchronisation
        self._refuse(host[:3], mask)
        self._host_targets, self._host_draft = host[3 : 3 + num_rows], host[3 + num_rows :]
        count = int(np.searchsorted(self._host_targets, _IGNORED))
        self._host_targets, self._host_draft = self._host_targets[:count], self._host_draft[:count]
        self.draft_rows, self.target_rows = order[:count], key[:count]
        if weights is not None:
            self.weights = weights[self.draft_rows]
        if positions is not None:
            self.positions = positions[self.draft_rows]
        if count == num_rows and np.array_equal(self._host_draft, np.arange(num_rows)) and self._is_arange():
            self.is_identity, self.draft_rows, self.target_rows = True, None, None

    def _is_arange(self) -> bool:
        return np.array_equal(self._host_targets, np.arange(len(self._host_targets)))

    def _keep(
        self, mask: Tensor | None, target_rows: Tensor | None, positions: Tensor | None, weights: Tensor | None
    ) -> None:
        self._check_where_read(mask, target_rows, positions)
        self.draft_rows = None
        self.target_rows = None if target_rows is None else target_rows.clamp(min=0)
        self.valid = None if mask is None else mask > 0
        if target_rows is not None:
            self.valid = target_rows >= 0 if self.valid is None else self.valid & (target_rows >= 0)
        self.weights = weights
        if self.valid is not None:
            ones = self.valid.float()
            self.weights = ones if weights is None else torch.where(self.valid, weights, 0)
        self.positions = None if positions is None else positions.clamp(0, self.num_positions - 1)
        self._layouts = {}

    def _bad(self, mask: Tensor | None, target_rows: Tensor | None, positions: Tensor | None) -> Tensor:
        """bool `[3]`: whether each holds what it may not."""
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

    def _check_where_read(self, mask: Tensor | None, target_rows: Tensor | None, positions: Tensor | None) -> None:
        """Refuse wrong contents where nothing else reads them."""
        first = next((x for x in (mask, target_rows, positions) if x is not None), None)
        if first is not None and checks.checks_contents(first):
            self._refuse(self._bad(mask, target_rows, positions).cpu().numpy(), mask)

    def _refuse(self, bad: np.ndarray, mask: Tensor | None) -> None:
        if bad[0] and mask is not None and not mask.is_floating_point():
            checks.fail("an integer mask of 0 and 1", "another entry", "Pass mask > 0, or weights as floats.")
        if bad[0]:
            checks.fail(
                "mask weights that are finite and >= 0", "a negative, infinite or NaN weight", "Use 0 to ignore."
            )
        if bad[1]:
            checks.fail("target_rows >= -1", "an entry below -1", "Use -1 to ignore a row.")
        if bad[2]:
            checks.fail(
                f"positions in [0, {self.num_positions})",
                "an entry outside",
                "Positions are 0-based; check num_positions.",
            )

    @property
    def num_pairs(self) -> int | None:
        """Number of pairs (of rows, with `skip_masked=False`); None if that depends on the draft."""
        if self.draft_rows is not None:
            return self.draft_rows.shape[0]
        return None if self.shape is None else math.prod(self.shape)

    @property
    def in_order(self) -> bool:
        """Whether pair i is draft row i, and counts."""
        return self.draft_rows is None and self.valid is None

    def num_targets(self, num_rows: int) -> int:
        """Number of distinct target rows (where they are not compacted: one per row)."""
        if self.draft_rows is None:
            return num_rows
        return int(np.count_nonzero(np.diff(self._host_targets))) + (len(self._host_targets) > 0)

    def dense(self, num_rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """`(weights, target_rows, positions)` `[num_rows]`, with weight 0 and row 0 where ignored."""
        weights = (
            self.weights
            if self.weights is not None
            else torch.ones(num_rows if self.num_pairs is None else self.num_pairs, device=device)
        )
        rows = torch.arange(num_rows, device=device) if self.target_rows is None else self.target_rows
        positions = torch.zeros_like(rows) if self.positions is None else self.positions
        if self.draft_rows is None:
            return weights[:num_rows], rows, positions
        spread = [x.new_zeros(num_rows).index_copy(0, self.draft_rows, x) for x in (weights, rows, positions)]
        return spread[0], spread[1], spread[2]

    def check_target(self, num_rows: int, num_targets: int, computed: np.ndarray | None) -> None:
        """Every pair's target row exists (and was computed, where the target says which rows were).

        Raises:
            ValueError: an identity list of another length than the target, a row out of range, a row left out by
                the target's own mask.
        """
        if self.target_rows is None and not self._names_targets and num_rows != num_targets:
            checks.fail(
                f"as many target rows as draft rows ({num_rows}) without target_rows",
                f"{num_targets} target rows",
                "Pass target_rows: for each draft row, the row of the flattened target.",
            )
        if torch.compiler.is_compiling() or (computed is None and not self._names_targets):
            return
        used = self._used_targets(num_rows)
        if len(used) and used.max() >= num_targets:
            checks.fail(
                f"target_rows below {num_targets}, the number of rows of the flattened target",
                f"a target row {int(used.max())}",
                "Use -1 for rows that have no target.",
            )
        if computed is not None and not computed[used].all():
            checks.fail(
                "every supervised pair's target row inside the target's own mask",
                f"{int((~computed[used]).sum())} pair(s) outside",
                "Pass Target.from_hidden a mask that covers them.",
            )

    def _used_targets(self, num_rows: int) -> np.ndarray:
        """The target row of each pair; none where that would have to be read from a device."""
        if self.draft_rows is not None:
            return self._host_targets
        if self.valid is None:
            return np.arange(num_rows)
        if not checks.checks_contents(self.valid):
            return np.arange(0)
        rows = torch.arange(num_rows, device=self.device) if self.target_rows is None else self.target_rows
        return rows[self.valid].cpu().numpy()

    def row_layout(self, num_rows: int, device: torch.device) -> Layout:
        """Every draft row as a pair of its own, without chunks: what is left to do around an operator's results."""
        weights, target_rows, positions, valid = self.weights, self.target_rows, self.positions, self.valid
        if self.draft_rows is not None:
            weights, target_rows, positions = self.dense(num_rows, device)
            valid = weights > 0
        return Layout(num_rows, None, target_rows, None, weights, positions, valid, (), num_rows, num_rows)

    def layout(self, num_rows: int, num_sources: int, max_pairs: int, max_targets: int) -> Layout:
        """The pairs cut into chunks of at most `max_pairs` pairs and `max_targets` distinct target rows.

        The `num_rows` draft rows lie in `num_sources` tensors of equal length; within a chunk, pairs are grouped by
        source, so that each is gathered with one copy.
        """
        if self.draft_rows is None:
            per_source = num_rows // num_sources
            return Layout.of_all_rows(self, num_rows, per_source, min(max_pairs, max_targets))
        key = (num_rows, num_sources, max_pairs, max_targets)
        if key not in self._layouts:
            with torch.inference_mode(False):
                self._layouts = {key: Layout.of_pairs(self, *key)}
        return self._layouts[key]


def _check_tokens(loss_mask: Tensor, sequence_ids: Tensor | None) -> None:
    checks.tensor("loss_mask", loss_mask, ndim=2, dtypes=(*checks.MASKS, *checks.FLOATS))
    if sequence_ids is not None:
        checks.tensor("sequence_ids", sequence_ids, dtypes=[torch.int64])
        checks.shape("sequence_ids", sequence_ids, tuple(loss_mask.shape), "one per row of loss_mask")
        checks.same_device(loss_mask.device, sequence_ids=sequence_ids)
