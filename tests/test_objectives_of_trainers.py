"""What trainers of block drafters minimise: DFlash, D-PACE, and DSpark with its confidence head.

Each objective is here three times: as a call of ours, written out by hand (float64 of it is the truth), and as
SpecForge 0.2.0 publishes it. Element j of the block at anchor a drafts token a + j + 1. (DFlash has the anchor itself
in slot 0, and never scores it.)
"""

from __future__ import annotations

import importlib
import itertools
import math

import hard_rows
import peers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_lk
from fused_lk import positions

IMPLS = ["torch", "triton"]
B, S, A, K, V = 2, 13, 3, 4, 61
GAMMA, SMOOTHING = 3.0, 0.3
ROWS = ("normal", "temperatures", "trained", "sure_of_the_same", "sure_alike")


class Batch:
    """Draft and target hidden states are the logits of a family of rows, because both heads are the identity."""

    def __init__(self, rows: str = "trained") -> None:
        generator = torch.Generator().manual_seed(0)
        z, t = (x.view(B, S, V) for x in hard_rows.make(rows, B * S, V))
        self.target_hidden = t
        # Mostly what the target says, so that sure rows have labels that they are sure of.
        guessed = torch.randint(V, (B, S), generator=generator)
        said = F.pad(t.argmax(-1)[:, :-1], (1, 0))
        self.tokens = torch.where(torch.rand(B, S, generator=generator) < 0.3, guessed, said)
        self.anchors = torch.tensor([[0, 6, -1], [2, 8, 10]])
        self.loss_mask = torch.ones(B, S)
        self.loss_mask[0, 8] = 0  # a gap inside the block at anchor 6
        self.loss_mask[1, 4:6] = 0
        rows_met = (self.anchors.unsqueeze(-1) + torch.arange(K)).clamp(0, S - 1)
        self.hidden = z[torch.arange(B).view(B, 1, 1), rows_met]
        self.labels = F.pad(self.tokens, (0, 1))[torch.arange(B).view(B, 1, 1), rows_met + 1]
        self.confidence = torch.randn(B, A, K, dtype=torch.float64, generator=generator)

    def leaves(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Draft hidden states, head, and the logits of the confidence head."""
        head = torch.eye(V, dtype=dtype)
        return tuple(x.to(dtype, copy=True).requires_grad_() for x in (self.hidden, head, self.confidence))

    def slots(self) -> list[tuple[int, int, int]]:
        """`(sequence, block, element)` of each token that counts."""
        found = []
        for b, a, j in itertools.product(range(B), range(A), range(K)):
            token = int(self.anchors[b, a]) + j + 1
            if self.anchors[b, a] >= 0 and token < S and self.loss_mask[b, token] > 0:
                found.append((b, a, j))
        return found

    def slots_before_gaps(self) -> list[tuple[int, int, int]]:
        """DSpark ends a block at the first token that does not count."""
        slots = set(self.slots())
        return [(b, a, j) for b, a, j in sorted(slots) if all((b, a, i) in slots for i in range(j))]


# By hand: a loop over tokens.


def surprise(batch, hidden, head, slot):
    """-log q of the label."""
    return -(head @ hidden[slot]).log_softmax(0)[batch.labels[slot]]


def dflash_by_hand(batch, hidden, head, confidence):
    terms = [(math.exp(-slot[2] / GAMMA), surprise(batch, hidden, head, slot)) for slot in batch.slots()]
    return sum(w * x for w, x in terms) / sum(w for w, _ in terms)


def dpace_by_hand(batch, hidden, head, confidence):
    total = 0
    for _, block in itertools.groupby(batch.slots(), lambda slot: slot[:2]):
        surprises = [surprise(batch, hidden, head, slot) for slot in block]
        smooth = [(1 - SMOOTHING) * math.exp(-float(x.detach())) + SMOOTHING for x in surprises]
        reached = list(itertools.accumulate(smooth, lambda x, y: x * y))
        total += sum(sum(reached[j:]) * x for j, x in enumerate(surprises))
    return total / B


def dspark_by_hand(batch, hidden, head, confidence):
    total = weights = 0
    for slot in batch.slots_before_gaps():
        b, a, j = slot
        q, p = ((head @ hidden[slot]).softmax(0), batch.target_hidden.to(hidden)[b, batch.anchors[b, a] + j].softmax(0))
        accepted = torch.minimum(p, q).sum().detach()
        c = confidence[slot]
        of_confidence = -(accepted * F.logsigmoid(c) + (1 - accepted) * F.logsigmoid(-c))
        loss = 0.1 * surprise(batch, hidden, head, slot) + 0.9 * (q - p).abs().sum() + of_confidence
        total, weights = total + math.exp(-j / GAMMA) * loss, weights + math.exp(-j / GAMMA)
    return total / weights


# Ours: one call each.


def target_of(batch, hidden, impl):
    return fused_lk.Target.from_hidden(batch.target_hidden.to(hidden), torch.eye(V).to(hidden), impl=impl)


def falling(pairs):
    """exp(-j / gamma) as a decay, and the sum of these weights over the batch, as the denominator."""
    decay = math.exp(-1 / GAMMA)
    return {"position_decay": decay, "denominator": (decay ** torch.arange(K) * pairs.weight_sum).sum().expand(K)}


def dflash(batch, hidden, head, confidence, impl):
    pairs = fused_lk.Pairs.blocks(batch.anchors, K, batch.loss_mask)
    options = {"objective": "ce", "labels": batch.labels, "pairs": pairs, "impl": impl, **falling(pairs)}
    return fused_lk.lk_loss(hidden, head, target_of(batch, hidden, impl), **options).loss


def dpace(batch, hidden, head, confidence, impl):
    pairs = fused_lk.Pairs.blocks(batch.anchors, K, batch.loss_mask)

    def objective(d):
        ce = d.terms["ce"]
        return ce * positions.dpace_weights(torch.exp(-ce), pairs.supervised, SMOOTHING, dim=-1)

    options = {"terms": ("ce",), "labels": batch.labels, "pairs": pairs, "impl": impl, "reduction": "sum"}
    return fused_lk.lk_loss(hidden, head, target_of(batch, hidden, impl), objective=objective, **options).loss / B


def dspark_output(batch, hidden, head, impl):
    pairs = fused_lk.Pairs.blocks(batch.anchors, K, batch.loss_mask, ends_at_gap=True)
    options = {"labels": batch.labels, "pairs": pairs, "impl": impl, **falling(pairs)}
    target = target_of(batch, hidden, impl)
    return pairs, fused_lk.lk_loss(hidden, head, target, objective={"ce": 0.1, "l1": 0.9}, **options)


def dspark(batch, hidden, head, confidence, impl):
    pairs, out = dspark_output(batch, hidden, head, impl)
    w = positions.dflash_weights(K, GAMMA, first=0) * pairs.supervised
    of_confidence = F.binary_cross_entropy_with_logits(confidence, out.token_acceptance, reduction="none")
    return out.loss + (w * of_confidence).sum() / w.sum()


# As published: SpecForge's own models, whose draft only hands over its hidden states.


class Head(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return F.linear(x, self.weight)


class DraftOf(nn.Module):
    """DSpark's two heads: no Markov term, and confidence logits that are given."""

    confidence_head = True

    def __init__(self, confidence):
        super().__init__()
        self.confidence = confidence

    def apply_logits_head(self, logits, **_):
        return logits

    def predict_confidence(self, hidden, **_):
        return self.confidence


def published(name, batch, hidden, head, confidence):
    """The loss, and the metrics."""
    with peers.warnings.catch_warnings():
        peers.warnings.filterwarnings("ignore", message="flash_attn is not found")
        module = importlib.import_module("specforge.algorithms.common.dflash_family_model")
    is_dspark = name == "dspark"
    kind = module.OnlineDSparkModel if is_dspark else module.OnlineDFlashModel
    options = {} if is_dspark else {"loss_type": name, "dpace_alpha": SMOOTHING}
    options |= {"attention_backend": "sdpa", "loss_decay_gamma": GAMMA, "objective_chunk_blocks": 0}
    block = K if is_dspark else K + 1
    model = kind(DraftOf(confidence), Head(head), nn.Identity(), mask_token_id=0, block_size=block, **options)
    drafted = hidden if is_dspark else F.pad(hidden, (0, 0, 1, 0))  # the anchor's slot
    anchors, kept = batch.anchors.clamp(min=0), batch.anchors >= 0
    model._forward_draft_blocks = lambda **_: (anchors, kept, drafted.flatten(1, 2))
    more = {"target_last_hidden_states": batch.target_hidden.to(hidden)} if is_dspark else {}
    loss, _, metrics = model(batch.tokens, None, batch.loss_mask, **more)
    return loss, metrics


OURS = {"dflash": dflash, "dpace": dpace, "dspark": dspark}
BY_HAND = {"dflash": dflash_by_hand, "dpace": dpace_by_hand, "dspark": dspark_by_hand}


def with_gradients(loss, leaves):
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]


