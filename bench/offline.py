"""Triton's compiler for a card that is not there.

A launch of a kernel goes its own way through the launcher of `fused_lk.kernels` and through Triton's specialisation of
the arguments (dtypes, 16-byte alignment, values divisible by 16, None), and stops where the binary would be loaded. So
what is inspected is what a launch on that card would run; nothing about signatures or attributes is written by hand.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import triton
from fused_lk.kernels import launch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class Card(NamedTuple):
    """What a program may use, from the vendors' tables.

    Bytes of shared memory are what one block may have, and what an SM (compute unit) has for all of them, each of
    which costs `reserved` more. Registers are 32 bits wide and counted per SM; a warp gets them by the `register_unit`.
    """

    cards: str
    target: GPUTarget
    registers: int
    register_unit: int
    warps: int
    blocks: int
    shared_per_block: int
    shared: int
    reserved: int
    since: tuple[int, int] = (3, 2)  # the first Triton that compiles for it


KIB = 1024
# NVIDIA: CUDA C++ programming guide, "compute capabilities". gfx942: CDNA3 ISA and the HIP hardware tables: four SIMDs
# a compute unit, 512 registers (of 64 lanes) and 8 waves each.
CARDS = {
    "sm_80": Card("A100", GPUTarget("cuda", 80, 32), 65536, 256, 64, 32, 163 * KIB, 164 * KIB, KIB),
    "sm_90": Card("H100", GPUTarget("cuda", 90, 32), 65536, 256, 64, 32, 227 * KIB, 228 * KIB, KIB),
    "sm_100": Card("B200", GPUTarget("cuda", 100, 32), 65536, 256, 64, 32, 227 * KIB, 228 * KIB, KIB, since=(3, 3)),
    "gfx942": Card("MI300", GPUTarget("hip", "gfx942", 64), 4 * 512 * 64, 8 * 64, 32, 32, 64 * KIB, 64 * KIB, 0),
}


TRITON = tuple(int(x) for x in triton.__version__.split(".")[:2])


class _Driver:
    """As much of a Triton driver as compiling asks for; each target is a device of its own, with its own kernels."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(arch: str) -> Iterator[list[Any]]:
    """Within it, launches on CPU tensors compile for `arch`; yields the list of what was launched, compiled."""
    if launch.INTERPRETED:
        raise RuntimeError(
            "Expected Triton's compiler, got its interpreter. Unset TRITON_INTERPRET before Triton is imported."
        )
    launched: list[Any] = []
    jit_run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = jit_run(kernel, *args, grid=grid, warmup=True, **options)
        launched.append(compiled)
        return compiled

    previous = driver.__dict__.copy()
    driver.set_active(_Driver(CARDS[arch].target))
    if TRITON < (3, 3):  # which binds a kernel to the first target that it meets, and links with ROCm's own linker
        os.environ.setdefault(
            "TRITON_HIP_LLD_PATH", shutil.which("true") or ""
        )  # the assembly before it is what we read
        for kernel in launch.KERNELS.values():
            kernel.binder = None
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(launch, "_context", return_value=contextlib.nullcontext()),
        ):
            yield launched
    finally:
        driver.__dict__.update(previous)
