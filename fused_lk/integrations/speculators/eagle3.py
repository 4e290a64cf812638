"""speculators' EAGLE-3 model (`Eagle3DraftModel`), computed without its logits.

Its `forward` runs as published, with three replacements:

    seam                    before                          now
    verifier_lm_head        [1, T, V] target logits         its input, [1, T, H]
    lm_head                 [1, T, V] draft logits          its input, [1, T, H]
    compute_metrics         loss and metrics of a step      its arguments, kept until the last step

The K steps then end in one call, which makes each target row's logits once for all of them. After that, the published
`compute_metrics` runs on two objects (`_Rows`) in place of logits, which know their losses and their argmax.

What its forward returns stays the same: the draft token ids of each TTT step, the loss, and the metrics. This holds for
the losses "kl_div", "tv", "nla" and "lk_hybrid" and their weighted sums, which `resolve_loss_config` gives, whether
fused, eager or registered; the forward raises ValueError for others. Rows outside the loss mask are predicted, because
their ids are part of the result, but they are not scored. Without `verifier_last_hidden_states` the forward is the
published one. Where speculators compiles its forward, this one is compiled too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import Divergences, Pairs, Target, checks, lk_divergences
from .. import seams
from . import losses

_TERMS: dict[str, Callable[[Divergences], Tensor]] = {
    "kl_div": losses.kl_div,
    "tv": losses.tv,
    "nla": losses.nla,
    "lk_hybrid": losses.lk_hybrid,
}


class Eagle3(seams.Forward):
    """It keeps the replaced forward, which speculators may compile, from one call to the next."""

    methods = (("forward", "compute_metrics", "lm_head", "verifier_lm_head"),)
    heads = ("lm_head", "verifier_lm_head")

    def __init__(self, model: Any, impl: str, workspace_mb: float | str) -> None:
        super().__init__(model, impl, workspace_mb)
        from speculators.models.eagle3.metrics import compute_metrics
        from speculators.models.utils import conditional_torch_compile

        self.compute_metrics = compute_metrics
        self.forward = conditional_torch_compile(seams.with_globals(self.published, compute_metrics=_record))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.__signature__.bind(*args, **kwargs).arguments
        if given.get("verifier_last_hidden_states") is None:
            return self.published(self.model, *args, **kwargs)
        loss_config = _terms(given.get("loss_config"))
        body = seams.shadow(self.model, lm_head=_identity, verifier_lm_head=_identity)
        placeholders, _, totals = self.forward(body, *args, **kwargs)
        records = [totals.pop(step) for step in range(len(placeholders))]
        _, targets, loss_mask, prev_correct, _, decay = records[0]  # Every step was given the same.
        draft, target = self._rows([hidden for hidden, *_ in records], targets, loss_mask)
        total = torch.tensor(0.0, device=draft[0].device)
        metrics: dict[str, Tensor] = {}
        for step, rows in enumerate(draft):  # Each step updates prev_correct for the next one.
            loss, of_step = self.compute_metrics(rows, target, loss_mask, prev_correct, step, decay, loss_config)
            total = total + loss
            metrics.update(of_step)
        metrics.update(totals, loss_sum=total.detach().clone())
        return [rows.token_ids for rows in draft], total, metrics

    def _rows(self, hidden: list[Tensor], targets: Tensor, loss_mask: Tensor | None) -> tuple[list[Any], Any]:
        """Return the draft rows of each step, and the target rows; see `_shifted_rows` for which row meets which."""
        head, verifier_head = (seams.linear_head(self.model, name) for name in self.heads)
        target = _target(targets, verifier_head, renormalize=True, **self.options)
        target_rows = _shifted_rows(len(hidden), hidden[0].shape[1], loss_mask, hidden[0].device)
        pairs = Pairs(target_rows=target_rows)
        d = lk_divergences(hidden, head.weight, target, bias=head.bias, pairs=pairs, **self.options)
        token_ids = self._predicted_everywhere(hidden, head, d.draft_token_ids, target_rows)
        target_ids: Any = target.token_ids
        return [_Rows(ids, d[k]) for k, ids in enumerate(token_ids)], _Rows(target_ids)

    @torch.no_grad()
    def _predicted_everywhere(
        self, hidden: list[Tensor], head: nn.Linear, token_ids: Tensor, target_rows: Tensor
    ) -> Tensor:
        """Fill in `token_ids` where a row has no pair. A target finds the argmax of a head in one streamed pass."""
        unpaired = target_rows < 0
        rows = torch.cat([h[at] for h, at in zip(hidden, unpaired, strict=True)])
        argmax: Any = _target(rows, head, **self.options).token_ids
        return token_ids.masked_scatter(unpaired, argmax)


def _target(hidden: Tensor, head: nn.Linear, **options: Any) -> Target:
    """Return the target whose logits `head` makes of `hidden`."""
    return Target.from_hidden(hidden.detach(), head.weight, bias=head.bias, **options)


@dataclass(frozen=True)
class _Rows:
    """It can do what `compute_metrics` asks of `[1, T, V]` logits: it has slices along T, an argmax, and losses."""

    token_ids: Tensor  # [1, T]
    divergences: Any = None  # Divergences, of the draft's rows

    @property
    def shape(self) -> torch.Size:
        return self.token_ids.shape

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    def __getitem__(self, index: Any) -> _Rows:
        return _Rows(self.token_ids[index], self.divergences and self.divergences[index])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].token_ids if func is torch.argmax else NotImplemented


def _identity(hidden: Tensor) -> Tensor:
    return hidden


def _record(*arguments: Any, loss_config: Any) -> tuple[float, dict[int, tuple[Any, ...]]]:
    """This replaces `compute_metrics`, whose two results the forward only adds up; the fifth argument is the step."""
    return 0.0, {arguments[4]: arguments}


def _shifted_rows(steps: int, size: int, loss_mask: Tensor | None, device: torch.device) -> Tensor:
    """Return int64 `[K, 1, T]`. In step k, row t meets target row t + k, or none (-1) beyond the end or the mask."""
    rows = torch.arange(size, device=device) + torch.arange(steps, device=device).unsqueeze(1)
    scored = rows < size
    if loss_mask is not None:
        scored &= (loss_mask.to(device).reshape(-1) != 0)[rows.clamp(max=size - 1)]
    return torch.where(scored, rows, -1).unsqueeze(1)


def _terms(loss_config: dict[str, tuple[Callable[..., Tensor], float]] | None) -> Any:
    """Return a `loss_config` in which each loss takes `_Rows` in place of logits."""
    if loss_config is None:
        loss_config = {"kl_div": (losses.fused_kl_div_loss, 1.0)}  # This is the default of compute_metrics.
    known = _known_losses()
    unknown = [name for name, (loss, _) in loss_config.items() if loss not in known]
    if unknown:
        checks.fail(
            f"losses among {', '.join(_TERMS)}, from resolve_loss_config",
            ", ".join(unknown),
            "unapply(model) to train on others; register() speeds up those of the four that are in the mix.",
        )
    return {name: (_of_rows(known[loss]), weight) for name, (loss, weight) in loss_config.items()}


def _of_rows(term: Callable[[Divergences], Tensor]) -> Callable[[_Rows, _Rows], Tensor]:
    return lambda draft, target: term(draft.divergences)


def _known_losses() -> dict[Callable[..., Tensor], Callable[[Divergences], Tensor]]:
    """Find every function that stands for one of the terms: the fused ones, the eager ones, and ours."""
    from speculators.losses import utils

    maps = (losses.FUSED, *utils._LOSS_FN_MAPS.values(), losses._replaced)
    return {of[name]: term for of in maps for name, term in _TERMS.items() if name in of}
