"""What each kind of target says of itself, against dense logits over the full vocabulary."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from problems import ragged_top_k
from torch import Tensor

import fused_lk
from fused_lk import DraftVocab, Target, TargetHead, reference

NEG_INF = float("-inf")
SHAPE, HIDDEN, FULL = (2, 5), 6, 41
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class Dense:
    """A target model with everything written out."""

    def __init__(self, dtype: torch.dtype = torch.float64, bias: bool = True, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(*SHAPE, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
        self.weight = torch.randn(FULL, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
        self.bias = torch.randn(FULL, generator=generator, dtype=torch.float64).to(dtype) if bias else None
        self.t2d = torch.rand(FULL, generator=generator) < 0.6
        self.vocab = DraftVocab(self.t2d)
        self.head = TargetHead(self.weight, self.vocab, self.bias)
        self.logits = F.linear(self.hidden, self.weight, self.bias)
        self.draft_logits = torch.randn(*SHAPE, self.vocab.draft_size, generator=generator).to(dtype)

    def log_normalizer(self, temperature: float = 1.0) -> Tensor:
        return (self.logits.double() / temperature).logsumexp(-1)

    def log_p(self, temperature: float = 1.0, renormalize: bool = False) -> Tensor:
        return reference.target_log_probs(self.logits.double(), self.t2d, temperature, renormalize)

    @property
    def token_ids(self) -> Tensor:
        return self.logits.argmax(-1)


def check_primitive(dense: Dense, target: Target, log_p: Tensor, rtol: float = 1e-9, **options) -> None:
    """The target is used as it says."""
    got = fused_lk.lk_divergences_from_logits(dense.draft_logits, target, **options)
    log_acceptance, kl = reference.divergences(dense.draft_logits.double(), log_p)
    kept = options.get("mask", torch.ones(SHAPE, dtype=torch.bool))
    torch.testing.assert_close(got.log_acceptance[kept].double(), log_acceptance[kept], rtol=rtol, atol=rtol)
    torch.testing.assert_close(got.kl[kept].double(), kl[kept], rtol=rtol, atol=rtol)


def check_argmax(dense: Dense, target: Target) -> None:
    assert torch.equal(target.token_ids, dense.token_ids)
    assert torch.equal(target.in_draft_vocab, dense.t2d[dense.token_ids])
    assert 0 < target.in_draft_vocab.sum() < target.num_tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["hidden", "cached", "small workspace", "bare weight", "logits"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_normaliser_and_argmax_over_the_full_vocabulary(impl, kind, temperature, dtype):
    dense = Dense(dtype)
    options = {"temperature": temperature, "impl": impl}
    if kind == "logits":
        target = Target.from_logits(dense.logits, dense.vocab, **options)
    elif kind == "bare weight":
        target = Target.from_hidden(dense.hidden, dense.weight, vocab=dense.vocab, bias=dense.bias, **options)
    else:
        # 0.001 MiB is less than two rows
        small = {"workspace_mb": 0.001} if kind == "small workspace" else {}
        target = Target.from_hidden(dense.hidden, dense.head, cache=kind == "cached", **small, **options)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (target.shape, target.num_tokens) == (SHAPE, 10)
    assert target.draft_vocab_size == dense.vocab.draft_size
    assert target.log_normalizer.shape == SHAPE
    assert target.log_normalizer.dtype == torch.promote_types(dtype, torch.float32)
    expected = dense.log_normalizer(temperature)
    torch.testing.assert_close(target.log_normalizer.double(), expected, rtol=tolerance, atol=tolerance)
    check_argmax(dense, target)
    # products by chunk and by row of bfloat16 round alike here, but are not promised to
    loose = 1e-10 if dtype == torch.float64 else 5e-2 if dtype == torch.bfloat16 else 1e-4
    check_primitive(dense, target, dense.log_p(temperature), loose, impl=impl)


@pytest.mark.parametrize("kind", ["hidden", "logits"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_a_shared_vocabulary_is_streamed_only_when_asked(kind, renormalize):
    dense = Dense()
    if kind == "hidden":
        target = Target.from_hidden(dense.hidden, dense.weight, bias=dense.bias, renormalize=renormalize)
    else:
        target = Target.from_logits(dense.logits, renormalize=renormalize)
    assert target.draft_vocab_size == FULL
    draft = torch.randn(*SHAPE, FULL, dtype=torch.float64)
    out = fused_lk.lk_loss_from_logits(draft, target, objective="alpha")
    expected, _ = reference.divergences(draft, dense.logits.log_softmax(-1))
    torch.testing.assert_close(out.token_log_acceptance, expected)
    # known from here on; before, the loss found both in its own tiles
    torch.testing.assert_close(target.log_normalizer, dense.log_normalizer())
    assert torch.equal(target.token_ids, dense.token_ids)
    assert target.in_draft_vocab.all()
    torch.testing.assert_close(out.accuracy[0], (draft.argmax(-1) == dense.token_ids).double().mean())


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rows_outside_the_targets_mask_are_not_computed(impl, cache):
    dense = Dense()
    mask = torch.tensor([[True, False, True, True, False], [False] * 4 + [True]])
    hidden = dense.hidden.masked_fill(~mask.unsqueeze(-1), float("nan"))
    target = Target.from_hidden(hidden, dense.head, mask, cache=cache, impl=impl)
    assert target.log_normalizer[~mask].isnan().all()
    torch.testing.assert_close(target.log_normalizer[mask], dense.log_normalizer()[mask])
    assert torch.equal(target.token_ids[mask], dense.token_ids[mask])
    check_primitive(dense, target, dense.log_p(), mask=mask, impl=impl)
    nothing = Target.from_hidden(hidden, dense.head, torch.zeros_like(mask), cache=cache, impl=impl)
    assert nothing.log_normalizer.isnan().all()


def test_a_given_normaliser_is_taken_as_it_is():
    dense = Dense()
    given = dense.log_normalizer() + 0.25  # not the true one: a pass of its own would show
    for cache in (False, True):
        target = Target.from_hidden(dense.hidden, dense.head, log_normalizer=given, cache=cache)
        assert torch.equal(target.log_normalizer, given)
        check_primitive(dense, target, dense.log_p() - 0.25)
    alone = Target.from_hidden(dense.hidden, dense.head, log_normalizer=given)
    assert alone.token_ids is None
    assert alone.in_draft_vocab is None
    out = fused_lk.lk_loss_from_logits(dense.draft_logits, alone)
    assert out.accuracy.isnan().all()
    both = Target.from_hidden(dense.hidden, dense.head, log_normalizer=given, token_ids=dense.token_ids)
    check_argmax(dense, both)
    assert torch.equal(both.token_ids, dense.token_ids)


def test_a_renormalised_target_with_given_ids_needs_no_pass():
    dense = Dense()
    target = Target.from_hidden(dense.hidden, dense.head, token_ids=dense.token_ids, renormalize=True)
    check_argmax(dense, target)
    check_primitive(dense, target, dense.log_p(renormalize=True))
    torch.testing.assert_close(target.log_normalizer, dense.log_normalizer())  # on demand


@pytest.mark.parametrize("renormalize", [False, True])
def test_probabilities(renormalize):
    dense = Dense()
    probs = dense.log_p().exp()
    target = Target.from_probs(probs, dense.vocab, dense.token_ids, renormalize=renormalize)
    assert not target.log_normalizer.any()
    check_argmax(dense, target)
    check_primitive(dense, target, dense.log_p(renormalize=renormalize))
    stand_in = Target.from_probs(probs, dense.vocab, renormalize=renormalize)
    assert torch.equal(stand_in.token_ids, dense.vocab.target_ids[probs.argmax(-1)])
    assert stand_in.in_draft_vocab.all()
    shared = Target.from_probs(probs)
    assert torch.equal(shared.token_ids, probs.argmax(-1))


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("k", [1, 4, FULL])
def test_top_k(k, renormalize):
    dense = Dense()
    log_probs = dense.logits.log_softmax(-1)
    top = log_probs.topk(k)
    order = torch.randperm(k)  # sorted any way
    ids, values = top.indices[..., order], top.values[..., order]
    target = Target.from_topk(ids.int(), values, dense.vocab, renormalize=renormalize)
    assert target.draft_vocab_size == dense.vocab.draft_size
    assert not target.log_normalizer.any()
    check_argmax(dense, target)
    kept = torch.full_like(log_probs, NEG_INF).scatter(-1, ids, values)[..., dense.t2d]
    if renormalize:
        lse = kept.logsumexp(-1, keepdim=True)
        kept = kept - torch.where(lse == NEG_INF, 0, lse)
    check_primitive(dense, target, kept)
    shared = Target.from_topk(ids, values, FULL)
    assert torch.equal(shared.token_ids, dense.token_ids)
    assert shared.draft_vocab_size == FULL
    assert shared.in_draft_vocab.all()


def check_top_k(dense, ids, values, vocab=None, log_normalizer=None, rtol=1e-9, impl="torch", **options):
    vocab = dense.vocab if vocab is None else vocab
    target = Target.from_topk(ids, values, vocab, log_normalizer, **options)
    given = (FULL, dense.t2d, None if log_normalizer is None else log_normalizer.double())
    log_p = reference.topk_log_probs(ids, values.double(), *given, **options)
    check_primitive(dense, target, log_p, rtol, impl=impl)
    return target, log_p


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_ragged_top_k(impl, dtype, renormalize):
    """An id of -1 and a value of -inf list nothing; what is listed twice counts once."""
    dense, k = Dense(dtype), 6
    log_probs = dense.logits.double().log_softmax(-1).to(dtype)
    ids, values = ragged_top_k(log_probs, k, torch.Generator().manual_seed(1))
    ids[1, 2:4], values[1, 4] = -1, NEG_INF  # rows that list nothing
    loose = 1e-9 if dtype == torch.float64 else 2e-5
    target, log_p = check_top_k(dense, ids, values, rtol=loose, impl=impl, renormalize=renormalize)
    assert (log_p[1, 2:] == NEG_INF).all()
    everything = reference.topk_log_probs(ids, values.double(), FULL)
    best = torch.where((everything != NEG_INF).any(-1), everything.argmax(-1), -1)
    assert torch.equal(target.token_ids, best)
    assert torch.equal(target.in_draft_vocab, (best >= 0) & dense.t2d[best])
    shared = Target.from_topk(ids.int(), values, FULL, renormalize=renormalize)
    assert torch.equal(shared.in_draft_vocab, best >= 0)
    out = fused_lk.lk_loss_from_logits(dense.draft_logits, target, objective="kl", impl=impl)
    assert out.num_unsupported == (log_p == NEG_INF).all(-1).sum() >= 3
    assert out.loss.isfinite()


def test_top_k_by_hand():
    """Three tokens: 0.5 listed twice, 0.25, and a token that is not listed."""
    half, quarter = math.log(0.5), math.log(0.25)
    ids = torch.tensor([[2, 0, -1, 2, 1]])
    values = torch.tensor([[half, quarter, math.nan, half - 1e-4, NEG_INF]], dtype=torch.float64)
    draft = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
    every = DraftVocab(torch.ones(3, dtype=torch.bool))  # an id of -1 is not its last token
    for impl, vocab in itertools.product(("torch", "triton", "reference"), (3, every)):
        d = fused_lk.lk_divergences_from_logits(draft, Target.from_topk(ids, values, vocab), impl=impl)
        torch.testing.assert_close(d.acceptance.item(), 0.25 + 0.25)
        torch.testing.assert_close(d.kl.item(), 2 / 3 * math.log(2 / 3 / 0.25) + 1 / 3 * math.log(1 / 3 / 0.25))


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_draft_restricted_to_the_top_k(impl, dtype, renormalize):
    """q renormalised on the listed tokens: values, gradients and argmax of the columns that are left."""
    dense = Dense(dtype)
    ids, values = ragged_top_k(dense.logits.log_softmax(-1), 6, torch.Generator().manual_seed(1))
    ids[1, 2] = -1
    ids[1, 3] = (~dense.t2d).nonzero()[: ids.shape[-1], 0]  # none that the draft has
    options = {"renormalize": renormalize}
    target = Target.from_topk(ids, values, dense.vocab, restrict_draft=True, **options)
    log_p = reference.topk_log_probs(ids, values.double(), FULL, dense.t2d, **options)
    leaf = dense.draft_logits.detach().clone().requires_grad_()
    before = leaf.detach().clone()
    d = fused_lk.lk_divergences_from_logits(leaf, target, impl=impl, draft_temperature=0.8)
    weights = torch.linspace(1, 2, 10, dtype=torch.float64).view(SHAPE)
    answered = (log_p != NEG_INF).any(-1)
    ((d.kl - torch.where(answered, d.log_acceptance, 0)) * weights).sum().backward()
    assert torch.equal(leaf.detach(), before)
    assert not answered[1, 2:4].any()
    assert d.log_acceptance[~answered].eq(NEG_INF).all()
    loose = 1e-9 if dtype == torch.float64 else 2e-2 if dtype == torch.bfloat16 else 1e-5
    for i in map(tuple, answered.nonzero().tolist()):
        left = log_p[i] != NEG_INF
        z = dense.draft_logits[i][left].double().requires_grad_()
        log_alpha, kl = reference.divergences(z, log_p[i][left], 0.8)
        ((kl - log_alpha) * weights[i]).backward()
        torch.testing.assert_close(d.log_acceptance[i].double(), log_alpha, rtol=loose, atol=loose)
        torch.testing.assert_close(d.kl[i].double(), kl, rtol=loose, atol=loose)
        torch.testing.assert_close(leaf.grad[i][left].double(), z.grad, rtol=loose, atol=loose)
        assert not leaf.grad[i][~left].any()
        assert d.draft_token_ids[i] == dense.vocab.target_ids[left.nonzero()[z.argmax(), 0]]
    assert not leaf.grad[~answered].any()
    unrestricted = dense.vocab.target_ids[dense.draft_logits.argmax(-1)]
    assert torch.equal(d.draft_token_ids[~answered], unrestricted[~answered])


def test_two_values_of_one_token():
    """Rounding apart, the larger counts; more apart they are refused."""
    ids = torch.tensor([[3, 3, 1]])
    for dtype, near, far in ((torch.float64, 1.9e-3, 2.1e-3), (torch.bfloat16, 2**-6, 2**-5)):

        def given(less, dtype=dtype):
            return torch.tensor([[-1.0 - less, -1.0, -3.0]], dtype=dtype)

        assert Target.from_topk(ids, given(near), 4).token_ids == 3
        assert (Target.from_topk(ids, given(near), 4).dense_log_probs()[0, 3] + 1).abs() < 1e-9
        for far_apart in (given(far), given(far)[:, [1, 0, 2]]):
            with pytest.raises(ValueError, match="one log-probability per token and row; got two"):
                Target.from_topk(ids, far_apart, 4)
        Target.from_topk(torch.tensor([[-1, -1, 1]]), given(far), 4)
    Target.from_topk(ids, torch.tensor([[NEG_INF, -1.0, -3.0]]), 4)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_logits_of_the_k(impl, temperature, renormalize):
    dense = Dense()
    given, options = dense.log_normalizer(temperature), {"temperature": temperature, "renormalize": renormalize}
    ids, values = ragged_top_k(dense.logits, 9, torch.Generator().manual_seed(1))
    target, log_p = check_top_k(dense, ids, values, None, given, impl=impl, **options)
    assert torch.equal(target.log_normalizer, given)
    full = dense.log_p(temperature)
    if not renormalize:
        torch.testing.assert_close(log_p, torch.where(log_p == NEG_INF, NEG_INF, full))
    # A constant per row cancels: log-probabilities say the same of the listed tokens, at any temperature.
    if renormalize:
        moved = values - dense.log_normalizer().unsqueeze(-1)
        for same in (values, moved):
            again, _ = check_top_k(dense, ids, same, impl=impl, **options)
            torch.testing.assert_close(again.dense_log_probs(), target.dense_log_probs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logits_of_all_tokens_sum_to_one(dtype, monkeypatch):
    """The normaliser of logits in half precision is no excess, and no error when contents are asked for."""
    monkeypatch.setenv("FUSED_LK_VALIDATE", "1")
    dense = Dense(dtype, bias=False)
    logits = (dense.logits * 4).to(dtype)
    everything = torch.arange(FULL).expand(*SHAPE, FULL)
    sampled = logits.argmax(-1, keepdim=True)
    everything, logits = torch.cat([everything, sampled], -1), torch.cat([logits, logits.gather(-1, sampled)], -1)
    given = logits[..., :FULL].double().logsumexp(-1).float()
    target = Target.from_topk(everything, logits, FULL, given)
    d = fused_lk.lk_divergences_from_logits(logits[..., :FULL].float(), target)
    torch.testing.assert_close(d.acceptance, torch.ones(SHAPE), atol=1e-3, rtol=0)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda target: pickle.loads(pickle.dumps(target))])
@pytest.mark.parametrize(
    "kind", ["hidden", "on demand", "cached", "shared", "logits", "shared logits", "probs", "topk"]
)
def test_a_copy_says_the_same(kind, copied):
    dense = Dense()
    top = dense.logits.log_softmax(-1).topk(4)
    hidden, ids = (dense.hidden, dense.head), dense.token_ids
    target = {
        "hidden": lambda: Target.from_hidden(*hidden),
        "on demand": lambda: Target.from_hidden(*hidden, token_ids=ids, renormalize=True),
        "cached": lambda: Target.from_hidden(*hidden, cache=True),
        "shared": lambda: Target.from_hidden(dense.hidden, dense.weight, logits_dtype=torch.float32),
        "logits": lambda: Target.from_logits(dense.logits, dense.vocab),
        "shared logits": lambda: Target.from_logits(dense.logits),
        "probs": lambda: Target.from_probs(dense.log_p().exp(), dense.vocab),
        "topk": lambda: Target.from_topk(top.indices, top.values, dense.vocab),
    }[kind]()
    again = copied(target)
    for name in ("log_normalizer", "token_ids", "in_draft_vocab"):
        assert torch.equal(getattr(again, name), getattr(target, name))
    draft = torch.randn(*SHAPE, target.draft_vocab_size, dtype=torch.float64)
    losses = [fused_lk.lk_loss_from_logits(draft, x) for x in (again, target)]
    assert torch.equal(losses[0].loss, losses[1].loss)
    assert torch.equal(losses[0].accuracy, losses[1].accuracy)


def test_a_head_slices_the_draft_rows_once_and_is_detached():
    dense = Dense()
    weight = dense.weight.requires_grad_()
    head = TargetHead(weight, dense.vocab, dense.bias)
    assert torch.equal(head.draft_weight, weight[dense.t2d])
    assert torch.equal(head.draft_bias, dense.bias[dense.t2d])
    assert not any(x.requires_grad for x in (head.weight, head.bias, head.draft_weight, head.draft_bias))
    assert head.weight.data_ptr() == weight.data_ptr()
    shared = TargetHead(weight)
    assert shared.draft_weight.data_ptr() == weight.data_ptr()  # nothing is copied
    hidden = torch.randn(3, HIDDEN, dtype=torch.float64)
    assert not Target.from_hidden(hidden, head).log_normalizer.requires_grad


def test_logits_are_read_where_they_are():
    dense = Dense()
    apart = torch.full((*SHAPE, 2 * FULL), float("nan"), dtype=torch.float64)[..., ::2]
    apart.copy_(dense.logits)
    target = Target.from_logits(apart, dense.vocab)
    torch.testing.assert_close(target.log_normalizer, dense.log_normalizer())
    check_argmax(dense, target)
    check_primitive(dense, target, dense.log_p())
    shared = Target.from_logits(apart)
    torch.testing.assert_close(shared.log_normalizer, dense.log_normalizer())


def test_tokens_that_the_target_cannot_say():
    dense = Dense()
    dense.logits[0, :, dense.token_ids[0, 0]] = NEG_INF
    dense.logits[1, 3] = NEG_INF
    target = Target.from_logits(dense.logits, dense.vocab)
    torch.testing.assert_close(target.log_normalizer, dense.log_normalizer())
    assert target.log_normalizer[1, 3] == NEG_INF
    assert torch.equal(target.token_ids, dense.token_ids)
    check_primitive(dense, target, dense.log_p())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 2, 3)])
def test_leading_shapes(shape):
    dense = Dense()
    hidden = torch.randn(*shape, HIDDEN, dtype=torch.float64)
    target = Target.from_hidden(hidden, dense.head)
    count = torch.Size(shape).numel()
    assert (target.shape, target.num_tokens) == (shape, count)
    assert target.log_normalizer.shape == target.token_ids.shape == target.in_draft_vocab.shape == shape
    draft = torch.randn(*shape, dense.vocab.draft_size, dtype=torch.float64, requires_grad=True)
    out = fused_lk.lk_loss_from_logits(draft, target, objective="kl")
    out.loss.backward()
    assert out.token_log_acceptance.shape == shape
    assert draft.grad.shape == draft.shape
    assert (out.loss > 0) == (count > 0)
