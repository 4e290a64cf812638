"""Two figures from a result file: time against the floor per shape, and how time and bytes grow.

`python -m bench.plots bench/results/<file>.csv` draws them again, and measures nothing. They are made to be read at 800
pixels: 8 inches wide, and no letter below `SMALLEST` points.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .report import MIB, Row, read_csv, title

# By provider: colour and marker. Ours are saturated, others grey or pale, in every figure.
STYLE: dict[str, tuple[str, str]] = {
    "ours-one-pass": ("#d62728", "o"),
    "ours-default": ("#1f77b4", "s"),
    "ours-kept": ("#2ca02c", "*"),
    "ours-recompute": ("#17becf", "D"),
    "ours-l1": ("#e377c2", "p"),
    "ours-mix": ("#9467bd", "h"),
    "specforge-eager": ("#444444", "^"),
    "specforge-compiled": ("#b58900", "<"),
    "speculators-eager": ("#888888", "v"),
    "speculators-fused": ("#b0b0b0", ">"),
    "checkpointed": ("#9b7fb5", "P"),
    "liger-chunked": ("#8fbc5a", "X"),
    "liger-jsd": ("#a5c882", "d"),
    "liger-kl": ("#bcd4a2", "H"),
    "torch-linear-ce": ("#c0a080", "1"),
    "cut-cross-entropy": ("#d4bc9c", "8"),
}
# The default is a recompute too, and three lines of ours crowd the plot.
LEFT_OUT = ("ours-recompute",)
AXES = {
    "num_tokens": "tokens",
    "draft_vocab_size": "vocabulary",
    "ttt_steps": "TTT steps in one call",
    "masked_share": "share of masked tokens",
}
WIDTH, SMALLEST = 8.0, 9.0  # inches, points
FONTS = {"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}


def draw(rows: Sequence[Row], folder: Path, stem: str) -> list[Path]:
    """Write the figures that the rows have data for; returns their paths."""
    made = []
    for name, figure in figures(rows).items():
        made.append(folder / f"{stem}-{name}.png")
        figure.savefig(made[-1], dpi=200)
        plt.close(figure)
    return made


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """By the end of its file's name, each figure that the rows have data for."""
    timed = [row for row in rows if row.passes == "forward_backward" and row.median_ms is not None]
    timed = [row for row in timed if row.provider not in LEFT_OUT]
    named, grown = ([row for row in timed if bool(row.series) == is_grown] for is_grown in (False, True))
    with matplotlib.rc_context(FONTS):
        return {name: plot(x) for name, plot, x in (("ratio", _ratios, named), ("scaling", _scaling, grown)) if x}


