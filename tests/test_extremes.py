"""Rows at the edges: almost disjoint, identical, tied, impossible, alone, empty, and rows full of garbage."""

from __future__ import annotations

import math

import pytest
import torch
from hard_rows import Truth
from problems import make_problem

import fused_lk

IMPLS = ["torch", "triton"]
NEG_INF = float("-inf")


def from_logits(z, t, impl, objective="alpha", dtype=torch.float64, **options):
    """`(output, gradient)` of draft logits `z` against target logits `t` over a shared vocabulary."""
    leaf = z.to(dtype).clone().requires_grad_()
    target = t if isinstance(t, fused_lk.Target) else fused_lk.Target.from_logits(t.to(dtype))
    out = fused_lk.lk_loss_from_logits(leaf, target, impl=impl, objective=objective, **options)
    return out, torch.autograd.grad(out.loss, leaf)[0]


def disjoint(size, height):
    z = torch.zeros(2, size, dtype=torch.float64)
    z[:, : size // 2] = height
    t = -z + torch.linspace(0, 1, size, dtype=torch.float64)
    return z + torch.linspace(0, 0.5, size, dtype=torch.float64), t


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("height", [30.0, 200.0])
@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
def test_disjoint_rows_have_finite_right_gradients(impl, height, plan):
    z, t = disjoint(300, height)
    oracle, expected = from_logits(z, t, "reference")
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        out, gradient = from_logits(z, t, impl, dtype=dtype, plan=plan)
        assert out.token_log_acceptance.max() < 1 - height
        torch.testing.assert_close(out.loss.double(), oracle.loss, rtol=rtol, atol=0)
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@pytest.mark.parametrize("impl", IMPLS)
def test_identical_rows(impl):
    t = torch.randn(3, 40, dtype=torch.float64)
    for objective in ("kl", "tv", "alpha", "lambda"):
        out, gradient = from_logits(t, t, impl, objective)
        torch.testing.assert_close(out.acceptance_rate, torch.ones(1, dtype=torch.float64))
        torch.testing.assert_close(out.loss, torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
@pytest.mark.parametrize("never", [-1e4, NEG_INF])
@pytest.mark.parametrize("impl", IMPLS)
def test_bitwise_ties_follow_torch_minimum(impl, never, plan, dtype):
    """q is 1/8 on tokens 0 to 7, p on tokens 4 to 11, exactly so in every implementation: they tie on four tokens.

    There w = 1/2, as torch.minimum shares its gradient; on the draft's other four w = 0. alpha = sigma = 1/2.
    """
    z, t = torch.full((2, 1, 16), never, dtype=dtype)
    z[0, :8] = 0.0
    t[0, 4:12] = 0.0
    out, gradient = from_logits(z, t, impl, dtype=dtype, plan=plan)
    sigma_q = torch.tensor([1 / 16] * 8 + [0.0] * 8, dtype=torch.float64)
    w_r = torch.tensor([0.0] * 4 + [1 / 8] * 4 + [0.0] * 8, dtype=torch.float64)
    rtol = 1e-15 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(out.loss.item(), math.log(2), rtol=rtol, atol=0)
    torch.testing.assert_close(gradient[0].double(), sigma_q - w_r, rtol=0, atol=rtol)


@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
@pytest.mark.parametrize("impl", IMPLS)
def test_no_token_in_common(impl, plan):
    """Draft and target exclude one another (-inf on both sides): alpha 0, TV 1, KL and -log alpha infinite.

    The target has an answer, so the row counts; min(p, q) has no gradient there, and that of KL is finite.
    """
    z = torch.tensor([[0.0, 1.0, NEG_INF, NEG_INF], [0.0, 1.0, 2.0, 3.0]])
    t = torch.tensor([[NEG_INF, NEG_INF, 0.0, 1.0], [3.0, 2.0, 1.0, 0.0]])
    d_kl = torch.softmax(z[0].double(), 0) - torch.softmax(t[0].double(), 0)
    for objective, value in (("kl", math.inf), ("tv", 1.0), ("alpha", math.inf), ("lambda", math.inf)):
        options = {"kl_weight": 0.5} if objective == "lambda" else {}
        out, gradient = from_logits(z, t, impl, objective, plan=plan, **options)
        alone, expected = from_logits(z[1:], t[1:], impl, objective, plan=plan, **options)
        oracle, _ = from_logits(z, t, "reference", objective, **options)
        assert out.token_log_acceptance[0] == NEG_INF
        assert out.num_unsupported == oracle.num_unsupported == 0
        assert out.kl == math.inf
        torch.testing.assert_close(out.loss, (alone.loss + value) / 2)
        torch.testing.assert_close(oracle.loss, out.loss)
        of_kl = {"kl": 0.5, "lambda": 0.25}.get(objective, 0.0)
        torch.testing.assert_close(gradient[0], d_kl * of_kl, rtol=0, atol=1e-12)
        torch.testing.assert_close(gradient[1:], expected / 2)


@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
@pytest.mark.parametrize("impl", IMPLS)
def test_impossible_draft_tokens(impl, plan):
    """Draft logits of -inf, as a mask of the vocabulary makes them."""
    z = torch.randn(3, 20, dtype=torch.float64)
    t = torch.randn(3, 20, dtype=torch.float64)
    z[:, ::4] = NEG_INF  # the target may say these: KL is infinite
    for objective in ("tv", "alpha"):
        out, gradient = from_logits(z, t, impl, objective, plan=plan)
        oracle, expected = from_logits(z, t, "reference", objective)
        torch.testing.assert_close(out.loss, oracle.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
        assert out.kl == float("inf")
    t[:, ::4] = NEG_INF  # and now it may not
    for objective in ("kl", "lambda"):
        options = {"kl_weight": 0.5} if objective == "lambda" else {}
        out, gradient = from_logits(z, t, impl, objective, plan=plan, **options)
        oracle, expected = from_logits(z, t, "reference", objective, **options)
        assert oracle.loss.isfinite()
        torch.testing.assert_close(out.loss, oracle.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("objective", ["kl", "tv", "alpha", "lambda"])
def test_impossible_target_tokens(impl, objective):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 33, dtype=torch.float64, generator=generator)
    t = torch.randn(4, 33, dtype=torch.float64, generator=generator)
    t[:, ::3] = NEG_INF
    t[1, 2:] = NEG_INF
    t[2] = NEG_INF
    out, gradient = from_logits(z, t, impl, objective)
    oracle, expected = from_logits(z, t, "reference", objective)
    assert out.num_unsupported == oracle.num_unsupported == 1
    assert out.token_log_acceptance[2] == NEG_INF
    assert torch.equal(gradient[2], torch.zeros(33, dtype=torch.float64))
    torch.testing.assert_close(out.loss, oracle.loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(out.acceptance_rate, oracle.acceptance_rate, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=0)
    single, single_gradient = from_logits(z.float(), t, impl, objective, dtype=torch.float32)
    assert torch.isfinite(single.loss)
    torch.testing.assert_close(single_gradient.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_point_mass_targets_are_cross_entropy(impl):
    z = torch.randn(5, 29, dtype=torch.float64)
    labels = torch.tensor([0, 28, 7, 7, 3])
    t = torch.full((5, 29), NEG_INF, dtype=torch.float64)
    t[torch.arange(5), labels] = 0.0
    leaf = z.clone().requires_grad_()
    cross_entropy = torch.nn.functional.cross_entropy(leaf, labels)
    (expected,) = torch.autograd.grad(cross_entropy, leaf)
    for objective in ("alpha", "kl"):
        out, gradient = from_logits(z, t, impl, objective)
        torch.testing.assert_close(out.loss, cross_entropy.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_targets_without_an_answer(impl):
    """Top-k that misses the draft vocabulary, and probabilities that are all zero."""
    t2d = torch.tensor([True] * 6 + [False] * 4)
    vocab = fused_lk.DraftVocab(t2d)
    ids = torch.tensor([[0, 9], [7, 8], [8, 3]])
    log_probs = torch.tensor([[0.6, 0.3], [0.5, 0.4], [0.7, 0.2]], dtype=torch.float64).log()
    probs = torch.zeros(3, 6, dtype=torch.float64)
    probs[0, 0], probs[2, 3] = 0.6, 0.2
    z = torch.randn(3, 6, dtype=torch.float64)
    for target in (fused_lk.Target.from_topk(ids, log_probs, vocab), fused_lk.Target.from_probs(probs, vocab)):
        for objective in ("kl", "tv", "alpha", "lambda"):
            out, gradient = from_logits(z, target, impl, objective)
            oracle, expected = from_logits(z, target, "reference", objective)
            assert out.num_unsupported == 1
            torch.testing.assert_close(out.loss, oracle.loss, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
            assert not gradient[1].any()
            # It counts as acceptance 0 in the mean.
            alpha = oracle.token_log_acceptance.exp()
            torch.testing.assert_close(out.acceptance_rate[0], alpha.sum() / 3, rtol=1e-10, atol=0)
        d = fused_lk.lk_divergences_from_logits(z.requires_grad_(), target, impl=impl)
        assert d.log_acceptance[1] == NEG_INF
        assert d.kl[1] == 0
        assert d.acceptance[1] == 0
        z.grad = None
        d.acceptance.sum().backward()
        assert torch.isfinite(z.grad).all()
        assert not z.grad[1].any()
        z = z.detach()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("skip_masked", [True, False])
@pytest.mark.parametrize("objective", ["kl", "tv", "alpha", "lambda"])
def test_nothing_supervised(impl, skip_masked, objective):
    problem = make_problem(num_tokens=4)
    pairs = fused_lk.Pairs(torch.zeros(4, dtype=torch.bool), skip_masked=skip_masked)
    for plan in ("auto", "recompute"):
        out, gradients = problem.run(impl=impl, pairs=pairs, objective=objective, plan=plan)
        assert out.loss == 0
        assert out.num_tokens.tolist() == [0]
        assert not any(g.any() for g in gradients)
        assert out.metrics()["acceptance_rate_0"] == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("skip_masked", [True, False])
@pytest.mark.parametrize("kind", ["hidden", "logits", "shared_logits", "probs"])
def test_garbage_in_ignored_rows_never_leaks(impl, skip_masked, kind):
    clean = make_problem(kind=kind, num_tokens=6)
    dirty = make_problem(kind=kind, num_tokens=6)
    mask = torch.tensor([True, False, True, False, True, True])
    pairs = fused_lk.Pairs(mask, skip_masked=skip_masked)
    garbage = torch.tensor([float("nan"), float("inf"), NEG_INF]).repeat(20)
    for x in (dirty.sources[0], *dirty.target.tiles.tensors()[:1]):
        x[~mask] = garbage[: x.shape[1]].double()
    if dirty.target.normalizer is not None and kind != "probs":
        dirty.target.normalizer.value[~mask] = float("nan")
    for options in ({"objective": "alpha"}, {}, {"reduction": "none"}):
        expected, expected_gradients = clean.run(impl=impl, pairs=pairs, **options)
        out, gradients = dirty.run(impl=impl, pairs=pairs, **options)
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(out.token_log_acceptance, expected.token_log_acceptance)
        for got, want in zip(gradients, expected_gradients, strict=True):
            assert torch.equal(got, want)
        assert not gradients[0][~mask].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("tokens", "draft", "target"), [(1, 1, 1), (1, 1, 5), (3, 2, 3), (2, 97, 101), (1, 1031, 2053)]
)
def test_odd_sizes(impl, tokens, draft, target):
    problem = make_problem(num_tokens=tokens, draft_size=draft, target_size=target)
    for objective in ("lambda", "alpha"):
        out, gradients = problem.run(impl=impl, objective=objective)
        oracle, expected = problem.run(impl="reference", objective=objective)
        torch.testing.assert_close(out.loss, oracle.loss, atol=1e-9, rtol=0)
        for got, want in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_vocabulary_of_151936(impl):
    generator = torch.Generator().manual_seed(0)
    size = 151_936
    z = torch.randn(2, size, generator=generator) * 3
    t = z + torch.randn(2, size, generator=generator)
    t[1] = -t[1] * 40
    for objective in ("alpha", "kl"):
        out, gradient = from_logits(z, t, impl, objective, dtype=torch.float32)
        truth = Truth(z.double(), t.double().log_softmax(1), objective)
        torch.testing.assert_close(out.loss.double(), truth.loss, rtol=1e-5, atol=0)
        assert (truth.error(gradient) <= 1e-4 * truth.gradient.abs() + 1e-7).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_normalizer_of_minus_infinity_is_a_row_without_an_answer(impl):
    """A target row that is -inf throughout its full vocabulary has no finite normaliser either."""
    t2d = torch.tensor([True, True, False, True])
    t = torch.tensor([[0.0, 1.0, 2.0, 0.5], [NEG_INF] * 4], dtype=torch.float64)
    z = torch.tensor([[3.0, -2.0, 0.1], [0.1, 0.2, 0.4]], dtype=torch.float64)
    target = fused_lk.Target.from_logits(t, fused_lk.DraftVocab(t2d))
    out, gradient = from_logits(z, target, impl)
    assert out.num_unsupported == 1
    assert out.token_log_acceptance[1] == NEG_INF
    assert out.loss.isfinite()
    assert not gradient[1].any()
    assert gradient[0].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
@pytest.mark.parametrize("impl", IMPLS)
def test_ties_of_almost_disjoint_rows(impl, plan, dtype):
    """Two columns tie, bit for bit, where alpha is 4 e-100 and only log space holds it: w is 1/2 there as well."""
    z = torch.tensor([[0.0, -100.0, -100.0, -100.0]])
    t = torch.tensor([[-100.0, 0.0, -100.0, -100.0]])
    out, gradient = from_logits(z, t, impl, dtype=dtype, plan=plan)
    oracle, expected = from_logits(z, t, "reference")
    rtol = 1e-12 if dtype == torch.float64 else 1e-5  # the exponential of 100 carries the rounding of 100
    torch.testing.assert_close(out.loss.double(), oracle.loss, rtol=rtol, atol=0)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=rtol)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_token_that_neither_side_can_say_in_float32(impl):
    """The draft excludes it, and the target's e-200 is 0: 0 * inf is no part of KL."""
    z = torch.tensor([[0.0, 1.0, NEG_INF]])
    t = torch.tensor([[1.0, 0.5, -200.0]])
    out, gradient = from_logits(z, t, impl, "kl", dtype=torch.float32)
    expected, expected_gradient = from_logits(z[:, :2], t[:, :2], impl, "kl", dtype=torch.float32)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(gradient[:, :2], expected_gradient)


@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_lambda_of_0_takes_nothing_of_an_infinite_kl(impl, plan):
    z, t = torch.tensor([[0.0, NEG_INF]]), torch.tensor([[NEG_INF, 0.0]])
    out, gradient = from_logits(z, t, impl, "lambda", kl_weight=torch.zeros(1), plan=plan)
    assert out.loss == 1
    assert not gradient.any()
