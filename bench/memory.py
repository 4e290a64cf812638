"""Accounted memory of one training step at full size: `python -m bench.memory`.

Peak of live tensor bytes beyond the inputs, forward and backward; nothing is allocated or computed (see
`bench.accounting`), so the figures do not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_lk

from .accounting import Accounted, account, full_size, real


@dataclass(frozen=True)
class Shape:
    """One training step; the target comes from hidden states unless `probs`."""

    name: str
    num_tokens: int
    hidden_size: int
    draft_vocab_size: int
    target_vocab_size: int
    ttt_steps: int = 1
    frozen_head: bool = False
    probs: bool = False
    dtype: torch.dtype = torch.bfloat16


SHAPES = (
    Shape("8,192 tokens, V 32,000", 8192, 4096, 32000, 32000),
    Shape("8,192 tokens, V 32,000, 7 TTT steps", 8192, 4096, 32000, 32000, ttt_steps=7, probs=True),
    Shape("8,192 tokens, V 151,936", 8192, 4096, 151936, 151936),
    Shape("8,192 tokens, V 151,936, frozen head", 8192, 4096, 151936, 151936, frozen_head=True),
    Shape("8,192 tokens, V 32,000 of 128,256", 8192, 4096, 32000, 128256),
)


@dataclass(frozen=True)
class Inputs:
    """What exists before a step, and is not counted.

    Attributes:
        sources: draft hidden states `[N, H]` of each TTT step. weight: the draft's `lm_head` `[V_draft, H]`.
        states, head: the target's hidden states `[N, H]`, and its head with the draft rows sliced.
        probs: instead of these, p on the draft vocabulary `[N + K - 1, V_draft]`.
        pairs: row t of step k against target row t + k.
    """

    sources: list[Tensor]
    weight: Tensor
    states: Tensor
    head: fused_lk.TargetHead
    probs: Tensor | None
    pairs: fused_lk.Pairs | None

    @classmethod
    def of(cls, shape: Shape) -> Inputs:
        """Fake tensors, inside `full_size`."""
        n, h, k = shape.num_tokens, shape.hidden_size, shape.ttt_steps
        with real():
            vocab, pairs = None, None
            if shape.draft_vocab_size != shape.target_vocab_size:
                vocab = fused_lk.DraftVocab(torch.arange(shape.target_vocab_size) < shape.draft_vocab_size)
            if k > 1:
                steps = torch.arange(k).unsqueeze(1).expand(k, n)
                rows = torch.arange(n) + steps
                pairs = fused_lk.Pairs(None, rows if shape.probs else torch.where(rows < n, rows, -1), steps, k)

        def empty(*size: int) -> Tensor:
            return torch.empty(*size, dtype=shape.dtype)

        return cls(
            [empty(n, h).requires_grad_() for _ in range(k)],
            empty(shape.draft_vocab_size, h).requires_grad_(not shape.frozen_head),
            empty(n, h),
            fused_lk.TargetHead(empty(shape.target_vocab_size, h), vocab),
            torch.empty(n + k - 1, shape.draft_vocab_size) if shape.probs else None,
            pairs,
        )


Step = Callable[[Inputs], Tensor | tuple[Tensor, ...]]  # as `account` takes it


def eager(x: Inputs) -> tuple[Tensor, ...]:
    """LK-lambda as a training script writes it: target and logits have names that live until the backward is done."""
    kept = []
    if x.probs is None:
        logits = F.linear(x.states, x.head.weight)
        t = logits.float()
        on_draft = t if x.head.vocab is None else t[:, x.head.vocab.target_ids]
        p = torch.exp(on_draft - t.logsumexp(-1, keepdim=True))
        pt = torch.softmax(on_draft, -1)
        if len(x.sources) > 1:  # step k reads k rows further on
            p, pt = (F.pad(y, (0, 0, 0, len(x.sources) - 1), value=1 / y.shape[1]) for y in (p, pt))
        kept += [logits, t, on_draft, p, pt]
    else:
        p = pt = x.probs
    total = torch.zeros(())
    for k, hidden in enumerate(x.sources):
        z = F.linear(hidden, x.weight)
        rows = slice(k, k + z.shape[0])
        kl = -(pt[rows] * F.log_softmax(z.float(), -1)).sum(-1).mean()
        acceptance = torch.minimum(p[rows], torch.softmax(z.float(), -1)).sum(-1).mean()
        kl_weight = torch.exp(-3 * acceptance.detach())
        total = total + kl_weight * kl + (1 - kl_weight) * (1 - acceptance)
        kept.append(z)
    return total, *kept


def ours(plan: str, impl: str = "triton") -> Step:
    """fused_lk's LK-lambda in `plan`; the weight of KL is given where the gradient is made in the forward."""

    def step(x: Inputs) -> Tensor:
        if x.probs is None:
            target = fused_lk.Target.from_hidden(x.states, x.head, impl=impl)
        else:
            target = fused_lk.Target.from_probs(x.probs)
        given = 0.5 if plan == "one_pass" else None
        sources = x.sources[0] if x.pairs is None else x.sources
        return fused_lk.lk_loss(sources, x.weight, target, pairs=x.pairs, kl_weight=given, plan=plan, impl=impl).loss

    return step


def accounted(shape: Shape, step: Step, device: str = "cuda") -> Accounted:
    """The step at full size, walking as on `device`."""
    with full_size(device):
        inputs = Inputs.of(shape)
        return account(lambda: step(inputs))
