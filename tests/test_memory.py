"""Accounted memory at full size: every figure that the design promises, in both implementations, as on CPU and GPU.

bf16, H = 4,096; peak of live tensor bytes beyond the inputs, forward and backward.
"""

from __future__ import annotations

import pytest
import torch

import fused_lk
from bench.accounting import GIB, account, full_size
from bench.memory import SHAPES, accounted, eager, ours
from fused_lk import plan

NAMES = ("V32k", "V32k_ttt7", "V152k", "V152k_frozen", "V32k_of_128k", "V32k_of_128k_ttt7")
SHAPE = dict(zip(NAMES, SHAPES, strict=True))

# GiB: eager, recompute, one pass.
FIGURES = {
    "V32k": (8.3, 0.8, 1.2),
    "V32k_ttt7": (19.0, 1.9, 1.9),
    "V152k": (39.4, 1.8, 4.0),
    "V152k_frozen": (None, 0.5, 0.5),
    "V32k_of_128k": (None, 0.8, 1.2),
    "V32k_of_128k_ttt7": (None, 1.9, 1.9),
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
    assert seen.gemm_flops >= draft_gemms * shape.ttt_steps * gemm_flops(shape), "the watcher missed the work"
    assert seen.peak / GIB <= FIGURES[name][1 if plan == "recompute" else 2], seen.at_peak[:8]


@pytest.mark.parametrize("name", ["V32k", "V32k_ttt7"])
def test_the_walk_accumulates_over_the_smaller_side(name, monkeypatch):
    """By vocabulary where there are fewer pairs than tokens in it, else by rows: the other walk needs more."""
    chosen = accounted(SHAPE[name], ours("recompute", "triton"), "cuda").peak
    other = plan.walks_by_vocabulary
    monkeypatch.setattr(plan, "walks_by_vocabulary", lambda v, pairs, needs: needs and not other(v, pairs, needs))
    assert accounted(SHAPE[name], ours("recompute", "triton"), "cuda").peak > 1.1 * chosen


@pytest.mark.parametrize("name", ["V32k", "V32k_ttt7", "V152k"])
def test_eager_peak_by_the_same_accounting(name):
    """The design's own figures for the eager loss: what is compared was counted alike."""
    assert accounted(SHAPE[name], eager).peak / GIB == pytest.approx(FIGURES[name][0], rel=0.06)


def test_a_planted_full_tensor_breaks_the_figure():
    shape = SHAPE["V152k_frozen"]

    def planted(inputs):
        kept = torch.empty(shape.num_tokens, shape.draft_vocab_size, dtype=torch.bfloat16)
        loss = ours("one_pass")(inputs)
        del kept
        return loss

    assert accounted(shape, planted).peak / GIB > FIGURES["V152k_frozen"][2]


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
def test_recompute_holds_at_most_80_bytes_a_pair(work):
    steps, pairs = WORK[work](4096)
    num_pairs = 4096 if pairs is None else pairs.num_pairs
    assert 0 < held("recompute", steps, pairs)[0] <= 80 * num_pairs


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
