"""The demo runs end to end on a tiny random target, and shows what was accepted from the draft."""

from __future__ import annotations

import io
import re

import pytest

transformers = pytest.importorskip("transformers")

from demo.__main__ import main  # noqa: E402
from demo.show import ON_TERMINAL, Show  # noqa: E402
from tests.test_study_data import save_target  # noqa: E402

SIZES = (
    "num_prompts=10 num_heldout=4 prompt_tokens=60 answer_tokens=12 sequence_length=96 draft_vocab_size=40 "
    "train_tokens=600 batch_rows=2 decode_prompts=2 decode_tokens=6 decode_batch=2 ttt_steps=2 draft_tokens=3"
)


class Bytes:
    """A tokenizer with a token for each byte."""

    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return bytes(tokens).decode(errors="replace")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(out):
    show = Show(Bytes(), out)
    for tokens, accepted in ((b"ab", 1), (b"c", 0), (b"def", 2), ("é".encode()[:1], 0), ("é".encode()[1:], 0)):
        show(0, list(tokens), accepted)
    return out.getvalue()


def test_what_was_accepted_stands_out(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown(io.StringIO()) == "[a]bc[de]fé"
    on, off = ON_TERMINAL
    assert shown(Terminal()) == f"{on}a{off}bc{on}de{off}fé"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(Terminal()) == "[a]bc[de]fé"


def test_it_runs_end_to_end_and_keeps_what_it_made(tmp_path, capsys):
    save_target(tmp_path / "target")
    arguments = ["--folder", str(tmp_path), "--prompt", "what do bees eat", "--tokens", "8", "--set", *SIZES.split()]
    main(arguments)
    printed = capsys.readouterr().out
    plain, kl, lam = re.findall(r"--- (.*)\n(.*(?:\n.*)*?)\n    (\d+) tokens in (\d+) passes", printed)
    assert [x[0] for x in (plain, kl, lam)] == [
        "plain decoding",
        "draft trained with KL",
        "draft trained with LK-lambda",
    ]
    # Greedy: the same text, in no more passes.
    assert {x[1].replace("[", "").replace("]", "") for x in (kl, lam)} == {plain[1]}
    assert all(int(x[3]) <= int(plain[3]) == int(plain[2]) for x in (kl, lam))
    assert re.search(r"\| mean acceptance length, temperature 1 \| \d\.\d{3} \| \d\.\d{3} \|", printed)
    assert "acceptance at token 1, temperature 0" in printed
    pictures = re.findall(r": (\S+\.png)", printed)
    assert pictures
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    assert {path.parent.name for path in made} == {"kl-0", "lambda-0"}
    main(arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")} == made


def test_what_it_cannot_set(tmp_path, capsys):
    for wrong, told in (
        ("steps=3", "expected NAME=VALUE"),
        ("losses=ce", "expected losses"),
        ("dtype=half", "expected dtype"),
        ("seeds=a", "expected a"),
    ):
        with pytest.raises(SystemExit):
            main(["--folder", str(tmp_path), "--set", wrong])
        assert told in capsys.readouterr().err
    assert not (tmp_path / "train").exists()
    assert not list(tmp_path.glob("**/*.part*"))
