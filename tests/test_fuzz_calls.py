"""Random calls of `lk_loss` against the oracle: every target, work list, head, objective, reduction, layout and plan.

The same examples in every run.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_outputs_agree, ragged_top_k

import fused_lk
from fused_lk.rows import plain

NEG_INF = float("-inf")


def of_divergences(d):
    """An objective that no name stands for, of what is never infinite."""
    return d.terms["jsd"].square() + d.terms["l1"] * (1 - d.acceptance)


OBJECTIVES = [
    *("kl", "tv", "alpha", "lambda", "lambda", "soft_ce", "ce", "rkl", "jsd", "skl", "l1"),
    *({"ce": 0.1, "l1": 0.9}, {"lambda": 0.5, "jsd": 2.0}, {"kl": 0.3, "alpha": 0.2, "rkl": 0.1, "soft_ce": 1.0}),
    of_divergences,
]


@st.composite
def whole_calls(draw):
    """`(hidden, u, as_list, (weight, bias, M), target, options of the loss)` of float64, in strides as trainers have
    them. u and M are those of `low_rank`; what a draft lacks is None."""
    seed = draw(st.integers(0, 2**20), label="seed")
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    steps, tokens = draw(st.integers(1, 3), label="steps"), draw(st.integers(0, 4), label="tokens")
    hidden_size, full = draw(st.integers(1, 4), label="H"), draw(st.integers(1, 40), label="V_target")
    t2d = torch.rand(full, generator=generator) < 0.7
    t2d[-1] = True
    truncated = draw(st.booleans(), label="truncated")
    vocab = fused_lk.DraftVocab(t2d) if truncated else None
    size = vocab.draft_size if truncated else full
    kind = draw(st.sampled_from(["hidden", "cached", "logits", "probs", "topk"]), label="target")
    shares_rows = draw(st.booleans(), label="shared target rows")
    rows = draw(st.integers(1, 4), label="target rows") if shares_rows else steps * tokens
    temperature = draw(st.sampled_from([1.0, 0.8]), label="temperature") if kind in ("hidden", "logits") else 1.0
    renormalize = {"renormalize": draw(st.booleans(), label="renormalize")}
    states, head = randn(rows, 3), randn(full, 3)
    logits = (states @ head.T) * draw(st.sampled_from([1.0, 10.0]), label="target spread")
    if kind in ("logits", "probs") and draw(st.booleans(), label="impossible tokens"):
        logits[torch.rand(rows, full, generator=generator) < 0.3] = NEG_INF
        logits[:, 0] = 0.0
    log_probs = logits.log_softmax(-1)
    if kind in ("hidden", "cached"):
        head = fused_lk.TargetHead(head, vocab)
        given = {"cache": kind == "cached", "temperature": temperature}
        target = fused_lk.Target.from_hidden(states, head, **given, **renormalize)
    elif kind == "logits":
        target = fused_lk.Target.from_logits(logits, vocab, temperature=temperature, **renormalize)
    elif kind == "probs":
        probs = log_probs.exp()[:, t2d] if truncated else log_probs.exp()
        target = fused_lk.Target.from_probs(probs, vocab, **renormalize)
    else:
        given = {"temperature": draw(st.sampled_from([1.0, 0.8]), label="temperature of the k")}
        of_logits = draw(st.booleans(), label="logits of the k")
        if of_logits:
            given["log_normalizer"] = (logits / given["temperature"]).logsumexp(-1)
        elif not renormalize["renormalize"]:
            given = {}
        top = ragged_top_k(logits if of_logits else log_probs, min(full, 3), generator)
        given["restrict_draft"] = draw(st.booleans(), label="restrict draft")
        target = fused_lk.Target.from_topk(*top, vocab or full, **given, **renormalize)

    shape = (steps, tokens)
    layout = draw(st.sampled_from(["contiguous", "strided", "transposed", "list"]), label="layout")
    hidden = randn(*shape, hidden_size) * draw(st.sampled_from([1.0, 5.0]), label="draft spread")
    if layout == "strided":
        hidden = hidden.repeat_interleave(2, -1)[..., ::2]
    elif layout == "transposed":
        hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    weight = randn(hidden_size, size).T if draw(st.booleans(), label="column-major head") else randn(size, hidden_size)
    bias = randn(size) if draw(st.booleans(), label="bias") else None
    rank = draw(st.sampled_from([0, 0, 2]), label="low rank")
    u, second = (randn(*shape, rank), randn(size, rank)) if rank else (None, None)

    weights = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.7)
    mask = draw(st.sampled_from([None, weights > 0, weights, weights.double()]), label="mask")
    num_positions = draw(st.integers(1, 3), label="positions")
    arguments = {"mask": mask, "skip_masked": draw(st.booleans(), label="skip masked")}
    if shares_rows:
        arguments["target_rows"] = torch.randint(-1, rows, shape, generator=generator)
    if num_positions > 1:
        arguments["positions"] = torch.randint(num_positions, shape, generator=generator)
        arguments["num_positions"] = num_positions
    options = {"pairs": fused_lk.Pairs(**arguments)}
    if num_positions == 1 and not shares_rows and draw(st.booleans(), label="mask alone"):
        options = {"mask": mask}
        num_positions = steps if layout == "list" else 1
    objective = options["objective"] = draw(st.sampled_from(OBJECTIVES), label="objective")
    if "lambda" in (objective if isinstance(objective, dict) else [objective]):
        lambdas = [
            None,
            0.0,
            0.3,
            torch.rand(num_positions, generator=generator),
            torch.rand(shape, generator=generator),
        ]
        options["kl_weight"] = draw(st.sampled_from(lambdas), label="kl_weight")
        options["lambda_per"] = draw(st.sampled_from(["position", "token"]), label="lambda per")
        options["eta"] = draw(st.sampled_from([0.0, 3.0]), label="eta")
    terms = ("jsd", "l1") if objective is of_divergences else draw(st.sampled_from([(), ("l1", "rkl")]), label="terms")
    labels = torch.randint(-3, full, shape, generator=generator)
    options |= {"terms": terms, "labels": draw(st.sampled_from([None, labels]), label="labels")}
    options["jsd_beta"] = draw(st.sampled_from([0.5, 0.2]), label="jsd beta")
    options["logit_scale"] = draw(st.sampled_from([1.0, 1.0, 0.3]), label="logit scale")
    options["softcap"] = draw(st.sampled_from([None, None, 4.0]), label="softcap")
    options["reduction"] = draw(st.sampled_from(["mean", "position", "sum", "none"]), label="reduction")
    options["denominator"] = draw(st.sampled_from([None, 7.0, torch.rand(num_positions) + 1]), label="denominator")
    options["position_decay"] = draw(st.sampled_from([1.0, 0.8]), label="decay")
    options["draft_temperature"] = draw(st.sampled_from([1.0, 0.7]), label="draft temperature")
    return hidden, u, layout == "list", (weight, bias, second), target, options


@pytest.mark.parametrize("impl", ["triton", "torch"])
@settings(max_examples=50)
@given(
    case=whole_calls(),
    workspace_mb=st.sampled_from(["auto", 0.002, 0.01]),
    frozen=st.sampled_from(["nothing", "nothing", "hidden", "head"]),
    recompute=st.booleans(),
)
def test_whole_calls(impl, case, workspace_mb, frozen, recompute):
    """`lk_loss` and its gradients against the oracle, whatever the target, work list, objective and reduction."""
    hidden, u, as_list, head, target, options = case
    results = []
    for more in (
        {"impl": impl, "workspace_mb": workspace_mb, "plan": "recompute" if recompute else "auto"},
        {"impl": "reference"},
    ):
        states = [None if x is None else x.detach().requires_grad_(frozen != "hidden") for x in (hidden, u)]
        weight, bias, second = (None if x is None else x.detach().requires_grad_(frozen != "head") for x in head)
        draft, of_second = (list(x.unbind(0)) if as_list and x is not None else x for x in states)
        given = {"bias": bias, "low_rank": None if u is None else (of_second, second)}
        with mock.patch.object(plain, "BLOCK_ELEMENTS", 64):  # a few rows
            out = fused_lk.lk_loss(draft, weight, target, **given, **options, **more)
            upstream = torch.linspace(1.5, 2.5, out.loss.numel(), dtype=out.loss.dtype).view(out.loss.shape)
            leaves = [x for x in (*states, weight, bias, second) if x is not None and x.requires_grad]
            results.append((out, torch.autograd.grad((out.loss * upstream).sum(), leaves)))
    (ours, gradients), (oracle, expected) = results
    assert_outputs_agree(ours, oracle, 1e-9, 1e-9)
    assert ours.term_sums.keys() == oracle.term_sums.keys()
    for name, want in oracle.term_sums.items():
        torch.testing.assert_close(ours.term_sums[name], want, atol=1e-9, rtol=1e-9, equal_nan=True)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
