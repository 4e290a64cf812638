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
    ours = speculators.apply(copy.deepcopy(theirs), **SMALL, keep_mb=0.02)
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


@pytest.mark.parametrize("kind", ["dflash", "dflash2", "xpress"])
@pytest.mark.parametrize("loss", ["rkl", "ce", '{"kl_div": 0.5, "nla": 2.0}'])
def test_losses_of_the_other_blocks(kind, loss):
    model, given = make(kind), batch(kind)
    expected = run(model, given, loss)
    assert_same(run(speculators.apply(model), given, loss), expected)


OPTIONS = [
    *((kind, {"per_position_loss_weight": "dpace"}) for kind in OF_BLOCKS),
    ("dflash", {"max_anchors": 20}),  # more blocks than the sequence has tokens, and padded ones
    ("dspark", {"max_anchors": 20, "confidence_head_alpha": 0.3}),
    ("dflash2", {"max_anchors": 20, "selector_loss_alpha": 0.3}),
    ("xpress", {"consistency_weight": 0.0}),
    ("xpress", {"base_anchor_weight": 0.0, "consistency_passes": 1}),
    ("xpress", {"base_anchor_weight": torch.tensor(0.4), "base_anchor_full_weight": True}),
    ("peagle", {"max_anchors": 12}),
    ("mtp", {"step_weights": None}),
    ("mtp", {"loss_mask": None}),
    ("eagle3", {"loss_mask": None}),
    ("peagle", {"loss_mask": None}),
]


@pytest.mark.parametrize(("kind", "call"), OPTIONS)
def test_options_of_the_trainer(kind, call):
    model, given = make(kind), batch(kind, **call)
    loss = loss_of(kind, "ce" if "per_position_loss_weight" in call else MIX)
    expected = run(model, given, loss)
    assert_same(run(speculators.apply(model), given, loss), expected)


