"""Tiny draft models of speculators, one of each kind, and batches for them: built as its own trainer builds them."""

from __future__ import annotations

import inspect
from typing import Any

import peers
import torch
from transformers import LlamaConfig, Qwen3Config

PEER = peers.speculators()
DEVICE = peers.device()
T, H, V_DRAFT, V_TARGET, AUX = 48, 16, 93, 124, 2
BLOCK, ANCHORS = 4, 9

# Each kind: the class of its model, that of its config, and what the config asks for beyond the layers.
BLOCKS: dict[str, Any] = {"block_size": BLOCK, "aux_hidden_state_layer_ids": [0, 1], "mask_token_id": 3}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "eagle3": ("Eagle3DraftModel", "Eagle3SpeculatorConfig", {"eagle_aux_hidden_state_layer_ids": [0, 1]}),
    "peagle": (
        "PEagleDraftModel",
        "PEagleSpeculatorConfig",
        {"eagle_aux_hidden_state_layer_ids": [0, 1], "mask_token_id": 3},
    ),
    "dflash": ("DFlashDraftModel", "DFlashSpeculatorConfig", BLOCKS),
    "dflash2": (
        "DFlash2DraftModel",
        "DFlash2SpeculatorConfig",
        {**BLOCKS, "draft_vocab_size": V_TARGET, "conv_group_size": 4, "selector_rank": 5, "selector_top_k": 6},
    ),
    "dspark": ("DSparkDraftModel", "DSparkSpeculatorConfig", {**BLOCKS, "markov_rank": 5}),
    "xpress": ("XPressDraftModel", "XPressSpeculatorConfig", {**BLOCKS, "xpress_rank": 5}),
    "mtp": ("MTPDraftModel", "MTPSpeculatorConfig", {}),
}
# What a trainer passes with every batch, beyond the losses.
CALLS: dict[str, dict[str, Any]] = {
    "eagle3": {"ttt_steps": 3, "ttt_step_loss_decay": 0.8},
    "peagle": {"num_depths": 4},
    "mtp": {"step_weights": [0.5, 0.3, 0.2]},
}


def make(kind: str, train_head: bool = True, scale: float = 0.5, dtype: torch.dtype = torch.float32, **config: Any):
    """A model in which every parameter has some effect; `scale` says how sure its predictions are."""
    torch.manual_seed(0)
    model_class, config_class, own = KINDS[kind]
    of_llama = kind in ("eagle3", "peagle")
    layer = (LlamaConfig if of_llama else Qwen3Config)(
        vocab_size=V_TARGET, hidden_size=H, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
        num_hidden_layers=1, max_position_embeddings=128, head_dim=8, attn_implementation="eager",
    )  # fmt: skip
    modules = PEER.kinds[kind]
    config = {"transformer_layer_config": layer, **own, **config}
    if kind != "mtp":
        config.setdefault("draft_vocab_size", V_DRAFT)
    else:
        config["speculators_config"] = _of_three_steps()
    model = getattr(modules.core, model_class)(getattr(modules.config, config_class)(**config))
    for name in ("embed_tokens", "lm_head", "verifier_lm_head"):
        torch.nn.init.normal_(getattr(model, name).weight, std=scale)
        getattr(model, name).weight.data[:4] *= 2  # favourites, so that some predictions are right
    for name, x in model.named_parameters():
        if x.ndim == 2 and name.startswith(("layers", "mtp_layers", "fc.")):
            x.data.mul_(10)  # or all rows of a block would predict one token
        if any(part in name for part in ("markov", "refiner", "selector", "codebook", "conv")):
            x.data.add_(0.3 * torch.randn_like(x))
    if model.d2t is not None:
        kept = torch.arange(V_TARGET) % 4 != 3
        model.load_vocab_mappings(kept, kept.nonzero().squeeze(1) - torch.arange(V_DRAFT))
    model.lm_head.weight.requires_grad_(train_head)
    return model.to(DEVICE, dtype)


def _of_three_steps() -> Any:
    import speculators
    from speculators.proposals import GreedyTokenProposalConfig

    return speculators.SpeculatorsConfig(
        algorithm="mtp",
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
        default_proposal_method="greedy",
        verifier=speculators.VerifierConfig(name_or_path=None, architectures=["Qwen3ForCausalLM"]),
    )


def batch(kind: str, seed: int = 0, size: int = T, dtype: torch.dtype = torch.float32, **call: Any) -> dict[str, Any]:
    """Two documents, a prompt, and gaps in the loss mask."""
    generator = torch.Generator().manual_seed(seed)
    loss_mask = torch.rand(1, size, generator=generator) < 0.7
    loss_mask[:, :4] = False
    made: dict[str, Any] = {
        "hidden_states": torch.randn(1, size, (1 if kind == "mtp" else AUX) * H, generator=generator).to(dtype),
        "input_ids": torch.randint(V_TARGET, (1, size), generator=generator),
        "loss_mask": loss_mask,
        "document_ids": (torch.arange(size) >= size // 2).long().unsqueeze(0),
        "verifier_last_hidden_states": torch.randn(1, size, H, generator=generator).to(dtype),
        **CALLS.get(kind, {"max_anchors": ANCHORS}),
        **call,
    }
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in made.items()}


def losses(model: Any, loss: str, implementation: str = "eager") -> dict[str, Any]:
    """What the trainer passes for a loss: its function for acceptance rates as well, where the model reports them."""
    resolve = PEER.utils.resolve_loss_config
    call = {"loss_config": resolve(loss, implementation), "tv_loss_fn": resolve("tv", implementation)["tv"][0]}
    return {name: x for name, x in call.items() if name in inspect.signature(model.forward).parameters}


def run(model: Any, given: dict[str, Any], loss: str | None = None, implementation: str = "eager") -> tuple[Any, Any]:
    """What the forward returns, and the gradient of every parameter that has one. Anchors are drawn from one seed."""
    model.zero_grad()
    if loss is not None:
        given = {**given, **losses(model, loss, implementation)}
    torch.manual_seed(7)
    results = model(**given)
    if results[1].requires_grad:
        results[1].backward()
    return results, {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same(ours: tuple[Any, Any], theirs: tuple[Any, Any], rtol: float = 1e-5) -> None:
    """Losses and metrics, and gradients relative to the largest entry of each parameter's."""
    ((_, loss, metrics), gradients), ((_, their_loss, their_metrics), their_gradients) = ours, theirs
    torch.testing.assert_close(loss, their_loss, rtol=rtol, atol=0)
    assert list(metrics) == list(their_metrics)
    for name, want in their_metrics.items():
        assert not metrics[name].requires_grad
        torch.testing.assert_close(metrics[name], want, rtol=rtol, atol=1e-6, msg=f"{name}: {{}}".format)
    assert gradients.keys() == their_gradients.keys()
    for name, want in their_gradients.items():
        error = (gradients[name] - want).abs().max() / want.abs().max().clamp_min(1e-12)
        assert error <= rtol, f"{name}: {error:.1e}"
