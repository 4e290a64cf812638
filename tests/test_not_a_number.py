"""A NaN in a supervised row reaches the loss and the gradient; one in an ignored row reaches nothing.

The same for what makes NaN: infinite logits, negative probabilities, and targets that sum to more than 1.
"""

from __future__ import annotations

import pytest
import torch
from fused_lk.kernels import launch

import fused_lk
from fused_lk import gemm
from fused_lk.rows import plain
from fused_lk.rows.interface import TERMS, LogitRows, Normalizer, Transform
from fused_lk.walk.plan import empty_statistics

NAN, INF = float("nan"), float("inf")
IMPLS = ["torch", "triton"]
CALLS = [
    *((objective, {"plan": plan}) for objective in ("kl", "tv", "alpha") for plan in ("one_pass", "recompute")),
    ("lambda", {}),
    ("lambda", {"lambda_per": "token"}),
    ("lambda", {"kl_weight": 0.5, "plan": "recompute"}),
]


def logits(rows=4, size=40):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, size, generator=generator), torch.randn(rows, size, generator=generator)


def run(z, target, objective, impl, **options):
    leaf = z.clone().requires_grad_()
    out = fused_lk.lk_loss_from_logits(leaf, target, objective=objective, impl=impl, **options)
    return out, torch.autograd.grad(out.loss, leaf)[0]


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("where", ["draft nan", "draft +inf", "target nan", "target +inf", "a row of -inf drafts"])
@pytest.mark.parametrize("objective, options", CALLS, ids=str)
def test_it_reaches_the_loss(objective, options, where, impl):
    z, t = logits()
    side = t if where.startswith("target") else z
    side[1, 7] = INF if "+inf" in where else NAN
    if "row" in where:
        z[1] = -INF
    target = fused_lk.Target.from_logits(t)
    out, gradient = run(z, target, objective, impl, **options)
    assert out.loss.isnan()
    assert out.num_unsupported == 0
    assert out.acceptance_rate.isnan()
    assert out.kl.isnan()
    if impl != "reference":
        assert gradient[1].isnan().all()
    if objective != "lambda" or options:  # else lambda itself is a mean over the batch
        assert not gradient[[0, 2, 3]].isnan().any()
    for skip_masked in (True, False):
        mask = torch.tensor([True, False, True, True])
        pairs = fused_lk.Pairs(mask, skip_masked=skip_masked)
        out, gradient = run(z, target, objective, impl, pairs=pairs, **options)
        assert out.loss.isfinite()
        assert gradient.isfinite().all()
        assert not gradient[1].any()


@pytest.mark.parametrize("terms", [TERMS, *((name,) for name in TERMS)], ids=str)
@pytest.mark.parametrize("ops", [launch, plain], ids=IMPLS[::-1])
def test_it_reaches_each_term_alone(ops, terms):
    """A normaliser that is NaN or too small, and a NaN of either side; KL needs no normaliser, and is lost all the
    same."""
    z, t = logits(rows=5)
    value = t.logsumexp(1)
    value[1] = NAN
    value[2] -= 3
    z[3, 7] = t[4, 7] = NAN
    out = empty_statistics(5, terms, torch.float32, z.device, "ce" in terms)
    ops.stats(LogitRows(z, t, None, Normalizer(value, False, 0.0), Transform(), Transform()), terms, out)
    gradient = torch.empty_like(z)
    ops.gradient(
        LogitRows(z, t, None, None, Transform(), Transform()), terms, out, torch.ones_like(out.values), gradient
    )
    for x in (out.values, out.saved, gradient.t()):
        assert x[..., 0].isfinite().all()
        assert x[..., 1:].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_it_stays_out_of_a_row_without_an_answer(impl):
    """There the draft is not asked: no loss, no KL and no gradient, whatever its logits hold."""
    for side in (NAN, INF, -INF):
        z, t = logits()
        z[1, 7], t[1] = side, -INF
        if side == -INF:
            z[1] = side
        for objective, options in CALLS:
            out, gradient = run(z, fused_lk.Target.from_logits(t), objective, impl, **options)
            assert out.num_unsupported == 1
            assert out.token_log_acceptance[1] == -INF
            assert out.loss.isfinite()
            assert out.kl.isfinite()
            assert out.acceptance_rate.isfinite()
            assert not gradient[1].any()
            assert gradient.isfinite().all()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_targets_that_are_all_nan(impl):
    """No maximum, and still a row with an answer."""
    z, t = logits()
    t[1] = NAN
    for objective in ("kl", "tv", "alpha"):
        out, _ = run(z, fused_lk.Target.from_logits(t), objective, impl)
        assert out.loss.isnan()
        assert out.num_unsupported == 0


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("objective", ["kl", "tv", "alpha"])
def test_half_precision_that_overflows(objective, impl):
    z, t = logits()
    out, _ = run((z * 1e6).half(), fused_lk.Target.from_logits(t.half()), objective, impl)
    assert out.loss.isnan()


