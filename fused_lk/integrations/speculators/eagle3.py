"""speculators' EAGLE-3 models, computed without their logits: `Eagle3DraftModel`, and `PEagleDraftModel`.

Their `forward` runs as published, with three replacements:

    seam                    before                          now
    verifier_lm_head        [1, T, V] target logits         its input, [1, T, H]
    lm_head                 [1, T, V] draft logits          its input, [1, T, H]
    compute_metrics         loss and metrics                its arguments, kept until the forward is through

After that, the published `compute_metrics` runs on two `Rows`. The K steps of EAGLE-3 end in one call, which makes each
target row's logits once for all of them. So do the depths of P-EAGLE, of which several meet the same target row.

What EAGLE-3 returns stays the same: the draft token ids of each TTT step, the loss, and the metrics. Rows outside the
loss mask are predicted, because their ids are part of the result, but they are not scored. Without
`verifier_last_hidden_states` its forward is the published one. Where speculators compiles its forward, this one is
compiled too.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .. import seams
from .mix import Mixed
from .rows import DraftLogits, Rows, TargetLogits, first_of_each, identity


class _Recorded(Mixed):
    """It keeps the replaced forward, which speculators may compile, from one call to the next."""

    methods = (("forward", "compute_metrics", "lm_head", "verifier_lm_head"),)

    def __init__(self, model: Any, *how: Any) -> None:
        super().__init__(model, *how)
        from speculators.models.utils import conditional_torch_compile

        self.compute_metrics = inspect.unwrap(self.published).__globals__["compute_metrics"]
        self.forward = conditional_torch_compile(seams.with_globals(self.published, compute_metrics=_record))

    def recorded(self, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        """What the forward returns, with rows of hidden states in the place of logits."""
        body = seams.shadow(self.model, lm_head=identity, verifier_lm_head=identity)
        return self.forward(body, *args, **kwargs)

    def rows(
        self, hidden: list[Tensor], target: TargetLogits, target_rows: Tensor, terms: tuple[str, ...], everywhere: bool
    ) -> list[Rows]:
        head = seams.linear_head(self.model, "lm_head")
        draft = DraftLogits(hidden, head, self.of_losses, target, target_rows, terms, everywhere)
        return [
            Rows(draft, at)
            for at in torch.arange(target_rows.numel(), device=hidden[0].device).view_as(target_rows).unsqueeze(1)
        ]

    def target(self, hidden: Tensor, **which: Any) -> tuple[TargetLogits, Rows]:
        target = TargetLogits(hidden, seams.linear_head(self.model, "verifier_lm_head"), self.options, **which)
        return target, Rows(target, torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0))


class Eagle3(_Recorded):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, terms = self.on_rows(args, kwargs)
        if call.arguments.get("verifier_last_hidden_states") is None:
            return self.published(self.model, *args, **kwargs)
        placeholders, _, totals = self.recorded(args, kwargs)
        records = [totals.pop(step) for step in range(len(placeholders))]
        _, targets, loss_mask, prev_correct, _, decay = records[0]  # Every step was given the same.
        hidden = [of_step for of_step, *_ in records]
        target, target_rows = self.target(targets)
        pairs = _shifted_rows(len(hidden), targets.shape[1], loss_mask, targets.device)
        draft = self.rows(hidden, target, pairs, terms, everywhere=True)
        total = torch.tensor(0.0, device=targets.device)
        metrics: dict[str, Tensor] = {}
        for step, of_step in enumerate(draft):  # Each step updates prev_correct for the next one.
            given = (of_step, target_rows, loss_mask, prev_correct, step, decay)
            loss, found = self.compute_metrics(*given, loss_config=call.arguments["loss_config"])
            total = total + loss
            metrics.update(found)
        metrics.update(totals, loss_sum=total.detach().clone())
        return [of_step.argmax(-1) for of_step in draft], total, metrics


class PEagle(_Recorded):
    """It predicts no token that the caller sees, so that rows outside the loss mask have no argmax either."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, terms = self.on_rows(args, kwargs)
        tokens, _, record = self.recorded(args, kwargs)
        hidden, loss_mask = record["logits"], record["loss_mask"]
        positions = record["anchor_pos"] + record["depth"]
        same = first_of_each(positions, loss_mask.shape[1])
        target_rows = torch.where(loss_mask[0, positions] != 0, same, -1)
        target, record["targets"] = self.target(record["targets"], same=same, needed=needed(target_rows))
        (record["logits"],) = self.rows([hidden], target, target_rows.unsqueeze(0), terms, everywhere=False)
        return tokens, *self.compute_metrics(**record, loss_config=call.arguments["loss_config"])


def needed(target_rows: Tensor) -> Tensor:
    """bool `[T]`: the rows of as many that a draft row meets; -1 meets none."""
    rows = torch.where(target_rows >= 0, target_rows, len(target_rows))
    return target_rows.new_zeros(len(target_rows) + 1, dtype=torch.bool).index_fill_(0, rows, True)[:-1]


def _record(*arguments: Any, loss_config: Any, **named: Any) -> tuple[float, dict[Any, Any]]:
    """This replaces `compute_metrics`, whose results the forward only adds up, or returns.

    EAGLE-3 names no argument. Its fifth is the step.
    """
    return 0.0, {arguments[4]: arguments} if arguments else named


def _shifted_rows(steps: int, size: int, loss_mask: Tensor | None, device: torch.device) -> Tensor:
    """Return int64 `[K, T]`. In step k, row t meets target row t + k, or none (-1) beyond the end or the mask."""
    rows = torch.arange(size, device=device) + torch.arange(steps, device=device).unsqueeze(1)
    scored = rows < size
    if loss_mask is not None:
        scored &= (loss_mask.to(device).reshape(-1) != 0)[rows.clamp(max=size - 1)]
    return torch.where(scored, rows, -1)
