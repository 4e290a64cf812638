"""README and docs say nothing that is not so: their Python runs as printed, and options, commands and files exist."""

from __future__ import annotations

import csv
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import mutations
import pytest
import torch

import fused_lk
from fused_lk.integrations import specforge, speculators
from study.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in build.pages()}
USERS = {name: text for name, text in PAGES.items() if name == "README.md" or name.startswith("docs/")}
USERS.pop("docs/api.md")  # it has signatures and docstrings
IN_ORDER = "The Python blocks of this page build on each other, in order"
MOST_NOT_RUN = 0


def blocks(text, language="python"):
    """`(what follows the language in the fence, code)` of each fenced block."""
    return re.findall(rf"^```{language}\b *([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def runs():
    """`(name, code)`: each block, or all of a page together, where it says so."""
    for name, text in USERS.items():
        code = [code for option, code in blocks(text) if option != "no-run"]
        if code and IN_ORDER in text:
            assert text.index(IN_ORDER) < text.index("```")
            yield name, code
        else:
            yield from ((f"{name}, {x.splitlines()[0]}", [x]) for x in code)


RUNS = dict(runs())


def run(code, names):
    try:
        for block in code:
            exec(compile(block, "a block of the docs", "exec"), names)
    finally:
        speculators.unregister()
    return names


@pytest.mark.parametrize("name", RUNS)
def test_python_runs_as_printed(name):
    """In a namespace of its own, without a name from here."""
    run(RUNS[name], {"__name__": "__main__"})


def test_hardly_anything_is_not_run():
    """What no CPU can run says `no-run` in its fence; and there is something that runs."""
    options = [option for text in USERS.values() for option, _ in blocks(text)]
    assert set(options) <= {"", "no-run"}
    assert options.count("no-run") <= MOST_NOT_RUN
    assert len(RUNS) >= 6
    assert any("out.loss.backward()" in code for code in RUNS["README.md, import torch"])


def test_the_readme_is_short():
    words = re.sub(r"<!--.*?-->", "", PAGES["README.md"])
    before = words[: words.index("\n|")]
    assert len(words.split()) <= 1800
    assert len(before.split()) <= 720
    assert len(before.splitlines()) <= 95


def test_the_table_of_memory_is_the_account():
    with (ROOT / "bench" / "results" / "memory.csv").open(newline="") as file:
        peaks = {(row["shape"].partition(", ")[2], row["provider"]): row["peak GiB"] for row in csv.DictReader(file)}
    of = {"eager as SpecForge": "eager, as SpecForge", "eager as speculators": "eager, as speculators"}
    of |= {"fused as speculators": "fused, as speculators", "chunked, checkpointed": "eager, chunked and checkpointed"}
    table = re.search(r"^\| \| eager as SpecForge.*?\n\n", PAGES["README.md"], re.MULTILINE | re.DOTALL)[0]
    cells = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in table.splitlines() if line]
    assert len(cells) >= 5
    for shape, *values in cells[2:]:
        shape = shape.replace("the same", cells[2][0])
        for name, value in zip(cells[0][1:], values, strict=True):
            assert peaks[shape, of.get(name, name)] == value, (shape, name)


def test_the_number_of_mutations():
    (told,) = re.findall(r"in (\d+) ways", PAGES["docs/proof.md"])
    assert int(told) == len(mutations.TABLE)


def test_micro_batches_are_the_whole_batch():
    pieces = run(RUNS["docs/distributed.md"], {})
    hidden, _, pairs = zip(*pieces["micro_batches"], strict=True)
    rows = hidden[0][..., 0].numel()
    dense = [p.dense(rows, torch.device("cpu"))[0].view(p.shape) for p in pairs]
    logits = torch.cat([t.tiles.tensors()[0] for _, t, _ in pieces["micro_batches"]])
    target_rows = torch.cat([torch.arange(rows).view(hidden[0].shape[:-1]) + rows * i for i in range(3)], 1)
    whole = fused_lk.Pairs(torch.cat(dense, 1), target_rows, position_dim=0)
    weight = pieces["draft_weight"].detach().requires_grad_()
    out = fused_lk.lk_loss(torch.cat(hidden, 1), weight, fused_lk.Target.from_logits(logits), pairs=whole)
    out.loss.backward()
    torch.testing.assert_close(pieces["draft_weight"].grad, weight.grad)
    assert fused_lk.LKSums.merged(pieces["sums"]).metrics() == pytest.approx(out.metrics())


