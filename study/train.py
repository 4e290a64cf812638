"""Train one draft for each loss and seed: the same start, texts and optimiser for all losses of a seed.

A training is a folder: `log.jsonl` has a line for each step, `curve.jsonl` one for each evaluation on held-out texts,
`checkpoint.pt` what goes on after a kill, and `draft.pt` the trained draft.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import fused_lk

from . import batches
from .batches import Batch
from .draft import Draft
from .features import Features
from .lines import Lines
from .settings import LOSSES, Settings
from .stage import replaced

BINS = 20  # of the histogram of alpha


@dataclass
class Texts:
    """The texts of training or those held out, and what the target says of them, found once for all drafts."""

    features: Features
    scores: tuple[np.ndarray, np.ndarray]  # normaliser and argmax of each token's row


@dataclass
class Bench:
    """What every training shares."""

    settings: Settings
    model: Any  # the target, of transformers
    head: fused_lk.TargetHead
    train: Texts
    heldout: Texts

    def batch(self, texts: Texts, rows: list[batches.Row]) -> Batch:
        read = batches.read(texts.features, rows, self.settings.sequence_length, texts.scores)
        return read.to(self.settings.device)


def scores_of(features: Features, head: fused_lk.TargetHead, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The target's normaliser and argmax of each token's row, kept in `folder`: no training makes that pass again."""
    paths = [folder / "normalizer.npy", folder / "argmax.npy"]
    if not all(path.exists() for path in paths):
        n = len(features.token_ids)
        found = np.zeros(n, np.float32), np.zeros(n, np.int32)
        block = 4096
        for start in tqdm(range(0, n, block), desc=f"target's normalisers, {folder.name}", unit="block"):
            at = slice(start, min(start + block, n))
            target = fused_lk.Target.from_hidden(features.last(at).to(head.weight), head)
            assert target.token_ids is not None
            found[0][at], found[1][at] = target.log_normalizer.cpu().numpy(), target.token_ids.cpu().numpy()
        for path, array in zip(paths, found, strict=True):
            with replaced(path) as temporary, temporary.open("wb") as file:
                np.save(file, array)
    normalizer, argmax = (np.load(path, mmap_mode="r") for path in paths)
    return normalizer, argmax


def run(bench: Bench, folder: Path) -> None:
    """Every training that is not finished, seed by seed, so that early results are of all losses."""
    for seed in bench.settings.seeds:
        for loss in bench.settings.losses:
            if not (folder / f"{loss}-{seed}" / "draft.pt").exists():
                train(bench, loss, seed, folder / f"{loss}-{seed}")


def train(bench: Bench, loss: str, seed: int, folder: Path) -> None:
    """One training, from the start or from its checkpoint."""
    settings, steps = bench.settings, bench.settings.steps
    draft = Draft.of(bench.model, target_ids(bench.head), seed)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    checkpoint, step = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=settings.device)
        step = saved["step"]
        draft.load_state_dict(saved["draft"])
        optimizer.load_state_dict(saved["optimizer"])
    log, curve = (Lines(folder / name, step) for name in ("log.jsonl", "curve.jsonl"))
    pieces = batches.sequences(bench.train.features, settings.sequence_length)
    order = batches.endless(pieces, settings.sequence_length, settings.batch_rows, seed)
    title = f"{LOSSES[loss][0]}, seed {seed}"
    with tqdm(total=steps, initial=step, desc=title, unit="step", dynamic_ncols=True, mininterval=2.0) as progress:
        for rows in islice(order, step, steps):
            if step in marks(steps, settings.evaluations):
                curve.add(step, heldout(bench, draft, some=True))
            out, _ = scored(bench, draft, bench.batch(bench.train, rows), LOSSES[loss][1])
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * schedule(step, steps, settings.warmup)
            optimizer.zero_grad()
            out.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(draft.parameters(), settings.clip)
            optimizer.step()
            metrics = out.metrics()
            log.add(step, {"gradient_norm": float(norm), **metrics})
            step += 1
            progress.update()
            progress.set_postfix_str(f"acceptance length {metrics['acceptance_length']:.3f}", refresh=False)
            if step in marks(steps, settings.checkpoints) and step < steps:
                log.flush()
                curve.flush()
                state = {"step": step, "draft": draft.state_dict(), "optimizer": optimizer.state_dict()}
                with replaced(checkpoint) as temporary:
                    torch.save(state, temporary)
    curve.add(steps, heldout(bench, draft, some=False))
    log.flush()
    curve.flush()
    with replaced(folder / "draft.pt") as temporary:
        torch.save(draft.state_dict(), temporary)
    checkpoint.unlink(missing_ok=True)


