"""SpecForge 0.2.0: its EAGLE-3 model without logits, and the functions of `specforge.core.lk_loss`, made safe.

The one-line change is `specforge.apply(model)`, on an `OnlineEagle3Model` before it is wrapped in DDP or FSDP.
"""

from ..seams import unapply
from .eagle3 import SUPPORTED, apply
from .lk_loss import compute_acceptance_rate, compute_lk_loss, expected_acceptance_rate

__all__ = [
    "SUPPORTED",
    "apply",
    "compute_acceptance_rate",
    "compute_lk_loss",
    "expected_acceptance_rate",
    "unapply",
]
