"""SpecForge's own EAGLE-3 model, trained with and without the integration."""

from __future__ import annotations

import copy
import inspect
import pickle
from importlib import metadata

import peers
import pytest
import torch
from allocations import Allocations
from transformers import LlamaConfig

from fused_lk.integrations import specforge
from fused_lk.rows import plain

PEER = peers.specforge()
DEVICE = peers.device()
STEPS = 3
# More rows than the heads are wide or tall, so that nothing but a tensor over rows and vocabulary has B * S * V_DRAFT
# elements: 6144, against 4608 for all attention scores and 1536 for a gradient of the embedding.
B, S, H, H_TARGET, V_DRAFT, V_TARGET = 4, 24, 16, 16, 64, 96
RESULTS = ("loss", "acceptance rate", "accuracy", "correct", "denominator", "metric loss", "loss denominator")
SMALL = {"impl": "torch", "workspace_mb": 0.01}


@pytest.fixture(autouse=True)
def eager():
    """Their compiled norms and rotary embeddings run uncompiled here: the same numbers, without the minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


def make_model(lk_loss_type=None, kl_scale=0.8, kl_decay=2.0, draft_size=V_DRAFT, dtype=torch.float32, rope=None):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V_TARGET, hidden_size=H, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
        num_hidden_layers=1, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    config.draft_vocab_size, config.target_hidden_size = draft_size, H_TARGET
    if rope is not None:
        config.rope_scaling = rope
    draft = PEER.draft.LlamaForCausalLMEagle3(config, attention_backend="sdpa").to(dtype)
    target_ids = torch.randperm(V_TARGET - 1)[:draft_size].add(1).sort().values  # token 0 is not in the draft's
    if draft_size == V_TARGET:
        target_ids = torch.arange(V_TARGET)
    set_vocab(draft, target_ids)
    torch.nn.init.normal_(draft.lm_head.weight, std=0.3)
    return PEER.model.OnlineEagle3Model(
        draft.to(DEVICE), STEPS, "sdpa", lk_loss_type=lk_loss_type, kl_scale=kl_scale, kl_decay=kl_decay
    )


def set_vocab(draft, target_ids):
    t2d = torch.zeros(V_TARGET, dtype=torch.bool)
    t2d[target_ids] = True
    draft.t2d.copy_(t2d)
    draft.d2t.copy_(target_ids - torch.arange(len(target_ids)))


def make_batch(seed, kind="logits", mask_dtype=torch.long, supervised=0.7, dtype=torch.float32):
    """Two padded sequences of four, prompts and gaps outside the loss mask, some targets outside the draft's words."""
    generator = torch.Generator().manual_seed(seed)
    attention_mask = torch.ones(B, S, dtype=torch.long)
    attention_mask[1, 15:], attention_mask[2, 20:] = 0, 0
    loss_mask = (torch.rand(B, S, generator=generator) < supervised) * attention_mask
    if mask_dtype.is_floating_point:
        loss_mask = loss_mask * torch.rand(B, S, generator=generator)
    head = torch.randn(V_TARGET, H_TARGET, generator=generator)
    head[:8] *= 2.5  # favourites, token 0 among them
    hidden = torch.randn(B, S, H_TARGET, generator=generator)
    batch = {
        "input_ids": torch.randint(V_TARGET, (B, S), generator=generator),
        "attention_mask": attention_mask,
        "loss_mask": loss_mask.to(mask_dtype).unsqueeze(-1),
        "hidden_states": torch.randn(B, S, 3 * H_TARGET, generator=generator).to(dtype),
    }
    if kind == "logits":
        batch["target"] = (hidden @ head.T).to(dtype)
    else:
        batch |= {"target": None, "target_hidden_for_compact": hidden.to(dtype), "target_head_weight": head.to(dtype)}
    return {name: x if x is None else x.to(DEVICE) for name, x in batch.items()}


