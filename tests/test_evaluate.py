"""What a sampler sees, against the warpers of Hugging Face written by hand, in float64 and with full logits."""

from __future__ import annotations

import hard_rows
import processes
import pytest
import torch
import torch.distributed as dist
from allocations import Allocations
from problems import TARGET_KINDS, make_problem, make_vocab

import fused_lk
from fused_lk import LKEvaluation, Sampling, reference

NEG_INF = float("-inf")
SAMPLINGS = {
    "all": (None, None),
    "greedy": (1, None),
    "k": (5, None),
    "p": (None, 0.8),
    "k, p": (7, 0.6),
    "more than V": (1000, None),
    "p of 1": (None, 1.0),
}
HIDDEN, DRAFT, TARGET, TOKENS = 6, 29, 43, 24


def warped(logits, top_k=None, top_p=None):
    """The logits with -inf where the warpers cut, `TopKLogitsWarper` first. The columns are reversed for the second:
    its ascending sort keeps what comes last of equal logits, and here the lowest ids are to stay."""
    if top_k is not None:
        kept = logits.sort(1).values[:, -min(top_k, logits.shape[1])]
        logits = torch.where(logits < kept.unsqueeze(1), NEG_INF, logits)
    if top_p is not None and top_p < 1:
        ascending, order = logits.flip(1).sort(dim=1, stable=True)
        remove = ascending.softmax(1).cumsum(1) <= 1 - top_p
        remove[:, -1] = False
        logits = torch.where(remove.gather(1, order.argsort(1)).flip(1), NEG_INF, logits)
    return logits


def decided(logits, margin, top_k=None, top_p=None):
    """The rows whose limit of top-p lies `margin` away from any sum of probabilities: rounding does not move it."""
    if top_p in (None, 1):
        return torch.ones(len(logits), dtype=torch.bool)
    sums = warped(logits, top_k).softmax(1).sort(1).values.cumsum(1)
    return ((sums - (1 - top_p)).abs() > margin).all(1)


def best(logits, k):
    """The k likeliest tokens of each row, and of equal ones the lowest."""
    return logits.sort(dim=1, descending=True, stable=True).indices[:, :k].tolist()


def expected(draft, target, columns=None, of_draft=(), of_target=(), agreement_k=1):
    """All measures `[N]` of draft logits `[N, V_draft]` and target logits `[N, V_target]`."""
    columns = torch.arange(draft.shape[1]) if columns is None else columns
    q, p = warped(draft, *of_draft).softmax(1), warped(target, *of_target).softmax(1)

    def entropy(x):
        return -torch.where(x > 0, x * x.log(), 0).sum(1)

    d, t = [columns[torch.tensor(row)].tolist() for row in best(draft, agreement_k)], best(target, agreement_k)
    found = {
        "acceptance_rate": torch.minimum(q, p[:, columns]).sum(1),
        "accuracy": [float(a[0] == b[0]) for a, b in zip(d, t, strict=True)],
        "draft_entropy": entropy(q),
        "draft_top1": q.amax(1),
        "target_entropy": entropy(p),
        "target_top1": p.amax(1),
        "draft_token_ids": [a[0] for a in d],
        "target_token_ids": [b[0] for b in t],
    }
    for k in range(2, agreement_k + 1):
        found[f"agreement_{k}"] = [len(set(a[:k]) & set(b[:k])) / k for a, b in zip(d, t, strict=True)]
        found[f"hit_{k}"] = [float(b[0] in a[:k]) for a, b in zip(d, t, strict=True)]
    return {name: torch.as_tensor(x, dtype=torch.float64) for name, x in found.items()}


