"""The smallest complete training: a draft with a smaller vocabulary than its target, in a plain PyTorch loop.

    python examples/plain_loop.py

Row t of the draft has seen the target's hidden state t and token t + 1. It proposes token t + 2, as the target's hidden
state t + 1 does: so draft row t is scored against target row t + 1. No logits of all tokens are made, of either.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fused_lk

BATCH, LENGTH, SIZE, VOCAB, DRAFT_VOCAB = 8, 32, 32, 512, 384


class Draft(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, SIZE)
        self.body = nn.Sequential(nn.Linear(2 * SIZE, 2 * SIZE), nn.SiLU(), nn.Linear(2 * SIZE, SIZE))
        self.lm_head = nn.Linear(SIZE, DRAFT_VOCAB, bias=False)  # read as a weight, never called

    def forward(self, states: Tensor, tokens: Tensor) -> Tensor:
        return self.body(torch.cat([states, self.embed(tokens)], -1))


def make_target() -> tuple[Tensor, Tensor]:
    """In place of your target model: what it makes of each token, and its `lm_head` `[VOCAB, SIZE]`."""
    generator = torch.Generator().manual_seed(0)
    table, lm_head = torch.randn(2, VOCAB, SIZE, generator=generator)
    return table, lm_head * 0.7


def train(steps: int, objective: str) -> list[dict[str, float]]:
    """The metrics of each step."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    table, target_lm_head = make_target()
    t2d = torch.arange(VOCAB) < DRAFT_VOCAB  # the tokens that the draft may propose
    head = fused_lk.TargetHead(target_lm_head, fused_lk.DraftVocab(t2d))  # once, not per batch
    draft = Draft()
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2)
    history = []
    for step in range(steps):
        tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
        states = table[tokens] + 0.3 * torch.randn(BATCH, LENGTH, SIZE, generator=generator)
        loss_mask = torch.arange(LENGTH).expand(BATCH, -1) >= torch.randint(1, 9, (BATCH, 1), generator=generator)

        hidden = draft(states[:, :-2], tokens[:, 1:-1])
        target = fused_lk.Target.from_hidden(states[:, 1:-1], head)
        out = fused_lk.lk_loss(hidden, draft.lm_head.weight, target, mask=loss_mask[:, 2:], objective=objective)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()

        history.append(out.metrics())
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            names = ("loss", "acceptance_rate_0", "accuracy_0", "acceptance_length")
            print(f"step {step:4d}  " + "  ".join(f"{name} {history[-1][name]:.3f}" for name in names))
    return history


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--objective", choices=["kl", "tv", "alpha", "lambda"], default="lambda")
    given = parser.parse_args(arguments)
    return train(given.steps, given.objective)


if __name__ == "__main__":
    main()
