"""Who is compared: one table, one signature.

`provider.prepare(inputs)` does what a trainer does once (slice a head, compile) and returns `loss()`: from hidden
states to a scalar, target construction included, differentiable in `inputs.leaves`. `provider.semantics` names what
that scalar is, for the oracle in `parity`; `provider.less` says what it leaves out of LK training.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_lk

from . import eager
from .shapes import Inputs

Loss = Callable[[], Tensor]

_KL_ALONE = "KL alone: no acceptance rate, no lambda, no argmax"
# Three terms in one pass; "l1" alone is the costliest of them.
MIX = {"ce": 0.1, "l1": 0.9, "kl": 0.5}
_HARD = "cross-entropy with hard labels that are given: no target at all"


@dataclass(frozen=True)
class Provider:
    """One way to make the loss and its gradient.

    Attributes:
        title: what tables and plots call it.
        prepare: `Inputs` -> `loss()`.
        semantics: key of `parity.ORACLES`.
        computes: what a call does, in a line. less: what it leaves out of what ours does; "" = nothing.
        plain: its operations are all visible to PyTorch's dispatcher (can be accounted on fake tensors).
        gpu: it needs one.
        requires: module, or attribute of `torch.nn.functional`, without which it does not exist.
    """

    name: str
    title: str
    prepare: Callable[[Inputs], Loss]
    semantics: str
    computes: str
    less: str = ""
    plain: bool = True
    gpu: bool = False
    requires: str = ""

    def missing(self) -> str:
        """Why it cannot run here; "" if it can."""
        if self.gpu and not torch.cuda.is_available():
            return "needs a GPU"
        if not self.requires or hasattr(F, self.requires):
            return ""
        package = self.requires.partition(".")[0]
        return "" if importlib.util.find_spec(package) else f"{package} is not installed"


def clear_gradients(inputs: Inputs) -> None:
    for leaf in inputs.leaves:
        leaf.grad = None


def plain(loss: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Loss]:
    return lambda inputs: partial(loss, inputs)


def _compiled(loss: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Loss]:
    def prepare(inputs: Inputs) -> Loss:
        torch._dynamo.reset()
        return torch.compile(partial(loss, inputs), dynamic=False)

    return prepare


def _ours(**options: Any) -> Callable[[Inputs], Loss]:
    """The public call, all steps at once; the head is sliced once, the pair list is made at every step."""

    def prepare(inputs: Inputs) -> Loss:
        vocab = None if inputs.t2d is None else fused_lk.DraftVocab(inputs.t2d)
        head = fused_lk.TargetHead(inputs.target_weight, vocab)

        def loss() -> Tensor:
            target = fused_lk.Target.from_hidden(inputs.target_hidden, head, mask=inputs.mask)
            return fused_lk.lk_loss(
                inputs.draft_hidden, inputs.draft_weight, target, pairs=inputs.pairs(), **options
            ).loss

        return loss

    return prepare


def _sum_over_steps(inputs: Inputs, loss_of_step: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Sum of `loss_of_step(draft rows, target rows, labels)`; label -100 ignores a row, others are not read."""
    n = inputs.shape.num_tokens
    total = inputs.target_hidden.new_zeros((), dtype=torch.float32)
    for k, h in enumerate(inputs.draft_hidden):
        labels = torch.where(inputs.step_mask(k)[: n - k], 0, -100)
        total = total + loss_of_step(h[: n - k], inputs.target_hidden[k:], labels)
    return total


