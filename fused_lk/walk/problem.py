"""What is asked: a call that has passed all checks. Eager mode and graphs share it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks, gemm
from ..impls import IMPLS
from ..pairs.pairs import EVERY_ROW, Pairs
from ..rows.interface import MEASURED, TERMS, Transform
from ..targets.target import Target


@dataclass(frozen=True)
class Problem:
    """A call that has passed all checks.

    Attributes:
        tensors: the draft's sources `[..., H or V]`, then the weight and the bias of a linear draft, then the sources
            `[..., r]` and the weight of its low-rank product.
        num_sources, linear: how many sources there are, and whether a head follows them.
        logits_dtype: float32 where the draft's logits keep the float32 of the product; None: they have their own dtype.
        transform: of the draft's logits.
        target, pairs, impl: as in `lk_loss`.
        shape: the draft's shape without its last dimension. Results per token have it.
        budget: the bound on the logits in bytes; None: the device decides.
        needs: which of `tensors` want a gradient.
        terms: the names of the divergences that are computed.
        labels: int64, per draft row, the draft token that "ce" asks for, or -1; None: the target's argmax.
        jsd_beta: as in `lk_loss`.
        scores_argmax: whether the walk is to find the target's argmax for the caller.
        keep: the bytes of logits that the forward may keep for the backward.
    """

    tensors: tuple[Tensor, ...]
    num_sources: int
    linear: bool
    logits_dtype: torch.dtype | None
    transform: Transform
    target: Target
    pairs: Pairs
    shape: tuple[int, ...]
    impl: str
    budget: int | None
    needs: tuple[bool, ...]
    terms: tuple[str, ...] = MEASURED
    labels: Tensor | None = None
    jsd_beta: float = 0.5
    scores_argmax: bool = False
    keep: int = 0

    @property
    def low_rank(self) -> slice:
        """Which of `tensors` belong to the low-rank product: none, or as many sources as there are, and a weight."""
        return low_rank(len(self.tensors), self.num_sources)

    @property
    def num_rows(self) -> int:
        return sum(x.shape[:-1].numel() for x in self.tensors[: self.num_sources])

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of the statistics of a row."""
        return gemm.wide_dtype(self.tensors[0].dtype, self.target.tiles.dtype)

    @property
    def further_terms(self) -> tuple[str, ...]:
        """The terms beyond those of every call, which come first."""
        return self.terms[len(MEASURED) :]

    @property
    def learns_argmax(self) -> bool:
        """Whether the gradient reads the target's argmax, as a label."""
        return "ce" in self.terms and self.labels is None

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


def low_rank(num_tensors: int, num_sources: int) -> slice:
    """Which of a draft's tensors belong to its low-rank product. Before them are the sources, a weight, and a bias."""
    added = num_sources + 1
    return slice(num_tensors - added if num_tensors >= 2 * added else num_tensors, num_tensors)


