"""The work list against a brute-force one: every pair once, in order, within the limits, shared targets together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_lk import DraftVocab, Pairs, Target, lk_loss_from_logits
from fused_lk.pairs.layout import Layout
from fused_lk.walk.problem import check_target_rows


@st.composite
def work_lists(draw, max_sources=3):
    """`(arguments of Pairs, number of sources)`; each argument may be left out."""
    sources = draw(st.integers(1, max_sources), label="sources")
    per_source = draw(st.integers(0, 9), label="rows per source")
    shape = (sources, per_source)
    n, num_targets = sources * per_source, draw(st.integers(1, 8), label="targets")
    positions = draw(st.integers(1, 4), label="positions")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16), label="seed"))
    weights = torch.randint(0, 4, (n,), generator=generator) / 2
    given = {
        "mask": draw(st.sampled_from([None, weights, weights > 0, weights.bfloat16()]), label="mask"),
        "target_rows": draw(
            st.sampled_from([None, torch.randint(-1, num_targets, (n,), generator=generator), torch.arange(n) // 2]),
            label="target rows",
        ),
        "positions": draw(st.sampled_from([None, torch.randint(positions, (n,), generator=generator)])),
    }
    arguments = {name: x.view(shape) for name, x in given.items() if x is not None}
    if "positions" in arguments:
        arguments["num_positions"] = positions
    return arguments, sources


def brute_force(arguments, num_rows):
    """`(draft row, target row, weight, position)` of every supervised pair, sorted by target row, then draft row."""
    flat = {name: x.reshape(-1).tolist() for name, x in arguments.items() if name != "num_positions"}
    rows = flat.get("target_rows", range(num_rows))
    weights = [float(w) for w in flat.get("mask", [1.0] * num_rows)]
    positions = flat.get("positions", [0] * num_rows)
    pairs = [(i, rows[i], weights[i], positions[i]) for i in range(num_rows) if rows[i] >= 0 and weights[i] > 0]
    return sorted(pairs, key=lambda pair: pair[1])


def listed(holder, count):
    """The pairs that a `Pairs` or a `Layout` holds, in its order."""
    draft = holder.flat_rows if hasattr(holder, "flat_rows") else holder.draft_rows
    default = torch.arange(count)
    columns = (
        default if draft is None else draft,
        default if holder.target_rows is None else holder.target_rows,
        torch.ones(count) if holder.weights is None else holder.weights.float(),
        torch.zeros(count, dtype=torch.long) if holder.positions is None else holder.positions,
    )
    return list(zip(*(x.tolist() for x in columns), strict=True))


@settings(max_examples=200)
@given(work_lists())
def test_compaction(case):
    arguments, _ = case
    pairs = Pairs(**arguments)
    if not arguments:
        assert pairs.num_pairs is None
        return
    shape = next(iter(arguments.values())).shape
    expected = brute_force(arguments, shape.numel())
    assert pairs.shape == tuple(shape)
    assert pairs.num_pairs == len(expected)
    assert listed(pairs, len(expected)) == expected
    everything_in_order = [(i, i) for i in range(shape.numel())] == [pair[:2] for pair in expected]
    assert (pairs.draft_rows is None) == (pairs.target_rows is None) == everything_in_order  # then nothing is gathered
    distinct = len({row for _, row, _, _ in expected})
    assert (shape.numel() if pairs.num_targets is None else pairs.num_targets) == distinct


@settings(max_examples=200)
@given(work_lists(), st.integers(1, 8), st.integers(1, 8))
def test_layouts(case, max_pairs, max_targets):
    arguments, sources = case
    pairs = Pairs(**arguments)
    num_rows = next(iter(arguments.values())).numel() if arguments else 3 * sources
    expected = brute_force(arguments, num_rows)
    layout = Layout.of(pairs, num_rows, sources, max_pairs, max_targets)
    count, per_source = len(expected), num_rows // sources

    # every pair once, with its weight and position
    got = listed(layout, count)
    assert layout.num_pairs == count
    assert sorted(got) == sorted(expected)

    # chunks follow one another, and keep the limits
    assert [*(c.start for c in layout.chunks), count] == [0, *(c.stop for c in layout.chunks)]
    for chunk in layout.chunks:
        assert 0 < chunk.num_pairs <= max_pairs
        assert 0 < chunk.num_targets <= max_targets
        # segments follow one another; each lies in one source, where its rows are found
        assert chunk.segments[0].start == chunk.start
        assert chunk.segments[-1].stop == chunk.stop
        for segment, after in zip(chunk.segments, chunk.segments[1:], strict=False):
            assert segment.stop == after.start
            assert segment.source < after.source
        for segment in chunk.segments:
            rows = [i - segment.source * per_source for i, *_ in got[segment.start : segment.stop]]
            assert all(0 <= i < per_source for i in rows)
            assert torch.arange(per_source)[layout.rows_of(segment)].tolist() == rows
        # the chunk's distinct target rows, and where each pair finds its own among them
        targets = layout.unique_targets if layout.unique_targets is not None else torch.arange(num_rows)
        targets = targets[chunk.targets].tolist()
        index = range(chunk.num_pairs)
        if layout.unique_index is not None:
            index = (layout.unique_index[chunk.start : chunk.stop] - chunk.targets.start).tolist()
        used = [row for _, row, _, _ in got[chunk.start : chunk.stop]]
        assert [targets[i] for i in index] == used
        assert set(targets) == set(used)

    # each target row is made once, unless more pairs use it than fit a chunk
    made = [row for c in layout.chunks for row in {r for _, r, _, _ in got[c.start : c.stop]}]
    fits = -(-count // max(-(-count // max_pairs), 1))  # chunks are of equal size where they can be
    for row in set(made):
        users = sum(r == row for _, r, _, _ in expected)
        assert made.count(row) == -(-users // fits), (row, users, fits)
    assert layout.num_targets == len(set(made))


@settings(max_examples=200)
@given(work_lists())
def test_rows_kept_for_shape(case):
    arguments, sources = case
    num_rows = next(iter(arguments.values())).numel() if arguments else 2 * sources
    pairs = Pairs(**arguments, skip_masked=False)
    layout = Layout.of(pairs, num_rows, sources, 4, 4)
    assert layout.num_pairs == num_rows
    assert layout.flat_rows is None
    counted = torch.ones(num_rows, dtype=torch.bool) if layout.valid is None else layout.valid
    expected = sorted(brute_force(arguments, num_rows))
    kept = [pair for pair, counts in zip(listed(layout, num_rows), counted.tolist(), strict=True) if counts]
    assert kept == expected
    if layout.weights is not None and layout.valid is not None:
        assert not layout.weights[~layout.valid].any()
    if layout.target_rows is not None:  # rows that do not count still name a row that exists
        assert (layout.target_rows >= 0).all()


@settings(max_examples=200)
@given(work_lists())
def test_between_rows_and_pairs(case):
    arguments, sources = case
    num_rows = next(iter(arguments.values())).numel() if arguments else 2 * sources
    expected = brute_force(arguments, num_rows)
    for skip_masked in (True, False):
        layout = Layout.of(Pairs(**arguments, skip_masked=skip_masked), num_rows, sources, 3, 3)
        per_row = torch.arange(1.0, num_rows + 1)
        there_and_back = layout.per_row(layout.per_pair(per_row), num_rows)
        kept = torch.zeros(num_rows)
        for i, *_ in expected:
            kept[i] = i + 1
        assert torch.equal(there_and_back, kept)
        of_target = layout.of_target(torch.arange(100, 100 + max(num_rows, 8)))[: layout.num_pairs]
        assert (of_target - 100).tolist() == [row for _, row, _, _ in listed(layout, layout.num_pairs)]


def test_cut_between_target_rows():
    """Twelve pairs of four target rows, three each: chunks of four hold one row whole, not one and a third."""
    layout = Layout.of(Pairs(target_rows=torch.arange(12) // 3), 12, 1, 4, 100)
    assert [(c.start, c.stop, c.targets) for c in layout.chunks] == [
        (0, 3, slice(0, 1)), (3, 6, slice(1, 2)), (6, 9, slice(2, 3)), (9, 12, slice(3, 4)),
    ]  # fmt: skip
    one_row = Layout.of(Pairs(target_rows=torch.zeros(5, dtype=torch.long)), 5, 1, 2, 100)
    assert [c.targets for c in one_row.chunks] == [slice(0, 1)] * 3
    assert [c.num_pairs for c in one_row.chunks] == [2, 2, 1]


def test_no_small_remainder():
    assert [c.num_pairs for c in Layout.of(Pairs(torch.ones(100)), 100, 1, 48, 100).chunks] == [33, 33, 34]
    assert [c.num_pairs for c in Layout.of(Pairs(), 100, 2, 48, 100).chunks] == [25, 25, 25, 25]


def test_a_list_is_read_once_and_layouts_are_kept():
    mask = torch.tensor([1.0, 0.0, 2.0])
    pairs = Pairs(mask)
    mask.zero_()
    assert pairs.weights.tolist() == [1.0, 2.0]
    assert Layout.of(pairs, 3, 1, 2, 2) is Layout.of(pairs, 3, 1, 2, 2)
    assert Layout.of(pairs, 3, 1, 2, 2) is not Layout.of(pairs, 3, 1, 1, 2)


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
def test_the_first_rows_of_a_longer_target(plan, rows):
    """Rows 0, 1, 2 ... that were asked for by number, which are not all that the target has."""
    logits, draft = torch.randn(5, 7), torch.randn(rows, 4, requires_grad=True)
    vocab = DraftVocab(torch.arange(7) < 4)
    pairs = Pairs(target_rows=torch.arange(rows))
    out = lk_loss_from_logits(draft, Target.from_logits(logits, vocab), pairs=pairs, objective="kl", plan=plan)
    expected = lk_loss_from_logits(draft, Target.from_logits(logits[:rows], vocab), objective="kl", plan=plan)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.accuracy, expected.accuracy)
    assert torch.equal(*(torch.autograd.grad(x.loss, draft)[0] for x in (out, expected)))
    if rows:
        with pytest.raises(ValueError, match="target_rows below"):
            lk_loss_from_logits(draft, Target.from_logits(logits[: rows - 1], vocab), pairs=pairs)


@pytest.mark.parametrize("rows", [None, [0, -1, -1]])
def test_the_last_row_that_a_target_has(rows):
    pairs = Pairs(target_rows=None if rows is None else torch.tensor(rows))
    if rows is None:
        check_target_rows(pairs, 3, 3, None)
        with pytest.raises(ValueError, match="as many target rows"):
            check_target_rows(pairs, 3, 4, None)
    else:
        check_target_rows(pairs, 3, 1, None)
        with pytest.raises(ValueError, match="target_rows below 0"):
            check_target_rows(pairs, 3, 0, None)
        with pytest.raises(ValueError, match="inside the target's own mask"):
            check_target_rows(pairs, 3, 1, np.array([False]))
