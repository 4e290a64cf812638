"""`torch.autocast` around the losses: the dtypes of `F.linear`, gradients in the parameters' own, and loss scaling."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations

import fused_lk
from fused_lk import reference

TOKENS, H, H_TARGET, V_DRAFT, V_TARGET = 48, 16, 24, 150, 200
HALVES = [torch.bfloat16, torch.float16]
OBJECTIVES = ["alpha", "lambda"]  # gradient in the forward, and in the backward


class Head(torch.nn.Module):
    """A draft's `lm_head` in float32, with the loss that a trainer would run under autocast."""

    def __init__(self, objective="alpha", seed=0, **options):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(V_DRAFT, H, generator=generator) / 4)
        self.bias = torch.nn.Parameter(torch.randn(V_DRAFT, generator=generator))
        self.loss = fused_lk.LKLoss(objective, **options)

    def forward(self, hidden, target):
        return self.loss(hidden, self.weight, target, bias=self.bias).loss


def make_batch(dtype=torch.float32, seed=1):
    """Draft hidden states, target hidden states, target head, and the draft vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, H, generator=generator).to(dtype).requires_grad_()
    states = torch.randn(TOKENS, H_TARGET, generator=generator)
    weight = torch.randn(V_TARGET, H_TARGET, generator=generator) / 4
    t2d = torch.zeros(V_TARGET, dtype=torch.bool)
    t2d[torch.randperm(V_TARGET, generator=generator)[:V_DRAFT]] = True
    return hidden, states, weight, fused_lk.DraftVocab(t2d)


def gradients(loss, hidden, head):
    return torch.autograd.grad(loss, (hidden, head.weight, head.bias))


def eager(head, hidden, states, weight, vocab):
    """The loss from full logits, each made by `F.linear`."""
    log_p = reference.target_log_probs(F.linear(states, weight), vocab.t2d)
    logits = F.linear(hidden, head.weight, head.bias)
    return reference.lk_loss(logits, log_p, objective=head.loss.options["objective"]).loss


def exact(head, hidden, states, weight, vocab, dtype):
    """Loss and gradients in float64, of the operands as autocast rounds them."""
    leaves = [x.detach().to(dtype).double().requires_grad_() for x in (hidden, head.weight, head.bias)]
    log_p = reference.target_log_probs(F.linear(states.to(dtype).double(), weight.to(dtype).double()), vocab.t2d)
    logits = F.linear(*leaves)
    loss = reference.lk_loss(logits, log_p, objective=head.loss.options["objective"]).loss
    return loss, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_as_linear(objective, dtype, hidden_dtype):
    """Logits of the autocast dtype on both sides; errors are those of the eager loss under the same autocast."""
    head = Head(objective)
    hidden, states, weight, vocab = make_batch(hidden_dtype)
    with torch.autocast("cpu", dtype):
        target = fused_lk.Target.from_hidden(states, fused_lk.TargetHead(weight, vocab))
        loss = head(hidden, target)
        peer = eager(head, hidden, states, weight, vocab)
    assert target.dtype == dtype
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, peer, rtol=2e-6, atol=0)
    _, exact_gradients = exact(head, hidden, states, weight, vocab, dtype)
    ours, theirs = gradients(loss, hidden, head), gradients(peer, hidden, head)
    assert [x.dtype for x in ours] == [hidden_dtype, torch.float32, torch.float32]
    for got, want, right in zip(ours, theirs, exact_gradients, strict=True):
        allowed = (want - right).norm() / right.norm()
        assert (got - right).norm() / right.norm() <= 1.05 * allowed
        assert allowed < 0.05  # a wide budget would prove nothing


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("call", ["loss", "divergences", "loss_from_logits"])
def test_every_implementation(call, impl):
    """The oracle too computes in float32 what autocast would round: its logits are of rounded operands, unrounded."""
    hidden, states, weight, vocab = make_batch()
    head = Head()
    rounded = [x.detach().bfloat16() for x in (hidden, head.weight, head.bias, states, weight)]

    def run(hidden, head_weight, bias, states, weight):
        target = fused_lk.Target.from_hidden(states, weight, vocab=vocab)
        if call == "loss_from_logits":
            return fused_lk.lk_loss_from_logits(hidden[:, :1] * head_weight[:, 0], target, impl=impl).loss
        if call == "loss":
            return fused_lk.lk_loss(hidden, head_weight, target, bias=bias, impl=impl).loss
        return fused_lk.lk_divergences(hidden, head_weight, target, bias=bias, impl=impl).kl

    with torch.autocast("cpu", torch.bfloat16):
        values = run(*(rounded if call == "loss_from_logits" else (hidden, head.weight, head.bias, states, weight)))
    assert values.dtype == torch.float32
    assert torch.equal(values, run(*rounded))


def test_disabled_region():
    """Inside, everything is float32 as if there were no autocast; float64 is never touched."""
    hidden, states, weight, vocab = make_batch()
    head = Head("lambda")

    def run():
        return head(hidden, fused_lk.Target.from_hidden(states, weight, vocab=vocab))

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            inside = run()
        assert torch.equal(inside, expected)
        assert not torch.equal(run(), expected)
        double = [x.detach().double() for x in (hidden, head.weight, states, weight)]
        target = fused_lk.Target.from_hidden(*double[2:], vocab=vocab)
        loss = fused_lk.lk_loss(*double[:2], target, bias=head.bias.detach().double()).loss
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss.float(), expected)


@pytest.mark.parametrize("target_kind", ["hidden", "cached", "shared"])
def test_target_keeps_the_dtype_it_was_made_in(target_kind):
    """Outside of autocast float32, inside its dtype, wherever the loss then runs: as full logits would."""
    hidden, states, weight, vocab = make_batch()
    head = Head("lambda")

    def make(states, weight):
        if target_kind == "shared":
            return fused_lk.Target.from_hidden(states, weight[:V_DRAFT])
        return fused_lk.Target.from_hidden(states, weight, vocab=vocab, cache=target_kind == "cached")

    outside = make(states, weight)
    with torch.autocast("cpu", torch.bfloat16):
        inside = make(states, weight)
        head(hidden, outside)
        assert torch.equal(head(hidden, inside), head(hidden, make(states.bfloat16(), weight.bfloat16())))
        assert (outside.log_normalizer - make(states.double(), weight.double()).log_normalizer).abs().max() < 1e-5
    assert (outside.dtype, inside.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(head(hidden, inside), head(hidden, make(states.bfloat16(), weight.bfloat16())))
    assert torch.equal(inside.log_normalizer, make(states.bfloat16(), weight.bfloat16()).log_normalizer)
    assert torch.equal(inside.token_ids, make(states.bfloat16(), weight.bfloat16()).token_ids)


def test_target_operands_of_two_dtypes():
    """As `F.linear`: cast together under autocast, refused without."""
    _, states, weight, vocab = make_batch()
    target_head = fused_lk.TargetHead(weight, vocab, torch.randn(V_TARGET))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fused_lk.Target.from_hidden(states.bfloat16(), target_head)
        assert torch.equal(mixed.log_normalizer, fused_lk.Target.from_hidden(states, target_head).log_normalizer)
        with pytest.raises(TypeError, match="float64"):
            fused_lk.Target.from_hidden(states, weight.double(), vocab=vocab)
    with pytest.raises(TypeError, match="hidden of dtype float32"):
        fused_lk.Target.from_hidden(states.bfloat16(), target_head)
    assert target_head.weight.dtype == target_head.draft_bias.dtype == torch.float32


@pytest.mark.parametrize("shared", [False, True])
def test_target_head_is_cast_once(shared):
    _, states, weight, vocab = make_batch()
    target_head = fused_lk.TargetHead(weight, None if shared else vocab)
    made = []
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype), Allocations() as seen:
            target = fused_lk.Target.from_hidden(states, target_head)
            _ = target.log_normalizer
        made.append([shape for _, shape, _ in seen.storages if shape in ((V_TARGET, H_TARGET), (V_DRAFT, H_TARGET))])
    both = [(V_TARGET, H_TARGET)] if shared else [(V_TARGET, H_TARGET), (V_DRAFT, H_TARGET)]
    assert made == [both, [], both]


@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
@pytest.mark.parametrize("by", ["rows", "vocabulary"])
def test_backward_inside_the_region(plan, by):
    """Where a trainer calls `backward` does not change a float32 gradient."""
    generator = torch.Generator().manual_seed(0)
    size = 8 if by == "rows" else 2 * TOKENS
    hidden, weight = (torch.randn(n, H, generator=generator, requires_grad=True) for n in (TOKENS, size))
    target = fused_lk.Target.from_logits(torch.randn(TOKENS, size, generator=generator))
    pairs = fused_lk.Pairs(target_rows=torch.arange(TOKENS).flip(0))  # gathered and scattered, not in order

    def run(inside):
        loss = fused_lk.lk_loss(hidden, weight, target, objective="tv", pairs=pairs, plan=plan).loss
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return torch.autograd.grad(loss, (hidden, weight))

    assert all(map(torch.equal, run(False), run(True)))


def test_primitive_under_autocast():
    """What is made of the primitive inside the region stays float32."""
    hidden, states, weight, vocab = make_batch(torch.bfloat16)
    head = Head()
    with torch.autocast("cpu", torch.bfloat16):
        target = fused_lk.Target.from_hidden(states, weight, vocab=vocab)
        d = fused_lk.lk_divergences(hidden, head.weight, target, bias=head.bias)
        length = fused_lk.expected_acceptance_length(d.acceptance.view(4, -1)).mean()
        loss = d.kl.mean() - length
    assert {x.dtype for x in (d.log_acceptance, d.kl, d.acceptance, length, loss)} == {torch.float32}
    loss.backward()
    assert head.weight.grad.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
    assert head.weight.grad.any() and hidden.grad.any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_grad_scaler(objective):
    """fp16: the unscaled gradient does not depend on the scale, and a scale that overflows skips the step."""
    hidden, states, weight, vocab = make_batch()
    head = Head(objective)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    before = copy.deepcopy(head.state_dict())

    def step(init_scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = head(hidden, fused_lk.Target.from_hidden(states, weight, vocab=vocab))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradient = head.weight.grad.clone()
        scaler.step(optimizer)
        scaler.update()
        return gradient, scaler.get_scale()

    overflowed, scale = step(2.0**40)
    assert not overflowed.isfinite().all() and scale == 2.0**39
    assert torch.equal(head.weight, before["weight"]), "an overflowing step must be skipped"
    _, exact_gradients = exact(head, hidden, states, weight, vocab, torch.float16)
    for init_scale in (2.0**8, 2.0**12):  # at 1, entries fall below fp16's normal range
        head.load_state_dict(before)
        gradient, scale = step(init_scale)
        assert scale == init_scale
        assert not torch.equal(head.weight, before["weight"])
        error = (gradient - exact_gradients[1]).norm() / exact_gradients[1].norm()
        assert error < 2e-3