def linear(
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    target: Target,
    logits_dtype: str | torch.dtype,
    *how: Any,
    second: tuple[Tensor | Sequence[Tensor], Tensor] | None = None,
    **also: Any,
) -> Problem:
    """The problem of a draft with hidden states and an `lm_head`. `how` and `also` go to `_checked`."""
    weight, bias = checks.weight_here(weight), checks.weight_here(bias)
    checks.tensor("draft_lm_head_weight", weight, ndim=2, dtypes=checks.FLOATS)
    checks.not_empty("draft_lm_head_weight", weight, vocabulary=0, hidden_size=1)
    sources, shape = _sources("draft_hidden", hidden)
    device = sources[0].device
    checks.same_device(device, draft_lm_head_weight=weight)
    if sources[0].shape[-1] != weight.shape[1]:
        expected = f"draft_hidden with last dimension {weight.shape[1]}, the hidden size of draft_lm_head_weight"
        remedy = "Check that hidden states and head belong to one model; weights are [V_draft, H]."
        checks.fail(expected, sources[0], remedy)
    tensors = [*sources, weight]
    if bias is not None:
        checks.tensor("bias", bias, dtypes=checks.FLOATS)
        checks.shape("bias", bias, (weight.shape[0],), "one per row of draft_lm_head_weight")
        checks.same_device(device, bias=bias)
        tensors.append(bias)
    names = ["draft_lm_head_weight"] if bias is None else ["draft_lm_head_weight", "bias"]
    if second is not None:
        tensors += _low_rank(second, shape, len(sources), weight)
        names += ["low_rank[0]"] * len(sources) + ["low_rank[1]"]
    tensors = [x.to(gemm.compute_dtype(x)) for x in tensors]
    for name, x in zip(names, tensors[len(sources) :], strict=True):
        if x.dtype != tensors[0].dtype:
            expected = f"{name} of draft_hidden's dtype, {str(tensors[0].dtype).removeprefix('torch.')}"
            first, convert = "draft_hidden", f"draft_hidden.to({name}.dtype)"
            if not isinstance(hidden, Tensor):
                first, convert = "draft_hidden[0]", f"[h.to({name}.dtype) for h in draft_hidden]"
            convert = f"{convert} or " if name == "draft_lm_head_weight" else ""
            remedy = f"Pass {convert}{name}.to({first}.dtype), or run under torch.autocast."
            checks.fail(expected, x, remedy, TypeError)
    wide = checks.wide_logits(logits_dtype)
    return _checked(tuple(tensors), len(sources), True, wide, shape, weight.shape[0], target, *how, **also)


def from_logits(logits: Tensor | Sequence[Tensor], target: Target, *how: Any, **also: Any) -> Problem:
    """The problem of a draft whose logits the caller holds."""
    sources, shape = _sources("draft_logits", logits)
    checks.not_empty("draft_logits", sources[0], vocabulary=-1)
    return _checked(sources, len(sources), False, None, shape, sources[0].shape[-1], target, *how, **also)


def _checked(
    tensors: tuple[Tensor, ...],
    num_sources: int,
    is_linear: bool,
    logits_dtype: torch.dtype | None,
    shape: tuple[int, ...],
    vocab_size: int,
    target: Target,
    mask: Tensor | None,
    pairs: Pairs | None,
    draft_temperature: float,
    impl: str,
    workspace_mb: float | str,
    terms: Sequence[Sequence[str]] = (),
    labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    *,
    scores: bool = False,
    keep_mb: float | str = 0,
) -> Problem:
    checks.choice("impl", impl, IMPLS)
    transform = Transform(*checks.softmax("draft_temperature", draft_temperature, logit_scale, softcap))
    budget, keep = checks.workspace_bytes(workspace_mb), checks.keep_bytes(keep_mb)
    device = tensors[0].device
    if keep is None:
        keep = gemm.bound(budget, device)
    if not isinstance(target, Target):
        remedy = "Build one: Target.from_hidden, from_logits, ..."
        checks.fail("target to be a fused_lk.Target", target, remedy, TypeError)
    tiles = target.tiles
    if tiles.vocab_size != vocab_size:
        remedy = "Give the target the DraftVocab of this draft head; slice padded rows off a head, weight[:vocab_size]."
        checks.fail(
            f"a target on {vocab_size} draft tokens, as the draft has", f"a target on {tiles.vocab_size}", remedy
        )
    if tiles.device != device:
        checks.fail(f"a target on {device}, where the draft is", f"one on {tiles.device}", "Move one of them.")
    if pairs is None:
        pairs = _own_pairs(mask, shape, num_sources, device)
    elif not isinstance(pairs, Pairs):
        checks.fail("pairs to be a fused_lk.Pairs", pairs, "Build Pairs(mask, ...).", TypeError)
    elif mask is not None:
        checks.fail("mask or pairs, not both", "both", "Pass the mask to Pairs(mask, ...).")
    elif pairs.shape is not None and pairs.shape != shape:
        expected = f"pairs of the draft's shape without its last dimension, {shape}"
        remedy = (
            "Build the pairs from tensors of that shape. Those of Pairs.ttt are [K, B, S], as of a list of K steps."
        )
        if math.prod(pairs.shape) == math.prod(shape):
            name = "draft_hidden" if is_linear else "draft_logits"
            remedy = f"Where the draft's rows are in the order of the pairs, pass {name}.view{(*pairs.shape, -1)}."
        checks.fail(expected, f"pairs of shape {pairs.shape}", remedy)
    elif pairs.device is not None and pairs.device != device:
        checks.fail(f"pairs on {device}, where the draft is", f"pairs on {pairs.device}", "Build them there.")
    grad = torch.is_grad_enabled()
    needs = tuple(grad and x.requires_grad for x in tensors)
    given = (tensors, num_sources, is_linear, logits_dtype, transform)
    jsd_beta = checks.share("jsd_beta", jsd_beta)
    if labels is not None:
        labels = _columns(labels, shape, target, device)
    of_terms = (all_terms(*terms), labels, jsd_beta, scores and target.finds_argmax, keep)
    made = Problem(*given, target, pairs, shape, impl, budget, needs, *of_terms)
    check_target_rows(pairs, made.num_rows, tiles.num_rows, target.computed)
    if checks.checks_contents(tensors[0], only_if_asked=True):
        _refuse_nonfinite(made)
    return made


