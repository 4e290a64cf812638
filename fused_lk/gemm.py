"""The matrix products: what they compute in, the tiles that they write into, and how large those may be."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import wide

MIB = 2**20

# The bound on the two tiles of logits together. It is large enough for products at full speed, and small beside any
# model.
DEFAULT_WORKSPACE_MB = 256

# On a CPU tiles above 32 MiB go back to the kernel when freed (glibc's largest mmap threshold), and every page
# of the next one faults: 20 ms per 64 MiB, a quarter of a GEMM. Measured at 1,024 x 256 x 32,000: 256, 64, 48, 32 MiB
# take 1.30, 1.14, 1.16, 1.18 s of one thread for the recompute plan.
CPU_WORKSPACE_MB = 64

# Elements. A row of any vocabulary then starts on a 128-byte boundary in every dtype of two bytes or more, so that
# rows of odd vocabularies are loaded 128 bits at a time too.
ROW_ALIGNMENT = 64

# Elements (32 MiB in float32) of an upcast block of either factor where a device has no product with a float32 result,
# of a block of such a product where it cannot be added to a total, and of a dequantised block.
_BLOCK_ELEMENTS = 2**23


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that `torch.nn.functional.linear` would compute `x` in: its own, or that of the `torch.autocast` around
    it. Autocast leaves float64 alone."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """What sums are accumulated in: float32, or float64 where one of `dtypes` is."""
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which dW is held until its scale is known. Float16 would flush small numbers to 0 before that."""
    return wide_dtype(dtype) if dtype == torch.float16 else dtype


def is_cpu(device: torch.device) -> bool:
    """Whether chunks are sized for a CPU's caches rather than for a GPU's memory traffic."""
    return device.type == "cpu"


def bound(given: int | None, device: torch.device) -> int:
    """The bytes that were given, or those of `workspace_mb="auto"`."""
    return MIB * (CPU_WORKSPACE_MB if is_cpu(device) else DEFAULT_WORKSPACE_MB) if given is None else given


def row_stride(columns: int) -> int:
    """Elements from one row of a tile to the next."""
    return -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT


def tile(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An unwritten `[rows, columns]` tile with a padded row stride.

    The padding is zero. On a CPU with AMX, `torch.mm` of bfloat16 rounds the inner dimension up: it reads a row beyond
    its last column, and multiplies what it finds there by 0. Unwritten memory may hold NaN.
    """
    whole = torch.empty(rows, row_stride(columns), dtype=dtype, device=device)
    if whole.shape[1] == columns:
        return whole
    whole[:, columns:].zero_()
    return whole[:, :columns]


def rows_of_a_tile(vocab_size: int, num_rows: int, itemsize: int, device: torch.device, budget: int | None) -> int:
    """The rows of a tile for a pass over `num_rows` rows, in the fewest equal pieces that fit the budget."""
    budget = bound(budget, device)
    most = max(1, budget // (row_stride(vocab_size) * itemsize))
    return max(1, -(-num_rows // max(1, -(-num_rows // most))))


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """`out = x @ weight.T + bias`. `out` has the dtype of `x`, or it is float32 and keeps the product's float32."""
    if out.dtype == x.dtype:
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)
    elif wide.gives_float32("mm", x.device, x.dtype):
        wide.overload("mm")(x, weight.t(), out.dtype, out=out)
        if bias is not None:
            out.add_(bias)
    else:
        upcast = x.to(out.dtype)
        step = block_rows(weight.shape[1])
        for start in range(0, weight.shape[0], step):
            # without a name, under which a block would outlive its turn
            torch.mm(upcast, weight[start : start + step].to(out.dtype).t(), out=out[:, start : start + step])
        if bias is not None:
            out.add_(bias)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, accumulated in `total`'s dtype, without a temporary of `total`'s size."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    elif wide.gives_float32("addmm", a.device, a.dtype):
        wide.overload("addmm")(total, a, b, total.dtype, out=total)
    elif wide.gives_float32("mm", a.device, a.dtype):
        step = block_rows(b.shape[1])
        part = total.new_empty(min(step, len(total)), b.shape[1])
        for rows, factor in zip(total.split(step), a.split(step), strict=True):
            product_into(part[: len(rows)], factor, b)
            rows.add_(part[: len(rows)])
    else:
        inner, step = _upcast_blocks(*b.shape)
        for first in range(0, b.shape[0], inner):
            upcast = b[first : first + inner].to(total.dtype)
            for start in range(0, a.shape[0], step):
                rows = total[start : start + step]
                torch.addmm(rows, a[start : start + step, first : first + inner].to(total.dtype), upcast, out=rows)
            del upcast


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out = a @ b`, rounded once into `out`'s dtype (that of `a`, or float32)."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif wide.gives_float32("mm", a.device, a.dtype):
        wide.overload("mm")(a, b, out.dtype, out=out)
    else:
        out.zero_()
        accumulate(out, a, b)


def accumulate_scratch(m: int, k: int, n: int, dtype: torch.dtype, total: torch.dtype, device: torch.device) -> int:
    """Bytes that `accumulate` of `[m, k] @ [k, n]` holds beside its arguments."""
    if dtype == total or wide.gives_float32("addmm", device, dtype):
        return 0
    if wide.gives_float32("mm", device, dtype):
        return min(m, block_rows(n)) * n * total.itemsize
    inner, step = _upcast_blocks(k, n)
    inner = min(k, inner)
    return (inner * n + min(m, step) * inner) * total.itemsize


def block_rows(columns: int) -> int:
    """Rows of a block of a weight that is made anew for a product: upcast, or dequantised."""
    return max(1, _BLOCK_ELEMENTS // max(columns, 1))


def _upcast_blocks(k: int, n: int) -> tuple[int, int]:
    """Rows of b `[k, n]`, and rows of a, that are upcast at a time."""
    inner = block_rows(n)
    return inner, max(1, _BLOCK_ELEMENTS // max(min(k, inner), n, 1))
