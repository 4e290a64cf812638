"""Files of JSON lines, one a step, which a process that goes on after a kill continues where its checkpoint is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path whose file takes the place of `path` at the end: a reader sees the old or the new one."""
    temporary = path.with_name(path.name + ".part")
    yield temporary
    os.replace(temporary, path)


class Lines:
    """The lines of a file up to `step`, and those that are added; nothing is written before `flush`."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.lines = [line for line in read(path) if line["step"] < step]

    def add(self, step: int, values: dict[str, Any]) -> None:
        self.lines.append({"step": step, **values})

    def flush(self) -> None:
        with replaced(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
