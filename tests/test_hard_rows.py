"""Values and gradients on the family of hard rows, under every plan, walk, workspace and implementation.

The budget: the error against float64 on the same numbers, beyond what ties leave open (`hard_rows.Truth`), is at most
1.5 times that of the eager loss in the same dtype, plus a few roundings of the largest number that is added up.
"""

from __future__ import annotations

import hard_rows
import pytest
import torch
import torch.nn.functional as F
from fused_lk.kernels import launch

import fused_lk
from fused_lk import gemm, reference
from fused_lk.rows.interface import tie_width

NEG_INF = float("-inf")
IMPLS = ["torch", "triton"]
# Rows and objectives: Triton's interpreter takes some milliseconds a row.
ROWS = {"torch": 24, "triton": 9}
OBJECTIVES = {"torch": ("kl", "tv", "alpha", "lambda"), "triton": ("tv", "lambda")}
SIZE = 301
EPS = torch.finfo(torch.float32).eps
# SIZE columns of 24 rows are 0.03 MiB a tile.
WALKS = {
    "one pass": {"plan": "one_pass"},
    "one pass, small chunks": {"plan": "one_pass", "workspace_mb": 0.015},
    "recompute": {"plan": "recompute"},
    "recompute, blocks of columns": {"plan": "recompute", "workspace_mb": 0.004},
    "recompute, some kept, blocks of columns": {"plan": "recompute", "workspace_mb": 0.004, "keep_mb": 0.012},
    "recompute, all kept": {"plan": "recompute", "keep_mb": 1},
}


def eager(z, t, objective):
    """The loss as trainers write it, and its gradient."""
    leaf = z.clone().requires_grad_()
    log_q, log_p = F.log_softmax(leaf, 1), F.log_softmax(t, 1)
    alpha = torch.minimum(log_p.exp(), log_q.exp()).sum(1)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").nan_to_num(0.0).sum(1)
    loss = {"kl": kl, "tv": 1 - alpha, "alpha": -alpha.log(), "lambda": 0.5 * kl + 0.5 * (1 - alpha)}[objective].mean()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def through_a_head(z, t, objective, impl, **options):
    """Loss, and gradient with respect to the logits, of a call whose logits are a product.

    The head is the identity, so the gradient of the hidden states is that of the logits; a column of ones beside it
    makes the last hidden gradient the row's sum.
    """
    size = z.shape[1]
    head = torch.cat([torch.eye(size), torch.ones(size, 1)], 1)
    finite = z.masked_fill(z == NEG_INF, -3e4)  # 0 * -inf is no product
    hidden = torch.cat([finite, torch.zeros(len(z), 1)], 1).requires_grad_()
    bias = torch.zeros(size, requires_grad=True)
    kl_weight = 0.5 if objective == "lambda" else None
    out = fused_lk.lk_loss(
        hidden, head.requires_grad_(), fused_lk.Target.from_logits(t), bias=bias, objective=objective,
        kl_weight=kl_weight, impl=impl, **options,
    )  # fmt: skip
    d_hidden, d_head, d_bias = torch.autograd.grad(out.loss, (hidden, head, bias))
    return out, d_hidden[:, :-1], d_hidden[:, -1], d_head, d_bias


