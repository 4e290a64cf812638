"""A block drafter, which proposes several tokens from one anchor at once (DFlash, DSpark), with a confidence head.

    python examples/block_drafter.py

The draft sees the target up to anchor a. Element j of its block proposes token a + j + 1, as target row a + j does:
that is what `fused_lk.Pairs.blocks` says. The loss is DSpark's, in one pass over the logits: 0.1 cross-entropy of the
token that came, and 0.9 of the distance sum |p - q|. Later elements count less, as exp(-j / GAMMA).

A confidence head learns how likely each element is to be accepted. Its target is alpha, which the loss has anyway:
`out.token_acceptance`, without a gradient. A sampler can end a block where confidence is low.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_lk

BATCH, LENGTH, SIZE, VOCAB = 8, 48, 32, 128
ANCHORS, BLOCK, GAMMA = 12, 4, 4.0
OBJECTIVE = {"ce": 0.1, "l1": 0.9}


class Draft(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, SIZE)
        self.slot = nn.Embedding(BLOCK, SIZE)
        self.body = nn.Sequential(nn.Linear(3 * SIZE, 4 * SIZE), nn.SiLU(), nn.Linear(4 * SIZE, SIZE))
        self.lm_head = nn.Linear(SIZE, VOCAB, bias=False)
        self.confidence = nn.Linear(SIZE, 1)

    def forward(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of anchors `[B, A, H]` and `[B, A]`: hidden states `[B, A, BLOCK, H]`, and confidence logits."""
        anchor = torch.cat([states, self.embed(tokens)], -1).unsqueeze(2).expand(-1, -1, BLOCK, -1)
        hidden = self.body(torch.cat([anchor, self.slot.weight.expand(*anchor.shape[:3], -1)], -1))
        return hidden, self.confidence(hidden).squeeze(-1)


def losses(
    draft: Draft, head: fused_lk.TargetHead, tokens: Tensor, states: Tensor, loss_mask: Tensor, anchors: Tensor
) -> tuple[fused_lk.LKOutput, Tensor]:
    """The draft's loss with its metrics, and the confidence head's. An anchor of -1 is no block."""
    own = anchors.clamp(min=0)
    at_anchor = states.gather(1, own.unsqueeze(-1).expand(-1, -1, SIZE)), tokens.gather(1, own)
    hidden, confidence = draft(*at_anchor)
    elements = torch.arange(BLOCK, device=tokens.device)
    predicted = (own.unsqueeze(-1) + elements + 1).clamp(max=LENGTH - 1)
    labels = tokens.gather(1, predicted.flatten(1)).view_as(predicted)
    pairs = fused_lk.Pairs.blocks(anchors, BLOCK, loss_mask, ends_at_gap=True)

    decay = fused_lk.positions.dflash_weights(BLOCK, GAMMA, first=0, device=tokens.device)
    weights = pairs.supervised * decay
    total = (pairs.weight_sum * decay).sum().clamp(min=1)  # with ranks: all_reduce it, and pass group=
    out = fused_lk.lk_loss(
        hidden, draft.lm_head.weight, fused_lk.Target.from_hidden(states, head), pairs=pairs, objective=OBJECTIVE,
        labels=labels, position_decay=math.exp(-1 / GAMMA), denominator=total,
    )  # fmt: skip
    of_confidence = F.binary_cross_entropy_with_logits(confidence, out.token_acceptance, weights, reduction="sum")
    return out, of_confidence / total


def make_batch(table: Tensor, following: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Tokens that mostly follow a fixed successor, so that there is something to draft; states, loss mask, anchors."""
    tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    jumps = torch.rand(BATCH, LENGTH, generator=generator) < 0.15
    for t in range(1, LENGTH):
        tokens[:, t] = torch.where(jumps[:, t], tokens[:, t], following[tokens[:, t - 1]])
    states = table[tokens] + 0.2 * torch.randn(BATCH, LENGTH, SIZE, generator=generator)
    loss_mask = torch.arange(LENGTH).expand(BATCH, -1) >= torch.randint(1, 9, (BATCH, 1), generator=generator)
    anchors = torch.stack([torch.randperm(LENGTH - 1, generator=generator)[:ANCHORS] for _ in range(BATCH)])
    return tokens, states, loss_mask, anchors


def train(steps: int) -> list[dict[str, float]]:
    """The metrics of each step."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    following = torch.randperm(VOCAB, generator=generator)
    table = torch.randn(VOCAB, SIZE, generator=generator)  # in place of the target's body
    head = fused_lk.TargetHead(0.5 * table[following.argsort()])  # a state predicts its token's successor
    draft = Draft()
    optimizer = torch.optim.AdamW(draft.parameters(), lr=5e-3)
    history = []
    for step in range(steps):
        out, of_confidence = losses(draft, head, *make_batch(table, following, generator))
        optimizer.zero_grad()
        (out.loss + of_confidence).backward()
        optimizer.step()
        history.append(out.metrics() | {"confidence_loss": of_confidence.item()})
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            names = ("ce_0", "l1_0", "acceptance_rate_0", "acceptance_rate_3", "acceptance_length", "confidence_loss")
            print(f"step {step:4d}  " + "  ".join(f"{name} {history[-1][name]:.3f}" for name in names))
    return history


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args(arguments)
    return train(given.steps)


if __name__ == "__main__":
    main()
