"""Every term beyond log alpha and KL: on hard rows, through whole calls, in mixes, with labels, as published."""

from __future__ import annotations

import math
from pathlib import Path

import hard_rows
import peers
import pytest
import torch
from fused_lk.kernels import launch
from problems import make_problem, make_vocab

import fused_lk
from fused_lk import reference
from fused_lk.objective import COMPONENTS, FURTHER
from fused_lk.rows import plain
from fused_lk.rows.interface import MEASURED, TERMS, LogitRows, Transform
from fused_lk.walk.plan import empty_statistics

IMPLS = ["torch", "triton"]
OPS = {"torch": plain, "triton": launch}
EPS = torch.finfo(torch.float32).eps
# Where q and pt are equal up to rounding, l1 has any of many gradients.
TIES = ("near_ties", "equal_up_to_rounding", "equal", "two_tops")
ROWS, SIZE = 9, 301


def row_operations(ops, z, t, labels=None, beta=0.5, terms=TERMS):
    """The statistics, and the gradient of each term alone."""
    out = empty_statistics(len(z), terms, torch.promote_types(z.dtype, torch.float32), z.device, True)
    rows = LogitRows(z, t, None, None, Transform(), Transform(), labels=labels, jsd_beta=beta)
    ops.stats(rows, terms, out)
    gradients = {}
    for i, name in enumerate(terms):
        d = torch.zeros(len(terms), len(z), dtype=out.values.dtype)
        d[i] = 1.0
        gradients[name] = torch.empty_like(z)
        ops.gradient(rows, terms, out, d, gradients[name])
    return out, gradients


def eager(z, t, labels, beta):
    """Values, and the gradient of each, where they are finite."""
    leaf = z.clone().requires_grad_()
    values = reference.further_divergences(leaf, reference.target_log_probs(t), labels, beta)
    gradients = {
        name: torch.autograd.grad(x[x.isfinite()].sum(), leaf, retain_graph=True)[0] for name, x in values.items()
    }
    return {name: x.detach() for name, x in values.items()}, gradients


@pytest.mark.parametrize("beta", [0.5, 0.1, 0.97])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("member", hard_rows.FAMILY)
def test_hard_rows(member, impl, beta):
    """Errors within 1.5 times those of eager code in the same dtype, and a few roundings of what is added up."""
    z, t = hard_rows.make(member, ROWS, SIZE)
    labels = torch.randint(-1, SIZE, (ROWS,), generator=torch.Generator().manual_seed(1)) if beta < 0.5 else None
    want, d_want = eager(z, t, labels, beta)
    theirs, d_theirs = eager(z.float(), t.float(), labels, beta)
    out, gradients = row_operations(OPS[impl], z.float(), t.float(), labels, beta)
    for name in FURTHER:
        got, finite = out.values[TERMS.index(name)], want[name].isfinite()
        assert torch.equal(got.isfinite(), finite)
        assert gradients[name].isfinite().all()
        assert name != "rkl" or not gradients[name][~finite].any()
        largest = (z - z.logsumexp(1, keepdim=True)).masked_fill(z == -torch.inf, 0).abs().amax(1)
        factor = 1 + (want[name].abs() + largest if name in ("soft_ce", "ce", "rkl") else 0 * largest)
        error = (got - want[name]).abs()
        assert (error <= 1.5 * (theirs[name] - want[name]).abs() + 16 * EPS * factor)[finite].all(), name
        if name != "l1" or member not in TIES:
            error = (gradients[name] - d_want[name]).abs().amax(1)
            allowed = 1.5 * (d_theirs[name] - d_want[name]).abs().amax(1) + 16 * EPS * factor
            assert (error <= allowed)[finite].all(), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("member", ["sure_of_the_same", "sure_alike"])
