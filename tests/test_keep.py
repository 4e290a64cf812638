"""`keep_mb`: logits that the forward leaves to the backward. Same results, fewer products, bytes as the plan tells."""

from __future__ import annotations

import pytest
import torch
from problems import assert_outputs_agree, make_problem, make_vocab, primitive_sum
from test_explain import compare
from test_gemm_counts import DRAFT, TOKENS, count
from torch.utils.checkpoint import checkpoint

import fused_lk
from bench.accounting import account, full_size
from fused_lk.walk import plan as plans
from fused_lk.walk.plan import Plan

KINDS = ("hidden", "cached", "logits", "probs", "restricting_topk")
WORK = ("identity", "shifted", "kept")
SIZES = {"draft_size": 150, "target_size": 190}
SMALL = {"workspace_mb": 0.006}  # several chunks, and blocks of columns
SOME, ALL = 0.012, 1.0


@pytest.fixture
def made(monkeypatch):
    """The plans that calls make, in order."""
    seen, make = [], Plan.of
    monkeypatch.setattr(Plan, "of", lambda *arguments: seen.append(make(*arguments)) or seen[-1])
    return seen


@pytest.fixture(params=["by rows", "by vocabulary"])
def walk(request, monkeypatch):
    monkeypatch.setattr(plans, "walks_by_vocabulary", lambda *_: (request.param == "by vocabulary", request.param))
    return request.param


