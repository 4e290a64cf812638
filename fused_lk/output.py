"""What the losses return: divergences per token; the loss, its sums per draft position, and the metrics to log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .pairs.layout import ratio
from .reference import expected_acceptance_length


def brief(record: Any) -> str:
    """A record in one line: tensors of at most 16 numbers as they are, larger ones by their shape.

    Only the numbers that are shown are read from the device.
    """
    shown = (
        f"{name}={tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
        if isinstance(x, Tensor) and x.numel() > 16
        else f"{name}={x.detach() if isinstance(x, Tensor) else x!r}"
        for name, x in vars(record).items()
    )
    return " ".join(f"{type(record).__name__}({', '.join(shown)})".split())


@dataclass(frozen=True, repr=False)
class Divergences:
    """The primitive of each token, in the draft's shape without its last dimension.

    The first three are fp32 (fp64 for fp64 inputs) and differentiable. Three kinds of rows have fixed values:

        rows                                                 log_acceptance    kl     acceptance
        ignored                                              0                 0      0
        the target has no mass on the draft vocabulary       -inf              0      0
        the draft excludes all that the target may say       -inf              inf    0

    Attributes:
        log_acceptance: log alpha.
        kl: KL(pt || q) in nats.
        acceptance: alpha, in [0, 1].
        draft_token_ids: int64, the draft's argmax as target ids; 0 on ignored rows.
    """

    log_acceptance: Tensor
    kl: Tensor
    acceptance: Tensor
    draft_token_ids: Tensor

    __repr__ = brief

    def __getitem__(self, index: Any) -> Divergences:
        """The divergences of some tokens. Where the draft was a list of TTT steps, `d[k]` has those of step k."""
        return Divergences(*(x[index] for x in vars(self).values()))


@dataclass(frozen=True, repr=False)
class LKOutput:
    """The loss, and what was measured on the way to it. Everything but `loss` is detached.

    Sums run over the supervised tokens of a draft position, and are weighted by the mask. Add up these sums, not the
    rates, across micro-batches and ranks: a mean of means is biased.

    Attributes:
        loss: a scalar, `[K]` for reduction="position", or the draft's shape for "none".
        acceptance_sum: `[K]`, the sum of alpha.
        accuracy_sum: `[K]`, the sum over tokens whose draft argmax is the target's argmax; NaN where that is not known.
        kl_sum: `[K]`, the sum of KL(pt || q) in nats.
        weight_sum: `[K]`, the sum of the weights: the denominator of the three.
        kl_weight: `[K]`, the weighted mean of lambda (1 for objective "kl", 0 for "tv" and "alpha").
        num_tokens: int64 `[K]`, the supervised tokens.
        num_unsupported: int64 scalar, the supervised tokens whose target has no mass on the draft vocabulary.
        token_log_acceptance, token_acceptance, draft_token_ids: per token, as in `Divergences`: log alpha, alpha, and
            the draft's argmax. All three are 0 on ignored rows.
    """

    loss: Tensor
    acceptance_sum: Tensor
    accuracy_sum: Tensor
    kl_sum: Tensor
    weight_sum: Tensor
    kl_weight: Tensor
    num_tokens: Tensor
    num_unsupported: Tensor
    token_log_acceptance: Tensor
    token_acceptance: Tensor
    draft_token_ids: Tensor
    loss_is_per_position: bool = False

    __repr__ = brief

    @property
    def acceptance_rate(self) -> Tensor:
        """`[K]`, the mean alpha of each position; 0 where nothing is supervised."""
        return ratio(self.acceptance_sum, self.weight_sum)

    @property
    def accuracy(self) -> Tensor:
        """`[K]`, the share of tokens whose draft argmax is the target's; 0 where nothing is supervised."""
        return ratio(self.accuracy_sum, self.weight_sum)

    @property
    def kl(self) -> Tensor:
        """`[K]`, the mean KL(pt || q) of each position, in nats."""
        return ratio(self.kl_sum, self.weight_sum)

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Floats to log, by the names that trainers use. This costs one host synchronisation.

        Each position k has `acceptance_rate_k`, `accuracy_k`, `kl_k`, `kl_weight_k` and `num_tokens_k`. `loss` is there
        unless reduction="none"; reduction="position" has `loss_k`. `num_unsupported` is a count.
        `expected_acceptance_length`, in tokens per step, is made of the mean acceptance rates. It is biased where
        tokens of one sequence correlate.
        """
        per_position = {
            "acceptance_rate": self.acceptance_rate,
            "accuracy": self.accuracy,
            "kl": self.kl,
            "kl_weight": self.kl_weight,
            "num_tokens": self.num_tokens,
        }
        scalars = {
            "expected_acceptance_length": expected_acceptance_length(self.acceptance_rate),
            "num_unsupported": self.num_unsupported,
        }
        num_positions = self.weight_sum.shape[0]
        if self.loss.ndim == 0:
            scalars["loss"] = self.loss.detach()
        elif self.loss_is_per_position:
            per_position["loss"] = self.loss.detach()
        values = torch.cat([x.double().reshape(-1) for x in (*scalars.values(), *per_position.values())]).tolist()
        names = [*scalars, *(f"{name}_{k}" for name in per_position for k in range(num_positions))]
        return {prefix + name: value for name, value in zip(names, values, strict=True)}
