"""Fused LK losses: train draft models of speculative decoding for their acceptance rate, without full logits."""

from . import positions, reference
from .evaluate import LKEvaluation, Sampling, lk_evaluate, lk_evaluate_from_logits
from .explain import Explanation, explain
from .losses import lk_divergences, lk_divergences_from_logits, lk_loss, lk_loss_from_logits
from .modules import LKLoss
from .output import Divergences, LKOutput, LKSums
from .pairs.pairs import Pairs
from .reference import expected_acceptance_length
from .targets.head import TargetHead
from .targets.quantized import QuantizedWeight
from .targets.target import Target
from .targets.vocab import DraftVocab

__version__ = "0.2.0"

__all__ = [
    "Divergences",
    "DraftVocab",
    "Explanation",
    "LKEvaluation",
    "LKLoss",
    "LKOutput",
    "LKSums",
    "Pairs",
    "QuantizedWeight",
    "Sampling",
    "Target",
    "TargetHead",
    "expected_acceptance_length",
    "explain",
    "lk_divergences",
    "lk_divergences_from_logits",
    "lk_evaluate",
    "lk_evaluate_from_logits",
    "lk_loss",
    "lk_loss_from_logits",
    "positions",
    "reference",
]
