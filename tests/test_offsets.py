"""Rows that lie further apart than 32 bits count: a row's offset is made in 64.

On the CPU the storage is a sparse file, of which the pages under the few rows alone are ever real. An
offset that wraps around ends the process here: it points outside.
"""

from __future__ import annotations

import pytest
import torch
from fused_lk.kernels import launch

from fused_lk.rows import plain
from fused_lk.rows.interface import TERMS, LogitRows, Transform
from fused_lk.walk.plan import empty_statistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROW_STRIDE = 2**30 + 64  # elements: the last of three rows starts past 2**31
ROWS, COLUMNS = 3, 37


@pytest.fixture
def far_apart(tmp_path):
    """A function: its argument with rows `ROW_STRIDE` elements apart."""

    def place(values):
        elements = (ROWS - 1) * ROW_STRIDE + COLUMNS
        if DEVICE == "cuda":
            flat = torch.empty(elements, dtype=torch.float16, device=DEVICE)
        else:
            flat = torch.from_file(str(tmp_path / "rows"), shared=True, size=elements, dtype=torch.float16)
        return flat.as_strided((ROWS, COLUMNS), (ROW_STRIDE, 1)).copy_(values)

    yield place
    (tmp_path / "rows").unlink(missing_ok=True)


@pytest.mark.parametrize("far", ["z", "t", "gradient"])
def test_rows_further_apart_than_32_bits(far, far_apart):
    generator = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, ROWS, COLUMNS, generator=generator).half().to(DEVICE)
    results = []
    for ops, place in ((launch, far_apart), (plain, lambda x: x)):
        into = {"z": z, "t": t, "gradient": torch.zeros_like(z)}
        into[far] = place(into[far])
        out = empty_statistics(ROWS, TERMS, torch.float32, z.device, True)
        ones = torch.ones(len(TERMS), ROWS, device=DEVICE)
        rows = LogitRows(into["z"], into["t"], None, None, Transform(), Transform())
        ops.stats(rows, TERMS, out)
        ops.gradient(rows, TERMS, out, ones, into["gradient"])
        results.append([*out[:-1], into["gradient"].clone()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


def test_log_sum_exp_of_rows_further_apart_than_32_bits(far_apart):
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    lse, argmax = torch.zeros(ROWS, device=DEVICE), torch.zeros(ROWS, dtype=torch.long, device=DEVICE)
    launch.lse_argmax(far_apart(x), Transform(), None, lse, None, argmax)
    torch.testing.assert_close(lse, x.float().logsumexp(1))
    assert torch.equal(argmax, x.argmax(1))
