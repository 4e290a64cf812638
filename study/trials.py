"""Decode held-out prompts with every draft: a file of counts for each batch of prompts, and timings.

A unit's file is written at its end, so a kill loses one batch of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import batches, stage, train
from .decode import Counts, Target, decode
from .draft import Draft
from .features import Features
from .settings import Settings
from .train import Bench


@dataclass(frozen=True)
class Unit:
    """One call of `decode`: whose draft (None: plain decoding), how, and what."""

    path: Path
    draft: str | None  # loss-seed
    temperature: float
    prompts: Sequence[Sequence[int]]
    seed: int
    predict: bool


def prompts_of(features: Features, most: int) -> list[list[int]]:
    """Up to `most` distinct prompts: what comes before the answer, in each sequence."""
    found: dict[tuple[int, ...], None] = {}
    for at in batches.sequences(features, len(features.token_ids)):
        answers = np.flatnonzero(features.mask[at])
        if len(answers) and answers[0] >= 2:
            found.setdefault(tuple(features.token_ids[at][: answers[0]].tolist()))
        if len(found) == most:
            break
    return [list(prompt) for prompt in found]


def units(settings: Settings, prompts: Sequence[Sequence[int]], folder: Path) -> list[Unit]:
    """Timings come first, one prompt at a time and as a batch, by the drafts of the first seed."""
    few, first = prompts[: settings.timed_prompts], prompts[: settings.decode_batch]
    made = []
    for temperature in settings.temperatures:
        for loss in (None, *settings.losses):
            draft = None if loss is None else f"{loss}-{settings.seeds[0]}"
            name = f"{loss or 'plain'}-t{temperature:g}"
            for i, prompt in enumerate(few):
                path = folder / "timed" / f"{name}-1-{i}.json"
                made.append(Unit(path, draft, temperature, [prompt], stage.seed(settings.seed, temperature, i), False))
            path = folder / "timed" / f"{name}-{settings.decode_batch}-0.json"
            made.append(Unit(path, draft, temperature, first, stage.seed(settings.seed, temperature), False))
    for seed in settings.seeds:
        for loss in settings.losses:
            for temperature in settings.temperatures:
                for at in range(0, len(prompts), settings.decode_batch):
                    path = folder / f"{loss}-{seed}" / f"t{temperature:g}-{at}.json"
                    chunk = prompts[at : at + settings.decode_batch]
                    made.append(
                        Unit(
                            path, f"{loss}-{seed}", temperature, chunk, stage.seed(settings.seed, temperature, at), True
                        )
                    )
    return made


def run(bench: Bench, layers: Sequence[int], end: int | None, trained: Path, folder: Path) -> None:
    """Every unit that has no file yet."""
    settings = bench.settings
    prompts = prompts_of(bench.heldout.features, settings.decode_prompts)
    target, drafts = Target(bench.model, layers), dict[str, Draft]()
    try:
        for unit in tqdm(units(settings, prompts, folder), desc="decode", unit="batch", dynamic_ncols=True):
            if unit.path.exists():
                continue
            if unit.draft is not None and unit.draft not in drafts:
                drafts.clear()
                drafts[unit.draft] = train.load(bench, trained / unit.draft)
            answers, counts = decode(
                target,
                None if unit.draft is None else drafts[unit.draft],
                bench.head,
                unit.prompts,
                draft_tokens=settings.draft_tokens,
                temperature=unit.temperature,
                max_tokens=settings.decode_tokens,
                end=end,
                seed=unit.seed,
                predict=unit.predict,
            )
            stage.write_json(unit.path, {"counts": asdict(counts), "answers": answers})
    finally:
        target.close()


def counts_of(folder: Path, pattern: str) -> tuple[Counts, list[list[int]]]:
    """The counts of all units whose files match, added up, and their answers."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise FileNotFoundError(f"expected files {pattern} in {folder}, got none. Run the stage 'decode' to its end.")
    read = [stage.read_json(path) for path in files]
    counts = [Counts(**unit["counts"]) for unit in read]
    return sum(counts[1:], counts[0]), [answer for unit in read for answer in unit["answers"]]
