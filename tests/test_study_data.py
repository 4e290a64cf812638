"""The study's texts: conversations, prompts, answers and the target's states of them, on a tiny random target.

Masks are held to the text that they cut out, answers to transformers' own generation, samples to the distribution that
they are drawn from, packed states to a pass over each text alone, and every stage to itself after `kill -9`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

from study import answers, conversations, features, prompts, stage, target, train  # noqa: E402
from study.__main__ import STAGES  # noqa: E402
from study.conversations import Conversation  # noqa: E402
from study.settings import QUICK  # noqa: E402

TEXT = ["what do bees eat", "name a river and a bridge", "the answer is honey, of course", "why do clocks tick?"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def save_target(folder):
    """A random Llama of four layers with a byte-level tokenizer, as `target.run` leaves one."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[2], unk_token=SPECIAL[0]
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.2 / parameter.shape[1] ** 0.5)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stage.write_json(folder / "source.json", {})


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(content, *, answer=None):
    said = [] if answer is None else [{"role": "assistant", "content": answer}]
    return {"messages": [{"role": "user", "content": content}, *said]}


def settings_of(folder, data):
    return replace(
        QUICK, folder=folder, dtype="float32", data=data, num_prompts=14, num_heldout=3, prompt_tokens=300,
        answer_tokens=9, answer_batch=4, answer_shard=5, feature_batch=2, sequence_length=120, draft_vocab_size=50,
        train_tokens=1200, evaluations=2, checkpoints=3, ttt_steps=2, draft_tokens=2, decode_prompts=2,
        decode_tokens=3, decode_batch=1, timed_prompts=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Settings whose stages up to the features have run, on a file of conversations."""
    folder = tmp_path_factory.mktemp("study")
    save_target(folder / "target")
    data = lines(folder / "data.jsonl", [asked(f"{TEXT[i % 4]} {i}" * (1 + i % 3)) for i in range(90)])
    settings = settings_of(folder, data)
    run_all(settings)
    return settings


def run_all(settings):
    for each in (prompts, answers, features):
        each.run(settings)


@pytest.fixture(scope="module")
def model(made):
    return target.load(made)[0]


@pytest.fixture(scope="module")
def tokenizer(made):
    return target.tokenizer(made)


# Conversations.

TALK = [("user", "Hi"), ("assistant", "Hello"), ("user", "More"), ("assistant", "Yes, é!")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": role, "content": text} for role, text in TALK]},
        {
            "id": 7,
            "conversations": [{"from": "human" if role == "user" else "gpt", "value": text} for role, text in TALK],
        },
        {"conversations": [{"role": role, "content": text} for role, text in TALK]},
        {
            "id": "x",
            "conversation": [{"role": role, "content": text} for role, text in TALK[:-1]],
            "generated_message": {"role": "assistant", "content": TALK[-1][1]},
        },
    ],
    ids=["messages", "from and value", "role and content", "generated message"],
)
def test_a_conversation_in_every_format(row):
    read = conversations.parse(row, "line-1")
    assert [(message["role"], message["content"]) for message in read.messages] == TALK
    assert read.id == str(row.get("id", "line-1"))
    assert read.asked == read.messages[:-1]


BAD = {
    "{": "Expecting",
    "[1]": "expected an object, got list",
    '{"text": "a"}': "got ['text']",
    '{"messages": "a"}': "expected a list",
    '{"messages": []}': "expected turns",
    '{"messages": [3]}': "turn 0, got int",
    '{"messages": [{"role": "user"}]}': "turn 0, got ['role']",
    '{"messages": [{"role": "robot", "content": "a"}]}': "got 'robot'",
    '{"messages": [{"role": "user", "content": " "}]}': "expected text in turn 0",
    '{"messages": [{"role": "user", "content": null}]}': "expected text in turn 0",
    '{"messages": [{"role": "assistant", "content": "a"}]}': "the user's first, got ['assistant']",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}': "got ['user', 'user']",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}': "got ['user', 'system']",
    '{"conversation": [{"role": "user", "content": "a"}]}': "expected `generated_message`",
    b"\xff": "codec",
}


def test_bad_lines_are_told_with_their_numbers_and_skipped(tmp_path):
    good = json.dumps(asked("a\u2028b")).encode()  # a separator that is no end of a line
    path = tmp_path / "talk.jsonl"
    path.write_bytes(b"\n".join([good, b"", *(bad if isinstance(bad, bytes) else bad.encode() for bad in BAD), good]))
    told: list[str] = []
    read = list(conversations.load(path, told.append))
    assert [each.id for each in read] == ["talk-1", f"talk-{len(BAD) + 3}"]
    assert read[0].messages[0]["content"] == "a\u2028b"
    assert len(told) == len(BAD) + 1
    for number, (said, reason) in enumerate(zip(told, BAD.values(), strict=False), 3):
        assert f"line {number}, skipped: " in said and reason in said
    assert f"{len(BAD)} lines skipped" in told[-1]


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("answered", [False, True])
def test_the_mask_cuts_out_what_the_assistant_says(tokenizer, system, answered):
    talk = [("system", "Be kind")] * system + TALK[: None if answered else -1]
    conversation = Conversation("a", tuple({"role": role, "content": text} for role, text in talk))
    text = conversations.text(conversation, tokenizer)
    whole = conversations.render(conversation.messages, tokenizer)
    assert tokenizer.decode(text.token_ids) == whole
    for (start, stop), said in zip(text.answers, ["Hello", "Yes, é!"][: 1 + answered], strict=True):
        assert tokenizer.decode(text.token_ids[start:stop]) == f"{said}<|im_end|>"
    counted = sum(stop - start for start, stop in text.answers)
    assert sum(text.mask) == counted and all(all(text.mask[start:stop]) for start, stop in text.answers)
    # What the target reads before it answers is what stands before an answer.
    prompt = conversations.prompt(conversation, tokenizer)
    assert tokenizer.decode(prompt).endswith("<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n")
    if answered:
        assert prompt == text.token_ids[: text.answers[-1][0]]


def test_a_template_that_forgets_earlier_turns_is_refused(tokenizer):
    whole = tokenizer.chat_template
    conversation = Conversation("a", tuple({"role": role, "content": text} for role, text in TALK))
    try:
        tokenizer.chat_template = "{% set messages = messages[-2:] %}" + whole
        with pytest.raises(ValueError, match="keeps earlier turns as they are, got another turn 1"):
            conversations.text(conversation, tokenizer)
    finally:
        tokenizer.chat_template = whole


# Prompts.


def test_the_prompts_that_come_with_the_study(made, tokenizer, tmp_path):
    def chosen(**options):
        settings = replace(made, folder=tmp_path / str(len(list(tmp_path.iterdir()))), data=None, **options)
        (settings.folder).mkdir()
        (settings.folder / "target").symlink_to(made.folder / "target")
        prompts.run(settings)
        return [list(conversations.load(prompts.path(settings, split), pytest.fail)) for split in answers.SPLITS]

    # A byte-level tokenizer without merges makes more tokens of a text than a real one.
    train, heldout = chosen(num_prompts=150, num_heldout=30, prompt_tokens=250)
    assert (len(train), len(heldout)) == (150, 30)
    texts = [each.messages[-1]["content"] for each in train + heldout]
    assert len(set(texts)) == 180 and all("{" not in text or "code" in each.id or "passage" in each.id
                                          for text, each in zip(texts, train + heldout, strict=True))  # fmt: skip
    assert {kind: sum(each.id.startswith(kind) for each in train) for kind in prompts.SHARES} == {
        kind: round(150 * share) for kind, share in prompts.SHARES.items()
    }
    assert max(len(conversations.prompt(each, tokenizer)) for each in train + heldout) <= 250
    assert chosen(num_prompts=150, num_heldout=30, prompt_tokens=250) == [train, heldout]
    for topic in filter(prompts.is_held_out, prompts.TOPICS + prompts.TASKS):
        assert not any(f" {topic}." in text for text in texts[:150])


def test_whole_subjects_are_held_out(made):
    by_split = [
        {each.messages[0]["content"] for each in conversations.load(prompts.path(made, split))}
        for split in answers.SPLITS
    ]
    assert [len(found) for found in by_split] == [14, 3]
    assert not any(map(prompts.is_held_out, by_split[0])) and all(map(prompts.is_held_out, by_split[1]))


def test_too_few_prompts_are_said_so(made, tmp_path):
    (tmp_path / "target").symlink_to(made.folder / "target")
    with pytest.raises(ValueError, match=r"expected 200 prompts of at most 300 tokens for 'train', got \d\d\. Ask"):
        prompts.run(replace(made, folder=tmp_path, num_prompts=200))


# Answers.


def answered(model, read, temperatures, batch, most=12, seed=3):
    return answers.answer(model, read, temperatures, most=most, end=2, batch=batch, seed=seed)


PROMPTS = [[5, 9, 40], [7] * 11, [1, 2], [100, 3, 60, 61, 8, 200, 30], [250, 4], [9, 8, 7, 6, 5], [77, 70, 10, 11]]


def test_greedy_answers_are_those_of_transformers(model):
    made = answered(model, PROMPTS, [0.0] * len(PROMPTS), batch=3)
    for prompt, answer in zip(PROMPTS, made, strict=True):
        whole = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12, do_sample=False
        )[0].tolist()
        assert answer == whole[len(prompt) :]


def test_an_answer_depends_on_its_prompt_and_seed_alone(model):
    temperatures = [1.0, 0.0, 1.0, 1.0, 0.5, 1.0, 0.0]
    made = answered(model, PROMPTS, temperatures, batch=2)
    assert all(answered(model, PROMPTS, temperatures, batch=batch) == made for batch in (1, 3, 100))
    other = answered(model, PROMPTS, temperatures, batch=2, seed=4)
    assert [a == b for a, b in zip(made, other, strict=True)] == [t == 0 for t in temperatures]
    assert answered(model, [], [], batch=2) == []


def test_answers_end_at_the_end_token(model):
    def made(end):
        return answers.answer(model, PROMPTS, [1.0] * len(PROMPTS), most=40, end=end, batch=4, seed=0)

    endless = made(-1)
    assert all(len(answer) == 40 for answer in endless)
    end = endless[2][10]
    ended = made(end)
    assert ended == [answer[: answer.index(end) + 1] if end in answer else answer for answer in endless]


def chi_square(counts, expected):
    """In standard deviations from what it is on average."""
    kept = expected >= 5
    counts = np.append(counts[kept], counts[~kept].sum())
    expected = np.append(expected[kept], expected[~kept].sum())
    freedom = len(counts) - 1
    return (((counts - expected) ** 2 / np.maximum(expected, 1e-9)).sum() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_answers_have_the_distribution_of_the_target(model, temperature):
    """First and second tokens, by temperature."""
    n, prompt = 3000, PROMPTS[3]
    made = answered(model, [prompt] * n, [temperature] * n, batch=n, most=2)
    first = Counter(answer[0] for answer in made)
    p = (model(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1).numpy()
    assert abs(chi_square(np.array([first[v] for v in range(len(p))]), n * p)) < 4
    token, count = first.most_common(1)[0]
    assert token != 2 and count > 50
    second = Counter(answer[1] for answer in made if answer[0] == token)
    p = (model(torch.tensor([[*prompt, token]])).logits[0, -1].double() / temperature).softmax(-1).numpy()
    assert abs(chi_square(np.array([second[v] for v in range(len(p))]), count * p)) < 4


@pytest.mark.parametrize("size", [1, 127, 128, 129, 1000])
def test_the_token_that_a_number_picks(size):
    """The first whose cumulative probability exceeds it; never one without probability, however close to 1 it is."""
    logits = torch.randn(40, size, generator=torch.Generator().manual_seed(size)) * 3
    logits[:, -(size // 3) or size :] = -torch.inf
    logits[0, : size // 2] = -torch.inf  # and its number is 0: blocks without probability come first
    luck = torch.linspace(0, 1, 40, dtype=torch.double)
    luck[-1] = np.nextafter(1, 0)
    warm = answers.pick(logits, torch.full((40,), 0.8), luck)
    cumulative = (logits.double() / 0.8).softmax(-1).cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]
    for row, token in enumerate(warm.tolist()):
        assert torch.isfinite(logits[row, token])
        below = cumulative[row, token - 1] if token else 0.0
        assert below - 1e-6 <= luck[row] <= cumulative[row, token] + 1e-6
    cold = answers.pick(logits.bfloat16(), torch.zeros(40), luck)
    assert cold.tolist() == [int(np.argmax(row)) for row in logits.bfloat16().float().numpy()]  # of ties the first


def test_answers_are_kept_with_their_tokens(made, tokenizer):
    for split, number in (("train", 14), ("heldout", 3)):
        rows = [row for path in sorted(answers.folder(made).glob(f"{split}-*")) for row in stage.read_lines(path)]
        read = list(conversations.load(prompts.path(made, split)))
        assert len(rows) == number and [row["id"] for row in rows] == [each.id for each in read]
        assert {row["temperature"] for row in rows} == {0.0, 1.0}
        for row, each in zip(rows, read, strict=True):
            ((start, stop),) = row["answers"]
            assert row["token_ids"][:start] == conversations.prompt(each, tokenizer)
            assert stop == len(row["token_ids"]) and 1 <= stop - start <= 9
            said = tokenizer.decode(row["token_ids"][start:], skip_special_tokens=True)
            assert row["messages"] == [*each.messages, {"role": "assistant", "content": said}]


def test_a_shard_that_is_there_is_not_made_again(made, tmp_path):
    for name in ("target", "prompts"):
        (tmp_path / name).symlink_to(made.folder / name)
    shutil.copytree(made.folder / "answers", tmp_path / "answers")
    kept, lost = (tmp_path / "answers" / f"train-0000{i}.jsonl" for i in range(2))
    kept.write_text("as it was")
    lost.unlink()
    answers.run(replace(made, folder=tmp_path))
    assert kept.read_text() == "as it was"
    assert lost.read_bytes() == (made.folder / "answers" / lost.name).read_bytes()


def test_answers_that_came_with_the_prompts(made, tokenizer, tmp_path):
    (tmp_path / "target").symlink_to(made.folder / "target")
    data = lines(tmp_path / "data.jsonl", [asked(f"{TEXT[i % 4]} {i}", answer=f"{i} bees") for i in range(90)])
    settings = replace(settings_of(tmp_path, data), regenerate=False)
    run_all(settings)
    opened = features.open(features.folder(settings, "train"))
    said = tokenizer.decode(opened.token_ids[opened.mask]).split("<|im_end|>")[:-1]
    read = conversations.load(prompts.path(settings, "train"))
    assert said == [each.messages[1]["content"] for each in read]


# Features.


def test_packed_states_are_those_of_each_text_alone(made, model):
    layers = target.layers(model.config)
    assert layers == (0, 2, 3)
    for split in answers.SPLITS:
        opened = features.open(features.folder(made, split))
        texts = list(answers.texts(made, split))
        assert opened.meta["num_tokens"] == len(opened.token_ids) < sum(len(text.token_ids) for text in texts) + 1
        at = 0
        for number, text in enumerate(texts):
            ids = text.token_ids[: made.sequence_length]
            piece = slice(at, at + len(ids))
            at = piece.stop
            assert opened.token_ids[piece].tolist() == ids and opened.mask[piece].tolist() == text.mask[: len(ids)]
            assert (opened.sequence_ids[piece] == number).all()
            out = model(torch.tensor([ids]), output_hidden_states=True)
            last = opened.last(piece)
            assert last.dtype == torch.bfloat16
            torch.testing.assert_close(last.float(), out.hidden_states[-1][0], rtol=2**-8, atol=1e-5)
            torch.testing.assert_close(model.lm_head(last.float()), out.logits[0], rtol=0.02, atol=0.05)
            fused = opened.fused(piece).float()
            for i, layer in enumerate(layers[:-1]):
                expected = out.hidden_states[layer + 1][0]
                torch.testing.assert_close(fused[:, 32 * i : 32 * (i + 1)], expected, rtol=2**-8, atol=1e-5)
            # The last layer's output is the one before the norm.
            torch.testing.assert_close(model.model.norm(fused[:, 64:]), last.float(), rtol=0.02, atol=0.02)
        assert at == len(opened.token_ids)
        assert (opened.mask.dtype, opened.token_ids.dtype, opened.sequence_ids.dtype) == (bool, np.int32, np.int32)


def test_the_vocabulary_is_of_the_answers_most_frequent_tokens(made):
    t2d = features.vocabulary(made)
    counts: Counter[int] = Counter()
    for text in answers.texts(made, "train"):
        stop = min(text.answers[0][1], made.sequence_length)
        counts.update(text.token_ids[text.answers[0][0] : stop])
    expected = sorted(range(len(t2d)), key=lambda token: (-counts[token], token))[:50]
    assert t2d.nonzero().squeeze(-1).tolist() == sorted(expected)
    with pytest.raises(ValueError, match="expected draft_vocab_size=51"):
        features.vocabulary(replace(made, draft_vocab_size=51))


# Resuming.


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a" / "x.json"
    stage.write_json(path, 1)
    with pytest.raises(TypeError):  # in the middle of writing
        stage.write_lines(path, [2, object()])
    assert stage.read_json(path) == 1 and len(list(path.parent.iterdir())) == 1


def test_seeds_are_of_names():
    found = {stage.seed(0, f"train-{i:05}") for i in range(20_000)} | {
        stage.seed(1, f"train-{i:05}") for i in range(20_000)
    }
    assert len(found) == 40_000 and all(0 <= seed < 2**63 for seed in found)
    assert stage.seed("a", 1) == stage.seed("a", 1)


@pytest.mark.parametrize("change", [{"seed": 1}, {"answer_tokens": 10}, {"num_prompts": 15}], ids=str)
def test_a_folder_is_of_one_run(made, change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} .* asked. Use a new folder"):
        run_all(replace(made, **change))


def test_a_stage_without_the_one_before_says_so(tmp_path):
    settings = settings_of(tmp_path, None)
    for call, name in (
        (lambda: prompts.run(settings), "'target'"), (lambda: list(answers.texts(settings, "train")), "'answers'"),
        (lambda: features.open(features.folder(settings, "train")), "'features'"),
    ):  # fmt: skip
        with pytest.raises(FileNotFoundError, match=f"Run the stage {name}"):
            call()


# Where stages are killed: in the so many-th call of a function. One that is killed twice goes on from the first kill.
KILLS = [
    ("target", stage, "write_json", 1),
    ("prompts", stage, "write_lines", 2),
    ("answers", answers, "pick", 25),
    ("features", features, "states", 3),
    ("features", np, "argsort", 1),
    ("train", train, "scored", 3),
    ("train", torch, "save", 2),
    ("train", train, "scored", 6),
    ("decode", stage, "write_json", 3),
    ("decode", stage, "write_json", 5),
    ("report", stage, "replaced", 1),
]


def forked(call):
    """The wait status of a child that makes this call; it ends with 1 after an error, which it prints."""
    child = os.fork()
    if not child:
        try:
            call()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_and_resumed(folder, source):
    """Each stage in a child that kills itself, then in one that runs to its end.

    This is to be called in a fresh process, which itself computes nothing: loading a model starts threads, and PyTorch
    refuses to compute in a child that was forked after that.
    """
    torch.set_num_threads(1)
    settings = settings_of(folder, source / "data.jsonl")
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained

    def of_gguf(where, gguf_file=None, **options):
        model = from_pretrained(where, **options)
        if gguf_file is not None:
            model.config.quantization_config = {"quant_method": "gguf"}
        return model

    target._gguf = lambda: source / "target" / "model.safetensors"
    target.metadata.version = lambda name: "0"
    target.AutoModelForCausalLM.from_pretrained = of_gguf
    target.AutoTokenizer.from_pretrained = lambda where, gguf_file=None: (
        transformers.PreTrainedTokenizerFast.from_pretrained(where)
    )
    for (name, owner, function, number), following in zip(KILLS, [*KILLS[1:], ("",)], strict=True):

        def run_and_die(name=name, owner=owner, function=function, number=number):
            original, calls = getattr(owner, function), iter(range(1, number + 1))

            def dies(*arguments, **options):
                if next(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            setattr(owner, function, dies)
            STAGES[name](settings)

        status = forked(run_and_die)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, function, number, status)
        if following[0] != name:
            assert forked(lambda name=name: STAGES[name](settings)) == 0, name
    # What was not killed.
    whole = replace(settings, folder=folder / "whole")
    for part in ("target", "features", "vocabulary.npy"):
        (whole.folder / part).parent.mkdir(exist_ok=True)
        (whole.folder / part).symlink_to(folder / part)
    for name in ("train", "decode"):
        assert forked(lambda name=name: STAGES[name](whole)) == 0, name


def test_every_stage_goes_on_after_kill_9(made, tmp_path):
    code = (
        f"from tests.test_study_data import *; killed_and_resumed(Path({str(tmp_path)!r}), Path({str(made.folder)!r}))"
    )
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    for folder in ("prompts", "answers", "features/train", "features/heldout", "."):
        before, after = made.folder / folder, tmp_path / folder
        names = sorted({path.name for path in after.iterdir()} - {"train", "decode", "report", "whole"})
        assert names == sorted(path.name for path in before.iterdir() if path.name != "data.jsonl")
        for name in names:
            if (after / name).is_file():
                assert (after / name).read_bytes() == (before / name).read_bytes(), name
    whole = tmp_path / "whole"
    for path in whole.rglob("*.pt"):
        drafts = [torch.load(where / path.relative_to(whole)) for where in (whole, tmp_path)]
        assert all(torch.equal(value, drafts[1][key]) for key, value in drafts[0].items())
    written = [*whole.rglob("train/*/*.jsonl"), *whole.rglob("decode/**/*.json")]
    assert {path.parent.name for path in written} == {"kl-0", "alpha-0", "timed"}
    for path in written:
        found = [
            re.sub(r'"seconds": .*', "", (where / path.relative_to(whole)).read_text()) for where in (whole, tmp_path)
        ]
        assert found[0] == found[1], path
    assert {path.parent.name for path in whole.rglob("*.pt")} == {"kl-0", "alpha-0"}
    assert (tmp_path / "report" / "report.md").exists()
