"""Random problems for the tests: one draft, one target of each kind, a work list, in any dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fused_lk

TARGET_KINDS = ("hidden", "cached", "shared_hidden", "logits", "shared_logits", "probs", "topk", "restricting_topk")
OBJECTIVES = ("kl", "tv", "alpha", "lambda")
REDUCTIONS = ("mean", "position", "sum", "none")


@dataclass
class Problem:
    """Tensors of one call; `run` makes it with fresh leaves and returns its output and gradients."""

    sources: list[Tensor]
    stacked: bool
    weight: Tensor
    bias: Tensor | None
    target: fused_lk.Target
    options: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)  # the arguments of its `pairs`, if it has any

    def leaves(self, hidden: bool = True, head: bool = True) -> tuple[list[Tensor], Tensor, Tensor | None]:
        sources = [x.detach().clone().requires_grad_(hidden) for x in self.sources]
        bias = None if self.bias is None else self.bias.detach().clone().requires_grad_(head)
        return sources, self.weight.detach().clone().requires_grad_(head), bias

    def run(
        self,
        call: Callable[..., Any] = fused_lk.lk_loss,
        scalar: Callable[[Any], Tensor] | None = None,
        hidden: bool = True,
        head: bool = True,
        **options: Any,
    ) -> tuple[Any, list[Tensor | None]]:
        """The output, and the gradients of `scalar(output)` (default: a weighted sum of the loss)."""
        sources, weight, bias = self.leaves(hidden, head)
        given = sources if self.stacked else sources[0]
        out = call(given, weight, self.target, bias=bias, **{**self.options, **options})
        leaves = [x for x in (*sources, weight, bias) if x is not None and x.requires_grad]
        gradients = torch.autograd.grad((scalar or weighted_sum)(out), leaves)
        return out, list(gradients)


def weighted_sum(out: Any) -> Tensor:
    """A scalar that gives each element of `out.loss` a weight of its own, other than 1."""
    loss = out.loss if hasattr(out, "loss") else out
    return (loss * torch.linspace(1.5, 2.5, max(loss.numel(), 1), dtype=loss.dtype).view(loss.shape)).sum()


def primitive_sum(out: fused_lk.Divergences) -> Tensor:
    """A scalar of both parts of the primitive, unsupported rows left out."""
    finite = torch.where(out.log_acceptance > float("-inf"), out.log_acceptance, 0)
    weights = torch.linspace(0.5, 1.5, finite.numel(), dtype=finite.dtype).view(finite.shape)
    return (finite * weights).sum() + (out.kl * weights.flip(0)).sum()


def make_vocab(target_size: int, draft_size: int, generator: torch.Generator) -> fused_lk.DraftVocab:
    t2d = torch.zeros(target_size, dtype=torch.bool)
    t2d[torch.randperm(target_size, generator=generator)[:draft_size]] = True
    return fused_lk.DraftVocab(t2d)


def ragged_top_k(log_probs: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and values `[..., k + 2]` in any order: a token that was sampled from the k is listed again, one more of them
    with -inf, and a third of the entries list nothing. Those hold NaN, and zeros."""
    values, ids = log_probs.topk(k)
    again = torch.randint(k, (*ids.shape[:-1], 2), generator=generator)
    ids, values = (torch.cat([x, x.gather(-1, again)], -1) for x in (ids, values))
    values[..., -1] = float("-inf")
    nothing = torch.rand(ids.shape, generator=generator) < 0.3
    ids = ids.masked_fill(nothing, -1)
    values = values.masked_fill(nothing, float("nan"))
    values[..., 0] = torch.where(nothing[..., 0], float("-inf"), values[..., 0])
    ids[..., 0] = torch.where(nothing[..., 0], 0, ids[..., 0])
    order = torch.randperm(k + 2, generator=generator)
    return ids[..., order], values[..., order]


