"""The Triton kernels where z, t and the gradient differ in dtype, and where rows lie far apart."""

from __future__ import annotations

import pytest
import torch
from fused_lk.kernels import launch

from fused_lk.rows import plain
from fused_lk.rows.interface import MEASURED, LogitRows, Normalizer, Transform, accumulation_dtype
from fused_lk.walk.plan import empty_statistics

BF16, HALF, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NEG_INF = float("-inf")
SCALES = (1 / 0.7, 1 / 1.3)
TRANSFORMS = tuple(Transform(scale) for scale in SCALES)
EPS = {dtype: torch.finfo(dtype).eps for dtype in (BF16, HALF, FP32, FP64)}


def statistics(ops, z, t, normalizer, acc):
    out = empty_statistics(len(z), MEASURED, acc, z.device, target_argmax=True)
    ops.stats(LogitRows(z, t, None, Normalizer(normalizer, False, 0.0), *TRANSFORMS), MEASURED, out)
    return out


# float32 targets come from probabilities and top-k, float32 logits from logits_dtype=float32
@pytest.mark.parametrize("tiles", [None, 64], ids=["one tile", "many tiles"])
@pytest.mark.parametrize(
    "z_dtype, t_dtype, g_dtype",
    [
        (BF16, FP32, BF16),
        (HALF, FP32, HALF),
        (FP32, BF16, BF16),
        (FP32, HALF, HALF),
        (FP32, FP32, BF16),
        (FP32, FP32, HALF),
        (BF16, FP64, BF16),
        (FP64, FP32, FP64),
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_mixed_dtypes_agree_with_their_twin(z_dtype, t_dtype, g_dtype, tiles, monkeypatch):
    """Against float64 arithmetic on the very numbers that the kernels read."""
    if tiles and launch.INTERPRETED:
        monkeypatch.setattr(launch, "INTERPRETER_BLOCK_V", tiles)
    generator = torch.Generator().manual_seed(7)
    size = 203
    z, t = torch.randn(2, 5, size, dtype=FP64, generator=generator) * 2
    t[1, ::3] = NEG_INF
    t[4] = NEG_INF
    z, t = z.to(z_dtype), t.to(t_dtype)
    acc = torch.promote_types(accumulation_dtype(z), accumulation_dtype(t))
    lse = (t.to(acc) * SCALES[1]).logsumexp(1)
    normalizer = torch.where(lse > NEG_INF, lse + 0.25, 0)
    got = statistics(launch, z, t, normalizer, acc)
    want = statistics(plain, z.double(), t.double(), normalizer.double(), FP64)
    supported = want.supported()
    assert supported.tolist() == [True] * 4 + [False]
    close = 1e-10 if acc == FP64 else 2e-5
    for name, a, b in zip(got._fields, got, want, strict=True):
        message = f"{name}: {{}}".format
        torch.testing.assert_close(a.to(b.dtype), b, atol=close, rtol=close, msg=message)

    d = torch.linspace(0.5, 1.5, 5, dtype=acc)
    d = torch.stack([d, 2 - d])
    g = torch.full((5, size), float("nan"), dtype=g_dtype)
    launch.gradient(LogitRows(z, t, None, None, *TRANSFORMS), MEASURED, got, d, g)
    expected = torch.empty(5, size, dtype=FP64)
    plain.gradient(LogitRows(z.double(), t.double(), None, None, *TRANSFORMS), MEASURED, want, d.double(), expected)
    assert not g[4].any()
    # one rounding to the gradient's dtype, and the arithmetic's own error
    torch.testing.assert_close(g[:4].double(), expected[:4], rtol=EPS[g_dtype], atol=close)


def test_rows_more_than_two_to_the_31_elements_apart():
    """Row 2 of each tensor starts beyond 2**31 elements: an offset of 32 bits would wrap. 4 GiB are reserved each, and
    a few pages of them touched."""
    stride, size = 2**30 + 64, 37
    try:
        storage = [torch.empty(2 * stride + size, dtype=BF16) for _ in range(2)]
    except RuntimeError as error:
        pytest.skip(f"no 9 GB of address space: {error}")
    z, t = (x.as_strided((3, size), (stride, 1)) for x in storage)
    generator = torch.Generator().manual_seed(3)
    values = (torch.randn(2, 3, size, generator=generator) * 2).to(BF16)
    z.copy_(values[0])
    t.copy_(values[1])
    index = torch.tensor([2, 0, 1])
    near = [values[0].clone(), values[1].clone()]
    results = []
    for a, b in ((z, t), near):
        out = empty_statistics(3, MEASURED, FP32, a.device, target_argmax=True)
        rows = LogitRows(a, b, index, None, *TRANSFORMS)
        launch.stats(rows, MEASURED, out)
        lse, at = torch.empty(3), torch.empty(3, dtype=torch.long)
        launch.lse_argmax(a, TRANSFORMS[0], None, lse, None, at)
        launch.gradient(rows, MEASURED, out, torch.ones(2, 3), a)
        results.append([*out, lse, at, a.clone()])
    for far, close in zip(*results, strict=True):
        assert torch.equal(far, close)
