"""The examples train, and score what they say they score."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations

import fused_lk
from fused_lk.rows import plain

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example():
    return load("transformers_loop")


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


def assert_learns(history, capsys, metric="acceptance_rate_0", factor=3.0):
    assert history[-1][metric] > factor * history[0][metric]
    assert history[-1]["loss"] < history[0]["loss"]
    assert "step" in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["kl", "lambda"])
def test_plain_loop(objective, capsys):
    assert_learns(load("plain_loop").main(["--steps", "80", "--objective", objective]), capsys)


def test_transformers_trainer(capsys):
    assert_learns(load("transformers_trainer").main(["--steps", "30"]), capsys, "draft_acceptance_rate_0", 1.5)


def test_accumulation_in_trainer_is_exact():
    """Micro-batches of 4 rows with uneven prompts have the loss and the gradient of all 16 together."""
    trainer = load("transformers_trainer")
    histories = [trainer.train(3, batch, 16 // batch).state.log_history for batch in (4, 16)]
    for micro, whole in zip(*([x for x in h if "grad_norm" in x] for h in histories), strict=True):
        for name in ("loss", "grad_norm", "draft_loss", "draft_num_tokens_0"):
            assert micro[name] == pytest.approx(whole[name], rel=1e-4), name


def test_lightning_module(capsys):
    before, after = load("lightning_module").main(["--steps", "60"])
    assert after["val/acceptance_length"] > before["val/acceptance_length"] + 0.2
    assert after["val/num_tokens_0"] == before["val/num_tokens_0"] > 16 * 16, "of all batches together"
    assert "acceptance_length" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_offline_targets(kind, capsys):
    history = load("offline_targets").main(["--kind", kind, "--epochs", "3"])
    assert history[-1]["acceptance_rate_0"] > 2 * history[0]["acceptance_rate_0"]
    assert kind in capsys.readouterr().out


def test_what_is_read_from_disk_is_what_was_written(tmp_path, monkeypatch):
    """With every token listed, the two kinds are the same target: that of the bf16 hidden states."""
    offline = load("offline_targets")
    monkeypatch.setattr(offline, "K", offline.VOCAB)
    monkeypatch.setattr(offline, "NUM_SEQUENCES", 16)
    offline.write(tmp_path)
    written = offline.Written(tmp_path)
    assert all(isinstance(file, np.memmap) for file in written.files.values())
    batch = next(iter(torch.utils.data.DataLoader(written, 4)))
    assert batch["states"].dtype == torch.bfloat16
    head = fused_lk.TargetHead(torch.load(tmp_path / "lm_head.pt"))
    logits = F.linear(batch["states"], head.weight).float()
    hidden, weight = torch.randn(4, offline.LENGTH - 1, offline.SIZE), torch.randn(offline.VOCAB, offline.SIZE)
    expected = torch.minimum(logits[:, 1:].softmax(-1), F.linear(hidden, weight).softmax(-1)).sum(-1)
    for kind in ("hidden", "topk"):
        d = fused_lk.lk_divergences(hidden, weight, offline.target_of(batch, kind, head))
        torch.testing.assert_close(d.acceptance, expected)


def test_gemma_head(capsys):
    gemma = load("gemma_head")
    draft, history = gemma.main(["--steps", "60"])
    assert draft.embed.weight.grad is None
    assert_learns(history[:-1], capsys)
    assert abs(history[-1]["acceptance_rate_0"] - history[-2]["acceptance_rate_0"]) > 0.03, "the cap matters"


def test_gemma_head_is_what_eager_code_has():
    gemma = load("gemma_head")
    draft = gemma.Draft(torch.nn.Embedding(gemma.VOCAB, gemma.SIZE))
    states, tokens = 3 * torch.randn(2, 5, gemma.SIZE), torch.randint(gemma.VOCAB, (2, 5))
    target_states, mask = 3 * torch.randn(2, 5, gemma.SIZE), torch.rand(2, 5) < 0.7

    def probs(hidden):
        return (30 * torch.tanh(gemma.CONFIG.logit_scale * F.linear(hidden, draft.embed.weight) / 30)).softmax(-1)

    target = fused_lk.Target.from_hidden(target_states, fused_lk.TargetHead(draft.embed.weight, **draft.softmax))
    q = probs(draft.body(draft.norm(torch.cat([states, draft.embed(tokens)], -1))))
    expected = torch.minimum(q, probs(target_states)).sum(-1)[mask].mean()
    got = draft(states, tokens, target, mask).acceptance_rate
    torch.testing.assert_close(got, expected.detach().reshape(1))


def test_block_drafter(capsys):
    history = load("block_drafter").main(["--steps", "90"])
    assert_learns(history, capsys)
    assert history[-1]["acceptance_length"] > 1.5
    assert history[-1]["confidence_loss"] < history[0]["confidence_loss"]


def test_block_drafter_is_as_written_out():
    """Both losses, element by element: a block ends where its sequence does, and at its first token that is masked."""
    blocks = load("block_drafter")
    generator, draft = torch.Generator().manual_seed(3), blocks.Draft()
    table = torch.randn(blocks.VOCAB, blocks.SIZE, generator=generator)
    tokens, states, loss_mask, anchors = blocks.make_batch(table, torch.arange(blocks.VOCAB), generator)
    loss_mask = loss_mask & (torch.rand(loss_mask.shape, generator=generator) < 0.8)
    anchors[0, 3], anchors[1, 2] = -1, blocks.LENGTH - 3
    out, of_confidence = blocks.losses(draft, fused_lk.TargetHead(table), tokens, states, loss_mask, anchors)

    p = F.linear(states, table).softmax(-1)
    loss = confidence_loss = weights = 0
    for b in range(blocks.BATCH):
        for a in (a for a in anchors[b].tolist() if a >= 0):
            hidden, confidence = draft(states[b : b + 1, a : a + 1], tokens[b : b + 1, a : a + 1])
            q = draft.lm_head(hidden[0, 0]).softmax(-1)
            for j in range(blocks.BLOCK):
                if a + j + 1 >= blocks.LENGTH or not loss_mask[b, a + j + 1]:
                    break
                weight = math.exp(-j / blocks.GAMMA)
                alpha = torch.minimum(p[b, a + j], q[j]).sum().detach()
                surprise, distance = -q[j, tokens[b, a + j + 1]].log(), (p[b, a + j] - q[j]).abs().sum()
                loss += weight * (0.1 * surprise + 0.9 * distance)
                confidence_loss += weight * F.binary_cross_entropy_with_logits(confidence[0, 0, j], alpha)
                weights += weight
    torch.testing.assert_close(out.loss, loss / weights)
    torch.testing.assert_close(of_confidence, confidence_loss / weights)
