"""Shapes by name, scaling series over them, and the tensors of one.

The large shapes are those of published draft heads; the small ones run on any CPU in a second or less a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fused_lk

from .accounting import real


@dataclass(frozen=True)
class Shape:
    """One problem: `ttt_steps` draft states per token, all scored in one step of training.

    The draft row i of step k is scored against target row i + k, so that k rows of step k have no target.
    `masked_share` of the tokens is ignored (prompt, padding).
    """

    name: str
    num_tokens: int
    hidden_size: int
    draft_vocab_size: int
    target_vocab_size: int
    dtype: str = "bfloat16"
    ttt_steps: int = 1
    masked_share: float = 0.0

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def is_shared(self) -> bool:
        """Whether both models share one vocabulary."""
        return self.draft_vocab_size == self.target_vocab_size


# One attention-free step of each head. H and vocabularies: the models' configuration files; EAGLE-3 heads for Llama
# have 32,000 draft tokens, DFlash and MTP heads use the target's own vocabulary.
LARGE = (
    Shape("llama3.1-8b-eagle3", 8192, 4096, 32_000, 128_256),
    Shape("llama3.1-8b-eagle3-ttt7", 8192, 4096, 32_000, 128_256, ttt_steps=7),
    Shape("qwen3-8b-dflash", 8192, 4096, 151_936, 151_936),
    Shape("deepseek-v3-mtp", 4096, 7168, 129_280, 129_280),
)
SMALL = (
    Shape("cpu-gate", 1024, 256, 32_000, 32_000, "float32"),
    Shape("cpu-eagle3", 512, 256, 8_000, 32_064, "float32"),
    Shape("cpu-ttt3-masked", 512, 256, 8_000, 32_064, "float32", ttt_steps=3, masked_share=0.5),
    Shape("cpu-qwen-vocab", 256, 256, 151_936, 151_936, "float32"),
)
SHAPES = {shape.name: shape for shape in (*LARGE, *SMALL)}

# What grows, and through which values; everything else stays as in the base shape.
SERIES: dict[str, dict[str, tuple]] = {
    "cpu": {
        "num_tokens": (256, 512, 1024, 2048),
        "draft_vocab_size": (8_000, 16_000, 32_000, 64_000),
        "ttt_steps": (1, 2, 4, 7),
        "masked_share": (0.0, 0.25, 0.5, 0.75),
    },
    "gpu": {
        "num_tokens": (1024, 2048, 4096, 8192, 16_384),
        "draft_vocab_size": (32_000, 64_000, 128_256, 151_936, 248_320),
        "ttt_steps": (1, 2, 4, 7),
        "masked_share": (0.0, 0.25, 0.5, 0.75),
    },
}
SERIES_BASE = {
    "cpu": Shape("cpu-series", 512, 128, 16_000, 16_000, "float32"),
    "gpu": Shape("gpu-series", 4096, 4096, 32_000, 32_000),
}


def series(kind: str) -> Iterator[tuple[str, Shape]]:
    """`(what grows, shape)` for "cpu" or "gpu"; the two models share their vocabulary."""
    base = SERIES_BASE[kind]
    for field, values in SERIES[kind].items():
        for value in values:
            grown = {field: value}
            if field == "draft_vocab_size":
                grown["target_vocab_size"] = value
            yield field, replace(base, name=f"{base.name}-{field}-{value}", **grown)


def tiny(shape: Shape, dtype: str = "float32") -> Shape:
    """A shape of the same structure that the oracle does in milliseconds."""
    draft = 96
    target = draft if shape.is_shared else 160
    return replace(shape, num_tokens=48, hidden_size=16, draft_vocab_size=draft, target_vocab_size=target, dtype=dtype)


@dataclass
class Inputs:
    """The tensors of one problem. All of them exist before a step; none is part of its cost.

    Attributes:
        draft_hidden: `ttt_steps` leaves `[N, H]` that require a gradient. draft_weight: `[V_draft, H]`, likewise.
        target_hidden: `[N, H]`. target_weight: `[V_target, H]`.
        target_ids: int64 `[V_draft]`, the draft vocabulary as target ids; None: shared.
        t2d: bool `[V_target]`, the same as a mask; None: shared.
        target_draft_weight: `[V_draft, H]`, the rows of the target's head that the draft vocabulary has.
        mask: bool `[N]`, the tokens that count; None: all.
        target_probs: float32 `[N + K - 1, V_draft]`, probabilities that are given instead of target hidden states. Step
            k reads row i + k for its row i. None: the target comes from its hidden states.
    """

    shape: Shape
    draft_hidden: list[Tensor]
    draft_weight: Tensor
    target_hidden: Tensor
    target_weight: Tensor
    target_ids: Tensor | None
    t2d: Tensor | None
    target_draft_weight: Tensor
    mask: Tensor | None
    target_probs: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.draft_hidden, self.draft_weight]

    def step_mask(self, step: int) -> Tensor:
        """bool `[N]`: the draft rows of step `step` that count."""
        n = self.shape.num_tokens
        mask = torch.ones(n, dtype=torch.bool, device=self.target_hidden.device) if self.mask is None else self.mask
        return torch.nn.functional.pad(mask[step:], (0, step))

    def pairs(self) -> fused_lk.Pairs:
        """The work list of all steps."""
        n, steps = self.shape.num_tokens, self.shape.ttt_steps
        if steps == 1:
            # A list of one tensor stands for its stack.
            return fused_lk.Pairs(mask=None if self.mask is None else self.mask.unsqueeze(0))
        device = self.target_hidden.device
        rows = torch.arange(n, device=device) + torch.arange(steps, device=device).unsqueeze(1)
        mask = torch.stack([self.step_mask(k) for k in range(steps)])
        return fused_lk.Pairs(mask=mask, target_rows=torch.where(rows < n, rows, -1), position_dim=0)


def make_inputs(shape: Shape, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Random tensors of unit scale: logits of standard deviation 1, an acceptance rate of about a half."""
    torch.manual_seed(seed)
    dtype, n, h = shape.torch_dtype, shape.num_tokens, shape.hidden_size

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, dtype=dtype, device=device).mul_(scale)

    target_ids = t2d = mask = None
    with real():  # In `full_size` the other tensors are fake. These decide what is done, so they keep their values.
        if not shape.is_shared:
            target_ids = torch.randperm(shape.target_vocab_size, device=device)[: shape.draft_vocab_size].sort().values
            t2d = torch.zeros(shape.target_vocab_size, dtype=torch.bool, device=device).index_fill_(0, target_ids, True)
        if shape.masked_share:
            ignored = torch.randperm(n, device=device)[: round(shape.masked_share * n)]
            mask = torch.ones(n, dtype=torch.bool, device=device).index_fill_(0, ignored, False)
    target_weight = randn(shape.target_vocab_size, h, scale=h**-0.5)
    return Inputs(
        shape=shape,
        draft_hidden=[randn(n, h).requires_grad_() for _ in range(shape.ttt_steps)],
        draft_weight=randn(shape.draft_vocab_size, h, scale=h**-0.5).requires_grad_(),
        target_hidden=randn(n, h),
        target_weight=target_weight,
        target_ids=target_ids,
        t2d=t2d,
        target_draft_weight=target_weight if target_ids is None else target_weight[target_ids],
        mask=mask,
    )
