"""Real speculative decoding: how many tokens are accepted, and is it worth it?

The draft proposes K tokens, one pass of the target scores them all, and rejection sampling keeps the target's
distribution (arXiv 2211.17192, 2302.01318): token x is accepted with probability min(1, p(x) / q(x)), and the first one
refused is replaced by a sample of norm(max(p - q, 0)). q is 0 outside the draft vocabulary, p is not. At temperature 0
a token is accepted if it is the target's argmax. Where all are accepted, the target adds one more.

Plain decoding is the same loop with K = 0.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import fused_lk

from .cache import Cache
from .draft import Draft

# Called with the prompt's number, the tokens that a round adds to its answer, and how many of the first the draft made.
Watch = Callable[[int, list[int], int], None]


@dataclass
class Counts:
    """What was counted, over all drafts. A draft is one round: K tokens of the draft, one pass of the target."""

    draft_length: int
    output_tokens: int = 0
    dropped_tokens: int = 0  # accepted in an answer's last round, after its end: outputs + dropped = drafts + accepted
    drafts: int = 0
    accepted_at: list[int] = field(default_factory=list)  # [K], drafts whose tokens up to k were all accepted
    predicted_at: list[float] = field(default_factory=list)  # [K], sum of alpha where the tokens before k were
    variance_at: list[float] = field(default_factory=list)  # [K], sum of alpha (1 - alpha) there
    passes: int = 0  # of the target, with a batch each
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("accepted_at", "predicted_at", "variance_at"):
            if not getattr(self, name):
                setattr(self, name, [0] * self.draft_length)

    @property
    def draft_tokens(self) -> int:
        return self.draft_length * self.drafts

    @property
    def accepted_tokens(self) -> int:
        return sum(self.accepted_at)

    @property
    def acceptance_length(self) -> float:
        """Tokens per draft, the target's own included."""
        return 1 + self.accepted_tokens / max(1, self.drafts)

    @property
    def acceptance_length_error(self) -> float:
        """Its standard error, if drafts are taken as independent."""
        n, mean = max(1, self.drafts), self.acceptance_length - 1
        # accepted_at[k] drafts accept more than k tokens, and the square of a is the sum of 2 k + 1 over k < a.
        square = sum((2 * k + 1) * count for k, count in enumerate(self.accepted_at)) / n
        return math.sqrt(max(0.0, square - mean**2) / n)

    @property
    def rates(self) -> list[float]:
        """Acceptance at token k: the share of drafts whose tokens up to k are all accepted (as vLLM counts it)."""
        return [n / max(1, self.drafts) for n in self.accepted_at]

    @property
    def reached_at(self) -> list[int]:
        """Drafts whose tokens before k were all accepted."""
        return [self.drafts, *self.accepted_at[:-1]][: self.draft_length]

    @property
    def conditional_rates(self) -> list[float]:
        """Of those that reach token k, the share that accepts it: what alpha predicts."""
        return [n / max(1, reached) for n, reached in zip(self.accepted_at, self.reached_at, strict=True)]

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds if self.seconds else math.nan

    def __add__(self, other: Counts) -> Counts:
        mine, theirs = asdict(self), asdict(other)
        both: dict[str, Any] = {
            name: [a + b for a, b in zip(x, theirs[name], strict=True)] if isinstance(x, list) else x + theirs[name]
            for name, x in mine.items()
        }
        return Counts(**{**both, "draft_length": self.draft_length})