@pytest.mark.parametrize("loss", ["ce", '{"ce": 0.3, "kl_div": 0.7}', "tv"])
def test_labels_of_the_data(loss):
    """XPress may take the CE against the tokens that follow, over a full vocabulary."""
    model, given = make("xpress", draft_vocab_size=drafts.V_TARGET), batch("xpress", ce_from_data=True)
    expected = run(model, given, loss)
    assert_same(run(speculators.apply(model), given, loss), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_default_loss(kind):
    """Without a loss config; their own default is fused, and runs on a GPU alone."""
    model, given = make(kind), batch(kind)
    default = "kl_div" if kind == "mtp" else vars(speculators.apply(model))["forward"].default
    assert (default == "kl_div") == (kind != "xpress")
    expected = run(speculators.unapply(model), given, loss_of(kind, default))
    assert_same(run(speculators.apply(model), given), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_supervised(kind):
    model, given = make(kind), batch(kind)
    given["loss_mask"] &= False
    expected = run(model, given, loss_of(kind, MIX))
    assert_same(run(speculators.apply(model), given, loss_of(kind, MIX)), expected)


def overlap(q, p):
    return torch.minimum(q, p).exp().sum(-1)


EXACT = {
    "ce": lambda q, p: -q.gather(-1, p.argmax(-1, keepdim=True)).squeeze(-1),
    "kl_div": lambda q, p: (p.exp() * (p - q)).sum(-1),
    "rkl": lambda q, p: (q.exp() * (q - p)).sum(-1),
    "tv": lambda q, p: 1 - overlap(q, p),
    "nla": lambda q, p: -overlap(q, p).log(),
}


@pytest.mark.parametrize("loss", EXACT)
@pytest.mark.parametrize("kind", ["eagle3", "dflash", "dspark"])
def test_sure_rows(kind, loss):
    """Logits of several dozens, as trained models have: no worse than the published losses, against float64."""
    given, doubled = batch(kind), batch(kind, dtype=torch.float64)
    of_log_probs = {name: lambda x, y, of=of: of(x.log_softmax(-1), y.log_softmax(-1)) for name, of in EXACT.items()}
    exact = drafts.losses(make(kind), loss)
    exact["loss_config"] = {loss: (of_log_probs[loss], 1.0)}
    if "tv_loss_fn" in exact:
        exact["tv_loss_fn"] = of_log_probs["tv"]
    _, truth = run(make(kind, scale=4.0, dtype=torch.float64), {**doubled, **exact})
    _, theirs = run(make(kind, scale=4.0), given, loss)
    _, ours = run(speculators.apply(make(kind, scale=4.0)), given, loss)
    for name, want in truth.items():
        error, allowed = ((x[name] - want).abs().max() / want.abs().max() for x in (ours, theirs))
        assert error <= 2 * allowed + 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_head_and_autocast(kind):
    """As their trainer runs it: the head is frozen, weights are float32, products in half precision."""
    model, given, loss = make(kind, train_head=False), batch(kind), loss_of(kind, "kl_div")
    with torch.autocast(drafts.DEVICE.type, torch.bfloat16):
        expected = run(model, given, loss)
        ours = run(speculators.apply(model), given, loss)
    torch.testing.assert_close(ours[0][1], expected[0][1], rtol=1e-2, atol=1e-3, check_dtype=False)
    assert ours[1].keys() == expected[1].keys() and "lm_head.weight" not in ours[1]
    for name, want in expected[1].items():
        assert (ours[1][name] - want).norm() <= 0.1 * want.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_needs_no_gradient(kind):
    model, given = make(kind), batch(kind)
    with torch.no_grad():
        expected = run(model, given, loss_of(kind, MIX))
        assert_same(run(speculators.apply(model), given, loss_of(kind, MIX)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_full_logits(kind, monkeypatch):
    """None of draft or target, forward and backward; and the watcher sees them where they are."""
    monkeypatch.setattr(plain, "BLOCK_ELEMENTS", 512)
    model, given = make(kind), batch(kind)
    size = model.lm_head.weight.shape[0]
    most = (drafts.ANCHORS * drafts.BLOCK if kind in OF_BLOCKS else T - 4) * size

    def watch(loss):
        with Allocations() as seen:
            run(model, given, loss_of(kind, loss))
        return [made for made in seen.at_least(most) if size in made[1] or made[0] % size == 0], seen

    assert watch(MIX)[0], "the published forward makes logits"
    speculators.apply(model, **SMALL)
    for loss in (MIX, "lk_hybrid"):
        large, seen = watch(loss)
        assert not large
        assert seen.of_width(size), "tiles of logits are seen"


@pytest.mark.parametrize("kind", KINDS)
def test_rows_outside_the_mask_cost_nothing(kind, monkeypatch):
    """The pairs that are scored are those that count, and each target row is made once."""
    from fused_lk import losses as calls

    scored = []
    asked = calls.by_walks.divergences

    def count(problem, *more):
        scored.append(problem.pairs.num_pairs)
        return asked(problem, *more)

    monkeypatch.setattr(calls.by_walks, "divergences", count)
    model, given = speculators.apply(make(kind)), batch(kind)
    metrics = run(model, given, loss_of(kind, "kl_div"))[0][2]
    if kind == "mtp":
        counted = [int(given["loss_mask"][:, k + 2 : k + 2 + T - 4].sum()) for k in range(3)]
    elif kind == "eagle3":
        counted = [sum(int(metrics[f"full_acc_{k}_total"]) for k in range(3))]
    else:
        total = "accuracy_total" if kind == "xpress" else "full_acc_total"
        total = "accept_rate_total" if kind == "dflash2" else total
        counted = [int(metrics[total])] * (5 if kind == "xpress" else 1)
    # Those whose argmax goes on ask for the rest of it in calls of their own.
    assert [n for n in scored if n in counted][: len(counted)] == counted


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind):
    """On a GPU speculators compiles its forward; what replaces it must trace, once."""
    model, given, loss = make(kind), batch(kind), loss_of(kind, MIX)
    expected = run(model, given, loss)
    attached = vars(speculators.apply(model))["forward"]
    compiled = torch._dynamo.testing.CompileCounter()
    part = "backbone" if kind in OF_BLOCKS else "forward"
    setattr(attached, part, torch.compile(getattr(attached, part), backend=compiled, dynamic=False))
    for _ in range(2):
        assert_same(run(model, given, loss), expected)
    first = compiled.frame_count
    assert first > 0
    run(model, given, loss)
    assert compiled.frame_count == first, "recompiled for the same shapes"


def test_mtp_returns_rows():
    model, given = make("mtp"), batch("mtp")
    logits = model(**given)[0]
    rows = speculators.apply(model)(**given)[0]
    for want, got in zip(logits, rows, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype and got.device == want.device
        assert torch.equal(got.argmax(-1), want.argmax(-1))
        assert torch.equal(torch.argmax(got[:, 3:], -1), want[:, 3:].argmax(-1))
        for asked in (lambda x: x.softmax(0), lambda x: x.argmax(1), lambda x: x.view(-1, H), lambda x: x * 2):
            with pytest.raises((TypeError, AttributeError)):
                asked(got)
        with pytest.raises(TypeError):
            torch.exp(got)


@pytest.mark.parametrize("kind", MIXED)
def test_refused_losses(kind):
    """Before training, from what the trainer will pass; and in the call."""
    model = speculators.apply(make(kind))
    attached = vars(model)["forward"]
    assert isinstance(attached, Mixed)
    attached.refuse(**drafts.losses(model, MIX), gamma=4.0)
    attached.refuse()
    own = {"loss_config": {"mine": (lambda logits, targets: logits.sum(-1), 1.0)}}
    with pytest.raises(ValueError, match=r"kl_div, rkl, jsd, ce, tv, nla, lk_hybrid.*mine.*unapply"):
        attached.refuse(**own)
    with pytest.raises(ValueError, match="tv_loss_fn"):
        attached.refuse(tv_loss_fn=len)
    with pytest.raises(ValueError, match="mine"):
        model(**batch(kind), **own)


@pytest.mark.parametrize(("kind", "head"), [("dspark", "markov_head.markov_w2"), ("xpress", "refiner_head.readout")])
def test_heads_of_biases_must_be_plain(kind, head):
    model = make(kind)
    model.get_submodule(head).register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=f"{head} to be a torch.nn.Linear"):
        speculators.apply(model)


@pytest.mark.parametrize("kind", KINDS)
def test_unapply_restores(kind):
    model, given = make(kind), batch(kind)
    before = dict(vars(model))
    run(speculators.apply(model), given, loss_of(kind, MIX))
    copied = copy.deepcopy(model)
    assert_same(run(copied, given, loss_of(kind, MIX)), run(model, given, loss_of(kind, MIX)))
    speculators.unapply(model)
    assert vars(model) == before
