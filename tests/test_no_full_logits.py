"""No tensor of `[supervised tokens, V]` elements is made, forward or backward, when the workspace is smaller."""

from __future__ import annotations

import pytest
import torch
from allocations import Allocations

import fused_lk

TOKENS, HIDDEN, DRAFT, TARGET = 96, 8, 400, 640
WORKSPACE_MB = 0.05  # 12,800 float32: a third of [96, 400]


def run(impl: str, plan: str, plant: bool = False) -> Allocations:
    generator = torch.Generator().manual_seed(0)
    t2d = torch.zeros(TARGET, dtype=torch.bool)
    t2d[torch.randperm(TARGET, generator=generator)[:DRAFT]] = True
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, requires_grad=True)
    weight = torch.randn(DRAFT, HIDDEN, generator=generator, requires_grad=True)
    states = torch.randn(TOKENS, HIDDEN, generator=generator)
    head = fused_lk.TargetHead(torch.randn(TARGET, HIDDEN, generator=generator), fused_lk.DraftVocab(t2d))
    with Allocations() as seen:
        target = fused_lk.Target.from_hidden(states, head, workspace_mb=WORKSPACE_MB, impl=impl)
        out = fused_lk.lk_loss(
            hidden, weight, target, objective="alpha", plan=plan, impl=impl, workspace_mb=WORKSPACE_MB
        )
        out.loss.backward()
        if plant:
            torch.empty(TOKENS, DRAFT)
    assert hidden.grad is not None
    assert weight.grad is not None
    return seen


@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_no_full_logits(impl, plan, monkeypatch):
    # The rows' blocks, 4 MiB each by default, are cut as well: the shapes here are far below that.
    monkeypatch.setattr("fused_lk.rows.plain.BLOCK_ELEMENTS", 4 * DRAFT)
    seen = run(impl, plan)
    assert seen.at_least(HIDDEN * DRAFT), "the watcher saw nothing at all"
    assert not seen.at_least(TOKENS * DRAFT)


def test_the_watcher_sees_a_planted_tensor():
    assert run("torch", "one_pass", plant=True).at_least(TOKENS * DRAFT)
