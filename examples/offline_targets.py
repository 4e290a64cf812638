"""Offline training: the target runs once and writes to disk, the draft trains from there, many times, without it.

    python examples/offline_targets.py --kind hidden
    python examples/offline_targets.py --kind topk

kind     on disk for each token                               the target on the draft vocabulary is
hidden   2 H bytes: the last hidden state in bf16             exact, but for the rounding to bf16
topk     8 K + 4 bytes: the K likeliest tokens, their fp32    cut: other tokens count as impossible, and
         logits, and the normaliser over all tokens           alpha is too low by their mass

Files are memory-mapped: a batch reads its own rows alone. NumPy has no bf16. So the states are written as int16, and
viewed as bf16 after reading: the same bits. The first part takes the place of an engine or of `transformers`. What it
writes is all that the second part knows.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_lk

NUM_SEQUENCES, LENGTH, SIZE, VOCAB, K, BATCH = 256, 24, 32, 256, 16, 16


def write(directory: Path) -> None:
    """What a target model leaves: tokens, hidden states, top-k logits with their normalisers, and its `lm_head`."""
    generator = torch.Generator().manual_seed(0)
    table, lm_head = torch.randn(2, VOCAB, SIZE, generator=generator)
    lm_head = (lm_head * 0.7).bfloat16()
    torch.save(lm_head, directory / "lm_head.pt")
    rows = (NUM_SEQUENCES, LENGTH)
    kinds = {"tokens": (np.int32, rows), "states": (np.int16, (*rows, SIZE)), "topk_ids": (np.int32, (*rows, K)),
             "topk_logits": (np.float32, (*rows, K)), "normalizer": (np.float32, rows)}  # fmt: skip
    files = {
        name: np.lib.format.open_memmap(directory / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        for name, (dtype, shape) in kinds.items()
    }
    for start in range(0, NUM_SEQUENCES, BATCH):  # as the target's batches come
        tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
        states = (table[tokens] + 0.3 * torch.randn(BATCH, LENGTH, SIZE, generator=generator)).bfloat16()
        logits = F.linear(states, lm_head).float()
        top = logits.topk(K)
        made = {"tokens": tokens, "states": states.view(torch.int16), "topk_ids": top.indices,
                "topk_logits": top.values, "normalizer": logits.logsumexp(-1)}  # fmt: skip
        for name, x in made.items():
            files[name][start : start + BATCH] = x.numpy()
    for file in files.values():
        file.flush()


class Written(torch.utils.data.Dataset):
    """One sequence at a time, copied from the mapped files."""

    def __init__(self, directory: Path) -> None:
        self.files = {path.stem: np.load(path, mmap_mode="r") for path in directory.glob("*.npy")}

    def __len__(self) -> int:
        return len(self.files["tokens"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {name: torch.from_numpy(np.array(file[index])) for name, file in self.files.items()}
        return row | {"states": row["states"].view(torch.bfloat16)}


class Draft(nn.Module):
    """Row t has seen the target's hidden state t and token t + 1, and meets target row t + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, SIZE)
        self.body = nn.Sequential(nn.Linear(2 * SIZE, 2 * SIZE), nn.SiLU(), nn.Linear(2 * SIZE, SIZE))
        self.lm_head = nn.Linear(SIZE, VOCAB, bias=False)

    def forward(self, states: Tensor, tokens: Tensor) -> Tensor:
        return self.body(torch.cat([states.float(), self.embed(tokens)], -1))


def target_of(batch: dict[str, Tensor], kind: str, head: fused_lk.TargetHead) -> fused_lk.Target:
    """Target rows 1, 2, ... of a batch."""
    if kind == "hidden":
        return fused_lk.Target.from_hidden(batch["states"][:, 1:], head)
    ids, logits, normalizer = (batch[name][:, 1:] for name in ("topk_ids", "topk_logits", "normalizer"))
    return fused_lk.Target.from_topk(ids, logits, VOCAB, normalizer)


def train(directory: Path, kind: str, epochs: int) -> list[dict[str, float]]:
    """The metrics of each epoch."""
    torch.manual_seed(0)
    head = fused_lk.TargetHead(torch.load(directory / "lm_head.pt", mmap=True))
    draft, history = Draft(), []
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2)
    for epoch in range(epochs):
        seen = []
        for batch in torch.utils.data.DataLoader(Written(directory), BATCH, shuffle=True):
            hidden = draft(batch["states"][:, :-1], batch["tokens"][:, 1:])
            # alpha alone: KL would ask the draft to leave nothing to the tokens that a top-k list lacks.
            out = fused_lk.lk_loss(hidden, draft.lm_head.weight, target_of(batch, kind, head), objective="alpha")
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            seen.append(out)
        history.append(fused_lk.LKSums.merged(seen).metrics())
        names = ("loss", "acceptance_rate_0", "accuracy_0")
        print(f"{kind:6s} epoch {epoch}  " + "  ".join(f"{name} {history[-1][name]:.3f}" for name in names))
    return history


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=["hidden", "topk"], default="hidden")
    parser.add_argument("--epochs", type=int, default=8)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory))
        return train(Path(directory), given.kind, given.epochs)


if __name__ == "__main__":
    main()
