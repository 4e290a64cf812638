"""A draft as a `LightningModule`: three TTT steps in one call, metrics to the logger, the same on every rank.

    pip install pytorch-lightning
    python examples/lightning_module.py

`training_step` passes `group=`, the process group that Lightning's DDP or FSDP strategy has opened (None if there is
none). The loss, lambda and the metrics are then those of the whole batch, and need no `sync_dist`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pytorch_lightning as lightning
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fused_lk

LENGTH, SIZE, VOCAB, STEPS = 24, 32, 256, 3


class Draft(lightning.LightningModule):
    def __init__(self, target_lm_head: Tensor, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.embed = nn.Embedding(VOCAB, SIZE)
        self.mix = nn.Linear(2 * SIZE, SIZE)
        self.lm_head = nn.Linear(SIZE, VOCAB, bias=False)
        self.register_buffer("target_lm_head", target_lm_head, persistent=False)  # moves along, is not saved
        self.validated: list[fused_lk.LKSums] = []

    def forward(self, tokens: Tensor, states: Tensor) -> list[Tensor]:
        """The hidden states of each step; row t of step k has seen token t + 1 + k."""
        state, hidden = states, []
        for k in range(STEPS):
            following = F.pad(tokens[:, 1 + k :], (0, 1 + k))  # padded rows are in no pair
            state = state + torch.tanh(self.mix(torch.cat([self.embed(following), state], -1)))
            hidden.append(state)
        return hidden

    def score(self, batch: Sequence[Tensor]) -> fused_lk.LKOutput:
        tokens, states, loss_mask = batch
        target = fused_lk.Target.from_hidden(states, self.target_lm_head)
        pairs = fused_lk.Pairs.ttt(loss_mask, STEPS)
        group = dist.group.WORLD if dist.is_initialized() else None
        hidden = self(tokens, states)
        return fused_lk.lk_loss(hidden, self.lm_head.weight, target, pairs=pairs, position_decay=0.8, group=group)

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        out = self.score(batch)
        self.log_dict(out.metrics("train/"), batch_size=len(batch[0]))
        return out.loss

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        self.validated.append(self.score(batch))

    def on_validation_epoch_end(self) -> None:
        self.log_dict(fused_lk.LKSums.merged(self.validated).metrics("val/"))  # of sums, not a mean of batches' means
        self.validated.clear()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def make_data(size: int) -> tuple[TensorDataset, Tensor]:
    """Tokens, target hidden states and loss masks, and the target's `lm_head`."""
    generator = torch.Generator().manual_seed(0)
    table, lm_head = torch.randn(2, VOCAB, SIZE, generator=generator)
    tokens = torch.randint(VOCAB, (size, LENGTH), generator=generator)
    states = table[tokens] + 0.3 * torch.randn(size, LENGTH, SIZE, generator=generator)
    loss_mask = torch.arange(LENGTH) >= torch.randint(1, 9, (size, 1), generator=generator)
    return TensorDataset(tokens, states, loss_mask), lm_head * 0.7


def main(arguments: Sequence[str] | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """What was validated before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args(arguments)
    lightning.seed_everything(0)
    data, target_lm_head = make_data(512)
    held_out = TensorDataset(*data[:64])
    draft = Draft(target_lm_head)
    trainer = lightning.Trainer(
        max_steps=given.steps, accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
    )  # fmt: skip
    validation = DataLoader(held_out, batch_size=16)
    before = dict(trainer.validate(draft, validation, verbose=False)[0])
    trainer.fit(draft, DataLoader(TensorDataset(*data[64:]), batch_size=16, shuffle=True), validation)
    after = dict(trainer.validate(draft, validation, verbose=False)[0])
    for name in ("val/loss", "val/acceptance_rate_0", "val/acceptance_rate_2", "val/acceptance_length"):
        print(f"{name:22s} {before[name]:.3f} -> {after[name]:.3f}")
    return before, after


if __name__ == "__main__":
    main()
