"""What the kernels compile to, for cards that are not there; `test_compile.py` runs this file once per Triton.

It needs Triton's compiler, so a process where TRITON_INTERPRET is not set. Nothing here runs a kernel: statistics and
gradients stay whatever memory held.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest import mock

import pytest
import torch
from fused_lk.kernels import autotune, launch

import fused_lk
from bench import compile_report as report
from bench import machine_code, offline
from fused_lk.rows.interface import MEASURED, TERMS, LogitRows, Normalizer, Transform
from fused_lk.walk.plan import empty_statistics

ARCHS = [arch for arch, card in offline.CARDS.items() if card.since <= offline.TRITON]
NVIDIA = [arch for arch in ARCHS if arch.startswith("sm_")]
BF16, FP32 = torch.bfloat16, torch.float32
SIZES = {name: dtype.itemsize for dtype, name in report.NAMES.items()}
SITES = {"lse_argmax": 2, "row_stats": 8, "row_grad": 4, "row_pass": 12}  # tensors, loop and rest, passes
ALL = {name: (*options, *terms) for name, (_, options, terms) in report.KERNELS.items()}


@pytest.fixture(scope="session")
def rows():
    """The quick report, by card."""
    chosen = list(report.cases(quick=True))
    with ProcessPoolExecutor(min(len(ARCHS), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        found = pool.map(report._inspect_all, [(arch, chosen) for arch in ARCHS])
        return dict(zip(ARCHS, found, strict=True))


@pytest.mark.parametrize("arch", ARCHS)
def test_shipped_tiles_stay_in_registers_and_load_128_bits(rows, arch):
    """The raw figures; `breaches` is the report's own judgement of them."""
    card = offline.CARDS[arch]
    assert len(rows[arch]) == 54
    for row in rows[arch]:
        assert (row.spills, row.stack) == (0, 0), row.case
        assert row.shared <= card.shared_per_block, row.case
        assert row.warps_per_sm >= row.num_warps, row.case
        assert not row.breaches, row
        if row.layout == "aligned":
            elements = row.block_v // (row.num_warps * card.target.warp_size)  # alike of both sides
            least = min(128, *(8 * size * elements for name, size in SIZES.items() if name in row.dtypes.split("/")))
            assert sum(n for bits, n in row.loads.items() if bits >= least) >= SITES[row.kernel], row
            if row.kernel == "row_grad":
                assert min(row.stores) >= 128, row
        if (
            row.layout == "unpadded" and row.kernel != "lse_argmax"
        ):  # whose marks of columns start at an aligned address
            assert max(row.loads) < 128, "an odd row stride cannot be loaded 128 bits at a time: the layout is not one"


@pytest.mark.parametrize("arch", ARCHS)
def test_multiply_adds_are_not_contracted(arch):
    """But for jsd, skl and a softcap row_grad has no logarithm or division, so no multiply-add of its own."""
    options = tuple(name for name in ALL["row_grad"] if name not in ("jsd", "skl"))
    case = report.Case("row_grad", (BF16,) * 3, options, "aligned")
    kernel, _ = report.compile_case(case, arch)
    assert kernel.metadata.enable_fp_fusion is False
    assert machine_code.of(kernel).fused == 0
    with mock.patch.dict(launch.OPTIONS, enable_fp_fusion=True):
        fused = report.inspect(case, arch)
    assert fused.fused >= 32
    assert any("fused" in breach for breach in fused.breaches)


@pytest.mark.parametrize("arch", NVIDIA)
def test_logarithms_are_exact_near_one(arch):
    """log1p and expm1 are corrected by a logarithm of numbers near 1, of which the hardware's `lg2.approx` has absolute
    digits only."""
    case = report.Case("row_stats", (FP32, FP32), ALL["row_stats"], "aligned")
    kernel, _ = report.compile_case(case, arch)
    code = machine_code.sass(kernel)
    assert "MUFU.EX2" in code
    assert "MUFU.LG2" not in code


def test_breaches_are_found():
    """The report is able to fail: too few registers, and rows that do not start on 128-bit boundaries."""
    case = report.Case("row_stats", (BF16, BF16), ALL["row_stats"], "aligned")
    with mock.patch.dict(launch.OPTIONS, maxnreg=40):
        assert any("spills" in breach for breach in report.inspect(case, "sm_80").breaches)
    case = report.Case("row_grad", (BF16,) * 3, ALL["row_grad"], "unpadded")
    kernel, _ = report.compile_case(case, "sm_80")
    padded = report.Case("row_grad", (BF16,) * 3, ALL["row_grad"], "aligned")
    found = list(report.breaches(padded, kernel, machine_code.of(kernel), offline.CARDS["sm_80"], 16))
    assert any("narrow" in breach and "loads" in breach for breach in found)
    assert any("narrow" in breach and "stores" in breach for breach in found)


