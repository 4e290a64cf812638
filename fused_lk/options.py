"""The options of the loss: validated once, then a plain record."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks
from .objective import FIXED, OBJECTIVES, Mix, blend

LAMBDA_PER = ("position", "token")
REDUCTIONS = ("mean", "position", "sum", "none")


@dataclass(frozen=True)
class LossOptions:
    """What is minimised and how tokens are reduced; see `fused_lk.lk_loss` for the meaning of each.

    Raises:
        TypeError, ValueError: an unknown name, a number out of range, a tensor of the wrong dtype or with an entry out
            of range (contents on a device are read with FUSED_LK_VALIDATE=1 only: that synchronises).
    """

    objective: str = "lambda"
    eta: float = 3.0
    kl_scale: float = 1.0
    lambda_per: str = "position"
    kl_weight: float | Tensor | None = None
    position_decay: float = 1.0
    reduction: str = "mean"
    denominator: float | Tensor | None = None

    def __post_init__(self) -> None:
        checks.choice("objective", self.objective, OBJECTIVES)
        checks.choice("lambda_per", self.lambda_per, LAMBDA_PER)
        checks.choice("reduction", self.reduction, REDUCTIONS)
        for name in ("eta", "position_decay", "kl_scale"):
            self._keep(name, checks.number(name, getattr(self, name), minimum=0))
        if self.kl_scale > 1:
            warnings.warn(
                f"kl_scale={self.kl_scale:g} can make lambda exceed 1, where the TV term changes sign and acceptance "
                "is pushed down; use kl_scale <= 1.",
                stacklevel=4,
            )
        if isinstance(self.kl_weight, Tensor):
            checks.tensor("kl_weight", self.kl_weight, dtypes=checks.FLOATS)
            checks.non_negative("kl_weight", self.kl_weight)
        elif self.kl_weight is not None:
            self._keep("kl_weight", checks.number("kl_weight", self.kl_weight, minimum=0))
        # A count of 0 would make the loss 0 without a word; a position without tokens adds 0 with any denominator.
        if isinstance(self.denominator, Tensor):
            checks.tensor("denominator", self.denominator, dtypes=(*checks.FLOATS, *checks.INTEGERS))
            checks.positive("denominator", self.denominator, "For counts that may be 0 use denominator.clamp(min=1).")
        elif self.denominator is not None:
            remedy = "For a count that may be 0 use max(denominator, 1)."
            self._keep("denominator", checks.number("denominator", self.denominator, above=0, remedy=remedy))
        if self.kl_weight is not None and self.objective != "lambda":
            checks.fail(
                'kl_weight with objective="lambda" only', f"objective={self.objective!r}", "Leave kl_weight out."
            )

    def _keep(self, name: str, value: float) -> None:
        """Python's number in the place of NumPy's, which operators would refuse."""
        object.__setattr__(self, name, value)

    @property
    def waits_for_batch(self) -> bool:
        """Whether a token's loss depends on other tokens' acceptance."""
        return self.objective == "lambda" and self.kl_weight is None and self.lambda_per == "position"

    @property
    def obstacle_to_one_pass(self) -> str | None:
        """Why gradients cannot be made in the forward; None: they can."""
        if self.waits_for_batch:
            return 'lambda_per="position" without kl_weight (lambda is known only when all tokens are)'
        if self.reduction in ("position", "none"):
            return f'reduction="{self.reduction}" (the upstream gradient of each element is not known in the forward)'
        return None

    def mix(self, kl_weight: Tensor | None) -> Mix:
        """The mix of tokens whose lambda is `kl_weight` (read by objective "lambda" alone)."""
        return FIXED[self.objective] if kl_weight is None else blend(kl_weight)


def per_position(name: str, value: float | Tensor, num_positions: int, like: Tensor) -> Tensor:
    """A float or a `[num_positions]` tensor as the latter, in `like`'s dtype and device.

    Raises:
        ValueError: a tensor of another shape, or on another device.
    """
    if not isinstance(value, Tensor):
        return torch.full((num_positions,), float(value), dtype=like.dtype, device=like.device)
    value = value.detach()
    if value.ndim == 0:
        return value.to(like).expand(num_positions)
    checks.shape(name, value, (num_positions,), "one per position")
    checks.same_device(like.device, **{name: value})
    return value.to(like.dtype)
