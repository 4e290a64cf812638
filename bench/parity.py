"""The gate before any timing: loss and gradients of a provider against the float64 oracle, on a tiny shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_lk import reference

from .providers import MIX, Provider, clear_gradients, hard_labels
from .shapes import Inputs, Shape, make_inputs, tiny

# How many times the error of the eager loss in the same dtype a provider may make: chunks and fused sums round in
# another order. A wrong loss is off by a thousand times more.
MARGIN = 8.0


@dataclass(frozen=True)
class StepRows:
    """One draft step for an oracle: `[n]` each, of the rows that count; `num_rows` of them are in the batch."""

    log_alpha: Tensor
    kl: Tensor
    entropy: Tensor
    further: dict[str, Tensor]
    target_in_draft: Tensor
    num_rows: int


def _position(rows: StepRows) -> Tensor:
    alpha = rows.log_alpha.exp()
    weight = torch.exp(-3.0 * alpha.detach().mean())
    return weight * rows.kl.mean() + (1 - weight) * (1 - alpha).mean()


def _token(rows: StepRows) -> Tensor:
    alpha = rows.log_alpha.exp()
    weight = torch.exp(-3.0 * alpha.detach())
    return (weight * rows.kl + (1 - weight) * (1 - alpha)).mean()


def _specforge(rows: StepRows) -> Tensor:
    """Rows whose target argmax is in the draft vocabulary; KL as cross-entropy, by all rows of the batch."""
    at = rows.target_in_draft
    alpha = rows.log_alpha[at].exp().mean()
    weight = torch.exp(-3.0 * alpha.detach())
    return weight * (rows.kl + rows.entropy)[at].sum() / rows.num_rows + (1 - weight) * (1 - alpha)


# Per step, from the rows that count; a loss is the sum over steps. "hard" has no divergences: see `oracle`.
ORACLES: dict[str, Callable[[StepRows], Tensor]] = {
    "position": _position,
    "token": _token,
    "specforge": _specforge,
    "speculators": _token,  # of p renormalised
    "kl": lambda rows: rows.kl.mean(),
    "l1": lambda rows: rows.further["l1"].mean(),
    "mix": lambda rows: sum(MIX[name] * (rows.further | {"kl": rows.kl})[name].mean() for name in MIX),
}
RENORMALIZED = ("speculators",)


def oracle(inputs: Inputs, semantics: str, dtype: torch.dtype) -> list[Tensor]:
    """Loss and gradients of `inputs.leaves`, with logits made in `dtype` and all else in float64."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs.leaves]
    *hidden, weight = leaves
    t = F.linear(inputs.target_hidden.to(dtype), inputs.target_weight.to(dtype)).double()
    log_p = reference.target_log_probs(t, inputs.target_ids, renormalize=semantics in RENORMALIZED)
    pt = log_p.softmax(-1)
    entropy = -(pt * log_p.log_softmax(-1)).sum(-1)
    best = t.argmax(-1)
    in_draft = torch.ones_like(best, dtype=torch.bool) if inputs.t2d is None else inputs.t2d[best]
    loss = torch.zeros((), dtype=torch.float64, device=t.device)
    for k, h in enumerate(hidden):
        z = F.linear(h, weight).double()
        if semantics == "hard":
            loss = loss + F.cross_entropy(z, hard_labels(inputs)[k])
            continue
        rows = inputs.step_mask(k).nonzero().squeeze(1)
        at = rows + k
        log_alpha, kl = reference.divergences(z[rows], log_p[at])
        further = reference.further_divergences(z[rows], log_p[at])
        loss = loss + ORACLES[semantics](StepRows(log_alpha, kl, entropy[at], further, in_draft[at], len(h)))
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """Largest error of each tensor, relative to its largest magnitude; inf for what is not finite."""
    out = []
    for a, b in zip(got, want, strict=True):
        error = float((a.double() - b.double()).abs().max() / b.abs().max().double().clamp_min(1e-30))
        out.append(error if error == error else float("inf"))
    return out


def disagreement(provider: Provider, shape: Shape, device: torch.device | str = "cpu") -> str:
    """How the provider differs from the oracle on a tiny shape of this structure, in float32; "" if it does not."""
    inputs = make_inputs(tiny(shape), device)
    want = oracle(inputs, provider.semantics, torch.float64)
    allowed = [
        MARGIN * max(error, torch.finfo(torch.float32).eps)
        for error in errors(oracle(inputs, provider.semantics, torch.float32), want)
    ]
    clear_gradients(inputs)
    loss = provider.prepare(inputs)()
    loss.backward()
    if any(x.grad is None for x in inputs.leaves):
        return "a gradient is missing"
    got = errors([loss.detach(), *(x.grad for x in inputs.leaves)], want)
    names = ["loss", *(f"dH{k}" for k in range(len(inputs.draft_hidden))), "dW"]
    wrong = [
        f"{name} off by {error:.1e} (allowed {most:.1e})"
        for name, error, most in zip(names, got, allowed, strict=True)
        if not error <= most
    ]
    return "; ".join(wrong)
