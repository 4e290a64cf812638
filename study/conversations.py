"""Conversations out of JSONL files, and what a draft is trained on: token ids, and which of them are the assistant's.

A line is one of

    {"messages": [{"role": "user", "content": "..."}, ...]}
    {"conversations": [{"from": "human", "value": "..."}, ...]}                        as ShareGPT has them
    {"conversation": [{"role": ...}, ...], "generated_message": {"role": ...}}         completions of Infinity-Instruct

each with an `id` or without. A line that is none of these is skipped, and said so with its number.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLES = {
    "system": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
}  # fmt: skip
NAMES = (("role", "content"), ("from", "value"))  # of a turn's two parts

Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """Turns of user and assistant, the user's first, behind a system message or none."""

    id: str
    messages: tuple[Message, ...]

    @property
    def asked(self) -> tuple[Message, ...]:
        """Without an answer at the end."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages


@dataclass(frozen=True)
class Text:
    """A conversation as the target reads it."""

    token_ids: list[int]
    answers: list[tuple[int, int]]  # from, to: the tokens of each assistant's turn, the one that ends it included

    @property
    def mask(self) -> list[bool]:
        """True for the tokens that the target wrote, or would have: those which a draft learns to propose."""
        mask = [False] * len(self.token_ids)
        for start, stop in self.answers:
            mask[start:stop] = [True] * (stop - start)
        return mask


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


def load(path: Path, report: Callable[[str], None] = _to_stderr) -> Iterator[Conversation]:
    """The conversations of a file. `report` is told of each line that is skipped, and of how many there were."""
    skipped = 0
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield parse(json.loads(line), f"{Path(path).stem}-{number}")
            except ValueError as error:  # of JSON and UTF-8, too
                skipped += 1
                report(f"{path}, line {number}, skipped: {error}")
    if skipped:
        report(f"{path}: {skipped:,} lines skipped")


def parse(row: Any, name: str) -> Conversation:
    """One line's conversation; it is called `name`, where it has no id. ValueError: it is none."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    key = next((key for key in ("messages", "conversations", "conversation") if key in row), None)
    if key is None:
        raise ValueError(f"expected `messages`, `conversations` or `conversation`, got {sorted(row)}")
    turns = row[key]
    if not isinstance(turns, list):
        raise ValueError(f"expected a list in `{key}`, got {type(turns).__name__}")
    if key == "conversation":
        if "generated_message" not in row:
            raise ValueError("expected `generated_message` beside `conversation`, got none")
        turns = [*turns, row["generated_message"]]
    messages = tuple(_message(turn, at) for at, turn in enumerate(turns))
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken != [("user", "assistant")[i % 2] for i in range(len(spoken))]:
        raise ValueError(f"expected turns of user and assistant, the user's first, got {roles}")
    return Conversation(str(row.get("id", name)), messages)


def _message(turn: Any, at: int) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"expected an object in turn {at}, got {type(turn).__name__}")
    for role, content in NAMES:
        if role in turn and content in turn:
            break
    else:
        raise ValueError(f"expected role and content, or from and value, in turn {at}, got {sorted(turn)}")
    if not isinstance(turn[role], str) or turn[role].lower() not in ROLES:
        raise ValueError(f"expected a role of {sorted(ROLES)} in turn {at}, got {turn[role]!r}")
    if not isinstance(turn[content], str) or not turn[content].strip():
        raise ValueError(f"expected text in turn {at}, got {turn[content]!r}")
    return {"role": ROLES[turn[role].lower()], "content": turn[content]}


def render(messages: Sequence[Message], tokenizer: Any, ask: bool = False) -> str:
    """The chat template's text; with `ask`, up to where the assistant's answer begins."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)


def ids(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them


def prompt(conversation: Conversation, tokenizer: Any) -> list[int]:
    """The tokens that the target is asked with, to answer the user's last turn."""
    return text(Conversation(conversation.id, conversation.asked), tokenizer, ask=True).token_ids


def text(conversation: Conversation, tokenizer: Any, ask: bool = False) -> Text:
    """A conversation's tokens. ValueError: the template writes a turn in another way once there are later ones.

    What comes before an answer, and the answer, are made tokens apart, as they are when the target answers.
    """
    messages = conversation.messages
    whole, done, token_ids, answers = render(messages, tokenizer, ask), 0, [], []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:at], tokenizer, ask=True)
        after = render(messages[: at + 1], tokenizer).rstrip()  # a line's end comes after what ends the answer
        if not (whole.startswith(before) and whole.startswith(after) and done <= len(before) < len(after)):
            raise ValueError(f"expected a chat template that keeps earlier turns as they are, got another turn {at}")
        token_ids += ids(whole[done : len(before)], tokenizer)
        start, done = len(token_ids), len(after)
        token_ids += ids(whole[len(before) : done], tokenizer)
        answers.append((start, len(token_ids)))
    return Text(token_ids + ids(whole[done:], tokenizer), answers)
