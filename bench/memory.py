"""Accounted memory of one training step at full size: `python -m bench.memory`.

Peak of live tensor bytes beyond the inputs, forward and backward; nothing is allocated or computed (see
`bench.accounting`), so the figures do not depend on the machine. Ours walk as on a GPU. Kernels of others that are not
plain PyTorch cannot be accounted so: SpecForge's KL, a Triton kernel, is written out here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_lk

from .accounting import GIB, Accounted, account, full_size, real
from .tables import print_markdown, write_csv


@dataclass(frozen=True)
class Shape:
    """One training step; the target comes from hidden states unless `probs`."""

    name: str
    num_tokens: int
    hidden_size: int
    draft_vocab_size: int
    target_vocab_size: int
    ttt_steps: int = 1
    frozen_head: bool = False
    probs: bool = False
    dtype: torch.dtype = torch.bfloat16


SHAPES = (
    Shape("8,192 tokens, V 32,000", 8192, 4096, 32000, 32000),
    Shape("8,192 tokens, V 32,000, 7 TTT steps", 8192, 4096, 32000, 32000, ttt_steps=7, probs=True),
    Shape("8,192 tokens, V 151,936", 8192, 4096, 151936, 151936),
    Shape("8,192 tokens, V 151,936, frozen head", 8192, 4096, 151936, 151936, frozen_head=True),
    Shape("8,192 tokens, V 32,000 of 128,256", 8192, 4096, 32000, 128256),
    Shape("8,192 tokens, V 32,000 of 128,256, 7 TTT steps", 8192, 4096, 32000, 128256, ttt_steps=7),
)


@dataclass(frozen=True)
class Inputs:
    """What exists before a step, and is not counted.

    Attributes:
        sources: draft hidden states `[N, H]` of each TTT step. weight: the draft's `lm_head` `[V_draft, H]`.
        states, head: the target's hidden states `[N, H]`, and its head with the draft rows sliced.
        probs: instead of these, p on the draft vocabulary `[N + K - 1, V_draft]`.
        pairs: row t of step k against target row t + k.
    """

    sources: list[Tensor]
    weight: Tensor
    states: Tensor
    head: fused_lk.TargetHead
    probs: Tensor | None
    pairs: fused_lk.Pairs | None

    @classmethod
    def of(cls, shape: Shape) -> Inputs:
        """Fake tensors, inside `full_size`."""
        n, h, k = shape.num_tokens, shape.hidden_size, shape.ttt_steps
        with real():
            vocab, pairs = None, None
            if shape.draft_vocab_size != shape.target_vocab_size:
                vocab = fused_lk.DraftVocab(torch.arange(shape.target_vocab_size) < shape.draft_vocab_size)
            if k > 1:
                steps = torch.arange(k).unsqueeze(1).expand(k, n)
                rows = torch.arange(n) + steps
                pairs = fused_lk.Pairs(None, rows if shape.probs else torch.where(rows < n, rows, -1), steps, k)

        def empty(*size: int) -> Tensor:
            return torch.empty(*size, dtype=shape.dtype)

        return cls(
            [empty(n, h).requires_grad_() for _ in range(k)],
            empty(shape.draft_vocab_size, h).requires_grad_(not shape.frozen_head),
            empty(n, h),
            fused_lk.TargetHead(empty(shape.target_vocab_size, h), vocab),
            torch.empty(n + k - 1, shape.draft_vocab_size) if shape.probs else None,
            pairs,
        )


Step = Callable[[Inputs], Tensor | tuple[Tensor, ...]]  # as `account` takes it


def eager(x: Inputs) -> tuple[Tensor, ...]:
    """LK-lambda as a training script writes it: target and logits have names that live until the backward is done."""
    kept = []
    if x.probs is None:
        logits = F.linear(x.states, x.head.weight)
        t = logits.float()
        on_draft = t if x.head.vocab is None else t[:, x.head.vocab.target_ids]
        p = torch.exp(on_draft - t.logsumexp(-1, keepdim=True))
        pt = torch.softmax(on_draft, -1)
        if len(x.sources) > 1:  # step k reads k rows further on
            p, pt = (F.pad(y, (0, 0, 0, len(x.sources) - 1), value=1 / y.shape[1]) for y in (p, pt))
        kept += [logits, t, on_draft, p, pt]
    else:
        p = pt = x.probs
    total = torch.zeros(())
    for k, hidden in enumerate(x.sources):
        z = F.linear(hidden, x.weight)
        rows = slice(k, k + z.shape[0])
        kl = -(pt[rows] * F.log_softmax(z.float(), -1)).sum(-1).mean()
        acceptance = torch.minimum(p[rows], torch.softmax(z.float(), -1)).sum(-1).mean()
        kl_weight = torch.exp(-3 * acceptance.detach())
        total = total + kl_weight * kl + (1 - kl_weight) * (1 - acceptance)
        kept.append(z)
    return total, *kept


def target_probs(x: Inputs) -> tuple[Tensor, Tensor]:
    """p on the draft vocabulary, and p renormalised on it, as SpecForge makes them; padded so that step k reads k rows
    further on."""
    if x.probs is not None:
        return x.probs, x.probs
    t = F.linear(x.states, x.head.weight).float()
    on_draft = t if x.head.vocab is None else t[:, x.head.vocab.target_ids]
    pt = torch.softmax(on_draft, -1)
    p = torch.exp(on_draft - torch.logsumexp(t, -1, keepdim=True))
    more = len(x.sources) - 1
    return (p, pt) if more == 0 else tuple(F.pad(y, (0, 0, 0, more), value=1 / y.shape[1]) for y in (p, pt))


def lk_lambda(z: Tensor, p: Tensor, pt: Tensor) -> Tensor:
    """The loss of one step from full logits, lambda per position."""
    kl = -(pt * F.log_softmax(z.float(), -1)).sum(-1).mean()
    acceptance = torch.minimum(p, torch.softmax(z.float(), -1)).sum(-1).mean()
    kl_weight = torch.exp(-3 * acceptance.detach())
    return kl_weight * kl + (1 - kl_weight) * (1 - acceptance)


def specforge(x: Inputs) -> Tensor:
    """As SpecForge 0.2.0 writes it: probabilities once, then each step's logits and loss."""
    p, pt = target_probs(x)
    n = x.sources[0].shape[0]
    losses = [lk_lambda(F.linear(h, x.weight), p[k : k + n], pt[k : k + n]) for k, h in enumerate(x.sources)]
    return torch.stack(losses).sum()


