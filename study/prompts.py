"""Prompts without a download, in three kinds that ask for different texts.

    code      half of what users of small models ask: functions of Python's standard library, by the documentation
              strings in its sources (explain it, use it, write it, test it)
    passage   texts that are on every machine with Python and this project's pinned packages (the language's own topics,
              as `help()` shows them, and the packages' descriptions), to be summed up, explained, continued
    chat      everyday requests, filled in from lists below: advice, letters, stories, sums, translations, comparisons

Answers to repeated templates would be easy to draft, so the lists are crossed and no text is asked twice. Each prompt
has a subject (a module, a text's title, a topic), and whole subjects are held out: a draft has met none of those that
it is judged by. With `data`, a JSONL file of conversations takes the place of all this (`study.conversations` has the
formats).

The standard library differs a little from one Python to the next. `folder/prompts` keeps what a run was made with.
Settings: folder, seed, num_prompts, num_heldout, prompt_tokens, data.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

from . import conversations, stage, target
from .conversations import Conversation

SHARES = {"code": 0.35, "passage": 0.2, "chat": 0.45}
HELD_OUT = 8  # of the subjects, one in so many
PACKAGES = (
    "accelerate", "datasets", "httpx", "hypothesis", "loguru", "matplotlib", "mpmath", "mypy", "numpy", "openai",
    "psutil", "pydantic", "pytest", "regex", "ruff", "safetensors", "setuptools", "tokenizers", "torch", "tqdm",
    "transformers",
)  # fmt: skip
WORDS = 50  # of a text that a prompt quotes, at most


class Candidate(NamedTuple):
    subject: str
    conversation: Conversation


def path(settings: Any, split: str) -> Path:
    """Of "train" or "heldout": lines of `id` and `messages`, in the order in which they are answered."""
    return Path(settings.folder) / "prompts" / f"{split}.jsonl"


def run(settings: Any) -> None:
    """The stage: choose the prompts of both splits."""
    names = ("seed", "num_prompts", "num_heldout", "prompt_tokens", "data", "regenerate")
    stage.same(path(settings, "train").parent / "made-of.json", {name: getattr(settings, name) for name in names})
    if path(settings, "train").exists():  # the last that is written
        return
    tokenizer = target.tokenizer(settings)
    if settings.data is None:
        kinds: dict[str, Callable[[random.Random], Iterator[Candidate]]] = {
            "code": code,
            "passage": passages,
            "chat": chats,
        }
        shares = SHARES
    else:
        kinds, shares = {"data": lambda _: _of_data(settings.data)}, {"data": 1.0}
    chosen: dict[bool, list[Conversation]] = {False: [], True: []}
    for kind, candidates in kinds.items():
        rng = random.Random(f"{settings.seed} {kind}")
        wanted = {False: settings.num_prompts, True: settings.num_heldout}
        if kind != list(kinds)[-1]:  # the last kind makes up what others lack
            wanted = {held: round(shares[kind] * number) for held, number in wanted.items()}
        else:
            wanted = {held: number - len(chosen[held]) for held, number in wanted.items()}
        seen: set[str] = set()
        for subject, conversation in candidates(rng):
            held = is_held_out(subject)
            asked = conversation.asked[-1]["content"]
            if wanted[held] and asked not in seen:
                seen.add(asked)
                if len(conversations.prompt(conversation, tokenizer)) <= settings.prompt_tokens:
                    chosen[held].append(conversation)
                    wanted[held] -= 1
            if not any(wanted.values()):
                break
    for held, name, number in ((True, "heldout", settings.num_heldout), (False, "train", settings.num_prompts)):
        if len(chosen[held]) < number:
            raise ValueError(
                f"expected {number} prompts of at most {settings.prompt_tokens} tokens for {name!r}, got "
                f"{len(chosen[held])}. Ask for fewer (num_prompts, num_heldout), or allow longer ones (prompt_tokens)."
            )
        random.Random(f"{settings.seed} order").shuffle(chosen[held])
        lines = ({"id": each.id, "messages": each.messages} for each in chosen[held])
        stage.write_lines(path(settings, name), lines)


def is_held_out(subject: str) -> bool:
    return stage.seed("held out", subject) % HELD_OUT == 0


def _of_data(data: Path) -> Iterator[Candidate]:
    for conversation in conversations.load(data):
        first = next(message for message in conversation.messages if message["role"] == "user")
        yield Candidate(first["content"], conversation)


def _ask(kind: str, subject: str, content: str) -> Candidate:
    name = f"{kind}-{stage.seed(content):016x}"
    return Candidate(subject, Conversation(name, ({"role": "user", "content": content},)))


# Python's standard library.

CODE = (
    "In Python's module {module}, what does {name} do?",
    "Explain this Python documentation with a short example.\n\n{module}.{name}: {doc}",
    "Write a Python function {signature} that does this: {doc}",
    "Write a unit test for a Python function {signature}. Its documentation says: {doc}",
    "What are common mistakes when using {module}.{name} in Python? Its documentation says: {doc}",
    "Rewrite this docstring of {name} so that a beginner understands it: {doc}",
    "Show how to call {signature} from Python's module {module}.",
)


def code(rng: random.Random) -> Iterator[Candidate]:
    functions = list(_functions())
    rng.shuffle(functions)
    for _ in CODE:  # each function once, before any a second time
        for module, name, signature, doc in functions:
            filled = rng.choice(CODE).format(module=module, name=name, signature=signature, doc=doc)
            yield _ask("code", module, filled)


def _functions() -> Iterator[tuple[str, str, str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings"}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if skipped.intersection(parts) or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:  # there are files that show what is none
            continue
        for node in tree.body:
            inner = node.body if isinstance(node, ast.ClassDef) else []
            if isinstance(node, ast.ClassDef) and node.name.startswith("_"):
                continue
            for each, owner in chain([(node, "")], ((child, f"{getattr(node, 'name', '')}.") for child in inner)):
                if not isinstance(each, ast.FunctionDef) or each.name.startswith("_"):
                    continue
                doc = _start((ast.get_docstring(each) or "").split("\n\n")[0])
                if len(doc.split()) >= 4:
                    arguments = [argument.arg for argument in each.args.args if argument.arg not in ("self", "cls")]
                    yield module, owner + each.name, f"{each.name}({', '.join(arguments)})", doc


# Texts.

PASSAGE = (
    "Summarize this text in one sentence.\n\n{text}",
    "Explain this to someone who does not program:\n\n{text}",
    "Continue this text.\n\n{text}",
    "Write three questions about this text, with answers.\n\n{text}",
    "Rewrite this in simple words.\n\n{text}",
    "List the main points of this text.\n\n{text}",
    "What is the most important word in this text, and why?\n\n{text}",
    "Give this text a title, and say why it fits.\n\n{text}",
)


def passages(rng: random.Random) -> Iterator[Candidate]:
    texts = [(title, part) for title, text in sorted(_texts()) for part in _paragraphs(text)]
    rng.shuffle(texts)
    for _ in PASSAGE:
        for title, part in texts:
            yield _ask("passage", title, rng.choice(PASSAGE).format(text=part))


def _texts() -> Iterator[tuple[str, str]]:
    yield from topics.items()
    for name in PACKAGES:
        try:
            yield name, str(metadata.metadata(name).json.get("description", ""))
        except metadata.PackageNotFoundError:  # that part of the texts is left out
            continue


def _paragraphs(text: str) -> Iterator[str]:
    for part in re.split(r"\n\s*\n", text):
        words = part.split()
        prose = sum(word.isalpha() for word in words)
        if len(words) >= 20 and prose >= 0.6 * len(words) and "http" not in part:
            yield _start(part)


def _start(text: str) -> str:
    """The first words, and whole sentences where one ends among them."""
    words = text.split()
    start = " ".join(words[:WORDS])
    end = start.rfind(". ")
    return start if len(words) <= WORDS or end < len(start) // 2 else start[: end + 1]


# Everyday requests. A `{topic}` and a `{task}` are subjects: those held out are in no training prompt.

TOPICS = (
    "apples", "bees", "black holes", "bread", "bridges", "budgeting", "butterflies", "camping", "candles", "chess",
    "climate", "clocks", "clouds", "coffee", "compilers", "compost", "coral reefs", "cycling", "dancing",
    "databases", "deserts", "dinosaurs", "DNA", "dogs", "dreams", "earthquakes", "electric cars", "elephants",
    "email", "exercise", "fire", "fishing", "forests", "fractions", "friendship", "gardening", "glaciers", "glass",
    "gold", "gravity", "guitars", "history", "honesty", "horses", "ice cream", "inflation", "insects", "islands",
    "jazz", "kites", "language", "libraries", "lightning", "magnets", "maps", "mathematics", "meditation", "memory",
    "money", "mountains", "museums", "music", "neural networks", "newspapers", "oceans", "onions", "opera", "owls",
    "painting", "paper", "patience", "penguins", "photography", "photosynthesis", "planets", "plastic", "poetry",
    "prime numbers", "printing", "radio", "railways", "rain", "recycling", "rivers", "robots", "running", "salt",
    "seasons", "sharks", "ships", "sleep", "snow", "soccer", "solar power", "soup", "spiders", "stars",
    "steam engines", "submarines", "sugar", "swimming", "tea", "teamwork", "telescopes", "theatre", "tides",
    "time zones", "tomatoes", "trees", "vaccines", "vitamins", "volcanoes", "water", "weather", "whales", "wheat",
    "wind", "winter", "wolves", "yoga",
)  # fmt: skip
TASKS = (
    "apologise to a neighbour for noise", "ask for a day off", "bake a cake", "build a birdhouse", "care for a cactus",
    "choose a laptop", "clean a kitchen", "cook rice", "decline an invitation", "draw a cat", "fix a flat tire",
    "fold a shirt", "grow herbs indoors", "invite friends to dinner", "learn a language", "make a paper plane",
    "make friends in a new city", "memorise a poem", "negotiate a salary", "organise a desk", "paint a wall",
    "pack for a week", "plan a birthday party", "plant a tree", "prepare for an exam", "prepare for an interview",
    "read more books", "remove a stain", "save money", "sell a bicycle", "sharpen a knife", "start a blog",
    "start running", "take better photos", "teach a child to swim", "thank a teacher", "train a puppy", "wake up early",
    "wash a car", "write a will", "write a short story", "water plants while away", "run a meeting", "return a parcel",
    "complain about a late train", "ask a librarian for help", "recommend a colleague", "welcome a new neighbour",
)  # fmt: skip
FORMS = (
    "poem",
    "short story",
    "dialogue",
    "news report",
    "letter",
    "speech",
    "list of facts",
    "quiz",
    "song",
    "riddle",
)
READERS = ("a child", "a grandparent", "a student", "an expert", "a tourist", "a busy manager", "a beginner")
TONES = ("friendly", "formal", "funny", "short", "detailed", "calm", "enthusiastic")
LANGUAGES = ("French", "German", "Italian", "Portuguese", "Spanish")
NAMES = ("Ada", "Ben", "Clara", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kofi", "Lena", "Mia")
THINGS = ("apples", "books", "coins", "eggs", "marbles", "pencils", "stamps", "tickets")
TOPIC = (
    "Explain {topic} to {reader}.",
    "Write a {tone} {form} about {topic}.",
    "Write a {form} about {topic} for {reader}.",
    "What are {n} interesting facts about {topic}?",
    "Why do people care about {topic}? Answer {reader} in a {tone} way.",
    "Compare {topic} and {other}.",
    "How are {topic} and {other} connected? Give {n} examples.",
    "What would {name} ask about {topic}? Give {n} questions with answers.",
    "Write a {tone} conversation between {name} and {friend} about {topic}.",
    "Translate to {language}: {name} wants to know more about {topic}.",
    "Write the first paragraph of an essay about {topic}. Be {tone}.",
    "Is it true that {topic} and {other} have something in common?",
)
TASK = (
    "How do I {task}?",
    "Give me {n} tips: how to {task}.",
    "Explain in {n} steps to {reader} how to {task}.",
    "Write a {tone} message from {name} to {friend} on how to {task}.",
    "What do I need to {task}? Make a list of {n} things.",
    "What can go wrong when I {task}, and what should I do then?",
    "My friend {name} wants to {task}, but has little time. What is your advice?",
)
SUM = (
    "What is {a} plus {b}? Show the steps.",
    "What is {a} times {n}? Show the steps.",
    "{name} has {a} {things} and gives {n} to {friend}. How many are left? Explain.",
    "{name} buys {n} {things} for {b} cents each. What does it cost? Explain step by step.",
    "Is {a} an even or an odd number? Is it divisible by {n}?",
    "A train goes {a} kilometres in {n} hours. How fast is it?",
    "Sort these numbers from small to large: {a}, {b}, {n}, {c}.",
    "Convert {a} minutes to hours and minutes.",
)


def chats(rng: random.Random) -> Iterator[Candidate]:
    """Without an end."""
    sides = {held: [topic for topic in TOPICS if is_held_out(topic) == held] for held in (False, True)}
    while True:
        name, friend = rng.sample(NAMES, 2)
        a, b, c = (rng.randint(11, 999) for _ in range(3))
        fills: dict[str, Any] = {
            "name": name, "friend": friend, "a": a, "b": b, "c": c, "n": rng.randint(3, 9), "form": rng.choice(FORMS),
            "reader": rng.choice(READERS), "tone": rng.choice(TONES), "language": rng.choice(LANGUAGES),
            "things": rng.choice(THINGS),
        }  # fmt: skip
        kind = rng.choices(("topic", "task", "sum"), (5, 3, 2))[0]
        if kind == "topic":
            subject = rng.choice(TOPICS)
            others = [topic for topic in sides[is_held_out(subject)] if topic != subject]
            content = rng.choice(TOPIC).format(topic=subject, other=rng.choice(others), **fills)
        elif kind == "task":
            subject = rng.choice(TASKS)
            content = rng.choice(TASK).format(task=subject, **fills)
        else:
            subject = f"the number {a}"
            content = rng.choice(SUM).format(**fills)
        yield _ask("chat", subject, content)
