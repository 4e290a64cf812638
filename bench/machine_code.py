"""What a compiled kernel costs, read from its machine code: SASS through Triton's own cuobjdump, or amdgcn assembly."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

from .offline import Card

# instruction width suffix -> bits
_SASS_WIDTH = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
_AMD_WIDTH = {"ubyte": 8, "sbyte": 8, "ushort": 16, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96}
_AMD_WIDTH |= {"dwordx4": 128, "short_d16": 16, "short_d16_hi": 16, "byte": 8, "byte_d16_hi": 8, "ubyte_d16": 8}


@dataclass
class MachineCode:
    """Static figures of one binary.

    `spills` are local-memory (scratch) instructions: spilled registers and arrays. `scalar_spills` are AMD's scalar
    registers that wait in a lane of a vector register, no memory involved. `loads` and `stores` count the instructions
    on global memory by their width in bits.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    scalar_spills: int = 0
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    fused: int = 0  # float32 multiply-adds
    instructions: int = 0


def of(kernel: Any) -> MachineCode:
    """The figures of a `triton.compiler.CompiledKernel`."""
    return _of_cubin(kernel) if "cubin" in kernel.asm else _of_amdgcn(kernel)


def sass(kernel: Any) -> str:
    """The disassembly of a CUDA binary, with its resource usage."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run(
            [os.fspath(tool), "-res-usage", "-sass", file.name], check=True, capture_output=True, text=True
        ).stdout


def _of_cubin(kernel: Any) -> MachineCode:
    text = sass(kernel)
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)([.\w]*)", text)
    found = MachineCode(int(usage["REG"]), 0, int(usage["STACK"]) + int(usage["LOCAL"]), kernel.metadata.shared)
    for name, suffixes in code:
        found.instructions += 1
        if name in ("LDL", "STL"):
            found.spills += 1
        elif name in ("LDG", "LD", "STG", "ST"):
            width = next((_SASS_WIDTH[s] for s in suffixes.split(".") if s in _SASS_WIDTH), 32)
            (found.loads if name.startswith("L") else found.stores)[width] += 1
        found.fused += name in ("FFMA", "FFMA2")
    return found


def _of_amdgcn(kernel: Any) -> MachineCode:
    text = kernel.asm["amdgcn"]
    usage = {name: int(n) for name, n in re.findall(r"\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    found = MachineCode(
        usage["vgpr_count"],  # accumulation registers included: they are one file on this card
        0,
        usage["private_segment_fixed_size"],
        kernel.metadata.shared,
    )
    for space, kind, suffix in re.findall(r"^\s+(global|buffer|flat|scratch)_(load|store)_(\w+)", text, re.MULTILINE):
        if space == "scratch":
            found.spills += 1
        else:
            (found.loads if kind == "load" else found.stores)[_AMD_WIDTH[suffix]] += 1
    found.spills += usage["vgpr_spill_count"]
    found.scalar_spills = usage["sgpr_spill_count"]
    found.fused = len(re.findall(r"^\s+v_(?:pk_)?(?:fma|fmac|mad|mac)\w*_f32", text, re.MULTILINE))
    found.instructions = len(re.findall(r"^\t[vs]_|^\t(?:global|buffer|ds|flat)_", text, re.MULTILINE))
    return found


def warps_per_sm(code: MachineCode, card: Card, num_warps: int) -> int:
    """Warps (waves) that an SM (compute unit) holds at once: by registers, shared memory, warp and block slots."""
    lanes = card.target.warp_size
    per_warp = _round_up(code.registers * lanes, card.register_unit)
    if card.target.backend == "hip":  # a wave's registers lie in one SIMD
        by_registers = 4 * (card.registers // 4 // per_warp)
    else:
        by_registers = card.registers // per_warp
    blocks = min(by_registers, card.warps) // num_warps
    per_block = code.shared + card.reserved
    if per_block:
        blocks = min(blocks, card.shared // per_block)
    return min(blocks, card.blocks) * num_warps


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
