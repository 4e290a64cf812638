"""`python -m bench`: providers x shapes and scaling series, timed in fresh processes; CSV, Markdown and plots.

The numeric parity gate runs first: a provider that disagrees with the float64 oracle is reported, not timed. A failed
cell is a row of the CSV that says why.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

import torch

from . import machine, parity, report
from .providers import PROVIDERS, Provider, available
from .shapes import LARGE, SERIES, SHAPES, SMALL, Shape, series
from .timing import Cell, Job, measure_in_fresh_process

RESULTS = Path(__file__).resolve().parent / "results"
AXES = tuple(SERIES["gpu"])  # the CPU's are the same
# In the series: what a trainer would choose from. Compiling anew for every point would take most of the time.
SERIES_PROVIDERS = ("specforge-eager", "checkpointed", "ours-one-pass", "ours-default")


def main() -> int:
    gpu = torch.cuda.is_available()
    options = _parse(gpu)
    chosen = [PROVIDERS[name] for name in options.providers] if options.providers else available(gpu)
    shapes = list(LARGE if gpu else SMALL) if options.shapes is None else [SHAPES[name] for name in options.shapes]
    cells = [("", shape, provider) for shape in shapes for provider in chosen]
    axes = options.series if options.series is not None else () if options.shapes or options.quick else AXES
    grown = [(name, shape) for name, shape in series("gpu" if gpu else "cpu") if name in axes]
    cells += [(*x, p) for x in grown for p in chosen if p.name in SERIES_PROVIDERS]

    begin = time.monotonic()
    statuses = _gate(chosen, [SHAPES["cpu-gate"], SHAPES["cpu-ttt3-masked"]], "cuda" if gpu else "cpu")
    origin = machine.provenance(options.threads)
    rows: list[report.Row] = []
    path = options.out / f"{machine.file_stem()}{'-quick' if options.quick else ''}.csv"
    for number, (name, shape, provider) in enumerate(cells, 1):
        measured, status = None, statuses[provider.name]
        if status == "ok" and options.minutes and time.monotonic() - begin > 60 * options.minutes:
            status = f"not reached in {options.minutes:g} minutes"
        if status == "ok":
            rounds, most = (3, 4.0) if options.quick else (20, 300.0) if gpu else (5, 3.0 if name else 8.0)
            job = Job([Cell(shape, provider.name)], rounds, 3 if gpu else 1, options.threads, most)
            (measured,) = measure_in_fresh_process(job)
        rows += report.rows_of(name, shape, provider, measured, status, origin)
        report.write_csv(path, rows)
        told = rows[-1].status if rows[-1].median_ms is None else f"{rows[-1].median_ms:.2f} ms"
        print(f"{number}/{len(cells)}  {shape.name}  {provider.name}: {told}", flush=True)
    table = report.markdown(rows)
    path.with_suffix(".md").write_text(table)
    print(table)
    for made in (path, path.with_suffix(".md"), *_draw(rows, options.out, path.stem)):
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
    for provider in chosen:
        try:
            wrong = [f"{s.name}: {text}" for s in structures if (text := parity.disagreement(provider, s, device))]
        except Exception as error:  # a peer that cannot run is a finding, not the end of the run
            wrong = [f"{type(error).__name__}: {error}".splitlines()[0]]
        statuses[provider.name] = "disagrees with the oracle: " + "; ".join(wrong) if wrong else "ok"
        if wrong:
            print(f"{provider.name} {statuses[provider.name]}", file=sys.stderr)
    return statuses


def _draw(rows: list[report.Row], folder: Path, stem: str) -> list[Path]:
    """The plots; none where matplotlib is missing, and the table stands."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        return []
    from . import plots

    return plots.draw(rows, folder, stem)


def _parse(gpu: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    names = [provider.name for provider in available(gpu)]
    parser.add_argument("--providers", nargs="+", choices=names, metavar="PROVIDER", help=f"of {', '.join(names)}")
    parser.add_argument("--series", nargs="*", choices=AXES, help=f"of {', '.join(AXES)}: what to grow")
    parser.add_argument("--quick", action="store_true", help="three rounds a cell, no series")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1) if not gpu else os.cpu_count())
    parser.add_argument("--minutes", type=float, default=0 if gpu else 14, help="start no cell after; 0: no limit")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
