"""What the target says of the answers, on disk: a draft is trained on files, and the target runs over each text once.

`folder/features/train` and `folder/features/heldout` hold (N tokens, H the target's hidden size):

    meta.json           num_tokens, num_sequences, num_answer_tokens, hidden_size, vocab_size, layers
    token_ids.npy       int32 [N]
    mask.npy            bool [N], true where the token is one of an answer
    sequence_ids.npy    int32 [N], one number a conversation, ascending
    fused.npy           uint16 [N, 3 H], bits of bf16: outputs of the low, middle and high layer, side by side
    last.npy            uint16 [N, H], bits of bf16: the lm_head's input

Row i is of the state that has read token i, so it predicts token i + 1. A token takes 8 H bytes.

`folder/vocabulary.npy` is the draft's vocabulary.
Settings: folder, dtype, device, sequence_length, feature_batch, draft_vocab_size.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm import tqdm

from . import answers, stage, target
from .batches import Row, packed


@dataclass
class Features:
    """The arrays of one folder, memory-mapped."""

    token_ids: np.ndarray
    mask: np.ndarray
    sequence_ids: np.ndarray
    meta: dict[str, Any]
    fused_bits: np.ndarray
    last_bits: np.ndarray

    def fused(self, at: slice) -> Tensor:
        """bf16 [n, 3 H]"""
        return _floats(self.fused_bits[at])

    def last(self, at: slice) -> Tensor:
        """bf16 [n, H]"""
        return _floats(self.last_bits[at])


def _floats(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(bits)).view(torch.bfloat16)


def _bits(floats: Tensor) -> np.ndarray:
    return floats.to(torch.bfloat16).contiguous().view(torch.uint16).cpu().numpy()


def open(path: Path) -> Features:
    """The features of a folder that is finished."""
    if not (path / "meta.json").exists():
        raise FileNotFoundError(f"expected features in {path}, got none. Run the stage 'features' to its end.")
    names = ("token_ids", "mask", "sequence_ids", "fused", "last")
    token_ids, mask, sequence_ids, fused, last = (np.load(path / f"{name}.npy", mmap_mode="r") for name in names)
    return Features(token_ids, mask, sequence_ids, stage.read_json(path / "meta.json"), fused, last)


def folder(settings: Any, split: str) -> Path:
    """Of "train" or "heldout"."""
    return Path(settings.folder) / "features" / split


def run(settings: Any) -> None:
    """The stage: features of both splits, and the draft's vocabulary. A kill loses one batch of rows."""
    model = None
    for split in answers.SPLITS:
        if not (folder(settings, split) / "meta.json").exists():
            model = model or target.load(settings)[0]
            _write(settings, split, model)
    vocabulary(settings)


