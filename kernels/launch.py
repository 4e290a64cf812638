"""The Triton row operations: the interface of `fused_lk.rows`, the only launcher, and the only table of tiles."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from fused_lk import checks
from fused_lk.rows.interface import (
    EXCESS,
    MEASURED,
    TERMS,
    LogitRows,
    RowLoss,
    RowStats,
    Transform,
    accumulation_dtype,
    tie_width,
)

from . import autotune
from .lse_argmax import lse_argmax_kernel
from .row_grad import row_grad_kernel
from .row_pass import row_pass_kernel
from .row_stats import row_stats_kernel


class Tile(NamedTuple):
    """Columns that a program holds at a time, and the threads that hold them.

    Threads, not warps: a warp has 64 of them on MI300, and as many warps would leave each thread half a load.
    """

    block_v: int
    threads: int


# By kernel and bytes of the widest number in it: BLOCK_V = threads * (elements a thread). A thread loads 128 bits of
# each tensor at a time or a multiple of that, and the tile stays in registers (published: past 128 elements a thread it
# spills, and an A100 ran at 6 % of its bandwidth). Figures: the worst of A100, H100, B200 and all optional arguments,
# rows aligned, in `python -m bench.compile_report`.
TILES = {
    # Twice three numbers of state an element, for the columns inside and outside the draft vocabulary. 8 elements a
    # thread: at most 120 registers, 2 rows an SM; 16 take up to 187, one row an SM.
    "lse_argmax": {2: Tile(2048, 256), 4: Tile(2048, 256), 8: Tile(1024, 256)},
    # Ten numbers of state an element; 8 elements a thread are 128 bits of half precision. There at most 102 registers
    # let 2 rows share an SM (one ends while another loads; many more, and their second pass would miss the cache).
    # float32: 2,048 x 256 threads spills 8 bytes on an A100 without optional arguments, where ptxas makes room for a
    # third row; one row of 512 threads does not. float64: 2 elements are 128 bits; 4 and 8 spill on some card, with
    # Triton 3.7 or 3.2.
    "row_stats": {2: Tile(2048, 256), 4: Tile(4096, 512), 8: Tile(256, 128)},
    # No state: at most 72 registers, 28 warps an SM or more (float32: 48 and 40). Small blocks, as a row ends in part
    # of one.
    "row_grad": {2: Tile(2048, 128), 4: Tile(1024, 128), 8: Tile(512, 128)},
    # As row_stats, but for 2 bytes: there 2,048 x 256 threads spill up to 16 bytes on a B200, and 4 elements a thread
    # do not (64 registers). float32: at most 95.
    "row_pass": {2: Tile(1024, 256), 4: Tile(4096, 512)},
}
# With terms beyond those of every call, which all have numbers of state: smaller where the tile above would spill, by
# the same report. With all terms at most 186 registers (float32 106, float64 128), in row_grad 127 (float64 158).
FURTHER_TILES = {
    "row_stats": {2: Tile(2048, 256), 4: Tile(2048, 512), 8: Tile(128, 128)},
    "row_grad": {2: Tile(1024, 128), 4: Tile(1024, 128), 8: Tile(512, 128)},
    "row_pass": {2: Tile(2048, 256), 4: Tile(2048, 512)},
}
# What FUSED_LK_AUTOTUNE=1 tries: tiles that stay in registers in every kernel on every card, by the same report. (Of
# 2 bytes, 4,096 x 512 threads spills 8 bytes on an A100.) row_pass is not timed: some of these spill there on a B200.
CANDIDATES = {
    2: (Tile(2048, 128), Tile(2048, 256), Tile(4096, 256)),
    4: (Tile(4096, 512),),
    8: (Tile(256, 128),),
}
KERNELS = {
    "lse_argmax": lse_argmax_kernel,
    "row_stats": row_stats_kernel,
    "row_grad": row_grad_kernel,
    "row_pass": row_pass_kernel,
}

# FMA contraction off: (z - top) * scale - log_total has to round alike for q and p, or ties would not be ties; and the
# corrections of log1p and expm1 need their differences as written.
OPTIONS = {"enable_fp_fusion": False}

# Statistics and gradient in one launch, of a loss that is known in the forward. It computes in float32 alone, because
# Triton passes the numbers of the loss as float32. Off until a card has measured it.
ONE_KERNEL = os.environ.get("FUSED_LK_ONE_KERNEL", "0") == "1"

# TRITON_INTERPRET is read when a kernel is decorated; later changes of the environment come too late.
INTERPRETED = not isinstance(row_stats_kernel, triton.JITFunction)
INTERPRETER_BLOCK_V = 2**19  # its arrays end at 2**20 elements


def check_device(device: torch.device) -> None:
    """Whether the kernels run on `device`.

    Raises:
        ValueError: they do not. A CPU has Triton's interpreter alone.
    """
    if device.type in ("cuda", "xpu") or (device.type == "cpu" and INTERPRETED):
        return
    remedy = 'Use impl="torch"'
    if device.type == "cpu":
        remedy += ", or set TRITON_INTERPRET=1 before Triton is imported to run the kernels in its interpreter (slow)"
    checks.fail('a GPU (CUDA, ROCm, XPU) for impl="triton"', f"tensors on {device}", remedy + ".")


def lse_argmax(
    x: Tensor, transform: Transform, inside: Tensor | None, lse: Tensor, log_mass: Tensor | None, argmax: Tensor
) -> None:
    """Write logsumexp(s), and the lowest index of the maximum, of each row of `x` `[n, V]`, with s = `transform` of x.

    With `inside` (bool `[V]`), also `log_mass` = log sum of softmax(s) over the columns inside.
    """
    x = _unit_columns(x)
    acc = accumulation_dtype(x)
    _launch(
        "lse_argmax",
        x.shape,
        _widest(acc, x),
        (x, x.stride(0), _vector(inside), lse, log_mass, argmax, x.shape[1], *_numbers(transform)),
        {"ACC": _triton_dtype(acc)},
    )


def stats(rows: LogitRows, terms: tuple[str, ...], out: RowStats) -> None:
    """Write the statistics of whole rows into `out`."""
    z, t, acc = _unit_columns(rows.z), _unit_columns(rows.t), out.base.dtype
    arguments = (z, z.stride(0), t, t.stride(0), *_of_rows(rows, terms, out))
    _launch("row_stats", z.shape, _widest(acc, z, t), arguments, _mass(rows) | _constants(terms, acc))


def stats_and_gradient(
    rows: LogitRows, terms: tuple[str, ...], out: RowStats, loss: RowLoss, gradient_out: Tensor
) -> None:
    """`stats`, then `gradient` of `loss`."""
    if ONE_KERNEL and out.base.dtype == torch.float32:
        return row_pass(rows, terms, out, loss, gradient_out)
    stats(rows, terms, out)
    gradient(rows, terms, out, loss.d_values(out.values), gradient_out)


def gradient(rows: LogitRows, terms: tuple[str, ...], stats: RowStats, d_values: Tensor, gradient_out: Tensor) -> None:
    """Write the gradient with respect to `rows.z` into `gradient_out`, which may be `rows.z` itself.

    `rows` may be any block of columns of the rows that `stats` describes; `d_values` `[T, n]` are the derivatives with
    respect to the terms.
    """
    into = _unit_columns(gradient_out, copy=False)
    z, t, d_values = _unit_columns(rows.z), _unit_columns(rows.t), _unit_columns(d_values)
    acc = stats.base.dtype
    _launch(
        "row_grad",
        z.shape,
        _widest(acc, z, t, into),
        (
            *(z, z.stride(0), t, t.stride(0), into, into.stride(0), _vector(rows.t_index)),
            *(*_of_stats(stats), d_values, d_values.stride(0), stats.draft_argmax),
            *(_labels(rows, terms, stats.target_argmax), *_two_floats(rows.jsd_beta)),
            *(z.shape[1], rows.first_column, *_numbers(rows.z_transform), *_numbers(rows.t_transform)),
        ),
        _constants(terms, acc),
        by_columns=True,
    )
    if into is not gradient_out:
        gradient_out.copy_(into)


def row_pass(rows: LogitRows, terms: tuple[str, ...], out: RowStats, loss: RowLoss, gradient_out: Tensor) -> None:
    """`stats_and_gradient` in one launch."""
    into, z, t = _unit_columns(gradient_out, copy=False), _unit_columns(rows.z), _unit_columns(rows.t)
    acc, components = out.base.dtype, dict(loss.mix)
    arguments = (
        *(z, z.stride(0), t, t.stride(0), into, into.stride(0), *_of_rows(rows, terms, out)),
        *(_vector(loss.weights), _vector(loss.kl_weight), loss.eta, loss.kl_scale),
        *(float(components.get(name, 0.0)) for name in ("tv", "alpha", "lambda", *TERMS[1:])),
    )
    _launch("row_pass", z.shape, _widest(acc, z, t, into), arguments, _mass(rows) | _constants(terms, acc))
    if gradient_out is not into:
        gradient_out.copy_(into)


def _of_rows(rows: LogitRows, terms: tuple[str, ...], out: RowStats) -> tuple[Any, ...]:
    """What both kernels that make statistics take after the logits: what is told of the rows, and where results go."""
    normalizer = rows.normalizer
    return (
        *(_vector(rows.t_index), None if normalizer is None else _vector(normalizer.value)),
        *_of_stats(out),
        *(out.draft_argmax, out.target_argmax, _labels(rows, terms, None), *_two_floats(rows.jsd_beta)),
        *(rows.z.shape[1], *_numbers(rows.z_transform), *_numbers(rows.t_transform)),
        0.0 if normalizer is None else normalizer.rounding,
    )


def _mass(rows: LogitRows) -> dict[str, Any]:
    """What these are compiled for beside the terms."""
    return {"IS_MASS": rows.normalizer is not None and rows.normalizer.is_mass, "EXCESS": EXCESS}


def _of_stats(stats: RowStats) -> tuple[Any, ...]:
    """The floating point statistics as both kernels take them: pointers, and how far their rows lie apart."""
    base, values, saved, *_ = stats
    return base, base.stride(0), values, values.stride(0), saved, saved.stride(0), saved.stride(1)


@functools.cache
def _constants(terms: tuple[str, ...], acc: torch.dtype) -> dict[str, Any]:
    """What both kernels are compiled for: the row of each term in values and saved, -1 without it; the arithmetic."""
    rows_of_terms = {name.upper(): terms.index(name) if name in terms else -1 for name in TERMS}
    return {**rows_of_terms, "ACC": _triton_dtype(acc), "TIE": tie_width(acc)}


def tile_of(name: str, width: int, further: bool) -> Tile:
    """The shipped tile of a kernel whose widest number has that many bytes, with or without further terms."""
    return (FURTHER_TILES if further else TILES)[name][width]


def _launch(
    name: str, shape: torch.Size, width: int, arguments: tuple, constants: dict[str, Any], by_columns: bool = False
) -> None:
    """Run kernel `name` over the rows of `shape` `[n, V]`, or over its rows and blocks of columns."""
    n, size = shape
    if n == 0:
        return
    kernel = KERNELS[name]

    def grid(meta: dict[str, Any]) -> tuple[int, ...]:
        return (n, triton.cdiv(size, meta["BLOCK_V"])) if by_columns else (n,)

    with _context(arguments[0].device):
        further = any(constants.get(term.upper(), -1) >= 0 for term in TERMS if term not in MEASURED)
        if autotune.enabled() and name in autotune.WRITTEN and not (INTERPRETED or further):
            kernel = autotune.tuned(name, kernel, CANDIDATES[width], _warp_size())
        elif INTERPRETED:  # which pays for each operation, not for each element
            constants = constants | {"BLOCK_V": min(triton.next_power_of_2(size), INTERPRETER_BLOCK_V)}
        else:
            tile = tile_of(name, width, further)
            constants = constants | {"BLOCK_V": tile.block_v, "num_warps": tile.threads // _warp_size()}
        kernel[grid](*arguments, **constants, **OPTIONS)


def _context(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; the interpreter is numpy, which warns of each log(0)."""
    if INTERPRETED:
        return np.errstate(all="ignore")
    return torch.get_device_module(device).device(device)


