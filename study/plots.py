"""The report's plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .settings import Settings
from .stage import replaced

if TYPE_CHECKING:
    from .report import Trained

COLOURS = dict(
    zip(
        ("kl", "alpha", "lambda", "lambda-token", "lambda-10", "tv", "half"),
        ("#4c72b0", "#3c8d5a", "#dd5f32", "#e0a030", "#b5467a", "#8b6bb1", "#7f7f7f"),
        strict=True,
    )
)
STYLE: Any = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.titlesize": 11, "axes.titlelocation": "left", "font.size": 9.5, "legend.frameon": False,
}  # fmt: skip


def draw(results: list[Trained], settings: Settings, folder: Path) -> dict[str, Path]:
    """Every plot as a PNG: its title and path."""
    plots: dict[str, tuple[str, Callable[[Figure, list[Trained], Settings], None]]] = {
        "Acceptance by position": ("acceptance.png", _acceptance),
        "Held-out texts along the training": ("curves.png", _curves),
        "Gradient norm from a cold start": ("gradients.png", _gradients),
        "Share of tokens by alpha": ("alpha.png", _alphas),
    }
    paths = {}
    for title, (name, plot) in plots.items():
        with matplotlib.rc_context(STYLE), replaced(folder / name) as temporary:
            figure = Figure(figsize=(11, 4.2), layout="constrained")
            plot(figure, results, settings)
            figure.savefig(temporary, dpi=130, format="png")
        paths[title] = folder / name
    return paths


def _band(axis: Axes, x: list[float], seeds: list[list[float]], colour: str, label: str) -> None:
    """The mean over seeds, and their standard deviation around it."""
    columns = list(zip(*seeds, strict=True))
    middle = [mean(column) for column in columns]
    axis.plot(x, middle, color=colour, linewidth=1.6, marker="o" if len(x) < 20 else None, markersize=3.5, label=label)
    if len(seeds) > 1:
        off = [stdev(column) for column in columns]
        low, high = ([m + sign * s for m, s in zip(middle, off, strict=True)] for sign in (-1, 1))
        axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _acceptance(figure: Figure, results: list[Trained], settings: Settings) -> None:
    positions = [float(k) for k in range(settings.draft_tokens)]
    axes = figure.subplots(1, len(settings.temperatures), squeeze=False, sharey=True)[0]
    for axis, temperature in zip(axes, settings.temperatures, strict=True):
        for result in results:
            rates = [counts.conditional_rates for counts in result.decoded[temperature]]
            _band(axis, positions, rates, COLOURS[result.loss], result.name)
        axis.axvline(settings.ttt_steps - 0.5, color="#999999", linewidth=0.8, linestyle=":")
        axis.set(title=f"Acceptance by position, temperature {temperature:g}", xlabel="token of the draft")
        axis.set_ylim(0, 1)
    axes[0].set_ylabel("accepted, of those that are reached")
    axes[0].legend(title="dotted: end of the steps that were trained")


def _curves(figure: Figure, results: list[Trained], settings: Settings) -> None:
    axes = figure.subplots(1, 2)
    titles = {"acceptance_length": "Expected at temperature 1", "greedy_acceptance_length": "Expected at temperature 0"}
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        for result in results:
            curves = result.curves
            steps = [line["step"] for line in curves[0]]
            _band(axis, steps, [[line[metric] for line in c] for c in curves], COLOURS[result.loss], result.name)
        axis.set(title=title, xlabel="training step", ylabel=f"tokens per pass, {settings.ttt_steps} a draft")
    axes[0].legend()


def _gradients(figure: Figure, results: list[Trained], settings: Settings) -> None:
    axes = figure.subplots(1, 2, width_ratios=[3, 2])
    for result in results:
        norms = [[line["gradient_norm"] for line in log] for log in result.logs]
        steps = [float(i + 1) for i in range(len(norms[0]))]
        _band(axes[0], steps, norms, COLOURS[result.loss], result.name)
    axes[0].set(
        title="Gradient norm by loss", xlabel="step", ylabel="norm, before clipping", xscale="log", yscale="log"
    )
    axes[0].legend()
    first = [mean(log[0]["gradient_norm"] for log in result.logs) for result in results]
    axes[1].barh([result.name for result in results], first, color=[COLOURS[result.loss] for result in results])
    axes[1].set(title="At step 0, where all drafts are the same", xlabel="norm", xscale="log")
    axes[1].invert_yaxis()


def _alphas(figure: Figure, results: list[Trained], settings: Settings) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    for axis, k in zip(axes, (0, settings.ttt_steps - 1), strict=True):
        for result in results:
            shares = [curve[-1]["alpha_shares"][k] for curve in result.curves]
            bins = len(shares[0])
            _band(axis, [(i + 0.5) / bins for i in range(bins)], shares, COLOURS[result.loss], result.name)
        start = results[0].curves[0][0]["alpha_shares"][k]
        middles = [(i + 0.5) / len(start) for i in range(len(start))]
        axis.plot(middles, start, color="black", linewidth=1, linestyle=":", label="at the start")
        axis.set(title=f"Held-out tokens by alpha, step {k}", xlabel="alpha", yscale="log")
    axes[0].set_ylabel("share of tokens")
    axes[0].legend()
