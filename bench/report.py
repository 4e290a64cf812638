"""The result file, one row per cell and pass, and what is read out of it: a Markdown table."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .providers import PROVIDERS, Provider
from .shapes import Shape
from .timing import PASSES, Measured

SCHEMA = 1
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One line of the CSV. Times in milliseconds: medians, and the quartiles around them; bytes beyond the inputs.

    `series` names what grows ("" for the named shapes); `status` is "ok", or why there are no figures. Peaks are
    those of forward + backward, in both rows of a cell.
    """

    schema: int
    series: str
    shape: str
    num_tokens: int
    hidden_size: int
    draft_vocab_size: int
    target_vocab_size: int
    dtype: str
    ttt_steps: int
    masked_share: float
    provider: str
    computes: str
    less: str
    passes: str
    status: str
    rounds: int
    median_ms: float | None
    lower_quartile_ms: float | None
    upper_quartile_ms: float | None
    floor_normaliser_given_ms: float | None
    floor_from_hidden_ms: float | None
    ratio_normaliser_given: float | None
    ratio_from_hidden: float | None
    compile_s: float | None
    peak_bytes: int | None
    peak_reserved_bytes: int | None
    bytes_by: str
    others_share: float | None
    gpu_state: str
    device: str
    cpu: str
    threads: str
    python: str
    versions: str
    commit: str
    date: str


COLUMNS = tuple(field.name for field in fields(Row))


def rows_of(
    series: str, shape: Shape, provider: Provider, measured: Measured | None, status: str, origin: dict[str, str]
) -> list[Row]:
    """The rows of one cell; `measured` None: not timed, for the reason that `status` gives."""
    what = {
        "schema": SCHEMA,
        "series": series,
        "shape": shape.name,
        **{k: v for k, v in asdict(shape).items() if k != "name"},
        "provider": provider.name,
        "computes": provider.computes,
        "less": provider.less,
        **origin,
    }
    if measured is not None and measured.error:
        status, measured = measured.error, None
    return [Row(**what, passes=name, status=status, **_figures(measured, name)) for name in PASSES]


def _figures(measured: Measured | None, passes: str) -> dict[str, Any]:
    if measured is None:
        empty = dict.fromkeys(COLUMNS[COLUMNS.index("rounds") : COLUMNS.index("device")])
        return {**empty, "rounds": 0, "bytes_by": "", "gpu_state": ""}
    times = measured.times[passes]
    lower, median, upper = quartiles(times)
    given, hidden = (statistics.median(measured.floors[x]) for x in ("normaliser_given", "from_hidden"))
    return {
        "rounds": len(times),
        "median_ms": round(median, 3),
        "lower_quartile_ms": round(lower, 3),
        "upper_quartile_ms": round(upper, 3),
        "floor_normaliser_given_ms": round(given, 3),
        "floor_from_hidden_ms": round(hidden, 3),
        "ratio_normaliser_given": round(median / given, 4),
        "ratio_from_hidden": round(median / hidden, 4),
        "compile_s": round(measured.compile_seconds, 2),
        "peak_bytes": measured.peak_bytes,
        "peak_reserved_bytes": measured.peak_reserved_bytes,
        "bytes_by": measured.bytes_by,
        "others_share": measured.others_share,
        "gpu_state": measured.gpu_state,
    }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_csv(path: Path) -> list[Row]:
    """The rows, typed as `Row` declares them.

    Raises:
        ValueError: columns that are not those of this schema.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected the columns of schema {SCHEMA}, got {reader.fieldnames}; run it again.")
        return [Row(**{name: _parse(name, text) for name, text in line.items()}) for line in reader]


_TYPES = {field.name: str(field.type) for field in fields(Row)}


def _parse(name: str, text: str) -> Any:
    kind = _TYPES[name]
    if text == "" and "None" in kind:
        return None
    return int(text) if kind.startswith("int") else float(text) if kind.startswith("float") else text


def title(provider: str) -> str:
    """What a reader calls it."""
    return PROVIDERS[provider].title


def markdown(rows: Sequence[Row]) -> str:
    """A table per named shape: forward + backward, fastest first, providers that compute less marked."""
    named = [row for row in rows if not row.series]
    parts = [_headline(rows[0])] if rows else []
    for shape in dict.fromkeys(row.shape for row in named):
        of_shape = [row for row in named if row.shape == shape]
        forward = {row.provider: row for row in of_shape if row.passes == "forward"}
        both = [row for row in of_shape if row.passes == "forward_backward"]
        both.sort(key=lambda row: (row.median_ms is None, row.median_ms or 0.0))
        parts.append(_caption(both[0]))
        parts.append(
            "| loss | forward ms | forward + backward ms (quartiles) | x floor | peak MiB | computes less |\n"
            "|---|---:|---:|---:|---:|---|"
        )
        parts[-1] += "".join("\n" + _line(forward[row.provider], row) for row in both)
    return "\n\n".join(parts) + "\n"


def _headline(row: Row) -> str:
    where = row.cpu if row.device == "cpu" else row.device
    return (
        f"{where}, {row.threads} CPU threads, {row.versions.split()[0]}, commit {row.commit}, {row.date[:10]}. "
        "Medians; x floor: against bare `torch.mm` from hidden states, timed in the same process."
    )


def _caption(row: Row) -> str:
    vocab = f"V {row.draft_vocab_size:,}" + (
        "" if row.draft_vocab_size == row.target_vocab_size else f" of {row.target_vocab_size:,}"
    )
    more = f", {row.ttt_steps} TTT steps" * (row.ttt_steps > 1) + f", {row.masked_share:.0%} masked" * bool(
        row.masked_share
    )
    return f"**{row.shape}** ({row.num_tokens:,} tokens, H {row.hidden_size:,}, {vocab}, {row.dtype}{more})"


def _line(forward: Row, both: Row) -> str:
    if both.median_ms is None:
        return f"| {title(both.provider)} | - | {both.status} | - | - | {both.less} |"
    spread = f"{both.median_ms:,.0f} ({both.lower_quartile_ms:,.0f} to {both.upper_quartile_ms:,.0f})"
    peak = "-" if both.peak_bytes is None else f"{both.peak_bytes / MIB:,.0f}"
    return (
        f"| {title(both.provider)} | {forward.median_ms:,.0f} | {spread} | {both.ratio_from_hidden:.2f} | {peak} | "
        f"{both.less or '-'} |"
    )