def assert_measured(made, want, rows=slice(None), atol=1e-9):
    assert list(made.tokens) == [name for name in want if "ids" not in name] + ["draft_token_ids", "target_token_ids"]
    for name, x in want.items():
        got = made.tokens[name].flatten().double()
        torch.testing.assert_close(got[rows], x[rows], atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("work", ["identity", "weighted", "shifted", "kept"])
@pytest.mark.parametrize("kind", TARGET_KINDS)
@pytest.mark.parametrize("stacked", [False, True])
def test_without_sampling_it_is_the_loss(kind, work, stacked):
    for dtype, atol in ((torch.float64, 1e-12), (torch.bfloat16, 1e-5)):
        problem = make_problem(kind=kind, work=work, stacked=stacked, dtype=dtype)
        given = problem.sources if stacked else problem.sources[0]
        call = (given, problem.weight, problem.target)
        loss = fused_lk.lk_loss(*call, bias=problem.bias, **problem.options)
        made = fused_lk.lk_evaluate(*call, bias=problem.bias, workspace_mb=0.01, **problem.options)
        torch.testing.assert_close(made.token_acceptance, loss.token_acceptance, atol=atol, rtol=0)
        assert torch.equal(made.tokens["draft_token_ids"], loss.draft_token_ids)
        for name in ("acceptance", "accuracy", "prefix_acceptance", "prefix_accuracy"):
            ours = made.sums["acceptance_rate" if name == "acceptance" else name]
            torch.testing.assert_close(ours, getattr(loss, f"{name}_sum"), atol=10 * atol, rtol=0)
        same = {name: x for name, x in made.metrics("a/").items() if name.removeprefix("a/") in loss.metrics()}
        assert len(same) >= 6
        assert same == pytest.approx({name: loss.metrics("a/")[name] for name in same}, abs=10 * atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("member", hard_rows.FAMILY)
def test_hard_rows(member, sampling, dtype):
    """Half precision rounds the logits, and so makes ties; what is then made of them is float32."""
    z, t = (x.to(dtype) for x in hard_rows.make(member, 12, 61))
    of_draft, of_target = SAMPLINGS[sampling], SAMPLINGS["p" if sampling == "k" else sampling]
    target = fused_lk.Target.from_logits(t)
    how = {"draft_sampling": Sampling(*of_draft), "target_sampling": Sampling(*of_target)}
    made = fused_lk.lk_evaluate_from_logits(z, target, agreement_k=4, workspace_mb=0.02, **how)
    z, t = z.double(), t.double()
    want = expected(z, t, None, of_draft, of_target, 4)
    margin, atol = (1e-12, 1e-9) if dtype == torch.float64 else (1e-5, 5e-6)
    sure = decided(z, margin, *of_draft) & decided(t, margin, *of_target)
    assert sure.sum() > 8
    assert_measured(made, want, sure, atol)


def test_a_common_offset_costs_no_digit():
    """Also where a temperature multiplies it."""
    z, t = hard_rows.make("offsets", 12, 61)
    target = fused_lk.Target.from_logits(t.float(), temperature=0.7)
    made = fused_lk.lk_evaluate_from_logits(z.float(), target, draft_temperature=0.3)
    assert_measured(made, expected(z / 0.3, t / 0.7), atol=2e-6)


def make_target(kind, generator, **options):
    """A target, the logits over its own vocabulary that its sampler sees, and the draft vocabulary."""
    vocab = make_vocab(TARGET, DRAFT, generator)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight, bias = (torch.randn(*n, generator=generator, dtype=torch.float64) for n in ((TARGET, HIDDEN), (TARGET,)))
    temperature = options.get("temperature", 1.0)
    if kind in ("hidden", "cached"):
        softcap = options.pop("softcap", None)
        head = fused_lk.TargetHead(weight, vocab, bias, softcap=softcap, logit_scale=0.7)
        target = fused_lk.Target.from_hidden(hidden, head, cache=kind == "cached", **options)
        return target, reference.head_logits(hidden @ weight.T + bias, 0.7, softcap) / temperature, vocab
    logits = hidden @ weight.T + bias
    if kind == "logits":
        return fused_lk.Target.from_logits(logits, vocab, **options), logits / temperature, vocab
    if kind == "topk":
        values, ids = logits.log_softmax(1).topk(9)
        order = torch.randperm(9, generator=generator)
        return fused_lk.Target.from_topk(ids[:, order], values[:, order], vocab, **options), logits, vocab
    return fused_lk.Target.from_probs(logits.softmax(1), **options), logits, None


@pytest.mark.parametrize("sampling", ["all", "greedy", "k", "p", "k, p"])
@pytest.mark.parametrize("kind", ["hidden", "cached", "logits", "topk", "probs"])
def test_the_targets_sampler_cuts_its_full_vocabulary(kind, sampling):
    if kind == "topk" and sampling in ("all", "p"):
        return  # see `test_what_a_target_does_not_know`
    generator = torch.Generator().manual_seed(1)
    options = {"temperature": 1.7} if kind in ("hidden", "cached", "logits") else {}
    target, logits, vocab = make_target(kind, generator, **options, **({"softcap": 4.0} if kind == "hidden" else {}))
    columns = torch.arange(TARGET) if vocab is None else vocab.target_ids
    draft = logits[:, columns] + torch.randn(TOKENS, len(columns), generator=generator, dtype=torch.float64)
    of_draft, of_target = SAMPLINGS["k, p"], SAMPLINGS[sampling]
    how = {"draft_sampling": Sampling(*of_draft), "target_sampling": Sampling(*of_target), "workspace_mb": 0.01}
    made = fused_lk.lk_evaluate_from_logits(draft, target, agreement_k=8, draft_temperature=0.6, **how)
    assert_measured(made, expected(draft / 0.6, logits, columns, of_draft, of_target, 8))
    if sampling == "k" and kind != "probs":
        on_draft = warped(logits[:, columns], *of_target).softmax(1)
        other = torch.minimum(on_draft, warped(draft / 0.6, *of_draft).softmax(1)).sum(1)
        assert ((made.token_acceptance - other).abs() > 0.01).any()  # a cut of the draft vocabulary is another one


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("low_rank", [False, True])
def test_the_drafts_head(softcap, low_rank):
    generator = torch.Generator().manual_seed(2)
    target, logits, vocab = make_target("logits", generator)
    hidden, weight, bias = (
        torch.randn(*n, generator=generator, dtype=torch.float64) for n in ((TOKENS, 5), (DRAFT, 5), (DRAFT,))
    )
    second = tuple(torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (TOKENS, DRAFT))
    z = hidden @ weight.T + bias + (second[0] @ second[1].T if low_rank else 0)
    z = reference.head_logits(z, 1.3, softcap) / 0.8
    head = {"bias": bias, "logit_scale": 1.3, "softcap": softcap, "draft_temperature": 0.8}
    head["low_rank"] = second if low_rank else None
    made = fused_lk.lk_evaluate(hidden, weight, target, draft_sampling=Sampling(6, 0.9), workspace_mb=0.01, **head)
    assert_measured(made, expected(z, logits, vocab.target_ids, (6, 0.9)))


def test_what_is_renormalised_knows_of_no_other_token():
    generator = torch.Generator().manual_seed(3)
    target, logits, vocab = make_target("logits", generator, renormalize=True)
    draft = torch.randn(TOKENS, DRAFT, generator=generator, dtype=torch.float64)
    made = fused_lk.lk_evaluate_from_logits(draft, target, target_sampling=Sampling(5), agreement_k=3)
    want = expected(draft, logits[:, vocab.target_ids], None, (), (5,), 3)
    for name in ("acceptance_rate", "target_entropy", "target_top1", "agreement_3", "hit_2"):
        torch.testing.assert_close(made.tokens[name], want[name])
    restricted = fused_lk.Target.from_topk(*logits.topk(9)[::-1], vocab, renormalize=True, restrict_draft=True)
    made = fused_lk.lk_evaluate_from_logits(draft, restricted, draft_sampling=Sampling(3))
    listed = torch.full_like(logits, NEG_INF).scatter(1, logits.topk(9).indices, logits.topk(9).values)
    listed = listed[:, vocab.target_ids]
    want = expected(draft.masked_fill(listed == NEG_INF, NEG_INF), listed, None, (3,))
    torch.testing.assert_close(made.token_acceptance, want["acceptance_rate"])


def test_ties_at_the_limits():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, NEG_INF, 2.0]])
    flat = torch.zeros(1, 6)
    everything = fused_lk.Target.from_logits(flat)

    def kept(draft, **sampling):
        """Against a flat target: 1/6 for each token that stays, as long as q is larger."""
        made = fused_lk.lk_evaluate_from_logits(draft, everything, draft_sampling=Sampling(**sampling))
        return made.tokens

    assert kept(logits, top_k=2)["draft_entropy"].exp() > kept(logits, top_k=1)["draft_entropy"].exp() == 1
    q = torch.tensor([3.0, 2, 2, 2]).softmax(0)
    torch.testing.assert_close(kept(logits, top_k=2)["draft_top1"], q[:1])  # all three that tie with the second stay
    assert torch.equal(kept(logits, top_k=2)["draft_top1"], kept(logits, top_k=4)["draft_top1"])
    assert torch.equal(kept(logits, top_k=5)["draft_top1"], kept(logits, top_k=6)["draft_top1"])
    for top_p, stay in ((0.01, 1), (0.25, 2), (0.5, 3), (0.51, 4), (0.999, 6)):
        torch.testing.assert_close(kept(flat, top_p=top_p)["acceptance_rate"], torch.tensor([stay / 6]))
        torch.testing.assert_close(kept(flat, top_p=top_p)["draft_top1"], torch.tensor([1 / stay]))
    first, last = torch.tensor([[0.0, 0.0, NEG_INF]]), torch.tensor([[NEG_INF, 0.0, 0.0]])
    lowest = {"target_sampling": Sampling(top_p=0.4), "draft_sampling": Sampling(top_p=0.4)}
    assert fused_lk.lk_evaluate_from_logits(first, fused_lk.Target.from_logits(last), **lowest).token_acceptance == 0
    same = fused_lk.lk_evaluate_from_logits(first, fused_lk.Target.from_logits(first.clone()), **lowest)
    assert same.token_acceptance == same.tokens["accuracy"] == 1


