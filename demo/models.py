"""The two models: a small target transformer, and a much smaller EAGLE-style draft that reads its hidden states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_SIZE = 32


@dataclass(frozen=True)
class Size:
    """Layers and width of both models, and how many tokens the draft proposes in a row."""

    layers: int = 3
    width: int = 128
    draft_width: int = 64
    draft_vocab: int = 1024
    ttt_steps: int = 4


class Attention(nn.Module):
    """Queries, keys and values of rotated heads; the caller says what they attend to."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(inputs, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def heads(self, x: Tensor, offset: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, heads, S, HEAD_SIZE]` each; row t is at position t + `offset`."""
        q, k, v = (y.unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return rotated(q, offset), rotated(k, offset), v

    def join(self, y: Tensor) -> Tensor:
        return self.out(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 5 * width, bias=False)  # gate and value, 2.5 widths each
        self.down = nn.Linear(5 * width // 2, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class Layer(nn.Module):
    """A pre-norm decoder layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention, self.mlp = Attention(width, width), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention.heads(self.norm_attention(x))
        x = x + self.attention.join(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(self.norm_mlp(x))


class Target(nn.Module):
    """A decoder-only transformer. `forward` gives hidden states; its logits are `head(hidden)`."""

    def __init__(self, vocab_size: int, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, size.width)
        self.layers = nn.ModuleList(Layer(size.width) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.head = nn.Linear(size.width, vocab_size, bias=False)
        start_near_identity(self)
        nn.init.zeros_(self.head.weight)
        # EAGLE-3 reads a low, a middle and a high layer.
        self.read = sorted({0, size.layers // 2, size.layers - 1})

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`(hidden [B, S, width], features [B, S, len(read) * width])`, what the head and what the draft reads."""
        x, features = self.embed(tokens), []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.read:
                features.append(x)
        return self.norm(x), torch.cat(features, -1)


class Draft(nn.Module):
    """One narrow decoder layer with a head of its own, over the target's features and the tokens that follow them.

    Row t has seen the target's features up to token t. In step k it also knows the tokens up to t + 1 + k and proposes
    token t + 2 + k, about which the target's row t + 1 + k has the last word.
    """

    def __init__(self, target: Target, size: Size, num_tokens: int) -> None:
        super().__init__()
        width = size.draft_width
        self.embed = target.embed  # shared with the target, frozen
        self.features = nn.Linear(len(target.read) * size.width, width, bias=False)
        self.token = nn.Linear(size.width, width, bias=False)
        self.norm_features = nn.RMSNorm(len(target.read) * size.width)
        self.norm_token = nn.RMSNorm(size.width)
        self.norm_state, self.norm_mlp, self.norm_out = (nn.RMSNorm(width) for _ in range(3))
        self.attention, self.mlp = Attention(2 * width, width), MLP(width)
        self.head = nn.Linear(width, num_tokens, bias=False)
        start_near_identity(self)
        nn.init.zeros_(self.head.weight)

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def start(self, features: Tensor) -> DraftState:
        """Before step 0: features `[B, S, ...]` of the target, nothing attended to yet."""
        return DraftState(self.features(self.norm_features(features)), [], [])

    def step(self, state: DraftState, following: Tensor) -> Tensor:
        """The next step's hidden states `[B, S, width]`, ready for `head`; `following[b, t]` is token t + 1 + k."""
        k, length = len(state.keys), following.shape[1]
        x = torch.cat([self.token(self.norm_token(self.embed(following))), self.norm_state(state.rows)], -1)
        queries, keys, values = self.attention.heads(x, offset=k)
        state.keys.append(keys)
        state.values.append(values)
        # A row sees the first step's rows up to itself, and its own later ones.
        own = torch.eye(length, dtype=torch.bool, device=x.device)
        seen = torch.cat([torch.ones_like(own).tril(), *[own] * k], -1)
        y = F.scaled_dot_product_attention(queries, torch.cat(state.keys, 2), torch.cat(state.values, 2), seen)
        rows = state.rows + self.attention.join(y)
        state.rows = rows + self.mlp(self.norm_mlp(rows))
        return self.norm_out(state.rows)

    def forward(self, features: Tensor, tokens: Tensor, steps: int) -> list[Tensor]:
        """Hidden states of `steps` steps on given text; rows whose following token lies outside it hold nothing."""
        state = self.start(features)
        return [self.step(state, F.pad(tokens[:, 1 + k :], (0, 1 + k))) for k in range(steps)]


@dataclass
class DraftState:
    """What the draft carries from step to step."""

    rows: Tensor
    keys: list[Tensor]
    values: list[Tensor]


def rotated(x: Tensor, offset: int) -> Tensor:
    """Rotary positions `offset`, `offset + 1`, ... on the last two dimensions of `x`."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** -(torch.arange(half, device=x.device) / half)
    angle = (torch.arange(x.shape[-2], device=x.device) + offset).unsqueeze(-1) * frequency
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def start_near_identity(model: nn.Module) -> None:
    """Residual branches start at zero: token embeddings, of unit scale, are not drowned, and few steps go far."""
    for module in model.modules():
        if isinstance(module, Attention):
            nn.init.zeros_(module.out.weight)
        elif isinstance(module, MLP):
            nn.init.zeros_(module.down.weight)


def num_parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
