"""vLLM speculators 0.9.0: its fused losses on any device, and each of its draft kinds without logits.

The one-line change is one of two. After `speculators.register()`, `resolve_loss_config` gives the functions below.
`speculators.apply(model)`, on a draft model before it is sharded, does without the logits altogether, for any of the
seven losses and their weighted sums.
"""

from ..seams import unapply
from .losses import (
    TESTED,
    fused_ce_loss,
    fused_js_div_loss,
    fused_kl_div_loss,
    fused_lk_hybrid_loss,
    fused_nla_loss,
    fused_reverse_kl_div_loss,
    fused_tv_loss,
    register,
    unregister,
)
from .models import KINDS, apply

__all__ = [
    "KINDS",
    "TESTED",
    "apply",
    "fused_ce_loss",
    "fused_js_div_loss",
    "fused_kl_div_loss",
    "fused_lk_hybrid_loss",
    "fused_nla_loss",
    "fused_reverse_kl_div_loss",
    "fused_tv_loss",
    "register",
    "unapply",
    "unregister",
]
