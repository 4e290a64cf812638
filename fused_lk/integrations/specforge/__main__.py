"""SpecForge's own command, with the integration applied to the model that it builds.

    python -m fused_lk.integrations.specforge train -c run.yaml training.lk_loss_type=lambda
    torchrun --nproc_per_node 8 -m fused_lk.integrations.specforge train -c run.yaml

It takes the arguments of `specforge`, and passes them on. `specforge train` may start workers (with
`deployment.trainer.nproc_per_node`, or a producer and a consumer); these run this module again, so that they are
applied to, too. Environment: see `fused_lk.integrations.launch`.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from .. import launch, seams
from .models import apply

WORKER = (sys.executable, "-m", __package__)
# torchrun takes the worker's command as it is, in place of a script for Python.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--no-python")


def main(arguments: list[str] | None = None) -> int:
    """Run `specforge` with these arguments (by default, those of this process), and return its exit status.

    Raises:
        RuntimeError: the installed SpecForge does not look up what is replaced here, or trained without being fused.
        TypeError: its model cannot be served; see `specforge.apply`.
    """
    from specforge import cli, launch_plan
    from specforge.training import assembly

    if launch.disabled():
        return cli.main(arguments)
    seams.require_names(cli.main, "build_launch_plan", "_train")
    seams.require_names(assembly.build_training_run, "build_model_bundle")
    applied = launch.Applied(apply)
    build, train = assembly.build_model_bundle, cli._train

    def build_model_bundle(*args: Any, **kwargs: Any) -> Any:
        bundle = build(*args, **kwargs)
        # Where the trainer has a target head, it would make [tokens, V_target] logits before it calls the model.
        applied.to(bundle.model, **{} if bundle.target_head is None else {"target_head": bundle.target_head})
        return bundle

    def train_applied(resolved: Any) -> int:
        result = train(resolved)
        if resolved.config.training.role != "producer":  # A producer only moves features.
            applied.ended()
        return result

    plan = partial(launch_plan.build_launch_plan, worker_prefix=WORKER, torchrun_prefix=TORCHRUN)
    with (
        launch.replaced(launch_plan, build_launch_plan=plan),
        launch.replaced(assembly, build_model_bundle=build_model_bundle),
        launch.replaced(cli, _train=train_applied),
    ):
        return cli.main(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
