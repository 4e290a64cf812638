"""The target answers the prompts: half at temperature 1, half greedily: a deployed draft meets both.

`folder/answers/train-00000.jsonl` and so on, `heldout-00000.jsonl` and so on, are shards of `answer_shard` prompts. A
line has `id`, `messages`, `temperature` (null: the answer came with the prompt), `token_ids` and `answers`, the
`[from, to]` of the tokens that are answers. Tokens are kept beside the text, for what was sampled need not be what the
tokenizer makes of its text.

Settings: folder, seed, dtype, device, answer_tokens, answer_batch, answer_shard, regenerate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import conversations, prompts, stage, target
from .cache import Cache
from .conversations import Conversation, Text

SPLITS = ("train", "heldout")
BLOCK = 128  # columns of the logits that are summed together, to find a token in two short steps


def folder(settings: Any) -> Path:
    return Path(settings.folder) / "answers"


def run(settings: Any) -> None:
    """The stage: every shard that is not there yet. A kill loses the shard in work."""
    names = ("seed", "answer_tokens", "answer_shard", "regenerate")
    stage.same(folder(settings) / "made-of.json", {name: getattr(settings, name) for name in names})
    shards = []
    for split in SPLITS:
        asked = list(conversations.load(prompts.path(settings, split)))
        for i, at in enumerate(range(0, len(asked), settings.answer_shard)):
            path = folder(settings) / f"{split}-{i:05}.jsonl"
            shards.append((path, asked[at : at + settings.answer_shard]))
    if all(path.exists() for path, _ in shards):
        return
    stage.sweep(folder(settings))
    model, tokenizer = target.load(settings)
    total = sum(len(asked) for _, asked in shards)
    with tqdm(total=total, desc="answers", unit="prompt", dynamic_ncols=True, mininterval=2.0) as progress:
        for path, asked in shards:
            if path.exists():
                progress.update(len(asked))
            elif settings.regenerate:
                stage.write_lines(path, _generated(settings, model, tokenizer, asked, path.stem, progress))
            else:
                stage.write_lines(path, _given(tokenizer, asked))
                progress.update(len(asked))


def texts(settings: Any, split: str) -> Iterator[Text]:
    """The answered prompts of "train" or "heldout", in order."""
    paths = sorted(folder(settings).glob(f"{split}-*.jsonl"))
    if not paths:
        raise FileNotFoundError(f"expected answers in {folder(settings)}, got none. Run the stage 'answers' first.")
    for path in paths:
        for line in stage.read_lines(path):
            yield Text(line["token_ids"], [(start, stop) for start, stop in line["answers"]])


def _given(tokenizer: Any, asked: Sequence[Conversation]) -> Iterator[dict[str, Any]]:
    for conversation in asked:
        text = conversations.text(conversation, tokenizer)
        yield _line(conversation.id, conversation.messages, None, text)


def _generated(
    settings: Any, model: Any, tokenizer: Any, asked: Sequence[Conversation], shard: str, progress: tqdm
) -> Iterator[dict[str, Any]]:
    read = [conversations.prompt(conversation, tokenizer) for conversation in asked]
    temperatures = [float(i % 2 == 0) for i in range(len(asked))]
    made = answer(
        model, read, temperatures, most=settings.answer_tokens, end=target.end_token(tokenizer),
        batch=settings.answer_batch, seed=stage.seed(settings.seed, shard), progress=progress,
    )  # fmt: skip
    for conversation, prompt, temperature, answer_ids in zip(asked, read, temperatures, made, strict=True):
        content = tokenizer.decode(answer_ids, skip_special_tokens=True)
        messages = [*conversation.asked, {"role": "assistant", "content": content}]
        whole = prompt + answer_ids
        yield _line(conversation.id, messages, temperature, Text(whole, [(len(prompt), len(whole))]))


def _line(name: str, messages: Sequence[Any], temperature: float | None, text: Text) -> dict[str, Any]:
    return {
        "id": name, "messages": list(messages), "temperature": temperature,
        "token_ids": text.token_ids, "answers": text.answers,
    }  # fmt: skip


def answer(
    model: Any,
    read: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    *,
    most: int,
    end: int,
    batch: int,
    seed: int,
    progress: tqdm | None = None,
) -> list[list[int]]:
    """The target's answers, each up to `end` or `most` tokens.

    Args:
        read: token ids of the prompts, two or more each.
        temperatures: of each; 0 is greedy.
        batch: prompts at a time. Where an eighth of them are answered, others take their rows.
        seed: each prompt gets random numbers of its own, so they do not depend on which rows it shares a pass with.
    """
    generator = torch.Generator("cpu").manual_seed(seed)  # the same numbers on any device
    luck = torch.rand(len(read), most, dtype=torch.double, generator=generator, device="cpu").to(model.device)
    with torch.inference_mode():
        work = _Work(model, [list(prompt) for prompt in read], torch.tensor(temperatures), luck, most, end, batch)
        while work.rows:
            idle = [row for row, prompt in enumerate(work.rows) if work.finished(prompt)]
            if len(idle) * 8 < len(work.rows):
                work.step()
                continue
            work.refill(idle)
            if progress is not None:
                progress.update(len(idle))
    return work.made


@dataclass
class _Work:
    """A batch on its way. Row i of the cache belongs to the prompt `rows[i]`."""

    model: Any
    read: list[list[int]]
    temperatures: Tensor
    luck: Tensor
    most: int
    end: int
    batch: int

    def __post_init__(self) -> None:
        self.made: list[list[int]] = [[] for _ in self.read]
        self.slots = max(map(len, self.read), default=0) + self.most
        self.rows = list(range(min(self.batch, len(self.read))))
        self.waiting = list(range(len(self.rows), len(self.read)))
        self.cache = self._cache(len(self.rows))
        self._take(self.rows, self.cache)

    def _cache(self, rows: int) -> Cache:
        config = self.model.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Cache(config.num_hidden_layers, rows, config.num_key_value_heads, self.slots, head, self.model.dtype)

    def finished(self, prompt: int) -> bool:
        made = self.made[prompt]
        return len(made) == self.most or (bool(made) and made[-1] == self.end)

    def refill(self, idle: Sequence[int]) -> None:
        """Give idle rows to prompts that wait. Those that none is left for are given up."""
        taken, given_up = idle[: len(self.waiting)], set(idle[len(self.waiting) :])
        prompts = self.waiting[: len(taken)]
        del self.waiting[: len(taken)]
        if taken:
            fresh = self._cache(len(taken))
            self._take(prompts, fresh)
            self.cache.put(torch.tensor(taken), fresh)
            for row, prompt in zip(taken, prompts, strict=True):
                self.rows[row] = prompt
        if given_up:
            kept = [row for row in range(len(self.rows)) if row not in given_up]
            self.cache.keep(torch.tensor(kept, dtype=torch.long))
            self.rows = [self.rows[row] for row in kept]

    def _take(self, prompts: Sequence[int], cache: Cache) -> None:
        """Read prompts, all but their last tokens, into the rows of `cache`."""
        longest = max((len(self.read[prompt]) for prompt in prompts), default=1) - 1
        if longest < 1:
            return
        tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(self.read[prompt]) - 1] = torch.tensor(self.read[prompt][:-1])
        # What a shorter prompt's padding leaves behind lies at positions that its answer writes before it reads them.
        self._pass(tokens, torch.arange(longest).expand(len(prompts), -1), cache)

    def _pass(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        cache.at(positions)
        return self.model.model(
            input_ids=tokens, position_ids=positions, past_key_values=cache, attention_mask=cache.mask, use_cache=True
        ).last_hidden_state

    def step(self) -> None:
        """One more token for every row that is not finished."""
        last = torch.tensor([(self.read[prompt] + self.made[prompt])[-1] for prompt in self.rows])
        at = torch.tensor([len(self.read[prompt]) + len(self.made[prompt]) - 1 for prompt in self.rows])
        hidden = self._pass(last.unsqueeze(-1), at.unsqueeze(-1), self.cache)[:, -1]
        going = [row for row, prompt in enumerate(self.rows) if not self.finished(prompt)]
        prompts = [self.rows[row] for row in going]
        luck = torch.stack([self.luck[prompt, len(self.made[prompt])] for prompt in prompts])
        tokens = pick(self.model.lm_head(hidden[going]), self.temperatures[prompts], luck)
        for prompt, token in zip(prompts, tokens.tolist(), strict=True):
            self.made[prompt].append(token)


def pick(logits: Tensor, temperatures: Tensor, luck: Tensor) -> Tensor:
    """Tokens of `logits` `[B, V]`: the first whose cumulative probability exceeds `luck` `[B]`, or the argmax.

    One random number a row. (`torch.multinomial` draws one for every entry of the vocabulary: it took longer than the
    model.)
    """
    at_least = torch.finfo(torch.float32).tiny
    scores = torch.nn.functional.pad(logits.float(), (0, -logits.shape[-1] % BLOCK), value=-torch.inf)
    blocks = scores.unflatten(-1, (-1, BLOCK))  # [B, blocks, BLOCK]
    tops = blocks.amax(-1)
    each = torch.arange(len(blocks), device=logits.device)
    block = tops.argmax(-1)
    best = block * BLOCK + blocks[each, block].argmax(-1)
    masses = ((blocks - tops.amax(-1)[:, None, None]) / temperatures.clamp(min=at_least)[:, None, None]).exp_()
    sums = masses.sum(-1).double().cumsum(-1)
    left = luck * sums[:, -1]
    block = torch.searchsorted(sums, left.unsqueeze(-1), right=True).squeeze(-1).clamp(max=sums.shape[-1] - 1)
    left = left - torch.where(block > 0, sums[each, (block - 1).clamp(min=0)], 0.0)
    within = masses[each, block].double().cumsum(-1)
    # The block's sum and its last cumulative sum differ in rounding: never step past the last token that has mass.
    left = torch.minimum(left, within[:, -1] * (1 - 1e-12))
    token = torch.searchsorted(within, left.unsqueeze(-1), right=True).squeeze(-1)
    return torch.where(temperatures > 0, block * BLOCK + token, best)
