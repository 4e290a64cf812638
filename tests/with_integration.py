"""A pytest plugin: the published packages' own unit tests, with the integrations applied to every model they build.

    git clone https://github.com/sgl-project/SpecForge && cd SpecForge
    PYTHONPATH=<here> python -m pytest -p with_integration tests/test_utils tests/test_runtime ...

Each training model has the integration applied once it is initialised, and speculators' losses are registered. Where a
test builds a model that is refused (with a head that is a mock, say), it stays as it is; the summary counts both. The
results, with the tests that fail and the reasons, are in bench/PUBLISHED_TESTS.md.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
from types import ModuleType
from typing import Any

import pytest

from fused_lk.integrations import specforge, speculators

applied: collections.Counter[str] = collections.Counter()


def pytest_configure(config: pytest.Config) -> None:
    for integration in (specforge, speculators):
        for name in integration.KINDS:
            module, _, kind = name.partition(":")
            with contextlib.suppress(ImportError):
                _apply_to(getattr(importlib.import_module(module), kind), integration)
    speculators.register()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Some tests load a module of models again, from its file and under another name: the same code, other classes."""
    for module in {id(item.module): item.module for item in items}.values():
        held = [x for x in vars(module).values() if isinstance(x, ModuleType)]
        for kind in {x for of in (module, *held) for x in vars(of).values() if isinstance(x, type)}:
            name = f"{kind.__module__}:{kind.__qualname__}"
            for known, forward in list(specforge.KINDS.items()):
                if known.endswith(f":{kind.__qualname__}") and name not in specforge.KINDS:
                    specforge.KINDS[name] = forward
                    _apply_to(kind, specforge)


def _apply_to(published: Any, integration: Any) -> None:
    published.__init__ = _then_apply(published, integration.apply)


def _then_apply(published: type, apply: Any) -> Any:
    init = published.__init__

    @functools.wraps(init)
    def initialised(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self).__init__ is not initialised:  # a subclass's own comes after this one
            return
        try:
            apply(self)
            applied[f"applied to {published.__name__}"] += 1
        except (TypeError, RuntimeError, AttributeError) as error:
            applied[f"refused {published.__name__}: {str(error).splitlines()[0][:100]}"] += 1

    return initialised


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("integrations")
    for what, count in sorted(applied.items()):
        terminalreporter.write_line(f"{count} x {what}")
