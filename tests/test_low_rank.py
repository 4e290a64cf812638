"""A second product in the draft's logits, `h W^T + u M^T`, against one product of `[h, u]` and `[W, M]`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations
from torch.utils.checkpoint import checkpoint

import fused_lk
from fused_lk import reference

IMPLS = ["torch", "triton"]
SIZE, WIDTH, RANK = 70, 4, 2  # more than a block of columns
WALKS = {
    "one pass": {"plan": "one_pass", "kl_weight": 0.4},
    "one pass, small chunks": {"plan": "one_pass", "kl_weight": 0.4, "workspace_mb": 0.001},
    "by rows": {"plan": "recompute", "objective": "alpha"},
    "by vocabulary": {"plan": "recompute", "objective": "alpha", "workspace_mb": 0.001},
}


class Case:
    """`tokens` rows in `steps` tensors, some masked; float64 unless said."""

    def __init__(self, tokens=6, steps=1, dtype=torch.float64, bias=True):
        generator = torch.Generator().manual_seed(0)
        randn = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)  # noqa: E731
        self.steps = steps
        self.hidden = [randn(tokens, WIDTH) for _ in range(steps)]
        self.u = [randn(tokens, RANK) for _ in range(steps)]
        self.weight, self.m = randn(SIZE, WIDTH), randn(SIZE, RANK)
        self.bias = randn(SIZE) if bias else None
        self.logits = randn(tokens * steps, SIZE)
        self.mask = torch.rand(steps, tokens, generator=generator) > 0.3

    def leaves(self, frozen=()):
        made = [x.clone() for x in (*self.hidden, *self.u, self.weight, self.m)]
        made += [] if self.bias is None else [self.bias.clone()]
        names = ["h"] * self.steps + ["u"] * self.steps + ["weight", "m", "bias"]
        return [x.requires_grad_(name not in frozen) for x, name in zip(made, names, strict=False)]

    def parts(self, leaves):
        k = self.steps
        h, u, (weight, m, *bias) = leaves[:k], leaves[k : 2 * k], leaves[2 * k :]
        return (h[0], u[0]) if k == 1 else (h, u), weight, m, bias[0] if bias else None

    def run(self, leaves, call=fused_lk.lk_loss, **options):
        (h, u), weight, m, bias = self.parts(leaves)
        shape = (self.steps, -1, SIZE) if self.steps > 1 else (-1, SIZE)
        target = fused_lk.Target.from_logits(self.logits.view(shape))
        mask = self.mask if self.steps > 1 else self.mask[0]
        given = {"pairs": fused_lk.Pairs(mask, skip_masked=False)} if options.pop("kept", False) else {"mask": mask}
        return call(h, weight, target, bias=bias, low_rank=(u, m), **given, **options)

    def logits_of(self, leaves):
        (h, u), weight, m, bias = self.parts(leaves)
        rows = torch.cat([torch.cat(x) if isinstance(x, list) else x for x in (h, u)], 1)
        return F.linear(rows, torch.cat([weight, m], 1), bias)

    def expected(self, leaves, objective="lambda", kl_weight=None, softcap=None, **_):
        z = reference.head_logits(self.logits_of(leaves), softcap=softcap)
        steps = self.steps
        positions = torch.arange(steps).repeat_interleave(len(z) // steps)
        more = {"weights": self.mask.reshape(-1), "positions": positions, "num_positions": steps}
        log_p = reference.target_log_probs(self.logits)
        return reference.lk_loss(z, log_p, objective=objective, kl_weight=kl_weight, **more).loss


def tokens_of(walk):
    """More pairs than columns are walked by rows."""
    return 72 if walk == "by rows" else 6


def assert_same(a, b, rtol=1e-8, atol=1e-11):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


@pytest.mark.parametrize("how", ["plain", "no bias", "list", "kept"])
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_losses_and_gradients(impl, walk, how):
    case = Case(tokens_of(walk), steps=2 if how == "list" else 1, bias=how != "no bias")
    options = WALKS[walk] | ({"kept": True} if how == "kept" else {}) | ({"softcap": 3.0} if how == "plain" else {})
    leaves, oracle = case.leaves(), case.leaves()
    loss, expected = case.run(leaves, impl=impl, **options).loss, case.expected(oracle, **options)
    torch.testing.assert_close(loss, expected)
    assert_same(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, oracle))


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize(
    "frozen", [("weight", "bias"), ("h", "weight", "bias"), ("m",), ("u", "m"), ("h", "u")], ids=str
)
def test_frozen_parts(frozen, walk):
    case = Case(tokens_of(walk), steps=2)
    leaves, oracle = case.leaves(frozen), case.leaves(frozen)
    loss, expected = case.run(leaves, **WALKS[walk]).loss, case.expected(oracle, **WALKS[walk])
    wanted = [[x for x in made if x.requires_grad] for made in (leaves, oracle)]
    assert_same(torch.autograd.grad(loss, wanted[0]), torch.autograd.grad(expected, wanted[1]))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl):
    case = Case(3)

    def primitive(*leaves):
        d = case.run(leaves, fused_lk.lk_divergences, impl=impl)
        return d.log_acceptance, d.kl

    assert torch.autograd.gradcheck(primitive, case.leaves(), eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("logits", ["compute", torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("walk", WALKS)
def test_half_precision(walk, dtype, logits):
    """Errors against float64 within those of the eager loss, which rounds each product and their sum."""
    case = Case(dtype=dtype)
    results = []
    for to in (torch.float64, dtype):
        leaves = [x.detach().to(to).requires_grad_() for x in case.leaves()]
        h, u, weight, m, bias = leaves
        z = F.linear(h, weight, bias) + F.linear(u, m)
        options = {name: x for name, x in WALKS[walk].items() if name in ("objective", "kl_weight")}
        expected = reference.lk_loss(
            z.to(torch.promote_types(to, torch.float32)), reference.target_log_probs(case.logits.to(to)),
            weights=case.mask.reshape(-1), **options,
        ).loss  # fmt: skip
        results.append([x.double() for x in torch.autograd.grad(expected, leaves)])
    leaves = case.leaves()
    got = torch.autograd.grad(case.run(leaves, logits_dtype=logits, **WALKS[walk]).loss, leaves)
    for a, b, c in zip(got, *results, strict=True):
        assert (a.double() - b).norm() <= 1.2 * (c - b).norm() + 4 * torch.finfo(dtype).eps * b.norm()


@pytest.mark.parametrize("walk", ["one pass", "by vocabulary"])
@pytest.mark.parametrize("steps", [1, 2])
def test_under_compile(steps, walk):
    case = Case(steps=steps)
    loss = lambda *leaves: case.run(leaves, **WALKS[walk]).loss  # noqa: E731
    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = case.leaves()
        value = call(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert_same(*results)


def test_checkpointing_autocast_and_the_module():
    case = Case(dtype=torch.float32)
    loss = lambda *leaves: case.run(leaves, **WALKS["by rows"]).loss  # noqa: E731
    results = []
    for call in (loss, lambda *leaves: checkpoint(loss, *leaves, use_reentrant=False)):
        leaves = case.leaves()
        value = call(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert_same(*results, rtol=1e-6, atol=1e-7)
    module = fused_lk.LKLoss("alpha")
    torch.testing.assert_close(case.run(case.leaves(), module).loss, results[0][0])
    with torch.autocast("cpu", torch.bfloat16):
        value = case.run(leaves := case.leaves(), objective="alpha").loss
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(value, leaves))
    torch.testing.assert_close(value.detach(), results[0][0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("walk", WALKS)
def test_no_bias_of_full_size_and_no_head_beside_the_others(walk, monkeypatch):
    """Nothing as large as `[tokens, V]` is made, nor `[W, M]` side by side, or their gradient."""
    monkeypatch.setattr("fused_lk.rows.plain.BLOCK_ELEMENTS", SIZE)
    tokens = tokens_of(walk) if walk == "by rows" else 24
    case = Case(tokens, dtype=torch.float32)
    leaves = case.leaves()
    options = WALKS[walk] | {"workspace_mb": 0.0075 if walk == "by rows" else 0.004}
    with Allocations() as seen:
        case.run(leaves, **options).loss.backward()
    assert seen.of_width(RANK), "the watcher saw nothing at all"
    assert not seen.at_least(int(case.mask.sum()) * SIZE)
    assert not {(SIZE, WIDTH + RANK), (tokens, WIDTH + RANK)} & set(seen.of_width(WIDTH + RANK))


def test_explained():
    with_one = fused_lk.explain(64, 60, 512, low_rank=4, objective="kl", device="cpu", dtype=torch.float32)
    as_wide = fused_lk.explain(64, 64, 512, target_hidden_size=60, objective="kl", device="cpu", dtype=torch.float32)
    assert with_one == as_wide


BAD = [
    (lambda c: c.u[0], TypeError, "a pair"),
    (lambda c: (c.u[0][:-1], c.m), ValueError, "given as the hidden states are"),
    (lambda c: ([c.u[0], c.u[0]], c.m), ValueError, "given as the hidden states are"),
    (lambda c: (c.u[0], c.m[:-1]), ValueError, "a row per row of draft_lm_head_weight"),
    (lambda c: (c.u[0], c.m[:, :1]), ValueError, "a row per row of draft_lm_head_weight"),
    (lambda c: (c.u[0].float(), c.m), TypeError, r"low_rank\[0\] of draft_hidden's dtype"),
    (lambda c: (c.u[0], c.m.float()), TypeError, r"low_rank\[1\] of draft_hidden's dtype"),
    (lambda c: (c.u[0], c.m[0]), ValueError, r"low_rank\[1\] with 2 dimension"),
    (lambda c: (c.u[0][:, :0], c.m[:, :0]), ValueError, "rank of at least 1"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=[x[2] for x in BAD])
def test_what_is_refused(make, error, message):
    case = Case()
    target = fused_lk.Target.from_logits(case.logits)
    for call in (fused_lk.lk_loss, fused_lk.lk_divergences):
        with pytest.raises(error, match=message):
            call(case.hidden[0], case.weight, target, low_rank=make(case))