def allowed_error(truth, z, t, objective):
    """Per row: 1.5 times the eager error, and a few roundings of the largest factor."""
    _, theirs = eager(z.float(), t.float(), objective)
    return 1.5 * truth.error(theirs).amax(1).nan_to_num(0) + 16 * EPS * truth.factor


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("member", hard_rows.FAMILY)
def test_gradients_within_the_eager_error(member, impl, walk, monkeypatch):
    if launch.INTERPRETED:
        monkeypatch.setattr(launch, "INTERPRETER_BLOCK_V", 256)
    z, t = hard_rows.make(member, ROWS[impl], SIZE)
    for objective in OBJECTIVES[impl]:
        truth = hard_rows.Truth(z, t.log_softmax(1), objective)
        out, gradient, row_sums, _, d_bias = through_a_head(z.float(), t.float(), objective, impl, **WALKS[walk])
        allowed = allowed_error(truth, z, t, objective)
        assert (truth.error(gradient).amax(1) <= allowed).all(), objective
        # rows sum to zero, whatever the walk decided about ties
        assert (row_sums.abs() <= 16 * EPS * truth.factor).all(), objective
        assert d_bias.sum().abs() <= 16 * EPS * truth.factor.sum(), objective
        theirs = (eager(z.float(), t.float(), objective)[0].double() - truth.loss).abs().nan_to_num(0)
        assert (out.loss.double() - truth.loss).abs() <= 1.5 * theirs + 8 * EPS * (1 + truth.loss.abs()), objective


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("member", ["sure_of_the_same", "sure_alike", "sure_of_different_ones"])
def test_sure_rows_keep_their_digits(member, impl, walk):
    """Eager keeps absolute digits: a gradient of 1e-9 is off by 1e-7. Here they are relative to what draft and target
    leave to all other tokens, 1 - q and 1 - p, which is how large the row's gradient can be."""
    z, t = hard_rows.make(member, ROWS[impl], SIZE)
    for objective in OBJECTIVES[impl]:
        truth = hard_rows.Truth(z, t.log_softmax(1), objective)
        _, gradient, _, _, _ = through_a_head(z.float(), t.float(), objective, impl, **WALKS[walk])
        top = z.argmax(1, keepdim=True)
        others = torch.maximum(*(x.softmax(1).scatter(1, top, 0.0).sum(1) for x in (z, t)))
        # The exponential of a log-probability of -40 has the rounding of 40; the truth has that of float64 beside 1.
        allowed = (64 * EPS * others + 8 * torch.finfo(torch.float64).eps) * truth.factor
        assert (truth.error(gradient).amax(1) <= allowed).all(), objective


@pytest.mark.parametrize("impl", IMPLS)
def test_total_variation_of_sure_rows(impl):
    """1 - alpha of 1e-3 to 1e-12 keeps its digits, too, and log alpha with it."""
    z, t = hard_rows.make("sure_of_the_same", ROWS[impl], SIZE)
    alike = fused_lk.lk_divergences_from_logits(z.float(), fused_lk.Target.from_logits(t.float()), impl=impl)
    tv = (z.softmax(1) - t.softmax(1)).clamp(min=0).sum(1)  # float64, and no difference from 1
    torch.testing.assert_close(-alike.log_acceptance.double().expm1(), tv, rtol=1e-4, atol=1e-15)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("how", [{"plan": "one_pass"}, {"plan": "recompute"}, {"reduction": "none"}], ids=str)
