"""Errors against float64 stay within those of the eager loss in the same dtype, for every objective and its gradients,
over a truncated vocabulary.

Margin: 1.5 times the eager error (rounding falls differently, never systematically worse), plus what one rounding of
the result itself can cost.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fused_lk

TOKENS, HIDDEN, TARGET_VOCAB = 24, 32, 601


def eager(hidden, weight, states, head, t2d, objective):
    """The loss as trainers write it: logits in the compute dtype, softmaxes in float32."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    q = F.log_softmax(F.linear(hidden, weight).to(wide), -1)
    target_logits = F.linear(states, head).to(wide)
    p, pt = F.log_softmax(target_logits, -1)[:, t2d], F.log_softmax(target_logits[:, t2d], -1)
    alpha = torch.minimum(p.exp(), q.exp()).sum(-1)
    kl = (pt.exp() * (pt - q)).sum(-1)
    lam = torch.exp(-3 * alpha.detach().mean())
    return {"alpha": -alpha.log(), "tv": 1 - alpha, "kl": kl, "lambda": lam * kl + (1 - lam) * (1 - alpha)}[
        objective
    ].mean()


def gradients(loss, *leaves):
    return [loss, *torch.autograd.grad(loss, leaves)]


ONE_PASS = [(objective, "one_pass") for objective in ("kl", "tv", "alpha")]
RECOMPUTE = [(objective, "recompute") for objective in ("kl", "alpha", "lambda")]


@pytest.mark.parametrize(("objective", "plan"), ONE_PASS + RECOMPUTE)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_within_that_of_the_eager_loss(dtype, impl, plan, objective):
    generator = torch.Generator().manual_seed(3)
    t2d = torch.rand(TARGET_VOCAB, generator=generator) < 0.75
    shapes = ((TOKENS, HIDDEN), (int(t2d.sum()), HIDDEN), (TOKENS, HIDDEN), (TARGET_VOCAB, HIDDEN))
    tensors = [(torch.randn(*s, generator=generator) / HIDDEN**0.25).to(dtype) for s in shapes]

    def leaves(to):
        return [x.to(to, copy=True).requires_grad_(i < 2) for i, x in enumerate(tensors)]

    exact, plain, ours = leaves(torch.float64), leaves(dtype), leaves(dtype)
    truth = gradients(eager(*exact, t2d, objective), *exact[:2])
    baseline = gradients(eager(*plain, t2d, objective), *plain[:2])
    target = fused_lk.Target.from_hidden(ours[2], ours[3], vocab=fused_lk.DraftVocab(t2d), impl=impl)
    out = fused_lk.lk_loss(*ours[:2], target, objective=objective, impl=impl, plan=plan)
    got = gradients(out.loss, *ours[:2])
    for name, want, theirs, mine in zip(("loss", "dH", "dW"), truth, baseline, got, strict=True):
        rounding = torch.finfo(mine.dtype).eps * want.abs().max()
        error, allowed = (mine.double() - want).abs().max(), (theirs.double() - want).abs().max()
        assert error <= 1.5 * allowed + rounding, f"{name}: {error:.3g}, eager {allowed:.3g}"


@pytest.mark.parametrize("truncated", [False, True], ids=["shared", "truncated"])
@pytest.mark.parametrize("cache", [False, True], ids=["streamed", "cached"])
def test_exact_logits_on_both_sides(cache, truncated):
    """Near alpha = 1 the gradient is a difference of nearly equal numbers: bf16 logits on either side spoil it."""
    generator = torch.Generator().manual_seed(4)
    states = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    weight = (torch.randn(TARGET_VOCAB, HIDDEN, generator=generator) * 4 / HIDDEN**0.5).bfloat16()
    hidden = (states.float() + 0.01 * torch.randn(TOKENS, HIDDEN, generator=generator)).bfloat16()
    ids = torch.arange(TARGET_VOCAB - 7 * truncated)
    t2d = torch.zeros(TARGET_VOCAB, dtype=torch.bool).index_fill(0, ids, True)
    head = fused_lk.TargetHead(weight, fused_lk.DraftVocab(t2d) if truncated else None)
    draft_weight = weight[ids]
    leaf = hidden.double().requires_grad_()
    log_p = fused_lk.reference.target_log_probs(states.double() @ weight.double().T, ids)
    log_alpha, _ = fused_lk.reference.divergences(leaf @ draft_weight.double().T, log_p)
    (want,) = torch.autograd.grad(log_alpha.mean(), leaf)

    def error(draft_dtype, target_dtype, impl):
        target = fused_lk.Target.from_hidden(states, head, cache=cache, logits_dtype=target_dtype, impl=impl)
        assert target.dtype == (torch.bfloat16 if target_dtype == "compute" else torch.float32)
        ours = hidden.clone().requires_grad_()
        d = fused_lk.lk_divergences(ours, draft_weight, target, logits_dtype=draft_dtype, impl=impl)
        (got,) = torch.autograd.grad(d.log_acceptance.mean(), ours)
        return float((got.double() - want).norm() / want.norm())

    for impl in ("torch", "triton"):
        exact = error(torch.float32, torch.float32, impl)
        assert exact < 0.02, "more than the bf16 gradient tile costs"
        for draft_dtype, target_dtype in (("compute", torch.float32), (torch.float32, "compute")):
            assert error(draft_dtype, target_dtype, impl) > 2 * exact
