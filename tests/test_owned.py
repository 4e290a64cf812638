"""What a backward reads it owns, or counts the changes of; what a caller looks at changes nothing."""

from __future__ import annotations

import pytest
import torch

import fused_lk

IMPLS = ["torch", "triton"]
N, H, V = 6, 8, 40


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in ((N, H), (V, H), (N, H), (V, H))]


def recomputed(hidden, weight, target, impl="torch", **options):
    return fused_lk.lk_loss(hidden, weight, target, objective="lambda", impl=impl, plan="recompute", **options).loss


@pytest.mark.parametrize("impl", IMPLS)
def test_a_normalizer_changed_between_forward_and_backward(impl):
    hidden, weight, states, head = tensors()
    hidden.requires_grad_()
    gradients = []
    for change in (0.0, 1.0):
        given = (states @ head.T).logsumexp(1) + 0.3
        loss = recomputed(hidden, weight, fused_lk.Target.from_hidden(states, head, log_normalizer=given), impl)
        given.add_(change)
        gradients.extend(torch.autograd.grad(loss, hidden))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("which", ["draft hidden", "draft head", "target hidden", "target head"])
@pytest.mark.parametrize("objective", ["alpha", "lambda"])
def test_a_tensor_changed_between_forward_and_backward(which, objective):
    hidden, weight, states, head = tensors()
    leaf = hidden.requires_grad_()
    target = fused_lk.Target.from_hidden(states, head)
    loss = fused_lk.lk_loss(leaf, weight, target, objective=objective, plan="recompute").loss
    changed = {"draft hidden": leaf, "draft head": weight, "target hidden": states, "target head": head}[which]
    with torch.no_grad():
        changed.mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def inference_target(kind, states, head, vocab):
    logits = states @ head.T
    if kind == "topk":
        top = logits.log_softmax(-1).topk(7)
        return fused_lk.Target.from_topk(top.indices, top.values, V), top.values
    if kind == "hidden":
        states = states.clone()
        return fused_lk.Target.from_hidden(states, fused_lk.TargetHead(head, vocab)), states
    given = logits.softmax(-1) if kind == "probs" else logits
    return {"logits": fused_lk.Target.from_logits, "probs": fused_lk.Target.from_probs}[kind](given), given


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["hidden", "logits", "probs", "topk"])
def test_tensors_of_inference_mode_are_owned(kind, impl):
    """They keep no count of changes; inference mode is also where they can be changed."""
    hidden, weight, states, head = tensors()
    t2d = torch.rand(V + 9, generator=torch.Generator().manual_seed(1)).argsort() < V
    larger = torch.randn(V + 9, H, generator=torch.Generator().manual_seed(2))
    vocab = fused_lk.DraftVocab(t2d) if kind == "hidden" else None
    head = larger if kind == "hidden" else head
    hidden.requires_grad_()
    gradients = []
    for change in (False, True):
        with torch.inference_mode():
            target, activation = inference_target(kind, states, head, vocab)
        loss = recomputed(hidden, weight, target, impl)
        if change:
            with torch.inference_mode():
                activation.mul_(0.5)
        gradients.extend(torch.autograd.grad(loss, hidden))
    assert torch.equal(*gradients)


def test_a_frozen_draft_head_of_inference_mode():
    hidden, weight, states, head = tensors()
    hidden.requires_grad_()
    target = fused_lk.Target.from_hidden(states, head)
    (expected,) = torch.autograd.grad(recomputed(hidden, weight, target), hidden)
    with torch.inference_mode():
        frozen = weight.clone()
    loss = recomputed(hidden, frozen, target)
    with torch.inference_mode():
        frozen.zero_()
    (got,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("plan", ["auto", "recompute"])
@pytest.mark.parametrize("objective", ["alpha", "lambda"])
def test_a_target_of_inference_mode_in_a_graph(objective, plan):
    hidden, weight, states, head = tensors()
    hidden.requires_grad_()
    weight.requires_grad_()

    def step(hidden, weight, target):
        return fused_lk.lk_loss(hidden, weight, target, objective=objective, plan=plan).loss

    expected = torch.autograd.grad(step(hidden, weight, fused_lk.Target.from_hidden(states, head)), (hidden, weight))
    with torch.inference_mode():
        target = fused_lk.Target.from_hidden(states.clone(), head)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(hidden, weight, target), (hidden, weight))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["hidden", "logits", "probs"])
@pytest.mark.parametrize("attribute", ["token_ids", "in_draft_vocab", "log_normalizer"])
def test_reading_an_attribute_changes_nothing(attribute, kind, impl):
    hidden, weight, states, head = tensors(3)
    results = []
    for read in (False, True):
        given = states @ head.T if kind == "logits" else (states @ head.T).softmax(-1)
        target = {
            "hidden": lambda: fused_lk.Target.from_hidden(states, head, impl=impl),
            "logits": lambda given=given: fused_lk.Target.from_logits(given, impl=impl),
            "probs": lambda given=given: fused_lk.Target.from_probs(given),
        }[kind]()
        if read:
            getattr(target, attribute)
        leaf = hidden.clone().requires_grad_()
        out = fused_lk.lk_loss(leaf, weight, target, impl=impl)
        results.append((out.loss, out.accuracy_sum, *torch.autograd.grad(out.loss, leaf)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shared", [True, False])
def test_the_targets_own_mask_is_held_against_the_pairs(shared):
    hidden, weight, states, head = tensors()
    mask = torch.tensor([True, True, False, True, False, True])
    vocab = None if shared else fused_lk.DraftVocab(torch.ones(V, dtype=torch.bool))
    target = fused_lk.Target.from_hidden(states, fused_lk.TargetHead(head, vocab), mask)
    with pytest.raises(ValueError, match="inside the target's own mask"):
        fused_lk.lk_loss(hidden, weight, target)
    for skip_masked in (True, False):
        out = fused_lk.lk_loss(hidden, weight, target, pairs=fused_lk.Pairs(mask, skip_masked=skip_masked))
        assert out.loss.isfinite()


def test_what_a_head_sliced_is_not_copied():
    """Hidden states of inference mode, a head that was made outside of it: the usual way. One copy, for all calls."""
    hidden, weight, states, head = tensors()
    target_head = fused_lk.TargetHead(head)
    with torch.inference_mode():
        target = fused_lk.Target.from_hidden(states.clone(), target_head)
    owned = target.owned()
    assert owned.tiles.weight is target.tiles.weight
    assert not owned.tiles.hidden.is_inference()
    recomputed(hidden.requires_grad_(), weight, target)
    assert target.owned() is owned


def test_a_lambda_of_inference_mode():
    hidden, weight, states, head = tensors()
    hidden.requires_grad_()
    target = fused_lk.Target.from_hidden(states, head)
    with torch.inference_mode():
        given = (torch.full((1,), 0.5), torch.full((N,), 0.5))
    for kl_weight in given:
        recomputed(hidden, weight, target, kl_weight=kl_weight).backward()


def test_rows_outside_the_targets_mask_have_no_argmax():
    _, _, states, head = tensors()
    mask = torch.tensor([True, True, False, True, False, True])
    vocab = fused_lk.DraftVocab(torch.ones(V, dtype=torch.bool))
    target = fused_lk.Target.from_hidden(states, fused_lk.TargetHead(head, vocab), mask)
    assert (target.token_ids[~mask] == -1).all()
    assert not target.in_draft_vocab[~mask].any()
