"""Checks of what callers hand in. Every message says what was expected, what came, and the remedy."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_NUMPY = (np.generic, np.ndarray)  # a tuple: unions of types are made anew, which cannot be traced
MASKS = (torch.bool, *INTEGERS)
WEIGHTS = ("draft_lm_head_weight", "lm_head_weight", "head", "low_rank[1]")  # arguments that a module's weight may be


def describe(value: Any) -> str:
    """A short account of a value for an error message; tensors by shape, dtype and device, never by content."""
    if isinstance(value, Tensor):
        size = "with rows of several lengths" if value.is_nested else f"of shape {tuple(value.shape)}"
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {size} on {value.device}"
    if isinstance(value, (nn.Module, dict, list, tuple, np.ndarray)) or hasattr(value, "last_hidden_state"):
        return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (list, tuple)) else "")
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
    """`value`, if it is a plain, dense tensor with contents, of the given rank and dtypes."""
    if not isinstance(value, Tensor):
        fail(f"{name} to be a torch.Tensor", value, instead(name, value, remedy or "Pass a tensor."), TypeError)
    if value.is_nested:
        fail(f"{name} to be a padded tensor", f"a nested one ({value.layout})", "Pad it, and mask the rest.", TypeError)
    if hasattr(value, "full_tensor"):
        fail(
            f"{name} to be a plain tensor on this rank",
            f"a DTensor with placements {value.placements}",
            "Under FSDP2 let the root module own the head, so that its weight is gathered while the loss runs; "
            "or pass weight.full_tensor().",
            TypeError,
        )
    if value.layout != torch.strided:
        fail(f"{name} to be a dense tensor", f"one of layout {value.layout}", f"Pass {name}.to_dense().", TypeError)
    if value.is_quantized:
        fail(f"{name} not to be quantised", value, f"Pass {name}.dequantize().", TypeError)
    if value.device.type == "meta":
        fail(f"{name} to have contents", value, "A meta tensor has none: materialise it first, as by .to_empty(...).")
    if dtypes is not None and value.dtype not in (dtypes := tuple(dtypes)):
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        convert = f"Convert it: {name}.to({dtypes[0]})." if len(dtypes) == 1 else f"Convert {name} first."
        fail(f"{name} of dtype {names}", value, remedy or convert, TypeError)
    if ndim is not None and value.ndim != ndim:
        fail(f"{name} with {ndim} dimension(s)", value, remedy or f"Reshape {name}.")
    if value.ndim < min_ndim:
        fail(f"{name} with at least {min_ndim} dimension(s)", value, remedy or f"Reshape {name}.")
    return value


def weight_here(value: Any) -> Any:
    """A weight that a `DTensor` replicates, as the plain tensor of this rank; anything else as it is.

    The gradient goes back as a DTensor with the same placements. Nothing is reduced between ranks.
    """
    if hasattr(value, "full_tensor") and all(x.is_replicate() for x in value.placements):
        return value.to_local()
    return value


def instead(name: str, value: Any, remedy: str) -> str:
    """What to pass as `name` in the place of a `value` that is no tensor but has or makes one; `remedy` otherwise."""
    if isinstance(value, nn.Module) and name not in WEIGHTS:
        return "Pass what it returns."
    if isinstance(value, nn.Module) and not isinstance(getattr(value, "weight", None), Tensor):
        return f"Pass the weight of its output layer as {name}, as in model.lm_head.weight."
    if isinstance(value, nn.Module):
        bias = ", and its bias as bias=" if isinstance(getattr(value, "bias", None), Tensor) else ""
        return f"Pass its weight as {name}, as in lm_head.weight{bias}."
    if getattr(value, "last_hidden_state", None) is not None:
        return "Pass its .last_hidden_state."
    return remedy


def shape(name: str, value: Tensor, expected: tuple[int, ...], why: str) -> None:
    """`value.shape == expected`; `why` says where the expectation comes from."""
    if tuple(value.shape) != tuple(expected):
        fail(f"{name} of shape {tuple(expected)} ({why})", value, f"Reshape {name}, or check which tensor it is.")


def not_empty(name: str, value: Tensor, **dimensions: int) -> None:
    """Each of the `dimensions`, given by what it counts, is at least 1."""
    for what, dim in dimensions.items():
        if value.shape[dim] == 0:
            fail(
                f"{name} with a {what.replace('_', ' ')} of at least 1",
                value,
                "Check how it was made or sliced: only the number of rows may be 0.",
            )


def same_device(device: torch.device, **tensors: Tensor | None) -> None:
    """All given tensors lie on `device`."""
    for name, value in tensors.items():
        if value is not None and value.device != device:
            fail(f"{name} on {device}, where the other tensors are", value, f"Move it: {name}.to({str(device)!r}).")


def choice(name: str, value: Any, options: Iterable[str]) -> None:
    """`value` is one of the names in `options`."""
    options = tuple(options)
    if not isinstance(value, str) or value not in options:
        fail(f"{name} to be one of {', '.join(map(repr, options))}", value, "Choose one of these.")


def number(
    name: str, value: Any, *, minimum: float | None = None, above: float | None = None, remedy: str = ""
) -> float:
    """`value`, Python's or NumPy's, as a finite float, `>= minimum` and `> above` where given."""
    bound = "" if minimum is None else f" >= {minimum:g}"
    bound += "" if above is None else f" > {above:g}"
    value = scalar(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(f"{name} to be a finite number{bound}", value, f"Pass {name} as a Python float.", TypeError)
    low = (minimum is not None and value < minimum) or (above is not None and value <= above)
    if not -math.inf < value < math.inf or low:  # false for NaN; math.isfinite cannot be traced
        fail(f"{name} to be a finite number{bound}", value, remedy or f"Choose {name}{bound or ' finite'}.")
    return float(value)


def softmax(name: str, temperature: Any, logit_scale: Any, softcap: Any) -> tuple[float, float | None]:
    """`(scale, inner)` of a softmax over the logits z of a head: it sees `scale * tanh(inner * z)`, without a softcap
    `scale * z` (inner is None). `name` is what the temperature is called.

    The logit scale comes first, then the softcap, then the temperature. Sources, of Hugging Face transformers:
    modeling_gemma2.py (`final_logit_softcapping`), modeling_cohere.py (`logits * logit_scale`), modeling_granite.py
    (`logits / logits_scaling`); for the order of the first two SGLang's LogitsProcessor.
    """
    temperature = number(name, temperature, above=0)
    remedy = "A model that divides its logits by d has logit_scale=1/d."
    logit_scale = number("logit_scale", logit_scale, above=0, remedy=remedy)
    if softcap is None:
        return logit_scale / temperature, None
    softcap = number("softcap", softcap, above=0, remedy="Leave it out, or None, for a model that does not cap.")
    return softcap / temperature, logit_scale / softcap


def share(name: str, value: Any) -> float:
    """`value` as a float in (0, 1)."""
    value = number(name, value, above=0)
    if value >= 1:
        fail(f"{name} to be in (0, 1)", value, "Choose a share between them; neither end is allowed.")
    return value


def integer(name: str, value: Any, *, minimum: int = 1, expected: str = "", remedy: str = "") -> int:
    """`value`, Python's or NumPy's, as an int `>= minimum`."""
    expected = expected or f"{name} to be a positive int" if minimum == 1 else f"{name} to be an int >= {minimum}"
    value = scalar(value)
    if isinstance(value, bool) or not isinstance(value, int):
        fail(expected, value, remedy or f"Pass {name} as a Python int.", TypeError)
    if value < minimum:
        fail(expected, value, remedy or f"Choose {name} >= {minimum}.")
    return value


def flag(name: str, value: Any) -> bool:
    """`value`, Python's or NumPy's, as a bool. Other truths are mistakes: "no" would be one."""
    value = scalar(value)
    if not isinstance(value, bool):
        fail(f"{name} to be True or False", value, "Pass a bool.", TypeError)
    return value


def scalar(value: Any) -> Any:
    """A scalar of NumPy's, or an array of no dimensions, as Python's; anything else as it is."""
    return value.item() if isinstance(value, _NUMPY) and value.ndim == 0 else value


def checks_contents(value: Tensor, *, only_if_asked: bool = False) -> bool:
    """Whether to read what `value` holds, to check it.

    In host memory: yes. On a device that would wait for the device: only with FUSED_LK_VALIDATE=1 in the environment.
    Tracing and fake tensors see no contents. `only_if_asked` is for what ignored rows may hold rightly, and for what
    would cost a pass over activations: only with that variable, wherever it lies.
    """
    if torch.compiler.is_compiling() or type(value) not in (Tensor, Parameter):
        return False
    asked = os.environ.get("FUSED_LK_VALIDATE", "0") == "1"
    return asked or (value.device.type == "cpu" and not only_if_asked)


def non_negative(name: str, value: Tensor) -> None:
    """The contents of `value` are finite and >= 0, where they are read."""
    if checks_contents(value) and not bool((torch.isfinite(value) & (value >= 0)).all()):
        fail(f"{name} with entries that are finite and >= 0", "a negative, infinite or NaN entry", f"Check {name}.")


def positive(name: str, value: Tensor, remedy: str) -> None:
    """The contents of `value` are finite and > 0, where they are read."""
    if checks_contents(value) and not bool((torch.isfinite(value) & (value > 0)).all()):
        fail(f"{name} with entries that are finite and > 0", "an entry that is 0, negative, infinite or NaN", remedy)


def as_bool(name: str, mask: Tensor) -> Tensor:
    """A mask as bool. Integers are 0 and 1, and floats are weights >= 0, where they are read."""
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point():
        non_negative(name, mask)
    elif checks_contents(mask) and bool(((mask != 0) & (mask != 1)).any()):
        fail(f"an integer {name} of 0 and 1", "another entry", f"Pass {name} > 0.")
    return mask > 0


def all_rows(name: str, good: Tensor, expected: str, counted: Tensor | None = None) -> None:
    """Every row, or every one that is `counted`, is `good`; both are bool per row."""
    bad = ~good.reshape(-1) if counted is None else ~good.reshape(-1) & counted.reshape(-1)
    if bool(bad.any()):
        got = f"{int(bad.sum())} other row(s), the first of them row {int(bad.nonzero()[0])}"
        fail(f"{name} {expected}", got, "Mend or mask what made them; FUSED_LK_VALIDATE=1 asked for this check.")


def finite_rows(name: str, value: Tensor, *, logits: bool = False, counted: Tensor | None = None) -> None:
    """If asked for: no row holds a NaN or an infinity. Logits may be -inf: a token that cannot be drawn."""
    if checks_contents(value, only_if_asked=True):
        good = value.amax(-1) < math.inf if logits else value.isfinite().all(-1)  # amax hands on a NaN
        all_rows(name, good, "without NaN or " + ("+inf" if logits else "infinity"), counted)


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


def workspace_bytes(workspace_mb: float | str) -> int | None:
    """The bound in bytes; None for "auto"."""
    return _bytes("workspace_mb", workspace_mb, "Pass a size in MiB.", above=0)


def keep_bytes(keep_mb: float | str) -> int | None:
    """The bytes of logits that may be kept for the backward; None for "auto"."""
    return _bytes("keep_mb", keep_mb, "Pass a size in MiB, 0 for none.", minimum=0)


def _bytes(name: str, size: float | str, remedy: str, **bounds: Any) -> int | None:
    if size == "auto":
        return None
    if isinstance(size, str):
        fail(f'{name} to be "auto" or a number', size, remedy, TypeError)
    return int(number(name, size, **bounds) * 2**20)