def bad_targets(rows, size):
    z, t = logits(rows, size)
    probs = t.softmax(1)
    negative, scaled, slightly = probs.clone(), probs.clone(), probs.clone()
    negative[1, 3] = -0.1
    scaled[1] *= 1.5
    slightly[1] *= 1 + 1e-6
    vocab = fused_lk.DraftVocab(torch.arange(size) < size)
    ids = t.topk(5).indices
    log_probs = torch.full((rows, 5), -2.0)
    positive = log_probs.clone()
    positive[1, 0] = 0.7
    given = t.logsumexp(1)
    wrong = given.clone()
    wrong[1] -= 3
    nan = given.clone()
    nan[1] = NAN
    head = torch.eye(size)
    return z, {
        "negative probabilities": (fused_lk.Target.from_probs(negative), "nan"),
        "logits as probabilities": (fused_lk.Target.from_probs(t), "nan"),
        "sum 1.5": (fused_lk.Target.from_probs(scaled), "error"),
        "sum 1 and rounding": (fused_lk.Target.from_probs(slightly), "right"),
        "positive log-probabilities": (fused_lk.Target.from_topk(ids, positive, vocab), "error"),
        "a normaliser that is too small": (fused_lk.Target.from_hidden(t, head, log_normalizer=wrong), "error"),
        "a normaliser that is NaN": (fused_lk.Target.from_hidden(t, head, log_normalizer=nan), "nan"),
    }  # fmt: skip


NAMES = list(bad_targets(2, 10)[1])


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_targets_that_are_no_probabilities(name, impl, monkeypatch):
    z, targets = bad_targets(4, 40)
    target, outcome = targets[name]
    for objective in ("kl", "tv", "alpha", "lambda"):
        for plan in ("one_pass", "recompute"):
            options = {"plan": plan, **({"kl_weight": 0.5} if objective == "lambda" else {})}
            if outcome == "error" and impl != "reference":
                with pytest.raises(ValueError, match=r"sum to at most 1 .* 1 row\(s\)"):
                    run(z, target, objective, impl, **options)
                with monkeypatch.context() as patched:  # as on a device, where nothing is read
                    patched.setattr("fused_lk.checks.checks_contents", lambda *_, **__: False)
                    out, gradient = run(z, target, objective, impl, **options)
            else:
                out, gradient = run(z, target, objective, impl, **options)
            assert out.num_unsupported == 0
            if outcome == "right":
                assert out.loss.isfinite()
                assert gradient.isfinite().all()
            else:
                assert out.loss.isnan()
                if impl != "reference":
                    assert gradient[1].isnan().all()
            if name != "logits as probabilities":
                mask = torch.tensor([True, False, True, True])
                out, gradient = run(z, target, objective, impl, mask=mask, **options)
                assert out.loss.isfinite()
                assert gradient.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
