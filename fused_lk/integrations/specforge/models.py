"""Which of SpecForge's training models are served, and how."""

from __future__ import annotations

from typing import Any

from .. import seams
from .blocks import DFlash, Domino, DSpark
from .eagle3 import Eagle3
from .peagle import PEagle

TESTED = ("0.2.0",)

_BLOCKS = "specforge.algorithms.common.dflash_family_model"
KINDS: dict[str, type[seams.Forward]] = {
    "specforge.algorithms.eagle3.model:OnlineEagle3Model": Eagle3,
    "specforge.algorithms.peagle.model:OnlinePEagleModel": PEagle,
    f"{_BLOCKS}:OnlineDFlashModel": DFlash,
    f"{_BLOCKS}:OnlineDominoModel": Domino,
    f"{_BLOCKS}:OnlineDSparkModel": DSpark,
}


def apply(model: Any, *, impl: str = "auto", workspace_mb: float | str = "auto") -> Any:
    """Let a training model of SpecForge compute its losses from hidden states; returns `model`.

    What its forward returns stays the same: losses, metrics, and all their gradients; the modules of the kinds name the
    exceptions. In the step no `[tokens, V]` tensor exists any more, of draft or target.

    Apply before wrapping in DDP or FSDP. With FSDP the head must belong to the root unit, as SpecForge has it. Applying
    again replaces the options.

    Args:
        model: the training model, of a class in `KINDS`; only this instance changes.
        impl, workspace_mb: as in `fused_lk.lk_divergences`.

    Raises:
        ImportError: SpecForge is not installed. (Another version than the tested ones is a warning.)
        TypeError, RuntimeError: the model is not a published one, or its head is not a plain linear.
    """
    seams.require_version("specforge", TESTED)
    return seams.attach(model, KINDS, impl, workspace_mb)
