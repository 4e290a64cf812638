"""The loss and its gradients against the float64 oracle, for both implementations."""

from __future__ import annotations

import pytest
import torch
from problems import (
    OBJECTIVES,
    REDUCTIONS,
    TARGET_KINDS,
    assert_outputs_agree,
    make_problem,
    primitive_sum,
    weighted_sum,
)

import fused_lk
from fused_lk.rows import plain

OPTIONS = {
    "plain": {},
    "tiny workspace": {"workspace_mb": 0.004},
    "per token": {"lambda_per": "token", "denominator": 7.0, "position_decay": 0.7, "draft_temperature": 0.8},
    "one pass": {"kl_weight": 0.3, "position_decay": 0.5},
}


def check(problem, call=fused_lk.lk_loss, scalar=None, impl="torch", atol=1e-9, **options):
    ours, gradients = problem.run(call, scalar, impl=impl, **options)
    without = {k: v for k, v in options.items() if k not in ("workspace_mb", "plan")}
    oracle, expected = problem.run(call, scalar, impl="reference", **without)
    assert_outputs_agree(ours, oracle, atol)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, atol=atol, rtol=0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("work", ["identity", "weighted", "shifted", "kept"])
@pytest.mark.parametrize("kind", TARGET_KINDS)
def test_every_target_and_work_list(kind, work, objective, options):
    if "kl_weight" in options and objective != "lambda":
        options = {k: v for k, v in options.items() if k != "kl_weight"}
    # Every pair of choices; test_fuzz_calls mixes all of them.
    reductions = REDUCTIONS if not options else ("none", "mean")
    for i, reduction in enumerate(reductions):
        problem = make_problem(kind=kind, work=work, stacked=i % 2 == 1)
        check(problem, objective=objective, reduction=reduction, **options)


@pytest.mark.parametrize("work", ["identity", "shifted", "kept"])
@pytest.mark.parametrize("kind", ["hidden", "shared_hidden", "probs"])
def test_triton_agrees_with_the_oracle(kind, work):
    problem = make_problem(kind=kind, work=work, num_tokens=6)
    for options in ({}, {"objective": "alpha"}, {"lambda_per": "token", "draft_temperature": 0.8}):
        check(problem, impl="triton", **options)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("work", ["identity", "shifted", "kept"])
