"""`torch.compile(fullgraph=True)`: one graph, no recompilation for another token count, the numbers of eager mode."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from problems import make_problem, make_vocab

import fused_lk
from fused_lk.graph import operators
from fused_lk.targets.hidden import stream_hidden
from fused_lk.targets.logits import stream_logits
from fused_lk.walk.problem import linear

HIDDEN, DRAFT, TARGET, STEPS = 6, 37, 53, 3
MODES = {
    "position": {},
    "token": {"lambda_per": "token", "position_decay": 0.8},
    "given": {"kl_weight": 0.3, "denominator": 7.0},
    "kl": {"objective": "kl", "reduction": "sum"},
    "per position": {"objective": "tv", "reduction": "position"},
    "per token": {"objective": "alpha", "reduction": "none", "draft_temperature": 0.8},
}


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def setup():
    """A target's head over a truncated vocabulary, and a draft's weight and bias."""
    generator = torch.Generator().manual_seed(0)
    vocab = make_vocab(TARGET, DRAFT, generator)
    head = fused_lk.TargetHead(torch.randn(TARGET, HIDDEN, generator=generator), vocab)
    return head, torch.randn(DRAFT, HIDDEN, generator=generator), torch.randn(DRAFT, generator=generator)


def batch(num_tokens, seed=0):
    """K tensors of hidden states, target states, a mask, shifted target rows and positions."""
    generator = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(num_tokens, HIDDEN, generator=generator) for _ in range(STEPS)]
    states = torch.randn(num_tokens, HIDDEN, generator=generator)
    mask = torch.rand(STEPS, num_tokens, generator=generator) > 0.3
    rows = torch.arange(num_tokens) + torch.arange(STEPS).unsqueeze(1)
    rows = torch.where(rows < num_tokens, rows, -1)
    return hidden, states, mask, rows, torch.arange(STEPS).unsqueeze(1).expand(STEPS, num_tokens)


def step(head, impl, **options):
    """All of a training step's loss, target construction included, as one function of tensors."""

    def run(hidden, weight, bias, states, mask, rows, positions):
        target = fused_lk.Target.from_hidden(states, head, impl=impl)
        pairs = fused_lk.Pairs(mask, rows, positions, STEPS)
        out = fused_lk.lk_loss(hidden, weight, target, bias=bias, pairs=pairs, impl=impl, **options)
        per_position = (out.acceptance_rate, out.accuracy, out.kl, out.kl_weight, out.num_tokens, out.num_unsupported)
        return out.loss, *per_position, out.token_log_acceptance, out.draft_token_ids

    return run


def results(run, weight, bias, num_tokens):
    """What `run` returns, and gradients under an upstream gradient of 2."""
    hidden, *rest = batch(num_tokens, seed=num_tokens)
    leaves = [*(x.requires_grad_() for x in hidden), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    out = run(leaves[:STEPS], *leaves[STEPS:], *rest)
    return [*out, *torch.autograd.grad(2 * out[0].sum(), leaves)]


def assert_same(got, expected):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_one_graph_for_every_token_count(mode):
    head, weight, bias = setup()
    run = step(head, "torch", **MODES[mode])
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for num_tokens in (8, 12, 9):
        assert_same(results(compiled, weight, bias, num_tokens), results(run, weight, bias, num_tokens))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1  # all compiled at the first call


def test_static_shapes_become_dynamic_once():
    head, weight, bias = setup()
    run = step(head, "torch")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for num_tokens in (8, 12, 9, 15):
        assert_same(results(compiled, weight, bias, num_tokens), results(run, weight, bias, num_tokens))
    assert counter.frame_count == 2


def test_through_inductor():
    head, weight, bias = setup()
    for mode in ("position", "given"):
        run = step(head, "torch", **MODES[mode])
        compiled = torch.compile(run, fullgraph=True)
        assert_same(results(compiled, weight, bias, 8), results(run, weight, bias, 8))


@pytest.mark.parametrize("mode", ["position", "given"])
def test_the_triton_kernels_in_a_graph(mode):
    head, weight, bias = setup()
    run = step(head, "triton", **MODES[mode])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, weight, bias, 6), results(run, weight, bias, 6))


