"""The largest probabilities and the target's argmax, which `top1=True` returns from the pass that is made anyway."""

from __future__ import annotations

import pytest
import torch
from problems import TARGET_KINDS, make_problem

import fused_lk

NAMES = ("draft_top1", "target_top1", "target_token_ids")


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("work", ["identity", "shifted", "kept"])
@pytest.mark.parametrize("kind", TARGET_KINDS)
def test_top1_is_what_an_evaluation_measures(kind, work, impl):
    problem = make_problem(kind=kind, work=work, stacked=work != "identity")
    sources, weight, bias = problem.leaves()
    given = sources if problem.stacked else sources[0]
    d = fused_lk.lk_divergences(
        given, weight, problem.target, bias=bias, **{**problem.options, "impl": impl, "top1": True}
    )
    with torch.no_grad():
        log_p = problem.target.dense_log_probs()
        weights, rows, _ = (problem.options.get("pairs") or fused_lk.Pairs()).dense(d.kl.numel(), torch.device("cpu"))
        kept, z = weights > 0, torch.cat([x @ weight.T + bias for x in sources])
    known = problem.target.token_ids.reshape(-1)[rows]
    log_p = log_p[rows]
    if kind == "restricting_topk":  # q is renormalised on what the target lists
        answered = (log_p > float("-inf")).any(1, keepdim=True)
        z = torch.where((log_p > float("-inf")) | ~answered, z, float("-inf"))
    expected = (z.softmax(1).amax(1), log_p.exp().amax(1), known)
    for name, want in zip(NAMES, expected, strict=True):
        got = getattr(d, name)
        torch.testing.assert_close(got.flatten(), torch.where(kept, want, 0), rtol=1e-9, atol=1e-12, msg=name)
        assert got.shape == d.kl.shape and not got.requires_grad
    assert torch.equal(d[0].target_top1, d.target_top1[0])


def test_only_where_it_is_asked_for():
    problem = make_problem(kind="shared_hidden")
    d, _ = problem.run(fused_lk.lk_divergences, lambda d: d.kl.sum())
    assert [getattr(d, name) for name in NAMES] == [None] * 3 and d[0].draft_top1 is None
    with pytest.raises(TypeError, match="top1"):
        problem.run(fused_lk.lk_divergences, lambda d: d.kl.sum(), top1="no")


def test_unknown_argmax_and_logits_in_hand():
    z, t = torch.randn(4, 7), torch.randn(4, 9)
    vocab = fused_lk.DraftVocab(torch.arange(9) < 7)
    target = fused_lk.Target.from_hidden(t, torch.eye(9), vocab=vocab, log_normalizer=t.logsumexp(1))
    d = fused_lk.lk_divergences_from_logits(z, target, top1=True)
    assert (d.target_token_ids == -1).all()
    torch.testing.assert_close(d.target_top1, t.softmax(1)[:, :7].amax(1))
    torch.testing.assert_close(d.draft_top1, z.softmax(1).amax(1))


def test_in_a_graph():
    problem = make_problem(kind="shared_logits", dtype=torch.float32)
    sources, weight, bias = problem.leaves()

    def call(hidden):
        d = fused_lk.lk_divergences(hidden, weight, problem.target, bias=bias, top1=True)
        return d.draft_top1, d.target_top1, d.target_token_ids

    for got, want in zip(
        torch.compile(call, backend="aot_eager", fullgraph=True)(sources[0]), call(sources[0]), strict=True
    ):
        torch.testing.assert_close(got, want)
