"""What the kernels compile to on cards that are not there: `python -m bench.compile_report`.

Every kernel x dtypes x optional argument x shipped tile is compiled for every card, through the package's own launcher,
and read back from the machine code. A breach makes the exit status 1:

    spills      any local-memory instruction, or a stack
    narrow      loads or stores of logits of less than 128 bits where rows start on 128-bit boundaries
    shared      more shared memory than the card gives a block
    fused       multiply-adds that the source does not ask for (q and p would round differently: ties would not be ties)

"aligned": a vocabulary that is a multiple of 16. "ragged": one that is not, in rows padded by the workspace; the last
tile of a row is masked, and may be narrow. "unpadded": the caller's own logits with an odd row stride, where nothing
can be wide; listed, not judged.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from fused_lk.kernels import autotune, launch
from torch import Tensor

from fused_lk import gemm
from fused_lk.objective import Objective
from fused_lk.rows.interface import MEASURED, TERMS, LogitRows, Normalizer, Transform, accumulation_dtype
from fused_lk.walk.plan import empty_statistics

from . import machine_code, offline

HALF, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAMES = {HALF: "fp16", BF16: "bf16", FP32: "fp32", FP64: "fp64"}

# (z, t, gradient): alike from hidden states and logits; float32 targets from probabilities and top-k; float32 tiles
# with half-precision gradients from logits_dtype=float32; a float64 side makes the arithmetic float64.
DTYPES = [
    *((x, x, x) for x in NAMES),
    *((x, FP32, x) for x in (HALF, BF16)),
    *((FP32, x, x) for x in (HALF, BF16)),
    *((FP32, FP32, x) for x in (HALF, BF16)),
    (BF16, FP64, BF16),
    (FP64, FP32, FP64),
]
QUICK = [*DTYPES[:4], (BF16, FP32, BF16), (FP32, FP32, BF16)]
# By kernel: how many of these it has, its optional arguments, and the terms that can be compiled out.
KERNELS = {
    "lse_argmax": (1, ("mass",), ()),
    "row_stats": (2, ("index", "normalizer", "target_argmax"), TERMS),
    "row_grad": (3, ("index",), TERMS),
    "row_pass": (3, ("index", "normalizer", "target_argmax"), TERMS),
}
LAYOUTS = {"aligned": 32000, "ragged": 32003, "unpadded": 32003}
ROWS = 3


@dataclass(frozen=True)
class Case:
    """One launch: a kernel, the dtypes of z, t and gradient, its optional arguments and terms, and the layout."""

    kernel: str
    dtypes: tuple[torch.dtype, ...]
    options: tuple[str, ...]
    layout: str
    candidate: launch.Tile | None = None  # of the opt-in autotuning; None: the shipped tile

    @property
    def width(self) -> int:
        return 8 if FP64 in self.dtypes else max(x.itemsize for x in self.dtypes)

    @property
    def tile(self) -> launch.Tile:
        further = any(name in self.options for name in TERMS if name not in MEASURED)
        return self.candidate or launch.tile_of(self.kernel, self.width, further)

    def __str__(self) -> str:
        dtypes = "/".join(NAMES[x] for x in self.dtypes)
        return f"{self.kernel} {dtypes} {self.layout} {'+'.join(self.options) or '-'} {self.tile.block_v}"


@dataclass
class Row:
    """A line of the report."""

    case: str
    kernel: str
    dtypes: str
    options: str
    layout: str
    candidate: bool
    arch: str
    block_v: int
    num_warps: int
    registers: int
    spills: int
    scalar_spills: int
    stack: int
    shared: int
    warps_per_sm: int
    occupancy: float
    in_flight_kib: float  # of logits that an SM's warps wait for, at one tile each
    loads: dict[int, int]
    stores: dict[int, int]
    fused: int
    instructions: int
    seconds: float
    breaches: list[str]


def cases(quick: bool = False) -> Iterator[Case]:
    """Every launch to look at: each subset of the optional arguments with the terms of every call, and with all terms.

    `quick`: each class of dtypes, with all optional arguments and terms.
    """
    for kernel, (used, names, terms) in KERNELS.items():
        subsets = [tuple(n for i, n in enumerate(names) if bits >> i & 1) for bits in range(2 ** len(names))]
        singles = [(*names, term) for term in terms if term not in MEASURED]
        measured = [(*subset, *MEASURED) for subset in subsets] if terms else []
        subsets = [*singles, *measured, *((*subset, *terms) for subset in subsets)]
        for dtypes in dict.fromkeys(x[:used] for x in (QUICK if quick else DTYPES)):
            if Case(kernel, dtypes, (), "").width not in launch.TILES[kernel]:
                continue
            for options in subsets[-1:] if quick else subsets:
                yield Case(kernel, dtypes, options, "aligned")
            yield Case(kernel, dtypes, (*subsets[-1], "softcap"), "aligned")
            for layout in ("ragged", "unpadded"):
                if not quick or dtypes[0] == BF16:
                    yield Case(kernel, dtypes, subsets[-1], layout)
            if not quick and kernel in autotune.WRITTEN and dtypes in ((x,) * used for x in NAMES):
                for tile in launch.CANDIDATES[Case(kernel, dtypes, (), "").width]:
                    yield Case(kernel, dtypes, (*names, *MEASURED) if terms else names, "aligned", tile)


def launcher(case: Case) -> Callable[[], None]:
    """The launch of `case` on CPU tensors of the shapes, strides and alignment that the package makes."""
    size = LAYOUTS[case.layout]

    def tile(dtype: torch.dtype) -> Tensor:
        if case.layout == "unpadded":
            return torch.empty(ROWS, size, dtype=dtype)
        return gemm.tile(ROWS, size, dtype, torch.device("cpu"))

    logits = [tile(dtype) for dtype in case.dtypes]
    acc = accumulation_dtype(logits[0])
    for other in logits[1:2]:
        acc = torch.promote_types(acc, accumulation_dtype(other))
    terms = tuple(name for name in TERMS if name in case.options)
    out = empty_statistics(ROWS + 1, terms, acc, torch.device("cpu"), "target_argmax" in case.options).rows(1, ROWS + 1)
    vector = torch.empty(ROWS, dtype=acc)
    inner = 1 / 30 if "softcap" in case.options else None
    index = torch.zeros(ROWS, dtype=torch.long) if "index" in case.options else None
    if case.kernel == "lse_argmax":
        inside = torch.zeros(size, dtype=torch.bool) if "mass" in case.options else None
        return lambda: launch.lse_argmax(logits[0], Transform(1 / 0.7, inner), inside, vector, vector, out.draft_argmax)
    normalizer = Normalizer(vector, False, 0.0) if "normalizer" in case.options else None
    labels = torch.zeros(ROWS, dtype=torch.long) if "ce" in terms else None
    transforms = Transform(1 / 0.7, inner), Transform(1.0, inner)
    rows = LogitRows(logits[0], logits[1], index, normalizer, *transforms, labels=labels)
    if case.kernel == "row_stats":
        return lambda: launch.stats(rows, terms, out)
    into = logits[0] if logits[2].dtype == logits[0].dtype else logits[2]
    if case.kernel == "row_pass":
        loss = Objective((("lambda", 1.0),), terms, 3.0, 1.0, vector, None)
        return lambda: launch.row_pass(rows, terms, out, loss, into)
    return lambda: launch.gradient(rows, terms, out, torch.empty_like(out.values), into)


def compile_case(case: Case, arch: str) -> tuple[Any, float]:
    """The compiled kernel of `case`, and the seconds it took."""
    run = launcher(case)
    tile = case.tile
    with mock.patch.object(launch, "tile_of", return_value=tile), offline.compiling_for(arch) as launched:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    (kernel,) = launched
    return kernel, seconds


def inspect(case: Case, arch: str) -> Row:
    """Compile `case` for `arch`, and judge it."""
    kernel, seconds = compile_case(case, arch)
    code, card = machine_code.of(kernel), offline.CARDS[arch]
    num_warps = kernel.metadata.num_warps
    block_v = case.tile.block_v
    warps = machine_code.warps_per_sm(code, card, num_warps)
    read = sum(x.itemsize for x in case.dtypes[:2]) * block_v
    return Row(
        case=str(case),
        kernel=case.kernel,
        dtypes="/".join(NAMES[x] for x in case.dtypes),
        options="+".join(case.options),
        layout=case.layout,
        candidate=case.candidate is not None,
        arch=arch,
        block_v=block_v,
        num_warps=num_warps,
        registers=code.registers,
        spills=code.spills,
        scalar_spills=code.scalar_spills,
        stack=code.stack,
        shared=code.shared,
        warps_per_sm=warps,
        occupancy=warps / card.warps,
        in_flight_kib=round(warps / num_warps * read / 1024, 1),
        loads=dict(sorted(code.loads.items())),
        stores=dict(sorted(code.stores.items())),
        fused=code.fused,
        instructions=code.instructions,
        seconds=round(seconds, 3),
        breaches=list(breaches(case, kernel, code, card, block_v // (num_warps * card.target.warp_size))),
    )


def breaches(
    case: Case, kernel: Any, code: machine_code.MachineCode, card: offline.Card, elements: int
) -> Iterator[str]:
    """What the binary does that it should not."""
    if code.spills or code.stack:
        yield f"spills: {code.spills} local-memory instructions, {code.stack} bytes of stack"
    if code.shared > card.shared_per_block:
        yield f"shared: {code.shared} bytes of {card.shared_per_block}"
    ttir = kernel.asm["ttir"]
    if (unasked := code.fused - _explicit_fused(ttir, elements)) > 0:
        yield f"fused: {unasked} multiply-adds"
    read = (*case.dtypes[:2], torch.bool) if "mass" in case.options else case.dtypes[:2]
    for what, op, counts, dtypes in (
        ("loads", "load", code.loads, read),
        ("stores", "store", code.stores, case.dtypes[2:]),
    ):
        tiles, scalars = memory_sites(ttir, op)
        # A thread has as many elements of each tensor: beside float64, 64 bits of bfloat16 are all there is of it; and
        # the mark of a column is a byte.
        least_bits = min([128, *(8 * x.itemsize * elements for x in dtypes)])
        narrow = sum(n for bits, n in counts.items() if bits < least_bits)
        wide = counts.total() - narrow
        if case.layout == "aligned" and narrow > scalars:
            yield f"narrow: {narrow} {what} for {scalars} numbers per row"
        # each site is in the loop or in the masked rest of it, and the rest may be narrow in ragged rows
        least = {"aligned": tiles, "ragged": tiles // 2, "unpadded": 0}[case.layout]
        if wide < least:
            yield f"narrow: {wide} wide {what} for {least} sites"


def memory_sites(ttir: str, op: str) -> tuple[int, int]:
    """`(tiles, scalars)`: how many places of the kernel load (store) a tile of logits, and one number."""
    lines = re.findall(rf"\btt\.{op} (.*)", ttir)
    tiles = sum("tensor<" in line for line in lines)
    return tiles, len(lines) - tiles


def _explicit_fused(ttir: str, elements: int) -> int:
    """At most as many multiply-adds as the logarithms and divisions of the kernel are made of.

    Those at the end of a row are few. Under a softcap and for "skl" each element is divided, and "jsd" takes logarithms
    of each. Without these three contraction would show in any element of a tile.
    """
    found = re.findall(r"\b(math\.log|arith\.divf) .*: (tensor)?", ttir)
    return sum((12 if op == "math.log" else 8) * (elements if tile else 1) for op, tile in found)


def _inspect_all(arguments: tuple[str, list[Case]]) -> list[Row]:
    arch, chosen = arguments
    torch.set_num_threads(1)
    os.environ["TRITON_CACHE_DIR"] = directory = tempfile.mkdtemp()  # compile times, not cache hits
    with tempfile.TemporaryDirectory(dir=directory):
        return [inspect(case, arch) for case in chosen]


def report(archs: list[str], chosen: list[Case], workers: int) -> list[Row]:
    """All rows, the cards side by side in `workers` processes."""
    jobs = [(arch, chosen) for arch in archs]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [row for rows in pool.map(_inspect_all, jobs) for row in rows]


def markdown(rows: list[Row]) -> str:
    """One line per kernel, dtypes, layout and card: the worst over the optional arguments."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        rows_are = f"{row.layout} (autotune)" if row.candidate else row.layout
        groups.setdefault((row.kernel, row.dtypes, rows_are, row.arch, row.block_v, row.num_warps), []).append(row)
    lines = [
        "| kernel | z/t/gradient | rows | card | tile x warps | registers | spills | stack | shared B | warps/SM "
        "| in flight KiB/SM | loads (bits x n) | stores | compile s |",
        "|" + "---|" * 14,
    ]
    for (kernel, dtypes, layout, arch, *_tile), group in groups.items():
        worst = max(group, key=lambda r: (len(r.breaches), r.registers))
        lines.append(
            f"| {kernel} | {dtypes} | {layout} | {arch} {offline.CARDS[arch].cards} "
            f"| {worst.block_v} x {worst.num_warps} | {worst.registers} | {max(r.spills for r in group)} "
            f"| {max(r.stack for r in group)} | {max(r.shared for r in group)} "
            f"| {min(r.warps_per_sm for r in group)} | {min(r.in_flight_kib for r in group)} "
            f"| {_widths(worst.loads)} | {_widths(worst.stores)} | {max(r.seconds for r in group):.2f} |"
        )
    return "\n".join(lines)