def test_gradients_of_small_alpha_keep_their_digits(how, impl):
    """d TV = -alpha d log alpha: an alpha of 4e-6 that is taken as 1 - (1 - alpha) was off by 1 %."""
    z, t = hard_rows.make("sure_of_different_ones", ROWS[impl], SIZE)
    truth = hard_rows.Truth(z, t.log_softmax(1), "tv")
    leaf = z.float().requires_grad_()
    out = fused_lk.lk_loss_from_logits(leaf, fused_lk.Target.from_logits(t.float()), objective="tv", impl=impl, **how)
    (gradient,) = torch.autograd.grad(out.loss.sum() / (len(z) if "reduction" in how else 1), leaf)
    assert (truth.error(gradient) <= 1e-5 * truth.gradient.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("walk", ["recompute", "recompute, blocks of columns"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("member", hard_rows.FAMILY)
def test_other_last_bits_in_the_backward(member, impl, walk, monkeypatch):
    """No library promises that a product of another shape has the same bits. Here every product comes out a few units
    in the last place beside the last one: nothing but roundings may come of it."""
    if member == "offsets":
        pytest.skip("a few units in the last place of 1e6 are no rounding")
    generator = torch.Generator().manual_seed(1)
    product = gemm.linear_into

    def jittered(out, x, weight, bias):
        product(out, x, weight, bias)
        noise = torch.empty(out.shape).uniform_(-2, 2, generator=generator)
        out.copy_(out * (1 + EPS * noise))

    z, t = hard_rows.make(member, ROWS[impl], SIZE)
    for objective in OBJECTIVES[impl][-3:]:
        with monkeypatch.context() as patched:
            patched.setattr(gemm, "linear_into", jittered)
            _, gradient, row_sums, _, _ = through_a_head(z.float(), t.float(), objective, impl, **WALKS[walk])
        # Noise in z moves q and r by as much, and the ramp of a tied column that is not the draft's maximum by noise /
        # (2 * TIE). In sure rows the gradient is as small as those columns together, and so must its error be.
        noise = 4 * EPS * z.masked_fill(z == NEG_INF, 0).abs().amax()
        truth = hard_rows.Truth(z, t.log_softmax(1), objective, noise=noise)
        roundings = (4 * noise + 16 * EPS) * truth.factor
        undecided = truth.undecided * (noise / (2 * tie_width(torch.float32))).clamp(max=1)
        assert (truth.error(gradient) <= (undecided + roundings).unsqueeze(1)).all()
        assert (row_sums.abs() <= undecided + roundings).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("member", hard_rows.FAMILY)
def test_a_common_offset_changes_nothing(member, impl):
    """Logits in hand in steps of 1/16, and 2**16 on top: the same numbers, to the last bit of the logits."""
    z, t = ((x * 16).round() / 16 for x in hard_rows.make(member, ROWS[impl], SIZE))
    if member == "offsets":
        z, t = z - z.amax(1, keepdim=True), t - t.amax(1, keepdim=True)
    results = []
    for a, b in ((0, 0), (2**16, 0), (0, -(2**16)), (2**16, 2**16)):
        leaf = (z + a).float().requires_grad_()
        target = fused_lk.Target.from_logits((t + b).float())
        out = fused_lk.lk_loss_from_logits(leaf, target, objective="lambda", kl_weight=0.5, impl=impl)
        results.append((out.loss.detach(), *torch.autograd.grad(out.loss, leaf)))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=4 * EPS, atol=4 * EPS)
        torch.testing.assert_close(gradient, results[0][1], rtol=4 * EPS, atol=EPS / len(z))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_an_offset_over_a_truncated_vocabulary(kind, impl):
    """The normaliser of the full vocabulary keeps its digits, too; KL was off by 7 % at 1e6."""
    size = 400
    z, t = ((x * 16).round() / 16 for x in hard_rows.make("trained", ROWS[impl], size))
    t2d = torch.rand(size, generator=torch.Generator().manual_seed(2)) < 0.75
    truth = hard_rows.Truth(z[:, t2d], t.log_softmax(1)[:, t2d], "lambda")
    for offset in (0.0, 1e4, 1e6 if kind == "logits" else 0.0):
        logits = (t + offset).float()
        vocab = fused_lk.DraftVocab(t2d)
        if kind == "logits":
            target = fused_lk.Target.from_logits(logits, vocab, impl=impl)
        else:
            target = fused_lk.Target.from_hidden(logits, torch.eye(size), vocab=vocab, impl=impl)
        leaf = (z[:, t2d] - offset).float().requires_grad_()
        out = fused_lk.lk_loss_from_logits(leaf, target, objective="lambda", kl_weight=0.5, impl=impl)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        torch.testing.assert_close(out.loss.double(), truth.loss, rtol=1e-5, atol=1e-6)
        assert truth.error(gradient).max() <= 32 * EPS / len(z)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("member", hard_rows.FAMILY)
def test_permuting_the_vocabulary_permutes_the_gradient(member, impl):
    z, t = (x.float() for x in hard_rows.make(member, ROWS[impl], SIZE))
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(3))
    results = []
    for columns in (torch.arange(SIZE), order):
        leaf = z[:, columns].clone().requires_grad_()
        target = fused_lk.Target.from_logits(t[:, columns].contiguous())
        out = fused_lk.lk_loss_from_logits(leaf, target, objective="tv", impl=impl)
        results.append((out.loss.detach(), *torch.autograd.grad(out.loss, leaf)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=8 * EPS, atol=4 * EPS)
    truth = hard_rows.Truth(z.double(), t.double().log_softmax(1), "tv")
    difference = (results[0][1][:, order] - results[1][1]).abs().double() - 2 * truth.slack[:, order]
    assert difference.max() <= 8 * EPS / len(z)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("member", ["sure_alike", "trained", "impossible_tokens"])
def test_splitting_a_batch_adds_up(member, impl):
    z, t = (x.float() for x in hard_rows.make(member, ROWS[impl], SIZE))

    def run(rows):
        leaf = z[rows].clone().requires_grad_()
        target = fused_lk.Target.from_logits(t[rows])
        out = fused_lk.lk_loss_from_logits(leaf, target, objective="tv", reduction="sum", impl=impl)
        return out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0]

    whole, gradient = run(slice(None))
    parts = [run(slice(a, a + 5)) for a in range(0, len(z), 5)]
    torch.testing.assert_close(sum(x for x, _ in parts), whole, rtol=4 * EPS, atol=0)
    torch.testing.assert_close(torch.cat([g for _, g in parts]), gradient, rtol=EPS, atol=EPS)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("draft", ["early", "late", "sure"])
@pytest.mark.parametrize("walk", WALKS)
def test_a_real_model(draft, walk, impl):
    """Hidden states of SmolLM2 and of a draft trained on it; float32 beside the eager loss on the same numbers."""
    data = hard_rows.smollm2()
    rows = slice(0, 128 if impl == "torch" else 24)
    scale = 4.0 if draft == "sure" else 1.0
    states, head, t2d = data["target_hidden"][rows].float() * scale, data["target_head"].float(), data["t2d"]
    hidden = data[f"draft_hidden_{draft}"][rows].float()
    target = fused_lk.Target.from_hidden(states, head, vocab=fused_lk.DraftVocab(t2d), impl=impl)

    def gradients(loss, *leaves):
        return [x.double() for x in torch.autograd.grad(loss, leaves)]

    for objective in ("tv", "alpha", "lambda"):
        kl_weight = 0.5 if objective == "lambda" else None

        def eager_loss(dtype, objective=objective):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, head[t2d])]
            z = F.linear(*leaves)
            p = F.log_softmax(F.linear(states.to(dtype), head.to(dtype)), 1)[:, t2d]
            log_alpha, kl = reference.divergences(z, p)
            losses = {"tv": -log_alpha.expm1(), "alpha": -log_alpha, "lambda": 0.5 * kl - 0.5 * log_alpha.expm1()}
            return losses[objective].mean(), leaves, (z, p)

        exact, leaves, (z, log_p) = eager_loss(torch.float64)
        want = gradients(exact, *leaves)
        plain, leaves, _ = eager_loss(torch.float32)
        theirs = gradients(plain, *leaves)
        ours = [x.clone().requires_grad_() for x in (hidden, head[t2d])]
        options = dict(WALKS[walk])
        if "workspace_mb" in options:
            options["workspace_mb"] = 0.15
        out = fused_lk.lk_loss(*ours, target, objective=objective, kl_weight=kl_weight, impl=impl, **options)
        got = gradients(out.loss, *ours)
        # What ties leave open, in the hidden states and in the head.
        noise = 4 * EPS * z.detach().abs().amax()
        truth = hard_rows.Truth(z.detach(), log_p.detach(), objective, noise=noise)
        slack = [(truth.slack @ leaves[1].double().abs()).max(), (truth.slack.t() @ leaves[0].double().abs()).max()]
        for name, a, b, c, open_ in zip(("dH", "dW"), got, want, theirs, slack, strict=True):
            error, allowed = (a - b).abs().max(), (c - b).abs().max()
            # Products of other shapes have other last bits of z: half of `noise`, which q and r take over relatively.
            budget = 1.5 * allowed + (8 * EPS + noise / 2) * b.abs().max() + open_
            assert error <= budget, f"{objective} {name}: {error:.3g}, eager {allowed:.3g}, ties {open_:.3g}"
        assert (out.loss - exact).abs() <= 1.5 * (plain - exact).abs() + 16 * EPS * (1 + exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("logits", ["compute", torch.float32], ids=["compute", "float32"])
@pytest.mark.parametrize("walk", ["one pass", "recompute, blocks of columns"])
def test_a_real_model_in_half_precision(walk, logits, dtype):
    """The draft that is nearly its target, at 4 times its logits: errors within those of the eager loss of this dtype,
    whether logits are rounded to it or not."""
    data = hard_rows.smollm2()
    rows = slice(0, 64)
    states, head, t2d = data["target_hidden"][rows].to(dtype) * 4, data["target_head"].to(dtype), data["t2d"]
    hidden = data["draft_hidden_sure"][rows].to(dtype)
    target = fused_lk.Target.from_hidden(states, head, vocab=fused_lk.DraftVocab(t2d), logits_dtype=logits)
    options = dict(WALKS[walk])
    if "workspace_mb" in options:
        options["workspace_mb"] = 0.05
    for objective in ("tv", "lambda"):
        kl_weight = 0.5 if objective == "lambda" else None

        def gradients(to, objective=objective):
            leaves = [x.to(to, copy=True).requires_grad_() for x in (hidden, head[t2d])]
            wide = torch.promote_types(to, torch.float32)
            p = F.log_softmax(F.linear(states.to(to), head.to(to)).to(wide), 1)[:, t2d]
            log_alpha, kl = reference.divergences(F.linear(*leaves).to(wide), p)
            losses = {"tv": -log_alpha.expm1(), "alpha": -log_alpha, "lambda": 0.5 * kl - 0.5 * log_alpha.expm1()}
            return [x.double() for x in torch.autograd.grad(losses[objective].mean(), leaves)]

        ours = [x.clone().requires_grad_() for x in (hidden, head[t2d])]
        out = fused_lk.lk_loss(*ours, target, objective=objective, kl_weight=kl_weight, logits_dtype=logits, **options)
        got = [x.double() for x in torch.autograd.grad(out.loss, ours)]
        for a, b, c in zip(got, gradients(torch.float64), gradients(dtype), strict=True):
            error, allowed = (a - b).norm(), (c - b).norm()
            assert error <= 1.1 * allowed + 2 * torch.finfo(dtype).eps * b.norm(), objective


@pytest.mark.parametrize("objective", ["tv", "lambda"])
def test_default_options_at_a_real_size(objective):
    """400 tokens, 32,000 columns, top logits of 5 to 35: more than one block of columns. This was off by 170 %."""
    generator = torch.Generator().manual_seed(0)
    size, width = 32_000, 64
    head = torch.randn(size, width, generator=generator)
    tops = torch.randint(size, (400,), generator=generator)
    height = torch.linspace(5, 35, 400).unsqueeze(1) / width
    states = head[tops] * height + 0.1 * torch.randn(400, width, generator=generator)
    hidden = states * (1 + 0.01 * torch.randn(400, width, generator=generator))
    leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    target = fused_lk.Target.from_hidden(states, head)
    out = fused_lk.lk_loss(*leaves, target, objective=objective, plan="recompute")
    got = torch.autograd.grad(out.loss, leaves)

    def eager_gradients(dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, head)]
        log_p = F.log_softmax(F.linear(states.to(dtype), head.to(dtype)), 1)
        log_alpha, kl = reference.divergences(F.linear(*leaves), log_p)
        acceptance = log_alpha.exp()
        lam = 0.0 if objective == "tv" else torch.exp(-3 * acceptance.detach().mean())
        loss = (lam * kl + (1 - lam) * -log_alpha.expm1()).mean()
        return torch.autograd.grad(loss, leaves)

    for a, b, c in zip(got, eager_gradients(torch.float64), eager_gradients(torch.float32), strict=True):
        error, allowed = ((x.double() - b).norm() / b.norm() for x in (a, c))
        assert error <= 2 * allowed + 1e-5, f"{error:.3g}, eager {allowed:.3g}"


@pytest.mark.parametrize("impl", IMPLS)
def test_next_to_no_mass_on_the_draft_vocabulary(impl):
    """p of e-200: in log space, and KL of the renormalised p keeps its digits beside it."""
    z, t = hard_rows.make("normal", ROWS[impl], SIZE)
    other = torch.full((len(t), 1), 200.0, dtype=torch.float64)
    full = torch.cat([t, other], 1)
    vocab = fused_lk.DraftVocab(torch.arange(SIZE + 1) < SIZE)
    for objective in ("kl", "alpha", "lambda"):
        truth = hard_rows.Truth(z, full.log_softmax(1)[:, :SIZE], objective)
        leaf = z.float().requires_grad_()
        out = fused_lk.lk_loss_from_logits(
            leaf, fused_lk.Target.from_logits(full.float(), vocab, impl=impl), objective=objective,
            kl_weight=0.5 if objective == "lambda" else None, impl=impl,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        assert (truth.error(gradient) <= 16 * EPS * truth.factor.unsqueeze(1)).all(), objective
        torch.testing.assert_close(out.loss.double(), truth.loss, rtol=1e-5, atol=1e-6)