def test_sure_rows_keep_their_digits(member, impl):
    """The gradient in the column of q's maximum, which is a difference of nearly equal numbers."""
    z, t = hard_rows.make(member, ROWS, SIZE)
    _, d_want = eager(z, t, None, 0.5)
    _, gradients = row_operations(OPS[impl], z.float(), t.float())
    column = z.argmax(1, keepdim=True)
    for name in ("ce", "soft_ce", "rkl", "l1", "skl") if member == "sure_of_the_same" else ("ce",):
        got, want = gradients[name].gather(1, column), d_want[name].gather(1, column)
        torch.testing.assert_close(got.double(), want, rtol=2e-3 if name != "l1" else 1e-4, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("member", hard_rows.FAMILY)
def test_l1_is_twice_the_total_variation(member, impl):
    """Of p = pt, ties included: the same ramp decides them."""
    z, t = (x.float() for x in hard_rows.make(member, ROWS, SIZE))
    out, gradients = row_operations(OPS[impl], z, t)
    log_acceptance, l1 = out.values[0], out.values[TERMS.index("l1")]
    torch.testing.assert_close(l1, -2 * torch.expm1(log_acceptance), rtol=1e-4, atol=1e-6)
    want = -2 * torch.where(log_acceptance == -torch.inf, 0, log_acceptance).exp().unsqueeze(1)
    torch.testing.assert_close(gradients["l1"], want * gradients["log_acceptance"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_each_term_alone_and_in_another_order(impl):
    z, t = (x.float() for x in hard_rows.make("trained", ROWS, SIZE))
    whole, gradients = row_operations(OPS[impl], z, t)
    for terms in (TERMS[::-1], *((name,) for name in TERMS)):
        out, alone = row_operations(OPS[impl], z, t, terms=terms)
        for i, name in enumerate(terms):
            torch.testing.assert_close(out.values[i], whole.values[TERMS.index(name)])
            torch.testing.assert_close(alone[name], gradients[name])


@pytest.mark.parametrize("impl", IMPLS)
def test_reverse_kl_of_what_the_target_cannot_say(impl):
    """It is infinite, and has no gradient; other rows keep theirs."""
    z, t = torch.randn(3, 11), torch.randn(3, 11)
    t[1, 4] = -torch.inf
    z[2, 5] = t[2, 5] = -torch.inf
    out, gradients = row_operations(OPS[impl], z, t)
    value = out.values[TERMS.index("rkl")]
    assert value.isinf().tolist() == [False, True, False]
    assert [bool(x.any()) for x in gradients["rkl"]] == [True, False, True]
    assert gradients["rkl"].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_skewed_kl_between_its_limits(impl):
    """KL as b goes to 0, and -log b where q and p have no token in common and KL is infinite; jsd is made of it."""
    z, t = (x.float() for x in hard_rows.make("normal", ROWS, SIZE))
    z[0, : SIZE // 2], t[0, SIZE // 2 :] = -torch.inf, -torch.inf
    out, gradients = row_operations(OPS[impl], z, t, beta=0.25)
    values = dict(zip(TERMS, out.values, strict=True))
    assert values["kl"][0] == torch.inf
    assert values["skl"][0].item() == pytest.approx(math.log(4), rel=1e-6)
    assert not gradients["skl"][0].any()
    assert (values["skl"][1:] < 0.75 * values["kl"][1:]).all()  # KL is convex in its second argument
    log_q, log_pt = z.double().log_softmax(1), t.double().log_softmax(1)
    log_m = torch.logaddexp(log_pt + math.log(0.25), log_q + math.log(0.75))
    of_q = (log_q.exp() * (log_q - log_m)).sum(1)
    torch.testing.assert_close(values["jsd"][1:].double(), (0.25 * values["skl"] + 0.75 * of_q)[1:])
    out, gradients = row_operations(OPS[impl], z, t, beta=1e-9)
    values = dict(zip(TERMS, out.values, strict=True))
    torch.testing.assert_close(values["skl"][1:], values["kl"][1:])
    torch.testing.assert_close(gradients["skl"][1:], gradients["kl"][1:])


MIX = {"ce": 0.1, "l1": 0.9, "jsd": 0.3, "skl": 0.6, "rkl": 0.2, "soft_ce": 0.4, "alpha": 0.5}


@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("objective", [*FURTHER, "mix"])
def test_gradcheck(objective, impl, plan):
    problem = make_problem(num_tokens=3, draft_size=5, target_size=7, hidden_size=2)
    sources, weight, bias = problem.leaves()
    objective = MIX if objective == "mix" else objective

    def call(hidden, weight, bias):
        return fused_lk.lk_loss(
            hidden, weight, problem.target, bias=bias, objective=objective, plan=plan, impl=impl,
            draft_temperature=0.9, jsd_beta=0.3, labels=torch.tensor([2, 5, -100]),
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(call, (sources[0], weight, bias), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("workspace_mb", ["auto", 0.002], ids=["whole", "blocks"])
@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
@pytest.mark.parametrize("work", ["identity", "shifted", "kept"])
@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_whole_calls(kind, work, plan, workspace_mb, impl):
    """Every walk against the oracle: values, metrics and gradients, in float64.

    A block of columns has 64 at the least: of 129, the last has one.
    """
    sizes = {"num_tokens": 5, "draft_size": 129, "target_size": 170} if workspace_mb != "auto" else {}
    problem = make_problem(kind=kind, work=work, **sizes)
    mix = {name: x for name, x in MIX.items() if kind != "topk" or name != "rkl"}  # that is infinite
    last = sizes.get("target_size", 53)
    labels = torch.randint(-5, last, problem.sources[0].shape[:-1], generator=torch.Generator().manual_seed(3))
    options = {"objective": mix, "jsd_beta": 0.3, "labels": labels, "terms": ("l1",)}
    want, d_want = problem.run(impl="reference", **options)
    got, d_got = problem.run(impl=impl, plan=plan, workspace_mb=workspace_mb, **options)
    torch.testing.assert_close(got.loss, want.loss)
    assert set(got.term_sums) == set(mix) - {"alpha"}
    for name, x in want.term_sums.items():
        torch.testing.assert_close(got.term_sums[name], x)
    assert got.metrics().keys() == want.metrics().keys()
    assert "l1_0" in got.metrics()
    for x, y in zip(d_got, d_want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_primitive(impl):
    problem = make_problem(work="shifted")
    terms = FURTHER

    def scalar(d):
        assert tuple(d.terms) == terms
        return sum((i + 1) * x.sum() for i, x in enumerate(d.terms.values()))

    want, d_want = problem.run(fused_lk.lk_divergences, scalar, impl="reference", terms=terms)
    got, d_got = problem.run(fused_lk.lk_divergences, scalar, impl=impl, terms=terms)
    assert len(repr(got)) < 700  # by their shapes, not token by token
    for name in terms:
        torch.testing.assert_close(got.terms[name], want.terms[name])
        torch.testing.assert_close(got[0].terms[name], want.terms[name][0])
    for x, y in zip(d_got, d_want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
def test_a_graph(plan, impl):
    problem = make_problem(work="shifted")
    labels = torch.randint(-5, 53, problem.sources[0].shape[:-1], generator=torch.Generator().manual_seed(3))
    for given in (labels, None):
        options = {"objective": MIX, "jsd_beta": 0.3, "labels": given, "plan": plan, "impl": impl}

        def call(*arguments, options=options, **more):
            return fused_lk.lk_loss(*arguments, **{**more, **options})

        want, d_want = problem.run(call)
        got, d_got = problem.run(torch.compile(call, fullgraph=True, backend="aot_eager"))
        torch.testing.assert_close(got.loss, want.loss)
        for x, y in zip(d_got, d_want, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_mix_is_the_sum_of_its_parts(impl):
    problem = make_problem(work="weighted")
    parts = {"kl": 0.2, "tv": 0.3, "lambda": 0.7, **MIX}
    whole, gradient = problem.run(objective=parts, kl_weight=0.3, impl=impl)
    runs = [
        problem.run(objective=name, impl=impl, **({"kl_weight": 0.3} if name == "lambda" else {})) for name in parts
    ]
    loss = sum(x * out.loss for x, (out, _) in zip(parts.values(), runs, strict=True))
    torch.testing.assert_close(whole.loss, loss)
    for i, x in enumerate(gradient):
        torch.testing.assert_close(x, sum(w * d[i] for w, (_, d) in zip(parts.values(), runs, strict=True)))
    torch.testing.assert_close(whole.kl_weight, torch.full_like(whole.kl_weight, 0.2 + 0.7 * 0.3))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("reduction", ["mean", "position", "sum", "none"])
def test_an_objective_that_is_a_function(reduction, impl):
    problem = make_problem(work="shifted")
    want, d_want = problem.run(objective={"ce": 0.1, "tv": 0.9}, reduction=reduction, plan="recompute", impl=impl)
    got, d_got = problem.run(
        objective=lambda d: 0.1 * d.terms["ce"] + 0.9 * (1 - d.acceptance),
        terms=("ce",),
        reduction=reduction,
        impl=impl,
    )
    torch.testing.assert_close(got.loss, want.loss)
    for x, y in zip(d_got, d_want, strict=True):
        torch.testing.assert_close(x, y)
    with pytest.raises(ValueError, match="a function"):
        problem.run(objective=lambda d: d.kl, plan="one_pass", impl=impl)
    with pytest.raises(ValueError, match="the loss of each token"):
        problem.run(objective=lambda d: d.kl.sum(), impl=impl)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_labels(impl):
    """Target ids; -100, other negative ones and words that the draft does not have ask for nothing."""
    generator = torch.Generator().manual_seed(0)
    vocab = make_vocab(13, 7, generator)
    hidden, weight = torch.randn(5, 4, generator=generator), torch.randn(7, 4, generator=generator)
    target = fused_lk.Target.from_logits(torch.randn(5, 13, generator=generator), vocab)
    missing = int((~vocab.t2d).nonzero()[0])
    labels = torch.tensor([int(vocab.target_ids[3]), -100, missing, -1, int(vocab.target_ids[6])])
    d = fused_lk.lk_divergences(hidden, weight, target, terms=("ce",), labels=labels, impl=impl)
    log_q = (hidden @ weight.T).log_softmax(1)
    want = torch.stack([-log_q[0, 3], *torch.zeros(3), -log_q[4, 6]])
    torch.testing.assert_close(d.terms["ce"], want)
    for wrong, match in ((labels[:3], "shape"), (labels + 20, "below 13"), (labels.float(), "int64")):
        with pytest.raises((ValueError, TypeError), match=match):
            fused_lk.lk_loss(hidden, weight, target, labels=wrong, impl=impl)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
def test_labels_that_a_restricted_draft_cannot_say(plan, impl):
    """As ones that the draft vocabulary lacks: 0, and no gradient, where the cross-entropy would be infinite."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, generator=generator, requires_grad=True)
    weight = torch.randn(7, 4, generator=generator, requires_grad=True)
    ids, log_probs = torch.tensor([[1, 2, 5]] * 3), torch.tensor([[-1.0, -2.0, -float("inf")]] * 3)
    target = fused_lk.Target.from_topk(ids, log_probs, 7, restrict_draft=True)
    labels = torch.tensor([1, 3, 5])
    out = fused_lk.lk_loss(
        hidden, weight, target, labels=labels, objective="ce", reduction="sum", plan=plan, impl=impl,
        workspace_mb=0.0001,
    )  # fmt: skip
    want = -(hidden[0] @ weight[1:3].T).log_softmax(0)[0]
    torch.testing.assert_close(out.loss, want)
    gradients = [torch.autograd.grad(x, (hidden, weight)) for x in (out.loss, want)]
    for got, x in zip(*gradients, strict=True):
        torch.testing.assert_close(got, x)


def test_bad_objectives():
    problem = make_problem()
    for options, match in (
        ({"objective": {"l2": 1.0}}, "components"),
        ({"objective": {}}, "a positive weight"),
        ({"objective": {"ce": -1.0}}, ">= 0"),
        ({"objective": "hinge"}, "'l1'"),
        ({"objective": {"ce": 1.0}, "kl_weight": 0.3}, "kl_weight"),
        ({"objective": "jsd", "jsd_beta": 1.0}, "in .0, 1."),
        ({"terms": ("l2",)}, "terms"),
        ({"terms": "l1"}, "a sequence"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            problem.run(**options)


def test_every_component_has_a_loss():
    assert set(COMPONENTS) == {"kl", "tv", "alpha", "lambda", *(set(TERMS) - set(MEASURED))}


def test_every_term_is_in_the_tables_that_users_are_sent_to():
    assert "help(fused_lk.rows.interface)" in fused_lk.lk_divergences.__doc__
    page = (Path(__file__).parents[1] / "docs" / "semantics.md").read_text()
    for name in TERMS:
        assert f"\n    {name:<17}" in fused_lk.rows.interface.__doc__, name
        assert name in MEASURED or f'\n| `"{name}"` | ' in page, name


PUBLISHED = {
    "kl": "kl_div_loss",
    "rkl": "reverse_kl_div_loss",
    "jsd": "js_div_loss",
    "ce": "ce_loss",
    "tv": "tv_loss",
    "alpha": "neg_log_acceptance_loss",
    "lambda": "lk_hybrid_loss",
}
SUM = {"ce": 0.1, "tv": 0.9, "rkl": 0.3}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [*PUBLISHED, "sum"])
def test_as_speculators_publishes_it(name, impl):
    """speculators 0.9.0: both sides have softmaxes over the draft vocabulary; one loss per token."""
    generator = torch.Generator().manual_seed(0)
    z, t = (2 * torch.randn(1, 6, 40, generator=generator) for _ in range(2))
    parts = SUM if name == "sum" else {name: 1.0}
    leaf = z.clone().requires_grad_()
    published = peers.speculators().eager
    want = sum(x * getattr(published, PUBLISHED[part])(leaf, t) for part, x in parts.items())
    (d_want,) = torch.autograd.grad(want.sum(), leaf)
    leaf = z.clone().requires_grad_()
    out = fused_lk.lk_loss_from_logits(
        leaf, fused_lk.Target.from_logits(t), objective=parts, lambda_per="token", reduction="none", impl=impl
    )
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(torch.autograd.grad(out.loss.sum(), leaf)[0], d_want, rtol=1e-5, atol=2e-6)
