"""Accounted memory at full size: every figure that the design promises, in both implementations, as on CPU and GPU.

bf16, H = 4,096; peak of live tensor bytes beyond the inputs, forward and backward.
"""

from __future__ import annotations

import gc

import pytest
import torch

import fused_lk
from bench.accounting import GIB, account, full_size
from bench.memory import PROVIDERS, SHAPES, SPECFORGE, accounted, ours
from fused_lk.walk import plan

NAMES = ("V32k", "V32k_ttt7", "V152k", "V152k_frozen", "V32k_of_128k", "V32k_of_128k_ttt7")
SHAPE = dict(zip(NAMES, SHAPES, strict=True))

# GiB: recompute, one pass.
FIGURES = {
    "V32k": (0.8, 1.2),
    "V32k_ttt7": (1.9, 1.9),
    "V152k": (1.8, 4.0),
    "V152k_frozen": (0.5, 0.5),
    "V32k_of_128k": (0.8, 1.2),
    "V32k_of_128k_ttt7": (1.9, 1.9),
}


# Kernels as on a GPU; plain PyTorch as on a CPU for every figure, as on a GPU where that takes seconds to account.
CASES = [
    (name, *how)
    for name in FIGURES
    for how in (("triton", "cuda"), ("torch", "cpu"), ("torch", "cuda"))
    if how == ("triton", "cuda") or (name == "V32k_ttt7" and how[1] == "cpu") or SHAPE[name].ttt_steps == 1
]


@pytest.mark.parametrize("plan", ["recompute", "one_pass"])
@pytest.mark.parametrize("name, impl, device", CASES)
def test_peak(name, plan, impl, device, monkeypatch):
    shape = SHAPE[name]
    if impl == "torch":
        # Larger blocks of rows in the PyTorch row operations: quicker to account, and more than they really take.
        monkeypatch.setattr("fused_lk.rows.plain.BLOCK_ELEMENTS", 2**22)
    seen = accounted(shape, ours(plan, impl), device)
    draft_gemms = 2 + (plan == "recompute") + (not shape.frozen_head)
    # Rows whose target row would lie beyond the end of a shifted step are no work.
    assert seen.gemm_flops >= 0.99 * draft_gemms * shape.ttt_steps * gemm_flops(shape), "the watcher missed the work"
    assert seen.peak / GIB <= FIGURES[name][plan == "one_pass"], seen.at_peak[:8]


@pytest.mark.parametrize("name", ["V32k", "V32k_ttt7"])
def test_the_walk_accumulates_over_the_smaller_side(name, monkeypatch):
    """By vocabulary where there are fewer pairs than tokens in it, else by rows: the other walk needs more."""
    chosen = accounted(SHAPE[name], ours("recompute", "triton"), "cuda").peak
    choose = plan.walks_by_vocabulary

    def other(facts, one_pass):
        return facts.needs_weight and not choose(facts, one_pass)[0], ""

    monkeypatch.setattr(plan, "walks_by_vocabulary", other)
    assert accounted(SHAPE[name], ours("recompute", "triton"), "cuda").peak > 1.1 * chosen


@pytest.mark.parametrize("name", ["V32k", "V32k_ttt7", "V152k"])
def test_eager_peak_by_the_same_accounting(name):
    """The eager loss, counted by hand in tensors `[tokens, V]`: what is compared was counted alike."""
    shape = SHAPE[name]
    seen = accounted(shape, PROVIDERS[SPECFORGE])
    per_element = 8 * shape.ttt_steps  # log q and q of each step in float32
    per_element += 0 if shape.probs else 8  # pt and p in float32, for all steps
    numbers = shape.num_tokens * shape.draft_vocab_size
    assert seen.after_forward == pytest.approx(per_element * numbers, rel=0.01)
    per_element += 4 + 4 + 1 + 1  # the backward of min(p, q): two float32 tensors, and two comparisons
    assert seen.peak == pytest.approx(per_element * numbers, rel=0.01)


def test_a_planted_full_tensor_breaks_the_figure():
    shape = SHAPE["V152k_frozen"]

    def planted(inputs):
        loss_of = ours("one_pass")(inputs)

        def loss():
            kept = torch.empty(shape.num_tokens, shape.draft_vocab_size, dtype=torch.bfloat16)
            out = loss_of()
            del kept
            return out

        return loss

    assert accounted(shape, planted).peak / GIB > FIGURES["V152k_frozen"][1]


