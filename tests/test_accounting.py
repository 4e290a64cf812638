"""The accounting is what the allocator was really asked for, byte for byte, on real tensors and on fake ones."""

from __future__ import annotations

import collections
from dataclasses import replace

import peers
import pytest
import torch

from bench import eager
from bench.accounting import Accounting, account, full_size
from bench.memory import FUSED, PROVIDERS, Shape, make_inputs, ours

SMALL = Shape("small", num_tokens=600, hidden_size=48, draft_vocab_size=3000, target_vocab_size=5000, ttt_steps=2)
EAGER = {name: prepare for name, prepare in PROVIDERS.items() if name.startswith("eager")}
STEPS = {**EAGER, "one_pass": ours("one_pass", "torch"), "recompute": ours("recompute", "torch")}


def real_peak(step):
    """The largest sum of CPU allocations less frees in a step and its backward, by PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step().backward()
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(torch.tensor(changes).cumsum(0).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", STEPS)
def test_it_is_what_the_allocator_gave(name, dtype):
    prepare, shape = STEPS[name], replace(SMALL, dtype=dtype)
    allocated = real_peak(prepare(make_inputs(shape)))
    assert allocated > 10e6, "the profiler saw nothing"
    assert account(prepare(make_inputs(shape))).peak == allocated
    with full_size("cpu"):
        assert account(prepare(make_inputs(shape))).peak == allocated


@pytest.mark.parametrize("ttt_steps", [1, 3])
def test_fused_losses_of_speculators_allocate_what_is_accounted(ttt_steps, monkeypatch):
    """The published functions, with kernels that are not launched, on a GPU's dtypes."""
    module, shape = peers.speculators().fused, replace(SMALL, dtype="bfloat16", ttt_steps=ttt_steps)
    for kernel in ("loss_forward_kernel", "loss_backward_kernel"):
        monkeypatch.setattr(module, kernel, collections.defaultdict(lambda: lambda *_, **__: None))
    inputs = make_inputs(shape)
    ours = account(PROVIDERS[FUSED](inputs))

    def row_loss(logits, targets):
        return module.fused_lk_hybrid_loss(logits.unsqueeze(0), targets.unsqueeze(0)).squeeze(0)

    def theirs():
        with torch.no_grad():
            targets = torch.nn.functional.linear(inputs.target_hidden, inputs.target_draft_weight)
        return eager.over_steps(inputs, targets, row_loss)

    published = account(theirs)
    assert (ours.peak, ours.after_forward) == (published.peak, published.after_forward)


def test_a_storage_counts_once_until_its_last_tensor_is_gone():
    given = torch.zeros(10)
    with Accounting() as seen:
        x = torch.empty(1000)
        y, given_too = x[:10].view(2, 5), given.view(2, 5)
        assert seen.live_bytes == 4000
        del x
        assert seen.live_bytes == 4000
        torch.add(y, given_too, out=y)
        del y
        assert seen.live_bytes == 0
        torch.zeros(2000)
    assert (seen.live_bytes, seen.peak) == (0, 8000)


def test_registered_operators_are_refused():
    @torch.library.custom_op("accounting_test::hidden", mutates_args=())
    def hidden(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(10**6).sum() + x

    with Accounting(), pytest.raises(RuntimeError, match="hides what its body allocates"):
        hidden(torch.zeros(()))
