"""Training: the target on text, then one draft per objective, side by side on the same batches."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fused_lk

from .corpus import Corpus
from .models import Draft, Size, Target

NAMES = {"kl": "KL", "lambda": "LK-lambda", "alpha": "LK-alpha", "tv": "TV"}  # objectives, as the paper has them


@dataclass(frozen=True)
class Settings:
    """How long and on what; a step takes batch * length tokens."""

    target_steps: int = 1500
    target_batch: int = 8
    draft_steps: int = 1500
    draft_batch: int = 4  # small batches and many steps went further in the same time
    length: int = 128
    held_out: int = 256  # windows of `length` tokens
    evaluations: int = 12  # of the drafts on held-out text, along the way
    learning_rate: float = 4e-3
    draft_learning_rate: float = 4e-3
    position_decay: float = 0.8  # the paper's
    workspace_mb: float = 8.0
    seed: int = 0


@dataclass
class Run:
    """One draft and what was measured while it was trained with `objective`."""

    objective: str
    draft: Draft
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    batches: list[dict[str, float]] = field(default_factory=list)  # metrics of each training batch
    curve: list[tuple[int, Evaluation]] = field(default_factory=list)  # (step, on some of the held-out text)
    final: Evaluation = field(init=False)  # on all of it


@dataclass(frozen=True)
class Evaluation:
    """Means over held-out text, per position `[K]`, and the per-window acceptance rates `[windows, K]`."""

    acceptance: Tensor
    accuracy: Tensor
    kl: Tensor
    windows: Tensor
    num_tokens: int

    @property
    def length(self) -> float:
        """Tokens per pass of the target: the accepted ones, and the one that the target adds."""
        return float(fused_lk.expected_acceptance_length(self.acceptance))


def bar(steps: int, name: str, unit: str = "step") -> tqdm:
    every = 0.5 if sys.stderr.isatty() else 20.0  # seconds; a log file needs few lines
    return tqdm(range(steps), desc=name, unit=unit, dynamic_ncols=True, mininterval=every)


def optimizer_of(
    parameters: list[nn.Parameter], learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with a short warm-up, then a cosine to nearly nothing."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_target(corpus: Corpus, size: Size, settings: Settings, device: torch.device) -> tuple[Target, list[float]]:
    """The target, frozen, and its cross-entropy on each training batch, in nats per token."""
    torch.manual_seed(settings.seed)
    target = Target(corpus.tokenizer.get_vocab_size(), size).to(device)
    optimizer, schedule = optimizer_of(list(target.parameters()), settings.learning_rate, settings.target_steps)
    batches = corpus.batches(settings.target_batch, settings.length + 1, settings.seed)
    losses = []
    for _ in (progress := bar(settings.target_steps, "target")):
        tokens = next(batches).to(device)
        logits = target.head(target(tokens[:, :-1])[0])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        update(optimizer, schedule, loss)
        losses.append(float(loss.detach()))
        progress.set_postfix_str(f"cross-entropy {losses[-1]:.3f}", refresh=False)
    return target.eval().requires_grad_(False), losses


def update(optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    schedule.step()


def ttt_pairs(batch: int, length: int, steps: int, device: torch.device) -> fused_lk.Pairs:
    """Draft row t of step k against target row t + 1 + k, wherever that row exists: what replaces all shifting."""
    rows = torch.arange(batch * length, device=device).view(batch, length)
    target_rows = torch.stack([F.pad(rows[:, 1 + k :], (0, 1 + k), value=-1) for k in range(steps)])
    return fused_lk.Pairs(target_rows=target_rows, position_dim=0)


class Scorer:
    """The loss of a batch: the target's part of it is made once, whatever number of drafts and steps share it."""

    def __init__(self, target: Target, vocab: fused_lk.DraftVocab, size: Size, settings: Settings) -> None:
        self.target, self.steps = target, size.ttt_steps
        self.head = fused_lk.TargetHead(target.head.weight, vocab)
        self.options = {"workspace_mb": settings.workspace_mb}
        self.device = target.head.weight.device
        self._pairs: dict[torch.Size, fused_lk.Pairs] = {}

    def read(self, tokens: Tensor) -> tuple[Tensor, fused_lk.Target]:
        """What a draft reads, and what it is scored against."""
        with torch.no_grad():
            hidden, features = self.target(tokens)
        return features, fused_lk.Target.from_hidden(hidden, self.head, **self.options)

    def __call__(
        self, draft: Draft, loss: fused_lk.LKLoss, tokens: Tensor, features: Tensor, scored_against: fused_lk.Target
    ) -> fused_lk.LKOutput:
        hidden = draft(features, tokens, self.steps)
        pairs = self.pairs(tokens.shape)
        return loss(hidden, draft.head.weight, scored_against, pairs=pairs, **self.options)

    def pairs(self, shape: torch.Size) -> fused_lk.Pairs:
        """The same for all batches of a shape, so built once."""
        if shape not in self._pairs:
            self._pairs[shape] = ttt_pairs(*shape, self.steps, self.device)
        return self._pairs[shape]


