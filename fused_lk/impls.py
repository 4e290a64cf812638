"""Who carries out the row operations."""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from . import checkout, checks
from .rows import plain

IMPLS = ("auto", "triton", "torch", "reference")
checkout.find_kernels()


@functools.cache
def row_ops(impl: str, device: torch.device) -> ModuleType:
    """The module of row operations for `impl` on `device`.

    A named choice never falls back; "auto" takes Triton on a GPU and PyTorch elsewhere. (What the reference needs of
    them is the target's pass, in PyTorch.)

    Raises:
        ValueError: an unknown name; "triton" where Triton or the kernels are not installed, or cannot run on `device`.
    """
    checks.choice("impl", impl, IMPLS)
    if impl == "auto":
        impl = "triton" if device.type in ("cuda", "xpu") and _triton_installed() else "torch"
    if impl in ("torch", "reference"):
        return plain
    if not _triton_installed():
        checks.fail(
            'impl="triton" with Triton installed', "no module named triton", 'Install triton, or use impl="torch".'
        )
    try:
        from .kernels import launch
    except ModuleNotFoundError as error:
        if error.name != "fused_lk.kernels":
            raise
        remedy = "A copy of the folder fused_lk has none. Install the repository: `pip install -e .` in its root."
        checks.fail('impl="triton" with the module fused_lk.kernels', "a package without it", remedy)

    launch.check_device(device)
    return launch


def _triton_installed() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