def test_primitive(impl, work):
    problem = make_problem(work=work, num_tokens=6)
    check(problem, fused_lk.lk_divergences, primitive_sum, impl)
    check(problem, fused_lk.lk_divergences, lambda d: d.acceptance.sum(), impl, draft_temperature=1.5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("work", ["identity", "shifted", "kept"])
def test_logits_in_hand(impl, work):
    problem = make_problem(work=work, num_tokens=6)
    sources, weight, bias = problem.leaves()
    logits = torch.nn.functional.linear(sources[0], weight, bias).detach()

    def run(impl, **options):
        leaf = logits.clone().requires_grad_()
        out = fused_lk.lk_loss_from_logits(leaf, problem.target, impl=impl, **problem.options, **options)
        return out, torch.autograd.grad(out.loss, leaf)[0]

    for options in ({}, {"objective": "kl"}, {"objective": "alpha", "plan": "recompute"}):
        ours, gradient = run(impl, **options)
        oracle, expected = run("reference", **options)
        assert_outputs_agree(ours, oracle, 1e-9)
        torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=0)
        through_head, _ = problem.run(impl=impl, **options)
        torch.testing.assert_close(through_head.loss, ours.loss, atol=1e-9, rtol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_logits_of_the_caller_are_left_alone(objective):
    problem = make_problem(kind="shared_logits", bias=False)
    logits = (problem.sources[0] @ problem.weight.T).requires_grad_()
    before, target_before = logits.detach().clone(), problem.target.tiles.tensors()[0].clone()
    out = fused_lk.lk_loss_from_logits(logits, problem.target, objective=objective)
    out.loss.backward()
    assert torch.equal(logits, before)
    assert torch.equal(problem.target.tiles.tensors()[0], target_before)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("kind", TARGET_KINDS)
def test_renormalised_targets_and_temperatures(kind, renormalize):
    options = {"renormalize": renormalize}
    if kind != "probs" and (not kind.endswith("topk") or renormalize):
        options["temperature"] = 0.7
    problem = make_problem(kind=kind, work="shifted", target_options=options)
    check(problem, lambda_per="token")
    check(problem)


@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
@pytest.mark.parametrize(("hidden", "head"), [(True, False), (False, True), (True, True)])
def test_frozen_sides(plan, hidden, head):
    for work in ("identity", "shifted", "kept"):
        problem = make_problem(work=work)
        ours, gradients = problem.run(hidden=hidden, head=head, objective="alpha", plan=plan, impl="torch")
        oracle, expected = problem.run(hidden=hidden, head=head, objective="alpha", impl="reference")
        assert_outputs_agree(ours, oracle, 1e-9)
        assert len(gradients) == len(expected) == hidden + 2 * head
        for got, want in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kl_weight", ["float", "scalar", "position", "token"])
@pytest.mark.parametrize("work", ["shifted", "kept"])
def test_given_kl_weight(kl_weight, work):
    problem = make_problem(work=work)
    generator = torch.Generator().manual_seed(3)
    given = {
        "float": 0.25,
        "scalar": torch.tensor(0.25, dtype=torch.float64),
        "position": torch.tensor([0.1, 0.6, 0.9], dtype=torch.float64),
        "token": torch.rand(3, 10, dtype=torch.float64, generator=generator),
    }[kl_weight]
    for plan in ("one_pass", "recompute"):
        check(problem, kl_weight=given, plan=plan)


@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_upstream_gradients_scale_and_a_graph_can_be_kept(impl, plan):
    """As a GradScaler has it: a second backward gives the same, a scaled loss gives scaled gradients."""
    problem = make_problem(work="shifted", num_tokens=4)
    sources, weight, bias = problem.leaves()
    options = {"impl": impl, "plan": plan, "objective": "alpha", **problem.options}
    loss = fused_lk.lk_loss(sources[0], weight, problem.target, bias=bias, **options).loss
    leaves = [sources[0], weight, bias]
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    scaled = torch.autograd.grad(1024 * loss, leaves)
    for x, y, z in zip(once, again, scaled, strict=True):
        assert torch.equal(x, y)
        assert x.any()
        torch.testing.assert_close(z, 1024 * x, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", TARGET_KINDS)
def test_a_walk_by_vocabulary_in_blocks(kind):
    """129 columns in blocks of 64, the last of one column: a vocabulary below 64 is a single block."""
    problem = make_problem(kind=kind, work="shifted", num_tokens=5, draft_size=129, target_size=170)
    check(problem, workspace_mb=0.002)


@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
def test_several_chunks_and_several_blocks_a_chunk(plan, monkeypatch):
    """Each token keeps its own weight, lambda and normaliser."""
    problem = make_problem(work="weighted")
    monkeypatch.setattr(plain, "BLOCK_ELEMENTS", 2 * len(problem.weight))
    kl_weight = torch.linspace(0.1, 0.9, 30, dtype=torch.float64).view(3, 10)
    check(problem, objective="lambda", kl_weight=kl_weight, plan=plan, workspace_mb=0.004)


def test_denominators_per_position():
    problem = make_problem(work="shifted")
    denominator = torch.tensor([3.0, 5.0, 0.5], dtype=torch.float64)
    for reduction in ("mean", "position"):
        check(problem, denominator=denominator, reduction=reduction)


def test_more_dimensions_and_strides():
    flat = make_problem(num_tokens=24)
    oracle, expected = flat.run(impl="reference")
    hidden = flat.sources[0].view(2, 3, 4, -1)
    strided = torch.empty(2, 3, 4, 2 * hidden.shape[-1], dtype=hidden.dtype)[..., ::2]
    strided.copy_(hidden)
    columns = flat.weight.t().contiguous().t()
    for given in (hidden, strided, hidden.transpose(0, 1).contiguous().transpose(0, 1)):
        leaf, weight = given.detach().requires_grad_(), columns.detach().requires_grad_()
        out = fused_lk.lk_loss(leaf, weight, flat.target, bias=flat.bias, impl="torch")
        gradients = torch.autograd.grad(weighted_sum(out), [leaf, weight])
        torch.testing.assert_close(out.loss, oracle.loss, atol=1e-9, rtol=0)
        assert out.token_log_acceptance.shape == (2, 3, 4)
        torch.testing.assert_close(gradients[0].reshape(24, -1), expected[0], atol=1e-9, rtol=0)
        torch.testing.assert_close(gradients[1], expected[1], atol=1e-9, rtol=0)


def test_one_output_type_and_its_rates():
    problem = make_problem(work="shifted")
    out, _ = problem.run(impl="torch")
    assert type(out) is fused_lk.LKOutput
    torch.testing.assert_close(out.acceptance_rate, out.acceptance_sum / out.weight_sum)
    metrics = out.metrics()
    assert metrics["acceptance_rate_2"] == pytest.approx(out.acceptance_rate[2].item())
    assert metrics["accuracy_0"] == pytest.approx(out.accuracy[0].item())
    assert metrics["loss"] == pytest.approx(out.loss.item())
    length = fused_lk.expected_acceptance_length(out.acceptance_rate)
    assert metrics["expected_acceptance_length"] == pytest.approx(length.item())
    assert all(isinstance(value, float) for value in metrics.values())
    assert "eval/loss" in out.metrics("eval/")
    for options in ({"reduction": "position"}, {"reduction": "none"}, {"reduction": "sum"}, {"denominator": 9.0}):
        reduced, _ = problem.run(impl="torch", **options)
        assert reduced.metrics() == pytest.approx(metrics)  # the mean loss, whatever is minimised
    by_position, _ = problem.run(impl="torch", reduction="position")
    assert metrics["loss_1"] == pytest.approx(by_position.loss[1].item())


def test_expected_acceptance_length():
    acceptance = torch.tensor([[0.5, 1.0], [0.5, 0.0], [0.5, 1.0]])
    torch.testing.assert_close(fused_lk.expected_acceptance_length(acceptance), torch.tensor([1.875, 2.0]))


def test_module_is_the_function():
    problem = make_problem(work="shifted")
    loss = fused_lk.LKLoss("lambda", eta=2.0, position_decay=0.8, impl="torch")
    options = dict(problem.options)
    out = loss(problem.sources[0], problem.weight, problem.target, bias=problem.bias, **options)
    expected = fused_lk.lk_loss(
        problem.sources[0], problem.weight, problem.target, bias=problem.bias, eta=2.0, position_decay=0.8, **options
    )
    assert torch.equal(out.loss, expected.loss)
    assert "eta=2.0" in repr(loss)