def train_drafts(
    corpus: Corpus, target: Target, objectives: list[str], size: Size, settings: Settings
) -> tuple[list[Run], Scorer]:
    """One draft per objective: the same initial weights, batches, target and optimiser; only the loss differs."""
    torch.manual_seed(settings.seed)
    device = target.head.weight.device
    vocab = fused_lk.DraftVocab(corpus.draft_tokens(size.draft_vocab).to(device))
    scorer = Scorer(target, vocab, size, settings)
    first = Draft(target, size, vocab.draft_size).to(device)
    runs = [_new_run(objective, first, settings) for objective in objectives]
    losses = [fused_lk.LKLoss(objective, position_decay=settings.position_decay) for objective in objectives]
    batches = corpus.batches(settings.draft_batch, settings.length, settings.seed + 1)
    held_out = corpus.held_out_windows(settings.held_out, settings.length).to(device)
    some = held_out[::4]
    for step in (progress := bar(settings.draft_steps, "drafts")):
        if step in _evaluation_steps(settings):
            _extend_curves(runs, scorer, some, step)
        tokens = next(batches).to(device)
        features, scored_against = scorer.read(tokens)
        for run, loss in zip(runs, losses, strict=True):
            out = scorer(run.draft, loss, tokens, features, scored_against)
            update(run.optimizer, run.schedule, out.loss)
            run.batches.append(out.metrics())
        lengths = (f"{run.objective} {run.batches[-1]['expected_acceptance_length']:.3f}" for run in runs)
        progress.set_postfix_str("expected length " + ", ".join(lengths), refresh=False)
    _extend_curves(runs, scorer, some, settings.draft_steps)
    finals = evaluate([run.draft for run in runs], scorer, held_out)
    for run, evaluation in zip(runs, finals, strict=True):
        run.final = evaluation
    return runs, scorer


def _new_run(objective: str, first: Draft, settings: Settings) -> Run:
    draft = copy.deepcopy(first, {id(first.embed): first.embed, id(first.embed.weight): first.embed.weight})
    return Run(objective, draft, *optimizer_of(draft.trainable(), settings.draft_learning_rate, settings.draft_steps))


def _evaluation_steps(settings: Settings) -> set[int]:
    return {settings.draft_steps * i // settings.evaluations for i in range(settings.evaluations)}


def _extend_curves(runs: list[Run], scorer: Scorer, windows: Tensor, step: int) -> None:
    evaluations = evaluate([run.draft for run in runs], scorer, windows)
    for run, evaluation in zip(runs, evaluations, strict=True):
        run.curve.append((step, evaluation))


@torch.no_grad()
def evaluate(drafts: list[Draft], scorer: Scorer, windows: Tensor, batch: int = 8) -> Iterator[Evaluation]:
    """Every draft on the same `windows` `[N, length]`; sums are added up, because a mean of means is biased."""
    outputs: list[list[fused_lk.LKOutput]] = [[] for _ in drafts]
    loss = fused_lk.LKLoss("kl")  # which one does not matter: alpha, accuracy and KL come with each
    for tokens in windows.split(batch):
        features, scored_against = scorer.read(tokens)
        for of_draft, draft in zip(outputs, drafts, strict=True):
            of_draft.append(scorer(draft, loss, tokens, features, scored_against))
    for outs in outputs:
        weight = sum(out.weight_sum for out in outs)
        yield Evaluation(
            acceptance=sum(out.acceptance_sum for out in outs) / weight,
            accuracy=sum(out.accuracy_sum for out in outs) / weight,
            kl=sum(out.kl_sum for out in outs) / weight,
            windows=torch.cat([_window_means(out, scorer.steps) for out in outs]),
            num_tokens=int(sum(out.num_tokens[0] for out in outs)),
        )


def _window_means(out: fused_lk.LKOutput, steps: int) -> Tensor:
    """`[B, K]`: mean acceptance of each window and position; the last 1 + k rows of a window are in no pair."""
    alpha = out.token_log_acceptance.exp()
    length = alpha.shape[-1]
    return torch.stack([alpha[k, :, : length - 1 - k].mean(-1) for k in range(steps)], -1)
