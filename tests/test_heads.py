"""Heads as models have them: logit scale and softcap, on either side, against the oracle."""

from __future__ import annotations

import hard_rows
import pytest
import torch
import torch.nn.functional as F
from fused_lk.kernels import launch
from problems import make_vocab
from torch import Tensor

import fused_lk
from fused_lk import Target, TargetHead, gemm, reference
from fused_lk.rows import plain
from fused_lk.rows.interface import TERMS, LogitRows, Transform
from fused_lk.walk.plan import empty_statistics

NEG_INF = float("-inf")
IMPLS = ["torch", "triton"]
OPS = {"torch": plain, "triton": launch}
EPS = torch.finfo(torch.float32).eps
# name: (draft, target). The cap of 2 bends logits of normal rows strongly.
HEADS = {
    "scaled": ({"logit_scale": 0.0625}, {"logit_scale": 1 / 6.0}),
    "capped": ({"softcap": 2.0}, {"softcap": 2.5}),
    "draft capped": ({"softcap": 30.0, "logit_scale": 4.0}, {}),
    "target capped": ({}, {"softcap": 3.0, "logit_scale": 2.0}),
}
WALKS = {
    "one pass": {"plan": "one_pass", "kl_weight": 0.4},
    "by rows": {"plan": "recompute", "workspace_mb": 0.002},
    "by vocabulary": {"plan": "recompute", "objective": "alpha"},
}


class Case:
    """A draft and a target from hidden states, with a bias on either side; float64."""

    def __init__(self, tokens: int = 5, size: int = 23, target_size: int = 31, width: int = 4) -> None:
        generator = torch.Generator().manual_seed(0)
        randn = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
        self.vocab = make_vocab(target_size, size, generator)
        self.hidden, self.weight, self.bias = randn(tokens, width), randn(size, width), randn(size)
        self.states, self.head, self.head_bias = randn(tokens, width), randn(target_size, width), randn(target_size)

    def leaves(self) -> list[Tensor]:
        return [x.clone().requires_grad_() for x in (self.hidden, self.weight, self.bias)]

    def target(self, shared: bool = False, cache: bool = False, temperature: float = 1.0, impl="auto", **head):
        if shared:
            weight, bias = self.head[: len(self.weight)], self.head_bias[: len(self.weight)]
            return Target.from_hidden(self.states, TargetHead(weight, None, bias, **head), temperature=temperature)
        made = TargetHead(self.head, self.vocab, self.head_bias, **head)
        return Target.from_hidden(self.states, made, cache=cache, temperature=temperature, impl=impl)

    def log_p(self, shared: bool = False, temperature: float = 1.0, **head: float) -> Tensor:
        logits = reference.head_logits(F.linear(self.states, self.head, self.head_bias), **head)
        if shared:
            return reference.target_log_probs(logits[:, : len(self.weight)], None, temperature)
        return reference.target_log_probs(logits, self.vocab.t2d, temperature)


def of_models(z, logit_scale=1.0, softcap=None):
    """As transformers writes it: Cohere's scale, and Gemma's cap."""
    logits = z * logit_scale
    if softcap is not None:
        logits = logits / softcap
        logits = torch.tanh(logits)
        logits = logits * softcap
    return logits


@pytest.mark.parametrize("head", [{}, {"logit_scale": 0.25}, {"softcap": 3.0}, {"logit_scale": 0.5, "softcap": 30.0}])
def test_the_oracle(head):
    z = torch.linspace(-50, 50, 41, dtype=torch.float64)
    torch.testing.assert_close(reference.head_logits(z, **head), of_models(z, **head), rtol=1e-15, atol=0)
    assert reference.head_logits(torch.tensor([NEG_INF]), **head).item() == NEG_INF


