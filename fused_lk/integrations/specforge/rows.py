"""What stands for logits that are never made, where SpecForge's own code goes on to reduce them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ... import checks

Asked = tuple[str, ...]
_PER_ROW = {"dim": -1, "reduction": "none", "label_smoothing": 0.0}


class Rows:
    """Rows of logits `[..., V]`: a shape, and numbers per row that are known of them.

    Operations on it are noted by name, as `("softmax", "max", "values")`. Where what was asked so far is among the
    `answers`, these numbers `[...]` are the result. Where it only begins one of them, another such object is. Anything
    else would need the logits, and is refused.
    """

    def __init__(self, shape: tuple[int, ...], answers: Mapping[Asked, Tensor], asked: Asked = ()) -> None:
        self.shape, self.answers, self.asked = torch.Size(shape), answers, asked

    def reshape(self, *shape: int) -> Rows:
        others = abs(math.prod(shape))
        sizes = tuple(self.shape.numel() // others if n == -1 else n for n in shape)
        return Rows(sizes, self.answers, self.asked)

    def reshape_as(self, other: Any) -> Rows:
        return self.reshape(*other.shape)

    def float(self) -> Rows:
        return self  # The numbers are in float32 already.

    def then(self, name: str, *_: Any, **how: Any) -> Any:
        asked = (*self.asked, name)
        if all(how.get(key, value) == value for key, value in _PER_ROW.items()):
            if asked in self.answers:
                return self.answers[asked].reshape(self.shape[:-1])
            if any(known[: len(asked)] == asked for known in self.answers):
                return Rows(self.shape, self.answers, asked)
        known = ", ".join(".".join(x) for x in self.answers) or "nothing"
        return checks.fail(
            f"{known} to be asked of logits, per row, as published",
            ".".join(asked),
            "Logits never exist here. Undo local changes to the trainer, or do not apply.",
            TypeError,
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return functools.partial(self.then, name)

    @property
    def values(self) -> Any:
        return self.then("values")

    def __sub__(self, other: Rows) -> Any:
        return self.then("sub", other)

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, arguments: Any = (), how: Any = None) -> Any:
        return arguments[0].then(function.__name__, *arguments[1:], **(how or {}))
