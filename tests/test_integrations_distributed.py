"""The published trainers' own wrapping of their models, on two gloo processes, with and without the integrations."""

from __future__ import annotations

import contextlib
import copy
import functools

import processes
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._flat_param import FlatParamHandle

from fused_lk.integrations import specforge, speculators

RANKS = range(processes.WORLD_SIZE)
# The strategy that SpecForge's own backend is asked for (it takes DDP for NO_SHARD and FSDP1 for the others; FSDP2 it
# does not have), and the dtype that the fp32 parameters are cast to.
SPECFORGE = {
    "DDP": ("NO_SHARD", torch.float32),
    "FSDP1": ("SHARD_GRAD_OP", torch.float32),
    "FSDP1, full shards": ("FULL_SHARD", torch.float32),
    "FSDP1 in bf16": ("SHARD_GRAD_OP", torch.bfloat16),
    "FSDP2": (None, torch.float32),
    "FSDP2 in bf16": (None, torch.bfloat16),
}
FSDP1 = [wrapping for wrapping in SPECFORGE if wrapping.startswith("FSDP1")]
STEPS = (("logits", "compact"), ("compact",))  # what the target is in the micro-batches of each step
RTOL = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SPECULATORS = [torch.float32, torch.bfloat16]
LR = {torch.float32: 0.1, torch.bfloat16: 0.0}  # steps that start from two roundings predict other tokens


