"""The functions of `specforge.core.lk_loss`, and where the originals give NaN."""

from __future__ import annotations

import inspect

import peers
import pytest
import torch

from fused_lk.integrations import specforge

PEER = peers.specforge()
DEVICE = peers.device()
B, S, V_DRAFT = 4, 24, 64


def probabilities(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator)).softmax(-1).to(DEVICE)


FUNCTIONS = ("expected_acceptance_rate", "compute_acceptance_rate", "compute_lk_loss")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures(name):
    ours, theirs = (inspect.signature(getattr(of, name)).parameters for of in (specforge, PEER.lk_loss))
    assert [(x.name, x.kind, x.default) for x in ours.values()] == [
        (x.name, x.kind, x.default) for x in theirs.values()
    ]


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.long, torch.float32])
@pytest.mark.parametrize("lk_loss_type", ["alpha", "lambda"])
def test_functions_agree(lk_loss_type, mask_dtype):
    target = 0.8 * probabilities(B, S, V_DRAFT)
    mask = (torch.rand(B, S, 1, generator=torch.Generator().manual_seed(1)) * 2).to(DEVICE)
    mask = (mask * (mask > 0.7)).to(mask_dtype)
    logits = torch.randn(B, S, V_DRAFT, generator=torch.Generator().manual_seed(2)).to(DEVICE)

    def reduce(*, local_correct, local_denom):
        return local_correct * 2 + 0.25, local_denom * 3

    def loss_of(functions, reduce_fn):
        leaf = logits.clone().requires_grad_()
        rates = functions.compute_acceptance_rate(
            logits=leaf, target_probs=target, position_mask=mask, reduce_fn=reduce_fn
        )
        loss = functions.compute_lk_loss(
            kl_loss=leaf.square().mean(),
            acceptance_rate=rates[0],
            log_acceptance_rate=rates[1],
            lk_loss_type=lk_loss_type,
            kl_scale=-0.5,
            kl_decay=1.5,
        )
        loss.backward()
        return *rates, loss, leaf.grad

    def reduce_to_nothing(*, local_correct, local_denom):
        return local_correct, local_denom * 0

    for reduce_fn in (None, reduce, reduce_to_nothing):
        for got, want in zip(loss_of(specforge, reduce_fn), loss_of(PEER.lk_loss, reduce_fn), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
    p, q = probabilities(3, 5), probabilities(3, 5, seed=1)
    assert torch.equal(specforge.expected_acceptance_rate(p, q), PEER.lk_loss.expected_acceptance_rate(p, q))


def test_functions_where_the_originals_give_nan():
    logits = torch.zeros(1, 3, V_DRAFT, device=DEVICE)
    logits[..., 0] = 300.0
    target = torch.zeros(1, 3, V_DRAFT, device=DEVICE)
    target[:, :2, 1] = 1.0  # disjoint; the third row has no mass at all
    mask = torch.ones(1, 3, 1, device=DEVICE)

    def gradient(functions, mask=mask):
        leaf = logits.clone().requires_grad_()
        rate, log_rate = functions.compute_acceptance_rate(logits=leaf, target_probs=target, position_mask=mask)
        log_rate.backward()
        assert functions is not specforge or (rate.isfinite() and log_rate.isfinite())
        return leaf.grad

    assert gradient(PEER.lk_loss).isnan().any()
    ours = gradient(specforge)
    assert ours.isfinite().all() and ours[:, :2].abs().sum() > 0 and not ours[:, 2].any()

    logits[:, 0], mask[:, 0] = float("nan"), 0
    assert gradient(PEER.lk_loss).isnan().any()
    ours = gradient(specforge)
    assert ours.isfinite().all() and not ours[:, 0].any() and ours[:, 1].any()


def test_functions_refuse():
    with pytest.raises(ValueError, match="lk_loss_type"):
        specforge.compute_lk_loss(
            kl_loss=None, acceptance_rate=None, log_acceptance_rate=None, lk_loss_type="beta", kl_scale=1, kl_decay=1
        )
    with pytest.raises(ValueError, match="draft_probs"):
        specforge.expected_acceptance_rate(torch.ones(2, 3), torch.ones(3, 2))
