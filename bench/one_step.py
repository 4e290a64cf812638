"""One forward and backward of each provider, between `cudaProfilerStart` and `Stop`: for ncu and nsys.

ncu --profile-from-start off ... python -m bench.one_step llama3.1-8b-eagle3 ours-one-pass
"""

from __future__ import annotations

import sys

import torch

from .providers import PROVIDERS, clear_gradients
from .shapes import SHAPES, make_inputs


def main(shape: str, *providers: str) -> None:
    gpu = torch.cuda.is_available()
    inputs = make_inputs(SHAPES[shape], "cuda" if gpu else "cpu")
    losses = [PROVIDERS[name].prepare(inputs) for name in providers]
    for profiled in (False, True):  # the first round compiles
        if profiled and gpu:
            torch.cuda.profiler.start()
        for loss in losses:
            clear_gradients(inputs)
            loss().backward()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
