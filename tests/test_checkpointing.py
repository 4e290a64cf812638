"""Autograd's other uses of the losses: checkpoints, accumulation, graphs walked twice, shared objects, stale data."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fused_lk

TOKENS, H, V_DRAFT, V_TARGET = 24, 6, 37, 53
OBJECTIVES = ["alpha", "lambda"]  # gradient in the forward, and in the backward


class Draft(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(H, H), torch.nn.Tanh(), torch.nn.Dropout(0.3)).double()
        self.head = torch.nn.Linear(H, V_DRAFT).double()

    def loss(self, x, target, **options):
        return fused_lk.lk_loss(self.body(x), self.head.weight, target, bias=self.head.bias, **options).loss

    def gradients(self):
        gradients = [p.grad for p in self.parameters()]
        self.zero_grad()
        return gradients


def make_batch(tokens=TOKENS, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    t2d = torch.zeros(V_TARGET, dtype=torch.bool)
    t2d[torch.randperm(V_TARGET, generator=generator)[:V_DRAFT]] = True
    head = fused_lk.TargetHead(randn(V_TARGET, H), fused_lk.DraftVocab(t2d))
    return randn(tokens, H).requires_grad_(), randn(tokens, H), head, torch.rand(tokens, generator=generator) > 0.3


def assert_same(got, expected):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("within", ["body", "body and loss"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_checkpoint(objective, within, use_reentrant):
    """Around the draft's body, or around body and loss together; with dropout, whose state is restored."""
    draft = Draft()
    x, states, head, mask = make_batch()
    target, pairs = fused_lk.Target.from_hidden(states, head), fused_lk.Pairs(mask)

    def loss(x):
        return draft.loss(x, target, pairs=pairs, objective=objective)

    def run(function):
        torch.manual_seed(3)
        value = function()
        value.backward()
        gradients = [x.grad, *draft.gradients()]
        x.grad = None
        return [value.detach(), *gradients]

    def with_checkpoint():
        if within == "body and loss":
            return checkpoint(loss, x, use_reentrant=use_reentrant)
        hidden = checkpoint(draft.body, x, use_reentrant=use_reentrant)
        options = {"bias": draft.head.bias, "pairs": pairs, "objective": objective}
        return fused_lk.lk_loss(hidden, draft.head.weight, target, **options).loss

    assert_same(run(with_checkpoint), run(lambda: loss(x)))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_of_the_primitive(use_reentrant):
    draft = Draft().eval()
    x, states, head, _ = make_batch()
    target = fused_lk.Target.from_hidden(states, head)

    def parts(x):
        d = fused_lk.lk_divergences(draft.body(x), draft.head.weight, target)
        return d.log_acceptance, d.kl, d.acceptance

    def run(values):
        sum((k + 1) * v.mean() for k, v in enumerate(values)).backward()
        return [x for x in draft.gradients() if x is not None]

    assert_same(run(checkpoint(parts, x, use_reentrant=use_reentrant)), run(parts(x)))


@pytest.mark.parametrize("objective", ["kl", "tv", "alpha", "lambda"])
def test_accumulation_equals_one_batch(objective):
    """Micro-batches of unequal masks, each divided by the count of the whole batch."""
    draft = Draft().eval()
    x, states, head, mask = make_batch()
    options = {"objective": objective, **({"kl_weight": 0.3} if objective == "lambda" else {})}
    whole = draft.loss(x, fused_lk.Target.from_hidden(states, head), mask=mask, **options)
    whole.backward()
    expected = draft.gradients()
    total = 0
    for rows in (slice(0, 5), slice(5, 20), slice(20, TOKENS)):
        target = fused_lk.Target.from_hidden(states[rows], head)
        loss = draft.loss(x[rows], target, mask=mask[rows], denominator=float(mask.sum()), **options)
        loss.backward()
        total = total + loss.detach()
    torch.testing.assert_close(total, whole.detach())
    assert_same(draft.gradients(), expected)


