"""Text as it is accepted: what the draft proposed and the target accepted stands out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

ON_TERMINAL, ELSEWHERE = ("\x1b[1;32m", "\x1b[0m"), ("[", "]")


class Show:
    """Prints an answer while it is decoded: the `watch` of `study.decode.decode`, for one prompt.

    Args:
        tokenizer: of transformers.
        out: a terminal gets colours (unless NO_COLOR is set), anything else brackets.
    """

    def __init__(self, tokenizer: Any, out: TextIO | None = None) -> None:
        self.tokenizer, self.out = tokenizer, out or sys.stdout
        coloured = self.out.isatty() and "NO_COLOR" not in os.environ
        self.marks = ON_TERMINAL if coloured else ELSEWHERE
        self.tokens: list[int] = []
        self.shown = 0  # characters

    def __call__(self, prompt: int, tokens: Sequence[int], accepted: int) -> None:
        """A round's tokens, of which the first `accepted` are the draft's."""
        self._add(tokens[:accepted], self.marks)
        self._add(tokens[accepted:], ("", ""))
        self.out.flush()

    def _add(self, tokens: Sequence[int], marks: tuple[str, str]) -> None:
        self.tokens += tokens
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        new = text[self.shown :]
        if not new or new.endswith("\ufffd"):  # a character whose last bytes are in the next token
            return
        self.shown = len(text)
        self.out.write(f"{marks[0]}{new}{marks[1]}")
