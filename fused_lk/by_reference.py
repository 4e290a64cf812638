"""A call answered by the oracle, `impl="reference"`: full logits, one row per draft row, eager PyTorch throughout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .call import Call
from .metrics import Divergences, LKOutput, position_sums
from .options import LossOptions


def divergences(request: Call) -> Divergences:
    rows = _Rows(request)
    log_acceptance, kl = reference.masked_divergences(
        rows.draft_logits, rows.log_p, rows.weights > 0, request.draft_temperature
    )
    acceptance = torch.where(rows.weights > 0, log_acceptance.exp(), 0)
    return Divergences(*(x.view(request.shape) for x in (log_acceptance, kl, acceptance, rows.draft_ids)))


def loss(request: Call, options: LossOptions) -> LKOutput:
    rows, target, num_positions = _Rows(request), request.target, request.pairs.num_positions
    kl_weight, lambda_per = options.kl_weight, options.lambda_per
    if isinstance(kl_weight, Tensor):
        per_token = kl_weight.shape != (num_positions,) and kl_weight.shape == request.shape
        kl_weight, lambda_per = kl_weight.reshape(-1) if per_token else kl_weight, "token" if per_token else "position"
    out = reference.lk_loss(
        rows.draft_logits,
        rows.log_p,
        objective=options.objective,
        eta=options.eta,
        kl_scale=options.kl_scale,
        lambda_per=lambda_per,
        kl_weight=kl_weight,
        weights=rows.weights,
        positions=rows.positions,
        num_positions=num_positions,
        position_decay=options.position_decay,
        reduction=options.reduction,
        denominator=options.denominator,
        draft_temperature=request.draft_temperature,
    )
    target_ids = target.token_ids
    if target_ids is None:
        correct = torch.full_like(rows.weights, float("nan"))
    else:
        correct = rows.weights * (rows.draft_ids == target_ids.reshape(-1)[rows.target_rows])
    return LKOutput(
        loss=out.loss.view(request.shape) if options.reduction == "none" else out.loss,
        acceptance_sum=out.acceptance_sum,
        accuracy_sum=position_sums(correct, rows.positions, num_positions),
        kl_sum=out.kl_sum,
        weight_sum=out.weight_sum,
        kl_weight=out.kl_weight,
        num_tokens=out.num_tokens,
        num_unsupported=out.num_unsupported,
        token_log_acceptance=out.log_acceptance.detach().view(request.shape),
        draft_token_ids=rows.draft_ids.view(request.shape),
        loss_is_per_position=options.reduction == "position",
    )


class _Rows:
    """One call for the oracle: full logits, one row per draft row."""

    def __init__(self, request: Call) -> None:
        draft, target = request.draft, request.target
        rows = [x.reshape(-1, x.shape[-1]) for x in request.tensors[: draft.num_sources]]
        self.draft_logits = reference.promote(torch.cat(rows))
        if draft.linear:
            weight, *bias = (reference.promote(x) for x in request.tensors[draft.num_sources :])
            self.draft_logits = F.linear(self.draft_logits, weight, *bias)
        self.weights, self.target_rows, self.positions = request.pairs.dense(request.num_rows, request.device)
        acc = torch.promote_types(self.draft_logits.dtype, target.dtype)
        self.weights = self.weights.to(torch.promote_types(acc, torch.float32))
        self.log_p = target.dense_log_probs()[self.target_rows]
        self.draft_ids = torch.where(self.weights > 0, target.to_target_ids(self.draft_logits.argmax(-1)), 0)