class Target:
    """A transformers model of Llama's kind, which reads tokens into a `Cache` and gives what a draft needs.

    Args:
        model: the model.
        layers: the three whose outputs the draft reads.
    """

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        self.model, self.config = model, model.config
        self.head = model.get_output_embeddings().weight.detach()
        self._seen: dict[int, Tensor] = {}
        self.layers = tuple(layers)
        self._hooks = [
            model.model.layers[i].register_forward_hook(
                lambda _module, _inputs, output, i=i: self._seen.__setitem__(
                    i, output[0] if isinstance(output, tuple) else output
                )
            )
            for i in self.layers
        ]

    def cache(self, batch: int, slots: int) -> Cache:
        head = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        layers, heads = self.config.num_hidden_layers, self.config.num_key_value_heads
        return Cache(layers, batch, heads, slots, head, self.head.dtype)

    def __call__(self, tokens: Tensor, positions: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """Tokens `[B, m]` at `positions`: the head's inputs `[B, m, H]`, and the draft's features `[B, m, 3 H]`."""
        cache.at(positions)
        out = self.model.model(
            input_ids=tokens, position_ids=positions, past_key_values=cache, attention_mask=cache.mask, use_cache=True
        )
        return out.last_hidden_state, torch.cat([self._seen[i] for i in self.layers], -1)

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()


@torch.inference_mode()
def decode(
    target: Target,
    draft: Draft | None,
    head: fused_lk.TargetHead,
    prompts: Sequence[Sequence[int]],
    *,
    draft_tokens: int,
    temperature: float,
    max_tokens: int,
    end: int | None,
    seed: int,
    predict: bool = True,
    watch: Watch | None = None,
) -> tuple[list[list[int]], Counts]:
    """The answers to `prompts` (of two tokens or more), as one batch, and the counts.

    Args:
        draft: None for plain decoding.
        head: the target's, with the draft's vocabulary.
        draft_tokens: K.
        temperature: of target and draft; 0 for greedy.
        max_tokens: of an answer.
        end: the token that ends an answer.
        seed: of all sampling.
        predict: count the alphas that `fused_lk` gives for the states that were met, too (at temperatures above 0).
        watch: is told what each round adds to an answer.
    """
    run = _Run(target, draft, head, draft_tokens, temperature, seed, predict)
    return run.answers(prompts, max_tokens, end, watch)


class _Run:
    def __init__(
        self,
        target: Target,
        draft: Draft | None,
        head: fused_lk.TargetHead,
        draft_tokens: int,
        temperature: float,
        seed: int,
        predict: bool,
    ) -> None:
        self.target, self.draft, self.vocab = target, draft, head.vocab
        self.head = head
        self.k = 0 if draft is None else draft_tokens
        self.temperature, self.predict = temperature, predict and temperature > 0 and self.k > 0
        self.generator = torch.Generator(target.head.device).manual_seed(seed)
        self.counts = Counts(self.k)

    def answers(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, end: int | None, watch: Watch | None
    ) -> tuple[list[list[int]], Counts]:
        start = time.perf_counter()
        self.text = [list(prompt) for prompt in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        self._read_prompts(max(map(len, prompts)) + max_tokens + self.k + 1)
        going = list(range(len(prompts)))  # which prompt each row of the batch has
        while going:
            emitted = self._round()
            keep = []
            for row, (prompt, new) in enumerate(zip(going, emitted, strict=True)):
                used = new[: max_tokens - len(answers[prompt])]
                used = used[: used.index(end) + 1] if end in used else used
                answers[prompt] += used
                if watch is not None:
                    watch(prompt, used, len(new) - 1)
                self.counts.output_tokens += len(used)
                self.counts.dropped_tokens += len(new) - len(used)
                if len(answers[prompt]) < max_tokens and used[-1] != end:
                    keep.append(row)
            if len(keep) < len(going):
                going = [going[row] for row in keep]
                self._keep(keep)
        self.counts.seconds = time.perf_counter() - start
        return answers, self.counts

    def _read_prompts(self, slots: int) -> None:
        """All but the last token of each prompt: the first round reads that."""
        lengths = torch.tensor([len(prompt) for prompt in self.text])
        batch, longest = len(self.text), int(lengths.max())
        tokens = torch.zeros(batch, longest - 1, dtype=torch.long)
        for row, prompt in enumerate(self.text):
            tokens[row, : len(prompt) - 1] = torch.tensor(prompt[:-1])
        self.cache = self.target.cache(batch, slots)
        positions = torch.arange(longest - 1).expand(batch, -1)
        _, features = self.target(tokens, positions, self.cache)
        self.lengths = lengths
        # What the draft has not read: for each row, features from `fresh_from` on, up to the last token but one.
        self.fresh, self.fresh_from = features, torch.zeros(batch, dtype=torch.long)
        if self.draft is not None:
            size = self.draft.size
            self.draft_cache = Cache(1, batch, size.key_heads, slots, size.head, features.dtype)

    def _keep(self, rows: list[int]) -> None:
        index = torch.tensor(rows, dtype=torch.long)
        self.text = [self.text[row] for row in rows]
        self.lengths, self.fresh, self.fresh_from = (x[index] for x in (self.lengths, self.fresh, self.fresh_from))
        self.cache.keep(index)
        if self.draft is not None:
            self.draft_cache.keep(index)

    def _round(self) -> list[list[int]]:
        """One draft and its verification: the tokens that each row gained."""
        proposed, logits_q, hidden = self._propose()  # draft ids [B, K], [B, K, V_draft], K times [B, H]
        ids = proposed if self.vocab is None else self.vocab.target_ids[proposed]
        last = torch.tensor([text[-1] for text in self.text]).unsqueeze(-1)
        steps = torch.arange(self.k + 1)
        states, features = self.target(torch.cat([last, ids], 1), self.lengths.unsqueeze(-1) - 1 + steps, self.cache)
        self.counts.passes += 1
        logits = states @ self.target.head.T  # [B, K + 1, V_target]
        if self.temperature > 0:
            logits, logits_q = logits.float() / self.temperature, logits_q.float() / self.temperature
            normalizer = logits.logsumexp(-1)
            accepted, final = self._sample(logits, normalizer, logits_q, proposed, ids)
            if self.predict:
                self._count_alphas(hidden, states, normalizer, accepted)
        else:
            best = logits.argmax(-1)
            accepted = (ids == best[:, :-1]).cumprod(1).bool()
            final = best.gather(1, accepted.sum(1, keepdim=True)).squeeze(1)
        counts = accepted.sum(1)
        self.counts.drafts += len(counts)
        for k, n in enumerate(accepted.sum(0).tolist()):
            self.counts.accepted_at[k] += n
        emitted = [
            [*row[:count], token]
            for row, count, token in zip(ids.tolist(), counts.tolist(), final.tolist(), strict=True)
        ]
        for text, new in zip(self.text, emitted, strict=True):
            text += new
        self.fresh, self.fresh_from = features, self.lengths - 1
        self.lengths = self.lengths + counts + 1
        return emitted

    def _propose(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        batch = len(self.text)
        if self.draft is None:
            nothing = torch.zeros(batch, 0, dtype=torch.long)
            return nothing, self.target.head.new_zeros(batch, 0, 0), []
        fresh = self.lengths - 1 - self.fresh_from  # of each row
        most = int(fresh.max())
        positions = self.fresh_from.unsqueeze(-1) + torch.arange(most)
        # Rows with fewer fresh tokens read some that are none. Later rounds write over them, before any sees them.
        following = torch.zeros(batch, most, dtype=torch.long)
        for row, text in enumerate(self.text):
            known = text[int(self.fresh_from[row]) + 1 :]
            following[row, : len(known)] = torch.tensor(known)
        state = self.draft.step(self.draft.first_state(self.fresh[:, :most]), following, positions, self.draft_cache)
        state = state[torch.arange(batch), fresh - 1].unsqueeze(1)
        position = self.lengths.unsqueeze(-1) - 2
        proposed: list[Tensor] = []
        logits, hidden = [], []
        for k in range(self.k):
            if k:
                token = proposed[-1] if self.vocab is None else self.vocab.target_ids[proposed[-1]]
                state = self.draft.step(state, token.unsqueeze(-1), position + k, self.draft_cache)
            hidden.append(self.draft.norm_out(state.squeeze(1)))
            logits.append(self.draft.head(hidden[-1]))
            if self.temperature > 0:
                q = (logits[-1].float() / self.temperature).softmax(-1)
                proposed.append(torch.multinomial(q, 1, generator=self.generator).squeeze(-1))
            else:
                proposed.append(logits[-1].argmax(-1))
        return torch.stack(proposed, 1), torch.stack(logits, 1), hidden

    def _sample(
        self, logits: Tensor, normalizer: Tensor, logits_q: Tensor, proposed: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rejection sampling: which tokens are accepted `[B, K]`, and the one that comes after them `[B]`."""
        log_p = logits[:, :-1].gather(-1, ids.unsqueeze(-1)).squeeze(-1) - normalizer[:, :-1]
        log_q = logits_q.gather(-1, proposed.unsqueeze(-1)).squeeze(-1) - logits_q.logsumexp(-1)
        chance = torch.rand(proposed.shape, generator=self.generator)
        accepted = (chance < (log_p - log_q).exp()).cumprod(1).bool()
        counts = accepted.sum(1)
        each = torch.arange(len(counts))
        p = (logits[each, counts] - normalizer[each, counts].unsqueeze(-1)).exp()
        left, refused = p, (counts < self.k).nonzero().squeeze(-1)
        if len(refused):
            q = logits_q[refused, counts[refused]].softmax(-1)
            columns = slice(None) if self.vocab is None else self.vocab.target_ids
            rest = p[refused]
            rest[:, columns] = (rest[:, columns] - q).clamp(min=0)
            # Rounding alone can refuse a token where p = q, and then nothing is left.
            rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[refused])
            left = p.index_copy(0, refused, rest)
        return accepted, torch.multinomial(left, 1, generator=self.generator).squeeze(-1)

    def _count_alphas(self, hidden: list[Tensor], states: Tensor, normalizer: Tensor, accepted: Tensor) -> None:
        """What the loss would say of the tokens that were reached."""
        assert self.draft is not None
        target = fused_lk.Target.from_hidden(
            states[:, :-1].transpose(0, 1).contiguous(),
            self.head,
            log_normalizer=normalizer[:, :-1].T.contiguous(),
            temperature=self.temperature,
        )
        reached = torch.cat([torch.ones_like(accepted[:, :1]), accepted[:, :-1]], 1).T
        alpha = fused_lk.lk_divergences(
            hidden, self.draft.head.weight, target, draft_temperature=self.temperature, mask=reached
        ).acceptance.double()
        for k, (sum_, variance) in enumerate(torch.stack([alpha, alpha * (1 - alpha)]).sum(-1).T.tolist()):
            self.counts.predicted_at[k] += sum_
            self.counts.variance_at[k] += variance
