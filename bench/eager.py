"""The losses that are compared with ours, as trainers write them: full logits, plain PyTorch.

Each takes `Inputs` and returns a scalar, the sum over draft steps of each step's masked mean. The semantics are those
of the published packages; `tests/test_bench.py` checks them. The timings and the accounted memory are of these
functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .shapes import Inputs

ETA = 3.0


@torch.no_grad()
def on_draft_vocabulary(target_logits: Tensor, target_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(p, pt)` `[n, V_draft]`, from float32 logits `[n, V_target]`: p on the draft vocabulary, and p renormalised."""
    on_draft = target_logits if target_ids is None else target_logits[:, target_ids]
    return (on_draft - target_logits.logsumexp(-1, keepdim=True)).exp(), on_draft.softmax(-1)


def specforge(inputs: Inputs) -> Tensor:
    """LK-lambda as SpecForge (PR 492): one target in float32 for all steps, padded and shifted; lambda per step."""
    p, pt, mask = _specforge_target(inputs)
    steps = len(inputs.draft_hidden)
    if inputs.target_probs is None:
        pt = F.pad(pt, (0, 0, 0, steps), value=1 / pt.shape[-1])
        p = F.pad(p, (0, 0, 0, steps))
    mask = F.pad(mask, (0, steps))
    return sum(
        _specforge_step(h, inputs.draft_weight, pt[k:][: len(h)], p[k:][: len(h)], mask[k:])
        for k, h in enumerate(inputs.draft_hidden)
    )


@torch.no_grad()
def _specforge_target(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """p, pt, and which rows count. The target's logits end here, as they do in the published function."""
    mask = inputs.step_mask(0)
    if inputs.target_probs is not None:
        return inputs.target_probs, inputs.target_probs, mask
    target_logits = F.linear(inputs.target_hidden, inputs.target_weight).float()
    if inputs.t2d is not None:
        mask = mask & inputs.t2d[target_logits.argmax(-1)]
    return *on_draft_vocabulary(target_logits, inputs.target_ids), mask


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
    if inputs.target_probs is not None:
        raise ValueError("speculators takes target logits, not probabilities")
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
    """The sum over steps of the masked mean of `row_loss(draft logits, target logits)`.

    The logits of step k lose their last k rows, and the targets their first k, as in speculators' `align_for_step`.
    """
    total = targets.new_zeros((), dtype=torch.float32)
    for k, h in enumerate(inputs.draft_hidden):
        logits = F.linear(h, inputs.draft_weight)
        rows = row_loss(logits[:-k] if k else logits, targets[k:])
        mask = inputs.step_mask(k)[: len(rows)].to(rows.dtype)
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
                inputs,
                slice(start + k, min(start + rows, count) + k),
                mask[start : min(start + rows, count)],
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for start in range(0, count, rows)
        ]
        kl, acceptance = (torch.stack(x).sum() / mask.sum().clamp_min(1) for x in zip(*sums, strict=True))
        kl_weight = torch.exp(-ETA * acceptance.detach())
        total = total + kl_weight * kl + (1 - kl_weight) * (1 - acceptance)
    return total


def _chunk_sums(h: Tensor, weight: Tensor, inputs: Inputs, at: slice, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of KL and alpha over the chunk's rows; they meet the target rows `at`."""
    p, pt = _chunk_target(inputs, at)
    log_q = F.linear(h, weight).float().log_softmax(-1)
    kl = F.kl_div(log_q, pt, reduction="none").sum(-1)
    acceptance = torch.minimum(p, log_q.exp()).sum(-1)
    return (kl * mask).sum(), (acceptance * mask).sum()


@torch.no_grad()
def _chunk_target(inputs: Inputs, at: slice) -> tuple[Tensor, Tensor]:
    if inputs.target_probs is not None:
        return inputs.target_probs[at], inputs.target_probs[at]
    target_logits = F.linear(inputs.target_hidden[at], inputs.target_weight).float()
    return on_draft_vocabulary(target_logits, inputs.target_ids)
