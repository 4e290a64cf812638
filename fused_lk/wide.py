"""Which products of half precision a device can give in float32.

    "mm"      a @ b in float32, rounded never
    "addmm"   total += a @ b, where the total is float32 and the factors are not

Both are overloads of PyTorch's products. That one has a name says little: a release may have the second and refuse a
float32 total (below). So the device is asked, once for each dtype, with the very call that will be made.
"""

from __future__ import annotations

from typing import Any

import torch

# For where nothing can be run: on a machine without the device, and while a graph is traced or captured. By PyTorch's
# issue 154086, CUDA refused a float32 total ("self and mat2 must have the same dtype") until pull request 167931. The
# CUDA libraries of 2.10 and 2.11 hold the text of the check that permits it, those of 2.8 and 2.9 do not. But fake
# tensors of 2.11 cannot make this call, because they take its dtype for beta. Those of 2.13 can.
_FIRST_RELEASE = {"mm": (2, 8), "addmm": (2, 13)}

_ANSWERS: dict[tuple[str, str, torch.dtype], bool] = {}


def gives_float32(product: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `product`, "mm" or "addmm", of factors of that dtype gives float32 on that device."""
    if dtype.itemsize != 2:
        return False
    key = (product, device.type, dtype)
    if key not in _ANSWERS:
        answer = _asked(*key)
        if answer is None:  # A later call may be able to ask.
            return device.type == "cuda" and by_release(product)
        _ANSWERS[key] = answer
    return _ANSWERS[key]


def overload(product: str) -> Any:
    """The call `([total,] a, b, dtype, out=)` of a product; None where this release has none."""
    return getattr(getattr(torch.ops.aten, product), "dtype_out", None)


def by_release(product: str) -> bool:
    """Whether this release of PyTorch serves it on CUDA."""
    return tuple(int(x) for x in torch.__version__.split(".")[:2]) >= _FIRST_RELEASE[product]


def _asked(product: str, device: str, dtype: torch.dtype) -> bool | None:
    """What the device answers; None where it cannot be asked now."""
    module: Any = getattr(torch, device, None)
    if torch.compiler.is_compiling() or module is None or not module.is_available():
        return None
    if device == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    n = torch.arange(8, device=device, dtype=torch.float32)
    if type(n) is not torch.Tensor:  # a fake one
        return None
    call = overload(product)
    if call is None:
        return False
    # Factors and total lie as in a walk: the factors are transposed views, and the total has a padded row stride. The
    # sums, 4096 + i j, have more digits than half precision.
    a = torch.stack((torch.full_like(n, 64), n)).to(dtype)
    total = torch.full((8, 16), 0.25, device=device)[:, :8]
    try:
        call(*((total,) if product == "addmm" else ()), a.t(), a, torch.float32, out=total)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return torch.equal(total, 4096 + (0.25 if product == "addmm" else 0) + torch.outer(n, n))
