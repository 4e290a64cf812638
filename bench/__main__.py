"""`python -m bench`: providers x shapes and scaling series, timed in fresh processes; CSV, Markdown and plots.

The numeric parity gate runs first: a provider that disagrees with the float64 oracle is reported, not timed. A failed
cell is a row of the CSV that says why.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from . import machine, parity, plots, report
from .providers import PROVIDERS, Provider, available
from .shapes import LARGE, SHAPES, SMALL, Shape, series
from .timing import Cell, Job, measure_in_fresh_process

RESULTS = Path(__file__).resolve().parent / "results"
# In the series: what a trainer would choose from. Compiling anew for every point would take most of the time.
SERIES_PROVIDERS = ("specforge-eager", "checkpointed", "ours-one-pass", "ours-default")


def main() -> int:
    gpu = torch.cuda.is_available()
    options = _parse(gpu)
    chosen = [PROVIDERS[name] for name in options.providers] if options.providers else available(gpu)
    shapes = [SHAPES[name] for name in options.shapes] if options.shapes else list(LARGE if gpu else SMALL)
    cells = [("", shape, provider) for shape in shapes for provider in chosen]
    if not options.shapes and not options.quick:
        grown = [(name, shape) for name, shape in series("gpu" if gpu else "cpu") if name in options.series]
        cells += [(*x, p) for x in grown for p in chosen if p.name in SERIES_PROVIDERS]

    begin = time.monotonic()
    statuses = _gate(chosen, [SHAPES["cpu-gate"], SHAPES["cpu-ttt3-masked"]], "cuda" if gpu else "cpu")
    origin = machine.provenance(options.threads)
    rows: list[report.Row] = []
    path = options.out / f"{machine.file_stem()}{'-quick' if options.quick else ''}.csv"
    for name, shape, provider, status in tqdm(_with_status(cells, statuses), total=len(cells), unit="cell"):
        measured = None
        if status == "ok" and options.minutes and time.monotonic() - begin > 60 * options.minutes:
            status = f"not reached in {options.minutes:g} minutes"
        if status == "ok":
            rounds, most = (3, 4.0) if options.quick else (20, 300.0) if gpu else (5, 3.0 if name else 8.0)
            job = Job([Cell(shape, provider.name)], rounds, 3 if gpu else 1, options.threads, most)
            (measured,) = measure_in_fresh_process(job)
        rows += report.rows_of(name, shape, provider, measured, status, origin)
        report.write_csv(path, rows)
    table = report.markdown(rows)
    path.with_suffix(".md").write_text(table)
    print(table)
    for made in (path, path.with_suffix(".md"), *plots.draw(rows, options.out, path.stem)):
        print(f"wrote {os.path.relpath(made)}")
    failed = sorted({f"{row.provider} on {row.shape}: {row.status}" for row in rows if row.status != "ok"})
    print("\n".join(["not timed:", *failed]) if failed else "every cell was timed")
    shares = [row.others_share for row in rows if row.others_share is not None]
    if shares:
        print(
            f"other processes used up to {max(shares):.0%} of the machine meanwhile; above 5 % is not a quiet machine"
        )
    print(f"{time.monotonic() - begin:.0f} s")
    return 1 if any(status != "ok" for status in statuses.values()) else 0


def _gate(chosen: list[Provider], structures: list[Shape], device: str) -> dict[str, str]:
    """Provider name -> "ok", or how it disagrees with the oracle."""
    statuses = {}
    for provider in tqdm(chosen, desc="parity", unit="provider"):
        try:
            wrong = [f"{s.name}: {text}" for s in structures if (text := parity.disagreement(provider, s, device))]
        except Exception as error:  # a peer that cannot run is a finding, not the end of the run
            wrong = [f"{type(error).__name__}: {error}".splitlines()[0]]
        statuses[provider.name] = "disagrees with the oracle: " + "; ".join(wrong) if wrong else "ok"
        if wrong:
            print(f"\n{provider.name} {statuses[provider.name]}", file=sys.stderr)
    return statuses


def _with_status(
    cells: list[tuple[str, Shape, Provider]], statuses: dict[str, str]
) -> Iterator[tuple[str, Shape, Provider, str]]:
    return ((*cell, statuses[cell[2].name]) for cell in cells)


def _parse(gpu: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    names = [provider.name for provider in available(gpu)]
    parser.add_argument("--providers", nargs="+", choices=names, metavar="PROVIDER", help=f"of {', '.join(names)}")
    parser.add_argument("--series", nargs="*", choices=list(plots.AXES), default=list(plots.AXES), help="what to grow")
    parser.add_argument("--quick", action="store_true", help="three rounds a cell, no series")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1) if not gpu else os.cpu_count())
    parser.add_argument("--minutes", type=float, default=0 if gpu else 14, help="start no cell after; 0: no limit")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
