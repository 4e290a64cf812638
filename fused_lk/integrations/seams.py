"""How an integration runs a trainer's own code with parts of it replaced, leaving modules and classes untouched.

A published `forward` is run as it is, from its code object, with two substitutions that last for that call: names it
looks up in its module (`with_globals`), and attributes it looks up on `self` (`shadow`). Nothing is patched that
another model, thread or caller could see; the one thing that is set, `forward` on the instance, goes with `detach`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import metadata
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from .. import checks


def require_version(package: str, supported: tuple[str, ...]) -> None:
    """The installed `package` is one of the versions that this integration was checked against.

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


def require_names(function: FunctionType, *names: str) -> None:
    """`function` looks up `names`: the seams are where they were when this integration was written.

    Raises:
        RuntimeError: one of them is missing, because the installed code was modified.
    """
    missing = [name for name in names if name not in function.__code__.co_names]
    if missing:
        checks.fail(
            f"{function.__qualname__} that uses {', '.join(names)}, as published",
            f"one without {', '.join(missing)}",
            "Undo local changes to the trainer, or call fused_lk.lk_loss from them directly. Nothing was changed.",
            RuntimeError,
        )


def require_unmodified(model: nn.Module, published: type[nn.Module], *methods: str) -> None:
    """`model` is a `published` one whose `methods` are still the published ones.

    Raises:
        TypeError: another class, an override, or an instance attribute of that name.
    """
    if not isinstance(model, published):
        checks.fail(
            f"an instance of {published.__module__}.{published.__qualname__}",
            f"{type(model).__module__}.{type(model).__qualname__}",
            "Pass the training model itself, before it is wrapped.",
            TypeError,
        )
    for name in methods:
        own = name in vars(model) and not _is_ours(vars(model)[name])
        if own or getattr(type(model), name) is not getattr(published, name):
            checks.fail(
                f"{published.__qualname__}.{name} as published",
                f"a replacement of it in {type(model).__qualname__}, or on the instance",
                "Undo it, or call fused_lk.lk_loss from it directly. Nothing was changed.",
                TypeError,
            )


def with_globals(function: Callable[..., Any], **replaced: Any) -> FunctionType:
    """`function` with some of the names that it finds in its module replaced."""
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
    """Another instance of `module`'s class, with its parameters, buffers and submodules, and some attributes `own`.

    Attributes found on the instance come before those that `nn.Module` looks up, so a submodule can be one of them.
    """
    other = object.__new__(type(module))  # no __init__, and no __new__ that would run it
    vars(other).update({**vars(module), **own})
    return other


class Forward:
    """A `forward` for one model instance, `run(model, ...)`; the class's own is untouched beneath it.

    An object that holds its model, not a bound method: a copy of the model gets one of its own, and a pickled model
    (which would look a method up by its name, and find the class's) keeps it.
    """

    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        self.model, self.run = model, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.model, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self.model).forward, self.model))


def attach(model: nn.Module, run: Callable[..., Any]) -> None:
    """Let `model.forward` be `run(model, ...)`; `run` is pickled and copied with the model."""
    model.forward = Forward(model, run)


def detach(model: nn.Module) -> None:
    """Undo `attach`; nothing happens to a model that has none."""
    if _is_ours(vars(model).get("forward")):
        del model.forward


def _is_ours(attribute: Any) -> bool:
    return isinstance(attribute, Forward)


def linear_head(name: str, head: Any) -> nn.Linear:
    """`head`, if all it does is a matrix product.

    Raises:
        TypeError: another module, or one with hooks, whose effect on the logits would be lost.
    """
    hooks = head._forward_hooks or head._forward_pre_hooks
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or hooks:
        checks.fail(
            f"{name} to be a torch.nn.Linear without forward hooks",
            f"{type(head).__qualname__}{' with forward hooks' if hooks else ''}",
            "Its logits never exist, so nothing can run on them; merge adapters into the weight, or do not apply.",
            TypeError,
        )
    return head


class Memo:
    """`make(*arguments)`, made again only when a tensor is another one or was written to, or another value differs.

    A copy has made nothing yet.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make
        self._tensors: tuple[Tensor, ...] = ()
        self._versions: tuple[Any, ...] = ()
        self._made: Any = None

    def __reduce__(self) -> tuple[type[Memo], tuple[Callable[..., Any]]]:
        return Memo, (self.make,)

    def __call__(self, *arguments: Any) -> Any:
        tensors = tuple(x for x in arguments if isinstance(x, Tensor))
        versions = tuple(x if not isinstance(x, Tensor) else -1 if x.is_inference() else x._version for x in arguments)
        same = len(tensors) == len(self._tensors) and all(x is y for x, y in zip(tensors, self._tensors, strict=True))
        if not same or versions != self._versions:
            self._made = self.make(*arguments)
            self._tensors, self._versions = tensors, versions
        return self._made