def by_hand(name, batch, dtype):
    leaves = batch.leaves(dtype)
    return with_gradients(BY_HAND[name](batch, *leaves), leaves)


def ours(name, batch, dtype, impl):
    leaves = batch.leaves(dtype)
    return with_gradients(OURS[name](batch, *leaves, impl), leaves)


@pytest.mark.parametrize("name", OURS)
def test_what_is_written_out_is_what_is_published(name):
    batch = Batch("normal")
    leaves = batch.leaves(torch.float32)
    theirs = with_gradients(published(name, batch, *leaves)[0], leaves)
    for got, want in zip(theirs, by_hand(name, batch, torch.float64), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", OURS)
def test_values_and_gradients(name, rows, impl):
    """In float64 they are the truth's, to the rounding of the positions' weights, which are float32. In float32 they
    are no further from it than the published loss is."""
    batch = Batch(rows)
    truth = by_hand(name, batch, torch.float64)
    for got, want in zip(ours(name, batch, torch.float64, impl), truth, strict=True):
        torch.testing.assert_close(got, want, rtol=3e-7, atol=1e-12)
    leaves = batch.leaves(torch.float32)
    theirs = with_gradients(published(name, batch, *leaves)[0], leaves)
    for got, eager, want in zip(ours(name, batch, torch.float32, impl), theirs, truth, strict=True):
        rounding = 16 * torch.finfo(torch.float32).eps * want.abs().max()
        assert (got - want).abs().max() <= 1.5 * (eager - want).abs().max() + rounding


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OURS)
def test_sure_rows_keep_their_digits(name, impl):
    """Of each row's gradient, which may be 1e-9 of another's. The published softmaxes lose all digits of some."""
    batch = Batch("sure_of_the_same")
    truth = by_hand(name, batch, torch.float64)[1]
    leaves = batch.leaves(torch.float32)
    theirs = with_gradients(published(name, batch, *leaves)[0], leaves)[1]
    got = ours(name, batch, torch.float32, impl)[1]
    norm = truth.norm(dim=-1)
    error, eager = ((x - truth).norm(dim=-1)[norm > 0] / norm[norm > 0] for x in (got, theirs))
    assert error.max() < 2e-3
    assert eager.max() > 0.5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OURS)
