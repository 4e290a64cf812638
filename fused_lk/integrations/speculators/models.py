"""Which of speculators' draft models are served, and how."""

from __future__ import annotations

from typing import Any

from .. import seams
from .eagle3 import Eagle3
from .losses import TESTED

KINDS: dict[str, type[seams.Forward]] = {
    "speculators.models.eagle3.core:Eagle3DraftModel": Eagle3,
}


def apply(model: Any, *, impl: str = "auto", workspace_mb: float | str = "auto") -> Any:
    """Let a draft model of speculators compute its loss from hidden states; returns `model`.

    What its forward returns stays the same: draft tokens, loss, metrics, and all gradients; the modules of the kinds
    name the exceptions. In the step no `[tokens, V]` tensor exists any more.

    Apply before sharding; the heads must belong to the root unit. Applying again replaces the options.

    Args:
        model: the training model, of a class in `KINDS`; only this instance changes.
        impl, workspace_mb: as in `fused_lk.lk_divergences`.

    Raises:
        ImportError: speculators is not installed. (Another version than the tested ones is a warning.)
        TypeError, RuntimeError: the model is not a published one, or its heads are not plain linears.
    """
    seams.require_version("speculators", TESTED)
    return seams.attach(model, KINDS, impl, workspace_mb)