def all_terms(*further: Sequence[str]) -> tuple[str, ...]:
    """The terms of every call, then those of `further` that are not among them."""
    names = list(MEASURED)
    for group in further:
        if isinstance(group, str):
            checks.fail("terms to be a sequence of names", group, f"Pass ({group!r},).", TypeError)
        for name in group:
            checks.choice("terms", name, TERMS)
        names += group
    return tuple(dict.fromkeys(names))


def _columns(labels: Any, shape: tuple[int, ...], target: Target, device: torch.device) -> Tensor:
    """Labels as columns of the draft vocabulary, `[N]`; -1 where it does not have them."""
    checks.tensor("labels", labels, dtypes=[torch.int64, torch.int32])
    checks.shape("labels", labels, shape, "the draft's shape without its last dimension")
    checks.same_device(device, labels=labels)
    ids = labels.detach().reshape(-1).long()
    size = target.tiles.vocab_size if target.vocab is None else target.vocab.target_size
    inside = (ids >= 0) & (ids < size)
    if checks.checks_contents(ids) and bool((ids >= size).any()):
        expected = f"labels below {size}, the size of the target's vocabulary"
        checks.fail(expected, f"a label {int(ids.max())}", "They are target ids. Use -100 for none.")
    return torch.where(inside, ids if target.vocab is None else target.vocab.draft_ids[torch.where(inside, ids, 0)], -1)


def check_target_rows(pairs: Pairs, num_rows: int, num_targets: int, computed: Any = None) -> None:
    """Every pair's target row exists, and the target's own mask has not left it out.

    Raises:
        ValueError: draft and target differ in length while row i meets row i; a row is out of range; the target's mask
            left a row out.
    """
    if not pairs.names_targets and num_rows != num_targets:
        expected = f"as many target rows as draft rows ({num_rows}) without target_rows"
        steps = num_rows // num_targets if num_targets and num_rows % num_targets == 0 else "K"
        remedy = (
            f"Pass pairs=, which says which rows meet: Pairs.ttt(loss_mask, steps={steps}) for a list of TTT steps, "
            "Pairs.blocks(anchors, block_size, loss_mask) for blocks, "
            "or Pairs(target_rows=...): for each draft row, the row of the flattened target."
        )
        checks.fail(expected, f"{num_targets} target rows", remedy)
    if torch.compiler.is_compiling() or (computed is None and not pairs.names_targets):
        return
    used = np.arange(0 if pairs.valid is not None else num_rows)
    if pairs.draft_rows is not None:
        used = pairs.host_targets
    elif pairs.valid is not None and checks.checks_contents(pairs.valid):
        rows = torch.arange(num_rows, device=pairs.device) if pairs.target_rows is None else pairs.target_rows
        used = rows[pairs.valid].cpu().numpy()
    if len(used) and used.max() >= num_targets:
        expected = f"target_rows below {num_targets}, the number of rows of the flattened target"
        checks.fail(expected, f"a target row {int(used.max())}", "Use -1 for rows that have no target.")
    if computed is not None and not computed[used].all():
        outside = f"{int((~computed[used]).sum())} pair(s) outside"
        remedy = "Pass Target.from_hidden a mask that covers them."
        checks.fail("every supervised pair's target row inside the target's own mask", outside, remedy)


