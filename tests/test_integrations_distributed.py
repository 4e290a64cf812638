"""The published trainers' own wrapping of their models, on two gloo processes, with and without the integrations."""

from __future__ import annotations

import copy
import functools

import processes
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fused_lk.integrations import specforge, speculators

STEPS = 2
SPECFORGE = ["DDP", "FSDP2", "FSDP2 in bf16", "USP"]
SPECULATORS = [torch.float32, torch.bfloat16]
LR = {torch.float32: 0.1, torch.bfloat16: 0.0}  # steps that start from two roundings predict other tokens


def full(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def train_specforge(rank, wrapping):
    """Losses, metrics and parameters of each step of two models, applied and not, each rank on batches of its own.

    DDP by SpecForge's own backend. Its other one, FSDP1, refuses to start without an accelerator. USP: each rank has a
    part of the sequence, and metrics and lambda are those of all parts.
    """
    import test_specforge as tests
    from specforge import distributed as specforge_distributed
    from specforge.training.backend import FSDPTrainingBackend, ParallelConfig

    theirs = tests.make_model("lambda")
    ours = specforge.apply(copy.deepcopy(theirs), **tests.SMALL)
    results = []
    for model in (ours, theirs):
        dtype = torch.bfloat16 if wrapping == "FSDP2 in bf16" else torch.float32
        if wrapping == "USP":
            specforge_distributed._DRAFT_SP_GROUP = specforge_distributed._SP_ULYSSES_GROUP = dist.group.WORLD
            model._make_adapter = functools.partial(tests.SlicingAdapter, model)
            wrapped = model
        elif wrapping == "DDP":
            backend = FSDPTrainingBackend(ParallelConfig(world_size=processes.WORLD_SIZE, sharding_strategy="NO_SHARD"))
            wrapped = backend.prepare_model(model, optimizer_target=model.draft_model)
        else:
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (processes.WORLD_SIZE,)), mp_policy=policy)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=LR[dtype])
        history = []
        for step in range(STEPS):
            kind = ("logits", "compact")[step % 2]
            # On the last step the second rank has nothing supervised.
            supervised = 0.0 if (rank, step) == (1, STEPS - 1) else 0.7
            lists = wrapped(**tests.make_batch(10 * rank + step, kind, dtype=dtype, supervised=supervised))
            optimizer.zero_grad()
            sum(0.8**k * loss for k, loss in enumerate(lists[0])).backward()
            gradients = {name: full(p.grad).clone() for name, p in wrapped.named_parameters() if p.grad is not None}
            optimizer.step()
            history.append(([[x.detach() for x in values] for values in lists], gradients))
        results.append(history)
    return results


def train_speculators(rank, dtype):
    """As above, sharded by speculators' own function."""
    import test_speculators as tests
    from speculators.train.distributed import apply_fully_sharded

    theirs = tests.make_model()
    ours = speculators.apply(copy.deepcopy(theirs), **tests.SMALL)
    results = []
    for model in (ours, theirs):
        apply_fully_sharded(model, param_dtype=dtype)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR[dtype])
        history = []
        for step in range(STEPS):
            batch = tests.make_batch(10 * rank + step, dtype=dtype)
            if (rank, step) == (1, STEPS - 1):
                batch["loss_mask"] &= False
            tokens, loss, metrics = model(
                **batch, loss_config=tests.PEER.utils.resolve_loss_config("lk_hybrid", "eager")
            )
            optimizer.zero_grad()
            loss.backward()
            gradients = {name: full(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
            history.append(([tokens, [loss.detach()], list(metrics.values())], gradients))
        results.append(history)
    return results


def train_all(rank):
    with torch.compiler.set_stance("force_eager"):
        return (
            {wrapping: train_specforge(rank, wrapping) for wrapping in SPECFORGE},
            {dtype: train_speculators(rank, dtype) for dtype in SPECULATORS},
        )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return processes.run(train_all, tmp_path_factory.mktemp("integrations"))


def assert_trained_alike(ours, theirs, rtol):
    """Results to `rtol`, gradients relative to the largest entry of each parameter's."""
    for (got, gradients), (want, their_gradients) in zip(ours, theirs, strict=True):
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=rtol, atol=1e-7)
        assert gradients.keys() == their_gradients.keys() and len(gradients) > 5
        for name, expected in their_gradients.items():
            error = (gradients[name] - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
            assert error <= rtol, f"{name}: {error:.1e}"


@pytest.mark.parametrize("wrapping", SPECFORGE)
def test_specforge(ranks, wrapping):
    for of_rank, _ in ranks:
        assert_trained_alike(*of_rank[wrapping], rtol=2e-2 if wrapping.endswith("bf16") else 1e-5)
    losses = [of_rank[wrapping][0][-1][0][0] for of_rank, _ in ranks]
    assert losses[0][0] != losses[1][0], "each rank has a batch of its own"
    if wrapping == "USP":
        rates = [of_rank[wrapping][0][0][0][1] for of_rank, _ in ranks]
        assert rates[0] == rates[1], "acceptance rates are those of all ranks"


@pytest.mark.parametrize("dtype", SPECULATORS, ids=str)
def test_speculators(ranks, dtype):
    for _, of_rank in ranks:
        assert_trained_alike(*of_rank[dtype], rtol=1e-5 if dtype == torch.float32 else 2e-2)
