"""DDP over ranks whose masks keep different numbers of tokens: the loss and gradients of one process with all of it.

    torchrun --nproc-per-node 2 examples/ddp.py

A mean of the ranks' means would weigh a token of a rank with few more than one of a rank with many. With `group=` the
denominators, lambda's acceptance and the metrics are those of all ranks' tokens. `out.loss` is this rank's share, times
the number of ranks, because DDP averages gradients. The loss is called inside the forward that DDP wraps: the head's
weight is read there, and DDP has to see that. On GPUs open the group with "nccl"; the rest stays.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fused_lk

BATCH, LENGTH, SIZE, VOCAB = 4, 32, 32, 256  # of one rank


class Draft(nn.Module):
    """Row t has seen the target's hidden state t and token t + 1, and meets target row t + 1."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, SIZE)
        self.body = nn.Sequential(nn.Linear(2 * SIZE, 2 * SIZE), nn.SiLU(), nn.Linear(2 * SIZE, SIZE))
        self.lm_head = nn.Linear(SIZE, VOCAB, bias=False)
        self.group = group

    def forward(
        self, tokens: Tensor, states: Tensor, loss_mask: Tensor, head: fused_lk.TargetHead
    ) -> fused_lk.LKOutput:
        hidden = self.body(torch.cat([states[:, :-2], self.embed(tokens[:, 1:-1])], -1))
        target = fused_lk.Target.from_hidden(states[:, 1:-1], head)
        return fused_lk.lk_loss(hidden, self.lm_head.weight, target, mask=loss_mask[:, 2:], group=self.group)


def make_target() -> tuple[Tensor, Tensor]:
    """In place of your target model: what it makes of each token, and its `lm_head`."""
    table, lm_head = torch.randn(2, VOCAB, SIZE, generator=torch.Generator().manual_seed(0))
    return table, lm_head * 0.7


def make_batch(table: Tensor, seed: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, target hidden states and loss mask of one rank; later ranks have longer prompts, and fewer tokens."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    states = table[tokens] + 0.3 * torch.randn(BATCH, LENGTH, SIZE, generator=generator)
    prompt = torch.randint(10 * rank + 1, 10 * rank + 9, (BATCH, 1), generator=generator)
    return tokens, states, torch.arange(LENGTH) >= prompt


def train(steps: int) -> list[dict[str, float]]:
    """The metrics of each step: of the whole batch, the same on every rank."""
    rank, group = dist.get_rank(), dist.group.WORLD
    table, target_lm_head = make_target()
    head, draft = fused_lk.TargetHead(target_lm_head), DistributedDataParallel(Draft(group))
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2)
    history = []
    for step in range(steps):
        out = draft(*make_batch(table, step, rank), head)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append(out.metrics())
        if rank == 0 and (step % max(1, steps // 5) == 0 or step == steps - 1):
            names = ("loss", "num_tokens_0", "acceptance_rate_0", "acceptance_length")
            print(f"step {step:4d}  " + "  ".join(f"{name} {history[-1][name]:.3f}" for name in names))
    return history


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args(arguments)
    dist.init_process_group("gloo")
    try:
        train(given.steps)
    finally:
        # DDP is freed by the collector alone. Until then gloo's threads live, and they may meet the end of Python.
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
