"""A batch that is spread over ranks: `group=` gives the loss, gradients and metrics of one process with all of it."""

from __future__ import annotations

import processes
import pytest
import torch
import torch.distributed as dist
from test_distributed import ddp, fsdp
from torch import nn

import fused_lk

TOKENS, STEPS, H, V = 12, 3, 8, 30
RANKS = range(processes.WORLD_SIZE)
WRAPPERS = {"ddp": ddp, "fsdp": fsdp}
# What one pass serves, what waits for the acceptance, and the oracle; each reduction; weights of positions.
LOSSES = {
    "alpha": {"objective": "alpha", "position_decay": 0.8},
    "lambda": {"position_decay": 0.8},
    "lambda, oracle": {"impl": "reference", "position_decay": 0.8},
    "lambda per token": {"lambda_per": "token"},
    "lambda given": {"kl_weight": 0.3},
    "kl, recomputed": {"objective": "kl", "plan": "recompute"},
    "sum": {"objective": "tv", "reduction": "sum"},
    "by position": {"reduction": "position"},
    "by position, oracle": {"reduction": "position", "impl": "reference"},
    "none": {"reduction": "none"},
    "denominator": {"denominator": 11.0},
}
EMPTY = {"uneven": None, "empty rank": 1, "nothing": "all"}
SCENARIOS = [(wrapper, name, empty) for wrapper in WRAPPERS for name in LOSSES for empty in EMPTY]
SCENARIOS = [x for x in SCENARIOS if x[2] != "nothing" or x[:2] in (("ddp", "alpha"), ("ddp", "lambda"))]


class Model(nn.Module):
    """K steps of a body, and the loss in the forward."""

    def __init__(self, group=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(H, H), nn.Tanh(), nn.Linear(H, H))
        self.head = nn.Linear(H, V)
        self.loss = fused_lk.LKLoss(**options, group=group)

    def forward(self, x, logits, mask):
        hidden = [x]
        for _ in range(STEPS):
            hidden.append(self.body(hidden[-1]))
        target = fused_lk.Target.from_logits(logits)
        pairs = fused_lk.Pairs(mask, torch.arange(x.shape[0]).expand(STEPS, -1), position_dim=0)
        out = self.loss(hidden[1:], self.head.weight, target, bias=self.head.bias, pairs=pairs)
        # Per token, a user reduces; the whole batch's sum of losses, by the number of ranks as gradients are averaged.
        ranks = dist.get_world_size() if self.loss.options["group"] is not None else 1
        scalar = out.loss.sum() * ranks if self.loss.options["reduction"] == "none" else out.loss.sum()
        return scalar, out


def make_batch(empty):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(len(RANKS), TOKENS, H, generator=generator)
    logits = 2 * torch.randn(len(RANKS), TOKENS, V, generator=generator)
    share = torch.tensor([0.9, 0.3]).view(2, 1, 1)
    mask = torch.rand(len(RANKS), STEPS, TOKENS, generator=generator)
    mask = mask * (torch.rand(len(RANKS), STEPS, TOKENS, generator=generator) < share)
    mask[1, 2] = 0  # a position that one rank has no token of
    if empty == "all":
        mask[:] = 0
    elif empty is not None:
        mask[empty] = 0
    return x, logits, mask


def full(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def train(rank):
    results = {}
    for wrapper, name, empty in SCENARIOS:
        model = WRAPPERS[wrapper](Model(dist.group.WORLD, **LOSSES[name]))
        loss, out = model(*(x[rank] for x in make_batch(EMPTY[empty])))
        loss.backward()
        inner = getattr(model, "module", model)
        gradients = {name: full(p.grad) for name, p in inner.named_parameters()}
        results[wrapper, name, empty] = loss.detach(), out.metrics(), gradients
    own = [Model(**LOSSES["lambda"])(*(x[rank] for x in make_batch(empty)))[1] for empty in (None, 1)]
    reduced = own[0].all_reduced(dist.group.WORLD)
    assert reduced.loss is own[0].loss
    merged = fused_lk.LKSums.merged(own).all_reduced(dist.group.WORLD)
    return results, [x.metrics() for x in (own[0], reduced, merged)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return processes.run(train, tmp_path_factory.mktemp("group"))


def whole(name, empty):
    """`(loss, output, gradients)` of one process."""
    x, logits, mask = make_batch(empty)
    model = Model(**LOSSES[name])
    loss, out = model(x.flatten(0, 1), logits.flatten(0, 1), mask.transpose(0, 1).flatten(1))
    loss.backward()
    return loss.detach(), out, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: "-".join(s))
def test_one_process_with_the_whole_batch(ranks, scenario):
    _, name, empty = scenario
    loss, out, gradients = whole(name, EMPTY[empty])
    by_rank = [results[scenario] for results, _ in ranks]
    torch.testing.assert_close(sum(of_rank[0] for of_rank in by_rank) / len(RANKS), loss, rtol=1e-5, atol=1e-7)
    for _, metrics, of_rank in by_rank:
        assert metrics == pytest.approx(out.metrics(), rel=1e-5, abs=1e-7)
        for parameter, got in of_rank.items():
            want = gradients[parameter]
            assert (got - want).abs().max() <= 1e-5 * want.abs().max(), parameter
    if empty == "empty rank":
        assert by_rank[1][0] == 0
    if empty != "nothing":
        assert loss > 0


def test_sums_that_are_reduced_by_hand(ranks):
    expected = whole("lambda", None)[1]
    both = fused_lk.LKSums.merged([expected, whole("lambda", 1)[1]]).metrics()
    for _, (own, reduced, merged) in ranks:
        for name in ("acceptance_rate_0", "accuracy_1", "kl_2", "num_tokens_0", "acceptance_length", "num_blocks"):
            assert reduced[name] == pytest.approx(expected.metrics()[name], rel=1e-5), name
            assert merged[name] == pytest.approx(both[name], rel=1e-5), name
        assert own["num_tokens_0"] < reduced["num_tokens_0"]


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_what_the_group_is_under_compilation(impl, tmp_path):
    """One rank: the collectives are traced, and change nothing."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        hidden, weight = torch.randn(6, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
        target = fused_lk.Target.from_logits(torch.randn(6, V))

        def step(hidden, weight, group):
            out = fused_lk.lk_loss(hidden, weight, target, impl=impl, group=group)
            return out.loss, out.acceptance_rate, out.num_tokens

        compiled = torch.compile(step, fullgraph=impl == "torch", backend="aot_eager")
        expected = step(hidden, weight, None)
        for got in (step(hidden, weight, dist.group.WORLD), compiled(hidden, weight, dist.group.WORLD)):
            for ours, wanted in zip(got, expected, strict=True):
                torch.testing.assert_close(ours, wanted)
            ours, wanted = (torch.autograd.grad(x[0], weight, retain_graph=True)[0] for x in (got, expected))
            torch.testing.assert_close(ours, wanted)
    finally:
        dist.destroy_process_group()
