"""Times and bytes of cells (a provider on a shape), measured in a process of their own.

What is compared is interleaved: every round runs the two floors and each cell's forward and forward + backward once,
so that a slow moment of the machine slows all of them, and ratios are taken within one process. Target construction
is inside the timing. On a GPU: CUDA events, the L2 cache flushed before each run.

`python -m bench.timing` is the worker: a `Job` as JSON on stdin, measurements as JSON on the last line of stdout.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import machine
from .gemm_floor import FLOORS, floors
from .providers import PROVIDERS, clear_gradients
from .shapes import Inputs, Shape, make_inputs

PASSES = ("forward", "forward_backward")
L2_FLUSH_BYTES = 256 * 2**20  # more than any card's L2 cache


@dataclass(frozen=True)
class Cell:
    shape: Shape
    provider: str


@dataclass(frozen=True)
class Job:
    """What one process measures. `max_seconds` ends the rounds early, but not before three."""

    cells: list[Cell]
    rounds: int
    warmup: int = 2
    threads: int = 2
    max_seconds: float = 60.0
    memory: bool = True

    @classmethod
    def of_json(cls, text: str) -> Job:
        data = json.loads(text)
        cells = [Cell(Shape(**cell["shape"]), cell["provider"]) for cell in data.pop("cells")]
        return cls(cells, **data)


@dataclass
class Measured:
    """Milliseconds of each round of each pass and floor; bytes beyond the inputs at the peak of forward + backward.

    `others_share` is the part of the machine's processor time that other processes used meanwhile: the figures of a
    machine that is not quiet can be told by it.
    """

    times: dict[str, list[float]]
    floors: dict[str, list[float]]
    compile_seconds: float = 0.0
    peak_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    bytes_by: str = ""
    others_share: float | None = None
    gpu_state: str = ""
    error: str = ""

    def ratio(self, floor: str, of: str = "forward_backward") -> float:
        return statistics.median(self.times[of]) / statistics.median(self.floors[floor])


def measure_in_fresh_process(job: Job, timeout: float = 900.0) -> list[Measured]:
    """`Measured` of each cell; on a crash, an `error` in each."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.timing"],
            input=json.dumps(asdict(job)),
            capture_output=True,
            text=True,
            cwd=machine.ROOT,
            env=environment,
            timeout=timeout,
        )
        lines = done.stdout.strip().splitlines()
        if done.returncode == 0 and lines:
            return [Measured(**data) for data in json.loads(lines[-1])]
        error = (done.stderr.strip().splitlines() or ["no message"])[-1]
        error = f"exit code {done.returncode}: {error}"
    except subprocess.TimeoutExpired:
        error = f"took more than {timeout:.0f} s"
    return [Measured({}, {}, error=error) for _ in job.cells]


def measure(job: Job) -> list[Measured]:
    """The job in this process."""
    torch.set_num_threads(job.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = _CudaClock() if device.type == "cuda" else _HostClock()
    runs, results = [], []
    of_shape: dict[Shape, tuple[Inputs, dict[str, list[float]]]] = {}
    for cell in job.cells:
        if cell.shape not in of_shape:
            of_shape[cell.shape] = make_inputs(cell.shape, device), {name: [] for name in FLOORS}
        inputs, floor_times = of_shape[cell.shape]
        result = Measured({name: [] for name in PASSES}, floor_times)
        passes = _passes(inputs, cell.provider)
        result.compile_seconds = _first_call(passes["forward_backward"], inputs)
        if job.memory:
            _record_peak(result, passes["forward_backward"], inputs, device)
        runs += [(inputs, passes[name], result.times[name]) for name in PASSES]
        results.append(result)
    for inputs, floor_times in of_shape.values():
        runs += [(inputs, run, floor_times[name]) for name, run in floors(inputs).items()]

    with _others_share(results):
        begin = time.perf_counter()
        for turn in range(job.warmup + job.rounds):
            for inputs, run, times in runs:
                clear_gradients(inputs)
                elapsed = clock(run)
                if turn >= job.warmup:
                    times.append(elapsed)
            if turn >= job.warmup + 2 and time.perf_counter() - begin > job.max_seconds:
                break
    for result in results:
        steady = statistics.median(result.times["forward_backward"]) / 1e3
        result.compile_seconds = max(0.0, result.compile_seconds - steady)
        result.gpu_state = machine.gpu_state() if device.type == "cuda" else ""
    return results


def _passes(inputs: Inputs, provider: str) -> dict[str, Callable[[], Any]]:
    loss = PROVIDERS[provider].prepare(inputs)
    return {"forward": loss, "forward_backward": lambda: loss().backward()}


def _first_call(run: Callable[[], Any], inputs: Inputs) -> float:
    """Seconds of the first call: compilation, and first touches of memory."""
    clear_gradients(inputs)
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


class _HostClock:
    def __call__(self, run: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)


class _CudaClock:
    def __init__(self) -> None:
        self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Callable[[], Any]) -> float:
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)


def _record_peak(result: Measured, run: Callable[[], Any], inputs: Inputs, device: torch.device) -> None:
    clear_gradients(inputs)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        result.peak_bytes = torch.cuda.max_memory_allocated() - allocated
        result.peak_reserved_bytes = torch.cuda.max_memory_reserved() - reserved
        result.bytes_by = "CUDA caching allocator"
    else:
        result.peak_bytes = peak_of_allocations(run)
        result.bytes_by = "torch.profiler: the CPU allocator's events"


def peak_of_allocations(run: Callable[[], Any]) -> int:
    """Most bytes that PyTorch's CPU allocator had given out at any time since `run` began, and not yet taken back.

    Real allocations, those of compiled and custom operators too; scratch memory of the BLAS library is not among them.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


@contextmanager
def _others_share(results: Sequence[Measured]) -> Iterator[None]:
    """Record which share of the machine's processor time went to other processes; nothing where /proc is missing."""
    before = _processor_seconds()
    yield
    after = _processor_seconds()
    if before is not None and after is not None:
        busy, own, total = (b - a for a, b in zip(before, after, strict=True))
        share = max(0.0, busy - own) / max(total, 1e-9)
        for result in results:
            result.others_share = round(share, 4)


def _processor_seconds() -> tuple[float, float, float] | None:
    """(all processes' busy time, this process's, busy and idle), in seconds."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, idle, wait, irq, soft, steal = (int(x) / ticks for x in stat.read_text().split()[1:9])
    busy = user + nice + system + irq + soft + steal
    own = os.times()
    return busy, own.user + own.system, busy + idle + wait


def main() -> None:
    results = measure(Job.of_json(sys.stdin.read()))
    print(json.dumps([asdict(x) for x in results]))


if __name__ == "__main__":
    main()
