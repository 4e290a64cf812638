"""One validated call: whose tensors, which pairs, against what target, with how much memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import checks, chunked, plan
from .autograd import DraftTensors
from .chunked import Work
from .gemm import compute_dtype
from .pairs import Pairs
from .rows.interface import IMPLS, row_ops
from .target import Target

# The options of a call that are not tensors, and how each is checked.
CHECKS: dict[str, Callable[[Any], Any]] = {
    "impl": partial(checks.choice, "impl", options=IMPLS),
    "plan": partial(checks.choice, "plan", options=plan.PLANS),
    "draft_temperature": partial(checks.number, "draft_temperature", above=0),
    "workspace_mb": checks.workspace_bytes,
    "logits_dtype": checks.wide_logits,
    "skip_masked": partial(checks.flag, "skip_masked"),
}


@dataclass(frozen=True)
class Call:
    """`tensors` are the draft's sources, then weight and bias of a linear draft; `shape` is the draft's, per token."""

    tensors: tuple[Tensor, ...]
    draft: DraftTensors
    shape: tuple[int, ...]
    target: Target
    pairs: Pairs
    impl: str
    draft_temperature: float
    budget: int | None

    @property
    def num_rows(self) -> int:
        return sum(x.shape[:-1].numel() for x in self.tensors[: self.draft.num_sources])

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def needs_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in self.tensors)

    @property
    def needs_weight_gradient(self) -> bool:
        return torch.is_grad_enabled() and self.draft.linear and self.tensors[self.draft.num_sources].requires_grad

    def work(self, needs_weight: bool, *, in_one_pass: bool, wants_target_argmax: bool = False) -> Work:
        """The request cut into chunks; `needs_weight` says whether the head will want a gradient."""
        draft, target, pairs = self.draft.build(self.tensors), self.target, self.pairs
        num_pairs = self.num_rows if pairs.num_pairs is None else pairs.num_pairs
        by_vocabulary = not in_one_pass and plan.walks_by_vocabulary(draft.vocab_size, num_pairs, needs_weight)
        chunking = plan.by_rows(
            chunked.tile_costs(draft, target, pairs),
            draft.vocab_size,
            num_pairs,
            pairs.num_targets(self.num_rows),
            self.device,
            self.budget,
            accumulates_weight=needs_weight and not by_vocabulary,
        )
        return Work(
            target=target,
            layout=pairs.layout(self.num_rows, self.draft.num_sources, chunking.max_pairs, chunking.max_targets),
            ops=row_ops(self.impl, self.device),
            draft_scale=1.0 / self.draft_temperature,
            target_scale=1.0 / target.temperature,
            budget=self.budget,
            wants_target_argmax=wants_target_argmax,
        )


def linear(
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    target: Target,
    logits_dtype: str | torch.dtype,
    **options: Any,
) -> Call:
    """A call whose draft is hidden states and an `lm_head`."""
    checks.tensor("draft_lm_head_weight", weight, ndim=2, dtypes=checks.FLOATS)
    checks.not_empty("draft_lm_head_weight", weight, vocabulary=0, hidden_size=1)
    sources, shape = _sources("draft_hidden", hidden)
    device = sources[0].device
    checks.same_device(device, draft_lm_head_weight=weight)
    if sources[0].shape[-1] != weight.shape[1]:
        checks.fail(
            f"draft_hidden with last dimension {weight.shape[1]}, the hidden size of draft_lm_head_weight",
            sources[0],
            "Check that hidden states and head belong to one model; weights are [V_draft, H].",
        )
    tensors = [*sources, weight]
    if bias is not None:
        checks.tensor("bias", bias, dtypes=checks.FLOATS)
        checks.shape("bias", bias, (weight.shape[0],), "one per row of draft_lm_head_weight")
        checks.same_device(device, bias=bias)
        tensors.append(bias)
    tensors = [x.to(compute_dtype(x)) for x in tensors]
    for name, x in (("draft_lm_head_weight", tensors[len(sources)]), ("bias", tensors[-1])):
        if x.dtype != tensors[0].dtype:
            checks.fail(
                f"{name} of draft_hidden's dtype, {str(tensors[0].dtype).removeprefix('torch.')}",
                x,
                "Convert one of them, or run under torch.autocast.",
                TypeError,
            )
    wide = checks.wide_logits(logits_dtype)
    return _call(tuple(tensors), DraftTensors(len(sources), True, wide), shape, weight.shape[0], target, **options)


def from_logits(logits: Tensor | Sequence[Tensor], target: Target, **options: Any) -> Call:
    """A call whose draft is logits in hand."""
    sources, shape = _sources("draft_logits", logits)
    checks.not_empty("draft_logits", sources[0], vocabulary=-1)
    return _call(sources, DraftTensors(len(sources), False), shape, sources[0].shape[-1], target, **options)


def _call(
    tensors: tuple[Tensor, ...],
    draft: DraftTensors,
    shape: tuple[int, ...],
    vocab_size: int,
    target: Target,
    *,
    mask: Tensor | None,
    target_rows: Tensor | None,
    positions: Tensor | None = None,
    num_positions: int | None = None,
    pairs: Pairs | None,
    skip_masked: bool,
    draft_temperature: float,
    impl: str,
    workspace_mb: float | str,
    by_position: bool = False,
) -> Call:
    CHECKS["impl"](impl)
    CHECKS["draft_temperature"](draft_temperature)
    device = tensors[0].device
    if not isinstance(target, Target):
        checks.fail(
            "target to be a fused_lk.Target", target, "Build one: Target.from_hidden, from_logits, ...", TypeError
        )
    if target.draft_vocab_size != vocab_size:
        checks.fail(
            f"a target on {vocab_size} draft tokens, as the draft has",
            f"a target on {target.draft_vocab_size}",
            "Give the target the DraftVocab of this draft head; trim padded rows of the head.",
        )
    if target.device != device:
        checks.fail(f"a target on {device}, where the draft is", f"one on {target.device}", "Move one of them.")
    rows = {"mask": mask, "target_rows": target_rows, "positions": positions}
    if pairs is None:
        for name, x in rows.items():
            if isinstance(x, Tensor):
                checks.shape(name, x, shape, "the draft's shape without its last dimension")
                checks.same_device(device, **{name: x})
        if by_position and positions is None and draft.num_sources > 1:
            positions, num_positions = _steps(shape, num_positions, device)
        pairs = Pairs(mask, target_rows, positions, num_positions, skip_masked=skip_masked)
    else:
        if not isinstance(pairs, Pairs):
            checks.fail("pairs to be a fused_lk.Pairs", pairs, "Build Pairs(mask, ...).", TypeError)
        beside = [name for name, x in {**rows, "num_positions": num_positions}.items() if x is not None]
        if beside:
            checks.fail("pairs alone", f"pairs beside {', '.join(beside)}", "Pass these to Pairs(...) instead.")
        if pairs.shape is not None and pairs.shape != shape:
            checks.fail(
                f"pairs of the draft's shape without its last dimension, {shape}",
                f"pairs of shape {pairs.shape}",
                "Build the pairs from tensors of that shape.",
            )
        if pairs.device is not None and pairs.device != device:
            checks.fail(f"pairs on {device}, where the draft is", f"pairs on {pairs.device}", "Build them there.")
    num_rows = sum(x.shape[:-1].numel() for x in tensors[: draft.num_sources])
    pairs.check_target(num_rows, target.num_tokens, target.computed)
    if checks.checks_contents(tensors[0], only_if_asked=True):
        counted = (pairs.dense(num_rows, device)[0] > 0).view(draft.num_sources, num_rows // draft.num_sources)
        name = "draft_hidden" if draft.linear else "draft_logits"
        for k, (x, of_source) in enumerate(zip(tensors, counted, strict=False)):
            which = name if draft.num_sources == 1 else f"{name}[{k}]"
            checks.finite_rows(which, x.detach(), logits=not draft.linear, counted=of_source)
    return Call(
        tensors, draft, shape, target, pairs, impl, float(draft_temperature), checks.workspace_bytes(workspace_mb)
    )


def _steps(shape: tuple[int, ...], num_positions: int | None, device: torch.device) -> tuple[Tensor | None, int | None]:
    """The draft position of each row of a list: tensor k is position k, unless one position was asked for."""
    steps = shape[0]
    given = steps if num_positions is None else checks.integer("num_positions", num_positions)
    if given == 1:
        return None, 1
    if given != steps:
        checks.fail(
            f"num_positions={steps}, one per tensor of the list, or 1 for all of them together",
            f"num_positions={given}",
            "Pass positions to place the rows otherwise.",
        )
    step = torch.arange(steps, device=device).view(steps, *(1 for _ in shape[1:]))
    return step.expand(shape), steps


def _sources(name: str, given: Tensor | Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The tensors, and their joint shape without the last dimension: `(K, ...)` for a sequence."""
    if isinstance(given, Tensor):
        checks.tensor(name, given, min_ndim=1, dtypes=checks.FLOATS)
        return (given,), tuple(given.shape[:-1])
    if not isinstance(given, list | tuple) or not given:
        remedy = checks.instead(given, "Pass one tensor per TTT step.")
        checks.fail(f"{name} to be a tensor or a non-empty list of tensors", given, remedy, TypeError)
    for k, x in enumerate(given):
        checks.tensor(f"{name}[{k}]", x, min_ndim=1, dtypes=[given[0].dtype] if k else checks.FLOATS)
        checks.shape(f"{name}[{k}]", x, tuple(given[0].shape), f"the shape of {name}[0]")
        checks.same_device(given[0].device, **{f"{name}[{k}]": x})
    return tuple(given), (len(given), *given[0].shape[:-1])
