"""The loss as a module that stores its options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from . import checks
from .call import CHECKS
from .losses import lk_loss
from .metrics import LKOutput
from .options import LossOptions
from .target import Target


class LKLoss(nn.Module):
    """`lk_loss` with the options given once, checked here; it holds no parameters.

    Args:
        objective, eta, kl_scale, lambda_per, kl_weight, position_decay, reduction, denominator, draft_temperature,
        impl, plan, workspace_mb, logits_dtype, skip_masked: as in `fused_lk.lk_loss`.

    Raises:
        TypeError, ValueError: an unknown option or one out of range; what depends on the batch is checked in the call.
    """

    def __init__(
        self,
        objective: str = "lambda",
        *,
        eta: float = 3.0,
        kl_scale: float = 1.0,
        lambda_per: str = "position",
        kl_weight: float | Tensor | None = None,
        position_decay: float = 1.0,
        reduction: str = "mean",
        denominator: float | Tensor | None = None,
        **call_options: Any,
    ) -> None:
        super().__init__()
        self.options = LossOptions(
            objective, eta, kl_scale, lambda_per, kl_weight, position_decay, reduction, denominator
        )
        unknown = sorted(set(call_options) - set(CHECKS))
        if unknown:
            known = f"Known beside those of LKLoss itself: {', '.join(sorted(CHECKS))}; give inputs to the call."
            checks.fail("options of lk_loss", ", ".join(unknown), known, TypeError)
        for name, value in call_options.items():
            CHECKS[name](value)
        self.call_options = {name: checks.scalar(value) for name, value in call_options.items()}

    def forward(
        self, draft_hidden: Tensor | Sequence[Tensor], draft_lm_head_weight: Tensor, target: Target, **inputs: Any
    ) -> LKOutput:
        """`lk_loss(draft_hidden, draft_lm_head_weight, target, **inputs)` with the stored options.

        `inputs` are what changes from batch to batch: mask, target_rows, positions, num_positions, pairs, bias; an
        option given here overrides the stored one.
        """
        options = {**vars(self.options), **self.call_options, **inputs}
        return lk_loss(draft_hidden, draft_lm_head_weight, target, **options)

    def extra_repr(self) -> str:
        given = {**vars(self.options), **self.call_options}
        return ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
