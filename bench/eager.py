"""The losses that are compared with ours, as trainers write them: full logits, plain PyTorch.

Each takes `Inputs` and returns a scalar, the sum over draft steps of each step's masked mean. Semantics are those of
the published packages, checked against them in `tests/test_bench.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .shapes import Inputs

ETA = 3.0


def specforge(inputs: Inputs) -> Tensor:
    """LK-lambda as SpecForge (PR 492): one target in float32 for all steps, padded and shifted; lambda per step."""
    with torch.no_grad():
        target_logits = F.linear(inputs.target_hidden, inputs.target_weight).float()
        on_draft = target_logits if inputs.target_ids is None else target_logits[:, inputs.target_ids]
        target_p = on_draft.softmax(-1)
        target_p_on_draft = (on_draft - target_logits.logsumexp(-1, keepdim=True)).exp()
        target_token_ids = target_logits.argmax(-1)
        mask = inputs.step_mask(0)
        if inputs.t2d is not None:
            mask = mask & inputs.t2d[target_token_ids]
        steps = len(inputs.draft_hidden)
        target_p = F.pad(target_p, (0, 0, 0, steps), value=1 / target_p.shape[-1])
        target_p_on_draft = F.pad(target_p_on_draft, (0, 0, 0, steps))
        mask = F.pad(mask, (0, steps))
    return sum(
        _specforge_step(h, inputs.draft_weight, target_p[k:][: len(h)], target_p_on_draft[k:][: len(h)], mask[k:])
        for k, h in enumerate(inputs.draft_hidden)
    )


def _specforge_step(h: Tensor, weight: Tensor, target_p: Tensor, target_p_on_draft: Tensor, mask: Tensor) -> Tensor:
    logits = F.linear(h, weight)
    weights = mask[: len(h)].float()
    cross_entropy = -(weights.unsqueeze(-1) * (target_p * logits.float().log_softmax(-1))).sum(-1).mean()
    draft_p = logits.float().softmax(-1).to(target_p_on_draft.dtype)
    acceptance = torch.minimum(target_p_on_draft, draft_p).sum(-1)
    acceptance = (acceptance * weights).sum() / weights.sum().clamp_min(1e-8)
    kl_weight = torch.exp(-ETA * acceptance.detach())
    return kl_weight * cross_entropy + (1 - kl_weight) * (1 - acceptance)


def speculators(inputs: Inputs) -> Tensor:
    """`lk_hybrid` as speculators' eager losses: draft-vocabulary logits alone, p renormalised, lambda per token."""
    with torch.no_grad():
        targets = F.linear(inputs.target_hidden, inputs.target_draft_weight)
    return over_steps(inputs, targets, lk_hybrid)


def lk_hybrid(logits: Tensor, targets: Tensor) -> Tensor:
    """Per row, from `[n, V_draft]` draft and target logits."""
    draft_p = F.softmax(logits, -1, dtype=torch.float32)
    target_p = F.softmax(targets, -1, dtype=torch.float32)
    acceptance = torch.minimum(draft_p, target_p).sum(-1)
    kl = F.kl_div(
        F.log_softmax(logits, -1, dtype=torch.float32),
        F.softmax(targets, -1, dtype=torch.float32),
        reduction="none",
    ).sum(-1)
    kl_weight = torch.exp(-ETA * acceptance.detach())
    return kl_weight * kl + (1 - kl_weight) * (1 - acceptance)


def over_steps(inputs: Inputs, targets: Tensor, row_loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The sum over steps of the masked mean of `row_loss(draft logits, target logits)`; targets are shifted."""
    total = targets.new_zeros((), dtype=torch.float32)
    for k, h in enumerate(inputs.draft_hidden):
        rows = row_loss(F.linear(h, inputs.draft_weight), F.pad(targets[k:], (0, 0, 0, k)))
        mask = inputs.step_mask(k).to(rows.dtype)
        total = total + (rows * mask).sum() / (mask.sum() + 1e-5)
    return total


def checkpointed(inputs: Inputs, rows: int = 512) -> Tensor:
    """LK-lambda a chunk of rows at a time, logits made again in the backward: memory saved without a kernel.

    Sums of KL and alpha are all that leave a chunk, so that lambda can still be that of the whole step.
    """
    total = inputs.target_hidden.new_zeros((), dtype=torch.float32)
    for k, h in enumerate(inputs.draft_hidden):
        mask = inputs.step_mask(k)
        count = len(h) - k  # the last k rows have no target
        sums = [
            checkpoint(
                _chunk_sums,
                h[start : min(start + rows, count)],
                inputs.draft_weight,
                inputs.target_hidden[start + k : min(start + rows, count) + k],
                inputs.target_weight,
                inputs.target_ids,
                mask[start : min(start + rows, count)],
                use_reentrant=False,
            )
            for start in range(0, count, rows)
        ]
        kl, acceptance = (torch.stack(x).sum() / mask.sum().clamp_min(1) for x in zip(*sums, strict=True))
        kl_weight = torch.exp(-ETA * acceptance.detach())
        total = total + kl_weight * kl + (1 - kl_weight) * (1 - acceptance)
    return total


def _chunk_sums(
    h: Tensor, weight: Tensor, target_hidden: Tensor, target_weight: Tensor, target_ids: Tensor | None, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums of KL and alpha over the chunk's rows."""
    with torch.no_grad():
        target_logits = F.linear(target_hidden, target_weight).float()
        normalizer = target_logits.logsumexp(-1, keepdim=True)
        if target_ids is not None:
            target_logits = target_logits[:, target_ids]
        target_p = (target_logits - normalizer).exp()
        log_pt = target_logits.log_softmax(-1)
    log_q = F.linear(h, weight).float().log_softmax(-1)
    kl = (log_pt.exp() * (log_pt - log_q)).sum(-1)
    acceptance = torch.minimum(target_p, log_q.exp()).sum(-1)
    return (kl * mask).sum(), (acceptance * mask).sum()