@pytest.mark.parametrize("arch", ARCHS)
def test_row_offsets_are_64_bits_wide(arch):
    """Every pointer that moves by rows does so by an int64; columns stay int32."""
    for name, (used, *_) in report.KERNELS.items():
        kernel, _ = report.compile_case(report.Case(name, (BF16,) * used, ALL[name], "aligned"), arch)
        ttir = kernel.asm["ttir"]
        moves = re.findall(r"tt\.addptr .* : !tt\.ptr<\w+>, (i\d+)", ttir)
        assert moves
        assert set(moves) == {"i64"}, name
        # and was 64 bits wide before it was multiplied with the stride
        for product in re.findall(r"arith\.muli %(\w+), %\w*row_stride\w*.* : (\w+)", ttir):
            assert product[1] == "i64", (name, product)
        assert re.search(r"arith\.extsi %\w+ : i32 to i64", ttir), name


def tile(rows, size, dtype=BF16):
    return report.gemm.tile(rows, size, dtype, torch.device("cpu"))


def launch_all(n, size, at=0, terms=TERMS):
    """The three kernels on `n` rows, the statistics from element `at` on."""
    z, t = tile(n, size), tile(n, size)
    out = empty_statistics(n + at, terms, FP32, z.device, True).rows(at, n + at)
    vector, index = torch.zeros(n + at)[at:], torch.zeros(n + at, dtype=torch.long)[at:]
    launch.lse_argmax(z, Transform(), torch.zeros(size, dtype=torch.bool), vector, vector, out.draft_argmax)
    rows = LogitRows(z, t, index, Normalizer(vector, False, 0.0), Transform(), Transform(0.5), first_column=at)
    launch.stats(rows, terms, out)
    launch.gradient(rows, terms, out, torch.zeros(len(terms), n + at)[:, at:], z)


@pytest.mark.parametrize("arch", ARCHS)
def test_token_count_does_not_recompile(arch):
    with offline.compiling_for(arch) as launched:
        for n in (1, 2, 3, 15, 16, 17, 100, 1000, 1024):
            for at in (0, 1, 4):
                launch_all(n, 1008, at)
        assert len({id(kernel) for kernel in launched}) == 3
        launch_all(16, 1001)  # not vacuous: another class of vocabulary is another binary
        assert len({id(kernel) for kernel in launched}) == 6


@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
def test_public_calls_do_not_recompile(plan):
    """Whole training steps, by rows and by vocabulary, whose numbers of tokens differ."""
    head = torch.randn(64, 8, requires_grad=True)

    def step(num_tokens):
        hidden = torch.randn(num_tokens, 8, requires_grad=True)
        target = fused_lk.Target.from_logits(torch.randn(num_tokens, 64), impl="triton")
        loss = fused_lk.lk_loss(hidden, head, target, objective="alpha", impl="triton", plan=plan).loss
        loss.backward()

    with mock.patch.object(launch, "check_device"), offline.compiling_for("sm_90") as launched:
        step(32)
        step(100)
        compiled = {id(kernel) for kernel in launched}
        assert {kernel.metadata.name for kernel in launched} >= {"row_stats_kernel", "row_grad_kernel"}
        assert len(compiled) <= 3
        for num_tokens in (1, 2, 31, 48, 64, 65, 129):
            step(num_tokens)
        assert {id(kernel) for kernel in launched} == compiled


@pytest.mark.parametrize("width", launch.CANDIDATES)
def test_autotuning_tries_at_most_six_tiles(width):
    tiles = launch.CANDIDATES[width]
    assert 1 <= len(tiles) <= 6  # float32 and float64 have a single one that stays in registers on every card
    assert len(set(tiles)) == len(tiles)
    assert all(8 <= t.block_v * width // t.threads // 2 <= 32 for t in tiles)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_autotuning_is_opt_in_and_keyed_by_vocabulary(arch, monkeypatch):
    """Only the clock is a stub (a later tile is faster); what is compiled, chosen and kept is Triton's doing."""
    tiles = (launch.Tile(1024, 128), launch.Tile(2048, 256))
    monkeypatch.setenv("FUSED_LK_AUTOTUNE", "1")
    monkeypatch.setitem(launch.CANDIDATES, 2, tiles)
    autotune.tuned.cache_clear()
    timed = []

    def do_bench(call, *args, **kwargs):
        call()
        timed.append(-float(len(timed)))
        return [timed[-1]] * 3

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(offline._Driver, "get_benchmarker", lambda self: do_bench, raising=False)
    lanes = offline.CARDS[arch].target.warp_size
    with offline.compiling_for(arch) as launched:
        launch_all(16, 1008, terms=MEASURED)
        assert len(timed) == 3 * len(tiles)
        assert launched[-1].metadata.num_warps == tiles[-1].threads // lanes
        launch_all(1000, 1008, terms=MEASURED)  # another number of tokens: nothing to time
        assert len(timed) == 3 * len(tiles)
        launch_all(16, 2032, terms=MEASURED)
        assert len(timed) == 6 * len(tiles)
        monkeypatch.delenv("FUSED_LK_AUTOTUNE")
        launch_all(16, 1008, terms=MEASURED)
    shipped = [launch.TILES[name][2].threads for name in ("lse_argmax", "row_stats", "row_grad")]
    assert [kernel.metadata.num_warps * lanes for kernel in launched[-3:]] == shipped
