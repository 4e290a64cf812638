"""A watcher of allocations: the largest storage that any operation makes, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """`with Allocations() as seen:` fills `seen.storages` with (elements, shape, operation), in order.

    A result that shares storage with an argument (a view, an `out=`) is no allocation. The mode sees inside
    autograd functions and, on a CPU, inside the backward that runs under it; it cannot see inside registered custom
    operators, so tests also assert that it saw what must be there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[tuple[int, tuple[int, ...], str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and _storage(x) not in given:
                elements = x.untyped_storage().nbytes() // x.element_size()
                self.storages.append((elements, tuple(x.shape), str(func)))
        return out

    def at_least(self, elements: int) -> list[tuple[int, tuple[int, ...], str]]:
        """The allocations of so many elements or more."""
        return [made for made in self.storages if made[0] >= elements]

    def of_width(self, width: int) -> list[tuple[int, ...]]:
        """Shapes of what was allocated with a last dimension of `width`."""
        return [shape for _, shape, _ in self.storages if shape and shape[-1] == width]


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata
