"""speculators' block drafters, computed without their logits: DFlash, DFlash2, DSpark and XPress.

All four draw `[1, T, V]` draft and target logits from `_backbone_forward`, which runs as published, with heads that
return their input. Where speculators compiles the forward, this part is compiled. Then `forward` itself, its heads for
biases, selectors and confidence, and its `compute_metrics` run as published on two `Rows`. The heads of biases of low
rank (DSpark's Markov head, XPress's refiner) give the `u` of `u M^T` in the place of `[T, V]` logits.

What the forward returns stays the same: no token ids, the loss, and every metric. Anchors are drawn as published, from
the same random numbers. Rows outside the loss mask are not scored. They have an argmax where it goes on: into XPress's
next round, and among DFlash2's candidates. Blocks that overlap share the target's logits.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import seams
from .eagle3 import needed
from .mix import Mixed
from .rows import DraftLogits, Rows, TargetLogits, first_of_each, identity


class DFlash(Mixed):
    methods: tuple[tuple[str, ...], ...] = (
        ("forward", "_backbone_forward", "compute_metrics"),
        ("_backbone_forward", "lm_head", "verifier_lm_head"),
    )
    everywhere = False  # whether rows outside the loss mask have an argmax
    second: tuple[str, str] | None = None  # the module that makes a bias of low rank, and its head

    def __init__(self, model: Any, *how: Any) -> None:
        super().__init__(model, *how)
        from speculators.models.utils import conditional_torch_compile

        self.backbone = conditional_torch_compile(type(model)._backbone_forward)
        self.forward = inspect.unwrap(self.published)

    @property
    def heads(self) -> tuple[str, ...]:  # type: ignore[override]
        has_second = self.second is not None and getattr(self.model, self.second[0]) is not None
        return (*Mixed.heads, ".".join(self.second)) if has_second and self.second is not None else Mixed.heads

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, terms = self.on_rows(args, kwargs)
        *_, second = heads = [seams.linear_head(self.model, name) for name in self.heads]
        size = call.arguments["input_ids"].shape[1]
        own = {"_backbone_forward": partial(self._rows, heads, terms, size)}
        if len(heads) == 3 and self.second is not None:
            module, name = self.second
            without = seams.shadow(second, forward=identity)  # Its weight is looked at as well.
            own[module] = seams.shadow(getattr(self.model, module), **{name: without})
        return self.forward(seams.shadow(self.model, **own), *call.args, **call.kwargs)

    def _rows(self, heads: list[nn.Linear], terms: tuple[str, ...], size: int, *args: Any, **kwargs: Any) -> Any:
        """This replaces `_backbone_forward`, of a sequence of `size` tokens."""
        body = seams.shadow(self.model, lm_head=identity, verifier_lm_head=identity)
        hidden, draft, targets, mask, positions = self.backbone(body, *args, **kwargs)
        lm_head, verifier_head = heads[:2]
        second = heads[2] if heads[2:] else None
        at = torch.arange(len(positions), device=positions.device).unsqueeze(0)
        same = first_of_each(positions, size)
        target_rows = torch.where(mask != 0, same, -1)
        which = same == at[0] if self.everywhere else needed(target_rows[0])
        target = TargetLogits(targets, verifier_head, self.options, same, which)
        logits = DraftLogits([draft], lm_head, self.of_losses, target, target_rows, terms, self.everywhere, second)
        return hidden, Rows(logits, at), Rows(target, at), mask, positions


class DFlash2(DFlash):
    methods = (("forward", "_backbone_forward", "compute_metrics", "candidate_selector"), *DFlash.methods[1:])
    everywhere = True


class DSpark(DFlash):
    methods = (("forward", "_backbone_forward", "compute_metrics", "markov_head"), *DFlash.methods[1:])
    second = ("markov_head", "markov_w2")


class XPress(DFlash):
    methods = (("forward", "_backbone_forward", "compute_metrics", "refiner_head"), *DFlash.methods[1:])
    default = '{"ce": 0.1, "tv": 0.9}'
    everywhere = True
    second = ("refiner_head", "readout")
