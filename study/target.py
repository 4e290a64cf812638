"""The target: SmolLM2-135M-Instruct, out of a package of 95 MB, made a model of `transformers` once and kept.

Settings: folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def run(settings: Any) -> None:
    """The stage: convert the model, where `folder/target` has none."""
    raise NotImplementedError


def load(settings: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """`(model, tokenizer)` of `folder/target`: frozen, in eval mode, in `dtype` (the weights are bf16 numbers)."""
    raise NotImplementedError


def layers(config: Any) -> tuple[int, int, int]:
    """The low, middle and high layer whose outputs a draft reads: EAGLE-3's choice."""
    raise NotImplementedError


def end_token(tokenizer: Any) -> int:
    """What ends an answer."""
    return int(tokenizer.eos_token_id)


def folder(settings: Any) -> Path:
    return Path(settings.folder) / "target"
