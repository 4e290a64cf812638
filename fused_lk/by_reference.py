"""The oracle's answer to a problem, `impl="reference"`: eager PyTorch, full logits, one row per draft row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ranks, reference
from .output import Divergences, LKOutput, block_sums
from .pairs.layout import position_sums, ratio
from .reduction import LossOptions, losses_of
from .walk.plan import resolve
from .walk.problem import Problem


def _without_autocast(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Turn autocast off. The tensors of the problem have the dtypes that it asked for already."""

    @functools.wraps(answer)
    def run(problem: Problem, *how: Any) -> Any:
        with torch.autocast(problem.device.type, enabled=False):
            return answer(problem, *how)

    return run


@_without_autocast
def divergences(problem: Problem, top1: bool) -> Divergences:
    rows = _Rows(problem)
    of_rows = (rows.draft_logits, rows.log_p, rows.weights > 0)
    return rows.divergences(reference.masked_divergences(*of_rows, labels=rows.labels, jsd_beta=problem.jsd_beta), top1)


@_without_autocast
def loss(problem: Problem, options: LossOptions, plan: str) -> LKOutput:
    resolve(plan, options.obstacle_to_one_pass)
    rows, target, num_positions = _Rows(problem), problem.target, problem.pairs.num_positions
    kl_weight, lambda_per, denominator, group = (
        options.kl_weight,
        options.lambda_per,
        options.denominator,
        options.group,
    )
    if isinstance(kl_weight, Tensor):
        per_token = kl_weight.shape != (num_positions,) and kl_weight.shape == problem.shape
        kl_weight, lambda_per = kl_weight.reshape(-1) if per_token else kl_weight, "token" if per_token else "position"

    def of_rows(terms: dict[str, Tensor]) -> Tensor:
        assert callable(options.objective)
        return losses_of(options.objective(rows.divergences(terms)), problem.shape).reshape(-1)

    answer = functools.partial(
        reference.lk_loss,
        rows.draft_logits,
        rows.log_p,
        objective=of_rows if callable(options.objective) else dict(options.mix),
        labels=rows.labels,
        jsd_beta=problem.jsd_beta,
        eta=options.eta,
        kl_scale=options.kl_scale,
        lambda_per=lambda_per,
        weights=rows.weights,
        positions=rows.positions,
        num_positions=num_positions,
        position_decay=options.position_decay,
        reduction=options.reduction,
    )
    out = answer(kl_weight=kl_weight, denominator=denominator)
    if group is not None:  # once more, with what all ranks together have
        weight_sum, acceptance_sum = ranks.summed(group, out.weight_sum, out.acceptance_sum)
        if options.waits_for_batch:
            kl_weight = options.kl_scale * torch.exp(-options.eta * ratio(acceptance_sum, weight_sum))
        out = answer(kl_weight=kl_weight, denominator=weight_sum if denominator is None else denominator)
        if options.reduction != "none":
            out = out._replace(loss=out.loss * ranks.size(group))
    log_acceptance = out.log_acceptance.detach()
    target_ids = target.token_ids
    if target_ids is None:
        correct = torch.full_like(rows.weights, float("nan"))
    else:
        correct = (rows.draft_ids == target_ids.reshape(-1)[rows.target_rows]).to(rows.weights)
    kept = rows.weights > 0
    token_acceptance = torch.where(kept, log_acceptance.exp(), 0).view(problem.shape)
    result = LKOutput(
        loss=out.loss.view(problem.shape) if options.reduction == "none" else out.loss,
        acceptance_sum=out.acceptance_sum,
        accuracy_sum=position_sums(rows.weights * correct, rows.positions, num_positions),
        kl_sum=out.kl_sum,
        loss_sum=out.loss_sum,
        kl_weight_sum=out.kl_weight * out.weight_sum,
        term_sums={
            name: position_sums(rows.weights * out.terms[name].detach(), rows.positions, num_positions)
            for name in problem.further_terms
        },
        weight_sum=out.weight_sum,
        num_tokens=out.num_tokens,
        num_unsupported=out.num_unsupported,
        **block_sums(token_acceptance, correct.view(problem.shape), kept.view(problem.shape), problem.pairs),
        position_decay=options.position_decay,
        token_log_acceptance=log_acceptance.view(problem.shape),
        token_acceptance=token_acceptance,
        draft_token_ids=rows.draft_ids.view(problem.shape),
    )
    return result if group is None else result.all_reduced(group)


class _Rows:
    """The problem as the oracle takes it: full logits, one row per draft row."""

    def __init__(self, problem: Problem) -> None:
        target, k = problem.target, problem.num_sources
        rows = [x.reshape(-1, x.shape[-1]) for x in problem.tensors[:k]]
        self.draft_logits = reference.promote(torch.cat(rows))
        if problem.linear:
            tensors = [reference.promote(x) for x in problem.tensors]
            self.draft_logits = F.linear(self.draft_logits, *tensors[k : problem.low_rank.start])
            if second := tensors[problem.low_rank]:
                u = torch.cat([x.reshape(-1, x.shape[-1]) for x in second[:-1]])
                self.draft_logits = self.draft_logits + F.linear(u, second[-1])
        transform = problem.transform
        self.draft_logits = reference.head_logits(self.draft_logits, transform.gain, transform.softcap)
        self.weights, self.target_rows, self.positions = problem.pairs.dense(problem.num_rows, problem.device)
        self.weights = self.weights.to(problem.accumulator)
        self.log_p = target.dense_log_probs()[self.target_rows]
        self.labels = problem.labels
        if target.tiles.restricts_draft:
            self.draft_logits = reference.restricted(self.draft_logits, self.log_p)
            if self.labels is not None:  # the draft's vocabulary is what the target can say
                said = self.log_p.gather(1, self.labels.clamp(min=0).unsqueeze(1)).squeeze(1)
                self.labels = torch.where(said == reference.NEG_INF, -1, self.labels)
        self.draft_ids = torch.where(self.weights > 0, target.to_target_ids(self.draft_logits.argmax(-1)), 0)
        self.problem = problem

    def divergences(self, terms: dict[str, Tensor], top1: bool = False) -> Divergences:
        """`terms` `[N]` in the draft's shape."""
        shape = self.problem.shape
        log_acceptance, kl, *further = (terms[name].view(shape) for name in self.problem.terms)
        acceptance = torch.where(self.weights.view(shape) > 0, log_acceptance.exp(), 0)
        of_name = dict(zip(self.problem.further_terms, further, strict=True))
        made = Divergences(log_acceptance, kl, acceptance, self.draft_ids.view(shape), of_name)
        if not top1:
            return made
        ids = self.problem.target.token_ids
        ids = torch.full_like(self.draft_ids, -1) if ids is None else ids.reshape(-1)[self.target_rows]
        tops = (self.draft_logits.detach().softmax(-1).amax(-1), self.log_p.exp().amax(-1), ids)
        names = ("draft_top1", "target_top1", "target_token_ids")
        kept: dict[str, Any] = {
            k: torch.where(self.weights > 0, x, 0).view(shape) for k, x in zip(names, tops, strict=True)
        }
        return replace(made, **kept)
