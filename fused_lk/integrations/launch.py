"""How a trainer's own command runs with the integration applied to the model that it builds.

A launcher replaces names in the trainer's modules for the length of one command, in every process that the command
starts. Settings are environment variables, because they reach all of these processes:

    FUSED_LK_DISABLE=1        the trainer's command as it is
    FUSED_LK_IMPL             impl of the losses ("auto")
    FUSED_LK_WORKSPACE_MB     workspace_mb of the losses ("auto")
    FUSED_LK_KEEP_MB          keep_mb of the losses (0)
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from .. import checks


def disabled() -> bool:
    """Whether the environment asks for the trainer's command as it is."""
    given = os.environ.get("FUSED_LK_DISABLE", "0")
    checks.choice("FUSED_LK_DISABLE", given, ("0", "1"))
    return given == "1"


class Applied:
    """It applies an integration to a run's model, says so in the log of each rank, and knows whether it did."""

    def __init__(self, apply: Callable[..., Any]) -> None:
        self.apply = apply
        self.models: list[str] = []

    def to(self, model: Any, call: Mapping[str, Any] | None = None, **own: Any) -> Any:
        """Apply to `model`, with options of its `own`, and refuse what its forward cannot serve of its `call`.

        `call` has the keywords that the trainer will call the model with.

        Raises:
            TypeError, RuntimeError, ValueError: as `apply`, before training starts.
        """
        options: dict[str, Any] = {
            "impl": os.environ.get("FUSED_LK_IMPL", "auto"),
            "workspace_mb": _size(os.environ.get("FUSED_LK_WORKSPACE_MB", "auto")),
        }
        if "FUSED_LK_KEEP_MB" in os.environ:
            options["keep_mb"] = _size(os.environ["FUSED_LK_KEEP_MB"])
        self.apply(model, **options, **own)
        vars(model)["forward"].refuse(**call or {})
        name = type(model).__name__
        self.models.append(name)
        rank = os.environ.get("RANK", "0")
        # A trainer may not have set up logging yet, or on rank 0 only. One write keeps the lines of ranks apart.
        sys.stdout.write(
            f"fused_lk: rank {rank}: applied to {name} ({', '.join(f'{k}={v}' for k, v in options.items())})\n"
        )
        sys.stdout.flush()
        return model

    def ended(self) -> None:
        """Call it when training has run: it raises where nothing was applied."""
        # DDP is freed by the collector alone. Until then gloo's threads outlive their process group, and the process
        # aborts where they meet the end of Python (pytorch/pytorch pull request 179291).
        gc.collect()
        if not self.models:
            checks.fail(
                "the trainer to build its model where this launcher replaces it",
                "a run that built none there, and was not fused",
                "Report the trainer's version; call apply(model) by hand, or train with FUSED_LK_DISABLE=1.",
                RuntimeError,
            )


def _size(given: str) -> float | str:
    return given if given == "auto" else float(given)


@contextmanager
def replaced(module: ModuleType, **names: Any) -> Iterator[None]:
    """Let `names` of `module` be others inside the block.

    Raises:
        RuntimeError: the module has no such name, so that a replacement would do nothing.
    """
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        checks.fail(
            f"{module.__name__} with {', '.join(names)}, as published",
            f"one without {', '.join(missing)}",
            "Report the trainer's version; call apply(model) by hand, or train with FUSED_LK_DISABLE=1.",
            RuntimeError,
        )
    before = {name: getattr(module, name) for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(before)