@pytest.mark.parametrize("plan", ["recompute", "one_pass"])
@pytest.mark.parametrize("impl, device", [("triton", "cuda"), ("torch", "cpu")])
def test_a_mix_holds_no_more_than_its_costliest_term(impl, device, plan):
    n, h, v = 512, 64, 32000

    def peak(*names):
        with full_size(device):
            hidden, weight = (torch.empty(x, h, dtype=torch.bfloat16).requires_grad_() for x in (n, v))
            target = fused_lk.Target.from_hidden(*(torch.empty(x, h, dtype=torch.bfloat16) for x in (n, v)))
            how = {"objective": dict.fromkeys(names, 0.3), "plan": plan, "impl": impl}
            return account(lambda: fused_lk.lk_loss(hidden, weight, target, **how).loss).peak

    for mix in (("ce", "l1", "kl"), ("jsd", "rkl", "soft_ce"), ("alpha", "l1", "jsd")):
        numbers = 4 * n * (3 * len(mix) + 8)  # a term has three numbers of each row
        assert peak(*mix) <= max(peak(name) for name in mix) + numbers


WORK = {
    "identity": lambda n: (1, None),
    "ttt": lambda n: (7, fused_lk.Pairs.ttt(torch.ones(2, n // 2, dtype=torch.bool), 7)),
    "masked": lambda n: (7, fused_lk.Pairs.ttt((torch.arange(n) % 3 == 0).view(2, -1), 7)),
}


def held(plan, steps, pairs, frozen=(), dtype=torch.bfloat16, n=4096, h=64, v=2048):
    """Bytes alive between forward and backward where only the loss is kept, less what holds the graph together (the
    loss, the scale of the gradients); and bytes of the sources and of the head."""
    with full_size("cuda"):
        sources = [torch.empty(n, h, dtype=dtype).requires_grad_("hidden" not in frozen) for _ in range(steps)]
        weight = torch.empty(v, h, dtype=dtype).requires_grad_("head" not in frozen)
        target = fused_lk.Target.from_hidden(torch.empty(n, h, dtype=dtype), torch.empty(v, h, dtype=dtype))
        shaped = sources[0] if steps == 1 else [x.view(2, n // 2, h) for x in sources]
        seen = account(
            lambda: (
                fused_lk.lk_loss(shaped, weight, target, objective="alpha", plan=plan, pairs=pairs, impl="triton").loss
            )
        )
    return seen.after_forward, sum(x.nbytes for x in sources), weight.nbytes


@pytest.mark.parametrize("work", WORK)
def test_recompute_holds_at_most_84_bytes_a_pair(work):
    steps, pairs = WORK[work](4096)
    num_pairs = 4096 if pairs is None else pairs.num_pairs
    assert 0 < held("recompute", steps, pairs)[0] <= 84 * num_pairs


@pytest.mark.parametrize("work", WORK)
def test_one_pass_holds_the_gradients_and_nothing_else(work):
    steps, pairs = WORK[work](4096)
    loss_and_scale = 8
    of_layout = 0 if pairs is None else held("recompute", steps, pairs)[0]  # the work list's own order, once
    for frozen in ((), ("head",), ("hidden",)):
        got, hidden, head = held("one_pass", steps, pairs, frozen)
        exact = hidden * ("hidden" not in frozen) + head * ("head" not in frozen) + loss_and_scale
        assert exact <= got <= exact + of_layout
        if pairs is None:
            assert got == exact
    got, hidden, head = held("one_pass", steps, pairs, dtype=torch.float16)
    assert got - (hidden + 2 * head + loss_and_scale) in range(
        of_layout + 1
    )  # dW in float32 until its scale is applied


def gemm_flops(shape):
    return 2 * shape.num_tokens * shape.hidden_size * shape.draft_vocab_size


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("options", [{"plan": "one_pass", "objective": "kl"}, {"plan": "recompute"}], ids=str)
def test_a_call_leaves_no_tensor_to_the_garbage_collector(options, impl):
    """Objects that refer to each other would keep their buffers until Python's next collection."""
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    vocab = fused_lk.DraftVocab(torch.arange(20) < 16)

    def call():
        target = fused_lk.Target.from_hidden(torch.randn(6, 8), torch.randn(20, 8), vocab=vocab, impl=impl)
        for mask in (None, torch.arange(6) < 4):
            fused_lk.lk_loss(hidden, weight, target, mask=mask, impl=impl, **options).loss.backward()

    call()
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        call()
        gc.collect()
        left = [x for x in gc.garbage if isinstance(x, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert not left
