"""DDP and FSDP2 around a draft whose forward computes the loss: the gradients of one process with the whole batch."""

from __future__ import annotations

import copy

import processes
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fused_lk

# FSDP2 of torch 2.6 trains nothing on a CPU: it calls what a stream there has only in later versions, where it
# does nothing, and its backward finds its own parameters modified.
FSDP_TRAINS = hasattr(torch.cpu.Stream, "record_event")
if not FSDP_TRAINS:
    torch.cpu.Stream.record_event = torch.cpu.Stream.wait_event = lambda self, event=None: None

TOKENS, H, H_TARGET, V_DRAFT, V_TARGET = 20, 8, 6, 38, 60
RANKS = range(processes.WORLD_SIZE)


class Model(nn.Module):
    """A draft body, a head that is read as a weight, and a layer that no loss reaches."""

    def __init__(self, objective, mixed=False):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(H, H), nn.Tanh(), nn.Linear(H, H))
        self.head = nn.Linear(H, V_DRAFT)
        self.unused = nn.Linear(H, 2)
        self.objective = objective
        generator = torch.Generator().manual_seed(1)
        t2d = torch.zeros(V_TARGET, dtype=torch.bool)
        t2d[torch.randperm(V_TARGET, generator=generator)[:V_DRAFT]] = True
        weight = torch.randn(V_TARGET, H_TARGET, generator=generator)
        self.target_head = fused_lk.TargetHead(weight.bfloat16() if mixed else weight, fused_lk.DraftVocab(t2d))

    def forward(self, x, states, mask):
        """The mean over every rank's tokens, times the number of ranks, because gradients are averaged over them."""
        hidden = self.body(x)
        target = fused_lk.Target.from_hidden(states, self.target_head)
        head = {"bias": self.head.bias, "pairs": fused_lk.Pairs(mask)}
        count = summed(mask.sum().float())
        if self.objective == "primitive":  # lambda of the acceptance on all ranks, from the primitive
            d = fused_lk.lk_divergences(hidden, self.head.weight, target, **head)
            lam = torch.exp(-3 * summed(d.acceptance.detach().sum()) / count)
            return num_ranks() * (lam * d.kl + (1 - lam) * (mask.float() - d.acceptance)).sum() / count
        lam = {"kl_weight": 0.4} if self.objective == "lambda" else {}
        out = fused_lk.lk_loss(
            hidden, self.head.weight, target, objective=self.objective, denominator=count, **lam, **head,
            plan="recompute" if lam else "auto",
        )  # fmt: skip
        return num_ranks() * out.loss


