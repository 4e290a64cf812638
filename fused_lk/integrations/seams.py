"""How an integration runs a trainer's own code with parts of it replaced.

The published `forward` runs as it is, from its code object. For the length of one call, two kinds of names lead
elsewhere: names that it looks up in its module (`with_globals`), and attributes that it looks up on `self` (`shadow`).
The module and the class stay as they are, so that no other model, thread or caller can see the replacement. Only
`forward` on the one instance is set (`Forward.attach`), and `unapply` removes it.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Mapping
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

    # Methods of the model that must be the published ones, each with names that it must look up: they are replaced.
    methods: tuple[tuple[str, ...], ...] = (("forward",),)
    heads: tuple[str, ...] = ()  # These heads of the model, by dotted name, must be plain: their logits are never made.

    def __init__(self, model: Any, impl: str, workspace_mb: float | str, keep_mb: float | str = 0) -> None:
        self.model, self.published = model, type(model).forward
        self.options: dict[str, Any] = {"impl": impl, "workspace_mb": workspace_mb}
        self.of_losses = {**self.options, "keep_mb": keep_mb}
        self.__signature__ = inspect.signature(MethodType(self.published, model))

    def __getstate__(self) -> tuple[Any, ...]:
        return self.model, *self.of_losses.values()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        type(self).__init__(self, *state)

    def check(self) -> None:
        """Raise for what this kind cannot serve of its model, beyond `methods` and `heads`. By default, nothing."""

    def refuse(self, **call: Any) -> None:
        """Raise for keywords of the trainer's calls that cannot be served, before training starts. By default, none."""


def attach(
    model: Any, kinds: Mapping[str, type[Forward]], impl: str, workspace_mb: float | str, keep_mb: float | str = 0
) -> Any:
    """Check everything, then let `model.forward` be one of the kind that serves its class; returns `model`.

    `kinds` names each published class as "module:Class"; a subclass of one is served where it changes no method.

    Raises:
        ValueError: an unknown `impl`.
        TypeError, RuntimeError: no published model of the table, or a modified one, or a head is not a plain linear.
    """
    checks.choice("impl", impl, IMPLS)
    checks.keep_bytes(keep_mb)
    served = [(c, kinds[name]) for c in type(model).__mro__ if (name := _name(c)) in kinds]
    if not served:
        checks.fail(
            f"a training model among {', '.join(kinds)}",
            _name(type(model)),
            "Pass the training model itself, before it is wrapped. Nothing was changed.",
            TypeError,
        )
    published, kind = served[0]
    for method, *names in kind.methods:
        require_unmodified(model, published, method)
        require_names(getattr(published, method), *names)
    forward = kind(model, impl, workspace_mb, keep_mb)
    for name in forward.heads:
        linear_head(model, name)
    forward.check()
    model.forward = forward
    return model


def _name(of: Any) -> str:
    return f"{of.__module__}:{of.__qualname__}"


def require_published(of: Any, *names: str) -> None:
    """Check that a class or a method is one of those published as "module:name".

    Raises:
        TypeError: it is another one.
    """
    if (got := _name(of)) not in names:
        remedy = "Logits never exist, so nothing else can change them; or do not apply. Nothing was changed."
        checks.fail(" or ".join(names), got, remedy, TypeError)


def unapply(model: Any) -> Any:
    """Undo `apply`; returns `model`, on which nothing of it is left. A model without it stays as it is."""
    if isinstance(vars(model).get("forward"), Forward):
        del model.forward
    return model


def require_version(package: str, tested: tuple[str, ...]) -> None:
    """Check that `package` is installed, and warn where its version was not tested: the seams are checked by `attach`.

    A version alone proves little, because a trainer's main branch may bear that of its last release.

    Raises:
        ImportError: it is not installed.
    """
    names = " or ".join(f"{package}=={version}" for version in tested)
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        checks.fail(
            names,
            f"no installed {package}",
            f"Install {names}; or use fused_lk's own functions, which need no trainer. Nothing was changed.",
            ImportError,
        )
    if installed not in tested:
        warnings.warn(
            f"fused_lk was tested with {names}, and {package} {installed} is installed. The names that it replaces are "
            "checked, what is done with them is not: compare a few steps with those of the unmodified trainer.",
            stacklevel=3,
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
    """Check that the `methods` of `model` are still those of its `published` class.

    Raises:
        TypeError: the model's class or the instance itself replaces a method.
    """
    for name in methods:
        own = name in vars(model) and not isinstance(vars(model)[name], Forward)
        if own or getattr(type(model), name) is not getattr(published, name):
            checks.fail(
                f"{published.__qualname__}.{name} as published",
                f"a replacement of it in {type(model).__qualname__}, or on the instance",
                "Undo it, or call fused_lk.lk_loss from it directly. Nothing was changed.",
                TypeError,
            )


def linear_head(model: nn.Module, name: str, bias: bool = True) -> nn.Linear:
    """Return the model's head of that dotted `name`, and check that all it does is a matrix product.

    `bias`: whether it may have one.

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
    if head.bias is not None and not bias:
        remedy = "Take it off, or do not apply. Nothing was changed."
        checks.fail(f"{name} without a bias, as published", "one with a bias", remedy, TypeError)
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
