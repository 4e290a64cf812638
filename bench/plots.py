"""Two figures from a result file: time against the floor per shape, and how time and bytes grow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .report import MIB, Row

# Ours in saturated colours, others in grey or pale; the same in every figure.
STYLE: dict[str, tuple[str, str]] = {
    "ours-one-pass": ("#d62728", "o"),
    "ours-default": ("#1f77b4", "s"),
    "ours-recompute": ("#17becf", "D"),
    "specforge-eager": ("#444444", "^"),
    "speculators-eager": ("#888888", "v"),
    "specforge-compiled": ("#b58900", "<"),
    "checkpointed": ("#9b7fb5", "P"),
    "liger-chunked": ("#8fbc5a", "X"),
}
OTHER = ("#c0a080", "*")
AXES = {
    "num_tokens": "tokens",
    "draft_vocab_size": "vocabulary",
    "ttt_steps": "TTT steps in one call",
    "masked_share": "share of masked tokens",
}


def draw(rows: Sequence[Row], folder: Path, stem: str) -> list[Path]:
    """Write the figures that the rows have data for; returns their paths."""
    timed = [row for row in rows if row.passes == "forward_backward" and row.median_ms is not None]
    named = [row for row in timed if not row.series]
    grown = [row for row in timed if row.series]
    made = []
    if named:
        made.append(_save(_ratios(named), folder / f"{stem}-ratio.png"))
    if grown:
        made.append(_save(_scaling(grown), folder / f"{stem}-scaling.png"))
    return made


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path


def _ratios(rows: Sequence[Row]) -> Any:
    shapes = list(dict.fromkeys(row.shape for row in rows))
    figure, axes = plt.subplots(1, len(shapes), figsize=(4.2 * len(shapes), 3.8), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        bars = sorted((row for row in rows if row.shape == shape), key=lambda row: row.ratio_from_hidden, reverse=True)
        labels = [row.provider + (" *" if row.less else "") for row in bars]
        values = [row.ratio_from_hidden for row in bars]
        floor = bars[0].floor_from_hidden_ms
        spread = [
            [value - row.lower_quartile_ms / row.floor_from_hidden_ms for value, row in zip(values, bars, strict=True)],
            [row.upper_quartile_ms / row.floor_from_hidden_ms - value for value, row in zip(values, bars, strict=True)],
        ]
        spread = [[max(0.0, x) for x in side] for side in spread]
        colours = [STYLE.get(row.provider, OTHER)[0] for row in bars]
        axis.barh(labels, values, xerr=spread, color=colours, error_kw={"lw": 1, "capsize": 2})
        axis.axvline(1.0, color="black", lw=1, ls="--")
        axis.set_xlim(0, 1.18 * max(v + e for v, e in zip(values, spread[1], strict=True)))
        for y, (value, right) in enumerate(zip(values, spread[1], strict=True)):
            axis.text(value + right, y, f" {value:.2f}", va="center", fontsize=8)
        axis.set_title(f"{shape}\nfloor {floor:,.0f} ms", fontsize=10)
        axis.set_xlabel("forward + backward, x GEMM floor")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, -0.03, f"* computes less.  {_origin(rows[0])}", fontsize=8, color="#555555")
    figure.tight_layout()
    return figure


def _scaling(rows: Sequence[Row]) -> Any:
    series = [name for name in AXES if any(row.series == name for row in rows)]
    figure, axes = plt.subplots(2, len(series), figsize=(3.9 * len(series), 6.4), squeeze=False)
    for column, name in enumerate(series):
        of_series = [row for row in rows if row.series == name]
        for provider in dict.fromkeys(row.provider for row in of_series):
            points = sorted((row for row in of_series if row.provider == provider), key=lambda row: getattr(row, name))
            colour, marker = STYLE.get(provider, OTHER)
            x = [getattr(row, name) for row in points]
            axes[0][column].plot(x, [row.median_ms for row in points], color=colour, marker=marker, label=provider)
            peaks = [row.peak_bytes / MIB if row.peak_bytes is not None else float("nan") for row in points]
            axes[1][column].plot(x, peaks, color=colour, marker=marker)
        floors: dict[float, float] = {}
        for row in of_series:
            floors.setdefault(getattr(row, name), row.floor_from_hidden_ms)
        x = sorted(floors)
        axes[0][column].plot(x, [floors[value] for value in x], color="black", ls="--", lw=1, label="GEMM floor")
        for axis, label in ((axes[0][column], "ms"), (axes[1][column], "peak MiB beyond the inputs")):
            axis.set_xlabel(AXES[name])
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel(label)
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        lines, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=len(lines), fontsize=9, frameon=False
    )
    row = rows[0]
    what = f"forward + backward; H {row.hidden_size:,}, {row.dtype}.  {_origin(row)}"
    figure.text(0.01, -0.02, what, fontsize=8, color="#555555")
    figure.tight_layout()
    return figure


def _origin(row: Row) -> str:
    where = f"{row.cpu}, {row.threads} threads" if row.device == "cpu" else row.device
    return f"{where}; {row.versions.split()[0]}; commit {row.commit}; {row.date[:10]}"
