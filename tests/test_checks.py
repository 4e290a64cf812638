"""What is checked where, what is accepted, and that nothing of the caller's is kept by a work list."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import assert_outputs_agree, make_problem
from refusals import INF, NAN, Given, H, K, N, V, from_hidden, meta, refuse

import fused_lk
from fused_lk import DraftVocab, LKLoss, Pairs, Target, checks
from fused_lk.reduction import LossOptions

CPU = torch.device("cpu")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def loss(given, **options):
    return fused_lk.lk_loss(given.hidden, given.weight, given.target, **options)


def test_counts_as_denominators():
    """Hugging Face's `num_items_in_batch` is an int64 tensor."""
    given = Given()
    for impl in ("torch", "reference"):
        expected = loss(given, denominator=3.0, impl=impl).loss
        counts = (
            3,
            np.int64(3),
            np.float32(3),
            torch.tensor(3),
            torch.tensor([3]),
            torch.tensor([3], dtype=torch.int32),
        )
        for count in counts:
            assert torch.equal(loss(given, denominator=count, impl=impl).loss, expected), count
        for reduction in ("mean", "position", "sum", "none"):
            same = [loss(given, denominator=x, impl=impl, reduction=reduction).loss for x in (torch.tensor(3), 3.0)]
            assert torch.equal(*same), reduction
        work = {"pairs": Pairs(positions=given.positions, num_positions=K), "impl": impl}
        per_position = loss(given, denominator=torch.tensor([3, 4]), **work)
        assert torch.equal(per_position.loss, loss(given, denominator=torch.tensor([3.0, 4.0]), **work).loss)


@pytest.mark.parametrize("denominator", [0, 0.0, torch.tensor(0), torch.tensor([1.0, -1.0])])
def test_the_module_refuses_a_denominator_of_0_when_it_is_made(denominator):
    refuse(Given(), lambda: LKLoss(denominator=denominator), (), ValueError, "denominator .* >=? 0")


@pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS, torch.float32, torch.bfloat16], ids=str)
def test_a_mask_of_any_dtype(dtype):
    """Everywhere that a mask is taken."""
    given = Given()
    kept = torch.arange(N) % 3 != 1
    mask, tokens = kept.to(dtype), kept.to(dtype).view(2, 3)
    out = loss(given, mask=mask)
    assert torch.equal(out.loss, loss(given, mask=kept).loss)
    for other, same in (
        (Pairs.ttt(tokens, 2), Pairs.ttt(kept.view(2, 3), 2)),
        (Pairs.blocks(torch.zeros(2, 1).long(), 2, tokens), Pairs.blocks(torch.zeros(2, 1).long(), 2, kept.view(2, 3))),
        (Pairs(mask, skip_masked=False), Pairs(kept, skip_masked=False)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(other.dense(12, CPU), same.dense(12, CPU), strict=True))
    computed = Target.from_hidden(given.states, given.head, mask * 0.5 if dtype.is_floating_point else mask)
    assert torch.equal(computed.log_normalizer.isnan(), ~kept)


# (arguments of Pairs by the name of the tensor in Given)
WORK = {
    "identity": lambda g: {"positions": g.positions},
    "bool mask": lambda g: {"mask": g.mask > 0},
    "bool mask of all": lambda g: {"mask": g.mask > -1, "positions": g.positions},
    "integer mask": lambda g: {"mask": (g.mask > 0).long(), "positions": g.positions},
    "weights": lambda g: {"mask": g.mask.clone(), "positions": g.positions},
    "weights of all": lambda g: {"mask": g.mask + 0.5, "positions": g.positions},
    "rows": lambda g: {"target_rows": g.rows, "positions": g.positions},
    "rows in order": lambda g: {"target_rows": torch.arange(N)},
    "all": lambda g: {"mask": g.mask + 0.25, "target_rows": g.rows, "positions": g.positions},
}


@pytest.mark.parametrize("skip_masked", [True, False])
@pytest.mark.parametrize("work", WORK)
def test_pairs_keep_nothing_of_the_callers(work, skip_masked):
    given = Given()
    arguments = WORK[work](given)
    if "positions" in arguments:
        arguments["num_positions"] = K
    pairs, same = (Pairs(**arguments, skip_masked=skip_masked) for _ in range(2))
    for x in arguments.values():
        if isinstance(x, torch.Tensor):
            x.fill_(0)  # wrong, but within every range
    for options in ({}, {"reduction": "none", "lambda_per": "token"}):
        assert_outputs_agree(loss(given, pairs=pairs, **options), loss(Given(), pairs=same, **options), 0.0)
    expected = WORK[work](Given())
    fresh = Pairs(**expected, num_positions=arguments.get("num_positions"), skip_masked=skip_masked)
    assert_outputs_agree(loss(given, pairs=pairs), loss(given, pairs=fresh), 0.0)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("skip_masked", [True, False])
def test_integer_masks_are_masks(dtype, skip_masked):
    given = Given()
    kept = given.mask > 0
    got, expected = (loss(given, pairs=Pairs(x, skip_masked=skip_masked)) for x in (kept.to(dtype), kept))
    assert_outputs_agree(got, expected, 0.0)
    assert got.token_log_acceptance.dtype == torch.float32
    tokens = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) > 0.4
    anchors = torch.tensor([[0, 3], [-1, 5]])
    for make in (lambda x: Pairs.ttt(x, 2), lambda x: Pairs.blocks(anchors, 2, x)):
        ours, expected = make(tokens.to(dtype)), make(tokens)
        assert torch.equal(ours.draft_rows, expected.draft_rows)
        assert torch.equal(ours.target_rows, expected.target_rows)
        assert ours.weights is None
    masked, expected = (from_hidden(given, mask=x) for x in (kept.to(dtype), kept))
    assert torch.equal(masked.token_ids[kept], expected.token_ids[kept])


