"""How an integration runs a trainer's own code with parts of it replaced.

The published `forward` runs as it is, from its code object. For the length of one call, two kinds of names lead
elsewhere: names that it looks up in its module (`with_globals`), and attributes that it looks up on `self` (`shadow`).
The module and the class stay as they are, so that no other model, thread or caller can see the replacement. Only
`forward` on the one instance is set (`Forward.attach`), and `unapply` removes it.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from importlib import metadata
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from .. import checks
from ..impls import IMPLS


class Forward:
    """The `forward` of one model instance; a subclass says in `__call__` what it does.

    It is an object that holds its model, not a bound method. A deep copy of the model therefore gets a `forward` of its
    own, and a pickled model keeps its `forward`. (Pickle would look up a method by its name, and find the published
    one.) A copy runs `__init__` again, so that nothing that a subclass makes there is shared or pickled.
    """

    methods: tuple[str, ...] = ("forward",)  # These methods of the model must be the published ones.
    names: tuple[str, ...] = ()  # The published forward must look up these names, because they are replaced.
    heads: tuple[str, ...] = ()  # These heads of the model, by dotted name, must be plain: their logits are never made.

    def __init__(self, model: Any, impl: str, workspace_mb: float | str) -> None:
        self.model, self.published = model, type(model).forward
        self.options: dict[str, Any] = {"impl": impl, "workspace_mb": workspace_mb}
        self.__signature__ = inspect.signature(MethodType(self.published, model))

    def __getstate__(self) -> tuple[Any, ...]:
        return self.model, *self.options.values()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        type(self).__init__(self, *state)

    @classmethod
    def attach(
        cls, model: Any, published: type[nn.Module], impl: str = "auto", workspace_mb: float | str = "auto"
    ) -> Any:
        """Check everything, then let `model.forward` be one of this class; returns `model`.

        Raises:
            ValueError: an unknown `impl`.
            TypeError, RuntimeError: the model is not the published one, or a head is not a plain linear.
        """
        checks.choice("impl", impl, IMPLS)
        require_unmodified(model, published, *cls.methods)
        require_names(published.forward, *cls.names)
        for name in cls.heads:
            linear_head(model, name)
        model.forward = cls(model, impl, workspace_mb)
        return model


def unapply(model: Any) -> Any:
    """Undo `apply`; returns `model`, on which nothing of it is left. A model without it stays as it is."""
    if isinstance(vars(model).get("forward"), Forward):
        del model.forward
    return model


def require_version(package: str, supported: tuple[str, ...]) -> None:
    """Check that the installed `package` is one of the versions that this integration was checked against.

    Raises:
        ImportError: it is not installed, or is of another version.
    """
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        installed = None
    if installed not in supported:
        names = " or ".join(f"{package}=={version}" for version in supported)
        checks.fail(
            names,
            f"{package} {installed}" if installed else f"no installed {package}",
            f"Install {names}; or use fused_lk's own functions, which need no trainer. Nothing was changed.",
            ImportError,
        )


def require_names(function: Callable[..., Any], *names: str) -> None:
    """Check that `function` looks up all these `names`, as it did when this integration was written.

    Raises:
        RuntimeError: one of them is missing, because the installed code was modified.
    """
    function = inspect.unwrap(function)
    missing = [name for name in names if name not in function.__code__.co_names]
    if missing:
        checks.fail(
            f"{function.__qualname__} that uses {', '.join(names)}, as published",
            f"one without {', '.join(missing)}",
            "Undo local changes to the trainer, or call fused_lk.lk_loss from them directly. Nothing was changed.",
            RuntimeError,
        )


def require_unmodified(model: nn.Module, published: type[nn.Module], *methods: str) -> None:
    """Check that `model` is a `published` one, and that its `methods` are still the published ones.

    Raises:
        TypeError: the model is of another class, or its class or the instance itself replaces a method.
    """
    if not isinstance(model, published):
        checks.fail(
            f"an instance of {published.__module__}.{published.__qualname__}",
            f"{type(model).__module__}.{type(model).__qualname__}",
            "Pass the training model itself, before it is wrapped.",
            TypeError,
        )
    for name in methods:
        own = name in vars(model) and not isinstance(vars(model)[name], Forward)
        if own or getattr(type(model), name) is not getattr(published, name):
            checks.fail(
                f"{published.__qualname__}.{name} as published",
                f"a replacement of it in {type(model).__qualname__}, or on the instance",
                "Undo it, or call fused_lk.lk_loss from it directly. Nothing was changed.",
                TypeError,
            )


def linear_head(model: nn.Module, name: str) -> nn.Linear:
    """Return the model's head of that dotted `name`, and check that all it does is a matrix product.

    Raises:
        TypeError: it is another module, or one with hooks, whose effect on the logits would be lost.
    """
    head = operator.attrgetter(name)(model)
    hooks = head._forward_hooks or head._forward_pre_hooks
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or hooks:
        checks.fail(
            f"{name} to be a torch.nn.Linear without forward hooks",
            f"{type(head).__qualname__}{' with forward hooks' if hooks else ''}",
            "Its logits never exist, so nothing can run on them; merge adapters into the weight, or do not apply.",
            TypeError,
        )
    return head


def with_globals(function: Callable[..., Any], **replaced: Any) -> FunctionType:
    """Return a copy of `function` that finds some of the names of its module replaced."""
    function = inspect.unwrap(function)
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **replaced},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def shadow(module: nn.Module, **own: Any) -> Any:
    """Make another instance of `module`'s class, which shares everything with it but the attributes `own`.

    Python finds attributes of the instance before those that `nn.Module` looks up, so `own` can replace a submodule.
    """
    other = object.__new__(type(module))  # This runs no __init__, and no __new__ that would run it.
    vars(other).update({**vars(module), **own})
    return other


class Memo:
    """Calls `make`, and keeps its result until an argument is another object, or a tensor that was written to."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make
        self._arguments: tuple[Any, ...] = ()
        self._versions: list[int | None] | None = None
        self._made: Any = None

    def __call__(self, *arguments: Any) -> Any:
        versions = [x._version if isinstance(x, Tensor) and not x.is_inference() else None for x in arguments]
        if versions != self._versions or not all(map(operator.is_, arguments, self._arguments)):
            self._made = self.make(*arguments)
            self._arguments, self._versions = arguments, versions
        return self._made
