"""Files of JSON lines, one a step, which a process that goes on after a kill continues where its checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import stage


class Lines:
    """The lines of a file up to `step`, and those that are added; nothing is written before `flush`."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.lines = [line for line in read(path) if line["step"] < step]

    def add(self, step: int, values: dict[str, Any]) -> None:
        self.lines.append({"step": step, **values})

    def flush(self) -> None:
        stage.write_lines(self.path, self.lines)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none where there is no file."""
    return stage.read_lines(path) if path.exists() else []