def test_greedy():
    z, t = torch.randn(2, 40, 7, dtype=torch.float64)
    target, greedy = fused_lk.Target.from_logits(t), Sampling(top_k=1)
    both = fused_lk.lk_evaluate_from_logits(z, target, draft_sampling=greedy, target_sampling=greedy)
    assert torch.equal(both.token_acceptance, both.tokens["accuracy"])
    assert 0 < both.means["accuracy"] < 1
    assert (both.tokens["draft_entropy"] == 0).all()
    one = fused_lk.lk_evaluate_from_logits(z, target, draft_sampling=greedy)
    torch.testing.assert_close(one.token_acceptance, t.softmax(1).gather(1, z.argmax(1, keepdim=True)).squeeze(1))


def test_fewer_possible_tokens_than_agreement_asks_for():
    z = torch.tensor([[3.0, 2.0, NEG_INF, NEG_INF]])
    t = torch.tensor([[3.0, NEG_INF, 2.0, NEG_INF]])
    made = fused_lk.lk_evaluate_from_logits(z, fused_lk.Target.from_logits(t), agreement_k=4).tokens
    assert [made[f"agreement_{k}"].item() for k in (2, 3, 4)] == pytest.approx([1 / 2, 1 / 3, 1 / 4])
    assert made["hit_4"] == 1


