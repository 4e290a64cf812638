"""The study's draft, decoder, training and report, on a tiny random target.

What decoding computes with its caches is what training computed, greedy speculative text is greedy text, sampled text is
distributed as the target's, and a training that is killed goes on to the same weights.
"""

from __future__ import annotations

import pytest
import torch

import fused_lk

transformers = pytest.importorskip("transformers")

from study.decode import Target, decode  # noqa: E402
from study.draft import Draft  # noqa: E402

VOCAB, DRAFT_VOCAB, END = 60, 40, 1
LAYERS = (0, 1, 2)


def tiny_target(dtype=torch.float64):
    """A random Llama whose distributions are far from uniform, with grouped heads, and a tied head as SmolLM2 has."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256, rope_theta=10_000.0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.2 / parameter.shape[1] ** 0.5)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.35)
    return model


@pytest.fixture(scope="module")
def models():
    """The target, a draft that was trained a little, so that it is often right, and the head with its vocabulary."""
    model = tiny_target()
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:DRAFT_VOCAB]] = True
    vocab = fused_lk.DraftVocab(t2d)
    draft = Draft.of(model, vocab.target_ids, seed=3).double()
    target = Target(model, LAYERS)
    head = fused_lk.TargetHead(target.head, vocab)
    tokens = torch.randint(2, VOCAB, (16, 24))
    logits, features = whole_pass(target, tokens)
    scored_against = fused_lk.Target.from_logits(logits, vocab)
    pairs = fused_lk.Pairs.ttt(torch.ones_like(tokens), 3)
    optimizer = torch.optim.Adam(draft.parameters(), lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        hidden = draft(features, tokens, torch.zeros_like(tokens), 3)
        fused_lk.lk_loss(hidden, draft.head.weight, scored_against, objective="kl", pairs=pairs).loss.backward()
        optimizer.step()
    yield target, draft.requires_grad_(False), head
    target.close()


def whole_pass(target, tokens):
    """What the target gives for whole texts `[B, S]`, by transformers alone."""
    out = target.model(input_ids=tokens, output_hidden_states=True)
    return out.logits, torch.cat([out.hidden_states[i + 1] for i in LAYERS[:-1]] + [target._seen[LAYERS[-1]]], -1)


def test_the_cached_target_is_the_model(models):
    target, _, _ = models
    tokens = torch.randint(VOCAB, (3, 12))
    logits, features = whole_pass(target, tokens)
    cache = target.cache(3, 20)
    # A pass that is taken back leaves keys of other tokens behind; starts differ from row to row.
    starts = torch.tensor([4, 7, 2])
    positions = torch.arange(12).expand(3, -1)
    target((tokens + 1) % VOCAB, positions, cache)
    target(tokens[:, :8], positions[:, :8], cache)
    at = starts.unsqueeze(-1) + torch.arange(5)
    states, got = target(tokens.gather(1, at), at, cache)
    rows = torch.arange(3).unsqueeze(-1)
    torch.testing.assert_close(states @ target.head.T, logits[rows, at], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got, features[rows, at], rtol=1e-9, atol=1e-9)


def test_the_cached_draft_is_the_draft_that_was_trained(models):
    target, draft, head = models
    prompts = [torch.randint(2, VOCAB, (n,)).tolist() for n in (9, 4, 6)]
    drafted = []
    step = Draft.step

    def watched(self, state, following, positions, cache):
        drafted.append((following, positions, state := step(self, state, following, positions, cache)))
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Draft, "step", watched)
        answers, _ = decode(
            target, draft, head, prompts, draft_tokens=4, temperature=1.0, max_tokens=12, end=None, seed=5
        )
    assert {len(answer) for answer in answers} == {12}
    # Of the third round: what was read of each text, then three tokens of its own.
    rounds = [i for i, (following, *_) in enumerate(drafted) if i % 4 == 0]
    first = rounds[2]
    for row, prompt in enumerate(prompts):
        text = prompt + answers[row]
        start = int(drafted[first + 1][1][row]) - 1  # the draft's row
        chain = [int(following[row]) for following, *_ in drafted[first + 1 : first + 4]]
        tokens = torch.tensor([text[: start + 2] + chain])
        features = whole_pass(target, tokens)[1]
        in_training = draft(features, tokens, torch.zeros_like(tokens), 4)
        fresh = int((drafted[first][1][row] == start).nonzero())
        states = [drafted[first][2][row, fresh], *(state[row, 0] for *_, state in drafted[first + 1 : first + 4])]
        got = torch.stack([draft.norm_out(state) for state in states])
        torch.testing.assert_close(got, torch.stack([h[0, start] for h in in_training]), rtol=1e-9, atol=1e-9)


def test_packed_sequences_do_not_see_one_another(models):
    target, draft, _ = models
    one, other = torch.randint(VOCAB, (1, 9)), torch.randint(VOCAB, (1, 7))
    tokens, ids = torch.cat([one, other], 1), torch.tensor([[0] * 9 + [1] * 7])
    features = torch.cat([whole_pass(target, x)[1] for x in (one, other)], 1)
    packed = draft(features, tokens, ids, 3)
    alone = draft(features[:, 9:], other, torch.zeros_like(other), 3)
    for k, (a, b) in enumerate(zip(packed, alone, strict=True)):
        # Other positions, whose rotary angles are float32.
        torch.testing.assert_close(a[:, 9 : 16 - 1 - k], b[:, : 7 - 1 - k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 5])
def test_greedy_text_is_the_targets_greedy_text(models, batch):
    target, draft, head = models
    prompts = [torch.randint(2, VOCAB, (n,)).tolist() for n in (3, 8, 5, 2, 11)[:batch]]
    options = {"temperature": 0.0, "max_tokens": 30, "end": END, "seed": 0}
    speculative, counts = decode(target, draft, head, prompts, draft_tokens=4, **options)
    plain, plain_counts = decode(target, None, head, prompts, draft_tokens=4, **options)
    assert speculative == plain
    for prompt, answer in zip(prompts, plain, strict=True):  # and transformers' own, without a cache
        logits = target.model(input_ids=torch.tensor([prompt + answer])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    assert plain_counts.drafts == plain_counts.output_tokens == sum(map(len, plain))
    assert 0 < counts.accepted_tokens
    assert counts.drafts < counts.output_tokens


def test_counts_add_up(models):
    target, draft, head = models
    prompts = torch.randint(2, VOCAB, (40, 6)).tolist()
    _, counts = decode(target, draft, head, prompts, draft_tokens=4, temperature=1.0, max_tokens=15, end=END, seed=0)
    assert counts.output_tokens + counts.dropped_tokens == counts.drafts + counts.accepted_tokens
    assert counts.draft_tokens == 4 * counts.drafts
    assert counts.rates == sorted(counts.rates, reverse=True)
    assert counts.acceptance_length == pytest.approx(1 + sum(counts.rates))
    both = counts + counts
    assert (both.drafts, both.accepted_tokens) == (2 * counts.drafts, 2 * counts.accepted_tokens)
    assert both.rates == counts.rates


def chi_squared(counts, expected):
    """How far counts lie from what is expected, in standard deviations of a chi-squared variable; rare cells pooled."""
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum().view(1)]) for x in (counts.double(), expected))
    freedom = len(counts) - 1
    return (((counts - expected).square() / expected).sum() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_text_is_distributed_as_the_targets(models, temperature):
    """Of the first two tokens: the second comes from wherever the first round ended."""
    target, draft, head = models
    prompt = torch.randint(2, VOCAB, (6,), generator=torch.Generator().manual_seed(2)).tolist()
    n = 3000
    answers, counts = decode(
        target, draft, head, [prompt] * n, draft_tokens=3, temperature=temperature, max_tokens=2, end=None, seed=0
    )
    first, second = torch.tensor(answers).T
    p = (target.model(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    assert chi_squared(first.bincount(minlength=VOCAB), n * p) < 4
    outside = ~head.vocab.t2d
    assert p[outside].sum() > 0.05
    assert outside[first].any()
    texts = torch.cat([torch.tensor([prompt]).expand(VOCAB, -1), torch.arange(VOCAB).unsqueeze(-1)], 1)
    after = (target.model(input_ids=texts).logits[:, -1] / temperature).softmax(-1)
    assert chi_squared(second.bincount(minlength=VOCAB), n * (p @ after)) < 4
    assert 0.05 < counts.rates[0] < 0.95


def test_acceptance_is_what_alpha_predicts(models):
    target, draft, head = models
    prompts = torch.randint(2, VOCAB, (300, 6)).tolist()
    _, counts = decode(target, draft, head, prompts, draft_tokens=3, temperature=1.0, max_tokens=12, end=None, seed=0)
    assert counts.reached_at[0] == counts.drafts
    for accepted, predicted, variance in zip(
        counts.accepted_at, counts.predicted_at, counts.variance_at, strict=True
    ):
        assert variance > 5
        assert abs(accepted - predicted) < 4 * variance**0.5