@pytest.mark.parametrize("kind", ["hidden", "shared", "probs", "shared probs"])
def test_an_argmax_that_is_not_known(kind):
    """-1: never right, and in no draft vocabulary; the loss has no use for it."""
    given = Given()
    ids = torch.tensor([0, 2, -1, 3, -1, 4])
    known, shared = {"log_normalizer": torch.full((N,), 30.0), "token_ids": ids}, given.target_weight.detach()[:V]
    target = {
        "hidden": lambda: from_hidden(given, **known),
        "shared": lambda: Target.from_hidden(given.states, shared, **known),
        "probs": lambda: Target.from_probs(given.probs, given.vocab, ids),
        "shared probs": lambda: Target.from_probs(given.probs, token_ids=ids),
    }[kind]()
    assert torch.equal(target.token_ids, ids)
    assert torch.equal(target.in_draft_vocab, ids >= 0)  # of ids that the draft has
    outside = Target.from_probs(given.probs, given.vocab, torch.full((N,), 1))
    assert not outside.in_draft_vocab.any()
    draft = torch.full((N, V), -5.0)
    draft[torch.arange(N), target.vocab.draft_ids[ids.clamp(min=0)] if target.vocab else ids.clamp(min=0)] = 5.0
    for impl in ("torch", "reference"):
        out = fused_lk.lk_loss_from_logits(draft, target, reduction="none", objective="tv", impl=impl)
        assert out.loss.isfinite().all()
        assert out.accuracy_sum.item() == (ids >= 0).sum()


