"""A real model, two small drafts trained for some minutes, and text by speculative decoding, shown as it is accepted.

python -m demo                                    # minutes on two cores; a second run goes on where the first ended
python -m demo --temperature 1 --prompt "Why do bees dance?"
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import fused_lk
from study import conversations, plots, report, target, train
from study.__main__ import STAGES, bench
from study.conversations import Conversation
from study.decode import Counts, Target, decode
from study.settings import LOSSES, Settings, changed, fast_dtype

from .show import Show

DEMO = Settings(
    "demo",
    folder=Path(".study-demo"),
    num_prompts=96,
    num_heldout=8,
    answer_tokens=48,
    answer_shard=96,
    draft_vocab_size=4096,
    losses=("kl", "lambda"),
    seeds=(0,),
    train_tokens=25_600,
    evaluations=2,
    checkpoints=2,
    draft_tokens=4,
    decode_prompts=8,
    decode_tokens=32,
    decode_batch=8,
    timed_prompts=1,
)
PROMPTS = (
    "Write a Python function that returns the longest word of a sentence.",
    "Write a short letter that thanks a neighbour for watering the plants.",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", nargs="+", default=PROMPTS, metavar="TEXT", help="what the model is asked")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the shown text")
    parser.add_argument("--tokens", type=int, default=48, help="of a shown answer, at most")
    parser.add_argument("--folder", type=Path, default=DEMO.folder, help="what is found there is not made again")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="any of study/settings.py")
    given = parser.parse_args(arguments)
    try:
        settings = changed(replace(DEMO, folder=given.folder, dtype=fast_dtype("cpu")), given.set)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(given.threads)
    start = time.perf_counter()
    print(f"fused_lk {fused_lk.__version__}, torch {torch.__version__}, {given.threads} threads, {settings.dtype}")
    for name in ("target", "prompts", "answers", "features", "train"):
        STAGES[name](settings)
    show(settings, given.prompt, given.temperature, given.tokens)
    STAGES["decode"](settings)
    results = report.gathered(settings)
    print("\n" + table(results, settings))
    for title, path in plots.draw(results, settings, settings.folder / "report").items():
        print(f"{title}: {path}")
    print(f"\n{time.perf_counter() - start:.0f} s. `make study ARGS=--quick` is the half hour, `make study` the night.")


def show(settings: Settings, prompts: Sequence[str], temperature: float, tokens: int) -> None:
    """Each prompt's answer by plain decoding and with each draft."""
    shared, tokenizer = bench(settings)
    model = Target(shared.model, target.layers(shared.model.config))
    drafts = {
        loss: train.load(shared, settings.folder / "train" / f"{loss}-{settings.seeds[0]}") for loss in settings.losses
    }
    try:
        for number, prompt in enumerate(prompts):
            asked = Conversation(f"shown {number}", ({"role": "user", "content": prompt},))
            print(f"\n> {prompt}")
            for loss, draft in {None: None, **drafts}.items():
                print(f"\n--- {'plain decoding' if loss is None else 'draft trained with ' + LOSSES[loss][0]}")
                _, counts = decode(
                    model, draft, shared.head, [conversations.prompt(asked, tokenizer)],
                    draft_tokens=settings.ttt_steps, temperature=temperature, max_tokens=tokens,
                    end=target.end_token(tokenizer), seed=settings.seed, predict=False, watch=Show(tokenizer),
                )  # fmt: skip
                print(f"\n    {told(counts)}")
    finally:
        model.close()


def told(counts: Counts) -> str:
    """The counts of one answer, in words."""
    made = f"{counts.output_tokens} tokens in {counts.passes} passes of the target"
    accepted = f", {counts.accepted_tokens} accepted from the draft" if counts.draft_length else ""
    return f"{made}{accepted}; {counts.tokens_per_second:.1f} tokens/s"


def table(results: Sequence[report.Trained], settings: Settings) -> str:
    """What decoding and the held-out texts say of each draft, losses side by side."""
    rows = []
    for temperature in settings.temperatures:
        decoded = [result.decoded[temperature][0] for result in results]
        title = f"temperature {temperature:g}"
        rows.append([f"mean acceptance length, {title}", *(f"{x.acceptance_length:.3f}" for x in decoded)])
        for k in range(settings.ttt_steps):
            rows.append([f"acceptance at token {k}, {title}", *(f"{x.rates[k]:.3f}" for x in decoded)])
    for name, metric in (("alpha", "acceptance_rate_0"), ("accuracy", "accuracy_0"), ("KL", "kl_0")):
        rows.append([f"held-out {name}, token 0", *(f"{result.final(metric)[0]:.3f}" for result in results)])
    header = [f"{settings.decode_prompts} prompts, {settings.draft_tokens} tokens a draft", *(r.name for r in results)]
    return report.table(header, rows)


if __name__ == "__main__":
    main()
