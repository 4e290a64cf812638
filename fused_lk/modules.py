"""The loss as a module that stores its options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .losses import lk_loss
from .metrics import LKOutput
from .options import LossOptions
from .target import Target


class LKLoss(nn.Module):
    """`lk_loss` with the options given once, checked here; it holds no parameters.

    Args:
        objective, eta, kl_scale, lambda_per, kl_weight, position_decay, reduction, denominator, draft_temperature,
        impl, plan, workspace_mb, logits_dtype, skip_masked: as in `fused_lk.lk_loss`.
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
        unknown = set(call_options) - _CALL_OPTIONS
        if unknown:
            raise TypeError(f"expected options of lk_loss; got {sorted(unknown)}. Known: {sorted(_CALL_OPTIONS)}.")
        self.call_options = call_options

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


_CALL_OPTIONS = {"draft_temperature", "impl", "plan", "workspace_mb", "logits_dtype", "skip_masked"}
