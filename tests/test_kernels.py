"""The Triton kernels against their PyTorch twin, `fused_lk.rows.plain`, inside poisoned memory."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from fused_lk.kernels import launch

from fused_lk.rows import plain
from fused_lk.rows.interface import MEASURED, LogitRows, Normalizer, Transform
from fused_lk.walk.plan import empty_statistics

NEG_INF = float("-inf")
DEVICE = torch.get_default_device().type
SCALES = (1 / 0.7, 1 / 1.3)
TRANSFORMS = tuple(Transform(scale) for scale in SCALES)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def guarded(rows, columns, dtype):
    """`(storage, view)`: a view of NaN-poisoned storage, guard zones around it and between its rows."""
    storage = torch.full((rows + 2, columns + 19), float("nan"), dtype=dtype, device=DEVICE)
    return storage, storage[1:-1, 8 : 8 + columns]


def assert_guards_hold(storage, view):
    inside = torch.zeros(storage.shape, dtype=torch.bool, device=DEVICE)
    inside[1:-1, 8 : 8 + view.shape[1]] = True
    assert storage[~inside].isnan().all()
    assert not view.isnan().any()


def poisoned_stats(n, dtype, terms=MEASURED):
    """Statistics as views from the second element on, with canaries at both ends."""
    whole = empty_statistics(n + 2, terms, dtype, torch.device(DEVICE), target_argmax=True)
    for x in whole:
        x.fill_(float("nan") if x.is_floating_point() else -7)
    return whole, whole.rows(1, n + 1)


def inputs(size, dtype):
    """Ordinary rows, impossible tokens, disjoint rows, ties, and a row without an answer (the last)."""
    generator = torch.Generator().manual_seed(size)
    z, t = torch.randn(2, 6, size, dtype=torch.float64, generator=generator).to(DEVICE) * 2
    if size > 1:
        t[1, ::2] = NEG_INF
        z[2, : size // 2] += 200
        t[2, size // 2 :] += 200
    t[3] = z[3] * SCALES[0] / SCALES[1]
    z[4] = z[4].round()
    t[4] = t[4].round()
    t[5] = NEG_INF
    views = []
    for x in (z, t):
        _storage, view = guarded(*x.shape, dtype)
        view.copy_(x)
        views.append(view)
    return views


BASE = ("draft_top", "draft_log_total", "target_top", "target_log_total", "log_mass")


def named(stats, terms=MEASURED):
    """Each number of a row by its name, `[n]`."""
    names = [*BASE, *terms, *(f"{what} of {name}" for what in ("sigma", "top") for name in terms)]
    rows = [*stats.base, *stats.values, *stats.saved.flatten(0, 1)]
    argmaxes = {"draft_argmax": stats.draft_argmax, "target_argmax": stats.target_argmax}
    return dict(zip(names, rows, strict=True)) | argmaxes


class Loss(NamedTuple):
    """A `RowLoss` whose derivatives are given; NaN on the rows without an answer."""

    d: torch.Tensor
    lost: torch.Tensor

    def rows(self, start, stop):
        return Loss(self.d[:, start:stop], self.lost[start:stop])

    def d_values(self, values):
        assert values.shape == self.d.shape
        return self.d.masked_fill(self.lost, float("nan"))


def run(ops, z, t, index, normalizer, acc, terms=MEASURED):
    """Statistics and gradient of `ops`."""
    n, size = z.shape
    whole, out = poisoned_stats(n, acc, terms)
    storage, g = guarded(n, size, z.dtype)
    d = torch.linspace(0.5, 1.5, n, dtype=acc, device=DEVICE)
    d = torch.stack([{"log_acceptance": d, "kl": 2 - d}[name] for name in terms])
    loss = Loss(d, ((t if index is None else t[index]) == NEG_INF).all(1))
    ops.stats_and_gradient(LogitRows(z, t, index, normalizer, *TRANSFORMS), terms, out, loss, g)
    for x in whole:
        for end in (x[..., 0], x[..., -1]):
            assert end.isnan().all() if x.is_floating_point() else end == -7
    assert_guards_hold(storage, g)
    return out, g, loss.d_values(out.values)


@pytest.mark.parametrize("has_normalizer", ["none", "given", "mass"])
@pytest.mark.parametrize("has_index", [False, True])
@pytest.mark.parametrize("size", [1, 2, 37, 1031, 2048])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_kernels_agree_with_their_twin(dtype, size, has_index, has_normalizer):
    z, t = inputs(size, dtype)
    acc = torch.promote_types(dtype, torch.float32)
    index = torch.tensor([0, 5, 2, 3, 4, 1], device=DEVICE) if has_index else None
    rows = t if index is None else t[index]
    lse = (rows.to(acc) * SCALES[1]).logsumexp(1)
    given = torch.where(lse > NEG_INF, lse + 0.25, 0)
    normalizer = {"none": None, "given": Normalizer(given, False, 0.0), "mass": Normalizer(lse - given, True, 0.0)}[
        has_normalizer
    ]
    out, g, d_values = run(launch, z, t, index, normalizer, acc)
    # float64 arithmetic on the very numbers the kernels read; ties that rounding makes or breaks may differ
    exact = None if normalizer is None else normalizer._replace(value=normalizer.value.double())
    expected, expected_g, _ = run(plain, z.double(), t.double(), index, exact, torch.float64)
    close = {"atol": 1e-10 if acc == torch.float64 else 2e-5, "rtol": 1e-10 if acc == torch.float64 else 2e-5}
    expected = named(expected)
    for name, got in named(out).items():
        want = expected[name]
        if name in (
            "sigma of log_acceptance",
            "top of log_acceptance",
        ):  # row 3 is all ties, which rounding makes or breaks
            got, want = got[[0, 1, 2, 4, 5]], want[[0, 1, 2, 4, 5]]
        torch.testing.assert_close(got.to(want.dtype), want, **close, msg=lambda m, name=name: f"{name}: {m}")
    tolerance = TOLERANCE[dtype]
    keep = [0, 1, 2, 4, 5]
    torch.testing.assert_close(g[keep].double(), expected_g[keep].double(), atol=tolerance, rtol=tolerance)
    unsupported = ~out.supported()
    assert unsupported.sum() == 1
    assert not g[unsupported].any()
    assert (named(out)["log_acceptance"][unsupported] == NEG_INF).all()

    # a block of columns at a time, written over z itself
    whole = g.clone()
    for start in range(0, size, 700):
        block = LogitRows(z[:, start : start + 700], t[:, start : start + 700], index, None, *TRANSFORMS, start)
        launch.gradient(block, MEASURED, out, d_values, block.z)
    assert torch.equal(z, whole)


@pytest.mark.parametrize("ops", [launch, plain], ids=["triton", "torch"])
@pytest.mark.parametrize("size", [37, 1031])
def test_a_term_is_the_same_without_the_others(size, ops, monkeypatch):
    """Alone, or in another order; and the gradients of the terms add up to that of all."""
    monkeypatch.setattr(plain, "BLOCK_ELEMENTS", 2 * size)
    z, t = inputs(size, torch.float64)
    lse = (t * SCALES[1]).logsumexp(1)
    normalizer = Normalizer(torch.where(lse > NEG_INF, lse + 0.25, 0), False, 0.0)
    out, g, _ = run(ops, z, t, None, normalizer, torch.float64)
    of_all, gradients = named(out), {}
    for terms in (MEASURED[::-1], *((name,) for name in MEASURED)):
        out, gradients[terms], d_values = run(ops, z, t, None, normalizer, torch.float64, terms)
        for name, x in named(out, terms).items():
            torch.testing.assert_close(x, of_all[name], msg=lambda m, name=name: f"{name}: {m}")
        again = torch.empty_like(z)
        ops.gradient(LogitRows(z, t, None, None, *TRANSFORMS), terms, out, d_values, again)
        torch.testing.assert_close(again, gradients[terms])
    torch.testing.assert_close(gradients.pop(MEASURED[::-1]), g)
    torch.testing.assert_close(sum(gradients.values()), g)


@pytest.mark.parametrize("ops", [launch, plain], ids=["triton", "torch"])
def test_blocks_of_few_columns(ops):
    """The draft's maximum at each edge of a block, and blocks that are -inf throughout."""
    z, t = torch.randn(2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    z.fill_diagonal_(9.0)  # the maximum of row i in column i
    z[5, :4] = NEG_INF
    t[6, :4] = NEG_INF
    out, g, d_values = run(ops, z, t, None, None, torch.float64)
    again = torch.empty_like(z)
    for start in range(0, 8, 4):
        columns = slice(start, start + 4)
        block = LogitRows(z[:, columns], t[:, columns], None, None, *TRANSFORMS, start)
        ops.gradient(block, MEASURED, out, d_values, again[:, columns])
    torch.testing.assert_close(again, g)


@pytest.mark.parametrize("size", [1, 37, 1031])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_lse_argmax(dtype, size):
    x = inputs(size, dtype)[1]
    acc = torch.promote_types(dtype, torch.float32)
    marks = torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.7
    for inside in (None, marks.to(DEVICE), torch.ones(size, dtype=torch.bool, device=DEVICE)):
        results = []
        for ops in (launch, plain):
            lse, mass = torch.full((2, 6), float("nan"), dtype=acc, device=DEVICE)
            at = torch.full((6,), -7, device=DEVICE)
            ops.lse_argmax(x, TRANSFORMS[0], inside, lse, None if inside is None else mass, at)
            results.append((lse, mass[:-1], at))  # the last row is -inf alone: its mass means nothing
        assert torch.equal(results[0][2], results[1][2])
        rtol = 1e-12 if acc == torch.float64 else 1e-5
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=rtol, atol=rtol, equal_nan=True)
        if inside is not None:
            exact = x.double() * SCALES[0]
            exact = exact.masked_fill(~inside, NEG_INF).logsumexp(1) - exact.logsumexp(1)
            torch.testing.assert_close(mass[:-1].double(), exact[:-1], rtol=rtol, atol=1e-6)


