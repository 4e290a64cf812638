"""Checks of what callers hand in. Every message says what was expected, what came, and the remedy."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(value: Any) -> str:
    """A short account of a value for an error message; tensors by shape, dtype and device, never by content."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def fail(expected: str, got: Any, remedy: str, error: type[Exception] = ValueError) -> None:
    """Raise `error` with the three parts every message has."""
    got = got if isinstance(got, str) else describe(got)
    raise error(f"expected {expected}; got {got}. {remedy}")


def tensor(
    name: str,
    value: Any,
    *,
    ndim: int | None = None,
    min_ndim: int = 0,
    dtypes: Iterable[torch.dtype] | None = None,
    remedy: str = "",
) -> Tensor:
    """`value`, if it is a tensor of the given rank and dtypes."""
    if not isinstance(value, Tensor):
        fail(f"{name} to be a torch.Tensor", value, remedy or "Pass a tensor.", TypeError)
    if hasattr(value, "full_tensor"):
        fail(
            f"{name} to be a plain tensor on this rank",
            f"a DTensor with placements {value.placements}",
            "Under FSDP2 let the root module own the head, so that its weight is gathered while the loss runs; "
            "or pass weight.full_tensor().",
            TypeError,
        )
    if dtypes is not None and value.dtype not in tuple(dtypes):
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        fail(f"{name} of dtype {names}", value, remedy or f"Convert {name} first.", TypeError)
    if ndim is not None and value.ndim != ndim:
        fail(f"{name} with {ndim} dimension(s)", value, remedy or f"Reshape {name}.")
    if value.ndim < min_ndim:
        fail(f"{name} with at least {min_ndim} dimension(s)", value, remedy or f"Reshape {name}.")
    return value


def shape(name: str, value: Tensor, expected: tuple[int, ...], why: str) -> None:
    """`value.shape == expected`; `why` says where the expectation comes from."""
    if tuple(value.shape) != tuple(expected):
        fail(f"{name} of shape {tuple(expected)} ({why})", value, f"Reshape {name}, or check which tensor it is.")


def same_device(device: torch.device, **tensors: Tensor | None) -> None:
    """All given tensors lie on `device`."""
    for name, value in tensors.items():
        if value is not None and value.device != device:
            fail(f"{name} on {device}, where the other tensors are", value, f"Move it: {name}.to({str(device)!r}).")


def choice(name: str, value: Any, options: Iterable[str]) -> None:
    """`value` is one of the names in `options`."""
    options = tuple(options)
    if value not in options:
        fail(f"{name} to be one of {', '.join(map(repr, options))}", value, "Choose one of these.")


def number(name: str, value: Any, *, minimum: float | None = None, above: float | None = None) -> float:
    """`value` as a finite float, `>= minimum` and `> above` where given."""
    bound = "" if minimum is None else f" >= {minimum:g}"
    bound += "" if above is None else f" > {above:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        fail(f"{name} to be a finite number{bound}", value, f"Pass {name} as a Python float.", TypeError)
    low = (minimum is not None and value < minimum) or (above is not None and value <= above)
    if not -math.inf < value < math.inf or low:  # false for NaN; math.isfinite cannot be traced
        fail(f"{name} to be a finite number{bound}", value, f"Choose {name}{bound or ' finite'}.")
    return float(value)


def non_negative(name: str, value: Tensor) -> None:
    """The contents of a tensor in host memory are finite and >= 0.

    Reading a device's tensor would wait for the device, so those are taken as they come; tracing sees no contents.
    """
    if type(value) not in (Tensor, Parameter) or value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not bool((torch.isfinite(value) & (value >= 0)).all()):
        fail(f"{name} with entries that are finite and >= 0", "a negative, infinite or NaN entry", f"Check {name}.")


def checks_contents(value: Tensor) -> bool:
    """Whether the contents of `value` are read for checks: in host memory always, on a device, where reading waits for
    the device, with FUSED_LK_VALIDATE=1; never where there are none to see (tracing, fake tensors)."""
    if type(value) not in (Tensor, Parameter) or torch.compiler.is_compiling():
        return False
    return value.device.type == "cpu" or os.environ.get("FUSED_LK_VALIDATE", "0") == "1"


def is_constant(name: str, value: Tensor) -> None:
    """Target activations are constants of the loss: refuse one that would silently get no gradient."""
    if value.requires_grad:
        fail(
            f"{name} without requires_grad (targets never receive a gradient)",
            value,
            f"Pass {name}.detach(), or compute it under torch.no_grad().",
        )


def wide_logits(logits_dtype: str | torch.dtype) -> torch.dtype | None:
    """float32 where `logits_dtype` asks for the matrix product's own float32 result; None for "compute"."""
    if logits_dtype not in ("compute", torch.float32):
        fail('logits_dtype to be "compute" or torch.float32', logits_dtype, "Choose one of these.")
    return None if logits_dtype == "compute" else torch.float32
