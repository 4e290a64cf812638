"""One long sequence over several ranks (context parallelism), and test-time training over it: exact, with a small halo.

    torchrun --nproc-per-node 2 examples/context_parallel_ttt.py

Each rank holds a chunk of the rows. In TTT step k draft row t meets target row t + 1 + k. So the last draft rows of a
chunk meet the first target rows of the next rank, which hands over a halo of STEPS + 1 rows: its tokens, loss mask and
target hidden states. No logits and no draft states travel. Every pair is scored once, on the rank of its draft row.

With `group=` the counts, lambda and the metrics are those of the whole sequence, whatever each rank's mask leaves.
The draft here looks at its own row alone. Put your attention over the ranks (ring, Ulysses) into its place.
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

STEPS, SHIFT = 3, 1
HALO = STEPS + SHIFT
BATCH, LENGTH, SIZE, VOCAB = 2, 128, 32, 512


def with_halo(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """`[B, C, ...]` of this rank with the first rows of the next one: `[B, C + HALO, ...]`; of the last rank, `x`.

    It is for what needs no gradient: tokens, masks, sequence ids of a packed batch, target states.
    """
    rank, last = dist.get_rank(group), dist.get_world_size(group) - 1
    if x.shape[1] < HALO:
        raise ValueError(f"expected chunks of at least {HALO} rows, so that a halo is of one rank; got {x.shape[1]}")
    first = x[:, :HALO].contiguous()
    following, calls = torch.empty_like(first), []
    if rank > 0:
        calls.append(dist.P2POp(dist.isend, first, group=group, group_peer=rank - 1))
    if rank < last:
        calls.append(dist.P2POp(dist.irecv, following, group=group, group_peer=rank + 1))
    for request in dist.batch_isend_irecv(calls) if calls else ():
        request.wait()
    return torch.cat([x, following], 1) if rank < last else x


class Draft(nn.Module):
    """Its forward ends in the loss, so that DDP sees every parameter that the loss reads."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, SIZE)
        self.mix = nn.Linear(2 * SIZE, SIZE)
        self.lm_head = nn.Linear(SIZE, VOCAB, bias=False)
        self.group = group

    def forward(
        self, tokens: Tensor, states: Tensor, loss_mask: Tensor, head: fused_lk.TargetHead
    ) -> fused_lk.LKOutput:
        """Of this rank's chunk `[B, C]`, `[B, C, H]`, `[B, C]`."""
        length = tokens.shape[1]
        if self.group is not None:
            tokens, states, loss_mask = (with_halo(x, self.group) for x in (tokens, states, loss_mask))
        hidden, state = [], states[:, :length]
        for k in range(STEPS):
            following = tokens[:, 1 + k : 1 + k + length]  # row t sees token t + 1 + k, too
            following = nn.functional.pad(following, (0, length - following.shape[1]))  # at the end: in no pair
            state = state + torch.tanh(self.mix(torch.cat([self.embed(following), state], -1)))
            hidden.append(state)
        pairs = fused_lk.Pairs.ttt(loss_mask, STEPS, SHIFT, draft_length=length)
        target = fused_lk.Target.from_hidden(states, head)
        return fused_lk.lk_loss(
            hidden, self.lm_head.weight, target, pairs=pairs, position_decay=0.8, group=self.group,
        )  # fmt: skip


def make_batch(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, target hidden states and a loss mask of the whole sequence; much of its first half is a prompt."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    states = torch.randn(BATCH, LENGTH, SIZE, generator=generator, dtype=dtype) / 2
    states += torch.randn(VOCAB, SIZE, generator=torch.Generator().manual_seed(8), dtype=dtype)[tokens]
    prompt = torch.randint(LENGTH // 2, (BATCH, 1), generator=generator)
    return tokens, states, torch.arange(LENGTH) >= prompt


def make_head(dtype: torch.dtype = torch.float32) -> fused_lk.TargetHead:
    return fused_lk.TargetHead(torch.randn(VOCAB, SIZE, generator=torch.Generator().manual_seed(7), dtype=dtype))


def train(steps: int) -> list[dict[str, float]]:
    """The metrics of each step, of the whole sequence."""
    rank, size = dist.get_rank(), dist.get_world_size()
    head, draft = make_head(), DistributedDataParallel(Draft(dist.group.WORLD))
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2)
    history = []
    for step in range(steps):
        chunk = [x.chunk(size, 1)[rank] for x in make_batch(step)]  # your loader reads this rank's alone
        out = draft(*chunk, head)
        optimizer.zero_grad()
        out.loss.backward()  # DDP averages over ranks what `group=` multiplied by their number
        optimizer.step()
        history.append(out.metrics())
        if rank == 0 and (step % max(1, steps // 5) == 0 or step == steps - 1):
            print(f"step {step:3d}  " + "  ".join(f"{k} {history[-1][k]:.3f}" for k in ("loss", "acceptance_length")))
    return history


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
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