def test_rows_without_an_answer():
    """The target cannot say anything, or its sampler leaves nothing to the draft; NaN reaches the sums."""
    vocab = fused_lk.DraftVocab(torch.tensor([False, True, True]))
    t = torch.tensor([[5.0, 1.0, 0.0], [0.0, 5.0, 1.0], [NEG_INF, NEG_INF, NEG_INF]])
    z = torch.zeros(3, 2)
    made = fused_lk.lk_evaluate_from_logits(z, fused_lk.Target.from_logits(t, vocab), target_sampling=Sampling(1))
    assert made.token_acceptance.tolist() == [0, 0.5, 0]
    assert made.tokens["target_entropy"].tolist() == [0, 0, 0]
    assert made.tokens["accuracy"][:2].tolist() == [0, 1]
    for cut in (Sampling(), Sampling(2, 0.5)):
        z[0, 0] = float("nan")
        made = fused_lk.lk_evaluate_from_logits(z, fused_lk.Target.from_logits(t, vocab), draft_sampling=cut)
        assert made.means["acceptance_rate"].isnan() and made.means["draft_entropy"].isnan()


def make_call(pattern, skip_masked):
    """`(draft logits, target logits, pairs, rows)` of K = 3 positions over 2 sequences of 9 tokens, garbage where
    ignored. `rows` has one row per draft row: draft logits, target logits, weights and positions."""
    generator = torch.Generator().manual_seed(4)
    t = 2 * torch.randn(18, 13, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 9, generator=generator) > 0.4
    anchors = torch.tensor([[0, 3, 7, -1], [2, 5, 6, 8]])
    pairs = {
        "ttt": lambda: fused_lk.Pairs.ttt(mask, 3, skip_masked=skip_masked),
        "blocks": lambda: fused_lk.Pairs.blocks(anchors, 3, mask, skip_masked=skip_masked),
        "weights": lambda: fused_lk.Pairs(mask * torch.rand(2, 9, generator=generator), skip_masked=skip_masked),
    }[pattern]()
    weights, rows, positions = pairs.dense(torch.Size(pairs.shape).numel(), t.device)
    z = t[rows] + torch.randn(len(rows), 13, generator=generator, dtype=torch.float64)
    z[weights == 0] = float("nan")
    given = z.view(*pairs.shape, 13)
    return (list(given) if pattern == "ttt" else given), t, pairs, (z, t[rows], weights, positions)