def speculators(x: Inputs) -> Tensor:
    """As vLLM speculators 0.9.0 writes `lk_hybrid` in PyTorch: both softmaxes from logits, for each term and step."""
    if x.probs is not None:
        raise ValueError("speculators takes target logits, not probabilities")
    t = F.linear(x.states, x.head.draft_weight)
    more = len(x.sources) - 1
    t = F.pad(t, (0, 0, 0, more)) if more else t
    total = torch.zeros(())
    for k, hidden in enumerate(x.sources):
        z, rows = F.linear(hidden, x.weight), t[k : k + hidden.shape[0]]
        q = torch.softmax(z, -1, dtype=torch.float32)
        pt = torch.softmax(rows, -1, dtype=torch.float32)
        overlap = torch.minimum(q, pt).sum(-1)
        log_q = F.log_softmax(z, -1, dtype=torch.float32)
        kl = F.kl_div(log_q, torch.softmax(rows, -1, dtype=torch.float32), reduction="none").sum(-1)
        weight = torch.exp(-3 * overlap.detach())
        total = total + (weight * kl + (1 - weight) * (1 - overlap)).mean()
    return total


def checkpointed(x: Inputs, rows: int = 1024) -> Tensor:
    """The eager loss of 1,024 tokens at a time, recomputed in the backward: lambda per chunk, dW summed in the compute
    dtype."""

    def of_chunk(hidden: Tensor, weight: Tensor, at: slice) -> Tensor:
        if x.probs is not None:
            p = pt = x.probs[at]
        else:
            p, pt = target_probs(replace(x, states=x.states[at], sources=x.sources[:1]))
        return lk_lambda(F.linear(hidden, weight), p[: hidden.shape[0]], pt[: hidden.shape[0]])

    total = torch.zeros(())
    for k, hidden in enumerate(x.sources):
        for start in range(0, hidden.shape[0] - (0 if x.probs is not None else k), rows):
            part = hidden[start : min(start + rows, hidden.shape[0] - (0 if x.probs is not None else k))]
            at = slice(start + k, start + k + part.shape[0])
            total = total + checkpoint(of_chunk, part, x.weight, at, use_reentrant=False, preserve_rng_state=False)
    return total


def ours(plan: str, impl: str = "triton") -> Step:
    """fused_lk's LK-lambda in `plan`; the weight of KL is given where the gradient is made in the forward."""

    def step(x: Inputs) -> Tensor:
        if x.probs is None:
            target = fused_lk.Target.from_hidden(x.states, x.head, impl=impl)
        else:
            target = fused_lk.Target.from_probs(x.probs)
        given = 0.5 if plan == "one_pass" else None
        sources = x.sources[0] if x.pairs is None else x.sources
        return fused_lk.lk_loss(sources, x.weight, target, pairs=x.pairs, kl_weight=given, plan=plan, impl=impl).loss

    return step


def accounted(shape: Shape, step: Step, device: str = "cuda") -> Accounted:
    """The step at full size, walking as on `device`."""
    with full_size(device):
        inputs = Inputs.of(shape)
        return account(lambda: step(inputs))


PROVIDERS: dict[str, Step] = {
    "eager": eager,
    "eager, as SpecForge": specforge,
    "eager, as speculators": speculators,
    "eager, chunked and checkpointed": checkpointed,
    "fused_lk, recompute": ours("recompute"),
    "fused_lk, one pass": ours("one_pass"),
}

Row = tuple[str, str, str, str, str]
HEADER: Row = ("shape", "provider", "peak GiB", "held GiB", "matrix products")


def rows() -> Iterator[Row]:
    """One per shape and provider; products in units of the draft's `[pairs, H] @ [H, V]`."""
    for shape in SHAPES:
        product = 2 * shape.ttt_steps * shape.num_tokens * shape.hidden_size * shape.draft_vocab_size
        for name, step in PROVIDERS.items():
            if shape.probs and step is speculators:
                continue
            seen = accounted(shape, step)
            yield (
                shape.name,
                name,
                f"{seen.peak / GIB:.2f}",
                f"{seen.after_forward / GIB:.2f}",
                f"{seen.gemm_flops / product:.2f}",
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write the table here as well")
    path = parser.parse_args().csv
    table = list(rows())
    print_markdown(HEADER, table)
    if path is not None:
        write_csv(path, HEADER, table)


if __name__ == "__main__":
    main()