def test_a_list_is_one_position_per_tensor():
    problem = make_problem(num_tokens=12, steps=3)
    sources, weight, target, bias = (
        list(problem.sources[0].view(3, 4, -1)),
        problem.weight,
        problem.target,
        problem.bias,
    )
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) > 0.3
    logits = [torch.nn.functional.linear(x, weight, bias) for x in sources]
    for impl in ("torch", "reference"):
        for weights in (None, mask, mask.double()):
            options = {"position_decay": 0.5, "impl": impl}
            pairs = Pairs(torch.ones(3, 4) if weights is None else weights, position_dim=0)
            expected = fused_lk.lk_loss(torch.stack(sources), weight, target, bias=bias, pairs=pairs, **options)
            assert expected.acceptance_rate.shape == (3,)
            for more in ({"mask": weights}, {"pairs": pairs}):
                got = fused_lk.lk_loss(sources, weight, target, bias=bias, **options, **more)
                assert_outputs_agree(got, expected, 1e-12)
                got = fused_lk.lk_loss_from_logits(logits, target, **options, **more)
                assert_outputs_agree(got, expected, 1e-9)
                module = LKLoss(**options)(sources, weight, target, bias=bias, **more)
                assert_outputs_agree(module, expected, 1e-12)
            one = Pairs(weights)  # says itself that there is one position
            as_one = fused_lk.lk_loss(sources, weight, target, bias=bias, pairs=one, **options)
            assert as_one.acceptance_rate.shape == (1,)
            of_tensor = fused_lk.lk_loss(torch.stack(sources), weight, target, bias=bias, mask=weights, **options)
            assert_outputs_agree(as_one, of_tensor, 1e-12)
    assert fused_lk.lk_loss(
        sources[:1], weight, Target.from_probs(torch.rand(4, 37).softmax(-1))
    ).acceptance_rate.shape == (1,)


def test_a_single_position_is_not_decayed():
    given = Given()
    for reduction in ("mean", "sum", "position"):
        expected = loss(given, reduction=reduction).loss
        assert torch.equal(loss(given, reduction=reduction, position_decay=0.3).loss, expected)
        assert torch.equal(loss(given, reduction=reduction, position_decay=0.0).loss, expected)


NUMPY = [np.int64, np.int32, np.uint8, np.float64, np.float32, np.float16, np.array]


@pytest.mark.parametrize("as_numpy", NUMPY)
def test_numbers_of_numpy(as_numpy):
    given, integral = Given(), as_numpy in (np.int64, np.int32, np.uint8, np.array)
    one, two = as_numpy(1), as_numpy(2)
    options = {"eta": two, "kl_scale": one, "position_decay": one, "denominator": two, "draft_temperature": two}
    plain = {name: x.item() for name, x in options.items()}
    assert torch.equal(loss(given, **options, workspace_mb=one).loss, loss(given, **plain).loss)
    assert torch.equal(loss(given, kl_weight=one).loss, loss(given, kl_weight=1.0).loss)
    assert type(LossOptions(kl_weight=one).kl_weight) is float
    assert LKLoss(**options, workspace_mb=two)(given.hidden, given.weight, given.target).loss.isfinite()
    target = Target.from_logits(given.target_logits, given.vocab, temperature=two)
    assert type(target.transform.scale) is float
    made = [
        lambda: Pairs(positions=given.positions, num_positions=two),
        lambda: Pairs.ttt(given.mask.view(2, 3) > 0, two, one),
        lambda: Pairs.blocks(torch.zeros(2, 2).long(), two, given.mask.view(2, 3) > 0),
        lambda: DraftVocab.from_d2t(torch.zeros(1).long(), two),
        lambda: Target.from_topk(torch.zeros(N, 1).long(), torch.zeros(N, 1), two),
        lambda: fused_lk.explain(two, two, one, two, ttt_steps=two, target_hidden_size=two),
    ]
    for make in made:
        if integral:
            assert make() is not None
        else:
            refuse(given, make, (), TypeError, "int")


@pytest.mark.parametrize("yes", [np.True_, np.array(True)])
def test_flags_of_numpy(yes):
    given = Given()
    assert from_hidden(given, cache=yes, renormalize=yes).renormalize is True
    assert Pairs(given.mask, skip_masked=yes).skip_masked is True
    refuse(given, lambda: loss(given, eta=yes), (), TypeError, "eta to be a finite number")
    assert fused_lk.explain(2, 2, 2, frozen_head=yes).draft_gemms > 0


