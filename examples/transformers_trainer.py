"""A draft in Hugging Face's `Trainer`, with gradient accumulation that is exact.

    pip install transformers accelerate
    python examples/transformers_trainer.py

`Trainer` counts the labels of all micro-batches of a step, over all ranks, and hands the count to a model whose forward
takes `num_items_in_batch`. It is the `denominator` of the loss. So the gradients are those of the whole batch, however
uneven the masks are. The objective must not need the mean acceptance of a batch: lambda is taken per token here.

`Trainer` logs what `LKSums.merged` makes of the micro-batches since the last time.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

import fused_lk

LENGTH, SIZE, VOCAB = 24, 32, 256
IGNORED = -100


class Draft(nn.Module):
    """Row t has seen the target's hidden state t and token t + 1, and meets target row t + 1."""

    accepts_loss_kwargs = True  # `Trainer` passes num_items_in_batch

    def __init__(self, target_lm_head: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, SIZE)
        self.body = nn.Sequential(nn.Linear(2 * SIZE, 2 * SIZE), nn.SiLU(), nn.Linear(2 * SIZE, SIZE))
        self.lm_head = nn.Linear(SIZE, VOCAB, bias=False)
        self.register_buffer("target_lm_head", target_lm_head, persistent=False)  # moves along, is not saved

    def forward(
        self, input_ids: Tensor, states: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> dict[str, Any]:
        hidden = self.body(torch.cat([states[:, :-1], self.embed(input_ids[:, 1:])], -1))
        out = fused_lk.lk_loss(
            hidden, self.lm_head.weight, fused_lk.Target.from_hidden(states[:, 1:], self.target_lm_head),
            mask=labels[:, 1:] != IGNORED, lambda_per="token", denominator=num_items_in_batch,
        )  # fmt: skip
        return {"loss": out.loss, "out": out}


class DraftTrainer(Trainer):
    """`Trainer`, which logs the metrics of the draft."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[fused_lk.LKSums] = []

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        self.seen.append(outputs["out"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any) -> None:
        if self.seen:  # with ranks: .all_reduced(torch.distributed.group.WORLD)
            logs = {**logs, **fused_lk.LKSums.merged(self.seen).metrics("draft_")}
            self.seen = []
        super().log(logs, *args)


def make_data(size: int) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Rows as a data set gives them, and the target's `lm_head`.

    `labels[t]` is the token that target row t predicts, or -100 where it does not count. Draft row t needs target row
    t + 1, so that target row 0 has no label.
    """
    generator = torch.Generator().manual_seed(0)
    table, lm_head = torch.randn(2, VOCAB, SIZE, generator=generator)
    rows = []
    for _ in range(size):
        tokens = torch.randint(VOCAB, (LENGTH + 1,), generator=generator)
        states = table[tokens[:-1]] + 0.3 * torch.randn(LENGTH, SIZE, generator=generator)
        prompt = int(torch.randint(1, LENGTH, (), generator=generator))
        labels = tokens[1:].masked_fill(torch.arange(LENGTH) < prompt, IGNORED)
        rows.append({"input_ids": tokens[:-1], "states": states, "labels": labels})
    return rows, lm_head * 0.7


def train(steps: int, batch: int = 8, accumulation: int = 4) -> DraftTrainer:
    data, target_lm_head = make_data(512)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory, max_steps=steps, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            learning_rate=1e-2, logging_steps=max(1, steps // 5), save_strategy="no", report_to=[], disable_tqdm=True,
            remove_unused_columns=False,
        )  # fmt: skip
        trainer = DraftTrainer(model=Draft(target_lm_head), args=arguments, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args(arguments)
    history = [x for x in train(given.steps).state.log_history if "draft_loss" in x]
    for logs in history:
        names = ("loss", "grad_norm", "draft_acceptance_rate_0", "draft_acceptance_length")
        print(f"step {logs['step']:4d}  " + "  ".join(f"{name} {logs[name]:.3f}" for name in names if name in logs))
    return history


if __name__ == "__main__":
    main()
