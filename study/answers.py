"""The target's answers to the prompts."""

from __future__ import annotations

from typing import Any


def run(settings: Any) -> None:
    """The stage: `folder/answers/train-00000.jsonl` and so on; `heldout-00000.jsonl`.

    A line: id, temperature, messages, prompt_ids, answer_ids.
    """
    raise NotImplementedError
