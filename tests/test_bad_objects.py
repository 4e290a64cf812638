"""What does not fit is refused where objects are made: vocabularies, heads, targets, pairs, the module."""

from __future__ import annotations

import pytest
import torch
from refusals import H_TARGET, INF, V_TARGET, Given, K, N, V, elsewhere, from_hidden, meta, refuse

import fused_lk
from fused_lk import DraftVocab, Pairs, Target, TargetHead

# (name, call, error, part of the message)
OBJECTS = [
    ("t2d: int", lambda g: DraftVocab(g.t2d.int()), TypeError, "t2d of dtype bool"),
    ("t2d: float", lambda g: DraftVocab(g.t2d.float()), TypeError, "t2d of dtype bool"),
    ("t2d: offsets", lambda g: DraftVocab(g.d2t), TypeError, "DraftVocab.from_d2t"),
    ("t2d: list", lambda g: DraftVocab([True]), TypeError, "t2d to be a torch.Tensor"),
    ("t2d: rank", lambda g: DraftVocab(g.t2d.view(3, 4)), ValueError, "t2d with 1 dimension"),
    ("t2d: empty", lambda g: DraftVocab(torch.zeros(4, dtype=torch.bool)), ValueError, "at least one token"),
    ("d2t: other tokens", lambda g: DraftVocab(g.t2d.roll(1), g.d2t), ValueError, "exactly the tokens that t2d keeps"),
    ("d2t: order", lambda g: DraftVocab(g.t2d, swapped(g)), ValueError, "in increasing order"),
    ("d2t: fewer", lambda g: DraftVocab(g.t2d, g.d2t[:-1]), ValueError, "exactly the tokens that t2d keeps"),
    ("d2t: ids", lambda g: DraftVocab.from_d2t(g.vocab.target_ids, V_TARGET), ValueError, "offsets, not target ids"),
    ("d2t: repeated", lambda g: DraftVocab.from_d2t(torch.tensor([1, 0]), 4), ValueError, "one target id per draft"),
    ("d2t: negative", lambda g: DraftVocab.from_d2t(torch.tensor([-1, 0]), 4), ValueError, r"in \[0, 4\)"),
    ("d2t: float", lambda g: DraftVocab.from_d2t(g.d2t.float(), V_TARGET), TypeError, "d2t of dtype int64"),
    ("d2t: rank", lambda g: DraftVocab.from_d2t(g.d2t.view(3, 3), V_TARGET), ValueError, "d2t with 1 dimension"),
    ("d2t: empty", lambda g: DraftVocab.from_d2t(g.d2t[:0], V_TARGET), ValueError, "at least one token"),
    ("target_size: float", lambda g: DraftVocab.from_d2t(g.d2t, 12.0), TypeError, "target_size to be a positive int"),
    ("target_size", lambda g: DraftVocab.from_d2t(g.d2t, 0), ValueError, "target_size to be a positive int"),
    ("head: module", lambda g: TargetHead(torch.nn.Linear(2, 3)), TypeError, r"a Linear\. .*lm_head\.weight"),
    (
        "head: module's bias",
        lambda g: TargetHead(torch.nn.Linear(2, 3)),
        TypeError,
        r"lm_head\.weight, and its bias as bias=\.$",
    ),
    (
        "head: no bias",
        lambda g: TargetHead(torch.nn.Linear(2, 3, False)),
        TypeError,
        r"as in lm_head\.weight\.$",
    ),
    ("head: model", lambda g: TargetHead(torch.nn.Sequential()), TypeError, r"model\.lm_head\.weight"),
    ("head: meta", lambda g: TargetHead(meta(3, 2)), ValueError, "lm_head_weight to have contents"),
    ("head: no tokens", lambda g: TargetHead(g.target_weight[:0]), ValueError, "vocabulary of at least 1"),
    ("head: no width", lambda g: TargetHead(g.target_weight[:, :0]), ValueError, "hidden size of at least 1"),
    ("head: rank", lambda g: TargetHead(g.target_bias), ValueError, "lm_head_weight with 2 dimension"),
    ("head: dtype", lambda g: TargetHead(g.ids), TypeError, "lm_head_weight of dtype"),
    ("head: t2d", lambda g: TargetHead(g.target_weight, g.t2d), TypeError, "vocab to be a DraftVocab"),
    ("head: vocabulary", lambda g: TargetHead(g.target_weight[1:], g.vocab), ValueError, "over 11 target tokens"),
    ("head: bias shape", lambda g: TargetHead(g.target_weight, g.vocab, g.bias), ValueError, r"bias of shape \(12,\)"),
    ("head: bias dtype", lambda g: TargetHead(g.target_weight, bias=g.target_bias.half()), TypeError, r"bias\.to\("),
    ("head: bias device", lambda g: TargetHead(g.target_weight, bias=elsewhere(V_TARGET)), ValueError, "bias on cpu"),
    ("hidden: no head", lambda g: Target.from_hidden(g.states, None), TypeError, "head to be a TargetHead"),
    ("hidden: a module", lambda g: Target.from_hidden(g.states, torch.nn.Linear(3, 9)), TypeError, r"lm_head\.weight"),
    ("hidden: a model", lambda g: Target.from_hidden(g.states, torch.nn.ReLU()), TypeError, r"model\.lm_head\.weight"),
    ("hidden: from disk", lambda g: half(g), TypeError, r"hidden\.to\(lm_head_weight\.dtype\)"),
    ("hidden: head from disk", lambda g: half(g), TypeError, r"lm_head_weight\.to\(hidden\.dtype\)"),
    ("hidden: cache", lambda g: from_hidden(g, cache="no"), TypeError, "cache to be True or False"),
    ("hidden: far ids", lambda g: from_hidden(g, token_ids=g.rows + 7), ValueError, r"token_ids in \[-1, 12\)"),
    ("hidden: low ids", lambda g: from_hidden(g, token_ids=g.rows - 1), ValueError, r"token_ids in \[-1, 12\)"),
    (
        "hidden: far ids, shared",
        lambda g: Target.from_hidden(g.states, g.target_weight, token_ids=g.rows + 7),
        ValueError,
        r"token_ids in \[-1, 12\)",
    ),
    ("hidden: mask", lambda g: Target.from_hidden(g.states, g.head, g.rows), ValueError, "an integer mask of 0 and 1"),
    ("hidden: twice", lambda g: Target.from_hidden(g.states, g.head, vocab=g.vocab), ValueError, "inside the Target"),
    ("hidden: bare vocab", lambda g: Target.from_hidden(g.states, g.target_weight, vocab=9), TypeError, "a DraftVocab"),
    ("hidden: rank", lambda g: Target.from_hidden(torch.tensor(1.0), g.head), ValueError, "at least 1 dim"),
    ("hidden: dtype", lambda g: Target.from_hidden(g.states.half(), g.head), TypeError, "hidden of dtype float32"),
    ("hidden: size", lambda g: Target.from_hidden(g.hidden.detach(), g.head), ValueError, "last dimension 3"),
    ("hidden: device", lambda g: Target.from_hidden(elsewhere(N, H_TARGET), g.head), ValueError, "hidden on cpu"),
    ("hidden: grad", lambda g: Target.from_hidden(trainable(g.states), g.head), ValueError, r"hidden\.detach\(\)"),
    (
        "hidden: mask dtype",
        lambda g: Target.from_hidden(g.states, g.head, g.mask.to(torch.complex64)),
        TypeError,
        "mask of dtype bool",
    ),
    ("hidden: mask < 0", lambda g: Target.from_hidden(g.states, g.head, -g.mask), ValueError, "mask with entries"),
    ("hidden: mask shape", lambda g: Target.from_hidden(g.states, g.head, g.t2d), ValueError, r"mask of shape \(6,\)"),
    (
        "hidden: mask device",
        lambda g: Target.from_hidden(g.states, g.head, elsewhere(N).bool()),
        ValueError,
        "mask on cpu",
    ),
    ("hidden: lse", lambda g: from_hidden(g, log_normalizer=g.mask[1:]), ValueError, r"log_normalizer of shape \(6,\)"),
    ("hidden: lse device", lambda g: from_hidden(g, log_normalizer=elsewhere(N)), ValueError, "log_normalizer on cpu"),
    ("hidden: lse grad", lambda g: from_hidden(g, log_normalizer=trainable(g.mask)), ValueError, r"\.detach\(\)"),
    ("hidden: ids", lambda g: from_hidden(g, token_ids=g.rows.int()), TypeError, "token_ids of dtype int64"),
    ("hidden: T = 0", lambda g: from_hidden(g, temperature=0), ValueError, "temperature to be a finite number > 0"),
    ("hidden: T < 0", lambda g: from_hidden(g, temperature=-0.7), ValueError, "temperature"),
    ("hidden: impl", lambda g: from_hidden(g, impl="cuda"), ValueError, "impl to be one of"),
    ("hidden: impl unused", lambda g: Target.from_hidden(g.states, g.target_weight, impl=0), ValueError, "impl to be"),
    ("hidden: workspace", lambda g: from_hidden(g, workspace_mb=0), ValueError, "workspace_mb"),
    ("hidden: workspace name", lambda g: from_hidden(g, workspace_mb="big"), TypeError, "workspace_mb"),
    ("logits: rank", lambda g: Target.from_logits(torch.tensor(1.0)), ValueError, "at least 1 dim"),
    ("logits: dtype", lambda g: Target.from_logits(g.ids), TypeError, "logits of dtype"),
    ("logits: grad", lambda g: Target.from_logits(trainable(g.target_logits)), ValueError, r"logits\.detach\(\)"),
    ("logits: no tokens", lambda g: Target.from_logits(g.target_logits[:, :0]), ValueError, "vocabulary of at least"),
    ("logits: renormalize", lambda g: Target.from_logits(g.probs, renormalize=1), TypeError, "renormalize to be True"),
    ("logits: vocabulary", lambda g: Target.from_logits(g.probs, g.vocab), ValueError, "over 9 target tokens"),
    ("logits: t2d", lambda g: Target.from_logits(g.target_logits, g.t2d), TypeError, "vocab to be a DraftVocab"),
    ("logits: T", lambda g: Target.from_logits(g.target_logits, temperature=INF), ValueError, "temperature"),
    ("logits: impl", lambda g: Target.from_logits(g.target_logits, g.vocab, impl="x"), ValueError, "impl to be one of"),
    ("probs: rank", lambda g: Target.from_probs(torch.tensor(1.0)), ValueError, "at least 1 dim"),
    ("probs: dtype", lambda g: Target.from_probs(g.ids), TypeError, "probs of dtype"),
    ("probs: grad", lambda g: Target.from_probs(trainable(g.probs)), ValueError, r"probs\.detach\(\)"),
    ("probs: no tokens", lambda g: Target.from_probs(g.probs[:, :0]), ValueError, "vocabulary of at least 1"),
    ("probs: far ids", lambda g: Target.from_probs(g.probs, token_ids=g.rows + 4), ValueError, r"give vocab where"),
    ("probs: low ids", lambda g: Target.from_probs(g.probs, g.vocab, g.rows - 1), ValueError, r"in \[-1, 12\)"),
    ("probs: vocabulary", lambda g: Target.from_probs(g.target_logits, g.vocab), ValueError, "last dimension 9"),
    ("probs: size", lambda g: Target.from_probs(g.probs, V_TARGET), TypeError, "vocab to be a DraftVocab"),
    ("probs: T", lambda g: Target.from_probs(g.probs, temperature=0.7), ValueError, "retempered"),
    ("probs: T < 0", lambda g: Target.from_probs(g.probs, temperature=-1.0), ValueError, "temperature"),
    (
        "probs: ids",
        lambda g: Target.from_probs(g.probs, token_ids=g.rows[1:]),
        ValueError,
        r"token_ids of shape \(6,\)",
    ),
    (
        "topk: rank",
        lambda g: Target.from_topk(torch.tensor(1), torch.tensor(0.0), 4),
        ValueError,
        "at least 1 dimension",
    ),
    ("topk: ids", lambda g: Target.from_topk(g.log_probs, g.log_probs, 12), TypeError, "token_ids of dtype"),
    ("topk: shape", lambda g: Target.from_topk(g.ids, g.log_probs[1:], 12), ValueError, r"log_probs of shape \(6, 2\)"),
    ("topk: device", lambda g: Target.from_topk(g.ids, elsewhere(N, K), 12), ValueError, "log_probs on cpu"),
    ("topk: grad", lambda g: Target.from_topk(g.ids, trainable(g.log_probs), 12), ValueError, r"log_probs\.detach\(\)"),
    ("topk: vocabulary", lambda g: Target.from_topk(g.ids, g.log_probs, None), TypeError, "vocab to be a DraftVocab"),
    ("topk: no vocabulary", lambda g: Target.from_topk(g.ids, g.log_probs, 0), ValueError, "vocab to be a DraftVocab"),
    ("topk: bool", lambda g: Target.from_topk(g.ids, g.log_probs, True), TypeError, "vocab to be a DraftVocab"),
    ("topk: outside", lambda g: Target.from_topk(g.ids, g.log_probs, 11), ValueError, r"token_ids in \[-1, 11\)"),
    ("topk: below", lambda g: Target.from_topk(g.ids - 2, g.log_probs, 12), ValueError, r"token_ids in \[-1, 12\)"),
    (
        "topk: two values",
        lambda g: Target.from_topk(g.ids * 0, g.log_probs + torch.tensor([0.0, -0.5]), g.vocab),
        ValueError,
        "one log-probability per token and row",
    ),
    (
        "topk: L",
        lambda g: Target.from_topk(g.ids, g.log_probs, 12, g.log_probs[1:, 0]),
        ValueError,
        r"log_normalizer of shape \(6,\)",
    ),
    (
        "topk: L with grad",
        lambda g: Target.from_topk(g.ids, g.log_probs, 12, trainable(g.log_probs[:, 0])),
        ValueError,
        r"log_normalizer\.detach\(\)",
    ),
    ("topk: none", lambda g: Target.from_topk(g.ids[:, :0], g.log_probs[:, :0], 12), ValueError, "at least one token"),
    (
        "topk: T",
        lambda g: Target.from_topk(g.ids, g.log_probs, 12, temperature=2.0),
        ValueError,
        "Pass log_normalizer.*or renormalize=True",
    ),
    ("pairs: shapes", lambda g: Pairs(g.mask, g.rows[1:]), ValueError, "the shape of mask"),
    ("pairs: devices", lambda g: Pairs(g.mask, elsewhere(N, dtype=torch.long)), ValueError, "target_rows on cpu"),
    ("pairs: mask", lambda g: Pairs(g.mask.to(torch.complex64)), TypeError, "mask of dtype bool"),
    ("pairs: integers", lambda g: Pairs(g.positions + 1), ValueError, "an integer mask of 0 and 1"),
    ("pairs: negative integers", lambda g: Pairs(-g.positions), ValueError, "an integer mask of 0 and 1"),
    ("pairs: meta", lambda g: Pairs(meta(N)), ValueError, "mask to have contents"),
    ("pairs: skip_masked", lambda g: Pairs(g.mask, skip_masked=0), TypeError, "skip_masked to be True or False"),
    ("pairs: kept weights", lambda g: Pairs(-g.mask, skip_masked=False), ValueError, "finite and >= 0"),
    ("pairs: kept integers", lambda g: Pairs(g.rows, skip_masked=False), ValueError, "an integer mask of 0"),
    ("pairs: rows dtype", lambda g: Pairs(None, g.rows.int()), TypeError, "target_rows of dtype int64"),
    ("pairs: positions < 0", lambda g: Pairs(None, None, g.positions - 1, 2), ValueError, "positions in"),
    ("pairs: positions dtype", lambda g: Pairs(None, None, g.mask, 2), TypeError, "positions of dtype int64"),
    ("pairs: positions shape", lambda g: Pairs(g.mask, None, g.positions[1:], 2), ValueError, "positions of shape"),
    ("pairs: num_positions 0", lambda g: Pairs(None, None, g.positions, 0), ValueError, "a positive int"),
    ("pairs: num_positions float", lambda g: Pairs(num_positions=2.0), TypeError, "a positive int"),
    ("pairs: num_positions bool", lambda g: Pairs(num_positions=True), TypeError, "a positive int"),
    ("pairs: kept rows", lambda g: Pairs(None, g.rows - 1, skip_masked=False), ValueError, "target_rows >= -1"),
    (
        "pairs: kept positions",
        lambda g: Pairs(positions=g.positions, num_positions=1, skip_masked=False),
        ValueError,
        r"in \[0, 1\)",
    ),
    ("pairs: num_positions alone", lambda g: Pairs(g.mask, num_positions=2), ValueError, "positions with num_pos"),
    ("ttt: integers", lambda g: Pairs.ttt(g.ids, 1, 0), ValueError, "an integer mask of 0 and 1"),
    ("ttt: steps", lambda g: Pairs.ttt(g.ids > 0, 2.0), TypeError, "steps to be a positive int"),
    ("ttt: shift", lambda g: Pairs.ttt(g.ids > 0, 2, -1), ValueError, "shift to be an int >= 0"),
    (
        "blocks: anchors kept",
        lambda g: Pairs.blocks(g.ids, 2, g.ids > 0, skip_masked=False),
        ValueError,
        r"anchors in \[-1, 2\)",
    ),
    ("pairs: weights", lambda g: Pairs(-g.mask), ValueError, "finite and >= 0"),
    ("pairs: rows", lambda g: Pairs(target_rows=g.rows - 1), ValueError, "target_rows >= -1"),
    ("pairs: positions", lambda g: Pairs(positions=g.positions, num_positions=1), ValueError, r"in \[0, 1\)"),
    ("pairs: how many", lambda g: Pairs(positions=g.positions), ValueError, "num_positions with positions"),
    ("module: objective", lambda g: fused_lk.LKLoss("nll"), ValueError, "objective to be one of"),
    ("module: impl", lambda g: fused_lk.LKLoss(impl="cuda"), ValueError, "impl to be one of"),
    ("module: plan", lambda g: fused_lk.LKLoss(plan="fast"), ValueError, "plan to be one of"),
    ("module: impossible plan", lambda g: loss(g, plan="one_pass"), ValueError, "without kl_weight"),
    ("module: workspace", lambda g: fused_lk.LKLoss(workspace_mb=0), ValueError, "workspace_mb"),
    ("module: T", lambda g: fused_lk.LKLoss(draft_temperature=0), ValueError, "draft_temperature"),
    ("module: dtype", lambda g: fused_lk.LKLoss(logits_dtype="half"), ValueError, "logits_dtype to be"),
    ("module: pairs beside", lambda g: loss(g, pairs=Pairs(), mask=g.mask), ValueError, "mask or pairs, not both"),
]


def half(given):
    return Target.from_hidden(given.states.bfloat16(), given.target_weight)


def loss(given, mask=None, pairs=None, **stored):
    return fused_lk.LKLoss(**stored)(given.hidden, given.weight, given.target, mask=mask, pairs=pairs)


def trainable(x):
    return x.clone().requires_grad_()


def swapped(given):
    """The offsets of the same tokens with the first two in each other's place."""
    ids = given.vocab.target_ids.clone()
    ids[:2] = ids[:2].flip(0)
    return ids - torch.arange(V)


@pytest.mark.parametrize(("call", "error", "match"), [row[1:] for row in OBJECTS], ids=[row[0] for row in OBJECTS])
def test_objects(call, error, match):
    given = Given()
    refuse(given, lambda: call(given), (), error, match)


def test_a_module_has_no_option_for_what_a_batch_brings():
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        fused_lk.LKLoss(mask=Given().mask)
