"""What `explain` tells is what calls do: its plan is theirs, and so are its bytes and products, by the accounting."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import fused_lk
from bench import eager, memory
from bench.accounting import Accounting, account, full_size
from fused_lk.walk.plan import Plan

N, H, V, FULL = 3072, 512, 8192, 12000
TOLERANCE, SLACK = 0.03, 2**20  # of the peak, and in bytes
BLOCKS = 2 * 2**22  # two blocks of rows of the PyTorch row operations


def compare(
    *,
    kind="hidden",
    plan="one_pass",
    impl="triton",
    device="cuda",
    dtype=torch.bfloat16,
    steps=1,
    tokens=N,
    vocab=V,
    shared=True,
    masked_share=0.0,
    frozen=(),
    normalizer_given=False,
    logits_dtype="compute",
    target_logits_dtype="compute",
    workspace_mb="auto",
    keep_mb=0,
):
    """The explanation and the account of one step, whose plans are the same."""
    arguments, plans, make = locals(), [], Plan.of
    with mock.patch.object(Plan, "of", lambda *arguments: plans.append(make(*arguments)) or plans[-1]):
        told, seen = _compare(**arguments)
    ours, theirs = plans
    assert replace(ours, facts=None, reasons=()) == replace(theirs, facts=None, reasons=())
    assert ours.reasons[1:] == theirs.reasons[1:]
    assert ours.layout.chunks == theirs.layout.chunks
    assert replace(ours.facts, pairs=None, device=None) == replace(theirs.facts, pairs=None, device=None)
    return told, seen


def _compare(
    kind, plan, impl, device, dtype, steps, tokens, vocab, shared, masked_share, frozen, normalizer_given, logits_dtype,
    target_logits_dtype, workspace_mb, keep_mb, **_,
):  # fmt: skip
    full = vocab if shared else vocab + 4096
    told = fused_lk.explain(
        tokens,
        H,
        vocab,
        full,
        target=kind.removeprefix("restricting_"),
        plan=plan,
        objective="alpha",
        impl=impl,
        device=device,
        dtype=dtype,
        ttt_steps=steps,
        masked_share=masked_share,
        normalizer_given=normalizer_given,
        frozen_head="head" in frozen,
        frozen_hidden="hidden" in frozen,
        logits_dtype=logits_dtype,
        target_logits_dtype=target_logits_dtype,
        workspace_mb=workspace_mb,
        keep_mb=keep_mb,
    )
    counts = torch.arange(tokens) >= round(masked_share * tokens)
    rows = torch.arange(tokens) + torch.arange(steps).unsqueeze(1)
    counts, rows = counts.expand(steps, -1), torch.where(rows < tokens, rows, -1)
    pairs = fused_lk.Pairs(counts, rows) if steps > 1 else fused_lk.Pairs(counts[0])
    draft_vocab = None if shared else fused_lk.DraftVocab(torch.arange(full) < vocab)
    ids = torch.zeros(tokens, 5, dtype=torch.long) + torch.arange(5)
    with full_size(device):
        sources = [torch.empty(tokens, H, dtype=dtype).requires_grad_("hidden" not in frozen) for _ in range(steps)]
        weight = torch.empty(vocab, H, dtype=dtype).requires_grad_("head" not in frozen)
        states = torch.empty(tokens, H, dtype=dtype)
        head = fused_lk.TargetHead(torch.empty(full, H, dtype=dtype), draft_vocab)
        wide = torch.promote_types(dtype, torch.float32) if target_logits_dtype == torch.float32 else dtype
        given = torch.empty(tokens, full, dtype=wide)
        of_hidden = {"impl": impl, "workspace_mb": workspace_mb, "logits_dtype": target_logits_dtype}
        topk = torch.empty(tokens, 5)
        known = {"log_normalizer": torch.empty(tokens), "token_ids": ids[:, 0]} if normalizer_given else {}

        def run():
            target = {
                "hidden": lambda: fused_lk.Target.from_hidden(states, head, **of_hidden, **known),
                "cached": lambda: fused_lk.Target.from_hidden(states, head, **of_hidden, cache=True),
                "logits": lambda: fused_lk.Target.from_logits(given, draft_vocab, impl=impl),
                "probs": lambda: fused_lk.Target.from_probs(given[:, :vocab], draft_vocab),
                "topk": lambda: fused_lk.Target.from_topk(ids, topk, full if shared else draft_vocab),
                "restricting_topk": lambda: fused_lk.Target.from_topk(
                    ids, topk, full if shared else draft_vocab, restrict_draft=True
                ),
            }[kind]()
            return fused_lk.lk_loss(
                sources if steps > 1 else sources[0],
                weight,
                target,
                objective="alpha",
                pairs=pairs if steps > 1 or masked_share else None,
                plan=plan,
                impl=impl,
                logits_dtype=logits_dtype,
                workspace_mb=workspace_mb,
                keep_mb=keep_mb,
            ).loss

        seen = account(run)
    return told, seen


def check(told, seen, blocks=0):
    assert told.gemm_flops == seen.gemm_flops
    off_by = abs(told.peak_bytes - seen.peak)
    assert off_by <= TOLERANCE * seen.peak + SLACK + blocks, (told.at_peak, seen.at_peak[:8])


PLANS = pytest.mark.parametrize("plan", ["one_pass", "recompute"])


@PLANS
@pytest.mark.parametrize("device, impl", [("cuda", "triton"), ("cpu", "torch"), ("cpu", "triton"), ("cuda", "torch")])
@pytest.mark.parametrize("tokens", [1024, 3072, 10000])
def test_devices_and_sizes(tokens, device, impl, plan):
    check(*compare(tokens=tokens, device=device, impl=impl, plan=plan), blocks=BLOCKS if impl == "torch" else 0)


@PLANS
def test_the_row_operations_in_pytorch(plan):
    for case in ({"dtype": torch.float32}, {"shared": False}, {"kind": "probs"}, {"steps": 3}):
        check(*compare(device="cpu", impl="torch", plan=plan, **case), blocks=BLOCKS)


@PLANS
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["hidden", "cached", "logits", "probs", "topk", "restricting_topk"])
def test_targets(kind, shared, plan):
    check(*compare(kind=kind, shared=shared, plan=plan))


@PLANS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("logits_dtype", ["compute", torch.float32])
def test_dtypes(dtype, logits_dtype, plan):
    check(*compare(dtype=dtype, logits_dtype=logits_dtype, plan=plan))


@PLANS
@pytest.mark.parametrize("logits_dtype", ["compute", torch.float32])
@pytest.mark.parametrize("kind", ["hidden", "cached", "logits"])
def test_target_logits_in_float32(kind, logits_dtype, plan):
    check(*compare(kind=kind, shared=False, logits_dtype=logits_dtype, target_logits_dtype=torch.float32, plan=plan))


@PLANS
@pytest.mark.parametrize("frozen", [["head"], ["hidden"]])
@pytest.mark.parametrize("tokens", [3072, 10000])
def test_frozen(tokens, frozen, plan):
    check(*compare(frozen=frozen, tokens=tokens, plan=plan))


@PLANS
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("steps, masked_share", [(1, 0.5), (4, 0.0), (4, 0.75)])
def test_work_lists(steps, masked_share, device, plan):
    check(*compare(steps=steps, masked_share=masked_share, device=device, plan=plan))


@PLANS
@pytest.mark.parametrize("workspace_mb", [4, 1000])
def test_workspaces(workspace_mb, plan):
    check(*compare(workspace_mb=workspace_mb, plan=plan))


def test_held():
    """Exactly the gradients, the scale and the loss apart; or statistics of the pairs, outputs among them."""
    for plan, dtype in (("one_pass", torch.bfloat16), ("one_pass", torch.float16), ("recompute", torch.bfloat16)):
        told, seen = compare(plan=plan, dtype=dtype)
        outputs = 0 if plan == "one_pass" else 3 * 4 * N
        assert abs(told.held_bytes + outputs - seen.after_forward) <= (64 if plan == "one_pass" else 24 * N)


# (tokens, hidden size, draft vocabulary, target vocabulary, steps)
EAGER = [
    *((2048, 256, 8192, 8192, steps) for steps in (1, 4)),
    *((2048, 256, 8192, 12288, steps) for steps in (1, 4)),
    (2048, 256, 4096, 40960, 1),  # the full vocabulary outweighs what the steps hold
    *((256, 2048, 8192, 8192, steps) for steps in (1, 2, 3)),  # and here the head does
]


@pytest.mark.parametrize("kind", ["hidden", "logits", "probs", "topk"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", EAGER, ids=str)
def test_the_eager_loss(shape, dtype, kind):
    """What is saved is told by the account of the loss that the table of memory has."""
    tokens, hidden, vocab, full, steps = shape
    for frozen in ([], ["head"], ["hidden"], ["head", "hidden"]) if kind == "hidden" else ([],):
        named = memory.Shape("", *shape[:4], str(dtype).split(".")[1], steps, frozen_head="head" in frozen)
        with full_size():
            inputs = memory.make_inputs(named)
            for x in inputs.draft_hidden:
                x.requires_grad_("hidden" not in frozen)
            given = torch.empty(tokens, full, dtype=dtype), torch.empty(tokens + steps - 1, vocab)

            def loss(inputs=inputs, given=given):
                if kind == "logits":  # in hand, where the trainer would make them
                    with mock.patch.object(eager.F, "linear", _given_to(inputs.target_hidden, given[0])):
                        return eager.specforge(inputs)
                probs = {"probs": given[1], "topk": torch.empty_like(given[1])}.get(kind)
                return eager.specforge(replace(inputs, target_probs=probs))

            seen = account(loss) if len(frozen) < 2 else account_forward(loss)
        told = fused_lk.explain(
            tokens, hidden, vocab, full, target=kind, ttt_steps=steps, dtype=dtype, plan="recompute",
            frozen_head="head" in frozen, frozen_hidden="hidden" in frozen,
        )  # fmt: skip
        assert told.eager_bytes == pytest.approx(seen.peak, rel=TOLERANCE), seen.at_peak[:8]


def _given_to(hidden, logits, linear=F.linear):
    return lambda x, *weights: logits if x is hidden else linear(x, *weights)


def account_forward(loss):
    with Accounting() as seen:
        loss()
    return seen


def test_floors():
    told = fused_lk.explain(N, H, V, FULL, objective="alpha")
    one = 2 * N * H * V
    assert (told.floor_flops, told.floor_flops_from_hidden) == (4 * one, 3 * one + 2 * N * H * FULL)
    seven = fused_lk.explain(N, H, V, ttt_steps=7, objective="alpha")
    assert seven.floor_flops == 3 * 2 * seven.num_pairs * H * V + one
    frozen = fused_lk.explain(N, H, V, frozen_head=True, objective="alpha")
    assert frozen.floor_flops == frozen.gemm_flops == 3 * one
    assert fused_lk.explain(N, H, V, target="probs", objective="kl").floor_flops_from_hidden == 3 * one


def test_it_says_why():
    text = str(fused_lk.explain(8192, 4096, 32000))
    assert "recompute: one pass cannot serve lambda_per" in text
    assert "by vocabulary: dH of 8192 pairs is smaller to accumulate than dW of 32000 tokens" in text
    text = str(fused_lk.explain(8192, 4096, 151936, objective="tv"))
    assert "at most 1024 pairs a chunk: what hides the float32 traffic of dW on a GPU" in text
    assert "peak        3.54 GiB beyond the inputs: " in text
    assert (
        "saved       26.60 GiB: the eager loss, which makes full logits and softmaxes of them, would need 30.14 GiB"
        in text
    )
    text = str(fused_lk.explain(16, 4096, 1000))  # a head that outweighs its rows
    assert "saved       0 MiB: the eager loss" in text
    with pytest.raises(ValueError, match='plan="one_pass" can serve'):
        fused_lk.explain(8192, 4096, 32000, plan="one_pass")
    with pytest.raises(ValueError, match="masked_share in"):
        fused_lk.explain(8192, 4096, 32000, masked_share=2)


def test_pairs_in_hand():
    """The actual work list: its own count, and chunks as the call will cut them."""
    mask = torch.rand(4, 700, generator=torch.Generator().manual_seed(0)) > 0.5
    pairs = fused_lk.Pairs.ttt(mask, 3)
    told = fused_lk.explain(2800, H, V, ttt_steps=3, pairs=pairs, workspace_mb=8)
    assert (told.num_pairs, told.num_targets) == (pairs.num_pairs, pairs.num_targets)
    assert told.chunk_pairs * told.chunks >= told.num_pairs
