"""`python -m bench.truncation`: what a top-k target makes of the loss, against the full distribution.

    top-k          `Target.from_topk`: alpha against p of the listed tokens, KL against p renormalised on them
    renormalised   with renormalize=True: alpha against p renormalised on them
    restricted     with restrict_draft=True too: q renormalised on them as well

Two pairs of draft and target, over one vocabulary, in float64:

    smollm2   256 rows of a real model and of a draft that was trained on it (tests/data/README.md), on the 1,280 most
              frequent tokens as if there were no others
    zipf      256 rows of p ~ rank^-1.2 over 49,152 tokens; the draft's logits are the target's with normal noise of 1
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fused_lk
from fused_lk import Target

DATA = Path(__file__).resolve().parents[1] / "tests/data/smollm2.pt"
SIZES = (8, 16, 32, 64)
ROWS = 256


class Row(NamedTuple):
    """Means over rows. `k` of None is the full distribution."""

    name: str
    k: int | None
    mass: float
    kl: float
    kl_restricted: float
    alpha: float
    alpha_renormalised: float
    alpha_restricted: float


def smollm2() -> tuple[Tensor, Tensor]:
    """Draft and target logits `[256, 1280]`."""
    data = torch.load(DATA, weights_only=True)
    head = data["target_head"].double()
    return data["draft_hidden_late"].double() @ head.T, data["target_hidden"].double() @ head.T


def zipf(size: int = 49_152, exponent: float = 1.2) -> tuple[Tensor, Tensor]:
    """Draft and target logits `[256, size]`."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, size + 1, dtype=torch.float64)
    target = -exponent * ranks.log().expand(ROWS, size)
    return target + torch.randn(ROWS, size, generator=generator, dtype=torch.float64), target


def measure(name: str, draft: Tensor, target: Tensor, k: int | None) -> Row:
    log_p = target.log_softmax(-1)
    if k is None:
        d = fused_lk.lk_divergences_from_logits(draft, Target.from_logits(target))
        kl, alpha = d.kl.mean().item(), d.acceptance.mean().item()
        return Row(name, None, 1.0, kl, kl, alpha, alpha, alpha)
    values, ids = log_p.topk(k)

    def means(**options: bool) -> tuple[float, float]:
        of_k = Target.from_topk(ids, values, target.shape[-1], **options)
        d = fused_lk.lk_divergences_from_logits(draft, of_k)
        return d.kl.mean().item(), d.acceptance.mean().item()

    (kl, alpha), (_, renormalised) = means(), means(renormalize=True)
    kl_restricted, restricted = means(renormalize=True, restrict_draft=True)
    mass = values.exp().sum(-1).mean().item()
    return Row(name, k, mass, kl, kl_restricted, alpha, renormalised, restricted)


def main() -> None:
    print("| target | k | mass of p | KL: top-k | KL: restricted | alpha: top-k | renormalised | restricted |")
    print("|---|---|---|---|---|---|---|---|")
    for name, logits in (("smollm2", smollm2()), ("zipf", zipf())):
        for k in (*SIZES, None):
            _, _, mass, *numbers = measure(name, *logits, k)
            shown = " | ".join(f"{x:.3f}" for x in (mass, *numbers))
            print(f"| {name} | {'all' if k is None else k} | {shown} |")


if __name__ == "__main__":
    main()