EXPLAIN = [
    (
        {"draft_vocab_size": 10, "target_vocab_size": 9},
        ValueError,
        "got 10 draft tokens of 9. Draft first, then target",
    ),
    ({"draft_vocab_size": 0}, ValueError, "draft_vocab_size to be a positive int"),
    ({"draft_vocab_size": 9.0}, TypeError, "draft_vocab_size to be a positive int"),
    ({"num_tokens": -1}, ValueError, "num_tokens to be an int >= 0"),
    ({"num_tokens": 8.0}, TypeError, "num_tokens to be an int >= 0"),
    ({"hidden_size": True}, TypeError, "hidden_size to be a positive int"),
    ({"target_vocab_size": 12.0}, TypeError, "target_vocab_size to be a positive int"),
    ({"target_hidden_size": 0}, ValueError, "target_hidden_size to be a positive int"),
    ({"ttt_steps": 0}, ValueError, "ttt_steps to be a positive int"),
    ({"frozen_head": "no"}, TypeError, "frozen_head to be True or False"),
    ({"dtype": torch.int64}, TypeError, "dtype to be a floating point"),
    ({"logits_dtype": torch.float16}, ValueError, "logits_dtype to be"),
    ({"impl": "reference"}, ValueError, "impl to be one of 'auto', 'triton', 'torch'"),
    ({"pairs": "all"}, TypeError, "pairs to be a fused_lk.Pairs"),
    ({"pairs": Pairs(torch.ones(3))}, ValueError, "pairs of ttt_steps \\* num_tokens = 8 rows"),
    ({"pairs": Pairs(torch.ones(8)), "masked_share": 0.5}, ValueError, "pairs or masked_share"),
    ({"pairs": Pairs(target_rows=torch.arange(1, 9))}, ValueError, "target_rows below 8"),
    ({"pairs": Pairs(), "ttt_steps": 2}, ValueError, "as many target rows"),
]


@pytest.mark.parametrize("changes, error, match", EXPLAIN, ids=[", ".join(row[0]) for row in EXPLAIN])
def test_explain_refuses_shapes_that_cannot_be(changes, error, match):
    good = {"num_tokens": 8, "hidden_size": 4, "draft_vocab_size": 9, "target_vocab_size": 12}
    assert fused_lk.explain(**good).num_pairs == 8
    refuse(Given(), lambda: fused_lk.explain(**{**good, **changes}), (), error, match)


