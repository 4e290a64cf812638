"""Opt-in: tiles chosen by timing (FUSED_LK_AUTOTUNE=1), once per process, kernel, vocabulary size and dtypes.

Off by default, because it costs up to a second at each of those occasions, and because another tile adds up a row in
another order: the last bits of a loss then depend on what was measured. The number of tokens is not part of the key.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import triton

# Trials run in place, over the caller's logits: what they write has to be put back before the next one.
WRITTEN = {"lse_argmax": [], "row_stats": [], "row_grad": ["gradient_ptr"]}


def enabled() -> bool:
    """Whether the environment asks for it."""
    return os.environ.get("FUSED_LK_AUTOTUNE", "0") == "1"


@functools.cache
def tuned(name: str, kernel: Any, tiles: tuple[tuple[int, int], ...], warp_size: int) -> Any:
    """`kernel`, which takes BLOCK_V and its number of warps from the fastest of `tiles` (columns, threads)."""
    return triton.autotune(
        [triton.Config({"BLOCK_V": block_v}, num_warps=threads // warp_size) for block_v, threads in tiles],
        key=["n_cols"],
        restore_value=WRITTEN[name],
    )(kernel)