@pytest.mark.parametrize("skip_masked", [True, False])
@pytest.mark.parametrize("pattern", ["ttt", "blocks", "weights"])
def test_work_lists(pattern, skip_masked):
    given, logits, pairs, (z, t, weights, positions) = make_call(pattern, skip_masked)
    target = fused_lk.Target.from_logits(logits)
    how = {"draft_sampling": Sampling(6), "target_sampling": Sampling(None, 0.9), "agreement_k": 2}
    made = fused_lk.lk_evaluate_from_logits(given, target, pairs=pairs, workspace_mb=0.01, **how)
    kept, weights = weights > 0, weights.double()
    want = {name: torch.zeros_like(weights) for name in expected(z[kept], t[kept], None, (6,), (None, 0.9), 2)}
    for name, x in expected(z[kept], t[kept], None, (6,), (None, 0.9), 2).items():
        want[name][kept] = x
    assert 0 < kept.sum() < len(kept)
    assert_measured(made, want)
    for k in range(pairs.num_positions):
        here = kept & (positions == k)
        assert made.sums["num_tokens"][k] == here.sum()
        torch.testing.assert_close(made.sums["weight"][k], weights[here].sum())
        for name in made.means:
            torch.testing.assert_close(made.sums[name][k], (weights * want[name])[here].sum())
    assert made.metrics()["acceptance_rate_0"] == pytest.approx(made.means["acceptance_rate"][0].item())
    if pattern == "ttt":
        chain = reference.prefix_products(want["acceptance_rate"].view(3, -1), kept.view(3, -1))
        blocks = kept.view(3, -1).any(0).sum()
        torch.testing.assert_close(made.acceptance_length, 1 + chain.sum() / blocks)
        assert 1 < made.greedy_acceptance_length < 4


