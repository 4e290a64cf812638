"""Repeated runs, other cuts of the same work, and what a backward may not do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fused_lk
from fused_lk.walk import plan as plans

TOKENS, HIDDEN, DRAFT, TARGET, STEPS = 60, 16, 320, 512, 3
PLANS = ("one_pass", "recompute")


def inputs(dtype=torch.float32, tokens=TOKENS, draft=DRAFT, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    vocab = fused_lk.DraftVocab(torch.randperm(TARGET, generator=generator) < draft)
    mask = torch.rand(2, tokens // 2, generator=generator) > 0.3
    sources = [randn(2, tokens // 2, HIDDEN) for _ in range(STEPS)]
    head = fused_lk.TargetHead(randn(TARGET, HIDDEN), vocab)
    return sources, randn(draft, HIDDEN) / 2, randn(2, tokens // 2, HIDDEN), head, fused_lk.Pairs.ttt(mask, STEPS, 0)


def step(plan, made=None, scale=1.0, **options):
    """Loss and gradients, in order: sources, head."""
    sources, weight, states, head, pairs = made or inputs()
    sources = [x.clone().requires_grad_() for x in sources]
    weight = weight.clone().requires_grad_()
    target = fused_lk.Target.from_hidden(states, head)
    out = fused_lk.lk_loss(sources, weight, target, objective="alpha", pairs=pairs, plan=plan, **options)
    return [out.loss.detach(), *torch.autograd.grad(out.loss * scale, [*sources, weight])]


def worst(got, want):
    """Largest error, in units of the largest entry of each tensor."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", PLANS)
def test_runs_repeat_bit_for_bit(plan, dtype):
    first, *others = (step(plan, inputs(dtype), workspace_mb=0.02) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("plan", PLANS)
def test_chunks_agree(plan):
    """In float32, cuts change the order of sums of up to `TOKENS * STEPS` terms (dW) and `DRAFT` (dH)."""
    whole = step(plan)
    pairs = inputs()[-1].num_pairs
    tolerance = torch.finfo(torch.float32).eps * max(pairs, DRAFT) ** 0.5
    for workspace_mb in (0.003, 0.02, 0.1):
        assert worst(step(plan, workspace_mb=workspace_mb), whole) <= tolerance


@pytest.mark.parametrize("workspace_mb", [0.02, "auto"])
def test_walks_agree(workspace_mb, monkeypatch):
    walks = []
    for by_vocabulary in (True, False):
        monkeypatch.setattr(plans, "walks_by_vocabulary", lambda *_, answer=by_vocabulary: (answer, ""))
        walks.append(step("recompute", workspace_mb=workspace_mb))
    tolerance = 2 * torch.finfo(torch.float32).eps * DRAFT**0.5
    assert worst(*walks) <= tolerance
    assert worst(step("one_pass", workspace_mb=workspace_mb), walks[1]) <= tolerance


class NoSynchronisation(TorchDispatchMode):
    """Refuses what would wait for a GPU."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "_to_copy", "masked_select", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in self.FORBIDDEN and (name != "_to_copy" or (kwargs or {}).get("device") is not None):
            raise AssertionError(f"{name} synchronises")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_one_pass_backward_does_not_synchronise(dtype):
    sources, weight, states, head, pairs = inputs(dtype)
    sources = [x.requires_grad_() for x in sources]
    target = fused_lk.Target.from_hidden(states, head)
    out = fused_lk.lk_loss(sources, weight.requires_grad_(), target, objective="alpha", pairs=pairs, plan="one_pass")
    with NoSynchronisation():
        out.loss.backward()
    assert weight.grad is not None
    with NoSynchronisation(), pytest.raises(AssertionError, match="_local_scalar_dense synchronises"):
        out.loss.item()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_backward_twice_and_scaled(dtype, plan):
    sources, weight, states, head, pairs = inputs(dtype)
    leaves = [*(x.requires_grad_() for x in sources), weight.requires_grad_()]
    target = fused_lk.Target.from_hidden(states, head)
    loss = fused_lk.lk_loss(sources, weight, target, objective="alpha", pairs=pairs, plan=plan).loss
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    scaled = torch.autograd.grad(loss * 1024, leaves)
    for a, b, c in zip(first, again, scaled, strict=True):
        assert torch.equal(a, b)
        # A power of two scales exactly, but for what is subnormal in float16 without the scale.
        smallest = torch.finfo(dtype).smallest_normal
        torch.testing.assert_close(c.float() / 1024, a.float(), rtol=0, atol=smallest if dtype == torch.float16 else 0)


def float16_errors(plan):
    """Relative errors of dH and dW in float16 at 8,192 tokens under a GradScaler's scale: ours, the eager loss's.

    Probabilities are nearly uniform: row gradients are about 1/V, and 1/(N V) if the mean were in the tile.
    """
    generator = torch.Generator().manual_seed(0)
    hidden, weight, logits = (torch.randn(*n, generator=generator) for n in ((8192, 8), (512, 8), (8192, 512)))
    narrow = [x.half() for x in (hidden, weight * 0.1, logits * 0.5)]

    def gradients(loss_of, dtype):
        h, w, t = (x.to(dtype) for x in narrow)
        loss = loss_of(h.requires_grad_(), w.requires_grad_(), t)
        return torch.autograd.grad(loss * 2**14, [h, w])

    def ours(h, w, t):
        return fused_lk.lk_loss(h, w, fused_lk.Target.from_logits(t), objective="kl", plan=plan).loss

    def eager(h, w, t):
        log_p = fused_lk.reference.target_log_probs(t)
        return fused_lk.reference.lk_loss(F.linear(h, w), log_p, objective="kl").loss

    truth = gradients(eager, torch.float64)
    return [
        [float((x.double() - y).norm() / y.norm()) for x, y in zip(gradients(f, torch.float16), truth, strict=True)]
        for f in (ours, eager)
    ]


@pytest.mark.parametrize("plan", PLANS)
def test_float16_does_not_flush_at_8192_tokens(plan, monkeypatch):
    """With the 1/N of the mean inside a float16 tile, most entries of the gradient would be zero."""
    for ours, eager in zip(*float16_errors(plan), strict=True):
        assert ours < 1.1 * eager
    monkeypatch.setattr("fused_lk.graph.autograd.near_unit_scale", lambda *x: x[0].new_ones(1))
    if plan == "one_pass":  # recompute has the scaler's factor in the tile as well
        assert min(float16_errors(plan)[0]) > 10 * max(float16_errors(plan)[1])


@pytest.mark.parametrize("vocab", [32000, 151936])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_cliff_of_tiny_chunks_at_1024_tokens(device, vocab):
    """Chunks stay large enough for full-speed products where there are few tokens."""
    for plan, frozen in (("one_pass", False), ("recompute", False), ("recompute", True)):
        told = fused_lk.explain(
            1024, 4096, vocab, objective="alpha", plan=plan, frozen_head=frozen, device=device, target="hidden"
        )
        least = plans.MIN_CPU_ROWS if device == "cpu" else 256
        if device == "cuda" and plan == "one_pass":
            least = plans.ROWS_TO_HIDE_WEIGHT_TRAFFIC
        assert told.chunk_pairs >= least
        assert told.block_columns is None or told.block_columns >= 4096