def test_accumulation_by_position():
    """One count per position, and lambda of the whole batch: the paper's loss in pieces."""
    draft = Draft().eval()
    x, states, head, mask = make_batch()
    positions = torch.arange(TOKENS) % 3

    def pairs(rows):
        return fused_lk.Pairs(mask[rows], positions=positions[rows], num_positions=3)

    target = fused_lk.Target.from_hidden(states, head)
    everything = pairs(slice(None))
    whole = fused_lk.lk_loss(draft.body(x), draft.head.weight, target, position_decay=0.8, pairs=everything)
    whole.loss.backward()
    expected = draft.gradients()
    for part in (slice(0, 11), slice(11, TOKENS)):
        fused_lk.lk_loss(
            draft.body(x[part]), draft.head.weight, fused_lk.Target.from_hidden(states[part], head),
            kl_weight=whole.kl_weight, denominator=whole.weight_sum, position_decay=0.8, pairs=pairs(part),
        ).loss.backward()  # fmt: skip
    assert_same([g for g in draft.gradients() if g is not None], [g for g in expected if g is not None])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_graph_walked_twice(objective):
    """The same gradients each time, and scaled with the upstream gradient; without retain_graph torch's own error."""
    draft = Draft().eval()
    x, states, head, _ = make_batch()
    loss = draft.loss(x, fused_lk.Target.from_hidden(states, head), objective=objective)
    parameters = list(draft.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters, retain_graph=True)
    tripled = torch.autograd.grad(loss, parameters, grad_outputs=torch.tensor(3.0, dtype=loss.dtype))
    assert all(map(torch.equal, first, second))
    assert_same(tripled, [3 * g for g in first])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_second_derivative(objective):
    """It does not exist: asking for it is an error, not a number."""
    x, states, head, _ = make_batch()
    draft = Draft().eval()
    loss = draft.loss(x, fused_lk.Target.from_hidden(states, head), objective=objective)
    (gradient,) = torch.autograd.grad(loss, draft.head.weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_shared_objects():
    """One target head, target and pair list serve several losses in one graph, of other drafts and dtypes too."""
    drafts = [Draft().eval() for _ in range(2)]
    torch.nn.init.ones_(drafts[1].body[0].weight)
    x, states, head, mask = make_batch()
    target, pairs = fused_lk.Target.from_hidden(states, head), fused_lk.Pairs(mask)

    def loss(draft, objective, target, pairs):
        return draft.loss(x, target, pairs=pairs, objective=objective)

    shared = [loss(d, o, target, pairs) for d in drafts for o in OBJECTIVES]
    # In between, layouts of other sizes are made of the same pairs.
    fused_lk.lk_loss([x.detach()[:12], x.detach()[12:]], drafts[0].head.weight, target, workspace_mb=0.01)
    fused_lk.lk_loss(x, drafts[0].head.weight, target, pairs=pairs, workspace_mb=0.01)
    sum(shared).backward()
    together = [d.gradients() for d in drafts]
    for draft, gradients in zip(drafts, together, strict=True):
        for objective in OBJECTIVES:
            of_its_own = fused_lk.Target.from_hidden(
                states.clone(), fused_lk.TargetHead(head.weight.clone(), head.vocab)
            )
            loss(draft, objective, of_its_own, fused_lk.Pairs(mask.clone())).backward()
        assert_same(gradients, draft.gradients())


STALE = {
    "hidden": lambda x, head, states, draft: x.mul_(2),
    "weight": lambda x, head, states, draft: draft.head.weight.mul_(2),
    "bias": lambda x, head, states, draft: draft.head.bias.mul_(2),
    "target states": lambda x, head, states, draft: states.mul_(2),
    "target head": lambda x, head, states, draft: head.draft_weight.mul_(2),
}


@pytest.mark.parametrize("what", STALE)
def test_change_in_place_before_the_backward(what):
    """What the backward computes with must be what the forward saw; the one-pass plan has its gradient already."""
    draft = Draft().eval()
    _, states, head, _ = make_batch()
    x = make_batch()[0].detach().requires_grad_()
    hidden = x * 1.0  # not a leaf, so that it can be written to
    target = fused_lk.Target.from_hidden(states, head)
    arguments = (hidden, draft.head.weight, target)
    recompute = fused_lk.lk_loss(*arguments, bias=draft.head.bias, objective="tv", plan="recompute").loss
    one_pass = fused_lk.lk_loss(*arguments, bias=draft.head.bias, objective="tv", plan="one_pass").loss
    wanted = (x, draft.head.weight, draft.head.bias)
    expected = torch.autograd.grad(recompute, wanted, retain_graph=True)
    with torch.no_grad():
        STALE[what](hidden, head, states, draft)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(recompute, wanted)
    assert_same(torch.autograd.grad(one_pass, wanted), expected)


def test_nothing_of_the_callers_is_written():
    draft = Draft().eval()
    x, states, head, mask = make_batch()
    given = [x, states, head.weight, head.draft_weight, mask, draft.head.weight, draft.head.bias]
    versions, copies = [t._version for t in given], [t.detach().clone() for t in given]
    for objective in OBJECTIVES:
        draft.loss(x, fused_lk.Target.from_hidden(states, head), mask=mask, objective=objective).backward()
    assert [t._version for t in given] == versions
    assert all(map(torch.equal, [t.detach() for t in given], copies))
