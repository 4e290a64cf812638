"""Fused LK losses: train draft models of speculative decoding for their acceptance rate, without full logits."""

from . import reference
from .explain import Explanation, explain
from .head import TargetHead
from .losses import lk_divergences, lk_divergences_from_logits, lk_loss, lk_loss_from_logits
from .metrics import Divergences, LKOutput
from .modules import LKLoss
from .pairs import Pairs
from .reference import expected_acceptance_length
from .target import Target
from .vocab import DraftVocab

__version__ = "0.1.0"

__all__ = [
    "Divergences",
    "DraftVocab",
    "Explanation",
    "LKLoss",
    "LKOutput",
    "Pairs",
    "Target",
    "TargetHead",
    "expected_acceptance_length",
    "explain",
    "lk_divergences",
    "lk_divergences_from_logits",
    "lk_loss",
    "lk_loss_from_logits",
    "reference",
]
