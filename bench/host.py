"""`python -m bench.host`: what the host does in one training step, and the time of a step that is nothing but that.

Operations are those that PyTorch dispatches, views apart. A wait is an operation whose result the host reads. Calls are
counted as a GPU would walk them, on fake tensors, with kernels that are counted and not launched; work lists with rows
that do not count are made before, at one wait each. Their times are those of the same calls on CPU tensors of a few
numbers: Python, PyTorch's dispatch, and next to no arithmetic. (What a driver takes for a launch would be on top.) The
tiny step runs for real: 64 tokens x 64 x 512, float32, one thread, the rounds of all providers interleaved.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import machine, providers
from .accounting import full_size
from .shapes import SHAPES, make_inputs

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"}
TINY = replace(SHAPES["cpu-gate"], name="tiny", num_tokens=64, hidden_size=64, draft_vocab_size=512)
TINY = replace(TINY, target_vocab_size=512)
ROUNDS = 200


class Count(TorchDispatchMode):
    """`with Count() as seen:` counts operations, views and waits."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.views = self.waits = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.views += func.is_view
        self.operations += not func.is_view and func.namespace == "aten"  # "prim": fake tensors say where they are
        self.waits += func._schema.name in WAITS
        return func(*args, **(kwargs or {}))

    def launch(self, *_: Any, **__: Any) -> None:
        self.launches += 1


def of_a_step(chunks: int, **options: Any) -> Count:
    """One step that walks so many chunks."""
    with prepared(True, chunks, 256, 64, 512, **options) as step, Count() as seen, launches(seen.launch):
        step()
    return seen


def microseconds(chunks: int, **options: Any) -> float:
    """Processor time of the same step without kernels, on tensors of a few numbers."""

    def no_index(_: str, __: Any, ___: Any, arguments: tuple, *____: Any, **_____: Any) -> None:
        for x in arguments:
            if isinstance(x, Tensor) and x.dtype == torch.int64:
                x.zero_()  # what is unwritten is no token

    times = []
    with prepared(False, chunks, 2, 4, 64, **options) as step, launches(no_index):
        for _ in range(ROUNDS):
            begin = time.process_time()
            step()
            times.append(1e6 * (time.process_time() - begin))
    return statistics.median(times)


def launches(stub: Callable[..., None]) -> Any:
    from fused_lk.kernels import launch

    return mock.patch.object(launch, "_launch", stub)


@contextlib.contextmanager
def prepared(
    fake: bool, chunks: int, rows: int, h: int, v: int, steps: int = 1, **options: Any
) -> Iterator[Callable[[], None]]:
    """A step whose chunks have `rows` rows; the target comes from hidden states over a larger vocabulary."""
    import fused_lk

    tokens, full = rows * chunks, v + v // 4
    dtype = torch.bfloat16 if fake else torch.float32  # a CPU has no product of bfloat16 with a float32 result
    vocab = fused_lk.DraftVocab(torch.arange(full) < v)
    pairs = fused_lk.Pairs.ttt(torch.ones(1, tokens, dtype=torch.bool), steps) if steps > 1 else None

    def made(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    with full_size("cuda", fake):
        hidden = [made(1, tokens, h).requires_grad_() for _ in range(steps)]
        head, weight, states = fused_lk.TargetHead(made(full, h), vocab), made(v, h).requires_grad_(), made(tokens, h)
        how = {"impl": "triton", "workspace_mb": 1.02 * rows * (steps + 1) * v * dtype.itemsize / 2**20}

        def step() -> None:
            target = fused_lk.Target.from_hidden(states, head, impl="triton")
            given = hidden if steps > 1 else hidden[0].view(tokens, h)
            fused_lk.lk_loss(given, weight, target, pairs=pairs, **{**how, **options}).loss.backward()

        yield step


def tiny(names: list[str]) -> dict[str, tuple[Count, float]]:
    """Operations, and microseconds of processor time of a step."""
    inputs = make_inputs(TINY, torch.device("cpu"))
    runs = {name: providers.PROVIDERS[name].prepare(inputs) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}

    def step(run: Callable[[], Tensor]) -> None:
        providers.clear_gradients(inputs)
        run().backward()

    for turn in range(ROUNDS + 5):
        for name, run in runs.items():
            begin = time.process_time()
            step(run)
            if turn >= 5:
                times[name].append(1e6 * (time.process_time() - begin))
    counts = {}
    for name, run in runs.items():
        with Count() as counts[name]:
            step(run)
    return {name: (counts[name], statistics.median(times[name])) for name in names}


CALLS: dict[str, dict[str, Any]] = {
    "one pass": {"objective": "alpha"},
    "default (recompute)": {},
    "default, all kept": {"keep_mb": 1000},
    "default, 3 TTT steps": {"steps": 3},
}


def main() -> None:
    torch.set_num_threads(1)
    where = machine.provenance(1)
    print(f"`python -m bench.host`, {where['cpu']}, {where['versions'].split()[0]}, commit {where['commit']}\n")
    print("| a step | operations | views | kernels | waits | us | a further chunk: operations | kernels | us |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, options in CALLS.items():
        one, four = of_a_step(1, **options), of_a_step(4, **options)
        us, us_of_four = microseconds(1, **options), microseconds(4, **options)
        more = f"{(four.operations - one.operations) / 3:.0f} | {(four.launches - one.launches) / 3:.1f}"
        cells = f"{one.operations} | {one.views} | {one.launches} | {one.waits} | {us:.0f} | {more}"
        print(f"| {name} | {cells} | {(us_of_four - us) / 3:.0f} |")
    print("\n| a tiny step on the CPU | operations | views | waits | us | times eager |")
    print("|---|---|---|---|---|---|")
    found = tiny(["specforge-eager", "ours-one-pass", "ours-default"])
    eager = found["specforge-eager"][1]
    for name, (seen, us) in found.items():
        title = providers.PROVIDERS[name].title
        print(f"| {title} | {seen.operations} | {seen.views} | {seen.waits} | {us:.0f} | {us / eager:.2f} |")


if __name__ == "__main__":
    main()
