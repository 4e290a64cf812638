"""Peak memory and time of the loss, forward and backward, beyond its inputs: fused against eager, on one real batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_lk
from bench.accounting import Accounting

from .train import NAMES, Run, Scorer, Settings

MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """Of one loss and its gradients."""

    loss: float
    peak_bytes: int
    seconds: float  # median


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The peak of one run, beyond what exists before.

    On a CPU it is that of live tensors. On a GPU it is that of the allocator, because the backward has a thread of its
    own there, which the accounting does not see.
    """
    if device.type != "cuda":
        with Accounting() as seen:
            run()
        return seen.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def of_losses(runs: list[Run], scorer: Scorer, tokens: Tensor, settings: Settings) -> dict[str, Cost]:
    """Eager and fused, for each run's draft and objective, from the hidden states of `tokens` `[B, S]`."""
    losses = {}
    for run in runs:
        for name, loss in _losses(run, scorer, tokens, settings).items():
            losses[f"{NAMES[run.objective]}, {name}"] = loss
    return {name: _cost(loss, scorer.device) for name, loss in losses.items()}


def _losses(run: Run, scorer: Scorer, tokens: Tensor, settings: Settings) -> dict[str, Callable[[], Tensor]]:
    """Functions that make one loss and its gradients from hidden states and weights; all else is their cost."""
    with torch.no_grad():
        target_hidden, features = scorer.target(tokens)
        hidden = [x.requires_grad_() for x in run.draft(features, tokens, scorer.steps)]
    weight, decay = run.draft.head.weight, settings.position_decay
    pairs, t2d = scorer.pairs(tokens.shape), scorer.head.vocab.t2d

    def eager() -> Tensor:
        return eager_loss(hidden, weight, target_hidden, scorer.head, t2d, run.objective, decay)

    def fused() -> Tensor:
        target = fused_lk.Target.from_hidden(target_hidden, scorer.head, **scorer.options)
        options = {"objective": run.objective, "position_decay": decay, **scorer.options}
        return fused_lk.lk_loss(hidden, weight, target, pairs=pairs, **options).loss

    def with_gradients(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = make()
            torch.autograd.grad(loss, [*hidden, weight])
            return loss.detach()

        return run

    return {"eager": with_gradients(eager), "fused_lk": with_gradients(fused)}


def _cost(run: Callable[[], Tensor], device: torch.device, repeats: int = 5) -> Cost:
    loss = float(run())  # and warm
    peak = peak_bytes(run, device)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return Cost(loss, peak, statistics.median(seconds))


def eager_loss(
    hidden: list[Tensor],
    weight: Tensor,
    target_hidden: Tensor,
    head: fused_lk.TargetHead,
    t2d: Tensor,
    objective: str,
    position_decay: float,
    eta: float = 3.0,
) -> Tensor:
    """The same loss as one writes it, from full logits: the target's softmaxes once, shared by all steps."""
    with torch.no_grad():
        target_logits = F.linear(target_hidden, head.weight, head.bias)
        p = target_logits.softmax(-1)[..., t2d]
        pt = target_logits[..., t2d].softmax(-1)
        log_pt = pt.log()
        del target_logits
    total = torch.zeros((), device=weight.device)
    for k, rows in enumerate(hidden):
        log_q = F.linear(rows[:, : -1 - k], weight).log_softmax(-1)
        scored = slice(1 + k, None)
        token_alpha = torch.minimum(p[:, scored], log_q.exp()).sum(-1)
        alpha = token_alpha.mean()
        kl = (pt[:, scored] * (log_pt[:, scored] - log_q)).sum(-1).mean()
        lam = torch.exp(-eta * alpha.detach())
        loss = {
            "kl": lambda kl=kl: kl,
            "tv": lambda alpha=alpha: 1 - alpha,
            "alpha": lambda alpha=token_alpha: -alpha.log().mean(),
            "lambda": lambda lam=lam, kl=kl, alpha=alpha: lam * kl + (1 - lam) * (1 - alpha),
        }[objective]
        total = total + position_decay**k * loss()
    return total
