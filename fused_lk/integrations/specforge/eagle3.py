"""SpecForge's EAGLE-3 training model (`OnlineEagle3Model`), computed without its logits.

Its `forward` runs as published. On the way, three things are not what they were:

    seam                            before                          now
    the two target builders         [B, S + K, V] probabilities     [B, S + K, 1] row numbers, -1 as padding
    draft_model.compute_logits      [B, S, V] logits                its lm_head's input, [B, S, H]
    _acc_and_loss                   loss and metrics of a step      its arguments, kept until the last step

so the adapters slice and shift row numbers in place of distributions, and the K steps end in one call that makes each
target row's logits once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...head import TargetHead
from ...losses import lk_divergences
from ...metrics import Divergences
from ...pairs import Pairs
from ...target import Target
from ...vocab import DraftVocab
from .. import seams
from .lk_loss import acceptance_means, compute_lk_loss

SUPPORTED = ("0.2.0",)

_TARGET_BUILDERS = ("_compute_target_p_padded", "compute_target_p_padded_from_hidden")


def apply(model: Any, *, impl: str = "auto", workspace_mb: float | str = "auto") -> Any:
    """Let an `OnlineEagle3Model` compute its losses from hidden states; returns `model`.

    What it returns stays what it was: per TTT step the loss (differentiable), acceptance rate, accuracy, and their
    numerators and denominators, for `lk_loss_type` None, "alpha" and "lambda", either kind of target, every attention
    backend, and the distributed reducers of its adapter. In the step no `[tokens, V]` tensor exists any more, draft or
    target; with `target_hidden_for_compact` none of `V_target` either (`compact_teacher_chunk_size` is not read then:
    `workspace_mb` bounds the logits). Where the original gives NaN for "alpha" (disjoint distributions), this does not.

    Apply before wrapping in DDP or FSDP. With FSDP the head must belong to the root unit, as SpecForge has it. Applying
    again replaces the options.

    Args:
        model: the training model; only this instance changes.
        impl, workspace_mb: as in `fused_lk.lk_divergences`.

    Raises:
        ImportError: SpecForge is of an unsupported version.
        TypeError, RuntimeError: the model is not the published one, or its draft head is not a plain linear.

    The draft model's `t2d` and `d2t` must agree (ValueError in the forward); they may be loaded after this call.
    """
    seams.require_version("specforge", SUPPORTED)
    checks.choice("impl", impl, ("auto", "triton", "torch", "reference"))
    from specforge.algorithms.eagle3.model import OnlineEagle3Model

    seams.require_unmodified(model, OnlineEagle3Model, "forward", "_acc_and_loss")
    seams.require_names(OnlineEagle3Model.forward, *_TARGET_BUILDERS, "compute_logits", "_acc_and_loss")
    seams.linear_head("draft_model.lm_head", model.draft_model.lm_head)
    seams.attach(model, _Eagle3(OnlineEagle3Model.forward, impl, workspace_mb))
    return model


def unapply(model: Any) -> Any:
    """Undo `apply`; returns `model`, on which nothing of it is left."""
    seams.detach(model)
    return model


class _Eagle3:
    """What is kept between steps: the options, the draft vocabulary, and the draft rows of the target's head."""

    def __init__(self, published: Any, impl: str, workspace_mb: float | str) -> None:
        self.published = published
        self.options: dict[str, Any] = {"impl": impl, "workspace_mb": workspace_mb}
        self.vocab = seams.Memo(DraftVocab)
        self.head = seams.Memo(self._make_head)

    def __reduce__(self) -> tuple[type[_Eagle3], tuple[Any, ...]]:
        return _Eagle3, (self.published, *self.options.values())

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> tuple[list[Tensor], ...]:
        step = _Step(self, model)
        builders = (step.target_from_logits, step.target_from_hidden)
        forward = seams.with_globals(self.published, **dict(zip(_TARGET_BUILDERS, builders, strict=True)))
        draft = seams.shadow(model.draft_model, compute_logits=step.head_input)
        records, *_ = forward(seams.shadow(model, draft_model=draft, _acc_and_loss=_record), *args, **kwargs)
        return step.results(records)

    def _make_head(self, weight: Tensor, t2d: Tensor, d2t: Tensor) -> TargetHead:
        return TargetHead(weight, _proper(self.vocab(t2d, d2t)))


def _record(**arguments: Any) -> tuple[dict[str, Any], ...]:
    """In place of `_acc_and_loss`, whose seven results `forward` only collects."""
    return (arguments,) * 7


def _proper(vocab: DraftVocab) -> DraftVocab | None:
    """None for one vocabulary shared by both models: nothing to gather then, and no pass for the normaliser."""
    return None if vocab.draft_size == vocab.target_size else vocab


@dataclass(frozen=True)
class _Rows:
    """One TTT step's share of the results."""

    divergences: Divergences
    cross_entropy: Tensor  # [B, S], -sum pt log q, 0 where not supervised
    supervised: Tensor