@pytest.mark.parametrize(
    "kind", ["cached", "shared_hidden", "logits", "shared_logits", "probs", "topk", "restricting_topk"]
)
def test_targets_made_outside(kind):
    problem = make_problem(kind=kind, work="shifted", bias=False)

    def run(h, w, mask, rows):
        pairs = fused_lk.Pairs(mask, rows)
        d = fused_lk.lk_divergences(h, w, problem.target, pairs=pairs, draft_temperature=0.7)[1]
        return d.log_acceptance, d.kl, d.acceptance, d.draft_token_ids

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, got = [], []
    for function, into in ((run, expected), (compiled, got)):
        leaves = problem.sources[0].clone().requires_grad_(), problem.weight.clone().requires_grad_()
        out = function(*leaves, problem.rows["mask"], problem.rows["target_rows"])
        finite = torch.where(out[0].isfinite(), out[0], 0)
        into += [*out, *torch.autograd.grad((finite * torch.arange(10) + out[1]).sum(), leaves)]
    assert_same(got, expected)


def test_pairs_made_outside_and_logits_in_hand():
    problem = make_problem(kind="probs", work="shifted", bias=False)
    logits = problem.sources[0] @ problem.weight.T

    def run(z):
        out = fused_lk.lk_loss_from_logits(z, problem.target, **problem.options, lambda_per="token")
        return out.loss, out.acceptance_rate, out.accuracy

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    out, expected = compiled(leaves[0]), run(leaves[1])
    out[0].backward()
    expected[0].backward()
    assert_same([*out, leaves[0].grad], [*expected, leaves[1].grad])


def test_the_module_without_gradients_and_frozen_sides():
    head, weight, bias = setup()
    loss = fused_lk.LKLoss("alpha", impl="torch")
    hidden, states, *_ = batch(8)

    def run(h, w, b):
        return loss(h, w, fused_lk.Target.from_hidden(states, head), bias=b).loss

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same([compiled(hidden[0], weight, bias)], [run(hidden[0], weight, bias)])
    for frozen in itertools.combinations(range(3), 2):
        gradients = []
        for function in (run, compiled):
            leaves = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate((hidden[0], weight, bias))]
            function(*leaves).backward()
            gradients.append([x.grad for x in leaves if x.requires_grad])
        assert_same(*gradients)


