"""The oracle: the mathematics of the LK losses in plain eager PyTorch.

Readable before fast. Everything is promoted to at least float32 and computed densely, so float64 inputs give
the truth that all tests compare with. Nothing else of this package is used here.

Notation (arXiv 2602.23881): q = draft, p = target. `log_p` holds the target's log-probabilities on the draft
vocabulary, normalised over the target's *full* vocabulary; a token the target cannot produce has -inf.

    alpha = sum_v min(p_v, q_v)      KL = KL(pt || q),  pt = p renormalised on the draft vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEG_INF = float("-inf")


def promote(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def head_logits(z: Tensor, logit_scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """What a model makes of the product `z` of its head: `logit_scale * z`, and its softcap, of the same shape.

    Cohere has a scale, Granite the scale 1 / logits_scaling, Gemma 2 and 4 a softcap. The temperature comes after. A
    token whose logit is -inf cannot be drawn, with a cap neither.
    """
    logits = logit_scale * promote(z)
    if softcap is None:
        return logits
    return torch.where(logits == NEG_INF, NEG_INF, softcap * torch.tanh(logits / softcap))


def target_log_probs(
    target_logits: Tensor, t2d: Tensor | None = None, temperature: float = 1.0, renormalize: bool = False
) -> Tensor:
    """`log p` on the draft vocabulary, `[..., V_d]`, from target logits over the full vocabulary `[..., V_t]`.

    Normalised over the full vocabulary, or over the draft vocabulary with `renormalize=True`.
    `t2d` is a bool mask `[V_t]` of the draft vocabulary (or the target ids of its tokens, in draft order).
    """
    logits = promote(target_logits) / temperature
    on_draft = logits if t2d is None else logits[..., t2d]
    over = on_draft if renormalize else logits
    return on_draft - _safe_logsumexp(over)


def topk_log_probs(
    token_ids: Tensor,
    log_probs: Tensor,
    num_tokens: int,
    t2d: Tensor | None = None,
    log_normalizer: Tensor | None = None,
    temperature: float = 1.0,
    renormalize: bool = False,
) -> Tensor:
    """`log p` on the draft vocabulary, `[..., V_d]`, of a target that lists tokens `[..., k]` of its `num_tokens`.

    An id of -1 and a value of -inf list nothing. A token that is listed twice counts once, with its larger value. Other
    tokens are impossible. Without `log_normalizer` `[...]` the values are log-probabilities; with it they are logits,
    and it is their logsumexp, divided by the temperature, over all `num_tokens`.
    """
    at = token_ids.unsqueeze(-1) == torch.arange(num_tokens, device=token_ids.device)
    logits = torch.where(at, promote(log_probs).unsqueeze(-1), NEG_INF).amax(-2) / temperature
    on_draft = logits if t2d is None else logits[..., t2d]
    if renormalize:
        return on_draft - _safe_logsumexp(on_draft)
    return on_draft if log_normalizer is None else on_draft - log_normalizer.unsqueeze(-1)


def divergences(draft_logits: Tensor, log_p: Tensor, draft_temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`(log alpha, KL(pt || q))` per row, `[...]`, differentiable in `draft_logits` by autograd.

    Rows whose target has no mass on the draft vocabulary give `(-inf, 0)` and no gradient. A draft that excludes all
    that the target may say gives `(-inf, inf)`; log alpha has no gradient there.
    """
    log_p = promote(log_p).detach()
    log_q = F.log_softmax(promote(draft_logits) / draft_temperature, dim=-1)
    supported = has_mass(log_p)
    log_p_safe = torch.where(supported.unsqueeze(-1), log_p, 0.0)
    log_pt = F.log_softmax(log_p_safe, -1)

    smaller = torch.minimum(log_q, log_p_safe)
    in_common = (smaller != NEG_INF).any(-1)  # else alpha is 0: a logsumexp of -inf alone has a NaN gradient
    log_alpha = torch.where(in_common.unsqueeze(-1), smaller, 0.0).logsumexp(-1)
    in_support = log_pt != NEG_INF
    surprise = torch.where(in_support, log_pt, 0.0) - torch.where(in_support, log_q, 0.0)
    kl = (log_pt.exp() * surprise).sum(-1)
    return torch.where(supported & in_common, log_alpha, NEG_INF), torch.where(supported, kl, 0.0)


def restricted(draft_logits: Tensor, log_p: Tensor) -> Tensor:
    """The draft's logits with -inf where the target has no mass: q is renormalised on what the target can say.

    Rows whose target has no mass at all stay as they are.
    """
    excluded = (log_p == NEG_INF) & has_mass(log_p).unsqueeze(-1)
    return torch.where(excluded, NEG_INF, draft_logits)


