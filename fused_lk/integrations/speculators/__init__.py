"""vLLM speculators 0.9.0: its fused losses on any device, and its EAGLE-3 model without logits.

The one-line change is one of two. After `speculators.register()`, `resolve_loss_config` gives the functions below.
`speculators.apply(model)`, on an `Eagle3DraftModel` before it is sharded, does without the logits altogether.
"""

from ..seams import unapply
from .eagle3 import apply
from .losses import (
    SUPPORTED,
    fused_kl_div_loss,
    fused_lk_hybrid_loss,
    fused_nla_loss,
    fused_tv_loss,
    register,
    unregister,
)

__all__ = [
    "SUPPORTED",
    "apply",
    "fused_kl_div_loss",
    "fused_lk_hybrid_loss",
    "fused_nla_loss",
    "fused_tv_loss",
    "register",
    "unapply",
    "unregister",
]
