"""What a sampler sees of draft and target: acceptance under top-k and top-p, entropies, agreement. No gradients.

It walks the chunks of the losses. A chunk's logits lie in tiles of their own, where what the samplers cut off becomes
-inf: once for each target row, however many draft rows meet it. Over a truncated draft vocabulary the target's tile has
its full rows, because its sampler cuts those.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import checks, gemm, ranks
from .objective import weighted
from .output import block_sums, brief
from .pairs.layout import position_sums, ratio
from .pairs.pairs import Pairs
from .reference import head_logits
from .rows.interface import NEG_INF, Transform
from .rows.terms import finite
from .targets.target import Target
from .targets.tiles import Tiles
from .walk import by_rows, problem
from .walk.draft import draft_of
from .walk.plan import Facts, Plan, tile_dtypes
from .walk.problem import Problem

MEASURES = ("acceptance_rate", "accuracy", "draft_entropy", "draft_top1", "target_entropy", "target_top1")
MOST_AGREEMENT = 8
_BUFFERS = 8  # what a block of rows holds at its widest, the sort for top-p: numbers per logit


@dataclass(frozen=True)
class Sampling:
    """What a sampler cuts off, after the temperature: first all but the `top_k` likeliest tokens, then the rest of them
    beyond the mass `top_p`. What is left is renormalised.

    Args:
        top_k: >= 1; None: no limit. `Sampling(top_k=1)` is greedy decoding.
        top_p: in (0, 1]; None or 1: no limit. A token stays if the likelier ones have less than this mass together, of
            what `top_k` left. So the likeliest token always stays.

    Order and limits are those of vLLM (`v1/sample/ops/topk_topp_sampler.py`, in PyTorch) and of Hugging Face
    transformers (`TopKLogitsWarper`, `TopPLogitsWarper`). Tokens that tie with the last of `top_k` all stay, as there.
    Of tokens that tie at the limit of `top_p` as many stay as there. Which of them is up to an unstable sort there, and
    here it is those of the lowest ids.

    Raises:
        TypeError, ValueError: a number out of range. (vLLM and transformers turn `top_k` off by -1 or 0: here, None.)
    """

    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None:
            object.__setattr__(self, "top_k", checks.integer("top_k", self.top_k, remedy="Use None for no limit."))
        if self.top_p is not None:
            top_p = checks.number("top_p", self.top_p, above=0, remedy="Use None for no limit.")
            if top_p > 1:
                checks.fail("top_p in (0, 1]", top_p, "It is a share of the mass; use None for no limit.")
            object.__setattr__(self, "top_p", None if top_p == 1 else top_p)

    @property
    def cuts(self) -> bool:
        """Whether it can cut anything off."""
        return self.top_k is not None or self.top_p is not None


EVERYTHING = Sampling()


@dataclass(frozen=True, repr=False)
class LKEvaluation:
    """What was measured: numbers per token, and their sums, which add up over micro-batches and ranks.

        name                              of a token
        acceptance_rate                   alpha = sum_v min(p_v, q_v), of what the samplers draw from
        accuracy                          1 where draft and target have the same argmax
        draft_entropy, target_entropy     -sum_v q_v log q_v in nats, and that of p, of what the samplers draw from
        draft_top1, target_top1           the largest probability of each, likewise
        agreement_k                       the share of the target's k likeliest tokens that are among the draft's
        hit_k                             1 where the target's argmax is among the draft's k likeliest tokens

    The last two are there for k = 2 .. `agreement_k` (for k = 1 both are `accuracy`). The ranks of tokens are those
    before the samplers cut, and of equal logits the lowest id comes first.

    Attributes:
        tokens: by name, each in the draft's shape, and 0 on ignored rows. There are also `draft_token_ids` and
            `target_token_ids`, the argmaxes as target ids. A merged record has none of these.
        sums: by name, `[K]`, the sums over the supervised tokens of a draft position, weighted by the mask. There are
            also `weight` and `num_tokens` `[K]`, and those of `LKSums` over blocks, `prefix_acceptance` and
            `prefix_accuracy` `[K]` and `num_blocks`.
    """

    tokens: Mapping[str, Tensor]
    sums: Mapping[str, Tensor]

    __repr__ = brief

    @property
    def token_acceptance(self) -> Tensor:
        """alpha of each token, 0 on ignored rows, in the draft's shape."""
        return self.tokens["acceptance_rate"]

    @property
    def means(self) -> dict[str, Tensor]:
        """By name, `[K]`, the mean over each position's supervised tokens; 0 where there are none."""
        return {name: ratio(x, self.sums["weight"]) for name, x in self.sums.items() if name not in _NO_MEANS}

    @property
    def acceptance_length(self) -> Tensor:
        """`1 + sum_k prod_{j <= k} alpha_j`, the mean over blocks, in tokens per step of the target."""
        return 1 + self.sums["prefix_acceptance"].sum() / self.sums["num_blocks"].clamp(min=1)

    @property
    def greedy_acceptance_length(self) -> Tensor:
        """1 + the leading tokens of a block that are the target's argmax, the mean over blocks, in tokens per step."""
        return 1 + self.sums["prefix_accuracy"].sum() / self.sums["num_blocks"].clamp(min=1)

    @staticmethod
    def merged(parts: Iterable[LKEvaluation]) -> LKEvaluation:
        """The sums of several micro-batches, added up; see `LKSums.merged`.

        Args:
            parts: evaluations with the same positions and `agreement_k`.

        Raises:
            ValueError: there are none, or they differ in these.
        """
        parts = list(parts)
        kinds = {(len(part.sums["weight"]), len(part.sums)) for part in parts}
        if len(kinds) != 1:
            got = ", ".join(f"{k} position(s) with {n} sums" for k, n in sorted(kinds)) or "none"
            remedy = "Merge what one evaluation gives, with one work list's shape."
            checks.fail("evaluations with the same number of positions and agreement_k", got, remedy)
        sums: dict[str, Any] = {name: sum(part.sums[name] for part in parts) for name in parts[0].sums}
        return LKEvaluation({}, sums)

    def all_reduced(self, group: Any) -> LKEvaluation:
        """The same record with the sums of all ranks of `group`; see `LKSums.all_reduced`. Every rank has to call it.

        Args:
            group: a `torch.distributed.ProcessGroup`.
        """
        ranks.check(group)
        sums = zip(self.sums, ranks.summed(group, *self.sums.values()), strict=True)
        return replace(self, sums=dict(sums))

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Floats to log: each mean of position k as `acceptance_rate_k` and so on, `num_tokens_k`, `num_blocks`, and
        the two lengths. This costs one host synchronisation."""
        lengths = {name: getattr(self, name) for name in ("acceptance_length", "greedy_acceptance_length")}
        values = {**lengths, **{name: self.sums[name] for name in ("num_blocks", "num_tokens")}, **self.means}
        flat = iter(torch.cat([x.double().reshape(-1) for x in values.values()]).tolist())
        names = (name if x.ndim == 0 else f"{name}_{k}" for name, x in values.items() for k in range(x.numel()))
        return {prefix + name: next(flat) for name in names}


_NO_MEANS = ("weight", "num_tokens", "prefix_acceptance", "prefix_accuracy", "num_blocks")


@torch.no_grad()
def lk_evaluate(
    draft_hidden: Tensor | Sequence[Tensor],
    draft_lm_head_weight: Tensor,
    target: Target,
    *,
    draft_sampling: Sampling = EVERYTHING,
    target_sampling: Sampling = EVERYTHING,
    agreement_k: int = 1,
    mask: Tensor | None = None,
    pairs: Pairs | None = None,
    group: Any = None,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor | Sequence[Tensor], Tensor] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    draft_temperature: float = 1.0,
    workspace_mb: float | str = "auto",
    logits_dtype: str | torch.dtype = "compute",
) -> LKEvaluation:
    """What a sampler will see of each token: acceptance, entropies, top-1 probabilities, agreement. No gradients.

        q = the draft's softmax, as `draft_sampling` leaves it    p = the target's, as `target_sampling` leaves it
        acceptance_rate = sum_v min(p_v, q_v), over the draft vocabulary

    This is how often speculative sampling accepts the draft's token (arXiv 2211.17192, 2302.01318). The target's
    sampler cuts its full vocabulary. Each temperature is where it is for the losses: in the target, and in
    `draft_temperature`. Without `Sampling`, acceptance and accuracy are those of `lk_loss`. `LKEvaluation` lists what
    is measured.

    A loss is not cut like this: KL is infinite where q is 0 and p is not, and no gradient calls back a token that the
    draft's sampler cuts off. To train towards the k best tokens of the target, use
    `Target.from_topk(..., renormalize=True)`.

    Full logits never exist. Over a truncated draft vocabulary, a target from hidden states makes its full logits again,
    a workspace at a time. Plain PyTorch does this. Under `torch.compile` it would be traced chunk by chunk: call it
    outside of what is compiled.

    Args (those not listed are as in `lk_loss`):
        target: some know only a part of their vocabulary. `Target.from_topk` lists k tokens: `target_sampling` needs a
            `top_k` of at most k, if it cuts at all. `Target.from_probs` with a `DraftVocab` has nothing outside it, so
            that `target_sampling` cannot be answered. (Without one they count as the whole vocabulary.) Without
            `Sampling` the entropies and top-1 of both are those of what is listed, which may sum to less than 1. With
            `renormalize=True`, p is the target on the draft vocabulary, and no other token exists.
        draft_sampling, target_sampling: what each sampler cuts off.
        agreement_k: measures agreement of the k likeliest tokens for each k up to this one, from 1 to 8. Of a target
            that lists tokens, it may ask for no more than are listed.
        mask, pairs: what counts, with what weight and position.
        group: the sums are then those of all its ranks. Every rank makes the call.
        workspace_mb: bounds the logits, and as much again for what is computed from them.

    Raises:
        TypeError, ValueError: the input does not fit; the target does not know what is asked for.
    """
    how = (mask, pairs, draft_temperature, "torch", workspace_mb, (), None, 0.5, logit_scale, softcap)
    asked = problem.linear(draft_hidden, draft_lm_head_weight, bias, target, logits_dtype, *how, second=low_rank)
    return _evaluation(asked, draft_sampling, target_sampling, agreement_k, group)


@torch.no_grad()
def lk_evaluate_from_logits(
    draft_logits: Tensor | Sequence[Tensor],
    target: Target,
    *,
    draft_sampling: Sampling = EVERYTHING,
    target_sampling: Sampling = EVERYTHING,
    agreement_k: int = 1,
    mask: Tensor | None = None,
    pairs: Pairs | None = None,
    group: Any = None,
    draft_temperature: float = 1.0,
    workspace_mb: float | str = "auto",
) -> LKEvaluation:
    """`lk_evaluate` of logits `[..., V_draft]` that the caller holds; see `lk_divergences_from_logits`."""
    asked = problem.from_logits(draft_logits, target, mask, pairs, draft_temperature, "torch", workspace_mb)
    return _evaluation(asked, draft_sampling, target_sampling, agreement_k, group)


def _evaluation(asked: Problem, of_draft: Sampling, of_target: Sampling, agreement_k: int, group: Any) -> LKEvaluation:
    for name, sampling in (("draft_sampling", of_draft), ("target_sampling", of_target)):
        if not isinstance(sampling, Sampling):
            checks.fail(f"{name} to be a Sampling", sampling, "Build fused_lk.Sampling(top_k=, top_p=).", TypeError)
    agreement_k = checks.integer("agreement_k", agreement_k)
    if agreement_k > MOST_AGREEMENT:
        checks.fail(f"agreement_k <= {MOST_AGREEMENT}", agreement_k, "Choose a smaller one.")
    _check_known(asked.target, of_target, agreement_k)
    if group is not None:
        ranks.check(group)
    with torch.autocast(asked.device.type, enabled=False):
        made = _Walk(asked, of_draft, of_target, agreement_k).evaluation()
    return made if group is None else made.all_reduced(group)


def _check_known(target: Target, sampling: Sampling, agreement_k: int) -> None:
    """The target knows enough of its vocabulary for what is asked."""
    known = target.num_ranked
    if known is None:
        return
    remedy = "Use Target.from_hidden or from_logits; Target.from_topk answers a top_k of at most its k."
    if sampling.cuts and (sampling.top_k is None or sampling.top_k > known):
        expected = f"target_sampling with a top_k of at most {known}, the best tokens that the target lists"
        if known == 0:
            expected = "no target_sampling with probabilities on a draft vocabulary, which lack all other tokens"
        checks.fail(expected, sampling, remedy)
    if agreement_k > max(known, 1):
        expected = f"agreement_k of at most {max(known, 1)}, as many best tokens as the target lists"
        checks.fail(expected, agreement_k, remedy)


class _Walk:
    """One evaluation: the chunks of a problem, whose target logits may be wider than the draft's."""

    def __init__(self, asked: Problem, of_draft: Sampling, of_target: Sampling, best: int) -> None:
        target, given = asked.target, asked.target.normalizer
        self.asked, self.target, self.sampling, self.best = asked, target, (of_draft, of_target), best
        self.tiles: Tiles = target.tiles if target.full is None else target.full
        # The columns of p that are the draft's, and what p is normalised with where it is no softmax of the tile.
        self.columns = None if target.full is None or target.vocab is None else target.vocab.target_ids
        self.log_normalizer = None if given is None or given.is_mass else given.value.to(asked.accumulator)
        facts, sizes = Facts.of(asked), (target.tiles.vocab_size, self.tiles.vocab_size)
        dtypes = tile_dtypes(facts.dtype, asked.logits_dtype, self.tiles.dtype, (False, False))._replace(g=None)
        self.plan = Plan.of(replace(facts, vocab_size=sizes[1], tiles=dtypes), one_pass=False)
        self.dtype, self.layout, self.sizes = asked.accumulator, self.plan.layout, sizes
        budget = gemm.bound(asked.budget, asked.device)
        self.block_rows = max(1, budget // (sizes[1] * self.dtype.itemsize * _BUFFERS))
        self.names = [*MEASURES, *(f"{name}_{k}" for k in range(2, best + 1) for name in ("agreement", "hit"))]

    def evaluation(self) -> LKEvaluation:
        asked, layout, n = self.asked, self.layout, self.layout.num_pairs
        values = torch.empty(len(self.names), n, dtype=self.dtype, device=asked.device)
        ids = torch.empty(2, n, dtype=torch.long, device=asked.device)
        self.fill(values, ids)
        weights, num_positions = values.new_ones(n), asked.pairs.num_positions
        supervised = torch.ones_like(weights, dtype=torch.bool) if layout.valid is None else layout.valid
        if layout.weights is not None:
            weights = layout.weights.to(weights)

        def sums(x: Tensor) -> Tensor:
            return position_sums(x, layout.positions, num_positions)

        def per_row(x: Tensor) -> Tensor:
            return layout.per_row(x, asked.num_rows).view(asked.shape)

        of_name = dict(zip(self.names, values, strict=True))
        tokens = {name: per_row(x) for name, x in of_name.items()}
        blocks = block_sums(tokens["acceptance_rate"], tokens["accuracy"], per_row(supervised), asked.pairs)
        counts = {"weight": sums(weights), "num_tokens": sums(supervised.long())}
        counts |= {name.removesuffix("_sum"): x for name, x in blocks.items()}
        tokens |= {name: per_row(x) for name, x in zip(("draft_token_ids", "target_token_ids"), ids, strict=True)}
        return LKEvaluation(tokens, {**{name: sums(weighted(weights, x)) for name, x in of_name.items()}, **counts})

    def fill(self, values: Tensor, ids: Tensor) -> None:
        """Write the measures `[names, P]` and the argmaxes `[2, P]` of every pair."""
        asked, plan, layout, target = self.asked, self.plan, self.layout, self.target
        draft, (narrow, wide) = draft_of(asked), (slice(0, size) for size in self.sizes)
        pairs, targets = plan.chunk
        tiles = plan.tiles(pairs, 0, narrow.stop)._replace(t=plan.tiles(0, targets, wide.stop).t)
        known = None if target.known_ids is None else layout.of_target(target.known_ids)
        for chunk in layout.chunks:
            h, at = draft.rows(layout, chunk), slice(chunk.start, chunk.stop)
            z = by_rows.draft_logits(asked, plan, draft, chunk, h, narrow, tiles.z)
            t, index = by_rows.target_logits(self.tiles, layout, chunk, wide, tiles.t)
            log_normalizer = self.log_normalizer
            if log_normalizer is not None:
                unique = layout.unique_targets
                log_normalizer = log_normalizer[chunk.targets if unique is None else unique[chunk.targets]]
            draft_ids, *of_draft = self.cut(z, asked.transform, self.sampling[0], None)
            target_ids, *of_target = self.cut(t, target.transform, self.sampling[1], log_normalizer)
            if self.sampling[1].cuts:
                log_normalizer = None
            alpha = self.acceptance(z, t, index, log_normalizer)
            if index is not None:
                target_ids, *of_target = (x[index] for x in (target_ids, *of_target))
            draft_ids = self.as_target_ids(draft_ids)
            target_ids = target_ids if self.columns is not None else self.as_target_ids(target_ids)
            ids[:, at] = torch.stack([draft_ids[:, 0], target_ids[:, 0] if known is None else known[at]])
            same = (draft_ids.unsqueeze(2) == target_ids.unsqueeze(1)) & (draft_ids >= 0).unsqueeze(2)
            common = [x for k in range(2, self.best + 1) for x in _in_common(same[:, :k, :k])]
            found = [alpha, ids[0, at] == ids[1, at], *of_draft, *of_target, *common]
            values[:, at] = torch.stack([x.to(self.dtype) for x in found])

    def cut(
        self, tile: Tensor, transform: Transform, sampling: Sampling, log_normalizer: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Make -inf of what the sampler cuts off, in the tile.

        The best columns `[n, best]`, as they were before, and entropy and largest probability `[n]`, as they are then.
        """
        ids = torch.empty(tile.shape[0], self.best, dtype=torch.long, device=tile.device)
        entropy, top = torch.empty(2, tile.shape[0], dtype=self.dtype, device=tile.device)
        for rows in self.blocks(tile.shape[0]):
            given = None if log_normalizer is None or sampling.cuts else log_normalizer[rows]
            x, given = _seen(tile[rows], transform, self.dtype, given)
            ids[rows] = _best(x, self.best)
            if sampling.cuts:
                _cut(x, sampling)
                tile[rows].masked_fill_(x == NEG_INF, NEG_INF)
            p = _probs(x, given)
            entropy[rows], top[rows] = torch.special.entr(p).sum(1), p.amax(1)
        return ids, entropy, top

    def acceptance(self, z: Tensor, t: Tensor, index: Tensor | None, log_normalizer: Tensor | None) -> Tensor:
        """`[n]`: sum min(p, q) of each pair."""
        alpha = torch.empty(z.shape[0], dtype=self.dtype, device=z.device)
        for rows in self.blocks(z.shape[0]):
            at = rows if index is None else index[rows]
            q = _seen(z[rows], self.asked.transform, self.dtype)[0].softmax(1)
            given = None if log_normalizer is None else log_normalizer[at]
            p = _probs(*_seen(t[at], self.target.transform, self.dtype, given))
            p = p if self.columns is None else p[:, self.columns]
            alpha[rows] = torch.minimum(p, q).sum(1).clamp(max=1)
        return alpha

    def blocks(self, n: int) -> Iterator[slice]:
        return (slice(start, min(start + self.block_rows, n)) for start in range(0, n, self.block_rows))

    def as_target_ids(self, columns: Tensor) -> Tensor:
        """Columns of the draft vocabulary as target ids; -1 stays."""
        return torch.where(columns >= 0, self.target.to_target_ids(columns.clamp(min=0)), -1)


def _in_common(same: Tensor) -> tuple[Tensor, Tensor]:
    """Of `same` `[n, k of the draft, k of the target]`: the share in common, and whether the target's best is in it."""
    found = same.any(1)
    return found.double().mean(1), found[:, 0]


def _seen(
    x: Tensor, transform: Transform, dtype: torch.dtype, log_normalizer: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What the softmax sees of logits, up to a constant per row, and the normaliser up to the same. The logits stay."""
    x = x.to(dtype)
    if transform.inner is None:  # without a cap, a common offset costs no digit
        top = finite(x.amax(1, keepdim=True))
        x = x - top
        if log_normalizer is not None:
            log_normalizer = log_normalizer - transform.scale * top.squeeze(1)
    return head_logits(x, transform.gain, transform.softcap), log_normalizer


def _probs(x: Tensor, log_normalizer: Tensor | None) -> Tensor:
    """The probabilities of logits; 0 in a row that has none."""
    if log_normalizer is not None:
        return (x - log_normalizer.unsqueeze(1)).exp_()
    return x.softmax(1).masked_fill_(x.amax(1, keepdim=True) == NEG_INF, 0.0)


def _best(x: Tensor, k: int) -> Tensor:
    """The `k` best columns of each row, the lowest first where they tie; -1 for those that are impossible.

    `torch.topk` promises no order of ties, and half precision has many.
    """
    taken = []
    for _ in range(k):
        top, at = x.max(1, keepdim=True)
        taken.append((top, at))
        if len(taken) < k:
            x.scatter_(1, at, NEG_INF)
    for top, at in reversed(taken):
        x.scatter_(1, at, top)
    return torch.cat([torch.where(top == NEG_INF, -1, at) for top, at in taken], 1)


def _cut(x: Tensor, sampling: Sampling) -> None:
    """Make -inf of what the sampler cuts off, in place."""
    if sampling.top_k is not None and sampling.top_k < x.shape[1]:
        last = x.topk(sampling.top_k, 1).values[:, -1:]
        x.masked_fill_(x < last, NEG_INF)
    if sampling.top_p is not None:
        logits, order = x.sort(dim=1, descending=True, stable=True)
        p = logits.softmax(1)
        beyond = p.cumsum(1).sub_(p) >= sampling.top_p
        x.masked_fill_(torch.empty_like(beyond).scatter_(1, order, beyond), NEG_INF)
