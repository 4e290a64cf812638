"""The oracle against the formulas of the paper, written out in 60 digits: nothing of it, and no autograd."""

from __future__ import annotations

import math

import hard_rows
import mpmath
import pytest
import torch

from fused_lk import reference

ROWS, SIZE = 5, 12


def log_softmax(row):
    """mpmath numbers, -inf included, less the logarithm of the sum of their exponentials."""
    total = mpmath.log(mpmath.fsum(mpmath.exp(x) for x in row))
    return [x - total for x in row]


def by_hand(z, log_p):
    """`(log alpha, KL, d log alpha / dz, d KL / dz)` of one row: floats from 60 digits."""
    log_q = log_softmax([mpmath.mpf(x) for x in z])
    log_p = [mpmath.mpf(x) for x in log_p]
    log_pt = log_softmax(log_p)
    q, p, pt = ([mpmath.exp(x) for x in xs] for xs in (log_q, log_p, log_pt))
    alpha = mpmath.fsum(min(a, b) for a, b in zip(p, q, strict=True))
    kl = mpmath.fsum(0 if a == 0 else a * (x - y) for a, x, y in zip(pt, log_pt, log_q, strict=True))
    w = [1 if a < b else 0 if a > b else mpmath.mpf(1) / 2 for a, b in zip(q, p, strict=True)]
    if alpha == 0:
        d_alpha = [mpmath.mpf(0)] * len(q)
    else:
        sigma = mpmath.fsum(a * b / alpha for a, b in zip(w, q, strict=True))
        d_alpha = [a * b / alpha - sigma * b for a, b in zip(w, q, strict=True)]
    d_kl = [a - b for a, b in zip(q, pt, strict=True)]
    log_alpha = float(mpmath.log(alpha)) if alpha > 0 else -math.inf
    return log_alpha, float(kl), [float(x) for x in d_alpha], [float(x) for x in d_kl]


@pytest.mark.parametrize("mass", [1.0, 0.7], ids=["renormalised", "truncated"])
@pytest.mark.parametrize("member", hard_rows.FAMILY)
def test_values_and_gradients(member, mass):
    z, t = hard_rows.make(member, ROWS, SIZE)
    log_p = t.log_softmax(1) + math.log(mass)
    leaf = z.clone().requires_grad_()
    log_alpha, kl = reference.divergences(leaf, log_p)
    got = [log_alpha, kl, *(torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0] for x in (log_alpha, kl))]
    # float64 tells q and p apart to a few units of their logarithms; mpmath tells all apart.
    truth = hard_rows.Truth(z, log_p, "alpha", dtype=torch.float64)
    slack = truth.slack * ROWS  # that of a sum
    with mpmath.workdps(60):
        rows = [by_hand(a, b) for a, b in zip(z.tolist(), log_p.tolist(), strict=True)]
    want = [torch.tensor(x, dtype=torch.float64) for x in zip(*rows, strict=True)]
    for name, a, b in zip(("log alpha", "KL"), got[:2], want[:2], strict=True):
        message = f"{name}: {{}}".format
        torch.testing.assert_close(a.detach(), b, rtol=1e-10, atol=1e-13, msg=message)
    assert ((got[2] - want[2]).abs() <= slack + 1e-12).all()
    torch.testing.assert_close(got[3], want[3], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("member", hard_rows.FAMILY)
def test_skewed_kl(member, beta):
    """KL(pt || m) with m = beta pt + (1 - beta) q, and its gradient c - q sum c, with c = -(1 - beta) pt q / m."""
    z, t = hard_rows.make(member, ROWS, SIZE)
    leaf = z.clone().requires_grad_()
    got = reference.further_divergences(leaf, t.log_softmax(1), jsd_beta=beta)["skl"]
    values, gradients = [], []
    with mpmath.workdps(60):
        b = mpmath.mpf(beta)
        for row, of_t in zip(z.tolist(), t.tolist(), strict=True):
            q, pt = ([mpmath.exp(x) for x in log_softmax([mpmath.mpf(x) for x in xs])] for xs in (row, of_t))
            m = [b * y + (1 - b) * x for x, y in zip(q, pt, strict=True)]
            values.append(float(mpmath.fsum(y * mpmath.log(y / s) if y else 0 for y, s in zip(pt, m, strict=True))))
            c = [-(1 - b) * x * y / s if s else mpmath.mpf(0) for x, y, s in zip(q, pt, m, strict=True)]
            sigma = mpmath.fsum(c)
            gradients.append([float(x - sigma * y) for x, y in zip(c, q, strict=True)])
    (gradient,) = torch.autograd.grad(got.sum(), leaf)
    torch.testing.assert_close(got.detach(), torch.tensor(values, dtype=torch.float64), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(gradient, torch.tensor(gradients, dtype=torch.float64), rtol=1e-10, atol=1e-13)


def test_reverse_kl_of_tokens_that_underflow():
    """A target's probability of exp(-2000) is 0 as a number, but the token is not impossible."""
    log_p = torch.tensor([[0.0, -2000.0], [0.0, -math.inf]], dtype=torch.float64)
    rkl = reference.further_divergences(torch.zeros_like(log_p), log_p)["rkl"]
    assert rkl.tolist() == pytest.approx([1000 - math.log(2), math.inf])


def test_rows_that_are_facts():
    """Disjoint, unsupported, NaN: what the contract says, written down."""
    inf, nan = math.inf, math.nan
    z = torch.tensor([[0.0, -inf, 0.0], [0.0, 1.0, 2.0], [0.0, nan, 0.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    log_p = torch.tensor([[-inf, 0.0, -inf], [-inf] * 3, [-1.0, -1.0, -2.0], [-1.0, nan, -2.0]], dtype=torch.float64)
    log_alpha, kl = reference.divergences(z.requires_grad_(), log_p)
    assert log_alpha[:2].tolist() == [-inf, -inf]
    assert kl[:2].tolist() == [inf, 0.0]
    assert log_alpha[2:].isnan().all()
    assert kl[2:].isnan().all()
    (gradient,) = torch.autograd.grad(log_alpha[:2].sum(), z, retain_graph=True)
    assert not gradient[:2].any()
    for objective, value in (("kl", inf), ("tv", 1.0), ("alpha", inf)):
        out = reference.lk_loss(z[:2], log_p[:2], objective=objective, reduction="none")
        assert out.loss.tolist() == [value, 0.0]
        assert out.num_unsupported == 1
        assert reference.lk_loss(z, log_p, objective=objective).loss.isnan()
