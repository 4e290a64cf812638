"""How many matrix products a plan makes, by their flops: nothing twice, nothing for rows that do not count."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import fused_lk
from bench.accounting import Accounting, account, full_size

# Distinct, and no number of rows of a chunk: a product's sizes tell what it is.
DRAFT_HIDDEN, TARGET_HIDDEN, DRAFT, TARGET = 61, 67, 400, 640
TOKENS = 96


class Counts(NamedTuple):
    """Flops in units of one product: `[pairs, H] @ [H, V]` of the draft, `[targets, H] @ [H, V_draft]` of the target,
    and the same over the full target vocabulary; then the draft's in the forward alone."""

    draft: float
    target: float
    normalizer: float
    draft_forward: float


def count(
    *,
    plan="one_pass",
    impl="torch",
    device="cpu",
    tokens=TOKENS,
    steps=1,
    mask=None,
    target_mask=None,
    frozen=(),
    shared=False,
    **target_options,
) -> Counts:
    """Of one step; row t of TTT step k is scored against target row t + k where there is one."""
    size = DRAFT if shared else TARGET
    vocab = None if shared else fused_lk.DraftVocab(torch.arange(TARGET) % 8 < 5)
    step = torch.arange(steps).unsqueeze(1)
    rows = torch.arange(tokens) + step
    rows = torch.where(rows < tokens, rows, -1)
    pairs = fused_lk.Pairs(None if mask is None else mask.expand(steps, -1), rows, step.expand_as(rows), steps)
    small = {"impl": impl, "workspace_mb": 0.05}  # several chunks

    with full_size(device):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        sources = [torch.empty(tokens, DRAFT_HIDDEN, dtype=dtype) for _ in range(steps)]
        weight = torch.empty(DRAFT, DRAFT_HIDDEN, dtype=dtype).requires_grad_("head" not in frozen)
        for x in sources:
            x.requires_grad_("hidden" not in frozen)
        states = torch.empty(tokens, TARGET_HIDDEN, dtype=dtype)
        head = fused_lk.TargetHead(torch.empty(size, TARGET_HIDDEN, dtype=dtype), vocab)

        def run():
            target = fused_lk.Target.from_hidden(states, head, target_mask, **small, **target_options)
            return fused_lk.lk_loss(sources, weight, target, objective="alpha", pairs=pairs, plan=plan, **small).loss

        seen = account(run)
    everything = (*seen.forward_gemms, *seen.backward_gemms)

    def flops(gemms, hidden, full):
        return sum(x.flops for x in gemms if hidden in x and (TARGET in x) is full)

    one_draft = 2 * max(pairs.num_pairs, 1) * DRAFT * DRAFT_HIDDEN
    one_target = 2 * max(tokens if pairs.num_targets is None else pairs.num_targets, 1) * DRAFT * TARGET_HIDDEN
    used = tokens if target_mask is None else int(target_mask.sum())
    return Counts(
        flops(everything, DRAFT_HIDDEN, False) / one_draft,
        flops(everything, TARGET_HIDDEN, False) / one_target,
        flops(everything, TARGET_HIDDEN, True) / (2 * used * TARGET * TARGET_HIDDEN),
        flops(seen.forward_gemms, DRAFT_HIDDEN, False) / one_draft,
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("tokens", [TOKENS, DRAFT + 50])  # the recompute backward by vocabulary, and by rows
def test_three_and_four_draft_products(tokens, impl, device):
    assert count(plan="one_pass", tokens=tokens, impl=impl, device=device) == (3, 1, 1, 3)
    assert count(plan="recompute", tokens=tokens, impl=impl, device=device) == (4, 2, 1, 1)


@pytest.mark.parametrize("tokens", [TOKENS, DRAFT + 50])
@pytest.mark.parametrize("what", ["head", "hidden"])
def test_what_is_frozen_costs_no_product(what, tokens):
    assert count(plan="one_pass", tokens=tokens, frozen=[what]) == (2, 1, 1, 2)
    assert count(plan="recompute", tokens=tokens, frozen=[what]) == (3, 2, 1, 1)


@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
def test_without_gradients_there_is_one(plan):
    hidden, weight = (torch.randn(n, DRAFT_HIDDEN, requires_grad=True) for n in (TOKENS, DRAFT))
    target = fused_lk.Target.from_probs(torch.rand(TOKENS, DRAFT).softmax(-1))
    with Accounting() as seen, torch.no_grad():
        fused_lk.lk_loss(hidden, weight, target, objective="alpha", plan=plan)
    assert sum(x.flops for x in seen.gemms) == 2 * TOKENS * DRAFT * DRAFT_HIDDEN


def test_steps_share_the_target_products():
    """7 TTT steps: the target's logits once a pass over the tiles, not once a step."""
    assert count(plan="one_pass", steps=7) == (3, 1, 1, 3)
    assert count(plan="recompute", steps=7) == (4, 2, 1, 1)


@pytest.mark.parametrize("plan, draft, target", [("one_pass", 3, 1), ("recompute", 4, 2)])
def test_masked_rows_cost_nothing(plan, draft, target):
    mask = torch.arange(TOKENS) % 4 == 0
    assert count(plan=plan, mask=mask)[:2] == (draft, target)  # in units of the rows that count
    assert count(plan=plan, mask=torch.zeros(TOKENS, dtype=torch.bool))[:2] == (0, 0)


def test_a_masked_target_computes_its_rows_alone():
    mask = torch.arange(TOKENS) >= TOKENS // 2
    assert count(mask=mask, target_mask=mask) == (3, 1, 1, 3)  # the normaliser in units of half the rows


def test_what_is_known_of_the_target_is_not_computed():
    known = {"log_normalizer": torch.zeros(TOKENS), "token_ids": torch.zeros(TOKENS, dtype=torch.long)}
    assert count(**known).normalizer == 0
    assert count(shared=True)[:3] == (3, 1, 0)
    cached = count(plan="recompute", cache=True)
    assert (cached.target, cached.normalizer) == (0, 1)
