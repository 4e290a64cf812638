"""The work lists of test-time training and of block drafters, against loops that say which row meets which."""

from __future__ import annotations

import pytest
import torch

import fused_lk

BATCH, LENGTH = 3, 11


def random_tokens(seed, weighted):
    """A loss mask, and ids of packed sequences."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(BATCH, LENGTH, generator=generator) > 0.4
    weights = torch.rand(BATCH, LENGTH, generator=generator) + 0.5
    ids = (torch.rand(BATCH, LENGTH, generator=generator) > 0.8).long().cumsum(1)
    return mask * weights if weighted else mask, ids


def listed(pairs):
    """`{(draft row, target row, position): weight}` of what counts."""
    rows = torch.arange(pairs.num_pairs) if pairs.draft_rows is None else pairs.draft_rows
    targets = rows if pairs.target_rows is None else pairs.target_rows
    weights = torch.ones(len(rows)) if pairs.weights is None else pairs.weights
    all_of_them = zip(rows.tolist(), targets.tolist(), pairs.positions.tolist(), weights.tolist(), strict=True)
    return {tuple(pair): weight for *pair, weight in all_of_them if weight > 0}


def counts(mask, ids, b, own, row):
    """The weight of the token that `row` of sequence `b` predicts, seen from row `own`."""
    if row + 1 >= LENGTH or (ids is not None and ids[b, own] != ids[b, row + 1]):
        return 0.0
    return float(mask[b, row + 1])


@pytest.mark.parametrize("skip_masked", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    "steps, shift, draft_length", [(1, 0, None), (4, 1, None), (2, 3, None), (4, 1, 6), (2, 0, LENGTH)]
)
def test_ttt(steps, shift, draft_length, weighted, packed, skip_masked):
    mask, ids = random_tokens(steps, weighted)
    ids = ids if packed else None
    expected, length = {}, draft_length or LENGTH
    for k in range(steps):
        for b in range(BATCH):
            for t in range(length):
                row = t + shift + k
                if weight := counts(mask, ids, b, t, row):
                    expected[((k * BATCH + b) * length + t, b * LENGTH + row, k)] = weight
    options = {"sequence_ids": ids, "draft_length": draft_length, "skip_masked": skip_masked}
    pairs = fused_lk.Pairs.ttt(mask, steps, shift, **options)
    assert pairs.shape == (steps, BATCH, length)
    assert len(expected) > 5
    assert listed(pairs) == expected


@pytest.mark.parametrize("skip_masked", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("ends_at_gap", [True, False])
def test_blocks(ends_at_gap, weighted, packed, skip_masked):
    mask, ids = random_tokens(7, weighted)
    ids = ids if packed else None
    anchors = torch.tensor([[0, 4, -1, 4], [10, -1, -1, 3], [8, 1, 2, 9]])
    expected = {}
    for b in range(BATCH):
        for a, anchor in enumerate(anchors[b].tolist()):
            for j in range(5 if anchor >= 0 else 0):
                weight = counts(mask, ids, b, anchor, anchor + j)
                if weight:
                    expected[((b * 4 + a) * 5 + j, b * LENGTH + anchor + j, j)] = weight
                elif ends_at_gap:
                    break
    options = {"sequence_ids": ids, "ends_at_gap": ends_at_gap, "skip_masked": skip_masked}
    pairs = fused_lk.Pairs.blocks(anchors, 5, mask, **options)
    assert (pairs.shape, pairs.num_positions) == ((BATCH, 4, 5), 5)
    assert len(expected) > 5
    assert listed(pairs) == expected


def test_a_block_drafter_is_scored_as_written_out():
    """Overlapping blocks share target rows; the loss is that of each element against its own row."""
    generator = torch.Generator().manual_seed(0)
    anchors = torch.tensor([[0, 1, 5], [2, -1, 7], [6, 6, 0]])
    mask, _ = random_tokens(1, False)
    hidden = torch.randn(BATCH, 3, 4, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    target = fused_lk.Target.from_logits(torch.randn(BATCH, LENGTH, 30, generator=generator, dtype=torch.float64))
    pairs = fused_lk.Pairs.blocks(anchors, 4, mask)
    got = fused_lk.lk_divergences(hidden, weight, target, pairs=pairs, workspace_mb=0.01)
    rows = torch.full((BATCH, 3, 4), -1)
    for b in range(BATCH):
        for a, anchor in enumerate(anchors[b].tolist()):
            for j in range(4 if anchor >= 0 else 0):
                if counts(mask, None, b, anchor, anchor + j):
                    rows[b, a, j] = b * LENGTH + anchor + j
    by_hand = fused_lk.Pairs(target_rows=rows)
    expected = fused_lk.lk_divergences(hidden, weight, target, pairs=by_hand, impl="reference")
    torch.testing.assert_close(got.log_acceptance, expected.log_acceptance)
    torch.testing.assert_close(got.kl, expected.kl)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda mask: fused_lk.Pairs.ttt(mask[0], 2), "loss_mask with 2 dimension"),
        (lambda mask: fused_lk.Pairs.ttt(mask, 0), "steps to be a positive int; got 0"),
        (lambda mask: fused_lk.Pairs.ttt(mask, 2, -1), "shift to be an int >= 0; got -1"),
        (lambda mask: fused_lk.Pairs.ttt(mask, 2, draft_length=0), "draft_length to be a positive int; got 0"),
        (lambda mask: fused_lk.Pairs.ttt(mask, 2, draft_length=12), r"draft_length <= 11, .*; got 12"),
        (lambda mask: fused_lk.Pairs.ttt(mask, 2, sequence_ids=mask.long()[:2]), "one per row of loss_mask"),
        (lambda mask: fused_lk.Pairs.blocks(torch.zeros(2, 4).long(), 3, mask), "a row for each row of loss_mask"),
        (lambda mask: fused_lk.Pairs.blocks(torch.full((3, 1), -2), 3, mask), r"anchors in \[-1, 11\)"),
        (lambda mask: fused_lk.Pairs.blocks(torch.full((3, 1), 11), 3, mask), r"anchors in \[-1, 11\)"),
        (lambda mask: fused_lk.Pairs.blocks(torch.zeros(3, 4), 3, mask), "anchors of dtype int64"),
        (lambda mask: fused_lk.Pairs.blocks(torch.zeros(3, 4).long(), 3, mask, ends_at_gap=1), "ends_at_gap"),
    ],
)
def test_errors(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(random_tokens(0, False)[0])
