"""Functions that `torch.compile` does not look into.

Work in chunks, whose sizes only the host knows, cannot be traced. It can be one operator of a graph. An eager call runs
the plain function, without a dispatcher in between, and dispatch modes (memory accounting) see all that it does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def opaque(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: the function in eager mode, the operator `fused_lk::<its name>` under `torch.compile`.

    The function must neither change an argument nor return one. `schema` is written out, because releases of PyTorch
    differ in what they infer from annotations. The operator is `.operator`. `.register_fake` and `.register_autograd`
    are those of the operator.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        name = f"fused_lk::{function.__name__}"
        operator = torch.library.custom_op(name, function, mutates_args=(), schema=schema)

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return operator(*arguments) if torch.compiler.is_compiling() else function(*arguments)

        call.operator = operator  # type: ignore[attr-defined]
        call.register_fake = operator.register_fake  # type: ignore[attr-defined]
        call.register_autograd = operator.register_autograd  # type: ignore[attr-defined]
        return call

    return decorate
