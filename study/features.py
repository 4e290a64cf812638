"""What the target says of the answers, on disk: a draft is trained on files, and the target runs over each text once.

`folder/features/train` and `folder/features/heldout` hold (N tokens, H the target's hidden size):

    meta.json           num_tokens, hidden_size, layers, vocab_size
    token_ids.npy       int32 [N]
    mask.npy            bool [N], true where the token is one of an answer
    sequence_ids.npy    int32 [N], one number a conversation, ascending
    fused.npy           uint16 [N, 3 H], bits of bf16: outputs of the low, middle and high layer, side by side
    last.npy            uint16 [N, H], bits of bf16: the lm_head's input

Row i is of the state that has read token i, so it predicts token i + 1.
Settings: folder, sequence_length, feature_batch, draft_vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """The arrays of one folder, memory-mapped."""

    token_ids: np.ndarray
    mask: np.ndarray
    sequence_ids: np.ndarray
    meta: dict[str, Any]

    def fused(self, at: slice) -> Tensor:
        """bf16 [n, 3 H]"""
        raise NotImplementedError

    def last(self, at: slice) -> Tensor:
        """bf16 [n, H]"""
        raise NotImplementedError


def open(path: Path) -> Features:
    raise NotImplementedError


def folder(settings: Any, split: str) -> Path:
    """Of "train" or "heldout"."""
    return Path(settings.folder) / "features" / split


def run(settings: Any) -> None:
    """The stage: features of both splits, and the draft's vocabulary."""
    raise NotImplementedError


def vocabulary(settings: Any) -> Tensor:
    """t2d, bool [V]: the `draft_vocab_size` tokens that the training answers have most often; kept in `folder`."""
    raise NotImplementedError