def run(model, batch):
    """The seven lists, and the gradients of the trainer's decayed sum."""
    model.zero_grad()
    results = model(**batch)
    sum(0.8**k * loss for k, loss in enumerate(results[0])).backward()
    return results, {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_results_agree(ours, theirs, rtol=1e-5):
    for name, got, want in zip(RESULTS, ours, theirs, strict=True):
        for k, (x, y) in enumerate(zip(got, want, strict=True)):
            message = f"{name} of step {k}: {{}}".format
            torch.testing.assert_close(x, y, rtol=rtol, atol=1e-7, msg=message)
            assert x.requires_grad == y.requires_grad, name


def assert_gradients_agree(ours, theirs, rtol=1e-5):
    """Relative to the largest entry of each parameter's gradient."""
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        error = (ours[name] - want).abs().max() / want.abs().max().clamp_min(1e-12)
        assert error <= rtol, f"{name}: {error:.1e}"


def assert_same(ours, theirs, rtol=1e-5):
    assert_results_agree(ours[0], theirs[0], rtol)
    assert_gradients_agree(ours[1], theirs[1], rtol)


@pytest.mark.parametrize("kind", ["logits", "compact"])
@pytest.mark.parametrize("lk_loss_type", [None, "alpha", "lambda"])
def test_training_is_the_same(lk_loss_type, kind):
    theirs = make_model(lk_loss_type)
    ours = specforge.apply(copy.deepcopy(theirs), **SMALL)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.3) for model in (ours, theirs)]
    hits = 0
    for step in range(5):
        batch = make_batch(step, kind)
        expected = run(theirs, batch)
        assert_same(run(ours, batch), expected)
        hits += sum(int(x) for x in expected[0][3])
        for optimizer in optimizers:
            optimizer.step()
    assert hits > 0


@pytest.mark.parametrize("kind", ["logits", "compact"])
@pytest.mark.parametrize("lk_loss_type", [None, "alpha", "lambda"])
def test_no_full_logits(lk_loss_type, kind, monkeypatch):
    """None of draft or target, forward and backward; and the watcher sees them where they are."""
    monkeypatch.setattr(plain, "BLOCK_ELEMENTS", 1024)  # the cache block, as small as the workspace
    model, batch = make_model(lk_loss_type), make_batch(0, kind)
    limit = B * S * V_DRAFT

    def watch(plant=False):
        with Allocations() as seen:
            run(model, batch)
            if plant:
                torch.empty(B * S, V_DRAFT)
        return seen

    assert watch().at_least(limit), "the published forward makes logits"
    specforge.apply(model, **SMALL)
    seen = watch()
    assert not seen.at_least(limit)
    assert seen.of_width(V_DRAFT), "tiles of logits are seen"
    assert watch(plant=True).at_least(limit)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.long, torch.float32])
@pytest.mark.parametrize("supervised", [1.0, 0.2, 0.0])
@pytest.mark.parametrize("lk_loss_type", [None, "alpha", "lambda"])
def test_masks(lk_loss_type, supervised, mask_dtype):
    """Weights count in alpha, their being non-zero in KL; nothing supervised is 0."""
    model, batch = make_model(lk_loss_type), make_batch(0, mask_dtype=mask_dtype, supervised=supervised)
    expected = run(model, batch)
    assert_same(run(specforge.apply(model), batch), expected)


@pytest.mark.parametrize(("kl_scale", "kl_decay"), [(-1.5, 0.5), (4.0, 0.0), (0.0, 3.0), (1.0, -2.0)])
def test_any_finite_schedule(kl_scale, kl_decay):
    model, batch = make_model("lambda", kl_scale, kl_decay), make_batch(0)
    expected = run(model, batch)
    assert_same(run(specforge.apply(model), batch), expected)


@pytest.mark.parametrize("kind", ["logits", "compact"])
def test_one_vocabulary(kind):
    model, batch = make_model("lambda", draft_size=V_TARGET), make_batch(0, kind)
    expected = run(model, batch)
    assert_same(run(specforge.apply(model), batch), expected)


def test_argmax_that_is_no_draft_token():
    """Rows that are not supervised have no computed id, which must not be mistaken for token 0."""
    model, batch = make_model(), make_batch(0, supervised=1.0)
    batch["target"][..., 0] = 50.0
    expected = run(model, batch)
    ours = run(specforge.apply(model), batch)
    assert_same(ours, expected)
    assert not any(ours[0][3])


@pytest.mark.parametrize("lk_loss_type", [None, "alpha", "lambda"])
def test_bfloat16(lk_loss_type):
    """The same bf16 logits on both sides; their two gradients are rounded before they are added, ours after."""
    model, batch = make_model(lk_loss_type, dtype=torch.bfloat16), make_batch(0, dtype=torch.bfloat16)
    expected = run(model, batch)
    ours = run(specforge.apply(model), batch)
    assert_results_agree(ours[0], expected[0], rtol=1e-5)
    assert_gradients_agree(ours[1], expected[1], rtol=2e-2)


@pytest.mark.parametrize("kind", ["logits", "compact"])
def test_autocast(kind):
    model, batch = make_model("lambda"), make_batch(0, kind)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        expected = run(model, batch)
        ours = run(specforge.apply(model), batch)
    assert_results_agree(ours[0], expected[0], rtol=1e-5)
    assert_gradients_agree(ours[1], expected[1], rtol=2e-2)


