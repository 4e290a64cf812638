"""Train an EAGLE-3 style draft for a Hugging Face model, in a plain loop, without ever making logits.

    python examples/transformers_loop.py --steps 100

The target is a `transformers` Llama (tiny, with random weights, so that this runs anywhere in seconds; put
`AutoModelForCausalLM.from_pretrained(...)` in its place). All that concerns the loss is in `loss_of`:

    target model ──> last hidden states, and its real lm_head
    draft        ──> one hidden state tensor per test-time-training (TTT) step, and its own lm_head over d2t / t2d
    fused_lk     ──> loss, gradients and metrics of all steps in one call

Row t of the draft has seen the target's features up to token t and the tokens up to t + 1 + k in step k; it predicts
token t + 2 + k, which the target's hidden state t + 1 + k predicts. So step k scores draft row t against target row
t + 1 + k, and nothing is shifted, sliced or copied: the pair list, `fused_lk.Pairs.ttt`, says which row meets which.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

import fused_lk

TARGET_CONFIG = LlamaConfig(
    vocab_size=640, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=256, initializer_range=0.12,
)  # fmt: skip
DRAFT_VOCAB_SIZE = 512
AUX_LAYERS = (1, 2, 3)  # hidden_states[i] is the output of layer i; 0 would be the embedding
TTT_STEPS = 3
BATCH, LENGTH, PROMPT = 8, 48, 12


class Draft(nn.Module):
    """One decoder layer over the target's features and the tokens that follow them, unrolled for several steps."""

    def __init__(self, target: LlamaForCausalLM, t2d: Tensor) -> None:
        super().__init__()
        config, size = target.config, target.config.hidden_size
        self.num_heads = config.num_attention_heads
        self.embed = target.get_input_embeddings()  # shared with the target, frozen
        self.features = nn.Linear(len(AUX_LAYERS) * size, size, bias=False)
        self.norm_token, self.norm_state, self.norm_mlp, self.norm_out = (LlamaRMSNorm(size) for _ in range(4))
        self.qkv = nn.Linear(2 * size, 3 * size, bias=False)
        self.out = nn.Linear(size, size, bias=False)
        self.mlp = LlamaMLP(config)
        self.rotary = LlamaRotaryEmbedding(config)
        # As checkpoints store them: a bool mask over the target's vocabulary, and offsets to target ids.
        vocab = fused_lk.DraftVocab(t2d)
        self.register_buffer("t2d", t2d)
        self.register_buffer("d2t", vocab.d2t)
        self.lm_head = nn.Linear(size, vocab.draft_size, bias=False)
        self.lm_head.weight.data.copy_(target.lm_head.weight[t2d])

    def forward(self, features: Tensor, tokens: Tensor, steps: int) -> list[Tensor]:
        """The hidden states `[B, S, H]` of each step, ready for `lm_head`, which is not called."""
        batch, length = tokens.shape
        state = self.features(features)
        attends = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        own = torch.eye(length, dtype=torch.bool, device=tokens.device)
        keys, values, hidden = [], [], []
        for step in range(steps):
            following = F.pad(tokens[:, 1 + step :], (0, 1 + step))  # padded rows are in no pair
            x = torch.cat([self.norm_token(self.embed(following)), self.norm_state(state)], -1)
            q, k, v = (y.view(batch, length, self.num_heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            where = torch.arange(length, device=tokens.device).add(step).unsqueeze(0)
            q, k = apply_rotary_pos_emb(q, k, *self.rotary(x, where))
            keys.append(k)
            values.append(v)
            # A row sees the first step's rows before it, and its own later ones.
            mask = torch.cat([attends, *[own] * step], -1)
            y = F.scaled_dot_product_attention(q, torch.cat(keys, 2), torch.cat(values, 2), attn_mask=mask)
            state = state + self.out(y.transpose(1, 2).reshape(batch, length, -1))
            state = state + self.mlp(self.norm_mlp(state))
            hidden.append(self.norm_out(state))
        return hidden


def loss_of(
    draft: Draft,
    target: LlamaForCausalLM,
    head: fused_lk.TargetHead,
    batch: dict[str, Tensor],
    workspace_mb: float | str = "auto",
    **options: Any,
) -> fused_lk.LKOutput:
    """The loss of one batch; `options` go to `fused_lk.lk_loss`."""
    tokens, loss_mask = batch["input_ids"], batch["loss_mask"]
    with torch.no_grad():
        body = target.model(tokens, output_hidden_states=True, use_cache=False)  # the model without its lm_head
    features = torch.cat([body.hidden_states[layer] for layer in AUX_LAYERS], -1)
    hidden = draft(features, tokens, TTT_STEPS)
    # Target rows that some pair uses: hidden state t counts if token t + 1 does.
    used = F.pad(loss_mask[:, 1:], (0, 1), value=False)
    scored_against = fused_lk.Target.from_hidden(body.last_hidden_state, head, used, workspace_mb=workspace_mb)
    pairs = fused_lk.Pairs.ttt(loss_mask, TTT_STEPS)
    return fused_lk.lk_loss(
        hidden, draft.lm_head.weight, scored_against, pairs=pairs, workspace_mb=workspace_mb, **options
    )


def make_target(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    target = LlamaForCausalLM(TARGET_CONFIG).eval().requires_grad_(False)
    target.lm_head.weight.data *= 3  # random weights are nearly uniform otherwise: nothing to learn
    return target


def frequencies() -> Tensor:
    """Of the made-up corpus: token 0 the most frequent, then as Zipf has it."""
    weights = 1 / torch.arange(1, TARGET_CONFIG.vocab_size + 1)
    return weights / weights.sum()


def make_batch(generator: torch.Generator) -> dict[str, Tensor]:
    """Token ids, and a loss mask that leaves out a prompt of some length."""
    tokens = torch.multinomial(frequencies(), BATCH * LENGTH, True, generator=generator).view(BATCH, LENGTH)
    prompt = torch.randint(1, PROMPT, (BATCH, 1), generator=generator)
    return {"input_ids": tokens, "loss_mask": torch.arange(LENGTH) >= prompt}


def train(steps: int, objective: str = "lambda", learning_rate: float = 2e-3) -> list[dict[str, float]]:
    """The metrics of each step."""
    target = make_target()
    kept = frequencies().topk(DRAFT_VOCAB_SIZE).indices  # the draft proposes the most frequent tokens
    t2d = torch.zeros(TARGET_CONFIG.vocab_size, dtype=torch.bool).index_fill_(0, kept, True)
    draft = Draft(target, t2d)
    head = fused_lk.TargetHead(target.lm_head.weight, fused_lk.DraftVocab(draft.t2d, draft.d2t))  # once, not per batch
    trainable = [p for p in draft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    history = []
    for step in range(steps):
        out = loss_of(draft, target, head, make_batch(generator), objective=objective, position_decay=0.8)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        history.append(out.metrics())
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            rates = "  ".join(f"{history[-1][f'acceptance_rate_{k}']:.3f}" for k in range(TTT_STEPS))
            length = history[-1]["expected_acceptance_length"]
            print(f"step {step:4d}  loss {history[-1]['loss']:.4f}  acceptance {rates}  length {length:.3f}")
    return history


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--objective", choices=["kl", "tv", "alpha", "lambda"], default="lambda")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    given = parser.parse_args(arguments)
    return train(given.steps, given.objective, given.learning_rate)


if __name__ == "__main__":
    main()
