"""`gradcheck` in float64: finite differences through the Triton kernels themselves, and through the torch path.

Away from p = q, where min has a kink. Adaptive lambda has a stopped gradient that finite differences cannot see; it is
compared with autograd through the oracle instead (test_losses).
"""

from __future__ import annotations

import pytest
import torch
from problems import make_problem

import fused_lk

IMPLS = ["torch", "triton"]

SETTINGS = {
    "kl": {"objective": "kl"},
    "tv": {"objective": "tv"},
    "alpha": {"objective": "alpha"},
    "float": {"kl_weight": 0.3},
    "position": {"kl_weight": torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)},
    "token": {"kl_weight": torch.linspace(0, 1, 9, dtype=torch.float64).view(3, 3)},
}


def gradcheck(problem, function, hidden=True, head=True, fast_mode=False):
    """Every entry of the Jacobian, or in `fast_mode` its product with random vectors."""
    sources, weight, bias = problem.leaves(hidden, head)

    def call(*leaves):
        given = list(leaves[: len(sources)])
        return function(given if problem.stacked else given[0], *leaves[len(sources) :])

    leaves = [x for x in (*sources, weight, bias) if x is not None]
    assert torch.autograd.gradcheck(call, leaves, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=fast_mode)


def small(**options):
    return make_problem(num_tokens=3, draft_size=5, target_size=7, hidden_size=2, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("work", ["identity", "shifted"])
def test_primitive(impl, work):
    problem = small(work=work)
    options = {"impl": impl, "draft_temperature": 0.9, **problem.options}

    def primitive(h, w, b):
        out = fused_lk.lk_divergences(h, w, problem.target, bias=b, **options)
        return out.log_acceptance, out.kl, out.acceptance

    gradcheck(problem, primitive)


# The interpreter is slow. What objectives and reductions add to the primitive is plain PyTorch, or a coefficient in the
# one-pass plan: there random directions are enough, and the primitive is differenced number by number.
@pytest.mark.parametrize(
    ("impl", "plan", "setting"),
    [(impl, plan, setting) for impl in IMPLS for plan in ("one_pass", "recompute") for setting in SETTINGS],
)
def test_objectives(impl, plan, setting):
    problem = small(work="shifted", target_options={"temperature": 1.3})
    options = {"impl": impl, "plan": plan, "position_decay": 0.8, **problem.options, **SETTINGS[setting]}
    loss = lambda h, w, b: fused_lk.lk_loss(h, w, problem.target, bias=b, **options).loss  # noqa: E731
    gradcheck(problem, loss, fast_mode=impl == "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["position", "sum", "none"])
def test_reductions(impl, reduction):
    problem = small(work="shifted")
    options = {"impl": impl, "kl_weight": 0.5, "reduction": reduction, **problem.options}
    loss = lambda h, w, b: fused_lk.lk_loss(h, w, problem.target, bias=b, **options).loss  # noqa: E731
    gradcheck(problem, loss, fast_mode=impl == "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("hidden", "head"), [(True, False), (False, True)])
def test_frozen_sides(impl, hidden, head):
    problem = small(kind="probs", stacked=True, work="shifted")

    def loss(h, w, b):
        out = fused_lk.lk_loss(h, w, problem.target, bias=b, impl=impl, objective="alpha", **problem.options)
        return out.loss

    gradcheck(problem, loss, hidden, head, fast_mode=impl == "triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_logits_in_hand(impl):
    problem = small()
    logits = (problem.sources[0] @ problem.weight.T).detach().requires_grad_()
    for objective in ("kl", "tv", "alpha"):
        assert torch.autograd.gradcheck(
            lambda z, objective=objective: (
                fused_lk.lk_loss_from_logits(z, problem.target, objective=objective, impl=impl).loss
            ),
            [logits],
            eps=1e-6,
            atol=1e-6,
            fast_mode=impl == "triton",
        )