class SlicingAdapter(PEER.adapters.UspAdapter):
    """Their sequence-parallel adapter, around attention within the rank: theirs across ranks needs flash-attn."""

    def step_view(self, *, attention_mask, **arguments):
        self.sp_ulysses_degree = 1
        state = super().step_view(attention_mask=attention_mask, **arguments)
        size = S - STEPS
        state.attention_mask = attention_mask[:, :, :size, :size]
        return state


class SplitAdapter(SlicingAdapter):
    """Its slices, and reducers that stand for other ranks, in one process."""

    def __init__(self, model, calls):
        PEER.adapters.BackendAdapter.__init__(self, model)
        self.calls = calls

    def reduce_metrics(self, *, local_correct, local_denom):
        requires_grad = local_correct.requires_grad, local_denom.requires_grad
        self.calls.append((local_correct.detach(), local_denom.detach(), requires_grad))
        return local_correct * 2 + 0.25, local_denom * 3 + 1

    def reduce_loss(self, loss):
        self.calls.append((loss.detach(), loss.requires_grad))
        return loss * 1.5


@pytest.mark.parametrize("lk_loss_type", [None, "alpha", "lambda"])
def test_sequence_parallel_adapter(lk_loss_type):
    """Sliced rows and distributed reducers, called as often, in the same order, with the same numbers."""
    model, batch = make_model(lk_loss_type), make_batch(0)
    calls: list = []
    model._make_adapter = lambda: SplitAdapter(model, calls)
    expected, reduced = run(model, batch), list(calls)
    calls.clear()
    assert_same(run(specforge.apply(model), batch), expected)
    assert len(calls) == len(reduced) == 4 * STEPS
    for got, want in zip(calls, reduced, strict=True):
        torch.testing.assert_close(got[:-1], want[:-1])
        assert got[-1] == want[-1], "a collective needs its backward on every rank, or on none"


