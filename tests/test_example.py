"""The worked example trains, scores what it says it scores, and makes no logits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations

import fused_lk
from fused_lk.rows import plain


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parent.parent / "examples" / "transformers_trainer.py"
    spec = importlib.util.spec_from_file_location("transformers_trainer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parts(example):
    """A draft, a target, the target's head and a batch."""
    target = example.make_target()
    t2d = torch.zeros(example.TARGET_CONFIG.vocab_size, dtype=torch.bool)
    t2d[torch.randperm(len(t2d), generator=torch.Generator().manual_seed(0))[: example.DRAFT_VOCAB_SIZE]] = True
    draft = example.Draft(target, t2d)
    head = fused_lk.TargetHead(target.lm_head.weight, fused_lk.DraftVocab(draft.t2d, draft.d2t))
    return draft, target, head, example.make_batch(torch.Generator().manual_seed(1))


def eager_loss(example, draft, target, batch, position_decay):
    """LK-lambda of each step from full logits: the prediction of token t + 2 + k, position by position."""
    tokens, loss_mask = batch["input_ids"], batch["loss_mask"]
    with torch.no_grad():
        body = target(tokens, output_hidden_states=True)
    p = body.logits.softmax(-1)[..., draft.t2d]
    pt = body.logits[..., draft.t2d].log_softmax(-1)
    features = torch.cat([body.hidden_states[layer] for layer in example.AUX_LAYERS], -1)
    total = 0
    for k, hidden in enumerate(draft(features, tokens, example.TTT_STEPS)):
        log_q = F.linear(hidden, draft.lm_head.weight).log_softmax(-1)
        alphas, kls = [], []
        for b in range(tokens.shape[0]):
            for t in range(tokens.shape[1] - 2 - k):
                if loss_mask[b, t + 2 + k]:
                    alphas.append(torch.minimum(p[b, t + 1 + k], log_q[b, t].exp()).sum())
                    kls.append((pt[b, t + 1 + k].exp() * (pt[b, t + 1 + k] - log_q[b, t])).sum())
        alpha, kl = torch.stack(alphas).mean(), torch.stack(kls).mean()
        lam = torch.exp(-3 * alpha.detach())
        total = total + position_decay**k * (lam * kl + (1 - lam) * (1 - alpha))
    return total


def test_it_is_the_eager_loss(example, parts):
    draft, target, head, batch = parts

    def gradients(loss):
        trainable = [p for p in draft.parameters() if p.requires_grad]
        return [loss.detach(), *torch.autograd.grad(loss, trainable)]

    ours = gradients(example.loss_of(draft, target, head, batch, position_decay=0.8).loss)
    for got, want in zip(ours, gradients(eager_loss(example, draft, target, batch, 0.8)), strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_it_makes_no_logits(example, parts, monkeypatch):
    draft, target, head, batch = parts
    monkeypatch.setattr(plain, "BLOCK_ELEMENTS", 1024)
    limit = example.BATCH * example.LENGTH * example.DRAFT_VOCAB_SIZE
    with Allocations() as seen:
        example.loss_of(draft, target, head, batch, workspace_mb=0.1, impl="torch").loss.backward()
    assert not seen.at_least(limit)
    assert seen.of_width(example.DRAFT_VOCAB_SIZE)
    with Allocations() as seen:
        eager_loss(example, draft, target, batch, 0.8)
    assert seen.at_least(limit)


def test_it_trains(example, capsys):
    history = example.main(["--steps", "30"])
    assert history[-1]["acceptance_rate_0"] > 2 * history[0]["acceptance_rate_0"]
    assert "acceptance" in capsys.readouterr().out
