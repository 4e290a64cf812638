"""The draft vocabulary: ids there and back, and the offsets that checkpoints store."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_lk import DraftVocab

masks = st.lists(st.booleans(), min_size=1, max_size=40).filter(any)


@settings(max_examples=100)
@given(masks, st.randoms(use_true_random=False))
def test_ids_there_and_back(mask, random):
    t2d = torch.tensor(mask)
    vocab = DraftVocab(t2d)
    ids = [i for i, kept in enumerate(mask) if kept]
    assert (vocab.draft_size, vocab.target_size) == (len(ids), len(mask))
    assert vocab.target_ids.tolist() == ids
    assert vocab.draft_ids.tolist() == [ids.index(i) if kept else -1 for i, kept in enumerate(mask)]
    assert torch.equal(vocab.t2d, t2d)
    assert vocab.d2t.tolist() == [target - draft for draft, target in enumerate(ids)]

    # as checkpoints have it: both, or the offsets alone, of either integer type
    for again in (
        DraftVocab(t2d, vocab.d2t),
        DraftVocab(t2d, vocab.d2t.int()),
        DraftVocab.from_d2t(vocab.d2t, len(mask)),
        vocab.to("cpu"),
    ):
        assert torch.equal(again.target_ids, vocab.target_ids)
        assert torch.equal(again.draft_ids, vocab.draft_ids)
        assert torch.equal(again.t2d, t2d)
        assert again.target_size == vocab.target_size

    # a draft head whose rows are in another order
    random.shuffle(ids)
    shuffled = DraftVocab.from_d2t(torch.tensor(ids) - torch.arange(len(ids)), len(mask))
    assert shuffled.target_ids.tolist() == ids
    assert shuffled.draft_ids[shuffled.target_ids].tolist() == list(range(len(ids)))
    assert torch.equal(shuffled.t2d, t2d)


def test_it_keeps_nothing_of_the_caller():
    t2d = torch.tensor([True, False, True])
    vocab = DraftVocab(t2d)
    t2d.logical_not_()
    assert vocab.t2d.tolist() == [True, False, True]
    assert vocab.target_ids.tolist() == [0, 2]


def test_it_moves_and_says_what_it_is():
    vocab = DraftVocab(torch.tensor([True, False, True]))
    assert vocab.to("cpu") is vocab
    moved = vocab.to("meta")
    assert {x.device.type for x in (moved.target_ids, moved.draft_ids, moved.t2d, moved.d2t)} == {"meta"}
    assert vocab.target_ids.device.type == "cpu"
    assert repr(vocab) == "DraftVocab(2 of 3 tokens, cpu)"
