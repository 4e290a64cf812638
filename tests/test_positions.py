"""Objectives and weights over positions: against loops, the oracle and the published weights; neutral where ignored."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import peers
import pytest
import torch

import fused_lk
from fused_lk import positions

SHAPES = {0: (4, 5, 3), 1: (5, 4, 3), -1: (5, 3, 4)}


def make(dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.rand(SHAPES[dim], dtype=torch.float64, generator=generator)
    supervised = torch.rand(SHAPES[dim], generator=generator) > 0.4
    alpha.movedim(dim, 0)[1, 2] = 0  # the products of a chain that an alpha of 0 ends still have a gradient
    supervised.movedim(dim, 0)[:, 1] = False  # a block without tokens
    return alpha.requires_grad_(), supervised


@pytest.mark.parametrize("dim", SHAPES)
def test_lengths_and_total_variation(dim):
    alpha, supervised = make(dim)
    first, counts = alpha.detach().movedim(dim, 0), supervised.movedim(dim, 0)
    length = positions.acceptance_length(alpha, supervised, dim)
    torch.testing.assert_close(length, fused_lk.reference.expected_acceptance_length(first, counts))
    tv = positions.end_to_end_tv(alpha, supervised, dim)
    for i in range(5):
        for j in range(3):
            reached, total, n = 1.0, 0.0, 0
            for k in range(4):
                if counts[k, i, j]:
                    reached *= first[k, i, j].item()
                    total, n = total + reached, n + 1
            assert length[i, j].item() == pytest.approx(1 + total)
            assert tv[i, j].item() == pytest.approx(1 - total / n if n else 0)


@pytest.mark.parametrize("dim", SHAPES)
def test_gradients(dim):
    alpha, supervised = make(dim)
    for function in (positions.acceptance_length, positions.end_to_end_tv):
        assert torch.autograd.gradcheck(lambda x, of=function: of(x, supervised, dim), alpha)
        (gradient,) = torch.autograd.grad(function(alpha, supervised, dim).sum(), alpha)
        assert not gradient[~supervised].any()
        assert gradient[supervised].any()


def test_what_an_ignored_token_holds_is_not_read():
    alpha, supervised = make(0)
    spoilt = torch.where(supervised, alpha.detach(), float("nan")).requires_grad_()
    for function in (positions.acceptance_length, positions.end_to_end_tv, positions.dpace_weights):
        ours, wanted = function(spoilt, supervised), function(alpha, supervised)
        torch.testing.assert_close(ours, wanted)
        if wanted.requires_grad:
            gradients = [torch.autograd.grad(y.sum(), x)[0] for y, x in ((ours, spoilt), (wanted, alpha))]
            torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0])
def test_the_weights_of_dpace(smoothing):
    """As speculators and SpecForge make them."""
    confidence, supervised = (x.flatten(0, 1) for x in make(-1))
    confidence = confidence.detach().float()
    ours = positions.dpace_weights(confidence, supervised, smoothing, dim=-1)
    theirs = peers.speculators().utils.dpace_loss_decay(
        None, supervised.view(1, -1), 4, smoothing, -confidence.log().view(1, -1)
    )
    torch.testing.assert_close(ours.view(1, -1), theirs)
    model = importlib.import_module("specforge.algorithms.common.dflash_family_model")
    wrapper = next(x for x in vars(model).values() if "_dpace_weight" in getattr(x, "__dict__", {}))
    mask = supervised.float()
    theirs = wrapper._dpace_weight(SimpleNamespace(dpace_alpha=smoothing), confidence, mask, supervised, "dpace")
    torch.testing.assert_close(ours, theirs * mask)
    torch.testing.assert_close(positions.dpace_weights(confidence.T, supervised.T, smoothing), ours.T)
    assert not positions.dpace_weights(*make(-1), smoothing, dim=-1).requires_grad
    if smoothing == 1:
        assert torch.equal(ours[0], torch.where(supervised[0], supervised[0].flip(0).cumsum(0).flip(0), 0).float())


@pytest.mark.parametrize("first", [0, 1])
def test_the_weights_of_dflash(first):
    theirs = peers.speculators().utils.dflash_loss_decay(torch.arange(6), 4.0, sample_from_anchor=first == 0)
    ours = positions.dflash_weights(6, 4.0, first)
    torch.testing.assert_close(ours[first:], theirs[first:])
    assert ours[0] == 1


@pytest.mark.parametrize("skip_masked", [True, False])
def test_as_a_loss(skip_masked):
    """Blocks of the primitive: the mean length is the output's, and its gradient reaches draft and head."""
    torch.manual_seed(0)
    pairs = fused_lk.Pairs.blocks(torch.tensor([[0, 3, -1]]), 4, torch.rand(1, 9) > 0.3, skip_masked=skip_masked)
    hidden, weight = torch.randn(1, 3, 4, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    target = fused_lk.Target.from_logits(torch.randn(9, 7))
    d = fused_lk.lk_divergences(hidden, weight, target, pairs=pairs)
    blocks = pairs.supervised.any(-1)
    assert blocks.sum() == 2
    length = positions.acceptance_length(d.acceptance, pairs.supervised, dim=-1)[blocks].mean()
    out = fused_lk.lk_loss(hidden, weight, target, pairs=pairs)
    torch.testing.assert_close(length, out.acceptance_length)
    for gradient in torch.autograd.grad(-length, (hidden, weight)):
        assert gradient.any() and gradient.isfinite().all()


def test_supervised_rows():
    rows, mask = torch.tensor([0, -1, 1, 1]), torch.tensor([0.5, 1.0, 0.0, 2.0])
    for skip_masked in (True, False):
        pairs = fused_lk.Pairs(mask, rows, skip_masked=skip_masked)
        assert pairs.supervised.tolist() == [True, False, False, True]
    assert fused_lk.Pairs(positions=torch.zeros(2, 2, dtype=torch.long), num_positions=1).supervised.all()
    with pytest.raises(ValueError, match="pairs that were made for a shape"):
        fused_lk.Pairs().supervised  # noqa: B018


def test_refusals():
    alpha, supervised = make(0)
    with pytest.raises(TypeError, match="supervised of dtype bool"):
        positions.acceptance_length(alpha, supervised.float())
    with pytest.raises(ValueError, match="supervised of shape"):
        positions.end_to_end_tv(alpha, supervised[1:])
    with pytest.raises(ValueError, match="gamma to be a finite number > 0"):
        positions.dflash_weights(4, 0.0)
    with pytest.raises(ValueError, match="smoothing to be a number in"):
        positions.dpace_weights(alpha, supervised, 1.5)