@pytest.mark.parametrize("skip_masked", [True, False])
def test_ignored_rows_of_infinite_kl(plan, impl, skip_masked):
    """A bias of -inf makes KL infinite in every row; 0 * inf in a sum is NaN."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(4, 8, generator=generator), torch.randn(12, 8, generator=generator)
    bias = torch.zeros(12).index_fill(0, torch.tensor([3, 4]), -INF)
    t = torch.randn(4, 12, generator=generator)
    t[:3, 3:5] = -INF  # only the ignored row meets the excluded tokens
    mask = torch.tensor([True, True, True, False])
    pairs = fused_lk.Pairs(mask, skip_masked=skip_masked)
    for objective in ("kl", "tv", "lambda"):
        options = {"kl_weight": 0.5} if objective == "lambda" else {}
        leaf = hidden.clone().requires_grad_()
        out = fused_lk.lk_loss(
            leaf, head, fused_lk.Target.from_logits(t), bias=bias, pairs=pairs, objective=objective, plan=plan,
            impl=impl, **options,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        assert out.loss.isfinite()
        assert out.kl.isfinite().all()
        assert gradient.isfinite().all()
        assert not gradient[3].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_rows_of_large_bias_in_a_graph(impl):
    """An operator's backward has only what its forward saved of rows that are kept for shape."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(4, 8, generator=generator), torch.randn(12, 8, generator=generator)
    bias = torch.full((12,), 100.0)
    t = torch.randn(4, 12, generator=generator)
    mask = torch.tensor([True, False, True, True])

    def step(hidden, head):
        pairs = fused_lk.Pairs(mask, skip_masked=False)
        return fused_lk.lk_loss(hidden, head, fused_lk.Target.from_logits(t), bias=bias, pairs=pairs, impl=impl).loss

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (hidden, head)]
        results.append(torch.autograd.grad(function(*leaves), leaves))
    for got, want in zip(*results, strict=True):
        assert want.isfinite().all()
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("temperature, scale", [(1.0, 1.0), (0.25, 1.0), (0.1, 1.0), (1.0, 10.0)])
def test_a_right_normalizer_is_never_refused(dtype, temperature, scale, impl):
    """An engine's normaliser in float32 beside logits that are rounded to half precision here."""
    generator = torch.Generator().manual_seed(0)
    states = (torch.randn(64, 16, generator=generator) * scale).to(dtype)
    head = (torch.randn(50, 16, generator=generator) * 2).to(dtype)
    exact = (states.float() @ head.float().T / temperature).logsumexp(1)
    target = fused_lk.Target.from_hidden(states, head, log_normalizer=exact, temperature=temperature)
    out, _ = run((states @ head.T).float(), target, "tv", impl)
    assert out.loss.isfinite()


@pytest.mark.parametrize("impl", IMPLS)
def test_alpha_never_exceeds_1(impl):
    z, _ = logits(64, 50)
    d = fused_lk.lk_divergences_from_logits(z, fused_lk.Target.from_logits(z.clone()), impl=impl)
    assert (d.log_acceptance <= 0).all()


@pytest.fixture
def unwritten_memory_is_nan():
    """Torch's mode in which memory that is allocated and not written holds NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [38, 70, 200])
@pytest.mark.parametrize(
    "options",
    [
        {"plan": "one_pass"},
        {"plan": "one_pass", "logits_dtype": torch.float32},
        {"plan": "recompute"},
        {"plan": "recompute", "workspace_mb": 0.01},
    ],
    ids=str,
)
def test_unwritten_memory_reaches_nothing(options, size, impl, unwritten_memory_is_nan):
    """Not even through a product of PyTorch: with AMX tiles, bfloat16 rows are read on beyond their last column."""
    generator = torch.Generator().manual_seed(0)
    hidden, head, states, target_head = (
        torch.randn(rows, 64, generator=generator, dtype=torch.bfloat16) for rows in (40, size, 40, size)
    )
    mask = torch.arange(40) != 3
    target = fused_lk.Target.from_hidden(states, target_head, impl=impl)
    leaves = [hidden.requires_grad_(), head.requires_grad_(), torch.zeros(size, dtype=torch.bfloat16).requires_grad_()]
    out = fused_lk.lk_loss(hidden, head, target, bias=leaves[2], mask=mask, objective="alpha", impl=impl, **options)
    for gradient in torch.autograd.grad(out.loss, leaves):
        assert gradient.isfinite().all()


def test_the_padding_of_a_tile_is_zero(unwritten_memory_is_nan):
    tile = gemm.tile(4, 70, torch.bfloat16, torch.device("cpu"))
    assert tile.stride() == (128, 1)
    assert not tile.as_strided((4, 58), (128, 1), 70).any()