def load(bench: Bench, folder: Path) -> Draft:
    """The trained draft of a folder, for decoding, in the target's dtype."""
    draft = Draft.of(bench.model, target_ids(bench.head), 0)
    draft.load_state_dict(torch.load(folder / "draft.pt", weights_only=True, map_location="cpu"))
    return draft.to(bench.settings.torch_dtype).eval().requires_grad_(False)


def target_ids(head: fused_lk.TargetHead) -> Tensor:
    assert head.vocab is not None
    return head.vocab.target_ids


def scored(bench: Bench, draft: Draft, batch: Batch, loss: dict[str, Any]) -> tuple[fused_lk.LKOutput, fused_lk.Pairs]:
    """The loss of a batch, over all steps of test-time training, and which rows it is of."""
    settings = bench.settings
    with torch.autocast(
        torch.device(settings.device).type, settings.torch_dtype, enabled=settings.torch_dtype != torch.float32
    ):
        return _scored(settings, bench.head, draft, batch, loss)


def _scored(
    settings: Settings, head: fused_lk.TargetHead, draft: Draft, batch: Batch, loss: dict[str, Any]
) -> tuple[fused_lk.LKOutput, fused_lk.Pairs]:
    hidden = draft(batch.fused, batch.tokens, batch.sequence_ids, settings.ttt_steps)
    pairs = fused_lk.Pairs.ttt(batch.mask, settings.ttt_steps, sequence_ids=batch.sequence_ids)
    target = fused_lk.Target.from_hidden(
        batch.last.to(head.weight), head, log_normalizer=batch.normalizer, token_ids=batch.argmax
    )
    out = fused_lk.lk_loss(
        hidden, draft.head.weight, target, pairs=pairs,
        position_decay=settings.position_decay, workspace_mb=settings.workspace_mb, keep_mb=settings.keep_mb, **loss,
    )  # fmt: skip
    return out, pairs


@torch.no_grad()
def heldout(bench: Bench, draft: Draft, some: bool) -> dict[str, Any]:
    """Metrics on the texts that no draft is trained on, and the share of tokens in each twentieth of alpha.

    Args:
        some: a quarter of the rows, along the way.
    """
    settings = bench.settings
    pieces = batches.sequences(bench.heldout.features, settings.sequence_length)
    rows = batches.packed(pieces, settings.sequence_length)
    rows = rows[::4] if some else rows
    parts: list[fused_lk.LKSums] = []
    histogram = torch.zeros(settings.ttt_steps, BINS)
    for at in range(0, len(rows), settings.batch_rows):
        batch = bench.batch(bench.heldout, rows[at : at + settings.batch_rows])
        out, pairs = scored(bench, draft, batch, {"objective": "kl"})  # any: alpha, accuracy and KL come with each
        parts.append(out)
        for k in range(settings.ttt_steps):
            histogram[k] += torch.histc(out.token_acceptance[k][pairs.supervised[k]], BINS, 0.0, 1.0)
    shares = histogram / histogram.sum(1, keepdim=True).clamp(min=1)
    return {**fused_lk.LKSums.merged(parts).metrics(), "alpha_shares": shares.tolist()}


def schedule(step: int, steps: int, warmup: float) -> float:
    """The learning rate's factor: a short rise, then a cosine to a fiftieth."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def marks(steps: int, count: int) -> set[int]:
    """Evenly spread steps, from 0 on."""
    return {steps * i // count for i in range(count)}
