"""What the losses return: divergences per token; the loss, its sums per draft position, and the metrics to log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import checks, ranks
from .pairs.layout import ratio
from .pairs.pairs import Pairs
from .reference import expected_acceptance_length, prefix_products

Sums = TypeVar("Sums", bound="LKSums")


def brief(record: Any) -> str:
    """A record in one line: tensors of at most 16 numbers as they are, larger ones by their shape.

    Only the numbers that are shown are read from the device.
    """

    def shown(x: Any) -> str:
        if isinstance(x, Mapping):
            return "{" + ", ".join(f"{name}: {shown(value)}" for name, value in x.items()) + "}"
        if isinstance(x, Tensor):
            return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" if x.numel() > 16 else repr(x.detach())
        return repr(x)

    fields_shown = ", ".join(f"{name}={shown(x)}" for name, x in vars(record).items())
    return " ".join(f"{type(record).__name__}({fields_shown})".split())


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
        terms: the further divergences that were asked for, by name, differentiable. They are 0 on ignored rows, and
            where the target has no mass on the draft vocabulary.
        draft_top1, target_top1, target_token_ids: with `top1=True`, detached; else None. The largest q and p on the
            draft vocabulary, and the target's argmax (-1: not known); 0 on ignored rows.
    """

    log_acceptance: Tensor
    kl: Tensor
    acceptance: Tensor
    draft_token_ids: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    draft_top1: Tensor | None = None
    target_top1: Tensor | None = None
    target_token_ids: Tensor | None = None

    __repr__ = brief

    def __getitem__(self, index: Any) -> Divergences:
        """The divergences of some tokens. Where the draft was a list of TTT steps, `d[k]` has those of step k."""
        # By name, because torch.compile of torch 2.11 does not look into the __dict__ of a frozen dataclass.
        q, p, target = (
            None if x is None else x[index] for x in (self.draft_top1, self.target_top1, self.target_token_ids)
        )
        own = (self.log_acceptance[index], self.kl[index], self.acceptance[index], self.draft_token_ids[index])
        return Divergences(*own, {name: x[index] for name, x in self.terms.items()}, q, p, target)


