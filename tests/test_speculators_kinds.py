"""Every draft kind of vLLM speculators, trained with and without the integration."""

from __future__ import annotations

import copy

import drafts
import pytest
import torch
from allocations import Allocations
from drafts import KINDS, PEER, H, T, assert_same, batch, make, run

from fused_lk.integrations import speculators
from fused_lk.integrations.speculators.mix import Mixed
from fused_lk.rows import plain

SMALL = {"impl": "torch", "workspace_mb": 0.01}
SEVEN = list(PEER.utils._FUSED_LOSS_FN_MAP)
MIX = '{"ce": 0.1, "tv": 0.9}'
MIXED = [kind for kind in KINDS if kind != "mtp"]
OF_BLOCKS = ["dflash", "dflash2", "dspark", "xpress"]

CONFIGS = [
    *((kind, {}) for kind in KINDS),
    *((kind, {"sample_from_anchor": kind != "dspark"}) for kind in OF_BLOCKS),
    ("dspark", {"markov_head_type": "gated"}),
    ("dspark", {"markov_head_type": "rnn", "sample_from_anchor": False}),
    ("dspark", {"markov_rank": 0, "confidence_head_with_markov": False}),
    ("dspark", {"enable_confidence_head": False}),
    ("dspark", {"draft_vocab_size": drafts.V_TARGET}),
]


def loss_of(kind, loss):
    return None if kind == "mtp" else loss


@pytest.mark.parametrize(("kind", "config"), CONFIGS)
def test_training_is_the_same(kind, config):
    theirs = make(kind, **config)
    ours = speculators.apply(copy.deepcopy(theirs), **SMALL)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (ours, theirs)]
    for step in range(3):
        given = batch(kind, step)
        loss = loss_of(kind, (MIX, "lk_hybrid", "jsd")[step])
        expected = run(theirs, given, loss)
        assert_same(run(ours, given, loss), expected)
        trained = {name for name, x in theirs.named_parameters() if x.requires_grad}
        assert trained - expected[1].keys() == set()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("loss", SEVEN)
@pytest.mark.parametrize("kind", ["eagle3", "peagle", "dspark"])
def test_every_loss(kind, loss):
    model, given = make(kind), batch(kind)
    expected = run(model, given, loss)
    assert_same(run(speculators.apply(model), given, loss), expected)
