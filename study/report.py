"""What came out, on one page: tables in Markdown, plots beside it, and where each number is from."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import fused_lk

from . import lines, plots, stage, trials
from .decode import Counts
from .settings import LOSSES, Settings


@dataclass(frozen=True)
class Trained:
    """The trainings of one loss, a list entry for each seed."""

    loss: str
    logs: list[list[dict[str, Any]]]
    curves: list[list[dict[str, Any]]]
    decoded: dict[float, list[Counts]]  # by temperature

    @property
    def name(self) -> str:
        return LOSSES[self.loss][0]

    def final(self, metric: str) -> list[float]:
        return [curve[-1][metric] for curve in self.curves]


def gathered(settings: Settings) -> list[Trained]:
    """The results of every loss, read from the files of training and decoding."""
    trained, decoded = settings.folder / "train", settings.folder / "decode"
    return [
        Trained(
            loss,
            [lines.read(trained / f"{loss}-{seed}" / "log.jsonl") for seed in settings.seeds],
            [lines.read(trained / f"{loss}-{seed}" / "curve.jsonl") for seed in settings.seeds],
            {
                t: [trials.counts_of(decoded / f"{loss}-{seed}", f"t{t:g}-*.json")[0] for seed in settings.seeds]
                for t in settings.temperatures
            },
        )
        for loss in settings.losses
    ]


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """The mean over seeds and their standard deviation; a single seed has none."""
    text = f"{mean(values):{form}}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):{form}}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column to the left, numbers to the right."""
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def decoding_table(results: list[Trained], temperature: float) -> str:
    """The columns of SpecForge's pull request 492."""
    length = results[0].decoded[temperature][0].draft_length
    header = ["loss", "output tokens", "drafts", "draft tokens", "accepted tokens", "mean acceptance length"]
    header += [f"acceptance at token {k}" for k in range(length)]
    counted: list[tuple[str, Callable[[Counts], float]]] = [
        (",.0f", lambda c: c.output_tokens),
        (",.0f", lambda c: c.drafts),
        (",.0f", lambda c: c.draft_tokens),
        (",.0f", lambda c: c.accepted_tokens),
        (".3f", lambda c: c.acceptance_length),
        *((".3f", lambda c, k=k: c.rates[k]) for k in range(length)),
    ]
    rows = []
    for result in results:
        counts = result.decoded[temperature]
        row = [result.name, *(spread([of(c) for c in counts], form) for form, of in counted)]
        if len(counts) == 1:
            row[5] += f" ± {counts[0].acceptance_length_error:.3f}"
        rows.append(row)
    return table(header, rows)


def prediction_table(results: list[Trained], temperature: float) -> str:
    """Of the drafts that reach token k: how many accept it, and what alpha says of the very states that were met."""
    length = results[0].decoded[temperature][0].draft_length
    rows = []
    for result in results:
        total = sum(result.decoded[temperature][1:], result.decoded[temperature][0])
        cells = []
        for k in range(length):
            reached = max(1, total.reached_at[k])
            error = math.sqrt(total.variance_at[k]) / reached
            cells.append(f"{total.predicted_at[k] / reached:.3f} / {total.conditional_rates[k]:.3f} ± {error:.3f}")
        rows.append([result.name, *cells])
    return table(["loss: alpha / accepted", *(f"token {k}" for k in range(length))], rows)


def heldout_table(results: list[Trained], settings: Settings) -> str:
    """What the losses' own metrics say on held-out texts, at the end of training."""
    steps = range(settings.ttt_steps)
    header = ["loss", "acceptance length", "greedy acceptance length"]
    header += [*(f"alpha, step {k}" for k in steps), *(f"accuracy, step {k}" for k in steps), "KL, step 0"]
    names = ["acceptance_length", "greedy_acceptance_length"]
    names += [*(f"acceptance_rate_{k}" for k in steps), *(f"accuracy_{k}" for k in steps), "kl_0"]
    return table(header, [[r.name, *(spread(r.final(name)) for name in names)] for r in results])


def speed_table(settings: Settings) -> str:
    """Tokens per second of the drafts of the first seed, and of plain decoding by the same code."""
    folder, rows = settings.folder / "decode" / "timed", []
    for temperature in settings.temperatures:
        for batch in (1, settings.decode_batch):
            plain, wanted = trials.counts_of(folder, f"plain-t{temperature:g}-{batch}-*.json")
            for loss in (None, *settings.losses):
                counts, answers = trials.counts_of(folder, f"{loss or 'plain'}-t{temperature:g}-{batch}-*.json")
                ratio = counts.tokens_per_second / plain.tokens_per_second
                same = f"{sum(a == b for a, b in zip(answers, wanted, strict=True))} of {len(wanted)}"
                name = "plain decoding" if loss is None else LOSSES[loss][0]
                cells = [f"{temperature:g}", f"{batch}", f"{counts.output_tokens:,}", f"{counts.passes:,}"]
                cells += [f"{counts.tokens_per_second:.1f}", f"{ratio:.2f}", same if temperature == 0 else ""]
                rows.append([name, *cells])
    header = ["", "temperature", "batch", "tokens", "target passes", "tokens/s", "of plain", "same text as plain"]
    return table(header, rows)


def write(settings: Settings, facts: dict[str, Any]) -> Path:
    """The page and its plots, in the folder `report`.

    Args:
        facts: lines for the provenance, by name: the target, the texts, the time of each stage.
    """
    results, folder = gathered(settings), settings.folder / "report"
    pictures = plots.draw(results, settings, folder)
    seeds = f"{len(settings.seeds)} seed{'s' if len(settings.seeds) > 1 else ''}"
    spread_note = (
        "± is the standard deviation over seeds."
        if len(settings.seeds) > 1
        else ("There is one seed: ± is the standard error of the mean over drafts, and says nothing of other seeds.")
    )
    parts = [
        "# Does LK training raise acceptance?",
        f"{len(results)} losses, {seeds}, {settings.steps:,} steps of {settings.batch_rows} x "
        f"{settings.sequence_length} tokens each. All losses of a seed start from the same draft and read the same "
        f"texts in the same order. {spread_note}",
    ]
    for temperature in settings.temperatures:
        parts += [
            f"## Speculative decoding at temperature {temperature:g}",
            f"{settings.draft_tokens} tokens a draft. The mean acceptance length counts the target's own token. "
            "Acceptance at token k is the share of all drafts whose tokens up to k are accepted.",
            decoding_table(results, temperature),
        ]
        if temperature > 0:
            parts += [
                "Of the drafts that reach token k: alpha, as the loss computes it from the states that decoding met, "
                "and the share that was accepted, with its standard error given alpha (all seeds together).",
                prediction_table(results, temperature),
            ]
    parts += ["## Held-out texts", heldout_table(results, settings)]
    parts += [
        "## Speed",
        "Prompts included, the same code for all: plain decoding is the loop without a draft. Texts differ at "
        "temperatures above 0.",
        speed_table(settings),
        "## Plots",
        *(f"![{title}]({path.name})" for title, path in pictures.items()),
        "## Provenance",
        table(["", ""], [[name, str(value)] for name, value in {**machine(), **facts}.items()]),
        "Settings:",
        # where it lay on the machine tells nobody anything
        "```json\n" + json.dumps({**asdict(settings), "folder": settings.folder.name}, default=str, indent=1) + "\n```",
    ]
    page = folder / "report.md"
    with stage.replaced(page) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n")
    return page


def machine() -> dict[str, str]:
    """What the numbers were made with."""
    cpu = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
        if (cpu.exists())
        else []
    )
    return {
        "fused_lk": fused_lk.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "processor": f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
    }