def num_ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(x):
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def make_batch(masked_rank=None, dtype=torch.float32):
    """Of all ranks; each rank's mask keeps another number of tokens, and one rank's may keep none."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(len(RANKS), TOKENS, H, generator=generator)
    states = torch.randn(len(RANKS), TOKENS, H_TARGET, generator=generator).to(dtype)
    mask = torch.rand(len(RANKS), TOKENS, generator=generator) < torch.tensor([0.9, 0.4]).unsqueeze(1)
    if masked_rank is not None:
        mask[masked_rank] = False
    return x, states, mask


def share(batch, rank):
    return tuple(x[rank] for x in batch)


def ddp(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp(model, **options):
    mesh = init_device_mesh("cpu", (len(RANKS),))
    fully_shard(model.body, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp_resharded(model):
    """The head is gathered again for the backward."""
    return fsdp(model, reshard_after_forward=True)


def fsdp_mixed(model):
    return fsdp(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


WRAPPERS = {wrap.__name__: wrap for wrap in (ddp, *((fsdp, fsdp_resharded, fsdp_mixed) if FSDP_TRAINS else ()))}
SCENARIOS = [
    (wrapper, objective, masked_rank)
    for wrapper in WRAPPERS
    for objective, masked_rank in (("alpha", None), ("lambda", None), ("primitive", None), ("alpha", 1), ("lambda", 0))
    if (wrapper, objective) != ("fsdp_mixed", "primitive")
]


def full(x):
    return x if x is None or not hasattr(x, "full_tensor") else x.full_tensor()


def train(rank):
    """Every scenario: the loss and all gradients; and what bare DTensors say."""
    results = {}
    for wrapper, objective, masked_rank in SCENARIOS:
        mixed = wrapper == "fsdp_mixed"
        model = WRAPPERS[wrapper](Model(objective, mixed))
        batch = make_batch(masked_rank, torch.bfloat16 if mixed else torch.float32)
        loss = model(*share(batch, rank))
        loss.backward()
        inner = getattr(model, "module", model)
        results[wrapper, objective, masked_rank] = (
            loss.detach(),
            {name: full(p.grad) for name, p in inner.named_parameters()},
        )
    return results, refusals(rank), replicated()


def on_two_heads(wrap):
    """Losses and gradients of a draft head and a target head that `wrap` has made of plain tensors."""
    model, (hidden, states, mask) = Model("lambda"), share(make_batch(), 0)
    given = (model.head.weight, model.head.bias, model.target_head.weight, torch.linspace(-1, 1, V_TARGET))
    results = {}
    for plan in ("one_pass", "recompute"):
        weight, bias, *target_head = (wrap(x.detach().clone()) for x in given)
        leaves = [weight.requires_grad_(), bias.requires_grad_()]
        head = fused_lk.TargetHead(target_head[0], model.target_head.vocab, target_head[1])
        target = fused_lk.Target.from_hidden(states, head)
        out = fused_lk.lk_loss(
            hidden, weight, target, bias=bias, mask=mask, kl_weight=0.3, plan=plan, impl="torch",
        )  # fmt: skip
        out.loss.backward()
        results[plan] = (out.loss.detach(), *(x.grad for x in leaves))
    return results


def replicated():
    """The same of DTensors that replicate the heads: placements of the gradients, and all as plain tensors."""
    mesh = init_device_mesh("cpu", (len(RANKS),))
    results = on_two_heads(lambda x: distribute_tensor(x, mesh, [Replicate()]))
    placements = {str(x.placements) for _, *gradients in results.values() for x in gradients}
    return placements, {plan: [full(x) for x in values] for plan, values in results.items()}


def refusals(rank):
    """Messages for weights that are shards: outside of a forward, and inside where another unit owns the head."""
    batch = share(make_batch(), rank)
    hidden, target = batch[0], fused_lk.Target.from_logits(torch.zeros(TOKENS, V_DRAFT))
    sharded = fsdp(Model("alpha"))
    assert isinstance(sharded, FSDPModule)
    own_unit = Model("alpha")
    mesh = init_device_mesh("cpu", (len(RANKS),))
    fully_shard(own_unit.head, mesh=mesh)
    fully_shard(own_unit, mesh=mesh)
    plain = Model("alpha").head
    head = sharded.head
    calls = {
        "draft_lm_head_weight": lambda: fused_lk.lk_loss(hidden, head.weight, target),
        "bias": lambda: fused_lk.lk_loss(hidden, plain.weight, target, bias=head.bias),
        "lm_head_weight": lambda: fused_lk.TargetHead(head.weight),
        "hidden": lambda: fused_lk.Target.from_hidden(head.weight.detach(), plain.weight),
        "draft_hidden": lambda: fused_lk.lk_loss(head.weight, plain.weight, target),
        "own unit": lambda: own_unit(*batch),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except TypeError as error:
            messages[name] = str(error)
    return messages


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return processes.run(train, tmp_path_factory.mktemp("distributed"))


def alone(objective, masked_rank):
    """Loss and gradients of one process with all tokens in one batch."""
    model = Model(objective)
    loss = model(*(x.flatten(0, 1) for x in make_batch(masked_rank)))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def alone_mixed(objective, masked_rank):
    """In bf16, rank by rank, the gradients averaged in float32: what the policy asks for."""
    batch = make_batch(masked_rank, torch.bfloat16)
    count = batch[2].sum().float()
    total, gradients = 0.0, {}
    for rank in RANKS:
        model = Model(objective, mixed=True).bfloat16()
        x, states, mask = share(batch, rank)
        d = fused_lk.lk_divergences(
            model.body(x.bfloat16()), model.head.weight, fused_lk.Target.from_hidden(states, model.target_head),
            bias=model.head.bias, mask=mask,
        )  # fmt: skip
        per_token = -d.log_acceptance if objective == "alpha" else 0.4 * d.kl + 0.6 * (mask.float() - d.acceptance)
        loss = per_token.sum() / count
        loss.backward()
        total = total + loss.detach()
        for name, p in model.named_parameters():
            if p.grad is not None:
                gradients[name] = gradients.get(name, 0) + p.grad.float()
    return total, gradients


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: "-".join(map(str, s)))
def test_gradients_of_one_process(ranks, scenario):
    wrapper, objective, masked_rank = scenario
    by_rank = [results[scenario] for results, *_ in ranks]
    mixed = wrapper == "fsdp_mixed"
    loss, gradients = (alone_mixed if mixed else alone)(objective, masked_rank)
    torch.testing.assert_close(sum(of_rank for of_rank, _ in by_rank) / len(RANKS), loss, rtol=1e-5, atol=0)
    if masked_rank is not None:
        assert by_rank[masked_rank][0] == 0
    for _, of_rank in by_rank:
        for name, got in of_rank.items():
            want = gradients.get(name)
            if name.startswith("unused"):
                assert want is None and (got is None or not got.any()), name
                continue
            assert got.dtype == torch.float32
            error = (got - want).abs().max() / want.abs().max()
            assert error <= (1e-2 if mixed else 1e-5), f"{name}: {error:.1e}"


def test_shards_are_refused(ranks):
    for _, messages, _ in ranks:
        assert set(messages) == {
            "draft_lm_head_weight", "bias", "lm_head_weight", "hidden", "draft_hidden", "own unit",
        }  # fmt: skip
        for name, message in messages.items():
            assert "a DTensor with placements" in message, name
            assert "let the root module own the head" in message and "full_tensor()" in message
            assert message.startswith(f"expected {'draft_lm_head_weight' if name == 'own unit' else name} to be")


def test_replicated_heads(ranks):
    """Taken as this rank's plain tensors. Their gradients are DTensors again."""
    expected = on_two_heads(lambda x: x)
    for _, _, (placements, results) in ranks:
        assert placements == {"(Replicate(),)"}
        for plan, values in expected.items():
            for got, want in zip(results[plan], values, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_the_scenarios_differ(ranks):
    """The masks are unequal, so that a mean of the ranks' means would be another gradient."""
    batch = make_batch()
    assert batch[2][0].sum() != batch[2][1].sum()
    model = Model("alpha")
    means = [copy.deepcopy(model) for _ in RANKS]
    for rank, of_rank in zip(RANKS, means, strict=True):
        of_rank(*share(batch, rank)).backward()
    biased = sum(m.head.weight.grad for m in means) / len(RANKS)
    unbiased = ranks[0][0]["ddp", "alpha", None][1]["head.weight"]
    assert (biased - unbiased).abs().max() > 1e-3 * unbiased.abs().max()
