"""`python -m study.columns`: would it pay to leave out columns of the gradient that round to nothing?

dH = G W and dW = G^T h are half the products of a step. For a tile of rows and columns of G, the gradient with respect
to the draft's logits, in which no entry exceeds a threshold, both could be left out (as cut cross-entropy does, arXiv
2411.09009). This takes held-out states and a trained draft of the study, and measures for tiles of several heights the
share that would stay, and what leaving out the others changes in dH and dW. A row of G is scaled as if its token were
the only one. "sorted" puts the columns in the order of their mean share of G first, so that small ones meet in tiles.

Better drafts are had by moving the draft's logits towards the target's: z + c (t - z), with c in [0, 1).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_lk

from . import __main__ as study
from . import batches, train
from .settings import LOSSES, QUICK, changed, fast_dtype

THRESHOLDS = (2.0**-12, 2.0**-14)
HEIGHTS = (16, 128, 1024)  # of a tile, in rows; 1,024 is a chunk of the walk
WIDTH = 128  # of a tile, in columns
TOWARDS = (0.0, 0.6, 0.9)
OBJECTIVES = ("kl", "alpha", "lambda", "tv")


class Line(NamedTuple):
    loss: str
    towards: float
    alpha: float
    threshold: float
    rows: int
    order: str
    kept: float  # share of the tiles
    error_hidden: float  # of dH and dW, relative, in the Frobenius norm
    error_weight: float


@torch.no_grad()
def states(bench: train.Bench, draft: Any, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(h, z, t)` of at most `most` held-out rows of the first step: draft states, and both models' logits."""
    settings, parts = bench.settings, []
    for row in batches.packed(
        batches.sequences(bench.heldout.features, settings.sequence_length), settings.sequence_length
    ):
        batch = bench.batch(bench.heldout, [row])
        hidden = draft(batch.fused, batch.tokens, batch.sequence_ids, 1)[0]
        pairs = fused_lk.Pairs.ttt(batch.mask, 1, sequence_ids=batch.sequence_ids)
        at = pairs.supervised[0].reshape(-1)
        states = batch.last.reshape(-1, batch.last.shape[-1])[pairs.target_rows]
        parts.append((hidden.reshape(-1, hidden.shape[-1])[at], states.to(hidden)))
        if sum(len(h) for h, _ in parts) >= most:
            break
    h, last = (torch.cat(x)[:most] for x in zip(*parts, strict=True))
    head = bench.head.weight[train.target_ids(bench.head)]
    return h, h @ draft.head.weight.T, last @ head.T


def measure(h: Tensor, weight: Tensor, z: Tensor, t: Tensor, loss: str, towards: float) -> Iterator[Line]:
    leaf = torch.lerp(z, t, towards).requires_grad_()
    out = fused_lk.lk_loss_from_logits(leaf, fused_lk.Target.from_logits(t), **LOSSES[loss][1])
    (g,) = torch.autograd.grad(out.loss, leaf)
    g, alpha = g * len(g), float(out.acceptance_rate)
    d_hidden, d_weight = g @ weight, g.T @ h
    for order in ("as they are", "sorted"):
        columns = g.abs().mean(0).argsort(descending=True) if order == "sorted" else torch.arange(g.shape[1])
        placed = g[:, columns]
        for rows in (rows for rows in HEIGHTS if rows <= len(g)):
            usable = placed[: len(g) // rows * rows]
            tops = usable.abs().unflatten(1, (-1, WIDTH)).unflatten(0, (-1, rows)).amax((1, 3))
            for threshold in THRESHOLDS:
                keep = tops > threshold
                left = torch.where(keep.repeat_interleave(rows, 0).repeat_interleave(WIDTH, 1), usable, 0.0)
                back = torch.zeros_like(left).index_copy_(1, columns, left)
                n = len(back)
                yield Line(
                    loss, towards, alpha, threshold, rows, order, float(keep.float().mean()),
                    _relative(back @ weight, d_hidden[:n]),
                    _relative(back.T @ h[:n], d_weight if n == len(g) else g[:n].T @ h[:n]),
                )  # fmt: skip


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def table(lines: list[Line]) -> str:
    head = ("loss", "towards the target", "alpha", "threshold", "rows", "columns", "tiles kept", "dH", "dW")
    rows = [
        (x.loss, f"{x.towards:g}", f"{x.alpha:.2f}", f"2^{torch.tensor(x.threshold).log2():.0f}", x.rows, x.order,
         f"{x.kept:.0%}", f"{x.error_hidden:.1e}", f"{x.error_weight:.1e}")
        for x in lines
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m study.columns", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=QUICK.folder, help="of a finished run of the study")
    parser.add_argument("--draft", default="kl-0", help="loss-seed")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="what the run was told")
    given = parser.parse_args()
    settings = changed(QUICK, [f"dtype={fast_dtype('cpu')}", *given.set])
    bench, _ = study.bench(replace(settings, folder=given.folder))
    draft = train.load(bench, given.folder / "train" / given.draft)
    h, z, t = (x.float() for x in states(bench, draft, given.rows))
    weight = draft.head.weight.float()
    print(table([line for c in TOWARDS for loss in OBJECTIVES for line in measure(h, weight, z, t, loss, c)]))


if __name__ == "__main__":
    main()
