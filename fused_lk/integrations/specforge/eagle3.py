"""SpecForge's EAGLE-3 training model (`OnlineEagle3Model`), computed without its logits.

Its `forward` runs as published, with three replacements:

    seam                            before                          now
    the two target builders         [B, S + K, V] probabilities     [B, S + K, 1] row numbers, -1 as padding
    draft_model.compute_logits      [B, S, V] logits                its lm_head's input, [B, S, H]
    _acc_and_loss                   loss and metrics of a step      its arguments, kept until the last step

The adapters therefore slice and shift row numbers in place of distributions. The K steps end in one call, which makes
each target row's logits once for all of them.

What its forward returns stays the same: for each TTT step the loss (differentiable), acceptance rate, accuracy, and
their numerators and denominators. This holds for `lk_loss_type` None, "alpha" and "lambda", either kind of target,
every attention backend, and the distributed reducers of its adapter. The one difference is disjoint distributions under
"alpha", where the original gives NaN and this does not. With `target_hidden_for_compact` no tensor of `V_target` exists
either; `compact_teacher_chunk_size` is not read then, because `workspace_mb` bounds the logits. The draft model's `t2d`
and `d2t` must agree (ValueError in the forward); they may be loaded after `apply`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import Divergences, DraftVocab, Pairs, Target, TargetHead, checks, lk_divergences
from .. import seams
from .lk_loss import acceptance_means, compute_lk_loss


class Distilled(seams.Forward):
    """A model with a target over the target's vocabulary.

    It keeps the draft vocabulary, and the draft rows of the target's head, from one call to the next.
    """

    target_head: Any = (
        None  # the trainer's, whose `forward` now hands over its input, which the model is given as target
    )

    def __init__(self, model: Any, *how: Any) -> None:
        super().__init__(model, *how)
        self.vocab = seams.Memo(DraftVocab)
        self.head = seams.Memo(self._make_head)

    def __getstate__(self) -> tuple[Any, ...]:
        return *super().__getstate__(), self.target_head

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *own, self.target_head = state
        super().__setstate__(tuple(own))

    def _make_head(self, weight: Tensor, t2d: Tensor, d2t: Tensor) -> TargetHead:
        return TargetHead(weight, proper(self.vocab(t2d, d2t)))

    def take(self, target_head: Any) -> None:
        """Let the trainer's `TargetHead` hand over hidden states, in the place of logits."""
        seams.require_published(type(target_head), "specforge.modeling.target.target_head:TargetHead")
        seams.linear_head(target_head, "fc")
        target_head.forward, self.target_head = hand_over, target_head

    def target(self, given: Tensor, t2d: Tensor, mask: Tensor) -> Target:
        """Of the target's logits; or of its hidden states, where `target_head` hands those over."""
        d2t = self.model.draft_model.d2t
        if self.target_head is None:
            return Target.from_logits(given.detach(), proper(self.vocab(t2d, d2t)), impl=self.options["impl"])
        weight = seams.linear_head(self.target_head, "fc").weight
        return Target.from_hidden(given.detach(), self.head(weight, t2d, d2t), mask, **self.options)


class Eagle3(Distilled):
    methods = (
        (
            "forward",
            "_compute_target_p_padded",
            "compute_target_p_padded_from_hidden",
            "compute_logits",
            "_acc_and_loss",
        ),
        ("_acc_and_loss",),
    )
    heads = ("draft_model.lm_head",)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[list[Tensor], ...]:
        step = _Step(self)
        forward = seams.with_globals(
            self.published,
            _compute_target_p_padded=step.target_from_logits,
            compute_target_p_padded_from_hidden=step.target_from_hidden,
        )
        draft = seams.shadow(step.draft, compute_logits=functools.partial(head_input, step.draft))
        records, *_ = forward(seams.shadow(self.model, draft_model=draft, _acc_and_loss=_record), *args, **kwargs)
        return step.results(records)


def hand_over(hidden_states: Tensor) -> Tensor:
    """The `forward` of a target's head whose logits nobody needs."""
    return hidden_states


def _record(**arguments: Any) -> tuple[dict[str, Any], ...]:
    """This replaces `_acc_and_loss`, whose seven results `forward` only collects."""
    return (arguments,) * 7


def proper(vocab: DraftVocab) -> DraftVocab | None:
    """Return None for one shared vocabulary: then no rows need gathering, and the normaliser needs no pass."""
    return None if vocab.draft_size == vocab.target_size else vocab