def _warp_size() -> int:
    """Threads of a warp on the current device: 32, or 64 on AMD's data centre cards."""
    return driver.active.get_current_target().warp_size


def _numbers(transform: Transform) -> tuple[float | None, ...]:
    """The scale and the inner scale of a softcap, which is compiled out where this is None."""
    inner = transform.inner
    return (*_two_floats(transform.scale), *((None, None) if inner is None else _two_floats(inner)))


def _two_floats(value: float) -> tuple[float, float]:
    """`value` as a sum of two float32, good to 48 bits: Triton passes Python floats as float32.

    A constexpr would compile anew for each temperature, a tensor would be copied to the device at each launch.
    """
    high = float(np.float32(value))
    return high, value - high if math.isfinite(high) else 0.0


def _widest(acc: torch.dtype, *tensors: Tensor) -> int:
    return 8 if acc == torch.float64 else max(x.element_size() for x in tensors)


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _unit_columns(x: Tensor, copy: bool = True) -> Tensor:
    """`x`, or a tensor like it (a copy, or unwritten) whose columns lie side by side."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous() if copy else torch.empty_like(x, memory_format=torch.contiguous_format)


def _labels(rows: LogitRows, terms: tuple[str, ...], argmax: Tensor | None) -> Tensor | None:
    """The labels of "ce": those given, or the target's argmax. None where nobody asks, so that no kernel is compiled
    for a pointer that it does not read."""
    return _vector(argmax if rows.labels is None else rows.labels) if "ce" in terms else None


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