def test_what_does_not_count_is_not_read(name, impl):
    """An ignored token that overflowed makes the published loss NaN. Ours is the truth, and its gradient there is 0."""
    batch = Batch()
    truth = by_hand(name, batch, torch.float64)
    ignored = torch.ones(B, A, K, dtype=torch.bool)
    ignored[tuple(zip(*(batch.slots_before_gaps() if name == "dspark" else batch.slots()), strict=True))] = False
    assert ignored.any()
    batch.hidden[ignored] = float("inf")
    leaves = batch.leaves(torch.float32)
    assert published(name, batch, *leaves)[0].isnan()
    got = ours(name, batch, torch.float32, impl)
    assert not got[1][ignored].any()
    for x, want in zip(got, truth, strict=True):
        torch.testing.assert_close(x.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["dflash", "dpace"])
def test_nothing_that_counts(name, impl):
    """The published DFlash is 0 / 0. (DSpark's raises.) Ours is 0, with zero gradients."""
    batch = Batch()
    batch.loss_mask.zero_()
    leaves = batch.leaves(torch.float32)
    assert published(name, batch, *leaves)[0].isnan() == (name == "dflash")
    for x in ours(name, batch, torch.float32, impl):
        assert not x.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", ROWS)
def test_the_target_of_confidence(rows, impl):
    """alpha, detached: 1 - l1 / 2. Its products along a block are the published acceptance length."""
    batch = Batch(rows)
    hidden, head, confidence = batch.leaves(torch.float32)
    pairs, out = dspark_output(batch, hidden, head, impl)
    assert not out.token_acceptance.requires_grad
    assert sorted(batch.slots_before_gaps()) == [tuple(x) for x in pairs.supervised.nonzero().tolist()]
    assert pairs.supervised.sum() < fused_lk.Pairs.blocks(batch.anchors, K, batch.loss_mask).supervised.sum()
    _, metrics = published("dspark", batch, hidden, head, confidence)
    total, count = metrics["ratio_metrics"]["tau_probabilistic"]
    torch.testing.assert_close(out.acceptance_length, total / count, rtol=1e-5, atol=1e-6)
