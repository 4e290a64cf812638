"""The demo runs end to end, its loss is the eager one, and its sampler accepts as often as alpha says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from tqdm import tqdm

import fused_lk
from demo import cost
from demo.__main__ import main
from demo.decode import decode
from demo.models import Draft, Size, Target
from demo.train import Scorer, Settings, _new_run

SIZE = Size(layers=2, width=32, draft_width=32, draft_vocab=40, ttt_steps=3)
VOCAB, BATCH, LENGTH = 60, 4, 16


def test_it_runs_end_to_end(tmp_path, capsys):
    arguments = "--target-steps 4 --draft-steps 4 --held-out 8 --length 32 --rounds 3 --vocab 400 --draft-vocab 300"
    main([*arguments.split(), "--max-bytes", "200000", "--device", "cpu", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for expected in (
        "acceptance rate, position 3",
        "accuracy",
        "expected acceptance length",
        "LK-lambda - KL",
        "tokens per pass of the target",
        "LK-lambda, fused_lk",
        "MiB",
    ):
        assert expected in printed
    assert (tmp_path / "training.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def models():
    """A target and a draft whose distributions are far from uniform and from one another, and the target's head."""
    torch.manual_seed(0)
    target = Target(VOCAB, SIZE)
    draft = Draft(target.requires_grad_(False), SIZE, SIZE.draft_vocab)
    for module in (*target.modules(), *draft.modules()):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.5 / module.in_features**0.5)
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[torch.randperm(VOCAB)[: SIZE.draft_vocab]] = True
    return target, draft, fused_lk.DraftVocab(t2d)


@pytest.mark.parametrize("objective", ["kl", "tv", "alpha", "lambda"])
def test_the_eager_loss_it_compares_with_is_the_same_loss(models, objective):
    target, draft, vocab = models
    scorer = Scorer(target, vocab, SIZE, Settings())
    tokens = torch.randint(VOCAB, (BATCH, LENGTH))
    features, scored_against = scorer.read(tokens)
    out = scorer(draft, fused_lk.LKLoss(objective, position_decay=0.8), tokens, features, scored_against)
    assert 1 < out.metrics()["acceptance_length"] < 1 + SIZE.ttt_steps  # the steps from one row are a block
    ours = out.loss
    with torch.no_grad():
        hidden = target(tokens)[0]
    eager = cost.eager_loss(
        draft(features, tokens, SIZE.ttt_steps), draft.head.weight, hidden, scorer.head, vocab.t2d, objective, 0.8
    )
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    got, want = (torch.autograd.grad(loss, draft.trainable()) for loss in (ours, eager))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_steps_of_training_are_steps_of_decoding(models):
    """What the draft says at row t of step k depends on tokens up to t + 1 + k and features up to t alone."""
    target, draft, _ = models
    tokens, row, k = torch.randint(VOCAB, (1, LENGTH)), 7, 2
    features = target(tokens)[1]
    before = draft(features, tokens, SIZE.ttt_steps)[k][0, row]
    last = row + 1 + k

    def hidden_after(first_changed_token, first_changed_feature):
        changed_tokens, changed_features = tokens.clone(), features.clone()
        changed_tokens[:, first_changed_token:] = (tokens[:, first_changed_token:] + 1) % VOCAB
        changed_features[:, first_changed_feature:] += 1
        return draft(changed_features, changed_tokens, SIZE.ttt_steps)[k][0, row]

    assert torch.equal(hidden_after(last + 1, row + 1), before)
    assert not torch.allclose(hidden_after(last, row + 1), before)
    assert not torch.allclose(hidden_after(last + 1, row), before)


def test_decoding_reads_the_rows_that_training_scores(models, monkeypatch):
    target, draft, vocab = models
    prompts = torch.randint(VOCAB, (5, 9))
    passes, drafted = [], []  # what the target was given, and the hidden states that alpha is made of
    target.register_forward_pre_hook(lambda _, arguments: passes.append(arguments[0].clone()))
    divergences = fused_lk.lk_divergences
    monkeypatch.setattr(fused_lk, "lk_divergences", lambda h, *rest: drafted.append(h) or divergences(h, *rest))
    decode(target, draft, fused_lk.TargetHead(target.head.weight, vocab), prompts, 3, 1, 0, tqdm(disable=True))
    before, proposed = passes
    in_training = draft(target(before)[1], proposed, 3)
    torch.testing.assert_close(torch.stack(drafted[0]), torch.stack(in_training)[:, :, prompts.shape[1] - 2])


def test_acceptance_is_what_alpha_predicts(models):
    target, draft, vocab = models
    head = fused_lk.TargetHead(target.head.weight, vocab)
    prompts = torch.randint(VOCAB, (250, 6))
    decoding = decode(target, draft, head, prompts, SIZE.ttt_steps, 6, 0, tqdm(disable=True))
    assert decoding.rounds == 1500
    assert decoding.reached[0] == decoding.rounds
    assert torch.equal(decoding.reached[1:], decoding.accepted[:-1])
    rates = decoding.predicted / decoding.reached
    assert (rates > 0.05).all()
    assert (rates < 0.95).all()
    z = (decoding.accepted - decoding.predicted) / decoding.variance.sqrt()
    assert z.abs().max() < 4
    assert abs(decoding.length - decoding.predicted_length) < 4 * decoding.length_error


def test_the_text_is_the_targets_own(models):
    """After one round, the first new token is distributed as the target has it, whatever the draft proposed."""
    target, draft, vocab = models
    head = fused_lk.TargetHead(target.head.weight, vocab)
    prompt = torch.randint(VOCAB, (1, 8))
    count = 2000
    first = decode(target, draft, head, prompt.expand(count, -1), SIZE.ttt_steps, 1, 0, tqdm(disable=True)).tokens[
        :, prompt.shape[1]
    ]
    p = target.head(target(prompt)[0][0, -1]).softmax(-1)
    counts, expected = first.bincount(minlength=VOCAB), count * p
    rare = expected < 5  # pooled, as chi-squared wants it
    counts_of, expected_of = (torch.cat([x[~rare], x[rare].sum().view(1)]) for x in (counts.float(), expected))
    chi_squared, freedom = ((counts_of - expected_of).square() / expected_of).sum(), len(counts_of) - 1
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5
    assert (counts[~vocab.t2d] > 0).any(), "tokens that the draft cannot propose must come too"


def test_runs_start_alike_and_share_only_the_embedding(models):
    target, draft, _ = models
    one, other = (_new_run(objective, draft, Settings()) for objective in ("kl", "lambda"))
    assert one.draft.embed is other.draft.embed is target.embed
    pairs = list(zip(one.draft.trainable(), other.draft.trainable(), strict=True))
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)
    assert sum(p.numel() for p in copy.copy(one.draft).trainable()) < sum(p.numel() for p in target.parameters())


def test_peak_bytes_counts_what_lives_together():
    def run():
        a = torch.empty(1000)
        del a
        b = torch.empty(1500)
        c = b.view(30, 50)[:10]  # a view is no allocation
        return c.relu()

    assert cost.peak_bytes(run, torch.device("cpu")) == (1500 + 500) * 4
