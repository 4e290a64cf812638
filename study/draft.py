"""The draft: EAGLE-3's one decoder layer over the target's features and the tokens that follow them.

Row t has the target's features of token t, of three layers. In step k it also knows the tokens up to t + 1 + k and
proposes token t + 2 + k, about which the target's row t + 1 + k has the last word. Step 0 reads the features; each
later step reads, in their place, what the step before gave. Its queries see the keys of step 0 up to row t, and those
of its own later steps.

Training takes all rows at once, step by step (`forward`). Decoding takes one row on, with keys and values kept in a
`Cache` (`read`, then `step`). Both are `_layer`; they differ in what attends to what.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import Cache

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

SMALL = 0.3  # factor of the random weights that a new draft adds to the target's


@dataclass(frozen=True)
class Size:
    """The layer's sizes: those of the target's own layers."""

    hidden: int
    heads: int
    key_heads: int
    head: int
    mlp: int
    rope_theta: float
    eps: float
    features: int = 3

    @classmethod
    def of(cls, config: Any) -> Size:
        """From a Llama configuration of transformers."""
        hidden, heads = config.hidden_size, config.num_attention_heads
        head = getattr(config, "head_dim", None) or hidden // heads
        theta = config.rope_parameters["rope_theta"]
        return cls(
            hidden, heads, config.num_key_value_heads, head, config.intermediate_size, theta, config.rms_norm_eps
        )


class Draft(nn.Module):
    """The draft of a target.

    Args:
        size: the layer's sizes.
        embedding: `[V_target, hidden]`, the target's; it is not trained, and no part of the `state_dict`.
        vocab_size: tokens that the draft can propose.
    """

    def __init__(self, size: Size, embedding: Tensor, vocab_size: int) -> None:
        super().__init__()
        self.size, self.embedding = size, embedding.detach()
        hidden, eps = size.hidden, size.eps
        # The features of three layers differ in scale by orders of magnitude, so each is normalised by itself.
        self.norm_features = nn.RMSNorm(hidden, eps, elementwise_affine=False)
        self.fc = nn.Linear(size.features * hidden, hidden, bias=False)
        self.norm_token, self.norm_state = nn.RMSNorm(hidden, eps), nn.RMSNorm(hidden, eps)
        self.norm_mlp, self.norm_out = nn.RMSNorm(hidden, eps), nn.RMSNorm(hidden, eps)
        self.qkv = nn.Linear(2 * hidden, (size.heads + 2 * size.key_heads) * size.head, bias=False)
        self.out = nn.Linear(size.heads * size.head, hidden, bias=False)
        self.up = nn.Linear(hidden, 2 * size.mlp, bias=False)  # gate and value
        self.down = nn.Linear(size.mlp, hidden, bias=False)
        self.head = nn.Linear(hidden, vocab_size, bias=False)

    @classmethod
    def of(cls, model: Any, target_ids: Tensor, seed: int) -> Draft:
        """A new draft of a transformers model, whose vocabulary is the target's tokens `target_ids`.

        It starts as the target's last layer, last norm and head, over the high layer's features, because the short
        trainings of this study cannot make a layer from nothing. What reads the token that follows and the other
        features is random, by `seed` alone, and small.
        """
        embedding = model.get_input_embeddings().weight
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # the same numbers on any device
            torch.manual_seed(seed)
            draft = cls(Size.of(model.config), embedding, len(target_ids))
        draft.to(embedding.device)
        hidden, last = draft.size.hidden, model.model.layers[-1]
        attention, mlp = last.self_attn, last.mlp
        with torch.no_grad():
            draft.fc.weight.mul_(SMALL)[:, -hidden:] += torch.eye(hidden, device=embedding.device)
            draft.qkv.weight[:, :hidden] *= SMALL
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            draft.qkv.weight[:, hidden:] = torch.cat([projection.weight for projection in projections])
            copies = (
                (draft.out, attention.o_proj), (draft.down, mlp.down_proj),
                (draft.norm_state, last.input_layernorm), (draft.norm_mlp, last.post_attention_layernorm),
                (draft.norm_out, model.model.norm),
            )  # fmt: skip
            for own, other in copies:
                own.weight.copy_(other.weight)
            draft.up.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
            draft.head.weight.copy_(model.get_output_embeddings().weight[target_ids])
        return draft

    def forward(self, features: Tensor, tokens: Tensor, sequence_ids: Tensor, steps: int) -> list[Tensor]:
        """What the head reads, `[B, S, hidden]`, of each of `steps` steps: features `[B, S, 3 * hidden]`, ids `[B, S]`.

        Rows whose following token lies in another sequence hold nothing of use.
        """
        length = tokens.shape[1]
        positions = torch.arange(length, device=tokens.device).expand(tokens.shape)
        same = sequence_ids.unsqueeze(-1) == sequence_ids.unsqueeze(-2)
        attend = _Chains(same.tril().view(len(tokens), 1, 1, length, length))
        state, hidden = self.first_state(features), []
        for k in range(steps):
            state = self._layer(state, F.pad(tokens[:, 1 + k :], (0, 1 + k)), positions + k, attend)
            hidden.append(self.norm_out(state))
        return hidden

    def first_state(self, features: Tensor) -> Tensor:
        """What step 0 reads of the features `[..., 3 * hidden]`."""
        dtype = self.fc.weight.dtype  # under autocast the states stay as exact as the weights
        layers = features.to(dtype).unflatten(-1, (self.size.features, -1))
        return self.fc(self.norm_features(layers).flatten(-2)).to(dtype)

    def step(self, state: Tensor, following: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """The next states of rows, `[B, m, hidden]`, which the cache takes in at `positions`.

        Args:
            state: `[B, m, hidden]`, of `first_state` or of the step before.
            following: `[B, m]`, the token that follows.
            positions: `[B, m]`, row + step.
        """
        cache.at(positions)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = cache.update(k, v, 0)
            return F.scaled_dot_product_attention(q, k, v, cache.mask, enable_gqa=True)

        return self._layer(state, following, positions, attend)

    def _layer(self, state: Tensor, following: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        token = F.embedding(following, self.embedding).to(state.dtype)
        x = torch.cat([self.norm_token(token), self.norm_state(state)], -1)
        heads = self.qkv(x).unflatten(-1, (-1, self.size.head)).transpose(1, 2)
        q, k, v = heads.split([self.size.heads, self.size.key_heads, self.size.key_heads], 1)
        turn = [x.to(q.dtype) for x in self._turn(positions)]
        y = attend(rotated(q, *turn), rotated(k, *turn), v)
        state = state + self.out(y.transpose(1, 2).flatten(-2))
        gate, value = self.up(self.norm_mlp(state)).chunk(2, -1)
        return state + self.down(F.silu(gate) * value)

    def _turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary angles, `[B, 1, m, head / 2]`."""
        half = self.size.head // 2
        exponents = torch.arange(half, device=positions.device, dtype=torch.float32) / half
        angle = positions[:, None, :, None] * self.size.rope_theta**-exponents
        return angle.cos(), angle.sin()


class _Chains:
    """The attention of training: a row sees the rows of step 0 that `seen` allows, and its own later steps."""

    def __init__(self, seen: Tensor) -> None:
        self.seen = seen
        self.keys: list[Tensor] = []  # of each step, [B, key heads, S, head]
        self.values: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.append(k)
        self.values.append(v)
        q = q.unflatten(1, (k.shape[1], -1)) * k.shape[-1] ** -0.5  # [B, key heads, group, S, head]
        first, first_values = self.keys[0].unsqueeze(2), self.values[0].unsqueeze(2)
        scores = (q @ first.transpose(-1, -2)).masked_fill(~self.seen, float("-inf"))
        own = [(q * key.unsqueeze(2)).sum(-1, keepdim=True) for key in self.keys[1:]]
        weights = torch.cat([scores, *own], -1).softmax(-1)
        length = k.shape[2]
        y = weights[..., :length] @ first_values
        for i, value in enumerate(self.values[1:]):
            y = y + weights[..., length + i, None] * value.unsqueeze(2)
        return y.flatten(1, 2)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x` `[B, heads, m, head]`: its halves are the two coordinates."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
