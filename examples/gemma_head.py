"""A draft for a target with a head like Gemma's: a final softcap of 30, tied to the embedding, frozen, shared.

    python examples/gemma_head.py

The logits are `30 * tanh(logit_scale * h W^T / 30)`: Gemma's cap, and a scale as Cohere's and Granite's heads have one.
The draft uses the target's own embedding and head, which are one tensor and get no gradient; so the draft's head costs
neither memory nor a product in the backward. What the target's config says belongs on *both* sides: without its cap,
alpha would be that of another model. The last line shows how far off.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import fused_lk

# The names of Hugging Face: `final_logit_softcapping` (Gemma 2 and later), `logit_scale` (Cohere).
CONFIG = SimpleNamespace(final_logit_softcapping=30.0, logit_scale=1.5)
BATCH, LENGTH, SIZE, VOCAB = 8, 32, 48, 256


class Draft(nn.Module):
    """Row t has seen the target's hidden state t and token t + 1, and meets target row t + 1."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embed = embedding.requires_grad_(False)  # the target's, tied to its head
        self.norm = nn.RMSNorm(2 * SIZE)
        self.body = nn.Sequential(nn.Linear(2 * SIZE, 4 * SIZE), nn.GELU(), nn.Linear(4 * SIZE, SIZE))
        self.softmax = {"softcap": CONFIG.final_logit_softcapping, "logit_scale": CONFIG.logit_scale}

    def forward(self, states: Tensor, tokens: Tensor, target: fused_lk.Target, mask: Tensor) -> fused_lk.LKOutput:
        hidden = self.body(self.norm(torch.cat([states, self.embed(tokens)], -1)))
        return fused_lk.lk_loss(hidden, self.embed.weight, target, mask=mask, **self.softmax)


def train(steps: int) -> tuple[Draft, list[dict[str, float]]]:
    """The draft, the metrics of each step, and at last those without the cap."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    embedding = nn.Embedding(VOCAB, SIZE)
    table = 2.0 * torch.randn(VOCAB, SIZE)  # in place of the target's body: what it makes of each token
    draft = Draft(embedding)
    head = fused_lk.TargetHead(embedding.weight, **draft.softmax)
    trainable = [p for p in draft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=3e-3)
    history = []
    for step in range(steps):
        tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
        states = table[tokens] + 0.3 * torch.randn(BATCH, LENGTH, SIZE, generator=generator)
        mask = torch.arange(2, LENGTH).expand(BATCH, -1) >= torch.randint(1, 9, (BATCH, 1), generator=generator)
        out = draft(states[:, :-2], tokens[:, 1:-1], fused_lk.Target.from_hidden(states[:, 1:-1], head), mask)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append(out.metrics())
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            names = ("loss", "acceptance_rate_0", "accuracy_0")
            print(f"step {step:4d}  " + "  ".join(f"{name} {history[-1][name]:.3f}" for name in names))
    with torch.no_grad():
        draft.softmax = {"logit_scale": CONFIG.logit_scale}
        uncapped = fused_lk.Target.from_hidden(states[:, 1:-1], embedding.weight, **draft.softmax)
        history.append(draft(states[:, :-2], tokens[:, 1:-1], uncapped, mask).metrics())
    print(f"without the cap, alpha would be said to be {history[-1]['acceptance_rate_0']:.3f}")
    return draft, history


def main(arguments: Sequence[str] | None = None) -> tuple[Draft, list[dict[str, float]]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args(arguments)
    return train(given.steps)


if __name__ == "__main__":
    main()