def further_divergences(
    draft_logits: Tensor,
    log_p: Tensor,
    labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    draft_temperature: float = 1.0,
) -> dict[str, Tensor]:
    """The other terms of a loss, per row `[...]`, by name. All but "ce" compare q with pt; m = beta pt + (1 - beta) q:

        soft_ce    -sum_v pt_v log q_v
        rkl        KL(q || pt)
        jsd        beta KL(pt || m) + (1 - beta) KL(q || m)
        skl        KL(pt || m), the skewed KL of DistiLLM (arXiv 2402.03898); at most -log beta
        l1         sum_v |pt_v - q_v|
        ce         -log q_label; 0 where the label is negative. Without labels they are the target's argmax.

    Rows whose target has no mass on the draft vocabulary give 0 and no gradient. Infinite rkl has no gradient.
    """
    log_q, log_p = F.log_softmax(promote(draft_logits) / draft_temperature, dim=-1), promote(log_p).detach()
    supported = has_mass(log_p)
    log_pt = F.log_softmax(torch.where(supported.unsqueeze(-1), log_p, 0.0), -1)
    q, pt = log_q.exp(), log_pt.exp()

    def expectation(probs: Tensor, x: Tensor) -> Tensor:
        """sum_v probs_v x_v, where only those v count that have a probability."""
        return (probs * torch.where(probs > 0, x, 0.0)).sum(-1)

    safe_q = torch.where(q > 0, log_q, 0.0)
    can_say = log_pt != NEG_INF  # also what underflows in pt
    impossible = ((q > 0) & ~can_say).any(-1)
    log_m = torch.logaddexp(log_pt + math.log(jsd_beta), torch.where(q > 0, log_q, NEG_INF) + math.log1p(-jsd_beta))
    log_m = torch.where(log_m == NEG_INF, 0.0, log_m)
    labels = log_pt.argmax(-1) if labels is None else labels
    values = {
        "soft_ce": -expectation(pt, log_q),
        "rkl": expectation(q, safe_q - torch.where(can_say, log_pt, 0.0)).masked_fill(impossible, math.inf),
        "jsd": jsd_beta * expectation(pt, log_pt - log_m) + (1 - jsd_beta) * expectation(q, safe_q - log_m),
        "skl": expectation(pt, log_pt - log_m),
        "l1": (pt - q).abs().sum(-1),
        "ce": torch.where(labels >= 0, -log_q.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1), 0.0),
    }
    return {name: torch.where(supported, x, 0.0) for name, x in values.items()}


def has_mass(log_p: Tensor) -> Tensor:
    """Whether each row's target has any mass on the draft vocabulary, bool `[...]`; True for NaN."""
    return (log_p != NEG_INF).any(-1)


def masked_divergences(
    draft_logits: Tensor,
    log_p: Tensor,
    kept: Tensor,
    draft_temperature: float = 1.0,
    labels: Tensor | None = None,
    jsd_beta: float = 0.5,
) -> dict[str, Tensor]:
    """All terms of the rows `[N]` that are `kept`, by name; 0 on the others, whatever they hold."""
    z, log_p = draft_logits[kept], log_p[kept]
    log_acceptance, kl = divergences(z, log_p, draft_temperature)
    others = further_divergences(z, log_p, None if labels is None else labels[kept], jsd_beta, draft_temperature)
    empty = promote(torch.zeros_like(kept, dtype=torch.promote_types(draft_logits.dtype, log_p.dtype)))
    values = {"log_acceptance": log_acceptance, "kl": kl, **others}
    return {name: empty.masked_scatter(kept, x.to(empty.dtype)) for name, x in values.items()}


class ReferenceLoss(NamedTuple):
    """All quantities of `lk_loss`, per position `[K]` or per token `[N]`; see `fused_lk.LKOutput`."""

    loss: Tensor
    terms: dict[str, Tensor]
    acceptance_sum: Tensor
    kl_sum: Tensor
    kl_weight: Tensor
    weight_sum: Tensor
    num_tokens: Tensor
    num_unsupported: Tensor
    loss_sum: Tensor

    @property
    def log_acceptance(self) -> Tensor:
        return self.terms["log_acceptance"]

    @property
    def kl(self) -> Tensor:
        return self.terms["kl"]


