"""What the loss reports: sums per draft position, the rates made of them, and what trainers log."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import expected_acceptance_length


@dataclass(frozen=True)
class Divergences:
    """The primitive, per token, in the draft's shape without its last dimension.

    Attributes:
        log_acceptance: log alpha, fp32 (fp64 for fp64 inputs), differentiable; 0 on ignored rows, -inf where the
            target has no mass on the draft vocabulary, and where the draft excludes all that the target may say.
        kl: KL(pt || q) in nats, likewise; 0, 0 and inf there.
        acceptance: alpha in [0, 1], differentiable; 0 on all three.
        draft_token_ids: int64, the draft's argmax as target ids; 0 on ignored rows.
    """

    log_acceptance: Tensor
    kl: Tensor
    acceptance: Tensor
    draft_token_ids: Tensor


@dataclass(frozen=True)
class LKOutput:
    """The loss, and what happened on the way to it; everything but `loss` is detached.

    Sums are over the supervised tokens of a draft position, weighted by the mask. They are what to add up across
    micro-batches and ranks; a mean of means is biased.

    Attributes:
        loss: scalar, `[K]` for reduction="position", or the draft's shape for "none".
        acceptance_sum, accuracy_sum, kl_sum: `[K]`, of alpha, of "the draft's argmax is the target's", of KL in nats.
            `accuracy_sum` is NaN where the target's argmax is not known.
        weight_sum: `[K]`, sum of weights: the denominator of the three.
        kl_weight: `[K]`, weighted mean of lambda (1 for objective "kl", 0 for "tv" and "alpha").
        num_tokens: int64 `[K]`, supervised tokens.
        num_unsupported: int64 scalar, those of them whose target has no mass on the draft vocabulary.
        token_log_acceptance, draft_token_ids: per token, as in `Divergences`.
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
    draft_token_ids: Tensor
    loss_is_per_position: bool = False

    @property
    def acceptance_rate(self) -> Tensor:
        """`[K]`, mean alpha of each position; 0 where nothing is supervised."""
        return ratio(self.acceptance_sum, self.weight_sum)

    @property
    def accuracy(self) -> Tensor:
        """`[K]`, share of tokens whose draft argmax is the target's; 0 where nothing is supervised."""
        return ratio(self.accuracy_sum, self.weight_sum)

    @property
    def kl(self) -> Tensor:
        """`[K]`, mean KL(pt || q) of each position, in nats."""
        return ratio(self.kl_sum, self.weight_sum)

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Floats to log, by the names trainers use; one host synchronisation.

        `acceptance_rate_k`, `accuracy_k`, `kl_k`, `kl_weight_k`, `num_tokens_k` for each position k, `loss` (`loss_k`
        for reduction="position"; absent for "none"), `expected_acceptance_length` (tokens per step, of the mean
        acceptance rates; biased where tokens of one sequence correlate) and `num_unsupported`.
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


def position_sums(x: Tensor, positions: Tensor | None, num_positions: int) -> Tensor:
    """`[K]`, sums of `x` `[P]` by position. Masked sums, not scattered adds: those are not deterministic on a GPU."""
    if positions is None or num_positions == 1:
        total = x.sum().reshape(1)
        return total if num_positions == 1 else torch.cat([total, total.new_zeros(num_positions - 1)])
    of = torch.arange(num_positions, device=x.device).unsqueeze(1)
    return torch.where(positions == of, x, 0).sum(1)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """`numerator / denominator`, 0 where the denominator is 0."""
    safe = torch.where(denominator > 0, denominator, 1)
    return torch.where(denominator > 0, numerator / safe, 0)
