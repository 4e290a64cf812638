"""speculators' MTP model (`MTPDraftModel`), computed without its logits.

Its `forward` runs as published, with two replacements:

    seam                           before                        now
    lm_head                        [1, T, V] logits              its input, [1, T, H]
    nn.functional.cross_entropy    cross-entropy of logits       cross-entropy of hidden states and head

Loss and metrics stay the same, for any `step_weights` and mask. Tokens outside the mask cost nothing. The first of the
three results differs on purpose: where the published forward returns the logits of each step, which its trainer drops,
this one returns `Rows`. These have a shape, slices, and an `argmax(-1)`, which is computed when it is asked for. Where
speculators compiles its forward, this one is compiled too.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ... import Target, lk_divergences
from .. import seams
from .rows import DraftLogits, Rows, identity


class MTP(seams.Forward):
    methods = (("forward", "lm_head", "nn", "cross_entropy"),)
    heads = ("lm_head",)

    def __init__(self, model: Any, *how: Any) -> None:
        super().__init__(model, *how)
        from speculators.models.utils import conditional_torch_compile

        nn = SimpleNamespace(functional=SimpleNamespace(cross_entropy=self._cross_entropy))
        self.forward = conditional_torch_compile(seams.with_globals(self.published, nn=nn), dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        head = seams.linear_head(self.model, "lm_head")
        body = seams.shadow(self.model, lm_head=identity)
        hidden, *rest = self.forward(body, *args, **kwargs)
        return [self._rows(of_step, head) for of_step in hidden], *rest

    def _rows(self, hidden: Tensor, head: Any) -> Rows:
        at = torch.arange(hidden[..., 0].numel(), device=hidden.device)
        return Rows(DraftLogits([hidden.detach()], head, self.options), at.view(hidden.shape[:-1]))

    def _cross_entropy(self, hidden: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
        """`-log q[label]` of each token, 0 where it is `ignore_index`; the classes of `hidden` are its dimension 1.

        It is KL against a target that says the label, and knows no logits.
        """
        assert reduction == "none"
        head, counts = self.model.lm_head, labels != ignore_index
        certain = torch.zeros(*labels.shape, 1, device=labels.device)
        target = Target.from_topk(torch.where(counts, labels, 0).unsqueeze(-1), certain, head.weight.shape[0])
        how = {"bias": head.bias, "mask": counts, **self.of_losses}
        return lk_divergences(hidden.transpose(1, 2), head.weight, target, **how).kl