def _own_pairs(mask: Tensor | None, shape: tuple[int, ...], num_sources: int, device: torch.device) -> Pairs:
    """The pairs of a call without any: row i against row i. Tensor k of a list has draft position k."""
    if isinstance(mask, Tensor):
        checks.shape("mask", mask, shape, "the draft's shape without its last dimension")
        checks.same_device(device, mask=mask)
    if num_sources == 1:
        return EVERY_ROW if mask is None else Pairs(mask)
    step = torch.arange(num_sources, device=device).view(num_sources, *(1 for _ in shape[1:]))
    pairs = Pairs(mask, None, step.expand(shape), num_sources)
    pairs.position_dim = 0
    return pairs


def _refuse_nonfinite(problem: Problem) -> None:
    num_rows, k = problem.num_rows, problem.num_sources
    counted = (problem.pairs.dense(num_rows, problem.device)[0] > 0).view(k, num_rows // k)
    name = "draft_hidden" if problem.linear else "draft_logits"
    for i, (x, of_source) in enumerate(zip(problem.tensors, counted, strict=False)):
        which = name if k == 1 else f"{name}[{i}]"
        checks.finite_rows(which, x.detach(), logits=not problem.linear, counted=of_source)


def _low_rank(
    given: tuple[Tensor | Sequence[Tensor], Tensor], shape: tuple[int, ...], num_sources: int, head: Tensor
) -> list[Tensor]:
    """The tensors of `low_rank=(u, M)`: `u` as the hidden states are given, `[..., r]`, and `M` `[V_draft, r]`."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        remedy = "u is [..., r], as the hidden states are; M is [V_draft, r]."
        checks.fail("low_rank to be a pair (u, M)", given, remedy, TypeError)
    sources, of_u = _sources("low_rank[0]", given[0])
    weight = checks.tensor("low_rank[1]", given[1], ndim=2, dtypes=checks.FLOATS)
    if len(sources) != num_sources or of_u != shape:
        expected = f"low_rank[0] given as the hidden states are: {num_sources} tensor(s), leading shape {shape} in all"
        checks.fail(expected, f"{len(sources)} tensor(s), {of_u}", "Give one row u for each row of the hidden states.")
    checks.not_empty("low_rank[1]", weight, rank=1)
    checks.shape("low_rank[1]", weight, (head.shape[0], sources[0].shape[-1]), "a row per row of draft_lm_head_weight")
    checks.same_device(head.device, **{"low_rank[0]": sources[0], "low_rank[1]": weight})
    return [*sources, weight]


def _sources(name: str, given: Tensor | Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The tensors, and the shape of their stack without the last dimension: `(K, ...)` for a list."""
    if isinstance(given, Tensor):
        checks.tensor(name, given, min_ndim=1, dtypes=checks.FLOATS)
        return (given,), tuple(given.shape[:-1])
    if not isinstance(given, (list, tuple)) or not given:
        remedy = checks.instead(name, given, "Pass one tensor per TTT step.")
        checks.fail(f"{name} to be a tensor or a non-empty list of tensors", given, remedy, TypeError)
    for k, x in enumerate(given):
        checks.tensor(f"{name}[{k}]", x, min_ndim=1, dtypes=[given[0].dtype] if k else checks.FLOATS)
        checks.shape(f"{name}[{k}]", x, tuple(given[0].shape), f"the shape of {name}[0]")
        checks.same_device(given[0].device, **{f"{name}[{k}]": x})
    return tuple(given), (len(given), *given[0].shape[:-1])
