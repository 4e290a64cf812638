"""Train a small target on Python's standard library, then drafts for it, once per objective; measure, and decode.

python -m demo                                    # minutes on two cores; a GPU is used if there is one
python -m demo --objectives kl lambda alpha tv
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import fused_lk

from . import corpus, cost, report
from .corpus import Corpus
from .decode import Decoding, decode
from .models import Size, Target, num_parameters
from .train import Run, Scorer, Settings, bar, train_drafts, train_target


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    size = Size(draft_vocab=given.draft_vocab)
    settings = replace(
        Settings(),
        target_steps=given.target_steps,
        draft_steps=given.draft_steps,
        held_out=given.held_out,
        length=given.length,
        seed=given.seed,
    )  # fmt: skip
    device = torch.device(given.device)
    start = time.perf_counter()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"fused_lk {fused_lk.__version__} on {where}, torch {torch.__version__}, float32")

    text = corpus.load(given.vocab, given.max_bytes)
    print(
        f"text    {text.num_files} files, {text.num_bytes / 1e6:.1f} MB of Python's standard library: "
        f"{len(text.train):,} tokens to train on, {len(text.held_out):,} held out, BPE of {given.vocab:,}"
    )
    target, target_losses = train_target(text, size, settings, device)
    runs, scorer = train_drafts(text, target, given.objectives, size, settings)
    _describe(target, runs, scorer, text)
    decodings = _decode(target, runs, scorer, text, settings, given.rounds)
    windows = text.held_out_windows(16, settings.length).to(device)
    costs = cost.of_losses(runs, scorer, windows, settings)

    n = runs[0].final.num_tokens
    print(
        report.held_out_table(runs, f"Held-out text, {n:,} tokens a position (± standard error over windows; one seed)")
    )
    rounds = decodings[0].rounds
    print(
        report.decoding_table(
            runs, decodings, f"Speculative sampling, {rounds:,} rounds: predicted by alpha, and accepted (± s.e.)"
        )
    )
    what = "allocated memory" if device.type == "cuda" else "live tensors"
    print(
        report.cost_table(
            costs,
            f"The loss of {scorer.steps} x {windows.numel():,} rows with its gradients and its target "
            f"(peak of {what}; workspace {settings.workspace_mb:g} MiB)",
        )
    )
    report.picture(given.out / "training.png", runs, target_losses, decodings)
    print(f"\ncurves  {given.out / 'training.png'}")
    print(f"time    {time.perf_counter() - start:.0f} s in all, {time.process_time():.0f} s of processor time")


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.splitlines()[0])
    parser.add_argument("--objectives", nargs="+", choices=["kl", "lambda", "alpha", "tv"], default=["kl", "lambda"])
    parser.add_argument("--target-steps", type=int, default=defaults.target_steps)
    parser.add_argument("--draft-steps", type=int, default=defaults.draft_steps)
    parser.add_argument("--length", type=int, default=defaults.length, help="of a window, in tokens")
    parser.add_argument("--held-out", type=int, default=defaults.held_out, help="windows of held-out text to score")
    parser.add_argument("--rounds", type=int, default=16, help="of speculative sampling, per prompt")
    parser.add_argument("--vocab", type=int, default=2048, help="of the target")
    parser.add_argument("--draft-vocab", type=int, default=Size().draft_vocab)
    parser.add_argument("--max-bytes", type=int, help="of text to read; default: all")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    return parser


def _describe(target: Target, runs: list[Run], scorer: Scorer, text: Corpus) -> None:
    draft, vocab = runs[0].draft, scorer.head.vocab
    own = sum(p.numel() for p in draft.trainable())
    coverage = float(vocab.t2d.cpu()[text.held_out].float().mean())
    print(
        f"target  {num_parameters(target):,} parameters\n"
        f"draft   {own:,} parameters of its own, {scorer.steps} tokens at a time from {vocab.draft_size:,} of "
        f"{vocab.target_size:,}, which cover {coverage:.1%} of the held-out text"
    )


def _decode(
    target: Target, runs: list[Run], scorer: Scorer, text: Corpus, settings: Settings, rounds: int
) -> list[Decoding]:
    prompts = text.held_out_windows(settings.held_out // 4, settings.length)[:, : settings.length // 4]
    prompts = prompts.to(scorer.device)
    with bar(rounds * len(runs), "decode", "pass") as progress:
        return [
            decode(target, run.draft, scorer.head, prompts, scorer.steps, rounds, settings.seed, progress)
            for run in runs
        ]


if __name__ == "__main__":
    main()
