"""What a call would do, and what it would cost, found from its shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from . import checks, gemm
from .pairs.pairs import Pairs
from .reduction import LossOptions
from .walk.costs import Costs, TargetFacts
from .walk.eager import eager_bytes
from .walk.plan import Facts, Plan, kept_dtypes, resolve, tile_dtypes
from .walk.problem import all_terms, check_target_rows

TARGET_KINDS = ("hidden", "cached", "logits", "probs", "topk")


@dataclass(frozen=True)
class Explanation:
    """The work of one `lk_loss` call and its backward; `print` it.

    Attributes:
        plan: "one_pass" or "recompute".
        walk: "by rows" or "by vocabulary", the walk that makes the gradients.
        num_pairs, num_targets: the supervised pairs, and the distinct target rows that they use.
        chunks, chunk_pairs, chunk_targets: how many chunks the walk by rows has, and the size of the largest.
        block_columns: the columns of a block of the walk by vocabulary; None without that walk.
        draft_gemms: the products of the draft, in units of `[pairs, H] @ [H, V_draft]` (H + r with `low_rank`).
        target_gemms: the products for the target's logits and for its normaliser, in the same unit.
        gemm_flops: the flops of all these, 2 for a multiplication and an addition.
        floor_flops: the least that anybody can do: each draft product once, the target's logits once per target row,
            and the normaliser given.
        floor_flops_from_hidden: the same, where a pass makes the normaliser from hidden states. That pass computes the
            draft's columns too. Both floors are equal where the target gives its probabilities.
        peak_bytes: the most bytes of live tensors beyond the inputs, with the gradients, to a few per cent.
        held_bytes: what is held between forward and backward, beyond inputs and outputs; kept logits included.
        kept_pairs, kept_bytes: the pairs whose logits the forward keeps for the backward, and the bytes of these tiles.
        saved_by_a_mib: the share of a draft product that each further MiB of `keep_mb` saves, until all are kept.
        at_peak: (name, bytes) of each part of the peak.
        eager_bytes: the most bytes that the loss from full logits needs beyond the inputs: LK-lambda in plain PyTorch,
            as SpecForge writes it, of all rows, by the same account. Other eager losses need more or less.
        reasons: why each choice was made.
    """

    plan: str
    walk: str
    num_pairs: int
    num_targets: int
    chunks: int
    chunk_pairs: int
    chunk_targets: int
    block_columns: int | None
    draft_gemms: float
    target_gemms: float
    gemm_flops: int
    floor_flops: int
    floor_flops_from_hidden: int
    peak_bytes: int
    held_bytes: int
    kept_pairs: int
    kept_bytes: int
    saved_by_a_mib: float
    at_peak: tuple[tuple[str, int], ...]
    eager_bytes: int
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        size = f"{self.chunks} chunk(s) of up to {self.chunk_pairs} pairs and {self.chunk_targets} target rows"
        if self.block_columns is not None:
            size += f"; gradients in blocks of {self.block_columns} columns"
        over = self.gemm_flops / max(self.floor_flops_from_hidden, 1)
        lines = [
            f"plan        {self.plan}, gradients {self.walk}",
            f"work        {self.num_pairs} pairs against {self.num_targets} target rows",
            f"chunks      {size}",
            f"products    {self.draft_gemms:.3g} of the draft, {self.target_gemms:.3g} of the target (in draft ones)",
            f"flops       {self.gemm_flops:.4g}, {over:.2f} x the floor ({self.floor_flops_from_hidden:.4g}; "
            f"{self.floor_flops:.4g} with the normaliser given)",
            f"peak        {_told_size(self.peak_bytes)} beyond the inputs: "
            + ", ".join(f"{name} {_told_size(size)}" for name, size in self.at_peak if size >= gemm.MIB),
            f"held        {_told_size(self.held_bytes)} between forward and backward",
            *self._of_kept_logits(),
            f"saved       {_told_size(max(self.eager_bytes - self.peak_bytes, 0))}: the eager loss, which makes full "
            f"logits and softmaxes of them, would need {_told_size(self.eager_bytes)}",
            *(f"because     {reason}" for reason in self.reasons),
        ]
        return "\n".join(lines)

    def _of_kept_logits(self) -> list[str]:
        if self.plan == "one_pass":
            return []
        kept = f"kept        {_told_size(self.kept_bytes)} of logits, of {self.kept_pairs} pairs"
        if self.kept_pairs == self.num_pairs or self.saved_by_a_mib == 0:
            return [kept]
        return [f"{kept}; keep_mb saves a product for each further {1 / self.saved_by_a_mib:,.0f} MiB"]


def explain(
    num_tokens: int,
    hidden_size: int,
    draft_vocab_size: int,
    target_vocab_size: int | None = None,
    *,
    target: str = "hidden",
    target_hidden_size: int | None = None,
    low_rank: int = 0,
    normalizer_given: bool = False,
    quantized_head: bool = False,
    ttt_steps: int = 1,
    masked_share: float = 0.0,
    pairs: Pairs | None = None,
    dtype: torch.dtype = torch.bfloat16,
    logits_dtype: str | torch.dtype = "compute",
    target_logits_dtype: str | torch.dtype = "compute",
    frozen_head: bool = False,
    frozen_hidden: bool = False,
    objective: str | Mapping[str, float] = "lambda",
    terms: Sequence[str] = (),
    lambda_per: str = "position",
    kl_weight: float | None = None,
    reduction: str = "mean",
    plan: str = "auto",
    impl: str = "auto",
    workspace_mb: float | str = "auto",
    keep_mb: float | str = 0,
    device: str = "cuda",
) -> Explanation:
    """What `lk_loss` would do for given shapes: plan, chunks, matrix products, bytes, and the floor. Nothing is run.

    The call itself carries out this very plan.

    Args:
        num_tokens: draft rows of one TTT step.
        hidden_size, target_hidden_size: of the draft, and of the target (default: the same).
        draft_vocab_size, target_vocab_size: default: one shared vocabulary.
        low_rank: r, the columns of both tensors of `low_rank`, which train as hidden states and head do.
        target: "hidden", "cached" (`cache=True`), "logits", "probs" or "topk" (`restrict_draft` changes nothing here).
        normalizer_given: whether a target from hidden states is told its normaliser and argmax.
        quantized_head: whether the weight of such a target's head is a `QuantizedWeight`.
        ttt_steps: K; row t of step k is scored against target row t + k.
        masked_share: share of the tokens that are not supervised, in [0, 1]; they are taken to come first.
        pairs: the actual work list, instead of `masked_share`; of `ttt_steps * num_tokens` rows.
        dtype, logits_dtype, frozen_head, frozen_hidden: of the draft.
        target_logits_dtype: `logits_dtype` of a target from hidden states, or `torch.float32` where its logits have it.
        objective, terms, lambda_per, kl_weight, reduction, plan, impl, workspace_mb, keep_mb: as in `lk_loss`.
        device: "cpu" or "cuda".

    Raises:
        TypeError, ValueError: unknown names, sizes out of range, a plan that cannot serve the request.
    """
    num_tokens = checks.integer("num_tokens", num_tokens, minimum=0)
    sizes = {"hidden_size": hidden_size, "draft_vocab_size": draft_vocab_size, "ttt_steps": ttt_steps}
    sizes["target_vocab_size"] = draft_vocab_size if target_vocab_size is None else target_vocab_size
    sizes["target_hidden_size"] = hidden_size if target_hidden_size is None else target_hidden_size
    h, vocab, steps, full_vocab, target_h = (checks.integer(name, value) for name, value in sizes.items())
    if vocab > full_vocab:
        checks.fail(
            "draft_vocab_size <= target_vocab_size (the draft's vocabulary is a subset of the target's)",
            f"{vocab} draft tokens of {full_vocab}",
            "Draft first, then target; trim padded rows of the draft's head.",
        )
    flags = {"normalizer_given": normalizer_given, "quantized_head": quantized_head}
    flags |= {"frozen_head": frozen_head, "frozen_hidden": frozen_hidden}
    for name, value in flags.items():
        checks.flag(name, value)
    checks.choice("target", target, TARGET_KINDS)
    checks.choice("device", device, ("cpu", "cuda"))
    checks.choice("impl", impl, ("auto", "triton", "torch"))
    if dtype not in checks.FLOATS:
        checks.fail("dtype to be a floating point torch.dtype", dtype, "Pass torch.bfloat16, say.", TypeError)
    masked_share = checks.number("masked_share", masked_share, minimum=0)
    if masked_share > 1:
        checks.fail("masked_share in [0, 1]", masked_share, "Pass the share of tokens that do not count.")
    num_rows = steps * num_tokens
    if pairs is None:
        pairs = _pairs(num_tokens, steps, masked_share)
    else:
        _check_pairs(pairs, num_rows, num_tokens, masked_share)
    options = LossOptions(objective, lambda_per=lambda_per, kl_weight=kl_weight, reduction=reduction)
    one_pass, why = resolve(plan, options.obstacle_to_one_pass)

    wide = gemm.wide_dtype(dtype)
    of_target = torch.promote_types(dtype, checks.wide_logits(target_logits_dtype) or dtype)
    if target in ("probs", "topk"):
        of_target = wide
    in_place = target == "cached" or (target == "logits" and vocab == full_vocab)
    where = (False, in_place and pairs.valid is None)
    tiles = tile_dtypes(dtype, checks.wide_logits(logits_dtype), of_target, where)
    budget, keep = checks.workspace_bytes(workspace_mb), checks.keep_bytes(keep_mb)
    if keep is None:
        keep = gemm.bound(budget, torch.device(device))
    facts = Facts(
        pairs=pairs,
        num_rows=num_rows,
        num_sources=steps,
        hidden_size=h + checks.integer("low_rank", low_rank, minimum=0),
        vocab_size=vocab,
        dtype=dtype,
        accumulator=gemm.wide_dtype(dtype, of_target),
        tiles=tiles,
        needs_hidden=not frozen_hidden,
        needs_weight=not frozen_head,
        impl=impl,
        device=torch.device(device),
        budget=budget,
        terms=all_terms(options.terms, terms),
        kept=kept_dtypes(tiles.z, tiles.t, True, target == "hidden"),
        keep=0 if frozen_head and frozen_hidden else keep,
    )
    streams = target == "cached" or (target == "hidden" and vocab < full_vocab and not normalizer_given)
    kind = "logits" if target == "cached" else target
    quantized = quantized_head and target in ("hidden", "cached")
    of = TargetFacts(kind, num_tokens, target_h, full_vocab, of_target.itemsize, streams, target == "cached", quantized)
    return _told(Costs(Plan.of(facts, one_pass, why), of))


def _told(costs: Costs) -> Explanation:
    plan, facts, at_peak = costs.plan, costs.facts, costs.at_peak()
    return Explanation(
        plan="one_pass" if plan.one_pass else "recompute",
        walk="by rows" if plan.block_columns is None else "by vocabulary",
        num_pairs=facts.num_pairs,
        num_targets=facts.num_targets,
        chunks=len(plan.layout.chunks),
        chunk_pairs=costs.pairs,
        chunk_targets=costs.targets,
        block_columns=plan.block_columns,
        draft_gemms=costs.draft_flops / max(costs.one_gemm, 1),
        target_gemms=costs.target_flops() / max(costs.one_gemm, 1),
        gemm_flops=costs.draft_flops + costs.target_flops(),
        floor_flops=costs.floor_flops(from_hidden=False),
        floor_flops_from_hidden=costs.floor_flops(from_hidden=True),
        peak_bytes=sum(size for _, size in at_peak),
        held_bytes=costs.held_bytes(),
        kept_pairs=plan.kept.num_pairs,
        kept_bytes=costs.kept_bytes,
        saved_by_a_mib=costs.saved_by_a_mib() if costs.needs_gradient and not plan.one_pass else 0.0,
        at_peak=at_peak,
        eager_bytes=eager_bytes(facts, costs.target),
        reasons=plan.reasons,
    )


def _check_pairs(pairs: Pairs, num_rows: int, num_targets: int, masked_share: float) -> None:
    if not isinstance(pairs, Pairs):
        checks.fail("pairs to be a fused_lk.Pairs", pairs, "Build Pairs(mask, ...).", TypeError)
    if masked_share != 0:
        checks.fail("pairs or masked_share", "both", "Leave masked_share out: the pairs say what counts.")
    if pairs.shape is not None and math.prod(pairs.shape) != num_rows:
        expected = f"pairs of ttt_steps * num_tokens = {num_rows} rows"
        checks.fail(expected, f"pairs of shape {pairs.shape}", "num_tokens counts the draft rows of one step.")
    check_target_rows(pairs, num_rows, num_targets)


def _pairs(num_tokens: int, steps: int, masked_share: float) -> Pairs:
    """Row t of step k against target row t + k, the first tokens masked."""
    if steps == 1 and masked_share == 0:
        return Pairs()
    counts = torch.arange(num_tokens) >= round(masked_share * num_tokens)
    rows = torch.arange(num_tokens) + torch.arange(steps).unsqueeze(1)
    return Pairs(counts.expand(steps, -1), torch.where(rows < num_tokens, rows, -1))


def _told_size(size: int) -> str:
    return f"{size / gemm.MIB:,.0f} MiB" if size < 1024 * gemm.MIB else f"{size / (1024 * gemm.MIB):,.2f} GiB"