@pytest.mark.parametrize(
    "kind, work, impl",
    [(kind, work, "torch") for kind in KINDS for work in WORK]
    + [("hidden", "shifted", "triton"), ("restricting_topk", "kept", "triton")],
)
def test_the_same_results(kind, work, impl, walk, made):
    """float64: whatever is kept, loss and gradients are those of a call that keeps nothing."""
    problem = make_problem(kind=kind, work=work, stacked=work == "shifted", impl=impl, **SMALL, **SIZES)
    once, plain = problem.run()
    for keep_mb in (SOME, ALL, "auto"):
        made.clear()
        out, gradients = problem.run(keep_mb=keep_mb)
        assert_outputs_agree(out, once, atol=1e-13)
        for got, expected in zip(gradients, plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
        chunks = len(made[0].layout.chunks)
        assert chunks > 2
        expected = {SOME: range(1, chunks), ALL: [chunks], "auto": range(1, chunks + 1)}[keep_mb]
        assert made[0].num_kept in expected


def test_the_primitive_and_a_frozen_side(walk):
    problem = make_problem(work="shifted", **SMALL, **SIZES)
    for frozen in ({}, {"head": False}, {"hidden": False}):
        for keep_mb in (SOME, ALL):
            run = [problem.run(fused_lk.lk_divergences, primitive_sum, keep_mb=x, **frozen)[1] for x in (0, keep_mb)]
            for plain, got in zip(*run, strict=True):
                torch.testing.assert_close(got, plain, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("logits_dtype", ["compute", torch.float32])
def test_half_precision(dtype, logits_dtype, walk):
    """The kept logits are the very bits: rows in half precision differ by the rounding of their sums alone."""
    problem = make_problem(dtype=dtype, num_tokens=64, logits_dtype=logits_dtype, workspace_mb=0.03, **SIZES)
    plain = problem.run()[1]
    for keep_mb in (0.03, ALL):
        for got, expected in zip(problem.run(keep_mb=keep_mb)[1], plain, strict=True):
            assert (got - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("keep_mb", [SOME, ALL])
def test_a_second_backward_sees_the_same_logits(keep_mb, walk):
    problem = make_problem(**SMALL, **SIZES)
    sources, weight, bias = problem.leaves()
    out = fused_lk.lk_loss(sources[0], weight, problem.target, bias=bias, keep_mb=keep_mb, **problem.options)
    leaves = [sources[0], weight, bias]
    first = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    for again, once in zip(torch.autograd.grad(out.loss, leaves), first, strict=True):
        assert torch.equal(again, once)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_a_checkpoint(use_reentrant):
    problem = make_problem(**SMALL, **SIZES)
    gradients = []
    for keep_mb in (0, SOME):
        sources, weight, bias = problem.leaves()

        def loss(hidden, weight=weight, bias=bias, keep_mb=keep_mb):
            return fused_lk.lk_loss(hidden, weight, problem.target, bias=bias, keep_mb=keep_mb, **SMALL).loss

        (checkpoint(loss, sources[0], use_reentrant=use_reentrant) if keep_mb else loss(sources[0])).backward()
        gradients.append([x.grad for x in (sources[0], weight, bias)])
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


# By vocabulary, and by rows.
@pytest.mark.parametrize("tokens, impl, device", [(TOKENS, "torch", "cpu"), (DRAFT + 50, "triton", "cuda")])
def test_products(tokens, impl, device, monkeypatch):
    """Of draft and target: a second one of each for what is not kept, and nothing more."""

    def counted(keep_mb):
        loss = fused_lk.lk_loss
        with monkeypatch.context() as m:
            m.setattr(fused_lk, "lk_loss", lambda *a, **k: loss(*a, keep_mb=keep_mb, **k))
            return count(plan="recompute", tokens=tokens, impl=impl, device=device)

    assert counted(0) == (4, 2, 1, 1)
    assert counted(64) == (3, 1, 1, 1)
    some = counted(0.15)
    assert 3 < some.draft < 4
    assert some.target - 1 == pytest.approx(some.draft - 3)


CASES = [{}, {"tokens": 10000}, {"steps": 4}, {"masked_share": 0.5}, {"logits_dtype": torch.float32}]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("keep_mb", [30, "auto", 4000])
def test_what_explain_tells(keep_mb, case):
    """Its plan, products and bytes are those of the call; what is held between the passes is exact, and in bounds."""
    case = {"plan": "recompute", "tokens": 2400, "workspace_mb": 16, **case}
    told, seen = compare(keep_mb=keep_mb, **case)
    assert told.gemm_flops == seen.gemm_flops
    assert abs(told.peak_bytes - seen.peak) <= 0.03 * seen.peak + 2**20, (told.at_peak, seen.at_peak[:8])
    plain = compare(**case)[1]
    assert seen.after_forward - plain.after_forward == told.kept_bytes
    assert 0 < told.kept_bytes <= (16 if keep_mb == "auto" else keep_mb) * 2**20
    assert (told.kept_pairs == told.num_pairs) is (keep_mb == 4000)
    assert seen.after_backward == plain.after_backward


def test_one_pass_keeps_nothing():
    told, seen = compare(plan="one_pass", keep_mb=4000)
    assert told.kept_bytes == 0
    assert seen.peak == compare(plan="one_pass")[1].peak


@pytest.mark.parametrize("kind, kept_rows", [("probs", 1), ("topk", 1), ("logits", 1), ("hidden", 2)])
def test_only_products_are_kept(kind, kept_rows):
    told, seen = compare(plan="recompute", kind=kind, shared=False, keep_mb=4000, tokens=1024)
    assert told.kept_bytes == kept_rows * 1024 * 8192 * 2
    assert abs(told.peak_bytes - seen.peak) <= 0.03 * seen.peak + 2**20, (told.at_peak, seen.at_peak[:8])


def test_logits_of_the_caller_are_not_kept_again():
    with full_size("cpu"):
        logits, states = torch.empty(64, 512).requires_grad_(), torch.empty(64, 32)
        target = fused_lk.Target.from_hidden(states, torch.empty(512, 32))
        held = [
            account(lambda x=x: fused_lk.lk_loss_from_logits(logits, target, keep_mb=x).loss).after_forward
            for x in (0, 64)
        ]
    assert held[1] - held[0] == 64 * 512 * 4  # the target's alone


def test_nothing_is_kept_where_no_backward_comes():
    with full_size("cpu"):
        hidden, weight = torch.empty(64, 32), torch.empty(512, 32)
        target = fused_lk.Target.from_hidden(torch.empty(64, 32), weight)
        held = [account(lambda x=x: _leaf(fused_lk.lk_loss(hidden, weight, target, keep_mb=x))) for x in (0, 64)]
    assert held[1].peak == held[0].peak


def _leaf(out):
    return out.loss.clone().requires_grad_()


def test_it_says_what_a_mib_saves():
    text = str(fused_lk.explain(8192, 4096, 32000, keep_mb=600))
    assert "products    3.5 of the draft, 1.5 of the target" in text
    assert "kept        500 MiB of logits, of 4096 pairs; keep_mb saves a product for each further 500 MiB" in text
    everything = fused_lk.explain(8192, 4096, 32000, keep_mb=1000)
    assert everything.gemm_flops == everything.floor_flops
    assert everything.saved_by_a_mib * 1000 == pytest.approx(2)


@pytest.mark.parametrize("keep_mb, impl", [(SOME, "torch"), (ALL, "torch"), (SOME, "triton")])
def test_in_a_graph(keep_mb, impl):
    """One graph for any mask: the kept tiles are as large as the shapes alone allow."""
    torch._dynamo.reset()
    hidden, weight = torch.randn(14, 6, requires_grad=True), torch.randn(150, 6, requires_grad=True)
    head = fused_lk.TargetHead(torch.randn(190, 6), make_vocab(190, 150, torch.Generator().manual_seed(0)))
    states = torch.randn(14, 6)

    def loss(mask, keep_mb):
        target = fused_lk.Target.from_hidden(states, head, impl=impl)
        return fused_lk.lk_loss(hidden, weight, target, mask=mask, impl=impl, keep_mb=keep_mb, **SMALL).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        mask = torch.rand(14, generator=torch.Generator().manual_seed(seed)) > 0.4
        got, expected = (torch.autograd.grad(x, (hidden, weight)) for x in (compiled(mask, keep_mb), loss(mask, 0)))
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
