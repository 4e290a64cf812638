"""Tiny targets, drafts and features on disk, as the trainers' own commands read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

TARGET_VOCAB, DRAFT_VOCAB, HIDDEN, LENGTH, SAMPLES = 96, 48, 32, 24, 10


def specforge(root: Path, name: str = "run", **changes: Any) -> Path:
    """Write an offline EAGLE-3 run below `root`, and return its config; `changes` are sections to add or to replace."""
    vocabulary = _target(root)
    draft = json.loads((root / "target" / "config.json").read_text())
    draft |= {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": DRAFT_VOCAB}
    (root / "draft.json").write_text(json.dumps(draft))
    torch.save(vocabulary, root / "vocabulary.pt")
    (root / "features").mkdir(exist_ok=True)
    for i, (token_ids, loss_mask, states) in enumerate(_samples(4)):
        features = {"input_ids": token_ids, "loss_mask": loss_mask, "hidden_state": states[None, :, -1]}
        features["aux_hidden_state"] = states[None, :, :-1].flatten(2)
        torch.save({key: x.clone() for key, x in features.items()}, root / "features" / f"{i}.ckpt")
    config = {
        "model": {
            "target_model_path": str(root / "target"),
            "draft_model_config": str(root / "draft.json"),
            "vocab_mapping_path": str(root / "vocabulary.pt"),
        },
        "data": {"hidden_states_path": str(root / "features"), "max_length": 64, "cache_dir": str(root / "cache")},
        "training": {
            "max_steps": 3,
            "ttt_length": 3,
            "attention_backend": "sdpa",
            "fsdp_sharding": "NO_SHARD",  # FSDP knows no CPU.
            "lk_loss_type": "lambda",
            "save_interval": 3,
            "log_interval": 1,
        },
        "run_id": "tiny",
        "output_dir": str(root / name),
    }
    config["data"]["dataloader_num_workers"] = 0
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config | changes))
    return path


def speculators(root: Path) -> list[str]:
    """Write data for an offline run below `root`, and return the arguments of `speculators train`, but --save-path."""
    import datasets

    t2d = _target(root)["t2d"]
    np.save(root / "t2d.npy", t2d.numpy())
    np.save(root / "d2t.npy", (t2d.nonzero().squeeze(1) - torch.arange(DRAFT_VOCAB)).numpy())
    samples = _samples(4)
    (root / "hidden").mkdir(exist_ok=True)
    for i, (token_ids, _, states) in enumerate(samples):
        save_file({"token_ids": token_ids, "hidden_states": states}, root / "hidden" / f"hs_{i}.safetensors")
    columns = {"input_ids": [x.tolist() for x, *_ in samples], "loss_mask": [x.tolist() for _, x, _ in samples]}
    data = datasets.Dataset.from_dict(columns | {"seq_len": [LENGTH] * len(samples)})
    data.set_format("torch")
    data.save_to_disk(root / "data")
    options = {
        "verifier-name-or-path": root / "target",
        "data-path": root / "data",
        "hidden-states-path": root / "hidden",
        "d2t-path": root / "d2t.npy",
        "t2d-path": root / "t2d.npy",
        "total-seq-len": 2 * LENGTH,
        "train-data-ratio": 0.8,
        "log-dir": root / "logs",
        **{"num-layers": 1, "num-workers": 0, "epochs": 1, "max-steps": 2, "mask-token-id": 3},
        **{"on-missing": "raise", "draft-attn-impl": "eager"},
    }
    return [*(f"--{name}={value}" for name, value in options.items()), "--target-layer-ids", "1", "2", "3"]


def _target(root: Path) -> dict[str, torch.Tensor]:
    """Write a target of which only the embedding, the last norm and the head exist; return `t2d` and `d2t`."""
    generator = torch.Generator().manual_seed(0)
    folder = root / "target"
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": HIDDEN // 2,
        "vocab_size": TARGET_VOCAB,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
    }
    (folder / "config.json").write_text(json.dumps(config))
    shape = (TARGET_VOCAB, HIDDEN)
    names = ("lm_head.weight", "model.embed_tokens.weight")
    weights = {name: torch.randn(shape, generator=generator).bfloat16() for name in names}
    weights["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    t2d = torch.zeros(TARGET_VOCAB, dtype=torch.bool)
    t2d[torch.randperm(TARGET_VOCAB, generator=generator)[:DRAFT_VOCAB]] = True
    return {"t2d": t2d, "d2t": t2d.nonzero().squeeze(1) - torch.arange(DRAFT_VOCAB)}


def _samples(layers: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Token ids, loss mask, and the target's states `[LENGTH, layers, HIDDEN]` of each sample."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(SAMPLES):
        token_ids = torch.randint(TARGET_VOCAB, (LENGTH,), generator=generator)
        loss_mask = (torch.rand(LENGTH, generator=generator) > 0.2).long()
        made.append((token_ids, loss_mask, torch.randn(LENGTH, layers, HIDDEN, generator=generator).bfloat16()))
    return made
