"""`python -m bench.exactness`: what bf16 logits cost in accuracy, and what keeping them in float32 costs in time.

A bf16 logit of magnitude 16 is off by up to 0.06, that is 6 % of a probability. Errors of alpha, KL and gradients
against float64 on the very same bf16 inputs, at acceptance rates near 0.9, 0.99 and 0.999: the draft is the target's
head on the target's states plus noise.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_lk
from fused_lk import reference

from . import machine

RESULTS = Path(__file__).resolve().parent / "results"
ALPHAS = (0.9, 0.99, 0.999)
LOGIT_SCALE = 4.0  # standard deviation: the largest of 32,000 logits is near 16
OBJECTIVES = ("kl", "alpha")


@dataclass(frozen=True)
class Problem:
    """bf16 `draft_hidden` `[N, H]` and `target_hidden`, and the head `[V, H]` that both have."""

    draft_hidden: Tensor
    target_hidden: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Row:
    """Errors: alpha's mean and largest absolute error over tokens, the mean KL's relative error, and of each
    objective's dH the norm of the error over the norm. `seconds`: forward + backward of "alpha"."""

    alpha: float
    method: str
    alpha_mean_error: float
    alpha_max_error: float
    kl_relative_error: float
    kl_gradient_error: float
    alpha_gradient_error: float
    seconds: float


Divergences = Callable[[Tensor], tuple[Tensor, Tensor]]  # draft hidden -> (log alpha, KL), differentiable


def make_problem(alpha: float, tokens: int, hidden_size: int, vocab_size: int, device: str = "cpu") -> Problem:
    """Noise of the size that gives this mean acceptance rate, found by bisection."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    states, noise = randn(tokens, hidden_size), randn(tokens, hidden_size)
    weight = (randn(vocab_size, hidden_size) * LOGIT_SCALE * hidden_size**-0.5).bfloat16()
    states = states.bfloat16()
    low, high = 0.0, 1.0
    for _ in range(12):
        scale = (low + high) / 2
        problem = Problem((states.float() + scale * noise).bfloat16(), states, weight)
        if float(_exact(problem, problem.draft_hidden.float(), torch.float32)[0].exp().mean()) > alpha:
            low = scale
        else:
            high = scale
    return problem


def _exact(problem: Problem, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The oracle on logits made in `dtype`."""
    weight = problem.weight.to(dtype)
    log_p = reference.target_log_probs(F.linear(problem.target_hidden.to(dtype), weight))
    return reference.divergences(F.linear(hidden.to(dtype), weight), log_p)


def methods(problem: Problem) -> dict[str, Divergences]:
    def ours(logits_dtype: str | torch.dtype) -> Divergences:
        def divergences(hidden: Tensor) -> tuple[Tensor, Tensor]:
            target = fused_lk.Target.from_hidden(problem.target_hidden, problem.weight, logits_dtype=logits_dtype)
            d = fused_lk.lk_divergences(hidden, problem.weight, target, logits_dtype=logits_dtype)
            return d.log_acceptance, d.kl

        return divergences

    return {
        "eager, bf16 logits": lambda hidden: _exact(problem, hidden, torch.bfloat16),
        'ours, logits_dtype="compute"': ours("compute"),
        "ours, logits_dtype=torch.float32": ours(torch.float32),
    }


def _gradients(divergences: Divergences, hidden: Tensor) -> list[Tensor]:
    """Log alpha, KL, then dH of the mean of each objective."""
    leaf = hidden.detach().clone().requires_grad_()
    log_alpha, kl = divergences(leaf)
    losses = {"kl": kl.mean(), "alpha": -log_alpha.mean()}
    gradients = [torch.autograd.grad(losses[name], leaf, retain_graph=True)[0] for name in OBJECTIVES]
    return [x.detach().double() for x in (log_alpha, kl, *gradients)]


def _seconds(divergences: Divergences, hidden: Tensor, repeats: int) -> float:
    def once() -> float:
        leaf = hidden.detach().clone().requires_grad_()
        begin = time.perf_counter()
        (-divergences(leaf)[0].mean()).backward()
        if leaf.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    once()
    return statistics.median(once() for _ in range(repeats))


def measure(alpha: float, tokens: int, hidden_size: int, vocab_size: int, repeats: int, device: str) -> list[Row]:
    problem = make_problem(alpha, tokens, hidden_size, vocab_size, device)
    truth = _gradients(lambda hidden: _exact(problem, hidden, torch.float64), problem.draft_hidden.double())
    rows = []
    for name, divergences in methods(problem).items():
        log_alpha, kl, *gradients = _gradients(divergences, problem.draft_hidden)
        error = (log_alpha.exp() - truth[0].exp()).abs()
        relative = [float((g - t).norm() / t.norm()) for g, t in zip(gradients, truth[2:], strict=True)]
        rows.append(
            Row(
                alpha=round(float(truth[0].exp().mean()), 5),
                method=name,
                alpha_mean_error=float(error.mean()),
                alpha_max_error=float(error.max()),
                kl_relative_error=float((kl.mean() - truth[1].mean()).abs() / truth[1].mean()),
                kl_gradient_error=relative[0],
                alpha_gradient_error=relative[1],
                seconds=_seconds(divergences, problem.draft_hidden, repeats),
            )
        )
    return rows


def markdown(rows: list[Row]) -> str:
    lines = [
        "| alpha | logits | alpha: mean, largest error | KL error | dH error, KL | dH error, -log alpha | ms |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        errors = f"{r.alpha_mean_error:.1e}, {r.alpha_max_error:.1e} | {r.kl_relative_error:.1e}"
        gradients = f"{r.kl_gradient_error:.2%} | {r.alpha_gradient_error:.2%}"
        lines.append(f"| {r.alpha:.4f} | {r.method} | {errors} | {gradients} | {1e3 * r.seconds:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.exactness", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = (options.tokens, options.hidden_size, options.vocab_size)
    rows = [row for alpha in ALPHAS for row in measure(alpha, *sizes, options.repeats, device)]
    origin = machine.provenance(options.threads)
    path = options.out / f"{machine.file_stem()}-exactness.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)] + list(origin))
        writer.writeheader()
        writer.writerows({**asdict(row), **origin} for row in rows)
    table = markdown(rows)
    path.with_suffix(".md").write_text(table)
    print(f"{options.tokens} tokens, H {options.hidden_size}, V {options.vocab_size:,}, bf16, {device}\n\n{table}")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
