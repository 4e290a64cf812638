"""The examples over ranks: the numbers and gradients of one process with everything, and the scripts themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from test_example import load
from torch.nn.parallel import DistributedDataParallel

import fused_lk

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LENGTH = 23
# Where rank 0's chunk of a sequence ends: the halo of the uneven chunk is most of the other.
CUTS = (12, 17)
MASKS = ("uneven", "second rank alone", "nothing")


def long_sequence(example, mask):
    """In float64: tokens, states, loss mask, head."""
    tokens, states, loss_mask = (x[:, :LENGTH] for x in example.make_batch(3, torch.float64))
    loss_mask = torch.rand(loss_mask.shape, generator=torch.Generator().manual_seed(4)) < 0.6
    if mask == "second rank alone":  # what rank 0 scores are rows of its halo
        loss_mask[:, : CUTS[0]] = False
    return (tokens, states, loss_mask & (mask != "nothing")), example.make_head(torch.float64)


def trained(model, batch, head):
    out = model(*batch, head)
    out.loss.backward()
    inner = getattr(model, "module", model)
    return out.loss.detach(), out.metrics(), {name: p.grad for name, p in inner.named_parameters()}


def on_ranks(rank):
    example = load("context_parallel_ttt")
    results = {}
    for cut in CUTS:
        for mask in MASKS:
            batch, head = long_sequence(example, mask)
            chunk = [x.split([cut, LENGTH - cut], 1)[rank] for x in batch]
            model = DistributedDataParallel(example.Draft(dist.group.WORLD).double())
            results[cut, mask] = trained(model, chunk, head)
    ddp = load("ddp")
    table, target_lm_head = ddp.make_target()
    model = DistributedDataParallel(ddp.Draft(dist.group.WORLD))
    of_ddp = trained(model, ddp.make_batch(table, 0, rank), fused_lk.TargetHead(target_lm_head))
    with pytest.raises(ValueError) as refused:
        example.with_halo(torch.zeros(2, 3), dist.group.WORLD)
    return results, of_ddp, str(refused.value)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return processes.run(on_ranks, tmp_path_factory.mktemp("examples"))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cut", CUTS)
def test_a_sharded_sequence_is_the_whole_one(ranks, cut, mask):
    """Loss, every metric (lambda and lengths among them) and every gradient, in float64."""
    example = load("context_parallel_ttt")
    batch, head = long_sequence(example, mask)
    loss, metrics, gradients = trained(example.Draft().double(), batch, head)
    assert (loss > 0) == (mask != "nothing")
    by_rank = [results[cut, mask] for results, *_ in ranks]
    torch.testing.assert_close(sum(x for x, *_ in by_rank) / len(by_rank), loss, rtol=1e-12, atol=1e-15)
    for _, got, of_rank in by_rank:
        assert got == pytest.approx(metrics, rel=1e-12, abs=1e-15)
        for name, want in gradients.items():
            assert (of_rank[name] - want).abs().max() <= 1e-12 * want.abs().max(), name
    if mask == "second rank alone" and cut == CUTS[0]:
        assert by_rank[0][0] > 0, "pairs that cross the cut are scored on the rank of their draft row"


def test_a_chunk_shorter_than_the_halo_is_refused(ranks):
    assert all("chunks of at least 4 rows" in message and "got 3" in message for *_, message in ranks)


def test_ddp_is_one_process(ranks):
    ddp = load("ddp")
    table, target_lm_head = ddp.make_target()
    batch = [torch.cat(x) for x in zip(*(ddp.make_batch(table, 0, rank) for rank in (0, 1)), strict=True)]
    loss, metrics, gradients = trained(ddp.Draft(), batch, fused_lk.TargetHead(target_lm_head))
    counts = batch[2][:, 2:].sum(1).view(2, -1).sum(1)
    assert counts[0] > 1.3 * counts[1], "a mean of the ranks' means would be another number"
    by_rank = [of_ddp for _, of_ddp, _ in ranks]
    torch.testing.assert_close(sum(x for x, *_ in by_rank) / len(by_rank), loss, rtol=1e-5, atol=0)
    for _, got, of_rank in by_rank:
        assert got == pytest.approx(metrics, rel=1e-5)
        for name, want in gradients.items():
            assert (of_rank[name] - want).abs().max() <= 1e-5 * want.abs().max(), name


@pytest.mark.parametrize("name", ["context_parallel_ttt", "ddp"])
def test_under_torchrun(name):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    command = [*launcher, EXAMPLES / f"{name}.py", "--steps", "30"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", run.stdout)]
    assert len(losses) >= 5, "one rank prints"
    assert losses[-1] < 0.9 * losses[0]