class _Step:
    """One call of the model's forward."""

    def __init__(self, kept: _Eagle3, model: Any) -> None:
        self.kept, self.model, self.draft = kept, model, model.draft_model
        self.target: Target
        self.entropy: Tensor  # [B * S], of the target renormalised on the draft vocabulary

    def target_from_logits(self, target: Tensor, t2d: Tensor, loss_mask: Tensor, length: int) -> tuple[Tensor, ...]:
        vocab = _proper(self.kept.vocab(t2d, self.draft.d2t))
        self.target = Target.from_logits(target.detach(), vocab, impl=self.kept.options["impl"])
        return self._rows(t2d, loss_mask, length)

    def target_from_hidden(
        self, hidden: Tensor, lm_head_weight: Tensor, t2d: Tensor, loss_mask: Tensor, length: int, chunk_size: int
    ) -> tuple[Tensor, ...]:
        head = self.kept.head(lm_head_weight, t2d, self.draft.d2t)
        supervised = loss_mask.squeeze(-1) != 0
        self.target = Target.from_hidden(hidden.detach(), head, supervised, **self.kept.options)
        return self._rows(t2d, loss_mask, length)

    @torch.no_grad()
    def _rows(self, t2d: Tensor, loss_mask: Tensor, length: int) -> tuple[Tensor, ...]:
        """Row numbers where the padded probabilities were (twice), padded argmax ids, and the position mask."""
        token_ids: Any = self.target.token_ids
        position_mask = t2d[token_ids].unsqueeze(-1).int() * loss_mask
        self.entropy = _entropy(self.target, position_mask.squeeze(-1) != 0, self.kept.options)
        rows = torch.arange(token_ids.numel(), device=token_ids.device).view(*token_ids.shape, 1)
        rows = F.pad(rows, (0, 0, 0, length), value=-1)
        return rows, rows, F.pad(token_ids, (0, length)), position_mask

    def head_input(self, hidden_states: Tensor) -> Tensor:
        """`compute_logits` up to its `lm_head`."""
        head = _Identity()
        out = seams.shadow(self.draft, lm_head=head).compute_logits(hidden_states)
        if out is not head.given:
            checks.fail(
                "compute_logits to return what lm_head gives",
                f"{type(self.draft).__qualname__}.compute_logits, which changes it",
                "Logits never exist here; express the change in the head's weight, or do not apply.",
                TypeError,
            )
        return out

    def results(self, records: list[dict[str, Any]]) -> tuple[list[Tensor], ...]:
        """The seven lists of the published forward."""
        head = seams.linear_head("draft_model.lm_head", self.draft.lm_head)
        rows = torch.stack([r["target_p"].squeeze(-1) for r in records])
        supervised = torch.stack([r["position_mask"].squeeze(-1) for r in records]) != 0
        d = lk_divergences(
            [r["logits"] for r in records],
            head.weight,
            self.target,
            bias=head.bias,
            pairs=Pairs(supervised, rows),
            **self.kept.options,
        )
        entropy = self.entropy[rows.clamp(min=0)]
        cross_entropy = torch.where(supervised, d.kl + entropy, 0)
        steps = []
        for k, record in enumerate(records):
            divergences = Divergences(d.log_acceptance[k], d.kl[k], d.acceptance[k], d.draft_token_ids[k])
            steps.append(self._acc_and_loss(_Rows(divergences, cross_entropy[k], supervised[k]), **record))
        return tuple(map(list, zip(*steps, strict=True)))

    def _acc_and_loss(
        self,
        rows: _Rows,
        *,
        target_token_ids: Tensor,
        position_mask: Tensor,
        loss_mask: Tensor,
        adapter: Any,
        **_: Any,
    ) -> tuple[Tensor, ...]:
        """One step's loss, acceptance rate, accuracy, and their numerators and denominators, by SpecForge's rules."""
        with torch.no_grad():
            # Ids of rows that are not supervised are not computed; there the target's argmax has no draft token, or
            # the loss mask is 0, so that the original counts nothing either.
            hits = (rows.divergences.draft_token_ids == target_token_ids) & rows.supervised
            correct, denominator = adapter.reduce_metrics(
                local_correct=(hits * loss_mask.squeeze(-1)).sum(), local_denom=loss_mask.sum().clamp_min(1e-6)
            )
        num_rows = rows.cross_entropy.numel()  # every row, supervised or not
        loss = adapter.reduce_loss(rows.cross_entropy.sum() / num_rows)
        with torch.set_grad_enabled(self.model.lk_loss_type is not None and torch.is_grad_enabled()):
            acceptance_rate, log_acceptance_rate = acceptance_means(
                rows.divergences, position_mask, reduce_fn=adapter.reduce_metrics
            )
        if self.model.lk_loss_type is not None:
            loss = compute_lk_loss(
                kl_loss=loss,
                acceptance_rate=acceptance_rate,
                log_acceptance_rate=log_acceptance_rate,
                lk_loss_type=self.model.lk_loss_type,
                kl_scale=self.model.kl_scale,
                kl_decay=self.model.kl_decay,
            )
        loss_denominator = torch.tensor(num_rows, device=loss.device, dtype=torch.float32)
        accuracy, detached = correct / denominator, loss.detach()
        return loss, acceptance_rate.detach(), accuracy, correct, denominator, detached, loss_denominator


class _Identity:
    """In place of `lm_head`; remembers what it was given."""

    given: Tensor | None = None

    def __call__(self, hidden_states: Tensor) -> Tensor:
        self.given = hidden_states
        return hidden_states


@torch.no_grad()
def _entropy(target: Target, mask: Tensor, options: dict[str, Any]) -> Tensor:
    """`[num_tokens]`, entropy of the target renormalised on the draft vocabulary; 0 outside `mask`.

    SpecForge reports KL as a cross-entropy, and mixes that with alpha. The two differ by this constant, which is
    `log V - KL(pt || uniform)`, and a draft of zeros is uniform.
    """
    size = target.draft_vocab_size
    weight = torch.zeros(size, 1, dtype=torch.float32, device=target.device)
    nothing = weight.new_zeros(*mask.shape, 1)
    kl = lk_divergences(nothing, weight, target, mask=mask, **options).kl
    return torch.where(mask, torch.log(kl.new_tensor(size)) - kl, 0).reshape(-1)
