"""Two processes on gloo, for what only shows between ranks."""

from __future__ import annotations

import datetime
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD_SIZE = 2


def run(function: Callable[..., Any], directory: Path, *arguments: Any, timeout_s: float = 300) -> list[Any]:
    """`function(rank, *arguments)` in `WORLD_SIZE` fresh processes of one group; what each returned, by rank.

    An exception in a process is raised here with its traceback. Processes that wait for one another are ended.
    """
    context = mp.spawn(_main, (function, str(directory), arguments), nprocs=WORLD_SIZE, join=False)
    end = time.monotonic() + timeout_s
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} did not end within {timeout_s:.0f} s: ranks wait for one another")
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(WORLD_SIZE)]


def _main(rank: int, function: Callable[..., Any], directory: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/rendezvous", datetime.timedelta(seconds=240), WORLD_SIZE, rank)
    try:
        torch.save(function(rank, *arguments), f"{directory}/{rank}.pt")
    finally:
        # DDP is freed by the collector alone. Until then gloo's threads live, and they may meet the end of Python.
        gc.collect()
        dist.destroy_process_group()
