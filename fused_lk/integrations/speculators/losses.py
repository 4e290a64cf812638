"""The functions of `speculators.losses.fused`, by name and signature, on any device.

They take logits and target logits over the draft vocabulary, `[1, T, V]`, and give one loss per token, `[1, T]`. Both
distributions are normalised over the draft vocabulary, as everywhere in speculators. They run where the fused Triton
kernels do not, and their values are safe (below). On a GPU they save no memory over those kernels, which keep no
softmax either. Neither can do without the logits, which the caller makes. `apply` can.

`nla` is not clamped. Below an acceptance rate of 1e-5 the published loss is constant and has no gradient; this one
goes on as -log alpha. A target logit of -inf means a token that cannot be drawn, and gives no NaN. A row that has only
such logits has the loss 0. `ce` of half-precision logits is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ... import Divergences, Target, checks, lk_divergences_from_logits
from .. import seams

TESTED = ("0.9.0",)


def kl_div(d: Divergences) -> Tensor:
    """KL(p || q)."""
    return d.kl


def tv(d: Divergences) -> Tensor:
    """1 - alpha."""
    return torch.where(_supported(d), 1 - d.acceptance, 0)


def nla(d: Divergences) -> Tensor:
    """-log alpha."""
    return torch.where(_supported(d), -d.log_acceptance, 0)


def lk_hybrid(d: Divergences, eta: float = 3.0) -> Tensor:
    """`w KL + (1 - w) TV` with each token's own `w = exp(-eta * stop_grad(alpha))`."""
    weight = torch.exp(-eta * d.acceptance.detach())
    return weight * kl_div(d) + (1 - weight) * tv(d)


def _supported(d: Divergences) -> Tensor:
    return d.log_acceptance > float("-inf")


class Loss(NamedTuple):
    """One of speculators' losses: the `terms` to ask `lk_divergences` for, and what it makes of the answer."""

    terms: tuple[str, ...]
    of: Callable[[Divergences], Tensor]


LOSSES: dict[str, Loss] = {
    "kl_div": Loss((), kl_div),
    "rkl": Loss(("rkl",), lambda d: d.terms["rkl"]),
    "jsd": Loss(("jsd",), lambda d: d.terms["jsd"]),
    "ce": Loss(("ce",), lambda d: d.terms["ce"]),
    "tv": Loss((), tv),
    "nla": Loss((), nla),
    "lk_hybrid": Loss((), lk_hybrid),
}


def fused_kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """`KL(p || q)` per token, `[..., V]` to `[...]`; `targets` are logits and get no gradient."""
    return _loss("kl_div", logits, targets)


def fused_reverse_kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """`KL(q || p)` per token, infinite where q can say what p cannot; see `fused_kl_div_loss`."""
    return _loss("rkl", logits, targets)


def fused_js_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """`(KL(p || m) + KL(q || m)) / 2` with `m = (p + q) / 2` per token; see `fused_kl_div_loss`."""
    return _loss("jsd", logits, targets)


def fused_ce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """`-log q` of the target's argmax per token; see `fused_kl_div_loss`."""
    return _loss("ce", logits, targets)


def fused_tv_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Total variation `1 - sum_v min(p_v, q_v)` per token; see `fused_kl_div_loss`."""
    return _loss("tv", logits, targets)


def fused_nla_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """`-log sum_v min(p_v, q_v)` per token, not clamped; see `fused_kl_div_loss`."""
    return _loss("nla", logits, targets)


def fused_lk_hybrid_loss(logits: Tensor, targets: Tensor, eta: float = 3.0) -> Tensor:
    """KL and total variation mixed by each token's acceptance (arXiv 2602.23881); see `fused_kl_div_loss`."""
    return lk_hybrid(_divergences(logits, targets, ()), eta)


def _loss(name: str, logits: Tensor, targets: Tensor) -> Tensor:
    loss = LOSSES[name]
    return loss.of(_divergences(logits, targets, loss.terms))


def _divergences(logits: Tensor, targets: Tensor, terms: tuple[str, ...]) -> Divergences:
    return lk_divergences_from_logits(logits, Target.from_logits(targets.detach(), renormalize=True), terms=terms)


# The losses that this package replaces, by speculators' names.
FUSED: dict[str, Callable[..., Tensor]] = {
    "kl_div": fused_kl_div_loss,
    "rkl": fused_reverse_kl_div_loss,
    "jsd": fused_js_div_loss,
    "ce": fused_ce_loss,
    "tv": fused_tv_loss,
    "nla": fused_nla_loss,
    "lk_hybrid": fused_lk_hybrid_loss,
}

_replaced: dict[str, Callable[..., Tensor]] = {}  # The published losses wait here until `unregister`.


def register() -> None:
    """Let `speculators.losses.resolve_loss_config` give these functions for each of its seven names.

    Its "eager" implementation stays as it is. Registering twice changes nothing.

    Raises:
        ImportError: speculators is not installed. (Another version than the tested ones is a warning.)
    """
    seams.require_version("speculators", TESTED)
    from speculators.losses import utils

    if not _replaced:
        _replaced.update({name: utils._FUSED_LOSS_FN_MAP[name] for name in FUSED})
        utils._FUSED_LOSS_FN_MAP.update(FUSED)


def unregister() -> None:
    """Undo `register`, if it was called. A loss that another caller has registered since then stays."""
    if _replaced:
        from speculators.losses import utils

        ours = {name for name, loss in FUSED.items() if utils._FUSED_LOSS_FN_MAP.get(name) is loss}
        utils._FUSED_LOSS_FN_MAP.update({name: loss for name, loss in _replaced.items() if name in ours})
        _replaced.clear()


def named(**given: Callable[..., Tensor]) -> dict[str, Loss]:
    """Recognise loss functions: those of `LOSSES` in any implementation, fused, eager or ours.

    Raises:
        ValueError: one of them is another function.
    """
    from speculators.losses import utils

    maps = (FUSED, *utils._LOSS_FN_MAPS.values(), _replaced)
    known = {of[name]: loss for of in maps for name, loss in LOSSES.items() if name in of}
    unknown = [name for name, function in given.items() if function not in known]
    if unknown:
        checks.fail(
            f"losses among {', '.join(LOSSES)}, from resolve_loss_config",
            ", ".join(unknown),
            "unapply(model) to train on others: they need logits, which the model then makes.",
        )
    return {name: known[function] for name, function in given.items()}
