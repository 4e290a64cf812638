"""The functions of `speculators.losses.fused`, by name and signature, on any device.

They take logits and target logits over the draft vocabulary, `[1, T, V]`, and give one loss per token, `[1, T]`. Both
distributions are normalised over the draft vocabulary, as everywhere in speculators. These functions save time, and the
memory of the softmaxes. They cannot save the logits, because the caller makes them; `apply` (see `eagle3`) can.

`nla` is not clamped. Below an acceptance rate of 1e-5 the published loss is constant and has no gradient; this one
goes on as -log alpha. A target logit of -inf means a token that cannot be drawn, and gives no NaN. A row that has only
such logits has the loss 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ... import Divergences, Target, lk_divergences_from_logits
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


def fused_kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """`KL(p || q)` per token, `[..., V]` to `[...]`; `targets` are logits and get no gradient."""
    return kl_div(_divergences(logits, targets))


def fused_tv_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Total variation `1 - sum_v min(p_v, q_v)` per token; see `fused_kl_div_loss`."""
    return tv(_divergences(logits, targets))


def fused_nla_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """`-log sum_v min(p_v, q_v)` per token, not clamped; see `fused_kl_div_loss`."""
    return nla(_divergences(logits, targets))


def fused_lk_hybrid_loss(logits: Tensor, targets: Tensor, eta: float = 3.0) -> Tensor:
    """KL and total variation mixed by each token's acceptance (arXiv 2602.23881); see `fused_kl_div_loss`."""
    return lk_hybrid(_divergences(logits, targets), eta)


def _divergences(logits: Tensor, targets: Tensor) -> Divergences:
    return lk_divergences_from_logits(logits, Target.from_logits(targets.detach(), renormalize=True))


# The losses that this package replaces, by speculators' names.
FUSED: dict[str, Callable[..., Tensor]] = {
    "kl_div": fused_kl_div_loss,
    "tv": fused_tv_loss,
    "nla": fused_nla_loss,
    "lk_hybrid": fused_lk_hybrid_loss,
}

_replaced: dict[str, Callable[..., Tensor]] = {}  # The published losses wait here until `unregister`.


def register() -> None:
    """Let `speculators.losses.resolve_loss_config` give these functions for "kl_div", "tv", "nla" and "lk_hybrid".

    Its other names, and its "eager" implementation, stay as they are. Registering twice changes nothing.

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