@pytest.mark.parametrize("kind", ["truncated", "cached", "shared"])
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_losses_and_gradients(impl, head, walk, kind):
    case, (of_draft, of_target) = Case(), HEADS[head]
    leaves, oracle = case.leaves(), case.leaves()
    how = {"shared": kind == "shared", "temperature": 1.3, **of_target}
    target = case.target(cache=kind == "cached", impl="auto" if impl == "reference" else impl, **how)
    out = fused_lk.lk_loss(
        *leaves[:2], target, bias=leaves[2], impl=impl, draft_temperature=0.7, **of_draft, **WALKS[walk]
    )
    options = {name: x for name, x in WALKS[walk].items() if name in ("objective", "kl_weight")}
    z = reference.head_logits(F.linear(*oracle), **of_draft)
    expected = reference.lk_loss(z, case.log_p(**how), draft_temperature=0.7, **options)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected.loss, oracle), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
    if kind != "shared":
        full = reference.head_logits(F.linear(case.states, case.head, case.head_bias), **of_target) / 1.3
        torch.testing.assert_close(target.log_normalizer, full.logsumexp(-1))
        assert torch.equal(target.token_ids, full.argmax(-1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("head", ["capped", "draft capped"])
def test_gradcheck(impl, head):
    case, (of_draft, of_target) = Case(3, 5, 7, 2), HEADS[head]
    target = case.target(**of_target)

    def primitive(h, w, b):
        d = fused_lk.lk_divergences(h, w, target, bias=b, draft_temperature=0.9, impl=impl, **of_draft)
        return d.log_acceptance, d.kl

    assert torch.autograd.gradcheck(primitive, case.leaves(), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_digits_of_the_cap(dtype, impl):
    """tanh and 1 - tanh^2 relative to their size, from 1e-30 to where tanh is 1."""
    inner = 1 / 30.0
    size = torch.logspace(-30, 3.3, 800 if impl == "torch" else 60, dtype=torch.float64).to(dtype)
    z = torch.cat([size, -size, torch.tensor([0.0, 18.75, 18.7499, float("inf")], dtype=dtype)])
    n = len(z)
    # The maximum of a row of one column is its tanh.
    stats = empty_statistics(n, TERMS, dtype, z.device, False)
    capped = Transform(1.0, inner)
    OPS[impl].stats(
        LogitRows(z.unsqueeze(1), torch.zeros(n, 1, dtype=dtype), None, None, capped, Transform()), TERMS, stats
    )
    exact = torch.tanh(z.double() * inner)
    eps = torch.finfo(dtype).eps
    assert ((stats.draft_top.double() - exact).abs() <= 4 * eps * exact.abs() + torch.finfo(dtype).tiny).all()

    # The gradient of KL in a column where p is 0: d * scale * inner * q * (1 - tanh^2).
    rows = LogitRows(
        torch.stack([z, torch.zeros_like(z)], 1), torch.tensor([[NEG_INF, 0.0]], dtype=dtype).repeat(n, 1), None, None,
        capped, Transform(),
    )  # fmt: skip
    OPS[impl].stats(rows, ("kl",), small := empty_statistics(n, ("kl",), dtype, z.device, False))
    gradient = torch.zeros(n, 2, dtype=dtype)
    OPS[impl].gradient(rows, ("kl",), small, torch.full((1, n), 30.0, dtype=dtype), gradient)
    x = z.double() * inner
    q = torch.sigmoid(torch.tanh(x))
    want = q * 1 / torch.cosh(x).square()
    want[-1] = 0.0
    assert ((gradient[:, 0].double() - want).abs() <= (16 + 4 * x.abs().clamp(max=100)) * eps * want + 1e-37).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_token_that_cannot_be_drawn_stays_so(impl):
    z, t = torch.randn(2, 3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[0, 3], t[1, 4], t[2] = NEG_INF, NEG_INF, NEG_INF
    leaf = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
    hidden = torch.cat([leaf, torch.eye(3, dtype=torch.float64)], 1)
    weight = torch.cat([torch.ones(9, 1, dtype=torch.float64), z.masked_fill(z == NEG_INF, 0.0).t()], 1)
    bias = torch.zeros(9, dtype=torch.float64)
    bias[3] = NEG_INF
    z[:, 3] = NEG_INF
    states = torch.eye(3, dtype=torch.float64)
    head_bias = torch.zeros(9, dtype=torch.float64)
    head_bias[5] = NEG_INF
    target = Target.from_hidden(states, t.clamp(min=-40).t().contiguous(), bias=head_bias, softcap=2.0)
    d = fused_lk.lk_divergences(hidden, weight, target, bias=bias, softcap=1.5, impl=impl)
    logits = reference.head_logits(t.clamp(min=-40) + head_bias, softcap=2.0)
    want = reference.divergences(reference.head_logits(z, softcap=1.5), reference.target_log_probs(logits))
    torch.testing.assert_close(d.log_acceptance.detach(), want[0])
    torch.testing.assert_close(d.kl.detach(), want[1])
    # Rows that are kept for shape have no answer, and no gradient, with a cap neither.
    pairs = fused_lk.Pairs(torch.tensor([True, False, True]), skip_masked=False)
    h = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    options = {"pairs": pairs, "softcap": 1.5, "impl": impl, "objective": "tv"}
    out = fused_lk.lk_loss(h, torch.randn(9, 4, dtype=torch.float64), target, **options)
    (gradient,) = torch.autograd.grad(out.loss, h)
    assert not gradient[1].any()
    assert gradient[0].any()


def through_a_head(z, t, objective, impl, walk, of_draft, of_target):
    """Loss, and gradient with respect to the product z, of a call whose heads are the identity."""
    size = z.shape[1]
    hidden, head = z.masked_fill(z == NEG_INF, -3e4).requires_grad_(), torch.eye(size, requires_grad=True)
    bias = torch.zeros(size)
    states = t.masked_fill(t == NEG_INF, -3e4)
    target = Target.from_hidden(states, torch.eye(size), impl=impl, **of_target)
    kl_weight = 0.5 if objective == "lambda" else None
    out = fused_lk.lk_loss(
        hidden, head, target, bias=bias, objective=objective, kl_weight=kl_weight, impl=impl, **of_draft, **walk
    )
    return out.loss.detach(), torch.autograd.grad(out.loss, hidden)[0]


@pytest.mark.parametrize(("impl", "walk"), [("torch", "one pass"), ("torch", "small"), ("triton", "small")])
@pytest.mark.parametrize("member", hard_rows.FAMILY)
def test_hard_rows_under_a_cap(member, impl, walk, monkeypatch):
    """Errors against float64, beyond what ties leave open, within 1.5 times those of the eager loss in float32, and a
    few roundings. The rounding of a capped logit is that of the cap, and not of its distance to the top."""
    monkeypatch.setattr(launch, "INTERPRETER_BLOCK_V", 256) if launch.INTERPRETED else None
    size, cap = 101, 30.0
    z, t = hard_rows.make(member, 12 if impl == "torch" else 5, size)
    z, t = (x.masked_fill(x == NEG_INF, -3e4) for x in (z, t))
    walk = {"plan": "one_pass"} if walk == "one pass" else {"plan": "recompute", "workspace_mb": 0.004}
    of_draft, of_target = {"softcap": cap, "logit_scale": 0.75}, {"softcap": cap}
    noise = 4 * EPS * cap

    def eager(dtype, objective):
        leaf = z.to(dtype).requires_grad_()
        log_q = F.log_softmax(of_models(leaf, **of_draft), 1)
        log_p = F.log_softmax(of_models(t.to(dtype), **of_target), 1)
        alpha = torch.minimum(log_p.exp(), log_q.exp()).sum(1)
        kl = (log_p.exp() * (log_p - log_q)).sum(1)
        loss = {"tv": 1 - alpha, "lambda": 0.5 * kl + 0.5 * (1 - alpha)}[objective].mean()
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    for objective in ("tv", "lambda"):
        logits = of_models(z, **of_draft)
        truth = hard_rows.Truth(logits, of_models(t, **of_target).log_softmax(1), objective, noise=noise)
        slope = 0.75 * (1 / torch.cosh(0.75 * z / cap)).square()
        truth.gradient, truth.slack = truth.gradient * slope, truth.slack * slope
        theirs = eager(torch.float32, objective)
        loss, gradient = through_a_head(z.float(), t.float(), objective, impl, walk, of_draft, of_target)
        allowed = 1.5 * truth.error(theirs[1]).amax(1) + (16 * EPS + noise) * truth.factor
        assert (truth.error(gradient).amax(1) <= allowed).all(), objective
        budget = 1.5 * (theirs[0] - truth.loss).abs() + (8 * EPS + noise) * (1 + truth.loss.abs())
        assert (loss - truth.loss).abs() <= budget, objective


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("member", ["sure_of_the_same", "sure_alike", "sure_of_different_ones"])
def test_sure_rows_keep_their_digits_under_a_cap(member, impl):
    """Gradients relative to what draft and target leave to all other tokens, not to 1."""
    size, cap = 101, 40.0
    z, t = hard_rows.make(member, 12 if impl == "torch" else 5, size)
    noise = 4 * EPS * cap
    for objective in ("tv", "lambda"):
        q, p = of_models(z, softcap=cap), of_models(t, softcap=cap)
        truth = hard_rows.Truth(q, p.log_softmax(1), objective, noise=noise)
        slope = (1 / torch.cosh(z / cap)).square()
        truth.gradient, truth.slack = truth.gradient * slope, truth.slack * slope
        walk = {"plan": "recompute"}
        _, gradient = through_a_head(z.float(), t.float(), objective, impl, walk, {"softcap": cap}, {"softcap": cap})
        top = z.argmax(1, keepdim=True)
        others = torch.maximum(*(x.softmax(1).scatter(1, top, 0.0).sum(1) for x in (q, p)))
        assert (truth.error(gradient).amax(1) <= (4 * noise * others + 1e-15) * truth.factor).all(), objective


def test_half_precision_and_options():
    """bfloat16 products are capped in float32; a module and a bare weight have the same options."""
    case = Case()
    hidden, weight, states, head = (x.bfloat16() for x in (case.hidden, case.weight, case.states, case.head))
    of_draft, of_target = {"softcap": 2.0, "logit_scale": 0.5}, {"softcap": 3.0, "logit_scale": 2.0}
    made = TargetHead(head, case.vocab, **of_target)
    bare = Target.from_hidden(states, head, vocab=case.vocab, **of_target)
    target = Target.from_hidden(states, made)
    loss = fused_lk.LKLoss("tv", **of_draft)(hidden, weight, target).loss
    z, t = (torch.empty(len(x), len(w), dtype=x.dtype) for x, w in ((hidden, weight), (states, head)))
    gemm.linear_into(z, hidden, weight, None)
    gemm.linear_into(t, states, head, None)
    z, t = reference.head_logits(z, **of_draft), reference.head_logits(t, **of_target)
    expected = reference.lk_loss(z, reference.target_log_probs(t, case.vocab.t2d), objective="tv").loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused_lk.lk_loss(hidden, weight, bare, objective="tv", **of_draft).loss, loss)
    with torch.autocast("cpu", torch.bfloat16):
        target = Target.from_hidden(states, TargetHead(case.head.float(), case.vocab, **of_target))
        wide = fused_lk.lk_loss(case.hidden.float(), case.weight.float(), target, objective="tv", **of_draft).loss
    torch.testing.assert_close(wide, loss, rtol=0, atol=2e-2)


def test_under_compile():
    case = Case()
    head = TargetHead(case.head, case.vocab, softcap=3.0, logit_scale=0.5)

    def loss(h, w, plan):
        target = Target.from_hidden(case.states, head, temperature=0.9)
        options = {"plan": plan, "softcap": 2.0, "logit_scale": 0.75, "draft_temperature": 0.8}
        return fused_lk.lk_loss(h, w, target, objective="alpha", **options).loss

    for plan in ("one_pass", "recompute"):
        results = []
        for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            leaves = case.leaves()[:2]
            value = call(*leaves, plan)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_padded_rows_are_sliced_off():
    """A view of the head without its padding: the normaliser does not see it, and its gradient is 0."""
    case = Case()
    padded = torch.cat([case.head, torch.full((3, 4), 9.0, dtype=torch.float64)])
    target = Target.from_hidden(case.states, TargetHead(padded[:31], case.vocab))
    same = Target.from_hidden(case.states, TargetHead(case.head, case.vocab))
    torch.testing.assert_close(target.log_normalizer, same.log_normalizer)
    weight = torch.cat([case.weight, torch.ones(2, 4, dtype=torch.float64)]).requires_grad_()
    with pytest.raises(ValueError, match=r"weight\[:vocab_size\]"):
        fused_lk.lk_loss(case.hidden, weight, target)
    with pytest.raises(ValueError, match=r"weight\[:vocab_size\]"):
        TargetHead(padded, case.vocab)
    out = fused_lk.lk_loss(case.hidden, weight[:23], target)
    (gradient,) = torch.autograd.grad(out.loss, weight)
    assert not gradient[23:].any()
    torch.testing.assert_close(out.loss, fused_lk.lk_loss(case.hidden, case.weight, target).loss)


BAD = [
    ({"softcap": 0.0}, ValueError, "softcap to be a finite number > 0"),
    ({"softcap": float("inf")}, ValueError, "softcap"),
    ({"softcap": "30"}, TypeError, "softcap"),
    ({"logit_scale": -1.0}, ValueError, "logit_scale to be a finite number > 0"),
    ({"logit_scale": float("nan")}, ValueError, "logit_scale"),
    ({"logit_scale": torch.ones(1)}, TypeError, "logit_scale"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_options_that_are_refused(options, error, message):
    case = Case()
    target = case.target()
    for call in (
        lambda: fused_lk.lk_loss(case.hidden, case.weight, target, **options),
        lambda: fused_lk.lk_divergences(case.hidden, case.weight, target, **options),
        lambda: fused_lk.LKLoss(**options),
        lambda: TargetHead(case.head, case.vocab, **options),
        lambda: Target.from_hidden(case.states, case.head, vocab=case.vocab, **options),
    ):
        with pytest.raises(error, match=message):
            call()


def test_options_beside_a_head():
    case = Case()
    for options in ({"softcap": 30.0}, {"logit_scale": 2.0}, {"vocab": case.vocab}, {"bias": case.head_bias}):
        with pytest.raises(ValueError, match="inside the TargetHead"):
            Target.from_hidden(case.states, TargetHead(case.head, case.vocab), **options)
