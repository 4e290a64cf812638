"""SpecForge's P-EAGLE training model (`OnlinePEagleModel`), computed without its logits.

Its `forward` runs as published, with two replacements:

    seam                            before                          now
    draft_model.compute_logits      [1, P, V] logits                its lm_head's input, [1, P, H]
    compute_peagle_metrics          copies of the target's rows     one call, which reads each target row where it is

The loss and the counts are then made by the published function, on a vocabulary of two words: right and wrong. All it
needs of the real one is each row's cross-entropy, and whether the two argmaxes agree.

Losses, metrics and gradients stay the same. A vocabulary above 131,072 is served, where the original's kernel stops.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ... import Pairs, lk_divergences
from .. import seams
from .eagle3 import Distilled, head_input


class PEagle(Distilled):
    methods = (("forward", "compute_logits", "compute_peagle_metrics"),)
    heads = ("draft_model.lm_head",)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        draft = self.model.draft_model
        forward = seams.with_globals(self.published, compute_peagle_metrics=self.metrics)
        own = seams.shadow(draft, compute_logits=lambda hidden: head_input(draft, hidden))
        return forward(seams.shadow(self.model, draft_model=own), *args, **kwargs)

    def metrics(
        self,
        logits: Tensor,
        targets: Tensor,
        loss_mask: Tensor,
        anchor_pos: Tensor,
        depth: Tensor,
        t2d: Any,
        **more: Any,
    ) -> Any:
        """Loss and metrics of draft rows whose head's input is `logits`."""
        hidden, met = logits, anchor_pos + depth
        loss_mask = loss_mask.view(targets.shape[:-1]).float()
        target = self.target(targets, t2d, loss_mask != 0)
        ids: Any = target.token_ids
        loss_mask = loss_mask * t2d[ids]
        mask = (loss_mask != 0)[:, met]
        head = seams.linear_head(self.model, "draft_model.lm_head")
        pairs = Pairs(mask, met.expand(mask.shape))
        options = {"terms": ("soft_ce",), "pairs": pairs, **self.of_losses}
        d = lk_divergences(hidden, head.weight, target, bias=head.bias, **options)
        right = torch.nn.functional.one_hot((d.draft_token_ids == ids[:, met]).long(), 2)
        words = torch.tensor([0.0, 1.0], device=ids.device).expand(*ids.shape, 2)
        loss = SimpleNamespace(apply=lambda *_: d.terms["soft_ce"].mean())
        published = seams.with_globals(self.published.__globals__["compute_peagle_metrics"], LogSoftmaxLoss=loss)
        return published(right, words, loss_mask, anchor_pos, depth, t2d=None, **more)
