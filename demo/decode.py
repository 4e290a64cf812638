"""Real speculative sampling with a trained draft: is a token accepted as often as `fused_lk` says it is?

The sampler below is the textbook one on plain softmaxes: the draft samples K tokens, one forward of the target scores
them all, token k is accepted with probability min(1, p/q), and the first one refused is replaced by a sample of
(p - q)+. Whatever the draft, the text is the target's own (arXiv 2211.17192). Given its context, a token is accepted
with probability alpha = sum min(p, q): the very number that `fused_lk.lk_divergences` gives from hidden states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import fused_lk

from .models import Draft, Target


@dataclass(frozen=True)
class Decoding:
    """Counts over all rounds, per draft position `[K]`."""

    rounds: int
    tokens: Tensor  # prompts and what followed, `[B, S + room]`; the last round's refused tokens may come after it
    reached: Tensor  # all earlier tokens of the round were accepted
    accepted: Tensor  # of those
    predicted: Tensor  # sum of alpha over the same contexts
    variance: Tensor  # sum of alpha (1 - alpha)

    @property
    def length(self) -> float:
        """Measured tokens per pass of the target."""
        return 1 + float(self.accepted.sum()) / self.rounds

    @property
    def predicted_length(self) -> float:
        """What alpha says about it, in the contexts that were met."""
        return 1 + float(self.predicted.sum()) / self.rounds

    @property
    def length_error(self) -> float:
        """Standard error of the measured length, given alpha: differences from it are martingale differences."""
        return math.sqrt(float(self.variance.sum())) / self.rounds


@torch.no_grad()
def decode(
    target: Target,
    draft: Draft,
    head: fused_lk.TargetHead,
    prompts: Tensor,
    steps: int,
    rounds: int,
    seed: int,
    progress: tqdm,
) -> Decoding:
    """Continue `prompts` `[B, S]` for `rounds` passes of the target, `steps` draft tokens each."""
    batch, prompt = prompts.shape
    device = prompts.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.zeros(batch, prompt + rounds * (steps + 1), dtype=torch.long, device=device)
    tokens[:, :prompt] = prompts
    length = torch.full((batch,), prompt, device=device)  # of the text so far
    each = torch.arange(batch, device=device)
    sums = torch.zeros(4, steps, dtype=torch.float64, device=device)
    _, features = target(tokens)
    for _ in range(rounds):
        # The last row whose features are known is that of the last token but one; the last token follows it.
        state, row = draft.start(features), length - 2
        hidden, q = [], []
        for k in range(steps):
            hidden.append(draft.step(state, tokens.roll(-1 - k, 1))[each, row])
            q.append(on_target_vocab(draft.head(hidden[k]).softmax(-1), head))
            tokens[each, length + k] = torch.multinomial(q[k], 1, generator=generator).squeeze(-1)
        states, features = target(tokens)
        scored = torch.stack([states[each, length - 1 + k] for k in range(steps + 1)])  # [K + 1, B, H]
        p = target.head(scored).softmax(-1)

        proposed = torch.stack([tokens[each, length + k] for k in range(steps)]).unsqueeze(-1)
        q = torch.stack(q)
        ratio = (p[:-1].gather(-1, proposed) / q.gather(-1, proposed)).squeeze(-1)
        accepted = (torch.rand(steps, batch, generator=generator, device=device) < ratio).cumprod(0).bool()
        count = accepted.sum(0)
        # Where all are accepted there is no q to subtract, and the target adds a token of its own.
        left = (p - torch.cat([q, torch.zeros_like(q[:1])]))[count, each].clamp(min=0)
        tokens[each, length + count] = torch.multinomial(left, 1, generator=generator).squeeze(-1)
        length = length + count + 1

        alpha = fused_lk.lk_divergences(
            hidden, draft.head.weight, fused_lk.Target.from_hidden(scored[:-1], head)
        ).acceptance.double()
        reached = torch.cat([torch.ones_like(accepted[:1]), accepted[:-1]]).double()
        sums += torch.stack([reached, accepted, reached * alpha, reached * alpha * (1 - alpha)]).sum(-1)
        progress.update()
    return Decoding(batch * rounds, tokens, *sums.cpu())


def on_target_vocab(q: Tensor, head: fused_lk.TargetHead) -> Tensor:
    """Draft probabilities `[B, V_d]` spread over the target's tokens `[B, V_t]`."""
    spread = q.new_zeros(len(q), head.weight.shape[0])
    return q if head.vocab is None else spread.index_copy_(1, head.vocab.target_ids, q)
