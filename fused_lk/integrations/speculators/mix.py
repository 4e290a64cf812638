"""The part of a `forward` that all draft kinds with a loss config share: which losses are asked for, on `Rows`."""

from __future__ import annotations

from inspect import BoundArguments
from typing import Any

from .. import seams
from . import losses, rows


class Mixed(seams.Forward):
    """A forward that takes a `loss_config`, and a `tv_loss_fn` where it reports acceptance rates."""

    heads: tuple[str, ...] = ("lm_head", "verifier_lm_head")
    default = "kl_div"  # What the published forward does without a loss config.

    def refuse(self, **call: Any) -> None:
        """Raise for losses that are none of speculators' seven.

        Raises:
            ValueError: `loss_config` or `tv_loss_fn` has another function.
        """
        _asked({"loss_config": call.get("loss_config"), "tv_loss_fn": call.get("tv_loss_fn")}, self.default)

    def on_rows(self, args: Any, kwargs: Any) -> tuple[BoundArguments, tuple[str, ...]]:
        """The arguments of a call with losses that take `Rows`, and the terms that these need."""
        call = self.__signature__.bind(*args, **kwargs)
        of_call = {name: call.arguments.get(name) for name in ("loss_config", "tv_loss_fn")}
        asked, terms = _asked(of_call, self.default)
        call.arguments.update({name: asked[name] for name in asked if name in self.__signature__.parameters})
        return call, terms


def _asked(call: dict[str, Any], default: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    from speculators.losses import resolve_loss_config

    loss_config, terms = rows.on_rows(call["loss_config"] or resolve_loss_config(default))
    overlap = losses.LOSSES["tv"]
    if call["tv_loss_fn"] is not None:
        overlap = losses.named(tv_loss_fn=call["tv_loss_fn"])["tv_loss_fn"]
    return {"loss_config": loss_config, "tv_loss_fn": rows.of_rows(overlap)}, terms
