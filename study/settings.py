"""What a run of the study is made of: every number that a stage takes, in two sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

# The objectives that are compared: by name, how the report calls them, and what `fused_lk.lk_loss` is told.
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "kl": ("KL", {"objective": "kl"}),
    "alpha": ("LK-alpha", {"objective": "alpha"}),
    "lambda": ("LK-lambda", {"objective": "lambda", "eta": 3.0, "lambda_per": "position"}),
    "lambda-token": ("LK-lambda per token", {"objective": "lambda", "eta": 3.0, "lambda_per": "token"}),
    "lambda-10": ("LK-lambda, eta 10", {"objective": "lambda", "eta": 10.0, "lambda_per": "position"}),
    "tv": ("TV", {"objective": "tv"}),
    "half": ("KL / 2 + TV / 2", {"objective": "lambda", "kl_weight": 0.5}),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CHOICES: dict[str, dict[str, Any]] = {"losses": LOSSES, "dtype": DTYPES}


@dataclass(frozen=True)
class Settings:
    """One run. Lengths are in tokens, batches in rows, unless a name says otherwise."""

    name: str
    folder: Path = Path(".study")
    seed: int = 0  # of prompts, answers and decoding; training has `seeds`
    dtype: str = "float32"  # or "bfloat16": of all products, of the target's too
    device: str = "cpu"  # the only kind that it was run on

    # The texts. An answer's sequence is cut at `sequence_length`, prompt included; half the prompts are answered at
    # temperature 1, half greedily, as deployed drafts meet both.
    num_prompts: int = 6000
    num_heldout: int = 240  # prompts that no draft is trained on: for the held-out curves and for decoding
    prompt_tokens: int = 96  # at most; longer prompts are cut
    answer_tokens: int = 128  # at most
    answer_batch: int = 128
    answer_shard: int = 256  # prompts a file: what a kill loses at most
    feature_batch: int = 8  # rows of `sequence_length` tokens a target pass
    sequence_length: int = 512  # of a packed row
    draft_vocab_size: int = 8192
    # A JSONL file of conversations in place of the prompts that come with the study, and whether the target answers
    # them anew (their own answers are not what this target says).
    data: Path | None = None
    regenerate: bool = True

    # Training: one draft for each loss and seed.
    losses: tuple[str, ...] = tuple(LOSSES)
    seeds: tuple[int, ...] = (0, 1, 2)
    ttt_steps: int = 4
    train_tokens: int = 900_000  # tokens read, prompts included; several times over the texts, where they are fewer
    batch_rows: int = 1  # of `sequence_length`, a step
    learning_rate: float = 1e-3
    warmup: float = 0.04  # share of the steps
    clip: float = 1.0  # largest gradient norm
    position_decay: float = 0.8  # the paper's
    evaluations: int = 10  # on held-out texts, along the way
    checkpoints: int = 20  # along the way: what a kill loses at most is the time between two
    workspace_mb: float = 32.0
    keep_mb: float = 96.0  # logits of a step, for losses that wait for the batch: one product less

    # Decoding: K tokens a draft, as in SpecForge's report.
    draft_tokens: int = 7
    temperatures: tuple[float, ...] = (0.0, 1.0)
    decode_prompts: int = 64
    decode_tokens: int = 96  # of an answer, at most
    decode_batch: int = 8
    timed_prompts: int = 6  # one at a time, against plain decoding

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def steps(self) -> int:
        """Optimiser steps of one training."""
        return max(1, self.train_tokens // (self.batch_rows * self.sequence_length))


# FULL is a night on two cores; QUICK shows every stage in half an hour, and its drafts are young.
FULL = Settings("full")
QUICK = Settings(
    "quick",
    folder=Path(".study-quick"),
    num_prompts=480,
    num_heldout=48,
    answer_tokens=96,
    losses=("kl", "alpha"),
    seeds=(0,),
    train_tokens=120_000,
    evaluations=5,
    checkpoints=10,
    decode_prompts=32,
    decode_tokens=64,
    timed_prompts=3,
)


def fast_dtype(device: str) -> str:
    """bf16 on GPUs, and on processors that have tiles for it (AMX); elsewhere its products are emulated."""
    return "bfloat16" if device != "cpu" or torch.cpu._is_amx_tile_supported() else "float32"


def changed(settings: Settings, assignments: Sequence[str]) -> Settings:
    """`settings` after assignments such as "train_tokens=400000" and "seeds=0,1".

    Raises:
        ValueError: no such setting, or a value of another type.
    """
    known = {field.name: getattr(settings, field.name) for field in fields(settings)}
    known = {name: value for name, value in known.items() if type(value) in (int, float, str, tuple)}
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        if name not in known:
            raise ValueError(f"expected NAME=VALUE with a name of {', '.join(known)}; got {assignment!r}.")
        several = isinstance(known[name], tuple)
        kind = type(known[name][0] if several else known[name])
        try:
            given = [kind(part) for part in (text.split(",") if several else [text])]
        except ValueError:
            raise ValueError(f"expected a value of {kind.__name__} for {name}; got {text!r}.") from None
        if unknown := [value for value in given if value not in CHOICES.get(name, given)]:
            raise ValueError(f"expected {name} of {', '.join(CHOICES[name])}; got {unknown[0]!r}.")
        values[name] = tuple(given) if several else given[0]
    return replace(settings, **values)