def lk_loss(
    draft_logits: Tensor,
    log_p: Tensor,
    *,
    objective: str | Mapping[str, float] | Callable[[dict[str, Tensor]], Tensor] = "lambda",
    labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    eta: float = 3.0,
    kl_scale: float = 1.0,
    lambda_per: str = "position",
    kl_weight: float | Tensor | None = None,
    weights: Tensor | None = None,
    positions: Tensor | None = None,
    num_positions: int = 1,
    position_decay: float = 1.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    draft_temperature: float = 1.0,
) -> ReferenceLoss:
    """The LK loss of `[N, V_d]` draft logits against `[N, V_d]` target log-probabilities.

    `objective` names a loss, gives losses their weights, or makes the loss `[N]` of the terms. `weights` `[N]` (0 =
    ignored row, whatever it holds), `positions` and `labels` `[N]` (columns; negative: none) are per row;
    `kl_weight` is lambda itself: a float, `[num_positions]`, or `[N]` with `lambda_per="token"`. The options mean what
    they mean in `fused_lk.lk_loss`.
    """
    num_rows = draft_logits.shape[0]
    device = draft_logits.device
    acc = torch.promote_types(torch.promote_types(draft_logits.dtype, log_p.dtype), torch.float32)
    w = torch.ones(num_rows, dtype=acc, device=device) if weights is None else weights.to(acc)
    k = torch.zeros(num_rows, dtype=torch.long, device=device) if positions is None else positions
    kept = w > 0

    terms = masked_divergences(draft_logits, log_p, kept, draft_temperature, labels, jsd_beta)
    log_alpha, kl = terms["log_acceptance"], terms["kl"]
    mix = {objective: 1.0} if isinstance(objective, str) else {} if callable(objective) else objective
    counts = kept & has_mass(log_p)  # supervised, and the target has an answer
    log_alpha_safe = torch.where(counts, log_alpha, 0.0)
    alpha = torch.where(counts, log_alpha_safe.exp(), 0.0)

    def per_position(x: Tensor) -> Tensor:
        x = torch.where(kept, x, 0)  # KL may be infinite
        return torch.stack([torch.where(k == i, x, 0).sum() for i in range(num_positions)])

    weight_sum = per_position(w)
    acceptance_sum = per_position(w * alpha.detach())

    if kl_weight is not None:
        given = torch.as_tensor(kl_weight, dtype=acc, device=device)
        lam = given.expand(num_rows) if given.ndim == 0 or lambda_per == "token" else given[k]
    elif lambda_per == "position":
        mean_alpha = acceptance_sum / torch.where(weight_sum > 0, weight_sum, 1.0)
        lam = kl_scale * torch.exp(-eta * mean_alpha)[k]
    else:
        lam = kl_scale * torch.exp(-eta * alpha.detach())

    losses = {
        **terms,
        "tv": 1 - alpha,
        "alpha": -log_alpha_safe,
        "lambda": torch.where(lam == 0, 0.0, lam * kl) + (1 - lam) * (1 - alpha),  # KL may be infinite
    }
    token_loss = objective(terms) if callable(objective) else torch.zeros_like(w)
    for name, weight in mix.items():
        if weight != 0:
            token_loss = token_loss + weight * losses[name]
    token_loss = torch.where(counts, w * token_loss, 0.0)
    kl_weights = mix.get("kl", 0.0) + mix.get("lambda", 0.0) * lam

    loss_sum = per_position(token_loss)
    divide_by = weight_sum if denominator is None else torch.as_tensor(denominator, dtype=acc, device=device)
    # A denominator of 0 for tokens that count: no number is right.
    without = torch.zeros_like(weight_sum).masked_fill(weight_sum > 0, float("nan"))
    means = torch.where(divide_by > 0, loss_sum / torch.where(divide_by > 0, divide_by, 1.0), without)
    decay = position_decay ** torch.arange(num_positions, dtype=acc, device=device)
    loss = {
        "mean": (decay * means).sum(),
        "position": means,
        "sum": (decay * loss_sum).sum(),
        "none": token_loss,
    }[reduction]
    return ReferenceLoss(
        loss=loss,
        terms=terms,
        acceptance_sum=acceptance_sum,
        kl_sum=per_position(w * kl.detach()),
        kl_weight=per_position(w * kl_weights) / torch.where(weight_sum > 0, weight_sum, 1.0),
        weight_sum=weight_sum,
        num_tokens=per_position(kept.to(torch.long)),
        num_unsupported=(kept & ~counts).sum(),
        loss_sum=loss_sum.detach(),
    )


def prefix_products(x: Tensor, counts: Tensor | None = None) -> Tensor:
    """`prod_{j <= k} x_j` over the first dimension, `[K, ...]`: 0 at positions that do not count.

    `counts` `[K]` or `[K, ...]` is 0, or False, at positions that do not count. They are left out of the products.
    """
    if counts is None:
        return x.cumprod(0)
    kept = counts.reshape(*counts.shape, *(1 for _ in range(x.ndim - counts.ndim))) > 0
    return torch.where(kept, torch.where(kept, x, 1).cumprod(0), 0)


def expected_acceptance_length(acceptance: Tensor, counts: Tensor | None = None) -> Tensor:
    """`1 + sum_k prod_{j <= k} alpha_j` over the first dimension, in tokens per step of the target.

    Args:
        acceptance: `[K, ...]`, alpha of each draft position.
        counts: `[K]` or `[K, ...]`, the supervised tokens of each position (or their weights, or a mask). A position of
            0 adds nothing and does not end the chain: slot 0 of a DFlash block, for example, is the given anchor.
            Default: every position counts.

    Returns:
        `[...]`, between 1 and K + 1. It is differentiable in `acceptance`.
    """
    return 1 + prefix_products(acceptance, counts).sum(0)


def _safe_logsumexp(x: Tensor) -> Tensor:
    """logsumexp over the last dimension, kept; 0 where every entry is -inf, so that -inf - it stays -inf."""
    lse = x.logsumexp(-1, keepdim=True)
    return torch.where(lse == NEG_INF, 0.0, lse)
