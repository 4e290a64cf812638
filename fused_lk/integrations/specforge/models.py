"""Which of SpecForge's training models are served, and how: all five of 0.2.0."""

from __future__ import annotations

from typing import Any

from ... import checks
from .. import seams
from .blocks import DFlash, Domino, DSpark
from .eagle3 import Distilled, Eagle3
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


def apply(
    model: Any,
    *,
    impl: str = "auto",
    workspace_mb: float | str = "auto",
    keep_mb: float | str = 0,
    target_head: Any = None,
) -> Any:
    """Let a training model of SpecForge compute its losses from hidden states; returns `model`.

    What its forward returns stays the same: losses, metrics, and all their gradients; the modules of the kinds name the
    exceptions. In the step no `[tokens, V]` tensor exists any more, of draft or target.

    Apply before wrapping in DDP or FSDP. With FSDP the head must belong to the root unit, as SpecForge has it. Applying
    again replaces the options.

    Args:
        model: the training model, of a class in `KINDS`; only this instance changes.
        impl, workspace_mb, keep_mb: as in `fused_lk.lk_divergences`.
        target_head: of EAGLE-3 and P-EAGLE, the trainer's `TargetHead`, by which it makes the target's logits from
            captured hidden states before it calls the model. It then hands over the hidden states, and those logits
            never exist either. Only for as long as the model is applied.

    Raises:
        ImportError: SpecForge is not installed. (Another version than the tested ones is a warning.)
        TypeError, RuntimeError: the model is not a published one, or a head is not a plain linear, or the model has no
            `target_head`.
    """
    seams.require_version("specforge", TESTED)
    before = vars(model).get("forward")
    seams.attach(model, KINDS, impl, workspace_mb, keep_mb)
    _give_back(before)
    if target_head is None:
        return model
    try:
        if not isinstance(model.forward, Distilled):
            remedy = "Leave target_head out: this model is not given target logits. Nothing was changed."
            checks.fail("an EAGLE-3 or P-EAGLE model, with target_head", type(model).__qualname__, remedy, TypeError)
        model.forward.take(target_head)
    except TypeError:
        unapply(model)
        raise
    return model


def unapply(model: Any) -> Any:
    """Undo `apply`; returns `model`, on which nothing of it is left. A model without it stays as it is."""
    _give_back(vars(model).get("forward"))
    return seams.unapply(model)


def _give_back(forward: Any) -> None:
    """Let the trainer's head make logits again, if `forward` has taken it."""
    head = getattr(forward, "target_head", None)
    if head is not None:
        vars(head).pop("forward", None)
