"""`python -m bench.gate`: the times that must hold on a CPU. 2 threads, float32, 1,024 tokens x 256 x 32,000.

Argmax, exact ties and metrics are on. Each fresh process interleaves the floor and everything measured; a ratio is
that of the medians within a process, a verdict that of the median over five processes. Processes during which others
used the machine are repeated, a few times, and the quietest five count.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass, replace

from .shapes import SHAPES
from .timing import Cell, Job, Measured, measure_in_fresh_process

SHAPE = SHAPES["cpu-gate"]
HALF = replace(SHAPE, name="cpu-gate-half-masked", masked_share=0.5)
CELLS = {
    "one pass": Cell(SHAPE, "ours-one-pass"),
    "default": Cell(SHAPE, "ours-default"),
    "kept": Cell(SHAPE, "ours-kept"),
    "one pass, half masked": Cell(HALF, "ours-one-pass"),
    "default, half masked": Cell(HALF, "ours-default"),
    "l1": Cell(SHAPE, "ours-l1"),
    "mix": Cell(SHAPE, "ours-mix"),
    "eager": Cell(SHAPE, "specforge-eager"),
    "compiled eager": Cell(SHAPE, "specforge-compiled"),
}
PROCESSES = 5
MOST_PROCESSES = 9
QUIET = 0.03  # of the machine's processor time to others


@dataclass(frozen=True)
class Gate:
    """`measured / against` is at most `limit` (`at_least`: at least); shared runners are held to `ci_limit`."""

    measured: str
    against: str
    limit: float
    ci_limit: float
    at_least: bool = False

    @property
    def name(self) -> str:
        return f"{self.measured} / {self.against}"

    def holds(self, ratio: float, limit: float) -> bool:
        return ratio >= limit if self.at_least else ratio <= limit


# The floor is matrix products alone, and CPUs differ in what those cost beside exp and cache. With the same code three
# AMD EPYCs take 1.34 to 1.45 and 1.98 to 2.14 times the floor, and eager 2.36 to 2.69 times one pass: these hold on
# each of them. An Intel Xeon with AVX-512, whose floor is 0.7 times as long, takes 2.1 and 2.9. A shared runner may be
# either; what it is held to there is the eager loss. The aims are 1.2 and 1.7, and 1.45 where logits are kept (1.7
# here): docs/plans.md says what stands between.
GATES = (
    Gate("one pass", "floor", 1.5, 2.5),
    Gate("default", "floor", 2.2, 3.6),
    Gate("kept", "default", 0.9, 0.97),
    Gate("eager", "one pass", 2.3, 2.2, at_least=True),
    Gate("one pass", "compiled eager", 0.95, 1.1),
    Gate("one pass, half masked", "one pass", 0.6, 0.7),
    Gate("default, half masked", "default", 0.6, 0.7),
    Gate("mix", "l1", 1.15, 1.25),
)


def ratios(measured: dict[str, Measured]) -> dict[str, float]:
    """Of one process: each gate's ratio of medians."""
    times = {name: statistics.median(x.times["forward_backward"]) for name, x in measured.items()}
    times["floor"] = statistics.median(measured["one pass"].floors["from_hidden"])
    return {gate.name: times[gate.measured] / times[gate.against] for gate in GATES}


def run(processes: int, most: int, rounds: int) -> list[tuple[float, dict[str, float], dict[str, Measured]]]:
    """Of each process, quietest first: `(share of others, ratios, measurements)`."""
    done: list[tuple[float, dict[str, float], dict[str, Measured]]] = []
    job = Job(list(CELLS.values()), rounds, warmup=1, threads=2, memory=False)
    while len(done) < processes or (sum(x[0] <= QUIET for x in done) < processes and len(done) < most):
        measured = dict(zip(CELLS, measure_in_fresh_process(job), strict=True))
        broken = {name: x.error for name, x in measured.items() if x.error}
        if broken:
            raise RuntimeError(f"a process failed: {broken}")
        share = measured["one pass"].others_share or 0.0
        done.append((share, ratios(measured), measured))
        print(f"  process {len(done)}: {_times(measured)}  (others: {share:.0%} of the machine)", flush=True)
    return sorted(done, key=lambda x: x[0])[:processes]


def _times(measured: dict[str, Measured]) -> str:
    floor = statistics.median(measured["one pass"].floors["from_hidden"])
    rest = (f"{name} {statistics.median(x.times['forward_backward']):.0f}" for name, x in measured.items())
    return f"floor {floor:.0f} ms, " + ", ".join(rest)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description=__doc__.splitlines()[0])
    parser.add_argument("--ci", action="store_true", help="fail only past the limits for shared runners")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    done = run(options.processes, max(MOST_PROCESSES, options.processes), options.rounds)
    noisy = max(share for share, _, _ in done)
    failed = 0
    print(f"{'gate':42} {'median':>7} {'spread':>15} {'limit':>8} {'in CI':>7}")
    for gate in GATES:
        values = sorted(x[gate.name] for _, x, _ in done)
        median = statistics.median(values)
        limit = gate.ci_limit if options.ci else gate.limit
        holds = gate.holds(median, limit)
        failed += not holds
        limits = f"{'>=' if gate.at_least else '<='} {gate.limit:5.2f} {gate.ci_limit:7.2f}"
        spread = f"{values[0]:7.3f}-{values[-1]:.3f}"
        print(f"{gate.name:42} {median:7.3f} {spread:>15} {limits}  {'holds' if holds else 'FAILS'}")
    if noisy > QUIET:
        print(
            f"other processes used up to {noisy:.0%} of the machine: repeat on a quiet one before believing a failure"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