def test_no_tokens_are_not_an_error():
    hidden, weight = torch.randn(0, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    out = fused_lk.lk_loss(hidden, weight, Target.from_logits(torch.randn(0, V)))
    out.loss.backward()
    assert out.loss == 0
    assert not weight.grad.any()


def test_where_contents_are_read(monkeypatch):
    """In host memory, or anywhere if asked; a meta tensor stands for one on a device."""
    monkeypatch.delenv("FUSED_LK_VALIDATE", raising=False)
    host, device = torch.ones(2), meta(2)
    assert checks.checks_contents(host)
    assert checks.checks_contents(torch.nn.Parameter(host))
    assert not checks.checks_contents(host, only_if_asked=True)
    assert not checks.checks_contents(device)
    monkeypatch.setenv("FUSED_LK_VALIDATE", "1")
    assert checks.checks_contents(device)
    assert checks.checks_contents(host, only_if_asked=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not checks.checks_contents(host)
    monkeypatch.setenv("FUSED_LK_VALIDATE", "0")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    assert not checks.checks_contents(device)


def spoilt(x, value, row=2):
    x = x.detach().clone()
    x[row, 1] = value
    return x


# (name, call that is good without the switch, part of the message with it)
ASKED_FOR = [
    *(
        (f"hidden {bad}", lambda g, bad=bad: Target.from_hidden(spoilt(g.states, bad), g.head), "hidden without NaN")
        for bad in (NAN, INF, -INF)
    ),
    *(
        (f"logits {bad}", lambda g, bad=bad: Target.from_logits(spoilt(g.target_logits, bad)), "logits without NaN")
        for bad in (NAN, INF)
    ),
    *(
        (f"probs {bad}", lambda g, bad=bad: Target.from_probs(spoilt(g.probs, bad)), "probs of entries >= 0")
        for bad in (NAN, INF, -0.001, 1.2)
    ),
    ("half probs", lambda g: Target.from_probs(spoilt(g.probs, 1.2).half()), "probs of entries >= 0"),
    *(
        (
            f"topk {bad}",
            lambda g, bad=bad: Target.from_topk(g.ids, spoilt(g.log_probs, bad), 12),
            "log_probs of entries",
        )
        for bad in (NAN, INF, 0.002, -0.1)
    ),
    *(
        (
            f"draft hidden {bad}",
            lambda g, bad=bad: fused_lk.lk_divergences(spoilt(g.hidden, bad), g.weight, g.target),
            "draft_hidden without NaN",
        )
        for bad in (NAN, INF)
    ),
    (
        "list of draft hidden",
        lambda g: fused_lk.lk_loss([g.hidden[:3], spoilt(g.hidden[3:], NAN)], g.weight, g.target),
        r"draft_hidden\[1\] without NaN",
    ),
    (
        "draft logits",
        lambda g: fused_lk.lk_loss_from_logits(spoilt(g.logits, INF), g.target),
        "draft_logits without NaN or .inf",
    ),
]


@pytest.mark.parametrize("call, match", [row[1:] for row in ASKED_FOR], ids=[row[0] for row in ASKED_FOR])
def test_garbage_is_looked_for_when_asked(call, match, monkeypatch):
    monkeypatch.delenv("FUSED_LK_VALIDATE", raising=False)
    call(Given())
    monkeypatch.setenv("FUSED_LK_VALIDATE", "1")
    refuse(Given(), lambda: call(Given()), (), ValueError, match + ".*; got 1 other row.* row 2")


def test_what_may_rightly_be_there_when_asked(monkeypatch):
    """Impossible tokens, garbage in ignored draft rows and in target rows outside the mask, rounded probabilities."""
    monkeypatch.setenv("FUSED_LK_VALIDATE", "1")
    given = Given()
    Target.from_logits(spoilt(given.target_logits, -INF))
    kept = torch.arange(N) != 2
    from_hidden_kept = Target.from_hidden(spoilt(given.states, NAN), given.head, kept)
    for skip_masked in (True, False):
        pairs = Pairs(kept, skip_masked=skip_masked)
        fused_lk.lk_loss(spoilt(given.hidden, NAN), given.weight, given.target, pairs=pairs)
        fused_lk.lk_loss(given.hidden, given.weight, from_hidden_kept, pairs=pairs)
        pairs = Pairs(target_rows=torch.where(kept, torch.arange(N), -1), skip_masked=skip_masked)
        fused_lk.lk_loss(spoilt(given.hidden, NAN), given.weight, given.target, pairs=pairs)
    fused_lk.lk_loss_from_logits(spoilt(given.logits, -INF), given.target)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        logits = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
        Target.from_probs(logits.softmax(-1))
        top = logits.log_softmax(-1).topk(64)
        Target.from_topk(top.indices, top.values, 4096)
    Target.from_topk(given.ids, spoilt(given.log_probs, -INF), 12)
    Target.from_probs(torch.zeros(N, V))


def test_a_targets_mask_and_pairs_that_are_kept():
    """Rows that the pairs ignore may lie outside the target's own mask; others may not."""
    given = Given()
    kept = torch.arange(N) != 2
    target = from_hidden(given, mask=kept)

    def of(*arguments):
        pairs = Pairs(*arguments, skip_masked=False)
        return fused_lk.lk_loss(given.hidden, given.weight, target, pairs=pairs)

    expected = fused_lk.lk_loss(given.hidden, given.weight, target, mask=kept)
    assert_outputs_agree(of(kept), expected, 1e-6)
    refuse(given, lambda: of(kept | True), (), ValueError, r"got 1 pair\(s\) outside")
    refuse(given, lambda: of(None, torch.arange(N)), (), ValueError, r"got 1 pair\(s\) outside")