def _liger_chunked(compiled: bool) -> Callable[[Inputs], Loss]:
    def prepare(inputs: Inputs) -> Loss:
        function = importlib.import_module("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDFunction

        def step(h: Tensor, target_hidden: Tensor, labels: Tensor) -> Tensor:
            weights = (inputs.draft_weight, target_hidden, inputs.target_draft_weight, labels, None, None)
            hard, soft, beta, ignore, temperature = 0.0, 1.0, 0.0, -100, 1.0
            return function.apply(h, *weights, hard, soft, beta, ignore, temperature, compiled)

        return lambda: _sum_over_steps(inputs, step)

    return prepare


def _liger_jsd(inputs: Inputs) -> Loss:
    function = importlib.import_module("liger_kernel.ops.fused_linear_jsd").LigerFusedLinearJSDFunction

    def step(h: Tensor, target_hidden: Tensor, labels: Tensor) -> Tensor:
        return function.apply(h, inputs.draft_weight, target_hidden, inputs.target_draft_weight, labels, 0.0)

    return lambda: _sum_over_steps(inputs, step)


def _liger_kl(inputs: Inputs) -> Loss:
    function = importlib.import_module("liger_kernel.ops.fused_linear_kl_div").LigerFusedLinearKLDivFunction

    def step(h: Tensor, target_hidden: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            probs = F.linear(target_hidden, inputs.target_draft_weight).float().softmax(-1).to(h.dtype)
        return function.apply(h, inputs.draft_weight, probs, labels)

    return lambda: _sum_over_steps(inputs, step)


def _speculators_fused(inputs: Inputs) -> Loss:
    from tests import peers  # loads the package without what it imports to move data

    row_loss = peers.speculators().fused.fused_lk_hybrid_loss

    def loss() -> Tensor:
        with torch.no_grad():
            targets = F.linear(inputs.target_hidden, inputs.target_draft_weight)
        return eager.over_steps(inputs, targets, lambda z, t: row_loss(z.unsqueeze(0), t.unsqueeze(0)).squeeze(0))

    return loss


def hard_labels(inputs: Inputs) -> list[Tensor]:
    """Per step int64 `[N]`: the target's argmax on the draft vocabulary; -100 on rows that do not count."""
    rows = inputs.target_hidden.split(512)
    best = torch.cat([F.linear(x, inputs.target_draft_weight).argmax(-1) for x in rows])
    steps = range(inputs.shape.ttt_steps)
    return [torch.where(inputs.step_mask(k), F.pad(best[k:], (0, k)), -100) for k in steps]


def _cross_entropy(linear_cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Inputs], Loss]:
    def prepare(inputs: Inputs) -> Loss:
        steps = list(zip(inputs.draft_hidden, hard_labels(inputs), strict=True))
        return lambda: sum(linear_cross_entropy(h, inputs.draft_weight, labels).float() for h, labels in steps)

    return prepare


def _cut_cross_entropy(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return importlib.import_module("cut_cross_entropy").linear_cross_entropy(h, weight, labels)


def _torch_cross_entropy(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(h, weight, labels, options=torch.nn.LinearCrossEntropyOptions())


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(
            "specforge-eager",
            "eager, as SpecForge",
            plain(eager.specforge),
            "specforge",
            "LK-lambda per step, full logits",
        ),
        Provider(
            "speculators-eager",
            "eager, as speculators",
            plain(eager.speculators),
            "speculators",
            "lk_hybrid: lambda per token, full logits on the draft vocabulary",
            "no full-vocabulary normaliser (p renormalised), no argmax",
        ),
        Provider(
            "specforge-compiled",
            "compiled, as SpecForge",
            _compiled(eager.specforge),
            "specforge",
            "specforge-eager under torch.compile",
            plain=False,
        ),
        Provider(
            "checkpointed",
            "chunked, checkpointed",
            plain(eager.checkpointed),
            "position",
            "LK-lambda per step, chunks of 512 rows, torch.utils.checkpoint",
            "no argmax",
        ),
        Provider(
            "liger-chunked",
            "Liger, chunked KL",
            _liger_chunked(compiled=True),
            "kl",
            "Liger's chunked JSD at beta 0, compiled",
            _KL_ALONE,
            plain=False,
            requires="liger_kernel",
        ),
        Provider(
            "ours-one-pass",
            "fused, one pass",
            _ours(objective="lambda", lambda_per="token", plan="one_pass"),
            "token",
            "LK-lambda per token, gradient in the forward",
        ),
        Provider(
            "ours-recompute",
            "fused, recompute",
            _ours(objective="lambda", lambda_per="token", plan="recompute"),
            "token",
            "LK-lambda per token, logits made again in the backward",
        ),
        Provider("ours-default", "fused, the default", _ours(), "position", "LK-lambda per step (recompute)"),
        Provider(
            "ours-kept",
            "fused, logits kept",
            _ours(keep_mb=1024.0),
            "position",
            "ours-default with its logits kept, up to 1 GiB",
        ),
        Provider("ours-l1", "fused, L1", _ours(objective="l1"), "l1", "L1, gradient in the forward"),
        Provider(
            "ours-mix",
            "fused, three terms",
            _ours(objective=MIX),
            "mix",
            "a sum of three terms, gradient in the forward",
        ),
        Provider(
            "speculators-fused",
            "speculators' kernels",
            _speculators_fused,
            "speculators",
            "lk_hybrid from full logits, their Triton kernels",
            "no full-vocabulary normaliser (p renormalised), no argmax",
            plain=False,
            gpu=True,
            requires="speculators",
        ),
        Provider(
            "liger-jsd",
            "Liger, fused JSD",
            _liger_jsd,
            "kl",
            "Liger's fused linear JSD at beta 0 (Triton)",
            _KL_ALONE,
            plain=False,
            gpu=True,
            requires="liger_kernel",
        ),
        Provider(
            "liger-kl",
            "Liger, fused KL",
            _liger_kl,
            "kl",
            "Liger's fused linear KL (Triton), target probabilities made in full",
            _KL_ALONE,
            plain=False,
            gpu=True,
            requires="liger_kernel",
        ),
        Provider(
            "torch-linear-ce",
            "PyTorch, hard labels",
            _cross_entropy(_torch_cross_entropy),
            "hard",
            "F.linear_cross_entropy, chunked",
            _HARD,
            plain=False,
            gpu=True,
            requires="linear_cross_entropy",
        ),
        Provider(
            "cut-cross-entropy",
            "Apple, hard labels",
            _cross_entropy(_cut_cross_entropy),
            "hard",
            "Apple's cut cross-entropy",
            _HARD,
            plain=False,
            gpu=True,
            requires="cut_cross_entropy",
        ),
    )
}


def available(gpu: bool) -> list[Provider]:
    """The providers that can run here; on a CPU those that need no GPU."""
    return [p for p in PROVIDERS.values() if (gpu or not p.gpu) and not p.missing()]
