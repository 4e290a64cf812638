"""Real text that every machine has: the sources of Python's own standard library, as tokens."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

# Tests and tables (character maps, help texts) are not prose in Python; installed packages differ between machines.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}
HELD_OUT_EVERY = 10  # one file in ten is never trained on, by the tokeniser neither
END_OF_FILE = "<|endoftext|>"


@dataclass(frozen=True)
class Corpus:
    """Token streams, int64 `[N]`, of the files trained on and of those held out."""

    tokenizer: Tokenizer
    train: Tensor
    held_out: Tensor
    num_files: int
    num_bytes: int

    def batches(self, size: int, length: int, seed: int) -> Iterator[Tensor]:
        """Endless batches `[size, length]` of windows at random places of the training text."""
        generator = torch.Generator().manual_seed(seed)
        windows = self.train.unfold(0, length, 1)
        while True:
            yield windows[torch.randint(len(windows), (size,), generator=generator)]

    def held_out_windows(self, count: int, length: int) -> Tensor:
        """`[count, length]`, spread evenly over the held-out text; fewer where it has no more without overlap."""
        windows = self.held_out.unfold(0, length, length)
        count = min(count, len(windows))
        return windows[torch.arange(count) * len(windows) // count]

    def draft_tokens(self, size: int) -> Tensor:
        """`t2d`, bool `[V]`: the `size` tokens most frequent in the training text, as EAGLE-3 chooses them."""
        counts = self.train.bincount(minlength=self.tokenizer.get_vocab_size())
        t2d = torch.zeros(len(counts), dtype=torch.bool)
        return t2d.index_fill_(0, counts.argsort(descending=True, stable=True)[:size], True)


def load(vocab_size: int, max_bytes: int | None = None) -> Corpus:
    """Read the sources (at most `max_bytes` of them), learn a byte-level BPE of `vocab_size` tokens, and encode.

    Raises:
        RuntimeError: this Python has no sources on disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.rglob("*.py")) if not SKIPPED & set(path.relative_to(root).parts)]
    texts, num_bytes = [], 0
    for path in paths:
        if max_bytes is not None and num_bytes >= max_bytes:
            break
        texts.append(path.read_text(encoding="utf-8", errors="ignore"))
        num_bytes += len(texts[-1].encode())
    if len(texts) < HELD_OUT_EVERY:
        raise RuntimeError(
            f"expected the standard library's sources under {root}; found {len(texts)} files. "
            "Use a Python that is installed with them, not one zipped up or embedded."
        )
    held_out = texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    train = [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        train,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_FILE], initial_alphabet=alphabet, show_progress=False
        ),
    )

    def encode(files: list[str]) -> Tensor:
        end = tokenizer.token_to_id(END_OF_FILE)
        return torch.tensor([token for e in tokenizer.encode_batch(files) for token in (*e.ids, end)])

    return Corpus(tokenizer, encode(train), encode(held_out), len(texts), num_bytes)