def test_an_argmax_that_ties_inside_and_outside():
    x = torch.tensor([[1.0, 3.0, 3.0, 0.0], [3.0, 1.0, 0.0, 3.0]], device=DEVICE)
    inside = torch.tensor([False, False, True, True], device=DEVICE)
    for ops in (launch, plain):
        lse, mass, at = torch.empty(2, device=DEVICE), torch.empty(2, device=DEVICE), torch.zeros(2, dtype=torch.long)
        at = at.to(DEVICE)
        ops.lse_argmax(x, Transform(), inside, lse, mass, at)
        assert at.tolist() == [1, 0]


def test_disjoint_rows_keep_their_gradient():
    z = torch.zeros(1, 64, device=DEVICE)
    z[:, :32] = 400
    out, g, _ = run(launch, z, -z + 400, None, None, torch.float32)
    assert -310 < named(out)["log_acceptance"].item() < -305  # -400 / 1.3, and little more
    assert g.isfinite().all()
    assert g.abs().max() > 0.01


def test_ties_have_half_weight():
    z = torch.randn(1, 1031, device=DEVICE)
    _, out = poisoned_stats(1, torch.float32)
    launch.stats(LogitRows(z, z.clone(), None, None, Transform(), Transform()), MEASURED, out)
    assert named(out)["sigma of log_acceptance"].item() == pytest.approx(0.5, rel=0, abs=1e-6)


def test_columns_that_are_not_adjacent_and_no_rows():
    z, t = inputs(37, torch.float64)
    apart = z.t().contiguous().t()
    got, g, _ = run(launch, apart, t.t().contiguous().t(), None, None, torch.float64)
    _want, expected, d_values = run(launch, z, t, None, None, torch.float64)
    assert torch.equal(g, expected)
    launch.gradient(LogitRows(apart, t, None, None, *TRANSFORMS), MEASURED, got, d_values, apart)
    assert torch.equal(apart, expected)
    empty = empty_statistics(0, MEASURED, torch.float64, z.device, True)
    launch.stats(LogitRows(z[:0], t[:0], None, None, *TRANSFORMS), MEASURED, empty)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1024, 1031])
def test_many_tiles_per_row(size, dtype, monkeypatch):
    """The loops over tiles and the masked rest, which the interpreter's large tiles would skip."""
    if launch.INTERPRETED:
        monkeypatch.setattr(launch, "INTERPRETER_BLOCK_V", 128)
    test_kernels_agree_with_their_twin(dtype, size, True, "given")
    test_lse_argmax(dtype, size)
