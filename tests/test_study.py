"""The study's draft, decoder, training and report, on a tiny random target.

What decoding computes with its caches is what training computed, greedy speculative text is greedy text, sampled text
is distributed as the target's, and a training that is killed goes on to the same weights.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import fused_lk

transformers = pytest.importorskip("transformers")

from study import batches, columns, lines, report, train, trials  # noqa: E402
from study.decode import Counts, Target, decode  # noqa: E402
from study.draft import Draft  # noqa: E402
from study.settings import LOSSES, QUICK  # noqa: E402

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
    assert counts.accepted_tokens > 0
    assert counts.drafts < counts.output_tokens


def test_counts_add_up(models):
    target, draft, head = models
    prompts = torch.randint(2, VOCAB, (40, 6)).tolist()
    _, counts = decode(target, draft, head, prompts, draft_tokens=4, temperature=1.0, max_tokens=15, end=END, seed=0)
    assert counts.output_tokens + counts.dropped_tokens == counts.drafts + counts.accepted_tokens
    assert counts.draft_tokens == 4 * counts.drafts
    assert counts.rates == sorted(counts.rates, reverse=True)
    assert counts.acceptance_length == pytest.approx(1 + sum(counts.rates))
    exactly = [a - b for a, b in zip(counts.reached_at, counts.accepted_at, strict=True)] + counts.accepted_at[-1:]
    lengths = torch.arange(1.0, 6).repeat_interleave(torch.tensor(exactly))
    assert counts.acceptance_length == pytest.approx(float(lengths.mean()))
    assert counts.acceptance_length_error == pytest.approx(float(lengths.std(correction=0)) / len(lengths) ** 0.5)
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
    prompts = torch.randint(2, VOCAB, (1500, 6), generator=torch.Generator().manual_seed(0)).tolist()
    _, counts = decode(target, draft, head, prompts, draft_tokens=3, temperature=1.0, max_tokens=12, end=None, seed=0)
    assert counts.reached_at[0] == counts.drafts
    for accepted, predicted, variance in zip(counts.accepted_at, counts.predicted_at, counts.variance_at, strict=True):
        assert variance > 5
        assert abs(accepted - predicted) < 3 * variance**0.5


class Memory:
    """Features that are held in memory."""

    def __init__(self, model, lengths, seed):
        generator = torch.Generator().manual_seed(seed)
        texts = [torch.randint(2, VOCAB, (1, n), generator=generator) for n in lengths]
        outs = [model.model(input_ids=text, output_hidden_states=True) for text in texts]
        self.token_ids = torch.cat(texts, 1)[0].int().numpy()
        self.mask = np.concatenate([np.arange(n) >= 3 for n in lengths])
        self.sequence_ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        self._last = torch.cat([out.last_hidden_state for out in outs], 1)[0].bfloat16()
        self._fused = torch.cat([torch.cat(out.hidden_states[:3], -1) for out in outs], 1)[0].bfloat16()

    def fused(self, at):
        return self._fused[at]

    def last(self, at):
        return self._last[at]


TINY = replace(
    QUICK, dtype="float32", sequence_length=24, train_tokens=24 * 2 * 12, batch_rows=2, ttt_steps=3,
    evaluations=3, checkpoints=4, learning_rate=3e-3, draft_tokens=3, decode_tokens=8, decode_prompts=6,
    decode_batch=3, timed_prompts=1,
)  # fmt: skip


@pytest.fixture
def bench(tmp_path):
    model = tiny_target(torch.float32)
    head = fused_lk.TargetHead(model.get_output_embeddings().weight, fused_lk.DraftVocab(torch.arange(VOCAB) < 40))
    lengths = torch.randint(6, 25, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    parts = []
    for i, name in enumerate(("train", "heldout")):
        (tmp_path / name).mkdir()
        features = Memory(model, lengths[i:], i)
        parts.append(train.Texts(features, train.scores_of(features, head, tmp_path / name)))
    return train.Bench(TINY, model, head, *parts)


def test_rows_hold_whole_sequences_once():
    pieces = [slice(a, a + n) for a, n in ((0, 5), (5, 20), (25, 7), (32, 12), (44, 3))]
    rows = batches.packed(pieces, 24)
    assert sorted((p for row in rows for p in row), key=lambda p: p.start) == pieces
    assert all(sum(p.stop - p.start for p in row) <= 24 for row in rows)
    assert len(rows) == 2
    ids = Memory(tiny_target(), [5, 20, 30], 0)
    assert batches.sequences(ids, 24) == [slice(0, 5), slice(5, 25), slice(25, 49)]


def test_a_batch_is_what_lies_on_disk(bench):
    features = bench.train.features
    pieces = batches.sequences(features, 24)
    rows = next(batches.endless(pieces, 24, 2, seed=0))
    batch = bench.batch(bench.train, rows)
    for row, slices in enumerate(rows):
        at = 0
        for piece in slices:
            to = slice(at, at := at + piece.stop - piece.start)
            assert batch.tokens[row, to].tolist() == features.token_ids[piece].tolist()
            assert batch.mask[row, to].tolist() == features.mask[piece].tolist()
            assert torch.equal(batch.fused[row, to], features.fused(piece))
            logits = features.last(piece).float() @ bench.head.weight.T
            torch.testing.assert_close(batch.normalizer[row, to], logits.logsumexp(-1))
            assert torch.equal(batch.argmax[row, to], logits.argmax(-1))
            assert len(batch.sequence_ids[row, to].unique()) == 1
        assert not batch.mask[row, at:].any()
        assert len(batch.sequence_ids[row].unique()) == len(slices) + (at < 24)


def log_of(folder):
    return [(line["step"], line["gradient_norm"], line["loss"]) for line in lines.read(folder / "log.jsonl")]


def test_a_killed_training_goes_on_to_the_same_weights(bench, tmp_path, monkeypatch):
    train.train(bench, "lambda", 0, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def killed_at(n):
        calls = iter(range(n))

        def scored(*arguments):
            if arguments[3] != {"objective": "kl"} and next(calls, None) is None:
                raise Killed
            return real(*arguments)

        return scored

    real = train.scored
    for n in (2, 8, 4):  # before the first checkpoint, between two, and again
        monkeypatch.setattr(train, "scored", killed_at(n))
        with pytest.raises(Killed):
            train.train(bench, "lambda", 0, tmp_path / "killed")
    monkeypatch.setattr(train, "scored", real)
    train.train(bench, "lambda", 0, tmp_path / "killed")
    whole, killed = (train.load(bench, tmp_path / name).state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "killed")
    assert [step for step, *_ in log_of(tmp_path / "whole")] == list(range(TINY.steps))
    curves = [lines.read(tmp_path / name / "curve.jsonl") for name in ("whole", "killed")]
    assert curves[0] == curves[1]
    assert [line["step"] for line in curves[0]] == [0, 4, 8, 12]
    assert curves[0][-1]["loss"] < curves[0][0]["loss"]


def test_training_in_half_precision_is_the_same_training(bench, tmp_path):
    """Of the master weights and of what they see: bf16 rounds the products alone."""
    half = replace(bench, settings=replace(TINY, dtype="bfloat16"))
    for name, one in (("whole", bench), ("half", half)):
        train.train(one, "lambda", 0, tmp_path / name)
    got, want = (lines.read(tmp_path / name / "curve.jsonl")[-1]["acceptance_rate_0"] for name in ("half", "whole"))
    assert got == pytest.approx(want, abs=0.02)
    assert all(x.dtype == torch.float32 for x in torch.load(tmp_path / "half" / "draft.pt").values())
    assert train.load(half, tmp_path / "half").head.weight.dtype == torch.bfloat16


def test_all_losses_of_a_seed_start_alike(bench, tmp_path):
    first = {}
    for loss in LOSSES:
        train.train(replace(bench, settings=replace(TINY, train_tokens=48)), loss, 1, tmp_path / loss)
        (line,) = lines.read(tmp_path / loss / "log.jsonl")
        first[loss] = line["gradient_norm"], line["acceptance_rate_0"], line["kl_1"]
    assert len({values[1:] for values in first.values()}) == 1  # the same draft on the same texts
    assert len({round(values[0], 7) for values in first.values()}) == len(LOSSES)  # under another loss each


def test_prompts_end_where_answers_begin(bench):
    features = bench.heldout.features
    prompts = trials.prompts_of(features, 5)
    starts = np.flatnonzero(np.diff(features.sequence_ids, prepend=-1))[:5]
    assert prompts == [features.token_ids[a : a + 3].tolist() for a in starts]


def test_from_training_to_the_report(bench, tmp_path):
    settings = replace(TINY, folder=tmp_path, losses=("kl", "lambda"), seeds=(0, 1))
    bench = replace(bench, settings=settings)
    train.run(bench, tmp_path / "train")
    trials.run(bench, LAYERS, END, tmp_path / "train", tmp_path / "decode")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "decode").rglob("*.json")}
    removed = next(iter(written))
    before = json.loads(removed.read_text())
    removed.unlink()
    trials.run(bench, LAYERS, END, tmp_path / "train", tmp_path / "decode")
    after = json.loads(removed.read_text())
    assert before["answers"] == after["answers"]  # of the unit that a kill would have lost; the others are kept
    assert all(path.stat().st_mtime_ns == time for path, time in written.items() if path != removed)
    page = report.write(settings, {"stage train": "1 s"}).read_text()
    total = sum((counts for r in report.gathered(settings) for counts in r.decoded[1.0]), Counts(3))
    assert total.output_tokens + total.dropped_tokens == total.drafts + total.accepted_tokens > 0
    assert total.draft_tokens == 3 * total.drafts
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| LK-lambda |")]
    means = [np.mean([c.acceptance_length for c in r.decoded[1.0]]) for r in report.gathered(settings)]
    assert f"{means[1]:.3f}" in rows[1][5]
    assert "acceptance at token 2" in page
    assert "acceptance at token 3" not in page
    assert "1 of 1" in page  # greedy texts are the plain ones
    assert "| stage train | 1 s |" in page
    for picture in re.findall(r"\((\w+\.png)\)", page):
        assert (tmp_path / "report" / picture).read_bytes()[:4] == b"\x89PNG"


def test_the_report_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="Run the stage 'decode'"):
        report.write(replace(TINY, folder=tmp_path), {})


def test_columns_that_round_to_nothing():
    """Two tiles of columns, and both models speak in the first alone: the second can go, and nothing changes."""
    generator = torch.Generator().manual_seed(0)
    h, weight = torch.randn(16, 8, generator=generator), torch.randn(256, 8, generator=generator)
    z, t = (torch.randn(16, 256, generator=generator) - 40.0 * (torch.arange(256) >= 128) for _ in range(2))
    found = list(columns.measure(h, weight, z, t, "kl", 0.0))
    assert {(line.rows, line.order) for line in found} == {(16, "as they are"), (16, "sorted")}
    assert {line.kept for line in found} == {0.5}
    assert max(max(line.error_hidden, line.error_weight) for line in found) < 1e-6
    (spread, *_) = columns.measure(h, weight, torch.randn(16, 256, generator=generator), t, "kl", 0.0)
    assert spread.kept == 1.0 and spread.error_hidden == 0.0
    assert columns.table(found).count("\n") == 1 + len(found)