def make_target(
    kind: str,
    num_tokens: int,
    vocab: fused_lk.DraftVocab,
    dtype: torch.dtype,
    generator: torch.Generator,
    **options: Any,
) -> fused_lk.Target:
    hidden_size = 6
    hidden = torch.randn(num_tokens, hidden_size, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocab.target_size, hidden_size, dtype=torch.float64, generator=generator)
    logits = hidden @ weight.T
    hidden, weight, logits = hidden.to(dtype), weight.to(dtype), logits.to(dtype)
    shared = logits[:, : vocab.draft_size].contiguous()
    log_probs = logits.double().log_softmax(-1)
    if kind == "probs":
        return fused_lk.Target.from_probs(log_probs.exp()[:, vocab.target_ids].to(dtype), vocab, **options)
    if kind.endswith("topk"):
        options["restrict_draft"] = kind == "restricting_topk"
        ids, values = ragged_top_k(log_probs.to(dtype), min(7, vocab.target_size), generator)
        return fused_lk.Target.from_topk(ids, values, vocab, **options)
    return {
        "hidden": lambda: fused_lk.Target.from_hidden(hidden, fused_lk.TargetHead(weight, vocab), **options),
        "cached": lambda: fused_lk.Target.from_hidden(
            hidden, fused_lk.TargetHead(weight, vocab), cache=True, **options
        ),
        "shared_hidden": lambda: fused_lk.Target.from_hidden(hidden, weight[: vocab.draft_size], **options),
        "logits": lambda: fused_lk.Target.from_logits(logits, vocab, **options),
        "shared_logits": lambda: fused_lk.Target.from_logits(shared, **options),
    }[kind]()


def make_problem(
    *,
    kind: str = "hidden",
    work: str = "identity",
    stacked: bool = False,
    dtype: torch.dtype = torch.float64,
    num_tokens: int = 10,
    draft_size: int = 37,
    target_size: int = 53,
    hidden_size: int = 5,
    bias: bool = True,
    seed: int = 0,
    target_options: dict[str, Any] | None = None,
    **options: Any,
) -> Problem:
    """`work`: "identity", or K = 3 positions over the target's rows that are "weighted", "shifted" (shared target
    rows, some ignored), or "kept" (the same with `skip_masked=False`)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    vocab = make_vocab(target_size, draft_size, generator)
    target = make_target(kind, num_tokens, vocab, dtype, generator, **(target_options or {}))
    steps, arguments = 3, {}
    if work == "identity":
        shape: tuple[int, ...] = (2, num_tokens // 2) if stacked else (num_tokens,)
    else:
        shape = (steps, num_tokens)
        step = torch.arange(steps).unsqueeze(1)
        rows = torch.arange(num_tokens).unsqueeze(0) + (0 if work == "weighted" else step)
        weights = torch.rand(shape, dtype=torch.float64, generator=generator)
        kept = torch.rand(shape, generator=generator) > 0.3
        arguments = {
            "mask": (weights * kept).to(torch.promote_types(dtype, torch.float32)),
            "target_rows": torch.where(rows < num_tokens, rows, -1).expand(shape).contiguous(),
            "position_dim": 0,
            "skip_masked": work != "kept",
        }
        options = {"pairs": fused_lk.Pairs(**arguments), **options}
    hidden = randn(*shape, hidden_size)
    return Problem(
        sources=list(hidden) if stacked else [hidden],
        stacked=stacked,
        weight=randn(draft_size, hidden_size),
        bias=randn(draft_size) if bias else None,
        target=target,
        options=options,
        rows=arguments,
    )


def assert_outputs_agree(ours: Any, oracle: Any, atol: float, rtol: float = 0.0) -> None:
    """Every tensor of the two output records agrees, -inf included."""
    for name, expected in vars(oracle).items():
        got = getattr(ours, name)
        if isinstance(expected, Tensor):
            assert got.shape == expected.shape, name
            message = f"{name}: {{}}".format
            torch.testing.assert_close(
                got.double(), expected.double(), atol=atol, rtol=rtol, equal_nan=True, msg=message
            )
