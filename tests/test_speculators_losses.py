"""The functions that stand in for `speculators.losses.fused`, and their registration."""

from __future__ import annotations

import inspect

import peers
import pytest
import torch

from fused_lk.integrations import speculators

PEER = peers.speculators()
DEVICE = peers.device()
# The published functions go by longer names; the fused one of nla does not.
NAMES = {
    "kl_div": "kl_div",
    "rkl": "reverse_kl_div",
    "jsd": "js_div",
    "ce": "ce",
    "tv": "tv",
    "nla": "neg_log_acceptance",
    "lk_hybrid": "lk_hybrid",
}


def eager(name):
    return getattr(PEER.eager, f"{NAMES[name]}_loss")


def ours(name):
    return getattr(speculators, f"fused_{'nla' if name == 'nla' else NAMES[name]}_loss")


def make_logits(seed=0, scale=2.0, shape=(1, 9, 57)):
    generator = torch.Generator().manual_seed(seed)
    return tuple((scale * torch.randn(shape, generator=generator)).to(DEVICE) for _ in range(2))


@pytest.fixture
def registered():
    speculators.register()
    yield
    speculators.unregister()


def value_and_gradient(loss, logits, targets, **options):
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, targets, **options)
    weights = torch.linspace(0.5, 2, value.numel(), device=value.device).view(value.shape)
    return value, torch.autograd.grad((value * weights).sum(), leaf)[0]


@pytest.mark.parametrize("name", NAMES)
def test_functions_agree(name):
    logits, targets = make_logits()
    for options in ({}, {"eta": 1.3}) if name == "lk_hybrid" else ({},):
        for got, want in zip(
            value_and_gradient(ours(name), logits, targets, **options),
            value_and_gradient(eager(name), logits, targets, **options),
            strict=True,
        ):
            assert got.dtype == want.dtype == torch.float32
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert inspect.signature(ours(name)).parameters.keys() == inspect.signature(eager(name)).parameters.keys()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_no_worse(name):
    """Both compute in float32 from the same bf16 logits; the gradient comes back in bf16."""
    logits, targets = (x.bfloat16() for x in make_logits())
    truth = value_and_gradient(eager(name), logits.float(), targets.float())
    for got, peer, exact in zip(
        value_and_gradient(ours(name), logits, targets),
        value_and_gradient(eager(name), logits, targets),
        truth,
        strict=True,
    ):
        assert got.dtype == peer.dtype or name == "ce"  # eager cross-entropy rounds its value, and fused does not
        assert (got - exact).abs().max() <= 1.05 * (peer - exact).abs().max() + 2e-6


def test_where_nla_is_not_clamped():
    logits, targets = make_logits(scale=0.1)
    logits[0, 0, 3], targets[0, 0, 4] = 40.0, 40.0
    value, gradient = value_and_gradient(ours("nla"), logits, targets)
    clamped, no_gradient = value_and_gradient(eager("nla"), logits, targets)
    assert clamped[0, 0].item() == pytest.approx(11.5129, abs=1e-3) and not no_gradient[0, 0].any()
    assert value[0, 0] > 30 and gradient[0, 0].abs().max() > 0.2
    torch.testing.assert_close(value[0, 1:], clamped[0, 1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "rkl"])
def test_impossible_target_tokens(name):
    """-inf among the target's logits is a zero probability, as its limit; a row of nothing else is left out."""
    logits, targets = make_logits()
    targets[..., :5] = float("-inf")
    limit = targets.clone()
    limit[..., :5] = -1e4
    got, want = value_and_gradient(ours(name), logits, targets), value_and_gradient(eager(name), logits, limit)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    targets[0, 2] = float("-inf")
    value, gradient = value_and_gradient(ours(name), logits, targets)
    assert value[0, 2] == 0 and not gradient[0, 2].any() and gradient.isfinite().all()


def test_reverse_kl_of_impossible_tokens_is_infinite():
    """It has no gradient there, where the published one is NaN."""
    logits, targets = make_logits()
    targets[0, 2, :5] = float("-inf")
    value, gradient = value_and_gradient(ours("rkl"), logits, targets)
    theirs, their_gradient = value_and_gradient(eager("rkl"), logits, targets)
    assert value[0, 2] == theirs[0, 2] == float("inf")
    assert not gradient[0, 2].any() and not their_gradient[0, 2].isfinite().all()
    torch.testing.assert_close(gradient[0, 3:], their_gradient[0, 3:], rtol=1e-5, atol=1e-6)


def test_targets_get_no_gradient():
    logits, targets = (x.requires_grad_() for x in make_logits())
    speculators.fused_lk_hybrid_loss(logits, targets).sum().backward()
    assert logits.grad is not None and targets.grad is None


def test_register_and_unregister():
    resolve = PEER.utils.resolve_loss_config
    before = dict(PEER.utils._FUSED_LOSS_FN_MAP)
    speculators.register()
    speculators.register()
    try:
        for name in NAMES:
            assert resolve(name) == {name: (ours(name), 1.0)}
            assert resolve(name, "eager") == {name: (eager(name), 1.0)}
        mixed = resolve('{"ce": 0.1, "tv": 0.9}')
        assert mixed["tv"] == (speculators.fused_tv_loss, 0.9)
        assert mixed["ce"] == (speculators.fused_ce_loss, 0.1)
    finally:
        speculators.unregister()
    speculators.unregister()
    assert before == PEER.utils._FUSED_LOSS_FN_MAP
    assert resolve("tv") == {"tv": (PEER.utils.tv_loss, 1.0)}


def test_unregister_leaves_what_others_registered(registered):
    table = PEER.utils._FUSED_LOSS_FN_MAP
    theirs = lambda logits, targets: logits.sum(-1)  # noqa: E731
    published, table["tv"] = speculators.losses._replaced["tv"], theirs
    speculators.unregister()
    assert table["tv"] is theirs and table["nla"] is not speculators.fused_nla_loss
    table["tv"] = published


def test_registered_losses_train(registered):
    """Through their own masked, decayed mean."""
    logits, targets = make_logits()
    mask = torch.arange(9, device=DEVICE).unsqueeze(0) > 2

    def total(implementation):
        config = PEER.utils.resolve_loss_config('{"kl_div": 0.3, "lk_hybrid": 0.7}', implementation)
        leaf = logits.clone().requires_grad_()
        positions = torch.full((1, 9), 1, device=DEVICE)
        decay = lambda pos_idx, **_: PEER.utils.exp_loss_decay(pos_idx, 0.8)  # noqa: E731
        loss, _ = PEER.utils.compound_loss(leaf, targets, mask, positions, config, decay)
        return loss, torch.autograd.grad(loss, leaf)[0]

    for got, want in zip(total("fused"), total("eager"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
