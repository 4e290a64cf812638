"""What an output holds and prints: acceptance per token, sums per position and per block, and how they add up."""

from __future__ import annotations

import pytest
import torch
from problems import make_problem

import fused_lk

IMPLS = ("torch", "reference")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("work", ["identity", "shifted", "kept"])
@pytest.mark.parametrize("objective", ["lambda", "alpha"])
def test_acceptance_of_each_token(work, objective, impl):
    problem = make_problem(work=work)
    out, _ = problem.run(impl=impl, objective=objective)
    d, _ = problem.run(fused_lk.lk_divergences, lambda d: d.kl.sum(), impl="reference")
    torch.testing.assert_close(out.token_acceptance, d.acceptance)
    assert not out.token_acceptance.requires_grad
    if work != "identity":
        ignored = d.acceptance == 0
        assert ignored.any()
        assert (out.token_log_acceptance.exp()[ignored] == 1).all()  # why there is a field of its own


def test_a_record_prints_in_one_line():
    """Of 3,000 tokens nothing is printed but shapes, and no gradient function."""
    problem = make_problem(work="shifted", num_tokens=1000)
    out, _ = problem.run(impl="torch")
    d, _ = problem.run(fused_lk.lk_divergences, lambda d: d.kl.sum(), impl="torch")
    for record in (out, d):
        assert len(repr(record)) < 1200
        assert "grad_fn" not in repr(record)
        assert "\n" not in repr(record)
        assert "draft_token_ids=(3, 1000) int64" in str(record)
    assert f"loss={out.loss.detach()!r}" in repr(out)
    assert f"acceptance_sum={out.acceptance_sum!r}" in repr(out)
    unreduced, _ = problem.run(impl="torch", reduction="none")
    assert "loss=(3, 1000) float64" in repr(unreduced)


def test_printing_reads_only_what_it_shows(monkeypatch):
    problem = make_problem(work="shifted", num_tokens=1000)
    out, _ = problem.run(impl="torch")
    read, tolist = [], torch.Tensor.__repr__
    monkeypatch.setattr(torch.Tensor, "__repr__", lambda x, **how: read.append(x.numel()) or tolist(x, **how))
    repr(out)
    assert 0 < len(read) < 12
    assert max(read) <= 16