def _write(settings: Any, split: str, model: Any) -> None:
    path, length = folder(settings, split), settings.sequence_length
    texts = list(answers.texts(settings, split))
    sizes = [min(len(text.token_ids), length) for text in texts]
    token_ids = np.concatenate([np.array(text.token_ids[:length], np.int32) for text in texts])
    mask = np.concatenate([np.array(text.mask[:length], bool) for text in texts])
    sequence_ids = np.repeat(np.arange(len(texts), dtype=np.int32), sizes)
    for name, array in (("token_ids", token_ids), ("mask", mask), ("sequence_ids", sequence_ids)):
        with stage.replaced(path / f"{name}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, array)

    layers, hidden = target.layers(model.config), model.config.hidden_size
    ends = np.cumsum(sizes)
    rows = packed([slice(int(end - size), int(end)) for end, size in zip(ends, sizes, strict=True)], length)
    done = path / "done.json"  # {rows: how many are on disk, texts: of which texts}
    checksum = zlib.crc32(token_ids.tobytes() + str((length, layers)).encode())
    start = 0
    if done.exists() and stage.read_json(done)["texts"] == checksum:
        start = stage.read_json(done)["rows"]
    shapes = {"fused": (len(token_ids), 3 * hidden), "last": (len(token_ids), hidden)}
    arrays = {
        name: open_memmap(
            path / f"{name}.npy", **({"mode": "r+"} if start else {"mode": "w+", "dtype": np.uint16, "shape": shape})
        )
        for name, shape in shapes.items()
    }
    tokens = sum(piece.stop - piece.start for row in rows[start:] for piece in row)
    with tqdm(total=tokens, desc=f"features, {split}", unit="token", dynamic_ncols=True, mininterval=2.0) as progress:
        for at in range(start, len(rows), settings.feature_batch):
            batch = rows[at : at + settings.feature_batch]
            fused, last = states(model, layers, token_ids, batch)
            for row, pieces in enumerate(batch):
                place = 0
                for piece in pieces:
                    size = piece.stop - piece.start
                    arrays["fused"][piece] = _bits(fused[row, place : place + size])
                    arrays["last"][piece] = _bits(last[row, place : place + size])
                    place += size
                progress.update(place)
            for array in arrays.values():
                array.flush()
            stage.write_json(done, {"rows": at + len(batch), "texts": checksum})
    meta = {
        "num_tokens": len(token_ids), "num_sequences": len(texts), "num_answer_tokens": int(mask.sum()),
        "hidden_size": hidden, "vocab_size": model.config.vocab_size, "layers": layers,
    }  # fmt: skip
    stage.write_json(path / "meta.json", meta)
    done.unlink(missing_ok=True)


@torch.inference_mode()
def states(model: Any, layers: tuple[int, ...], token_ids: np.ndarray, rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Outputs of the layers side by side `[B, S, 3 H]`, and the lm_head's input `[B, S, H]`, of packed rows.

    A token sees those of its own sequence only, and counts its positions from there.
    """
    length = max(sum(piece.stop - piece.start for piece in row) for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    positions, sequences = torch.zeros_like(tokens), torch.full_like(tokens, -1)
    for i, row in enumerate(rows):
        at = 0
        for number, piece in enumerate(row):
            end = at + piece.stop - piece.start
            tokens[i, at:end] = torch.from_numpy(token_ids[piece].astype(np.int64))
            positions[i, at:end] = torch.arange(end - at)
            sequences[i, at:end] = number
            at = end
    mask = (sequences.unsqueeze(-1) == sequences.unsqueeze(-2)).tril().unsqueeze(1)  # [B, 1, S, S]
    seen: dict[int, Tensor] = {}
    hooks = [
        model.model.layers[i].register_forward_hook(
            lambda _module, _inputs, out, i=i: seen.__setitem__(i, out[0] if isinstance(out, tuple) else out)
        )
        for i in set(layers)
    ]
    try:
        last = model.model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False)[0]
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([seen[i] for i in layers], -1), last


def vocabulary(settings: Any) -> Tensor:
    """t2d, bool [V]: the `draft_vocab_size` tokens that the training answers have most often; kept in `folder`."""
    path = Path(settings.folder) / "vocabulary.npy"
    if path.exists():
        t2d = torch.from_numpy(np.load(path))
        if int(t2d.sum()) != settings.draft_vocab_size:
            raise ValueError(
                f"expected draft_vocab_size={settings.draft_vocab_size} as in {path}, which has {int(t2d.sum())}. "
                "Use a new folder."
            )
        return t2d
    train = open(folder(settings, "train"))
    size = train.meta["vocab_size"]
    if not 0 < settings.draft_vocab_size <= size:
        raise ValueError(f"expected 0 < draft_vocab_size <= {size}, got {settings.draft_vocab_size}.")
    counts = np.bincount(np.asarray(train.token_ids)[np.asarray(train.mask)], minlength=size)
    most = np.argsort(-counts, kind="stable")[: settings.draft_vocab_size]  # of equally many, the lower ids
    chosen = np.zeros(size, bool)
    chosen[most] = True
    with stage.replaced(path) as temporary, temporary.open("wb") as file:
        np.save(file, chosen)
    return torch.from_numpy(chosen)
