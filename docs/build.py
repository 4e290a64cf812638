"""The API page, made of docstrings, and a check of every link: `python docs/build.py`; `--check` writes nothing.

A link may lead to a file, to a heading, or to the web, which is not asked. A path in code, `a/path.py`, has to exist.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fused_lk

ROOT = Path(__file__).resolve().parent.parent
API = ROOT / "docs" / "api.md"
INTEGRATIONS = ("specforge", "speculators")
# Where a path that is named in prose may start
FOLDERS = (".", "fused_lk", "fused_lk/integrations", "bench", "tests", "examples")
# Named, but not part of the repository: files of users, of trainers, and what commands write
ELSEWHERE = re.compile(r"(run|train)\.yaml|tests/unit/.*|test_metrics\.py|.*\.egg-info|compat\.csv")


def pages() -> list[Path]:
    """What is checked."""
    root = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
    return [
        *root,
        *(page for folder in ("docs", "bench", "study/results") for page in sorted(ROOT.glob(f"{folder}/**/*.md"))),
    ]


def api() -> str:
    """Signatures and docstrings of all public names."""
    parts = ["# API", "`make docs` makes this page of the docstrings. The other pages explain; this one lists."]
    parts += ["## fused_lk", *_members("fused_lk", fused_lk, fused_lk.__all__)]
    for name in INTEGRATIONS:
        module = importlib.import_module(f"fused_lk.integrations.{name}")
        parts += [f"## {module.__name__}", _text(inspect.getdoc(module))]
        parts += _members(module.__name__, module, module.__all__)
    return "\n\n".join(parts) + "\n"


def _members(prefix: str, owner: Any, names: list[str]) -> Iterator[str]:
    for name in names:
        value, path = getattr(owner, name), f"{prefix}.{name}"
        if inspect.ismodule(value):
            yield from _module(path, value)
        elif inspect.isclass(value):
            yield from _class(path, value)
        elif callable(value):
            yield from _entry("###", path, value)
        elif isinstance(value, str):
            yield f"### {path}"
            yield f"The tested version: `{value}`."


def _module(path: str, module: ModuleType) -> Iterator[str]:
    yield f"### {path}"
    yield _text(inspect.getdoc(module))
    for name, value in vars(module).items():
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
            yield from _entry("####", f"{path}.{name}", value)


def _class(path: str, value: type) -> Iterator[str]:
    yield from _entry("###", path, value)
    for name, member in vars(value).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            yield f"#### {path}.{name}"
            yield _text(inspect.getdoc(member))
        elif callable(getattr(value, name)) and inspect.getdoc(getattr(value, name)):
            yield from _entry("####", f"{path}.{name}", getattr(value, name))


def _entry(level: str, path: str, value: Any) -> Iterator[str]:
    yield f"{level} {path}"
    yield _text(f"{path.rpartition('.')[2]}{_signature(value)}\n\n{inspect.getdoc(value) or ''}")


def _signature(value: Any) -> str:
    """A parameter a line where one line is too short."""
    signature = inspect.signature(value)
    parameters = list(signature.parameters.values())
    told, star = [], False
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            star = True
        elif parameter.kind is parameter.KEYWORD_ONLY and not star:
            told.append("*")
            star = True
        told.append(
            str(parameter).replace("'", "") if not isinstance(parameter.default, str) else _with_text(parameter)
        )
    returns = signature.return_annotation
    end = "" if returns in (inspect.Signature.empty, "None") else f" -> {str(returns).strip(chr(39))}"
    line = f"({', '.join(told)}){end}"
    return line if len(line) <= 90 else "(\n    " + ",\n    ".join(told) + f",\n){end}"


def _with_text(parameter: inspect.Parameter) -> str:
    return f'{parameter.name}: {str(parameter.annotation).strip(chr(39))} = "{parameter.default}"'


def _text(text: str | None) -> str:
    return f"```text\n{(text or '').strip()}\n```"


def problems() -> list[str]:
    """A stale page, and each link or path that leads nowhere."""
    found = (
        [] if API.exists() and API.read_text() == api() else [f"{API.relative_to(ROOT)} is out of date; run make docs"]
    )
    for page in pages():
        found += [f"{page.relative_to(ROOT)}: {problem}" for problem in _broken(page)]
    return found


def _broken(page: Path) -> Iterator[str]:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        path = page.parent / name if name else page
        if not path.exists():
            yield f"the link {link} leads to no file"
        elif anchor and anchor not in anchors(path):
            yield f"the link {link} leads to no heading"
    for code in re.findall(r"`([^`\n]+)`", prose):
        for path in re.findall(r"(?:^|(?<=\s))\.?\w[\w./-]*\.(?:py|md|csv|txt|toml|png|cff)\b(?!\()", code):
            near = [*(ROOT / folder for folder in FOLDERS), page.parent]
            if not ELSEWHERE.fullmatch(path) and not any((folder / path).exists() for folder in near):
                yield f"there is no {path}"


def anchors(path: Path) -> set[str]:
    """What a heading is called in a link, as GitHub makes it."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python docs/build.py", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="say what is out of date, and write nothing")
    if not parser.parse_args(arguments).check:
        API.write_text(api())
    found = problems()
    print(
        "\n".join(found)
        or f"{len(pages())} pages: the API page is that of the docstrings, and every link leads somewhere"
    )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
