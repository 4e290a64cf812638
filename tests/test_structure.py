"""How short the way is: the frames and files between a loss call and a kernel's launch, and the size of the whole."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from fused_lk.kernels import launch

import fused_lk

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (ROOT / "fused_lk", ROOT / "kernels")
# What a call passes through, and the lines of all sources: a change that needs more of either has a reason to give.
# (The last 1,300 lines: every draft kind of two trainers, their launchers, and the bytes of the loss that is replaced.
# 50 more: products that a device has. 250: logits that are kept, in both walks, in graphs, and in `explain`. 10: what
# torch 2.11 cannot trace. 50: the loss as a function of the statistics, in place of what autograd did there. 190:
# statistics and gradient in one kernel.)
MOST_FRAMES, MOST_FILES, MOST_LINES = 7, 12, 11_060


@cache  # A profiled call of an interpreted kernel asks this some 100,000 times.
def ours(filename):
    """The path of one of the project's files; None for others."""
    path = Path(filename).resolve()
    return path if any(path.is_relative_to(folder) for folder in SOURCES) else None


def is_ours(frame):
    return ours(frame.f_code.co_filename) is not None


def way(call):
    """`(frames, files)`: the deepest stack of the project's frames at a launch, and its files that ran before the first
    launch."""
    depths, files = [], set()

    def watch(frame, event, _):
        if event != "call" or not is_ours(frame):
            return
        if not depths:
            files.add(ours(frame.f_code.co_filename))
        if frame.f_code is launch._launch.__code__:
            depth = 0
            while frame is not None:
                depth, frame = depth + is_ours(frame), frame.f_back
            depths.append(depth)

    call()  # what is imported and found once
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return max(depths), sorted(path.name for path in files)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("options", [{}, {"objective": "kl"}, {"objective": "alpha", "plan": "recompute"}], ids=str)
def test_from_the_loss_to_the_launch(options, pairs):
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    target = fused_lk.Target.from_hidden(torch.randn(6, 8), torch.randn(16, 8), impl="triton")
    options = {**options, "impl": "triton", "pairs": fused_lk.Pairs(torch.arange(6) < 4) if pairs else None}
    frames, files = way(lambda: fused_lk.lk_loss(hidden, weight, target, **options))
    assert frames <= MOST_FRAMES
    assert len(files) <= MOST_FILES, files


def test_from_the_primitive_to_the_launch():
    target = fused_lk.Target.from_logits(torch.randn(6, 16))
    frames, files = way(lambda: fused_lk.lk_divergences_from_logits(torch.randn(6, 16), target, impl="triton"))
    assert frames <= MOST_FRAMES
    assert len(files) <= MOST_FILES, files


def test_the_size():
    lines = sum(len(path.read_text().splitlines()) for folder in SOURCES for path in folder.rglob("*.py"))
    assert lines <= MOST_LINES