def test_nothing_supervised():
    logits = torch.randn(4, 7)
    made = fused_lk.lk_evaluate_from_logits(logits, fused_lk.Target.from_logits(logits), mask=torch.zeros(4))
    assert made.means["acceptance_rate"] == 0
    assert made.acceptance_length == 1
    assert (made.token_acceptance == 0).all()


def pieces():
    """Draft logits, target logits and masks of four micro-batches; one has no token."""
    generator = torch.Generator().manual_seed(5)
    z, t = torch.randn(2, 4, 10, 17, generator=generator)
    return z, t, torch.tensor([[1.0], [0.3], [0.0], [2.0]]) * torch.rand(4, 10, generator=generator)


def evaluated(z, t, mask, group=None):
    how = {"draft_sampling": Sampling(5), "target_sampling": Sampling(9, 0.9), "agreement_k": 3, "group": group}
    return fused_lk.lk_evaluate_from_logits(z, fused_lk.Target.from_logits(t), mask=mask, **how)


def on_rank(rank):
    z, t, mask = (x[2 * rank : 2 * rank + 2] for x in pieces())
    parts = [evaluated(*piece) for piece in zip(z, t, mask, strict=True)]
    at_once = evaluated(z.flatten(0, 1), t.flatten(0, 1), mask.flatten(), dist.group.WORLD)
    return LKEvaluation.merged(parts).all_reduced(dist.group.WORLD).metrics(), at_once.metrics()


def test_micro_batches_and_ranks_add_up(tmp_path):
    z, t, mask = pieces()
    whole = evaluated(z.flatten(0, 1), t.flatten(0, 1), mask.flatten()).metrics()
    merged = LKEvaluation.merged(evaluated(*piece) for piece in zip(z, t, mask, strict=True))
    assert not merged.tokens
    assert merged.metrics() == pytest.approx(whole, rel=1e-5)
    for of_rank in processes.run(on_rank, tmp_path):
        for metrics in of_rank:
            assert metrics == pytest.approx(whole, rel=1e-5)


def test_no_full_logits():
    tokens, draft_size, target_size, workspace_mb = 96, 400, 640, 0.05  # 13,107 float32: a third of [96, 400]
    generator = torch.Generator().manual_seed(0)
    vocab = make_vocab(target_size, draft_size, generator)
    hidden, states = torch.randn(2, tokens, 8, generator=generator)
    head = fused_lk.TargetHead(torch.randn(target_size, 8, generator=generator), vocab)
    weight = torch.randn(draft_size, 8, generator=generator).requires_grad_()
    target = fused_lk.Target.from_hidden(states, head)
    sampling = {"draft_sampling": Sampling(50, 0.9), "target_sampling": Sampling(50, 0.9)}
    with Allocations() as seen:
        made = fused_lk.lk_evaluate(hidden, weight, target, workspace_mb=workspace_mb, agreement_k=8, **sampling)
    assert not made.token_acceptance.requires_grad
    assert seen.of_width(target_size), "the watcher saw nothing at all"
    assert not seen.at_least(int(workspace_mb * 2**20 / 4) + 1)
    whole = fused_lk.lk_evaluate(hidden, weight, target, agreement_k=8, **sampling)
    for name, x in whole.tokens.items():
        torch.testing.assert_close(made.tokens[name], x)


def test_what_the_caller_holds_stays():
    z, t = torch.randn(2, 6, 11)
    before, target = (z.clone(), t.clone()), fused_lk.Target.from_logits(t)
    for pairs in (None, fused_lk.Pairs(torch.arange(6) > 2)):
        sampling = {"draft_sampling": Sampling(2), "target_sampling": Sampling(None, 0.5)}
        fused_lk.lk_evaluate_from_logits(z, target, pairs=pairs, **sampling)
    assert torch.equal(z, before[0]) and torch.equal(t, before[1])