def full(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def make_specforge():
    import test_specforge as tests

    model = tests.make_model("lambda")
    model.draft_model.freeze_embedding()  # as SpecForge does with the target's
    return model


def specforge_batch(dtype, rank, step, kind):
    """A rank's own: the two padded sequences of four. On the last step the second rank has nothing supervised."""
    import test_specforge as tests

    supervised = 0.0 if (rank, step) == (1, len(STEPS) - 1) else 0.7
    batch = tests.make_batch(10 * rank + step, kind, dtype=dtype, supervised=supervised)
    return {name: x if x is None or name == "target_head_weight" else x[1:3] for name, x in batch.items()}


def loss_of(lists):
    return sum(0.8**k * loss for k, loss in enumerate(lists[0]))


def detached(lists):
    return [[x.detach() for x in values] for values in lists]


def gradients_of(wrapped):
    """By name, whole, on every rank."""
    if isinstance(wrapped, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            return {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    inner = getattr(wrapped, "module", wrapped)
    return {name: full(p.grad).clone() for name, p in inner.named_parameters() if p.grad is not None}


class FSDP2Backend:
    """What SpecForge's backend does, with `fully_shard`."""

    def __init__(self, dtype):
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        self.options = {"mesh": init_device_mesh("cpu", (len(RANKS),)), "mp_policy": policy}

    def prepare_model(self, model, optimizer_target):
        self.module = fully_shard(model, **self.options)
        self.optimizer = sgd(self.module, self.options["mp_policy"].param_dtype)
        return self.module

    def backward(self, loss, is_boundary):
        self.module.set_requires_gradient_sync(is_boundary)
        loss.backward()

    def step(self):
        self.optimizer.step()


def sgd(module, dtype):
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=LR[dtype])


def prepared(model, strategy, dtype):
    """The backend that holds the model, wrapped as SpecForge's trainer does it; the optimizer is SGD."""
    from specforge.training.backend import FSDPTrainingBackend, ParallelConfig

    config = ParallelConfig(
        len(RANKS), sharding_strategy=strategy, param_dtype=dtype, fsdp_process_group=dist.group.WORLD
    )
    theirs = FSDPTrainingBackend(config, optimizer_factory=functools.partial(sgd, dtype=dtype))
    backend = FSDP2Backend(dtype) if strategy is None else theirs
    backend.prepare_model(model, optimizer_target=model.draft_model)
    return backend


def train_specforge(rank, wrapping, directory):
    """Results and gradients of each step of two models, applied and not; of FSDP1 also what its checkpoint gives."""
    strategy, dtype = SPECFORGE[wrapping]
    theirs = make_specforge()
    ours = specforge.apply(copy.deepcopy(theirs), impl="torch", workspace_mb=0.01)
    results = []
    for model in (ours, theirs):
        backend = prepared(model, strategy, dtype)
        history = []
        for step, kinds in enumerate(STEPS):
            backend.module.zero_grad()
            lists = []
            for i, kind in enumerate(kinds):  # reduced over the ranks with the last one
                lists.append(backend.module(**specforge_batch(dtype, rank, step, kind)))
                backend.backward(loss_of(lists[-1]), is_boundary=i == len(kinds) - 1)
            history.append(([x for results in lists for x in detached(results)], gradients_of(backend.module)))
            backend.step()
        results.append(history)
        if model is ours:
            restored = restore_specforge(rank, wrapping, backend, directory) if wrapping in FSDP1 else None
    return *results, restored


def restore_specforge(rank, wrapping, backend, directory):
    """Results of one batch: of the trained model, of a published one that loads the checkpoint as SpecForge writes it,
    and of an applied one that resumes from it, wrapped; and what the published one misses."""
    from specforge.training.checkpoint import CheckpointManager
    from specforge.training.strategies.base import Eagle3TrainStrategy

    strategy, dtype = SPECFORGE[wrapping]
    state = backend.state_dict()
    assert bool(state["model"]) == (rank == 0), "gathered on one rank"
    filtered = Eagle3TrainStrategy(backend.module).checkpoint_state_filter(state["model"])
    manager = CheckpointManager(directory, wrapping)
    manager.save({"draft_state_dict": filtered, "model": state["model"]} if rank == 0 else None, len(STEPS))
    saved = manager.load(len(STEPS))

    published, resumed = make_specforge(), make_specforge()
    for p in (p for model in (published, resumed) for p in model.parameters() if p.requires_grad):
        torch.nn.init.zeros_(p)
    missing, unexpected = published.draft_model.load_state_dict(saved["draft_state_dict"], strict=False)
    again = prepared(specforge.apply(resumed), strategy, dtype)
    again.load_state_dict({"model": saved["model"]})
    batch = specforge_batch(dtype, rank, 0, "compact")
    with torch.no_grad():
        models = (backend.module, cast(published, dtype), again.module)
        return [detached(model(**batch)) for model in models], missing, unexpected


def cast(model, dtype):
    """Parameters alone, as the policies above do it."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


@functools.cache
def train_alone(dtype):
    """The published model in one process: `(results by rank, gradients)` of each step, from all ranks' batches."""
    model = cast(make_specforge(), dtype)
    optimizer, history = sgd(model, dtype), []
    for step, kinds in enumerate(STEPS):
        model.zero_grad()
        by_rank = []
        for rank in RANKS:
            lists = [model(**specforge_batch(dtype, rank, step, kind)) for kind in kinds]
            (sum(map(loss_of, lists)) / len(RANKS)).backward()
            by_rank.append([x for results in lists for x in detached(results)])
        history.append((by_rank, gradients_of(model)))
        optimizer.step()
    return history


def train_usp(rank):
    """Sequence parallel: each rank has a part of each sequence, and metrics and lambda are those of all parts."""
    import test_specforge as tests
    from specforge import distributed as specforge_distributed

    specforge_distributed._DRAFT_SP_GROUP = specforge_distributed._SP_ULYSSES_GROUP = dist.group.WORLD
    theirs = make_specforge()
    ours = specforge.apply(copy.deepcopy(theirs), **tests.SMALL)
    results = []
    for model in (ours, theirs):
        model._make_adapter = functools.partial(tests.SlicingAdapter, model)
        history = []
        for step, kind in enumerate(("logits", "compact")):
            model.zero_grad()
            lists = model(**tests.make_batch(10 * rank + step, kind))
            loss_of(lists).backward()
            history.append((detached(lists), gradients_of(model)))
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
        for step in range(len(STEPS)):
            batch = tests.make_batch(10 * rank + step, dtype=dtype)
            if (rank, step) == (1, len(STEPS) - 1):
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


def let_fsdp1_run_on_cpu():
    """It takes its streams from an accelerator. A CPU has them, but has to be named, which SpecForge does not.

    Before a checkpoint is written, parameters are copied to the CPU and then freed. Here the copy is the original.
    """
    on_cpu = functools.partialmethod(FullyShardedDataParallel.__init__, device_id=torch.device("cpu"))
    FullyShardedDataParallel.__init__ = on_cpu
    FlatParamHandle.to_cpu = lambda self: contextlib.nullcontext()


def train_all(rank, directory):
    let_fsdp1_run_on_cpu()
    with torch.compiler.set_stance("force_eager"):
        return (
            {wrapping: train_specforge(rank, wrapping, directory) for wrapping in SPECFORGE},
            {dtype: train_speculators(rank, dtype) for dtype in SPECULATORS},
            train_usp(rank),
        )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("integrations")
    return processes.run(train_all, directory, str(directory))


def assert_results_alike(got, want, rtol):
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-7)


def assert_trained_alike(ours, theirs, rtol):
    """Results to `rtol`, gradients relative to the largest entry of each parameter's."""
    for (got, gradients), (want, their_gradients) in zip(ours, theirs, strict=True):
        assert_results_alike(got, want, rtol)
        assert gradients.keys() == their_gradients.keys() and len(gradients) > 5
        for name, expected in their_gradients.items():
            error = (gradients[name] - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
            assert error <= rtol, f"{name}: {error:.1e}"


@pytest.mark.parametrize("wrapping", SPECFORGE)
def test_specforge(ranks, wrapping):
    """Against the published model, wrapped alike, and against it in one process, with the mean of ranks' gradients."""
    rtol = RTOL[SPECFORGE[wrapping][1]]
    with torch.compiler.set_stance("force_eager"):
        alone = train_alone(SPECFORGE[wrapping][1])
    for rank, (of_rank, *_) in zip(RANKS, ranks, strict=True):
        ours, theirs, _ = of_rank[wrapping]
        assert_trained_alike(ours, theirs, rtol)
        assert_trained_alike(ours, [(by_rank[rank], gradients) for by_rank, gradients in alone], rtol)
    losses = [of_rank[wrapping][0][-1][0][0] for of_rank, *_ in ranks]
    assert losses[0][0] != losses[1][0], "each rank has a batch of its own"


@pytest.mark.parametrize("wrapping", FSDP1)
def test_checkpoints_of_specforge(ranks, wrapping):
    """A published model takes what an applied and sharded one saved, and an applied one resumes from it."""
    for of_rank, *_ in ranks:
        (trained, published, resumed), missing, unexpected = of_rank[wrapping][2]
        assert_results_alike(published, trained, RTOL[SPECFORGE[wrapping][1]])
        # The same numbers; their last bits depend on where a product's buffers begin.
        assert_results_alike(resumed, trained, RTOL[torch.float32])
        assert missing == ["embed_tokens.weight"] and not unexpected, "it is frozen: the target has it"


@pytest.mark.parametrize("dtype", SPECULATORS, ids=str)
def test_speculators(ranks, dtype):
    for _, of_rank, _ in ranks:
        assert_trained_alike(*of_rank[dtype], RTOL[dtype])


def test_usp(ranks):
    for *_, of_rank in ranks:
        assert_trained_alike(*of_rank, RTOL[torch.float32])
    rates, losses = zip(*((of_rank[0][0][0][1], of_rank[0][0][0][0]) for *_, of_rank in ranks), strict=True)
    assert rates[0] == rates[1] and losses[0] != losses[1], "acceptance rates are those of all parts"