def head_input(draft: Any, hidden_states: Tensor) -> Tensor:
    """Run the `compute_logits` of a draft model up to its `lm_head`."""
    given: list[Tensor] = []

    def lm_head(x: Tensor) -> Tensor:
        given.append(x)
        return x

    out: Tensor = seams.shadow(draft, lm_head=lm_head).compute_logits(hidden_states)
    if not given or out is not given[-1]:
        checks.fail(
            "compute_logits to return what lm_head gives",
            f"{type(draft).__qualname__}.compute_logits, which changes it",
            "Logits never exist here; express the change in the head's weight, or do not apply.",
            TypeError,
        )
    return out


class _Step:
    """This holds what belongs to one call of the model's forward."""

    def __init__(self, kept: Eagle3) -> None:
        self.kept, self.model, self.draft = kept, kept.model, kept.model.draft_model
        self.target: Target
        self.entropy: Tensor  # [B * S], of the target renormalised on the draft vocabulary

    def target_from_logits(self, target: Tensor, t2d: Tensor, loss_mask: Tensor, length: int) -> tuple[Tensor, ...]:
        self.target = self.kept.target(target, t2d, loss_mask.squeeze(-1) != 0)
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
        """Return row numbers in place of the two padded probabilities, padded argmax ids, and the position mask."""
        token_ids: Any = self.target.token_ids
        position_mask = t2d[token_ids].unsqueeze(-1).int() * loss_mask
        self.entropy = _entropy(self.target, position_mask.squeeze(-1) != 0, self.kept.options)
        rows = torch.arange(token_ids.numel(), device=token_ids.device).view(*token_ids.shape, 1)
        rows = F.pad(rows, (0, 0, 0, length), value=-1)
        return rows, rows, F.pad(token_ids, (0, length)), position_mask

    def results(self, records: list[dict[str, Any]]) -> tuple[list[Tensor], ...]:
        """Make the seven lists that the published forward returns."""
        head = seams.linear_head(self.model, "draft_model.lm_head")
        hidden = [r["logits"] for r in records]
        rows = torch.stack([r["target_p"].squeeze(-1) for r in records])
        supervised = torch.stack([r["position_mask"].squeeze(-1) for r in records]) != 0
        pairs = Pairs(supervised, rows)
        d = lk_divergences(hidden, head.weight, self.target, bias=head.bias, pairs=pairs, **self.kept.of_losses)
        cross_entropy = torch.where(supervised, d.kl + self.entropy[rows.clamp(min=0)], 0)
        steps = [self._acc_and_loss(d[k], cross_entropy[k], supervised[k], r) for k, r in enumerate(records)]
        return tuple(map(list, zip(*steps, strict=True)))

    def _acc_and_loss(
        self, d: Divergences, cross_entropy: Tensor, supervised: Tensor, record: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """Make one step's loss, acceptance rate, accuracy, and their numerators and denominators, by SpecForge's rules.

        `cross_entropy` is `-sum pt log q`, `[B, S]`, and 0 where `supervised` is False.
        """
        adapter, loss_mask = record["adapter"], record["loss_mask"]
        with torch.no_grad():
            # Ids of rows that are not supervised are not computed. The original counts nothing there either: the
            # target's argmax has no draft token, or the loss mask is 0.
            hits = (d.draft_token_ids == record["target_token_ids"]) & supervised
            correct, denominator = adapter.reduce_metrics(
                local_correct=(hits * loss_mask.squeeze(-1)).sum(), local_denom=loss_mask.sum().clamp_min(1e-6)
            )
        num_rows = cross_entropy.numel()  # This counts every row, supervised or not.
        loss = adapter.reduce_loss(cross_entropy.sum() / num_rows)
        with torch.set_grad_enabled(self.model.lk_loss_type is not None and torch.is_grad_enabled()):
            acceptance_rate, log_acceptance_rate = acceptance_means(
                d, record["position_mask"], reduce_fn=adapter.reduce_metrics
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


@torch.no_grad()
def _entropy(target: Target, mask: Tensor, options: dict[str, Any]) -> Tensor:
    """Return `[num_tokens]`, the entropy of the target renormalised on the draft vocabulary, and 0 outside `mask`.

    SpecForge reports KL as a cross-entropy, and mixes that with alpha. The two differ by this constant. It is
    `log V - KL(pt || uniform)`, and a draft whose logits are all 0 is uniform.
    """
    size = target.draft_vocab_size
    weight = torch.zeros(size, 1, dtype=torch.float32, device=target.device)
    nothing = weight.new_zeros(*mask.shape, 1)
    kl = lk_divergences(nothing, weight, target, mask=mask, **options).kl
    return torch.where(mask, torch.log(kl.new_tensor(size)) - kl, 0).reshape(-1)