def _widths(counts: dict[int, int]) -> str:
    return ", ".join(f"{bits} x {n}" for bits, n in sorted(counts.items(), reverse=True)) or "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=offline.CARDS, action="append", help="one card (repeatable; default: all)")
    parser.add_argument("--quick", action="store_true", help="optional arguments all given, not each subset")
    parser.add_argument("--json", type=Path, help="also write every row here")
    parser.add_argument("--workers", type=int, default=min(len(offline.CARDS), os.cpu_count() or 1))
    arguments = parser.parse_args()
    archs = arguments.arch or list(offline.CARDS)
    known = [arch for arch in archs if offline.CARDS[arch].since <= offline.TRITON]
    rows = report(known, list(cases(arguments.quick)), arguments.workers)
    print(markdown(rows))
    for arch in set(archs) - set(known):
        needed = ".".join(str(x) for x in offline.CARDS[arch].since)
        print(f"\n{arch} {offline.CARDS[arch].cards}: not known to this Triton; {needed} is the first that is")
    broken = [row for row in rows if row.breaches]
    print(f"\nTriton {triton.__version__}: {len(rows)} binaries, {len(broken)} with a breach")
    for row in broken:
        print(f"  {row.arch} {row.case}: {'; '.join(row.breaches)}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps({"triton": triton.__version__, "rows": [asdict(r) for r in rows]}, indent=1)
        )
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
