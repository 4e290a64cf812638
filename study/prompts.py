"""Prompts without a download."""

from __future__ import annotations

from typing import Any


def run(settings: Any) -> None:
    """The stage: `folder/prompts/train.jsonl` and `heldout.jsonl`, lines of `messages` with an `id`."""
    raise NotImplementedError