def _ratios(rows: Sequence[Row]) -> Any:
    """A panel for each shape, two beside each other, with the same order of losses in all."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    names = list(dict.fromkeys(row.provider for row in sorted(rows, key=_order(shapes), reverse=True)))
    columns = min(2, len(shapes))
    lines = -(-len(shapes) // columns)
    height = 1.15 + 0.27 * len(names)
    figure, axes = plt.subplots(
        lines, columns, figsize=(WIDTH, height * lines), squeeze=False, sharey=True, layout="constrained"
    )
    for axis in axes.flat[len(shapes) :]:
        axis.set_visible(False)
    for axis, shape in zip(axes.flat, shapes, strict=False):
        of_shape = {row.provider: row for row in rows if row.shape == shape}
        for y, name in enumerate(names):
            if name in of_shape:
                _bar(axis, y, of_shape[name])
        floor = statistics.median(row.floor_from_hidden_ms for row in of_shape.values())
        axis.axvline(1.0, color="black", lw=1.2, ls="--")
        axis.set_xlim(0, 1.22 * max(row.ratio_from_hidden for row in of_shape.values()))
        axis.set_title(f"{_described(next(iter(of_shape.values())))}\nfloor {floor:,.0f} ms")
        axis.set_yticks(range(len(names)), [_label(name, rows) for name in names])
    figure.supxlabel(
        f"forward + backward, in times of the products alone (dashed)\n{_star(rows)}{_origin(rows[0])}", size=9
    )
    return figure


def _order(shapes: Sequence[str]) -> Any:
    return lambda row: (-shapes.index(row.shape), row.ratio_from_hidden)


def _bar(axis: Any, y: int, row: Row) -> None:
    value, floor = row.ratio_from_hidden, row.floor_from_hidden_ms
    lower, upper = (
        max(0.0, s * (x / floor - value)) for s, x in ((-1, row.lower_quartile_ms), (1, row.upper_quartile_ms))
    )
    colour = STYLE[row.provider][0]
    axis.barh(y, value, xerr=[[lower], [upper]], color=colour, height=0.75, error_kw={"lw": 1.2, "capsize": 2.5})
    axis.text(value + upper, y, f" {value:.2f}", va="center")


def _label(name: str, rows: Sequence[Row]) -> str:
    return title(name) + " *" * any(row.less for row in rows if row.provider == name)


def _star(rows: Sequence[Row]) -> str:
    return "* computes less.  " * any(row.less for row in rows)


def _described(row: Row) -> str:
    vocab = f"V {row.draft_vocab_size:,}"
    if row.draft_vocab_size != row.target_vocab_size:
        vocab += f" of {row.target_vocab_size:,}"
    steps = f"\n{row.ttt_steps} TTT steps, {row.masked_share:.0%} masked" * (row.ttt_steps > 1 or row.masked_share > 0)
    return f"{row.num_tokens:,} tokens, {vocab}{steps}"


def _scaling(rows: Sequence[Row]) -> Any:
    """A line of two panels for each series: time on the left, bytes on the right."""
    series = [name for name in AXES if any(row.series == name for row in rows)]
    figure, axes = plt.subplots(
        len(series), 2, figsize=(WIDTH, 0.9 + 2.2 * len(series)), squeeze=False, layout="constrained"
    )
    for (of_time, of_bytes), name in zip(axes, series, strict=True):
        of_series = sorted((row for row in rows if row.series == name), key=lambda row: getattr(row, name))
        for provider in dict.fromkeys(row.provider for row in rows):
            points = [row for row in of_series if row.provider == provider]
            label, (colour, marker) = title(provider), STYLE[provider]
            x = [getattr(row, name) for row in points]
            style = {"color": colour, "marker": marker, "ms": 6, "lw": 2}
            of_time.plot(x, [row.median_ms for row in points], label=label, **style)
            peaks = [row.peak_bytes / MIB if row.peak_bytes is not None else float("nan") for row in points]
            of_bytes.plot(x, peaks, **style)
        floors = {getattr(row, name): row.floor_from_hidden_ms for row in reversed(of_series)}
        x = sorted(floors)
        of_time.plot(x, [floors[value] for value in x], color="black", ls="--", lw=1.5, label="the products alone")
        for axis, label in ((of_time, "ms"), (of_bytes, "peak MiB")):
            axis.set(xlabel=AXES[name], ylabel=label)
            axis.set_ylim(bottom=0)
            axis.locator_params(nbins=5)
            axis.grid(alpha=0.25)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncol=3, frameon=False)
    row = rows[0]
    what = f"forward + backward; peaks beyond the inputs; H {row.hidden_size:,}, {row.dtype}\n{_origin(row)}"
    figure.supxlabel(what, size=9)
    return figure


def _origin(row: Row) -> str:
    where = f"{row.cpu}, {row.threads} threads" if row.device == "cpu" else row.device
    return f"{where}; {row.versions.split()[0]}; commit {row.commit}; {row.date[:10]}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, nargs="+", help="result files; the figures are written beside them")
    for path in parser.parse_args().csv:
        for made in draw(read_csv(path), path.parent, path.stem):
            print(made)


if __name__ == "__main__":
    main()
