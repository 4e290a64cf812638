"""The patterns of training: the steps of test-time training, and the blocks of block drafters.

Each gives `(counts, target_rows)`: how much each draft row counts, and the row of the flattened target that it is
scored against (-1: none).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks

Pattern = tuple[Tensor, Tensor]


def ttt(loss_mask: Tensor, steps: int, shift: int, sequence_ids: Tensor | None, draft_length: int | None) -> Pattern:
    """`[steps, B, S]` or `[steps, B, draft_length]`: row t of step k meets target row t + shift + k of its sequence."""
    _check_tokens(loss_mask, sequence_ids)
    steps, shift = checks.integer("steps", steps), checks.integer("shift", shift, minimum=0)
    batch, length = loss_mask.shape
    rows = length if draft_length is None else checks.integer("draft_length", draft_length)
    if rows > length:
        remedy = "loss_mask has the tokens of the draft's rows, and those after them."
        checks.fail(f"draft_length <= {length}, the length of loss_mask", rows, remedy)
    step, sequence, own = _grid(loss_mask.device, steps, batch, rows)
    return _in_sequences(loss_mask, sequence_ids, sequence, own, own + (step + shift))


def blocks(
    anchors: Tensor, block_size: int, loss_mask: Tensor, sequence_ids: Tensor | None, ends_at_gap: bool
) -> Pattern:
    """`[B, A, block_size]`: element j of the block at anchor a meets target row a + j of its sequence."""
    _check_tokens(loss_mask, sequence_ids)
    block_size = checks.integer("block_size", block_size)
    batch, length = loss_mask.shape
    checks.tensor("anchors", anchors, ndim=2, dtypes=[torch.int64])
    checks.shape("anchors", anchors, (batch, anchors.shape[1]), "a row for each row of loss_mask")
    checks.same_device(loss_mask.device, anchors=anchors)
    if checks.checks_contents(anchors) and bool(((anchors < -1) | (anchors >= length)).any()):
        remedy = "An anchor is a row of loss_mask; -1 stands for no block."
        checks.fail(f"anchors in [-1, {length})", "an entry outside", remedy)
    sequence, block, element = _grid(anchors.device, batch, anchors.shape[1], block_size)
    own = anchors[sequence, block]
    rows = torch.where(own >= 0, own + element, length)
    counts, rows = _in_sequences(loss_mask, sequence_ids, sequence, own, rows)
    if checks.flag("ends_at_gap", ends_at_gap):
        counts = counts.masked_fill((counts != 0).cumprod(-1) == 0, 0)
    return counts, rows


def _grid(device: torch.device, *sizes: int) -> tuple[Tensor, ...]:
    return torch.meshgrid(*(torch.arange(n, device=device) for n in sizes), indexing="ij")


def _in_sequences(
    loss_mask: Tensor, sequence_ids: Tensor | None, sequence: Tensor, own: Tensor, rows: Tensor
) -> Pattern:
    """Draft rows at row `own` of `sequence` against row `rows` of it, which predicts the token after."""
    length = loss_mask.shape[1]
    ends = rows + 1 >= length
    predicted = (rows + 1).clamp(max=length - 1)
    counts = loss_mask[sequence, predicted].masked_fill(ends, 0)
    if sequence_ids is not None:
        left = sequence_ids[sequence, own.clamp(0, length - 1)] != sequence_ids[sequence, predicted]
        counts = counts.masked_fill(left, 0)
    return counts, (sequence * length + rows).masked_fill(ends, -1)


def _check_tokens(loss_mask: Tensor, sequence_ids: Tensor | None) -> None:
    checks.tensor("loss_mask", loss_mask, ndim=2, dtypes=(*checks.MASKS, *checks.FLOATS))
    if sequence_ids is not None:
        checks.tensor("sequence_ids", sequence_ids, dtypes=[torch.int64])
        checks.shape("sequence_ids", sequence_ids, tuple(loss_mask.shape), "one per row of loss_mask")
        checks.same_device(loss_mask.device, sequence_ids=sequence_ids)
