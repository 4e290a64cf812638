"""The Triton kernels against their PyTorch twin, `fused_lk.rows.plain`, inside poisoned memory."""

from __future__ import annotations

import pytest
import torch
from fused_lk.kernels import launch

from fused_lk.rows import plain
from fused_lk.rows.interface import LogitRows, Normalizer, RowStats

NEG_INF = float("-inf")
DEVICE = torch.get_default_device().type
SCALES = (1 / 0.7, 1 / 1.3)
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


def poisoned_stats(n, dtype):
    """Statistics as views from the second element on, with canaries at both ends."""
    whole = RowStats.empty(n + 2, dtype, torch.device(DEVICE), target_argmax=True)
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


def run(ops, z, t, index, normalizer, acc):
    """Statistics and gradient of `ops`, with NaN coefficients on the rows without an answer."""
    n, size = z.shape
    whole, out = poisoned_stats(n, acc)
    storage, g = guarded(n, size, z.dtype)

    def coefficients(start, stop, stats):
        d = torch.linspace(0.5, 1.5, n, dtype=acc, device=DEVICE)[start:stop]
        d = torch.where(stats.supported, d, float("nan"))
        return d, 2 - d

    ops.stats_and_gradient(LogitRows(z, t, index, *SCALES), normalizer, out, g, coefficients)
    for x in whole:
        for end in (x[0], x[-1]):
            assert end.isnan() if x.is_floating_point() else end == -7
    assert_guards_hold(storage, g)
    return out, g, coefficients(0, n, out)


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
    out, g, (d_log_alpha, d_kl) = run(launch, z, t, index, normalizer, acc)
    # float64 arithmetic on the very numbers the kernels read; ties that rounding makes or breaks may differ
    exact = None if normalizer is None else normalizer._replace(value=normalizer.value.double())
    expected, expected_g, _ = run(plain, z.double(), t.double(), index, exact, torch.float64)
    close = {"atol": 1e-10 if acc == torch.float64 else 2e-5, "rtol": 1e-10 if acc == torch.float64 else 2e-5}
    for name, got, want in zip(out._fields, out, expected, strict=True):
        if name in ("sigma", "top_log_acceptance"):  # row 3 is all ties, which rounding makes or breaks
            got, want = got[[0, 1, 2, 4, 5]], want[[0, 1, 2, 4, 5]]
        torch.testing.assert_close(got.to(want.dtype), want, **close, msg=lambda m, name=name: f"{name}: {m}")
    tolerance = TOLERANCE[dtype]
    keep = [0, 1, 2, 4, 5]
    torch.testing.assert_close(g[keep].double(), expected_g[keep].double(), atol=tolerance, rtol=tolerance)
    unsupported = ~out.supported
    assert unsupported.sum() == 1
    assert not g[unsupported].any()
    assert (out.log_acceptance[unsupported] == NEG_INF).all()

    # a block of columns at a time, written over z itself
    whole = g.clone()
    for start in range(0, size, 700):
        block = LogitRows(z[:, start : start + 700], t[:, start : start + 700], index, *SCALES, start)
        launch.gradient(block, out, d_log_alpha, d_kl, block.z)
    assert torch.equal(z, whole)


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
            ops.lse_argmax(x, SCALES[0], inside, lse, None if inside is None else mass, at)
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
        ops.lse_argmax(x, 1.0, inside, lse, mass, at)
        assert at.tolist() == [1, 0]


def test_disjoint_rows_keep_their_gradient():
    z = torch.zeros(1, 64, device=DEVICE)
    z[:, :32] = 400
    out, g, _ = run(launch, z, -z + 400, None, None, torch.float32)
    assert -310 < out.log_acceptance.item() < -305  # -400 / 1.3, and little more
    assert g.isfinite().all()
    assert g.abs().max() > 0.01


def test_ties_have_half_weight():
    z = torch.randn(1, 1031, device=DEVICE)
    _, out = poisoned_stats(1, torch.float32)
    launch.stats(LogitRows(z, z.clone(), None, 1.0, 1.0), None, out)
    torch.testing.assert_close(out.sigma, torch.full_like(out.sigma, 0.5), rtol=0, atol=1e-6)


def test_columns_that_are_not_adjacent_and_no_rows():
    z, t = inputs(37, torch.float64)
    apart = z.t().contiguous().t()
    got, g, _ = run(launch, apart, t.t().contiguous().t(), None, None, torch.float64)
    _want, expected, (d_log_alpha, d_kl) = run(launch, z, t, None, None, torch.float64)
    assert torch.equal(g, expected)
    launch.gradient(LogitRows(apart, t, None, *SCALES), got, d_log_alpha, d_kl, apart)
    assert torch.equal(apart, expected)
    empty = RowStats.empty(0, torch.float64, z.device, True)
    launch.stats(LogitRows(z[:0], t[:0], None, *SCALES), None, empty)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1024, 1031])
def test_many_tiles_per_row(size, dtype, monkeypatch):
    """The loops over tiles and the masked rest, which the interpreter's large tiles would skip."""
    if launch.INTERPRETED:
        monkeypatch.setattr(launch, "INTERPRETER_BLOCK_V", 128)
    test_kernels_agree_with_their_twin(dtype, size, True, "given")
    test_lse_argmax(dtype, size)
