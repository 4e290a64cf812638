"""The loss as a module that stores its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .impls import IMPLS
from .losses import lk_loss
from .output import Divergences, LKOutput
from .reduction import LossOptions
from .targets.target import Target
from .walk.plan import PLANS
from .walk.problem import all_terms


class LKLoss(nn.Module):
    """`lk_loss` with options that are given, and checked, once. The module holds no parameters.

    Args:
        objective, eta, kl_scale, lambda_per, kl_weight, position_decay, reduction, denominator, group, logit_scale,
        softcap, draft_temperature, impl, plan, workspace_mb, keep_mb, logits_dtype, terms, jsd_beta: as in
        `fused_lk.lk_loss`.

    Raises:
        TypeError, ValueError: an option is unknown or out of range. The call checks what depends on the batch.
    """

    def __init__(
        self,
        objective: str | Mapping[str, float] | Callable[[Divergences], Tensor] = "lambda",
        *,
        eta: float = 3.0,
        kl_scale: float = 1.0,
        lambda_per: str = "position",
        kl_weight: float | Tensor | None = None,
        position_decay: float = 1.0,
        reduction: str = "mean",
        denominator: float | Tensor | None = None,
        group: Any = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        draft_temperature: float = 1.0,
        impl: str = "auto",
        plan: str = "auto",
        workspace_mb: float | str = "auto",
        keep_mb: float | str = 0,
        logits_dtype: str | torch.dtype = "compute",
        terms: Sequence[str] = (),
        jsd_beta: float = 0.5,
    ) -> None:
        super().__init__()
        of_loss = LossOptions(
            objective, eta, kl_scale, lambda_per, kl_weight, position_decay, reduction, denominator, group
        )
        checks.choice("impl", impl, IMPLS)
        checks.choice("plan", plan, PLANS)
        checks.workspace_bytes(workspace_mb)
        checks.keep_bytes(keep_mb)
        checks.wide_logits(logits_dtype)
        checks.softmax("draft_temperature", draft_temperature, logit_scale, softcap)
        self.options: dict[str, Any] = {  # a dict, because not every torch.compile can trace an object's __dict__
            **vars(of_loss),
            "logit_scale": checks.scalar(logit_scale),
            "softcap": checks.scalar(softcap),
            "draft_temperature": checks.scalar(draft_temperature),
            "impl": impl,
            "plan": plan,
            "workspace_mb": checks.scalar(workspace_mb),
            "keep_mb": checks.scalar(keep_mb),
            "logits_dtype": logits_dtype,
            "terms": all_terms(terms),
            "jsd_beta": checks.share("jsd_beta", jsd_beta),
        }

    def forward(
        self, draft_hidden: Tensor | Sequence[Tensor], draft_lm_head_weight: Tensor, target: Target, **inputs: Any
    ) -> LKOutput:
        """`lk_loss(draft_hidden, draft_lm_head_weight, target, **inputs)` with the stored options.

        The `inputs` change from batch to batch: mask, pairs, bias, labels. An option among them replaces the stored
        one.
        """
        return lk_loss(draft_hidden, draft_lm_head_weight, target, **{**self.options, **inputs})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items() if value is not None)
