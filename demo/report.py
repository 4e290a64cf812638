"""What was measured: tables for the terminal, and a picture of the training curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import fused_lk

from .cost import MIB, Cost
from .decode import Decoding
from .train import NAMES, Evaluation, Run

COLOURS = {"kl": "#4c72b0", "lambda": "#dd5f32", "alpha": "#3c8d5a", "tv": "#8b6bb1"}


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text columns, the first flush left, under a title; an empty row is a rule."""
    cells = [header, *(row for row in rows if row)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join([row[0].ljust(widths[0]), *rest]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join(["", title, rule, line(header), rule, *(line(row) if row else rule for row in rows), rule])


def held_out_table(runs: list[Run], title: str) -> str:
    """Acceptance, accuracy and KL per position; differences from the first run, with their standard errors."""
    last = [run.final for run in runs]
    first, others = last[0], last[1:]
    header = ["", *(NAMES[run.objective] for run in runs)]
    header += [f"{NAMES[run.objective]} - {NAMES[runs[0].objective]}" for run in runs[1:]]
    steps = range(len(first.acceptance))
    rows: list[list[str]] = []
    for k in steps:
        differences = [_difference(first, other, lambda rates, k=k: rates[..., k]) for other in others]
        rows.append(
            [f"acceptance rate, position {k}", *(f"{e.acceptance[k]:.4f}" for e in last), *map(_signed, differences)]
        )
    differences = [_difference(first, other, _length) for other in others]
    rows += [[], ["expected acceptance length", *(f"{e.length:.4f}" for e in last), *map(_signed, differences)]]
    for name in ("accuracy", "kl"):
        rows.append([])
        label = {"accuracy": "accuracy (same argmax)", "kl": "KL(p~, q) in nats"}[name]
        for k in steps:
            values = [float(getattr(e, name)[k]) for e in last]
            gains = [f"{value - values[0]:+.4f}" + " " * len(" ± 0.0000") for value in values[1:]]
            rows.append([f"{label}, position {k}", *(f"{value:.4f}" for value in values), *gains])
    return table(title, header, rows)


def _length(rates: Tensor) -> Tensor:
    return fused_lk.expected_acceptance_length(rates.movedim(-1, 0))


def _difference(first: Evaluation, other: Evaluation, of: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """`of(mean rates)` of `other` less that of `first`, and its jackknife error over the windows they share."""
    pair = [e.windows.double() for e in (first, other)]
    n = len(pair[0])
    a, b = (of(x.mean(0)) for x in pair)
    if n < 2:
        return float(b - a), float("nan")
    left_out = [of((x.sum(0) - x) / (n - 1)) for x in pair]
    spread = left_out[1] - left_out[0]
    return float(b - a), float(((n - 1) / n * (spread - spread.mean()).square().sum()).sqrt())


def _signed(value_and_error: tuple[float, float]) -> str:
    return "{:+.4f} ± {:.4f}".format(*value_and_error)


def decoding_table(runs: list[Run], decodings: list[Decoding], title: str) -> str:
    """Acceptance in real speculative sampling, beside what alpha predicts for the very contexts that were met."""
    header = [""]
    for run in runs:
        header += [f"{NAMES[run.objective]}: alpha", "accepted"]
    rows = []
    for k in range(len(decodings[0].reached)):
        row = [f"acceptance rate, position {k}"]
        for d in decodings:
            n = max(1.0, float(d.reached[k]))
            error = float(d.variance[k]) ** 0.5 / n
            row += [f"{float(d.predicted[k]) / n:.4f}", f"{float(d.accepted[k]) / n:.4f} ± {error:.4f}"]
        rows.append(row)
    row = ["tokens per pass of the target"]
    for d in decodings:
        row += [f"{d.predicted_length:.4f}", f"{d.length:.4f} ± {d.length_error:.4f}"]
    rows += [[], row]
    row = ["  as held-out text predicted it"]
    for run in runs:
        row += [f"{run.final.length:.4f}", ""]
    return table(title, header, [*rows, row])


def cost_table(costs: dict[str, Cost], title: str) -> str:
    rows = [
        [name, f"{c.peak_bytes / MIB:.1f} MiB", f"{c.seconds * 1e3:.0f} ms", f"{c.loss:.7f}"]
        for name, c in costs.items()
    ]
    return table(title, ["", "peak beyond inputs", "time", "loss"], rows)


def picture(path: Path, runs: list[Run], target_losses: list[float], decodings: list[Decoding]) -> None:
    """The training curves: the target's, the drafts' on held-out text, how far they lie apart, and where they end."""
    style = {
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
        "axes.titlesize": 11, "axes.titlelocation": "left", "font.size": 9.5, "legend.frameon": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(12, 8), layout="constrained")
        axes = figure.subplots(2, 2)
        _plot_target(axes[0, 0], target_losses)
        _plot_lengths(axes[0, 1], runs)
        _plot_differences(axes[1, 0], runs)
        _plot_positions(axes[1, 1], runs, decodings)
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)


def _plot_target(axis: Axes, losses: list[float]) -> None:
    axis.plot(losses, color="#999999", linewidth=0.6, alpha=0.7, label="each batch")
    axis.plot(_smooth(losses), color="#333333", linewidth=1.6, label="smoothed")
    axis.set(title="Target: training text", xlabel="step", ylabel="cross-entropy (nats per token)")
    axis.legend(loc="upper right")


def _plot_lengths(axis: Axes, runs: list[Run]) -> None:
    for run in runs:
        colour, name = COLOURS[run.objective], NAMES[run.objective]
        lengths = _smooth([m["expected_acceptance_length"] for m in run.batches])
        axis.plot(lengths, color=colour, linewidth=0.8, alpha=0.6, label=f"{name}, training batches, smoothed")
        steps, lengths = zip(*((step, e.length) for step, e in run.curve), strict=True)
        axis.plot(steps, lengths, color=colour, linewidth=1.6, marker="o", markersize=4, label=f"{name}, held-out text")
    axis.set(title="Drafts: expected acceptance length", xlabel="step", ylabel="tokens per pass of the target")
    axis.legend(loc="lower right")


def _plot_differences(axis: Axes, runs: list[Run]) -> None:
    first, *others = runs
    axis.axhline(0, color=COLOURS[first.objective], linewidth=1.6, label=NAMES[first.objective])
    for run in others:
        steps = [step for step, _ in run.curve]
        pairs = zip(first.curve, run.curve, strict=True)
        gain, error = torch.tensor([_difference(a, b, _length) for (_, a), (_, b) in pairs]).T
        colour, label = COLOURS[run.objective], f"{NAMES[run.objective]} (± standard error)"
        axis.plot(steps, gain, color=colour, linewidth=1.6, marker="o", markersize=4, label=label)
        axis.fill_between(steps, gain - error, gain + error, color=colour, alpha=0.2, linewidth=0)
    title = f"Drafts: gain over {NAMES[first.objective]} on held-out text"
    axis.set(title=title, xlabel="step", ylabel="tokens per pass of the target")
    axis.legend()


def _plot_positions(axis: Axes, runs: list[Run], decodings: list[Decoding]) -> None:
    width = 0.8 / len(runs)
    steps = len(decodings[0].reached)
    for i, run in enumerate(runs):
        at = torch.arange(steps) + (i - (len(runs) - 1) / 2) * width
        label = f"{NAMES[run.objective]}, held-out text"
        axis.bar(at, run.final.acceptance.tolist(), width * 0.92, color=COLOURS[run.objective], alpha=0.85, label=label)
    for i, decoding in enumerate(decodings):
        at = torch.arange(steps) + (i - (len(runs) - 1) / 2) * width
        n = decoding.reached.clamp(min=1)
        axis.errorbar(
            at, (decoding.accepted / n).tolist(), (decoding.variance.sqrt() / n).tolist(),
            fmt="D", color="black", markersize=3.5, capsize=3, linewidth=1,
            label="accepted in speculative sampling (± standard error)" if i == 0 else None,
        )  # fmt: skip
    axis.set(title="Drafts: acceptance rate by position", xlabel="draft position", ylabel="acceptance rate")
    axis.set_xticks(range(steps))
    axis.grid(False, axis="x")
    axis.set_ylim(0, axis.get_ylim()[1] * 1.4)  # room for the legend
    axis.set_yticks([tick for tick in axis.get_yticks() if tick <= 1])
    axis.legend(loc="upper right")


def _smooth(values: list[float], share: float = 0.05) -> list[float]:
    """Centred means over a share of the run, over what there is of it at both ends."""
    half = int(share * len(values) / 2)
    parts = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]