def test_vision_and_language():
    """Positions of three axes, and embeddings of images in the place of ids, as Qwen-VL has them."""
    model = make_model(
        "lambda", rope={"type": "mrope", "rope_type": "mrope", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    )
    batch = make_batch(0, "compact")
    text = torch.arange(S).expand(B, S)
    image = torch.stack([text, text.clamp(min=6), text.clamp(max=9)])
    batch["position_ids"] = image.contiguous().to(DEVICE)
    expected = run(model, batch)
    assert_same(run(specforge.apply(model), batch), expected)
    batch["position_ids"] = text.expand(3, B, S).contiguous().to(DEVICE)
    of_query = "draft_model.midlayer.self_attn.q_proj.weight"
    assert not torch.equal(run(model, batch)[1][of_query], expected[1][of_query]), "the axes are read"


def test_evaluation_needs_no_gradient():
    model, batch = make_model("lambda"), make_batch(0)
    with torch.no_grad():
        expected = model(**batch)
        ours = specforge.apply(model)(**batch)
    assert_results_agree(ours, expected)
    assert not any(x.requires_grad for x in ours[0])


def test_vocabulary_loaded_later():
    """The draft vocabulary is read when it is used, and again when it was written to."""
    model, batch = make_model(), make_batch(0, "compact")
    specforge.apply(model)
    run(model, batch)
    set_vocab(model.draft_model, torch.arange(V_DRAFT) + V_TARGET - V_DRAFT)
    ours = run(model, batch)
    assert_same(ours, run(specforge.unapply(model), batch))


def test_unapply_restores():
    model, batch = make_model("alpha"), make_batch(0)
    before, module, draft = dict(vars(model)), dict(vars(PEER.model)), dict(vars(model.draft_model))
    expected = run(model, batch)
    specforge.apply(model)
    specforge.apply(model, impl="torch")
    run(model, batch)
    hidden = torch.randn(1, 2, H, device=DEVICE)
    assert model.draft_model.compute_logits(hidden).shape == (1, 2, V_DRAFT), "other callers still get logits"
    assert inspect.signature(model.forward) == inspect.signature(PEER.model.OnlineEagle3Model(None).forward)
    assert vars(PEER.model) == module and vars(model.draft_model) == draft
    specforge.unapply(model)
    specforge.unapply(model)
    assert vars(model) == before
    assert_same(run(model, batch), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_applied_and_independent(copied):
    model, batch = specforge.apply(make_model("lambda"), **SMALL), make_batch(0, "compact")
    expected = run(model, batch)
    other = copied(model)
    assert_same(run(other, batch), expected)
    ours, theirs = vars(model)["forward"], vars(other)["forward"]
    assert theirs.model is other and theirs.options == SMALL
    assert theirs.head is not ours.head, "what is kept of one model is not that of another"
    torch.nn.init.zeros_(other.draft_model.lm_head.weight)
    assert run(other, batch)[0][0][0] != expected[0][0][0]
    assert_same(run(model, batch), expected)
    assert vars(specforge.unapply(other)).keys() == vars(make_model()).keys()
    assert "forward" in vars(model)


def test_checkpoints_are_theirs():
    """An applied model saves and loads what an unapplied one does."""
    theirs, ours = make_model("alpha"), specforge.apply(make_model("alpha"))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    batch = make_batch(0)
    assert_same(run(ours, batch), run(theirs, batch))


@pytest.mark.parametrize("kind", ["logits", "compact"])
def test_accumulation(kind):
    """Gradients of several batches add up, as `no_sync` micro-steps have them."""
    theirs = make_model("lambda")
    ours = specforge.apply(copy.deepcopy(theirs), **SMALL)
    gradients = []
    for model in (ours, theirs):
        for seed in range(3):
            (sum(model(**make_batch(seed, kind))[0]) / 3).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_gradients_agree(*gradients)


class OtherForward(PEER.model.OnlineEagle3Model):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def without_compute_logits(self, input_ids):
    return _compute_target_p_padded, compute_target_p_padded_from_hidden, self._acc_and_loss  # noqa: F821


def test_refusals(monkeypatch):
    """Each names what was expected and the remedy, and leaves the model as it was."""

    def refused(error, match, model):
        before = dict(vars(model))
        with pytest.raises(error, match=match):
            specforge.apply(model)
        assert vars(model) == before

    model = make_model()
    refused(TypeError, "OnlineEagle3Model", torch.nn.Linear(2, 2))
    refused(TypeError, "forward as published", OtherForward(model.draft_model))
    model._acc_and_loss = None
    refused(TypeError, "_acc_and_loss as published", model)
    del model._acc_and_loss
    handle = model.draft_model.lm_head.register_forward_hook(lambda *_: None)
    refused(TypeError, "without forward hooks", model)
    handle.remove()
    specforge.apply(model)
    model._acc_and_loss = None
    refused(TypeError, "_acc_and_loss as published", model)
    del model._acc_and_loss
    with pytest.raises(ValueError, match="impl"):
        specforge.apply(model, impl="cuda")
    with monkeypatch.context() as patch:
        patch.setattr(PEER.model.OnlineEagle3Model, "forward", without_compute_logits)
        refused(RuntimeError, "without compute_logits", model)
    monkeypatch.setattr(metadata, "version", lambda name: "0.3.0")
    with pytest.warns(UserWarning, match=r"specforge==0\.2\.0, and specforge 0\.3\.0"):
        specforge.apply(model)


def test_missing_package(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(ImportError, match="no installed specforge"):
        specforge.apply(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["logits", "compact"])
def test_mapping_that_contradicts_itself(kind):
    model, batch = specforge.apply(make_model()), make_batch(0, kind)
    model.draft_model.d2t.zero_()
    with pytest.raises(ValueError, match="d2t"):
        model(**batch)


def test_logits_that_are_changed_after_the_head():
    model, batch = specforge.apply(make_model()), make_batch(0)

    class Scaled(type(model.draft_model)):
        def compute_logits(self, hidden_states):
            return 0.5 * super().compute_logits(hidden_states)

    published = type(model.draft_model)
    model.draft_model.__class__ = Scaled
    with pytest.raises(TypeError, match="compute_logits"):
        model(**batch)
    model.draft_model.__class__ = published
    own = model.draft_model.lm_head
    model.draft_model.compute_logits = lambda hidden_states: own(hidden_states)
    with pytest.raises(TypeError, match="compute_logits"):
        model(**batch)


@pytest.mark.parametrize("lk_loss_type", ["alpha", "lambda"])
def test_disjoint_distributions(lk_loss_type):
    """Where float32 cannot hold sum min(p, q) the original's gradient for "alpha" is NaN; ours is there."""
    model, batch = make_model(lk_loss_type), make_batch(0, supervised=1.0)
    favourite = model.draft_model.t2d.nonzero()[3]
    batch["target"].zero_()[..., favourite] = 400.0
    head = model.draft_model.lm_head.weight.data
    head.mul_(100)[3].zero_()
    expected = run(model, batch)
    ours = run(specforge.apply(model), batch)
    if lk_loss_type == "lambda":
        assert_same(ours, expected)
    else:
        assert any(x.isnan().any() for x in expected[1].values())
        assert all(x.isfinite().all() for x in ours[1].values()) and ours[1]["draft_model.lm_head.weight"].any()
        torch.testing.assert_close(ours[0][1:3], expected[0][1:3])


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_every_implementation(impl):
    model, batch = make_model("lambda"), make_batch(0, "compact")
    expected = run(model, batch)
    assert_same(run(specforge.apply(model, impl=impl), batch), expected)
