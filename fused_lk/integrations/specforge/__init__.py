"""SpecForge 0.2.0: its training models without logits, and the functions of `specforge.core.lk_loss`, made safe.

The one-line change is `specforge.apply(model)`, on the training model before it is wrapped in DDP or FSDP. It serves
EAGLE-3 (`eagle3`), P-EAGLE (`peagle`), and DFlash, Domino and DSpark (`blocks`).
"""

from .lk_loss import compute_acceptance_rate, compute_lk_loss, expected_acceptance_rate
from .models import KINDS, TESTED, apply, unapply

__all__ = [
    "KINDS",
    "TESTED",
    "apply",
    "compute_acceptance_rate",
    "compute_lk_loss",
    "expected_acceptance_rate",
    "unapply",
]