def test_code_is_on_one_line():
    """Else code in prose is not seen by what reads it here."""
    for name, text in PAGES.items():
        for line in re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines():
            assert line.count("`") % 2 == 0, (name, line)


def inline_code(texts=USERS):
    for text in texts.values():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        yield from re.findall(r"`([^`\n]+)`", prose)


# Options of other projects, and environment variables
FOREIGN = {"fullgraph"}


def known_options():
    found = set()
    for name in fused_lk.__all__:
        value = getattr(fused_lk, name)
        members = [value, *vars(value).values()] if inspect.isclass(value) or inspect.ismodule(value) else [value]
        found |= {p for x in members if callable(getattr(x, "__func__", x)) for p in parameters(x)}
    for function in (specforge.apply, speculators.apply, speculators.register, Settings):
        found |= parameters(function)
    return found


def parameters(x):
    try:
        return set(inspect.signature(getattr(x, "__func__", x)).parameters)
    except (TypeError, ValueError):
        return set()


def test_options_exist():
    named = {name for code in inline_code() for name in re.findall(r"\b([a-z]\w*)=(?!=)", code)}
    assert named >= {"impl", "kl_weight", "workspace_mb"}
    assert named <= known_options() | FOREIGN


def test_public_names_exist():
    code = [*inline_code(), *(code for text in USERS.values() for _, code in blocks(text))]
    named = {name for x in code for name in re.findall(r"\bfused_lk\.(\w+)", x)}
    named |= {f"Target.{name}" for x in code for name in re.findall(r"\bTarget\.(\w+)", x)}
    for name in named - {"integrations"}:
        owner, _, member = name.rpartition(".")
        assert hasattr(getattr(fused_lk, owner) if owner else fused_lk, member), name


@pytest.mark.parametrize("page", ["README.md", "docs/semantics.md"])
def test_objectives_are_those_of_the_loss(page):
    table = re.search(r"^\| `?objective=?`? \|.*?\n\n", USERS[page], re.MULTILINE | re.DOTALL)[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line]
    named = {name for cell in cells for name in re.findall(r'"(\w+)"', cell) if name not in ("position", "token")}
    hidden, weight = torch.randn(2, 3), torch.randn(4, 3)
    target = fused_lk.Target.from_logits(torch.randn(2, 4))
    for objective in named:
        assert fused_lk.lk_loss(hidden, weight, target, objective=objective).loss.isfinite()
    with pytest.raises(ValueError) as refused:
        fused_lk.lk_loss(hidden, weight, target, objective="none such")
    assert named == set(re.findall(r"'(\w+)'", str(refused.value).split(";")[0]))


def commands():
    """Each line of a shell block, and code in prose that is a command."""
    for name, text in PAGES.items():
        assert not blocks(text, "bash"), f"{name}: a shell block is ```sh"
        yield from (line for _, code in blocks(text, "sh") for line in code.splitlines())
    yield from (code for code in inline_code(PAGES) if re.match(r"(make|python|torchrun) ", code))


def test_commands_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = set()
    for command in commands():
        words = command.partition("#")[0].replace(".venv/bin/", "").split()
        if not words:
            continue
        seen.add(words[0])
        if words[0] == "make":
            assert words[1] in targets, command
        elif words[0] == "pip":
            assert words[1] == "install", command
        elif "-m" in words:
            module = ROOT / words[words.index("-m") + 1].replace(".", "/")
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), command
        else:
            assert words[0] == "python" and (ROOT / words[1]).exists(), command
    assert seen >= {"make", "pip", "python", "torchrun"}


def test_the_api_page_and_every_link():
    assert not build.problems()


def test_a_broken_page_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One two\n[a](none.md) [b](#one-two) [c](#three) `none/such.py` `bench/gate.py`\n```\n[d](none)\n```\n"
    )
    assert list(build._broken(page)) == [
        "the link none.md leads to no file",
        "the link #three leads to no heading",
        "there is no none/such.py",
    ]


def test_make_docs_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "API", tmp_path / "api.md")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "api.md").write_text("old\n")
    monkeypatch.setattr(build, "pages", list)
    assert build.main(["--check"]) == 1
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0


def test_the_api_page_is_the_same_in_another_process():
    """No address and no order of a set is part of it."""
    told = "import runpy; m = runpy.run_path('docs/build.py'); print(m['api'](), end='')"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == build.api(), done.stderr