def test_rows_of_a_target_that_are_not_there_raise_from_the_graph():
    problem = make_problem(work="shifted", bias=False)
    rows = problem.rows["target_rows"].clone()
    rows[0, 0] = 99
    compiled = torch.compile(
        lambda h, w, rows: fused_lk.lk_divergences(h, w, problem.target, pairs=fused_lk.Pairs(target_rows=rows)).kl,
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(ValueError, match="target_rows below 10"):
        compiled(problem.sources[0], problem.weight, rows)


@pytest.mark.parametrize("kind", ["hidden", "topk"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("work", ["identity", "shifted", "kept"])
def test_opcheck(kind, dtype, work):
    problem = make_problem(kind=kind, work=work, dtype=dtype)
    pairs = problem.options.get("pairs")
    asked = linear(
        problem.sources[0].clone().requires_grad_(), problem.weight.clone().requires_grad_(), problem.bias.clone(),
        problem.target, "compute", None, pairs, 0.9, "torch", 0.01,
    )  # fmt: skip
    # Of a compacted list some kept rows stay unwritten, which opcheck would compare.
    asked = replace(asked, scores_argmax=kind == "topk", keep=0 if work == "shifted" else 2**20)
    flat = operators._flat(asked, operators.prepare(asked, False)[0], saves=True)
    torch.library.opcheck(operators.row_divergences.operator, flat)
    acc = torch.promote_types(torch.promote_types(dtype, torch.float32), problem.target.tiles.dtype)
    weights = torch.linspace(0, 1, asked.num_rows, dtype=acc)
    for rule in ((weights, ["lambda"], [1.0], 3.0, 1.0), (None, ["alpha"], [1.0], 3.0, 1.0)):
        torch.library.opcheck(operators.one_pass_loss.operator, (*flat, weights, *rule))
    draft, *rest = flat
    flat = ([x.detach() for x in draft], *rest)
    stats, kept = operators.row_divergences(*flat)
    assert len(kept) == (0 if work == "shifted" else 2 if kind == "hidden" else 1)
    wanted = list(asked.needs)
    torch.library.opcheck(
        operators.row_gradients.operator, (*flat, stats[:4], kept, wanted, torch.stack([weights, weights]))
    )


def test_opcheck_of_the_targets_pass():
    head, *_ = setup()
    _, states, *_ = batch(8)
    t2d, ids = head.vocab.t2d, head.vocab.target_ids
    mask = torch.ones(8, dtype=torch.bool)  # of all rows: opcheck holds a NaN for different from itself
    for vocab, cache in (((None, None, None), False), ((mask, t2d, ids), True), ((None, None, None), True)):
        torch.library.opcheck(
            stream_hidden.operator,
            (states, [head.weight], None, *vocab, 0.8, 0.5 if cache else None, "torch", None, False, cache),
        )
    torch.library.opcheck(stream_logits.operator, (states @ head.weight.T, t2d, 0.8, "torch"))


def token_batch(num_sequences=2, length=7):
    """Hidden states of K steps, a target's logits and top tokens, a loss mask, sequence ids, anchors."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(STEPS, num_sequences, length, HIDDEN, generator=generator)
    logits = torch.randn(num_sequences, length, TARGET, generator=generator)
    mask = torch.rand(num_sequences, length, generator=generator) > 0.3
    sequence_ids = (torch.arange(length) >= 4).long().expand(num_sequences, length).contiguous()
    return hidden, logits, mask, sequence_ids, torch.tensor([[0, 2], [4, -1]])


LISTS = {
    "ttt": lambda mask, ids, anchors, kept: fused_lk.Pairs.ttt(mask, STEPS, sequence_ids=ids, **kept),
    "ttt of integers": lambda mask, ids, anchors, kept: fused_lk.Pairs.ttt(mask.long(), STEPS, 0, **kept),
    "blocks": lambda mask, ids, anchors, kept: fused_lk.Pairs.blocks(anchors, STEPS, mask, sequence_ids=ids, **kept),
    "mask": lambda mask, ids, anchors, kept: fused_lk.Pairs(mask.int().expand(STEPS, -1, -1), **kept),
}


@pytest.mark.parametrize("skip_masked", [True, False])
@pytest.mark.parametrize("make", LISTS)
def test_work_lists_and_top_k_made_inside(make, skip_masked):
    """What reads contents in eager mode, to check them, is traced without."""
    head, weight, _ = setup()
    hidden, logits, mask, ids, anchors = token_batch()
    hidden = hidden[:, :, :2].permute(1, 2, 0, 3).contiguous() if make == "blocks" else hidden
    top = logits.log_softmax(-1).topk(5)
    rows = torch.cat([top.indices] * STEPS), torch.cat([top.values] * STEPS)  # a list without rows: one row each
    given = rows if make == "mask" else (top.indices, top.values)

    def run(h, w, token_ids, log_probs, mask, ids, anchors):
        pairs = LISTS[make](mask, ids, anchors, {} if skip_masked else {"skip_masked": False})
        target = fused_lk.Target.from_topk(token_ids, log_probs, head.vocab)
        out = fused_lk.lk_loss(h, w, target, pairs=pairs, position_decay=0.8)
        return out.loss, out.acceptance_rate, out.accuracy, out.num_tokens, out.token_log_acceptance

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, got = [], []
    for function, into in ((run, expected), (compiled, got)):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = function(*leaves, *given, mask, ids, anchors)
        into += [*out, *torch.autograd.grad(out[0], leaves)]
    assert expected[3].sum() > 0
    assert_same(got, expected)


@pytest.mark.parametrize("work", ["", "mask"])
def test_a_list_is_one_position_per_tensor_in_a_graph(work):
    _, weight, _ = setup()
    hidden, _, mask, _, _ = batch(6)
    probs = torch.rand(STEPS * 6, DRAFT, generator=torch.Generator().manual_seed(0)) / DRAFT
    given = {"mask": mask.long()} if work else {}

    def run(hidden, given):
        out = fused_lk.lk_loss(hidden, weight, fused_lk.Target.from_probs(probs), position_decay=0.7, **given)
        return out.loss, out.acceptance_rate, out.kl_weight, out.num_tokens

    got = torch.compile(run, fullgraph=True, backend="aot_eager")(hidden, given)
    assert got[1].shape == (STEPS,)
    assert_same(got, run(hidden, given))


def test_contents_are_not_read_in_a_graph(monkeypatch):
    """Asked for or not: a graph has no contents to read. The module's options may have been numbers of NumPy's."""
    monkeypatch.setenv("FUSED_LK_VALIDATE", "1")
    head, weight, _ = setup()
    hidden, states, mask, rows, positions = batch(6)
    loss = fused_lk.LKLoss(eta=np.float32(2.0), position_decay=np.float64(0.5), draft_temperature=np.float32(0.5))

    def run(hidden, states, denominator):
        ids = torch.zeros(6, dtype=torch.long)
        target = fused_lk.Target.from_hidden(states, head, log_normalizer=30 + states.sum(-1), token_ids=ids)
        pairs = fused_lk.Pairs(mask, rows, positions, STEPS)
        return loss(hidden, weight, target, pairs=pairs, denominator=denominator).loss

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    counts = torch.tensor([3, 4, 5])
    assert_same([compiled(hidden, states, counts)], [run(hidden, states, counts)])
