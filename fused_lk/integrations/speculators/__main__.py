"""speculators' own command, with the integration applied to the model that it trains.

    python -m fused_lk.integrations.speculators train --config train.yaml
    torchrun --nproc_per_node 8 -m fused_lk.integrations.speculators train --config train.yaml

It takes the arguments of `speculators`, and passes them on. Environment: see `fused_lk.integrations.launch`.
"""

from __future__ import annotations

from typing import Any

from .. import launch, seams
from .models import apply


def main(arguments: list[str] | None = None) -> None:
    """Run `speculators` with these arguments (by default, those of this process). It ends the process, as that does.

    Raises:
        RuntimeError: the installed speculators does not look up what is replaced here, or trained without being fused.
        TypeError, ValueError: its model or its losses cannot be served; see `speculators.apply`.
    """
    from speculators.cli import app
    from speculators.train import cli

    if launch.disabled():
        return app(arguments)
    seams.require_names(cli.main, "Trainer")
    applied = launch.Applied(apply)
    train, trainer = cli.main, cli.Trainer

    def make_trainer(model: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        return trainer(applied.to(model, config.train_call_kwargs), config, *args, **kwargs)

    def train_applied(config: Any) -> None:
        train(config)
        if not config.flatten()["dry_run"]:
            applied.ended()

    with launch.replaced(cli, main=train_applied, Trainer=make_trainer):
        return app(arguments)


if __name__ == "__main__":
    main()
