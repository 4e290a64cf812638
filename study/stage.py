"""What lets a stage be killed at any moment: files that appear whole or not at all, and units with seeds of their own.

A stage is a list of units (a shard of answers, a block of features). A unit's file appears under its name only when it
is finished, so its being there is the marker: a second run makes the units that have none. What a unit holds depends on
its own seed and never on the units before it, so the second run's files are those of a run that was not killed.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. What was written there takes the place of `path` at the end.

    After an error, or a kill, `path` is what it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # the name must not reach the disk before the content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed runs left half-written in `folder`."""
    for path in folder.glob("*.part*"):
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """One line of JSON for each value."""
    with replaced(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def read_lines(path: Path) -> list[Any]:
    # Not `splitlines`, which also splits at separators that JSON leaves in its strings.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def seed(*names: object) -> int:
    """A seed for the unit that is called so: of the names alone, whatever ran before. 63 bits."""
    text = "/".join(map(str, names)).encode()
    return (zlib.crc32(text) << 31) ^ zlib.crc32(text[::-1] + b"/")


def same(path: Path, values: dict[str, Any]) -> None:
    """Keep `values` in `path`, or compare with what is there: a folder holds one run, however often it is resumed."""
    values = json.loads(json.dumps(values, default=str))
    if not path.exists():
        write_json(path, values)
        return
    found = read_json(path)
    changed = {key: (found.get(key), value) for key, value in values.items() if found.get(key) != value}
    if changed:
        told = ", ".join(f"{key} {old!r} there, {new!r} asked" for key, (old, new) in changed.items())
        raise ValueError(
            f"expected the settings that {path.parent} was made with, got others: {told}. Use a new folder."
        )