@dataclass(frozen=True, repr=False)
class LKSums:
    """Sums and counts of one batch. They add up over micro-batches and ranks, where means of means would be biased.

    Everything is detached. Sums run over the supervised tokens of a draft position k, and are weighted by the mask.

    A block is a chain of draft rows, one for each position: what one anchor gives. `Pairs.ttt`, `Pairs.blocks`, a list
    of K hidden states, and pairs with `position_dim` have blocks. With one position every token is a block. For other
    pairs the sums of blocks are NaN. Ignored rows are left out of a block's products. Each block that has a supervised
    token counts 1, whatever the weights of its tokens.

    Attributes:
        acceptance_sum: `[K]`, the sum of alpha.
        accuracy_sum: `[K]`, the sum over tokens whose draft argmax is the target's argmax; NaN where that is not known.
        kl_sum: `[K]`, the sum of KL(pt || q) in nats.
        loss_sum: `[K]`, the sum of the tokens' losses, without decay and denominator.
        kl_weight_sum: `[K]`, the sum of the weight of KL (lambda; 1 for objective "kl", 0 for "tv" and "alpha").
        weight_sum: `[K]`, the sum of the weights: the denominator of those above, and of `term_sums`.
        term_sums: `[K]` each, the sums of the further divergences that were computed, by name.
        num_tokens: int64 `[K]`, the supervised tokens.
        num_unsupported: int64 scalar, the supervised tokens whose target has no mass on the draft vocabulary.
        prefix_acceptance_sum: `[K]`, the sum over blocks of prod_{j <= k} alpha_j: how likely a step accepts token k.
        prefix_accuracy_sum: `[K]`, the sum over blocks whose tokens up to k are all the target's argmax.
        num_blocks: int64 scalar, the blocks: the denominator of these two.
        position_decay: as given to the loss.
    """

    acceptance_sum: Tensor
    accuracy_sum: Tensor
    kl_sum: Tensor
    loss_sum: Tensor
    kl_weight_sum: Tensor
    weight_sum: Tensor
    num_tokens: Tensor
    num_unsupported: Tensor
    prefix_acceptance_sum: Tensor
    prefix_accuracy_sum: Tensor
    num_blocks: Tensor
    term_sums: Mapping[str, Tensor]
    position_decay: float

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

    @property
    def kl_weight(self) -> Tensor:
        """`[K]`, the mean lambda of each position."""
        return ratio(self.kl_weight_sum, self.weight_sum)

    @property
    def position_loss(self) -> Tensor:
        """`[K]`, the mean loss of each position."""
        return ratio(self.loss_sum, self.weight_sum)

    @property
    def mean_loss(self) -> Tensor:
        """The sum of the positions' mean losses, with their decay: reduction "mean" without `denominator`."""
        k = torch.arange(len(self.loss_sum), dtype=self.loss_sum.dtype, device=self.loss_sum.device)
        return (self.position_decay**k * self.position_loss).sum()

    @property
    def acceptance_length(self) -> Tensor:
        """`1 + sum_k prod_{j <= k} alpha_j`, the mean over blocks, in tokens per step of the target."""
        return 1 + self.prefix_acceptance_sum.sum() / self.num_blocks.clamp(min=1)

    @property
    def greedy_acceptance_length(self) -> Tensor:
        """1 + the leading tokens of a block that are the target's argmax, the mean over blocks, in tokens per step."""
        return 1 + self.prefix_accuracy_sum.sum() / self.num_blocks.clamp(min=1)

    @staticmethod
    def merged(parts: Iterable[LKSums]) -> LKSums:
        """The sums of several micro-batches, added up.

        Args:
            parts: outputs of losses, or results of this function, with the same positions and decay.

        Raises:
            ValueError: there are none, or they differ in the number of positions, in `position_decay`, or in the names
                of `term_sums`.
        """
        parts = list(parts)
        kinds = {(len(part.weight_sum), part.position_decay, tuple(part.term_sums)) for part in parts}
        if len(kinds) != 1:
            got = ", ".join(f"{k} with position_decay={decay:g} {names}" for k, decay, names in sorted(kinds)) or "none"
            remedy = "Merge what one loss gives, with one work list's shape."
            checks.fail("outputs with the same number of positions, the same decay and divergences", got, remedy)
        sums: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in _SUMS}
        terms: dict[str, Any] = {name: sum(part.term_sums[name] for part in parts) for name in parts[0].term_sums}
        return LKSums(**sums, term_sums=terms, position_decay=parts[0].position_decay)

    def all_reduced(self: Sums, group: Any) -> Sums:
        """The same record with the sums of all ranks of `group`: one all-reduce of K-sized tensors.

        Every rank of the group has to call it. (A loss with `group=` has done so already: its sums are those of all
        ranks, and would be counted again.)

        Args:
            group: a `torch.distributed.ProcessGroup`.

        Raises:
            TypeError: `group` is something else.
        """
        ranks.check(group)
        own = [*(getattr(self, name) for name in _SUMS), *self.term_sums.values()]
        reduced = iter(ranks.summed(group, *own))
        sums: dict[str, Any] = {name: next(reduced) for name in _SUMS}
        return replace(self, **sums, term_sums={name: next(reduced) for name in self.term_sums})

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Floats to log, by the names that trainers use. This costs one host synchronisation.

        Each position k has `acceptance_rate_k`, `accuracy_k`, `kl_k`, `kl_weight_k`, `loss_k` and `num_tokens_k`, and
        the mean of each further divergence by its name, as `l1_k`. `loss` is `mean_loss`, whatever reduction and
        denominator. `num_unsupported` and `num_blocks` are counts.

        Three lengths are in tokens per step. `acceptance_length` and `greedy_acceptance_length` are means over blocks,
        and NaN where the pairs have none. `expected_acceptance_length` is made of the mean acceptance rates of the
        positions that have a supervised token. It is biased where tokens of one block correlate.
        """
        per_position = {
            "acceptance_rate": self.acceptance_rate,
            "accuracy": self.accuracy,
            "kl": self.kl,
            "kl_weight": self.kl_weight,
            "loss": self.position_loss,
            "num_tokens": self.num_tokens,
            **{name: ratio(x, self.weight_sum) for name, x in self.term_sums.items()},
        }
        scalars = {
            "loss": self.mean_loss,
            "acceptance_length": self.acceptance_length,
            "greedy_acceptance_length": self.greedy_acceptance_length,
            "expected_acceptance_length": expected_acceptance_length(self.acceptance_rate, self.num_tokens),
            "num_blocks": self.num_blocks,
            "num_unsupported": self.num_unsupported,
        }
        values = torch.cat([x.double().reshape(-1) for x in (*scalars.values(), *per_position.values())]).tolist()
        names = [*scalars, *(f"{name}_{k}" for name in per_position for k in range(len(self.weight_sum)))]
        return {prefix + name: value for name, value in zip(names, values, strict=True)}


_SUMS = tuple(x.name for x in fields(LKSums) if x.name not in ("term_sums", "position_decay"))


@dataclass(frozen=True, repr=False)
class LKOutput(LKSums):
    """The loss, and what was measured on the way to it: the sums of `LKSums`, and numbers per token.

    Everything but `loss` is detached. With `group=` the sums are those of all ranks; the loss and the tokens are this
    rank's.

    Attributes:
        loss: a scalar, `[K]` for reduction="position", or the draft's shape for "none".
        token_log_acceptance, token_acceptance, draft_token_ids: per token, as in `Divergences`: log alpha, alpha, and
            the draft's argmax. All three are 0 on ignored rows.
    """

    loss: Tensor
    token_log_acceptance: Tensor
    token_acceptance: Tensor
    draft_token_ids: Tensor


def block_sums(acceptance: Tensor, correct: Tensor, kept: Tensor, pairs: Pairs) -> dict[str, Tensor]:
    """The sums of blocks in `LKSums`, from numbers per draft row in the draft's shape; `kept` marks supervised rows."""
    dim = pairs.position_dim
    if dim is None and pairs.num_positions > 1:  # nobody said which rows are one chain
        unknown = acceptance.new_full((pairs.num_positions,), float("nan"))
        num_blocks = torch.zeros((), dtype=torch.long, device=kept.device)
        return {"prefix_acceptance_sum": unknown, "prefix_accuracy_sum": unknown, "num_blocks": num_blocks}
    alpha, right, counts = (
        x.reshape(1, -1) if dim is None else x.movedim(dim, 0).flatten(1) for x in (acceptance, correct, kept)
    )
    of_alpha, of_right = prefix_products(torch.stack([alpha, right], -1), counts).sum(1).unbind(1)
    return {"prefix_acceptance_sum": of_alpha, "prefix_accuracy_sum": of_right, "num_blocks": counts.any(0).sum()}
