"""Accounted memory of one training step at full size: `python -m bench.memory`.

The figure is the peak of live tensor bytes beyond the inputs, forward and backward. Nothing is allocated or computed
(see `bench.accounting`), so the figures do not depend on the machine. Our losses walk as on a GPU. The eager losses are
those of `bench.eager`, which `bench.providers` also times. PyTorch does not see inside the Triton kernels of others.
SpecForge's KL is written out there. speculators' fused losses, its default, allocate in Python alone: `fused` allocates
the same, and `tests/test_accounting.py` compares it with them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_lk

from . import eager, shapes
from .accounting import GIB, Accounted, account, full_size, real
from .providers import Loss, plain
from .shapes import Inputs
from .tables import print_markdown, write_csv


@dataclass(frozen=True)
class Shape(shapes.Shape):
    """One training step.

    Attributes:
        frozen_head: the draft's head takes no gradient.
        probs: the target comes as probabilities on the draft vocabulary, not as hidden states.
    """

    frozen_head: bool = False
    probs: bool = False


SHAPES = (
    Shape("8,192 tokens, V 32,000", 8192, 4096, 32000, 32000),
    Shape("8,192 tokens, V 32,000, 7 TTT steps", 8192, 4096, 32000, 32000, ttt_steps=7, probs=True),
    Shape("8,192 tokens, V 151,936", 8192, 4096, 151936, 151936),
    Shape("8,192 tokens, V 151,936, frozen head", 8192, 4096, 151936, 151936, frozen_head=True),
    Shape("8,192 tokens, V 32,000 of 128,256", 8192, 4096, 32000, 128256),
    Shape("8,192 tokens, V 32,000 of 128,256, 7 TTT steps", 8192, 4096, 32000, 128256, ttt_steps=7),
)


def make_inputs(shape: Shape) -> Inputs:
    """What exists before a step, and is not counted. Inside `full_size` the tensors are fake."""
    inputs = shapes.make_inputs(shape)
    inputs.draft_weight.requires_grad_(not shape.frozen_head)
    if not shape.probs:
        return inputs
    rows = shape.num_tokens + shape.ttt_steps - 1
    return replace(inputs, target_probs=torch.rand(rows, shape.draft_vocab_size).div_(shape.draft_vocab_size))


Prepare = Callable[[Inputs], Loss]  # as in `bench.providers`: what it makes beforehand is not counted


def ours(plan: str, impl: str = "triton") -> Prepare:
    """fused_lk's LK-lambda in `plan`; the weight of KL is given where the gradient is made in the forward.

    The head is sliced and the pair list is made beforehand.
    """
    kl_weight = 0.5 if plan == "one_pass" else None

    def prepare(inputs: Inputs) -> Loss:
        with real():
            vocab = None if inputs.t2d is None else fused_lk.DraftVocab(inputs.t2d)
            pairs = inputs.pairs()
        head = fused_lk.TargetHead(inputs.target_weight, vocab)

        def loss() -> torch.Tensor:
            if inputs.target_probs is None:
                target = fused_lk.Target.from_hidden(inputs.target_hidden, head, impl=impl)
            else:
                target = fused_lk.Target.from_probs(inputs.target_probs)
            options = {"kl_weight": kl_weight, "plan": plan, "impl": impl}
            return fused_lk.lk_loss(inputs.draft_hidden, inputs.draft_weight, target, pairs=pairs, **options).loss

        return loss

    return prepare


class _Fused(torch.autograd.Function):
    """The allocations of one of speculators' fused losses: it keeps both logits and five numbers per row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        loss, stats = (logits.new_empty(*size, len(logits), dtype=torch.float32) for size in ((), (5,)))
        ctx.save_for_backward(logits, targets, stats)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


def fused(inputs: Inputs) -> Tensor:
    """`lk_hybrid` as speculators' fused losses, without values: KL and TV are a kernel each, forward and backward."""
    with torch.no_grad():
        targets = F.linear(inputs.target_hidden, inputs.target_draft_weight)

    def row_loss(logits: Tensor, targets: Tensor) -> Tensor:
        kl, tv = _Fused.apply(logits, targets), _Fused.apply(logits, targets)
        kl_weight = torch.exp(-eager.ETA * (1.0 - tv).detach())
        return kl_weight * kl + (1.0 - kl_weight) * tv

    return eager.over_steps(inputs, targets, row_loss)


def accounted(shape: Shape, prepare: Prepare, device: str = "cuda") -> Accounted:
    """The step at full size, walking as on `device`."""
    with full_size(device):
        return account(prepare(make_inputs(shape)))


SPECFORGE, SPECULATORS, FUSED = "eager, as SpecForge", "eager, as speculators", "fused, as speculators"
PROVIDERS: dict[str, Prepare] = {
    SPECFORGE: plain(eager.specforge),
    SPECULATORS: plain(eager.speculators),
    FUSED: plain(fused),
    "eager, chunked and checkpointed": plain(eager.checkpointed),
    "fused_lk, recompute": ours("recompute"),
    "fused_lk, one pass": ours("one_pass"),
}


def providers_of(shape: Shape) -> dict[str, Prepare]:
    """Those that can serve the shape: speculators takes no probabilities."""
    return {name: x for name, x in PROVIDERS.items() if not (shape.probs and name in (SPECULATORS, FUSED))}


Row = tuple[str, str, str, str, str]
HEADER: Row = ("shape", "provider", "peak GiB", "held GiB", "matrix products")


def rows() -> Iterator[Row]:
    """One per shape and provider; products in units of the draft's `[pairs, H] @ [H, V]`."""
    for shape in SHAPES:
        product = 2 * shape.ttt_steps * shape.num_tokens * shape.hidden_size * shape.draft_vocab_size
        for name, prepare in providers_of(shape).items():
            seen = accounted(shape, prepare)
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
