"""Exact accounting of one training step: the peak of live tensor bytes beyond the inputs, and every matrix product.

A dispatch mode counts each storage once, from the operation that makes it until the last tensor on it is gone. It sees
inside autograd functions and, on a CPU, inside the backward. On fake tensors (`full_size`) nothing is allocated or
computed, so shapes of any size are accounted in seconds on any machine. Work lists and vocabularies are made outside
(`real`): their values decide what is done.

What it cannot see: scratch memory inside one operation, and the bodies of registered custom operators, which it
refuses.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

GIB = 2**30
_ITEM = torch.ops.aten._local_scalar_dense.default
_NAMESPACES = ("aten", "prim", "prims", "profiler")
_GEMMS = ("mm", "addmm", "bmm", "baddbmm")
_VIEWS = ("detach", "alias", "_unsafe_view", "lift_fresh")
_PICKS = ("index", "index_select", "gather", "slice_backward", "index_copy_", "index_put_")


class Gemm(NamedTuple):
    """One matrix product `[m, k] @ [k, n]`, `batch` times."""

    m: int
    n: int
    k: int
    batch: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k


class Work(NamedTuple):
    """One operation: the arithmetic of a matrix product, and the bytes of tensors read and written, each once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Accounted:
    """What a step did. Bytes are those of live tensors beyond the inputs.

    Attributes:
        peak: the most at any time. after_forward, after_backward: what is held when either is done, outputs included.
        forward_gemms, backward_gemms: the matrix products, in order.
        work: of each operation that reads or writes anything, launches of Triton kernels among them.
        operations: how many operations ran.
        at_peak: `(bytes, shape, operation that made it)` of what was alive at the peak, largest first.
    """

    peak: int
    after_forward: int
    after_backward: int
    forward_gemms: tuple[Gemm, ...]
    backward_gemms: tuple[Gemm, ...]
    work: tuple[Work, ...]
    operations: int
    at_peak: tuple[tuple[int, tuple[int, ...], str], ...]

    @property
    def gemm_flops(self) -> int:
        return sum(x.flops for x in (*self.forward_gemms, *self.backward_gemms))


class Accounting(TorchDispatchMode):
    """`with Accounting() as seen:` keeps `seen.live_bytes`, `seen.peak` and `seen.gemms` up to date.

    A storage counts if an operation made it under the mode: what existed before is an input, and what shares an
    argument's storage (a view, an `out=`) is nothing new.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak = self.operations = 0
        self.gemms: list[Gemm] = []
        self.work: list[Work] = []
        self.at_peak: tuple[tuple[int, tuple[int, ...], str], ...] = ()
        self._live: dict[int, tuple[int, tuple[int, ...], str]] = {}  # by address of the storage
        self._watchers: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in _NAMESPACES:
            raise RuntimeError(f"{func} hides what its body allocates; account the body, not the registered operator")
        self.operations += 1
        name = func._schema.name.removeprefix("aten::")
        if name in _GEMMS:
            self.gemms.append(_gemm(args[1:3] if "add" in name else args[:2]))
            flops = self.gemms[-1].flops
        else:
            flops = 0
        if func is _ITEM and isinstance(args[0], FakeTensor):
            return False  # no row needs another path; see fused_lk.rows.terms.any_row
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func._overloadname == "dtype_out":  # a product's own float32 result: without kernel or shape rule on a CPU
            self.work.append(Work(flops, sum(x.nbytes for x in tensors)))
            return kwargs["out"]
        if tensors and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():  # index arithmetic of work lists and vocabularies, whose values matter
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        given = {_address(x) for x in tensors}
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if made and not (func.is_view or "empty" in name or name in _VIEWS):
            written = sum(x.nbytes for x in made)
            picks = name in _PICKS  # reads what it writes, not all that it is given
            given_out = kwargs.get("out")
            read = written if picks else sum(x.nbytes for x in tensors if x is not given_out)
            self.work.append(Work(flops, read + written))
        for x in made:
            if _address(x) not in given and _address(x) not in self._live:
                self._add(x, str(func))
        if self.live_bytes > self.peak:
            self.peak = self.live_bytes
            self.at_peak = tuple(self._live.copy().values())  # a copy, because garbage collection may drop entries
        return out

    def _add(self, x: Tensor, made_by: str) -> None:
        storage, at = x.untyped_storage(), _address(x)
        self._live[at] = (storage.nbytes(), tuple(x.shape), made_by)
        self._watchers[at] = weakref.ref(storage, lambda _: self._drop(at))
        self.live_bytes += storage.nbytes()

    def _drop(self, at: int) -> None:
        self.live_bytes -= self._live.pop(at)[0]
        del self._watchers[at]


def account(step: Callable[[], Tensor]) -> Accounted:
    """Account `step()`, which returns a scalar, and the backward of that scalar."""
    with Accounting() as seen:
        loss = step()
        after_forward, in_forward = seen.live_bytes, len(seen.gemms)
        loss.backward()
        del loss
        after_backward = seen.live_bytes
    return Accounted(
        peak=seen.peak,
        after_forward=after_forward,
        after_backward=after_backward,
        forward_gemms=tuple(seen.gemms[:in_forward]),
        backward_gemms=tuple(seen.gemms[in_forward:]),
        work=tuple(seen.work),
        operations=seen.operations,
        at_peak=tuple(sorted(seen.at_peak, reverse=True)),
    )


@contextlib.contextmanager
def full_size(device: str = "cpu", fake: bool = True) -> Iterator[None]:
    """Tensors made inside are fake, and Triton kernels are not launched (they write into what exists already).

    `device="cuda"` walks as on a GPU (its chunk sizes, its products with float32 results) on fake CPU tensors: without
    a CUDA build of PyTorch the autograd engine refuses fake CUDA tensors. `fake=False` leaves tensors real: small ones
    show what the host does without the kernels, whose results are then unwritten memory.
    """
    from fused_lk.kernels import launch

    from fused_lk import gemm, wide

    with contextlib.ExitStack() as stack:
        for name, stub in (("_launch", _launched), ("check_device", _nothing)):
            stack.enter_context(mock.patch.object(launch, name, stub))
        if device != "cpu":
            stack.enter_context(mock.patch.object(gemm, "is_cpu", return_value=False))
            stack.enter_context(mock.patch.object(wide, "gives_float32", _on_a_gpu))
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _launched(name: str, shape: torch.Size, width: int, arguments: tuple, *_: Any, **__: Any) -> None:
    """A kernel reads and writes each tile that it is given once; vectors are small beside them."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Accounting):
            tiles = (x for x in arguments if isinstance(x, Tensor) and x.ndim == 2)
            mode.work.append(Work(0, sum(x.nbytes for x in tiles)))


def _on_a_gpu(product: str, _: torch.device, dtype: torch.dtype) -> bool:
    from fused_lk.wide import by_release

    return dtype.itemsize == 2 and by_release(product)


def _nothing(*_: Any, **__: Any) -> None:
    """Not a Mock, which would hold the tensors that it was called with."""


real = unset_fake_temporarily


def _address(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _gemm(factors: tuple[Tensor, Tensor]) -> Gemm:
    a, b = factors
    return Gemm(a.shape[-2], b.shape[-1], a.shape[-1], math.prod(a.shape[:-2]))
