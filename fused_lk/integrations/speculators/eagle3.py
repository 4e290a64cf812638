"""speculators' EAGLE-3 model (`Eagle3DraftModel`), computed without its logits.

Its `forward` runs as published. On the way, three things are not what they were:

    seam                    before                          now
    verifier_lm_head        [1, T, V] target logits         its input, [1, T, H]
    lm_head                 [1, T, V] draft logits          its input, [1, T, H]
    compute_metrics         loss and metrics of a step      its arguments, kept until the last step

The K steps then end in one call that makes each target row's logits once for all of them, and the published
`compute_metrics` runs on what that gives: two stand-ins for logits (`_Rows`) that know their losses and their argmax.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from ...losses import lk_divergences
from ...metrics import Divergences
from ...pairs import Pairs
from ...target import Target
from .. import seams
from . import losses

_TERMS: dict[str, Callable[[Divergences], Tensor]] = {
    "kl_div": losses.kl_div,
    "tv": losses.tv,
    "nla": losses.nla,
    "lk_hybrid": losses.lk_hybrid,
}


def apply(model: Any, *, impl: str = "auto", workspace_mb: float | str = "auto") -> Any:
    """Let an `Eagle3DraftModel` compute its loss from hidden states; returns `model`.

    What it returns stays what it was: draft token ids of each TTT step, loss, and metrics, for the losses "kl_div",
    "tv", "nla" and "lk_hybrid" and their weighted sums (from `resolve_loss_config`, fused, eager or registered). In the
    step no `[tokens, V]` tensor exists any more. Rows outside the loss mask are predicted (their ids are part of the
    result) but not scored. Without `verifier_last_hidden_states` the forward is the published one.

    Apply before sharding; the heads must belong to the root unit. Where speculators compiles its forward, so does this.
    Applying again replaces the options.

    Args:
        model: the training model; only this instance changes.
        impl, workspace_mb: as in `fused_lk.lk_divergences`.

    Raises:
        ImportError: speculators is not installed, or of an unsupported version.
        TypeError, RuntimeError: the model is not the published one, or its heads are not plain linears.

    The forward raises ValueError for a loss that is none of the four.
    """
    seams.require_version("speculators", losses.SUPPORTED)
    checks.choice("impl", impl, ("auto", "triton", "torch", "reference"))
    from speculators.models.eagle3.core import Eagle3DraftModel

    published = Eagle3DraftModel.forward
    seams.require_unmodified(model, Eagle3DraftModel, "forward")
    seams.require_names(inspect.unwrap(published), "compute_metrics", "lm_head", "verifier_lm_head")
    for name in ("lm_head", "verifier_lm_head"):
        seams.linear_head(name, getattr(model, name))
    seams.attach(model, _Eagle3(published, impl, workspace_mb))
    return model


def unapply(model: Any) -> Any:
    """Undo `apply`; returns `model`, on which nothing of it is left."""
    seams.detach(model)
    return model


class _Eagle3:
    def __init__(self, published: Callable[..., Any], impl: str, workspace_mb: float | str) -> None:
        from speculators.models.eagle3.metrics import compute_metrics
        from speculators.models.utils import conditional_torch_compile

        self.published, self.compute_metrics = published, compute_metrics
        self.signature = inspect.signature(published)
        self.forward = conditional_torch_compile(seams.with_globals(published, compute_metrics=_record))
        self.options: dict[str, Any] = {"impl": impl, "workspace_mb": workspace_mb}

    def __reduce__(self) -> tuple[type[_Eagle3], tuple[Any, ...]]:
        return _Eagle3, (self.published, *self.options.values())

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        given = self.signature.bind(model, *args, **kwargs).arguments
        if given.get("verifier_last_hidden_states") is None:
            return self.published(model, *args, **kwargs)
        loss_config = _terms(given.get("loss_config"))
        body = seams.shadow(model, lm_head=_identity, verifier_lm_head=_identity)
        placeholders, _, totals = self.forward(body, *args, **kwargs)
        records = [totals.pop(step) for step in range(len(placeholders))]
        draft, target = self._rows(model, records)
        total = torch.tensor(0.0, device=draft[0].device)
        metrics: dict[str, Tensor] = {}
        prev_correct = records[0]["prev_correct"]  # updated by each step for the next
        for step, (rows, record) in enumerate(zip(draft, records, strict=True)):
            loss, of_step = self.compute_metrics(
                rows, target, record["loss_mask"], prev_correct, step, record["ttt_step_loss_decay"], loss_config
            )
            total = total + loss
            metrics.update(of_step)
        metrics.update(totals, loss_sum=total.detach().clone())
        return [rows.token_ids for rows in draft], total, metrics

    def _rows(self, model: Any, records: list[dict[str, Any]]) -> tuple[list[Any], Any]:
        """Each step's draft rows, scored against the target row that many further on, and the target rows."""
        head = seams.linear_head("lm_head", model.lm_head)
        verifier_head = seams.linear_head("verifier_lm_head", model.verifier_lm_head)
        hidden = [record["logits"] for record in records]
        target = _target(records[0]["targets"], verifier_head, renormalize=True, **self.options)
        target_rows = _shifted_rows(len(hidden), hidden[0].shape[1], records[0]["loss_mask"], hidden[0].device)
        pairs = Pairs(target_rows=target_rows)
        d = lk_divergences(hidden, head.weight, target, bias=head.bias, pairs=pairs, **self.options)
        token_ids = self._predicted_everywhere(hidden, head, d.draft_token_ids, target_rows)
        draft = [
            _Rows(token_ids[k], Divergences(d.log_acceptance[k], d.kl[k], d.acceptance[k], token_ids[k]))
            for k in range(len(hidden))
        ]
        target_ids: Any = target.token_ids
        return draft, _Rows(target_ids)

    @torch.no_grad()
    def _predicted_everywhere(
        self, hidden: list[Tensor], head: nn.Linear, token_ids: Tensor, target_rows: Tensor
    ) -> Tensor:
        """`token_ids` with the rows that have no pair filled in: the argmax of a head is one streamed pass over it."""
        unpaired = target_rows < 0
        rows = torch.cat([h[at] for h, at in zip(hidden, unpaired, strict=True)])
        argmax: Any = _target(rows, head, **self.options).token_ids
        return token_ids.masked_scatter(unpaired, argmax)


def _target(hidden: Tensor, head: nn.Linear, **options: Any) -> Target:
    """What `head` makes of `hidden`, as a constant."""
    return Target.from_hidden(hidden.detach(), head.weight, bias=head.bias, **options)


@dataclass(frozen=True)
class _Rows:
    """What `compute_metrics` asks of `[1, T, V]` logits: slices along T, their argmax, and their losses."""

    token_ids: Tensor  # [1, T]
    divergences: Any = None  # Divergences, of the draft's

    @property
    def shape(self) -> torch.Size:
        return self.token_ids.shape

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    def __getitem__(self, index: Any) -> _Rows:
        d = self.divergences
        sliced = None if d is None else Divergences(*(getattr(d, name)[index] for name in vars(d)))
        return _Rows(self.token_ids[index], sliced)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].token_ids if func is torch.argmax else NotImplemented


def _identity(hidden: Tensor) -> Tensor:
    return hidden


def _record(
    logits: Tensor,
    targets: Tensor,
    loss_mask: Tensor | None,
    prev_correct: Tensor,
    ttt_step: int,
    ttt_step_loss_decay: float,
    loss_config: Any = None,
) -> tuple[float, dict[int, dict[str, Any]]]:
    """In place of `compute_metrics`, whose two results the forward only adds up."""
    return 0.0, {
        ttt_step: {
            "logits": logits,
            "targets": targets,
            "loss_mask": loss_mask,
            "prev_correct": prev_correct,
            "ttt_step_loss_decay": ttt_step_loss_decay,
        }
    }


def _shifted_rows(steps: int, size: int, loss_mask: Tensor | None, device: torch.device) -> Tensor:
    """int64 `[K, 1, T]`: in step k, row t is scored against target row t + k; -1 beyond the end or the mask."""
    rows = torch.arange(size, device=device) + torch.arange(steps, device=device).unsqueeze(1)
    scored = rows < size
    if loss_mask is not None:
        scored &= (loss_mask.to(device).reshape(-1) != 0)[rows.clamp(max=size - 1)]
    return torch.where(scored, rows, -1).unsqueeze(1)


def _terms(loss_config: dict[str, tuple[Callable[..., Tensor], float]] | None) -> Any:
    """`loss_config` with each loss of logits replaced by the same loss of `_Rows`."""
    if loss_config is None:
        loss_config = {"kl_div": (losses.fused_kl_div_loss, 1.0)}  # compute_metrics' own default
    known = _known_losses()
    unknown = [name for name, (loss, _) in loss_config.items() if loss not in known]
    if unknown:
        checks.fail(
            f"losses among {', '.join(_TERMS)}, from resolve_loss_config",
            f"{', '.join(unknown)}",
            "unapply(model) to train on others; register() speeds up those of the four that are in the mix.",
        )
    return {name: (_of_rows(known[loss]), weight) for name, (loss, weight) in loss_config.items()}


def _of_rows(term: Callable[[Divergences], Tensor]) -> Callable[[_Rows, _Rows], Tensor]:
    return lambda draft, target: term(draft.divergences)


def _known_losses() -> dict[Callable[..., Tensor], Callable[[Divergences], Tensor]]:
    """Every function that stands for one of the terms: the fused ones, the eager ones, and ours."""
    from speculators.losses import utils

    maps = (losses.FUSED, *utils._LOSS_FN_MAPS.values(), losses._replaced)
    return {of[name]: term for of in maps for name, term in _TERMS.items() if name in of}
