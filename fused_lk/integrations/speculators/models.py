"""Which of speculators' draft models are served, and how."""

from __future__ import annotations

from typing import Any

from .. import seams
from .blocks import DFlash, DFlash2, DSpark, XPress
from .eagle3 import Eagle3, PEagle
from .losses import TESTED
from .mtp import MTP

KINDS: dict[str, type[seams.Forward]] = {
    "speculators.models.eagle3.core:Eagle3DraftModel": Eagle3,
    "speculators.models.peagle.core:PEagleDraftModel": PEagle,
    "speculators.models.dflash.core:DFlashDraftModel": DFlash,
    "speculators.models.dflash2.core:DFlash2DraftModel": DFlash2,
    "speculators.models.dspark.core:DSparkDraftModel": DSpark,
    "speculators.models.xpress.core:XPressDraftModel": XPress,
    "speculators.models.mtp.core:MTPDraftModel": MTP,
}


def apply(model: Any, *, impl: str = "auto", workspace_mb: float | str = "auto", keep_mb: float | str = 0) -> Any:
    """Let a draft model of speculators compute its loss from hidden states; returns `model`.

    What its forward returns stays the same: draft tokens, loss, metrics, and all gradients; the modules of the kinds
    name the exceptions. In the step no `[tokens, V]` tensor exists any more. The losses may be any of speculators'
    seven, fused, eager or registered. `model.forward.refuse(**call)` raises for others, from the keywords that the
    trainer will pass.

    Apply before sharding; the heads must belong to the root unit. Applying again replaces the options.

    Args:
        model: the training model, of a class in `KINDS`; only this instance changes.
        impl, workspace_mb, keep_mb: as in `fused_lk.lk_divergences`.

    Raises:
        ImportError: speculators is not installed. (Another version than the tested ones is a warning.)
        TypeError, RuntimeError: the model is not a published one, or its heads are not plain linears.
    """
    seams.require_version("speculators", TESTED)
    return seams.attach(model, KINDS, impl, workspace_mb, keep_mb)