def test_under_autocast():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, states, head = (torch.randn(n, 8, generator=generator) for n in (10, 30, 10, 30))
    with torch.autocast(hidden.device.type, torch.bfloat16):
        target = fused_lk.Target.from_hidden(states, head)
        made = fused_lk.lk_evaluate(hidden, weight, target, draft_sampling=Sampling(4))
    want = fused_lk.lk_evaluate(
        hidden.bfloat16(),
        weight.bfloat16(),
        fused_lk.Target.from_hidden(states.bfloat16(), head.bfloat16()),
        draft_sampling=Sampling(4),
    )
    assert torch.equal(made.token_acceptance, want.token_acceptance)


NUMBERS = [
    ({"top_k": 0}, ValueError, "Use None for no limit"),
    ({"top_k": 2.5}, TypeError, "top_k to be a positive int"),
    ({"top_p": 0}, ValueError, "top_p to be a finite number > 0"),
    ({"top_p": 1.5}, ValueError, r"top_p in \(0, 1\]"),
]


@pytest.mark.parametrize(("numbers", "error", "match"), NUMBERS, ids=str)
def test_refused_numbers(numbers, error, match):
    with pytest.raises(error, match=match):
        Sampling(**numbers)


def test_refused_calls():
    logits = torch.randn(3, 7)
    target = fused_lk.Target.from_logits(logits)
    for options, error, match in (
        ({"draft_sampling": 5}, TypeError, "draft_sampling to be a Sampling"),
        ({"target_sampling": {"top_k": 5}}, TypeError, "target_sampling to be a Sampling"),
        ({"agreement_k": 9}, ValueError, "agreement_k <= 8"),
        ({"agreement_k": 0}, ValueError, "agreement_k to be a positive int"),
        ({"group": 3}, TypeError, "group to be a torch.distributed.ProcessGroup"),
        ({"mask": torch.ones(4)}, ValueError, "mask of shape"),
    ):
        with pytest.raises(error, match=match):
            fused_lk.lk_evaluate_from_logits(logits, target, **options)
    one = fused_lk.lk_evaluate_from_logits(logits, target)
    for parts in ([], [one, fused_lk.lk_evaluate_from_logits(logits, target, agreement_k=2)]):
        with pytest.raises(ValueError, match="same number of positions and agreement_k"):
            LKEvaluation.merged(parts)


def test_what_a_target_does_not_know():
    vocab = fused_lk.DraftVocab(torch.arange(12) % 4 > 0)
    logits, draft = torch.randn(3, 12), torch.randn(3, 9)
    values, ids = logits.log_softmax(1).topk(4)
    listed = fused_lk.Target.from_topk(ids, values, vocab)
    probs = fused_lk.Target.from_probs(logits.softmax(1)[:, vocab.t2d], vocab)
    for target, options, match in (
        (listed, {"target_sampling": Sampling(5)}, "a top_k of at most 4"),
        (listed, {"target_sampling": Sampling(None, 0.5)}, "a top_k of at most 4"),
        (listed, {"agreement_k": 5}, "agreement_k of at most 4"),
        (probs, {"target_sampling": Sampling(1)}, "no target_sampling with probabilities on a draft vocabulary"),
        (probs, {"agreement_k": 2}, "agreement_k of at most 1"),
    ):
        with pytest.raises(ValueError, match=match):
            fused_lk.lk_evaluate_from_logits(draft, target, **options)
    made = fused_lk.lk_evaluate_from_logits(draft, listed, target_sampling=Sampling(4, 0.9), agreement_k=4)
    want = expected(draft, logits, vocab.target_ids, (), (4, 0.9), 4)
    assert_measured(made, want, atol=1e-5)
