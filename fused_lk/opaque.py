"""Functions that `torch.compile` does not look into.

What is done in chunks, with sizes that only the host knows, cannot be traced; it can be one operator of a graph. Eager
calls run the plain function: no dispatcher in between, and dispatch modes (memory accounting) see all that it does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def opaque(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: the function in eager mode, the operator `fused_lk::<its name>` under `torch.compile`.

    The function must not change its arguments nor return one. `schema` is written out because its inference from
    annotations differs between releases of PyTorch. The operator is `.operator`; `.register_fake` and
    `.register_autograd` are its own.
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
