"""vLLM speculators' own EAGLE-3 model, trained with and without the integration."""

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

from fused_lk.integrations import speculators
from fused_lk.rows import plain

PEER = peers.speculators()
DEVICE = peers.device()
STEPS = 3
T, H, V_DRAFT, V_TARGET = 48, 16, 128, 160
SMALL = {"impl": "torch", "workspace_mb": 0.01}


@pytest.fixture
def registered():
    speculators.register()
    yield
    speculators.unregister()


def make_model(norm_output=False, draft_size=V_DRAFT, train_head=True, dtype=torch.float32):
    torch.manual_seed(0)
    layer = LlamaConfig(
        vocab_size=V_TARGET, hidden_size=H, intermediate_size=32, num_attention_heads=1, num_key_value_heads=1,
        num_hidden_layers=1, max_position_embeddings=128, attn_implementation="eager",
    )  # fmt: skip
    config = PEER.config.Eagle3SpeculatorConfig(
        transformer_layer_config=layer, draft_vocab_size=draft_size, norm_output=norm_output
    )
    model = PEER.core.Eagle3DraftModel(config)
    for name in ("embed_tokens", "lm_head", "verifier_lm_head"):
        torch.nn.init.normal_(getattr(model, name).weight, std=0.5)
        getattr(model, name).weight.data[:4] *= 2  # favourites, so that some predictions are right
    model.lm_head.weight.requires_grad_(train_head)
    return model.to(DEVICE, dtype)


def make_batch(seed=0, mask=True, size=T, dtype=torch.float32, ttt_steps=STEPS):
    """Two documents, a prompt and gaps outside the loss mask."""
    generator = torch.Generator().manual_seed(seed)
    loss_mask = torch.rand(1, size, generator=generator) < 0.7
    loss_mask[:, :4] = False
    batch = {
        "hidden_states": torch.randn(1, size, 3 * H, generator=generator).to(dtype),
        "input_ids": torch.randint(V_TARGET, (1, size), generator=generator),
        "document_ids": (torch.arange(size) >= size // 2).long().unsqueeze(0),
        "verifier_last_hidden_states": torch.randn(1, size, H, generator=generator).to(dtype),
        "ttt_steps": ttt_steps,
        "ttt_step_loss_decay": 0.8,
    }
    if mask:
        batch["loss_mask"] = loss_mask
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


def run(model, batch, loss="lk_hybrid", implementation="eager"):
    model.zero_grad()
    results = model(**batch, loss_config=PEER.utils.resolve_loss_config(loss, implementation))
    results[1].backward()
    return results, {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same(ours, theirs, rtol=1e-5):
    """Ids and counts exactly; gradients relative to the largest entry of each parameter's."""
    ((tokens, loss, metrics), gradients), ((their_tokens, their_loss, their_metrics), their_gradients) = ours, theirs
    assert len(tokens) == len(their_tokens) and all(map(torch.equal, tokens, their_tokens))
    torch.testing.assert_close(loss, their_loss, rtol=rtol, atol=0)
    assert list(metrics) == list(their_metrics)
    for name, want in their_metrics.items():
        assert not metrics[name].requires_grad
        torch.testing.assert_close(metrics[name], want, rtol=rtol, atol=0, msg=f"{name}: {{}}".format)
    assert gradients.keys() == their_gradients.keys()
    for name, want in their_gradients.items():
        error = (gradients[name] - want).abs().max() / want.abs().max().clamp_min(1e-12)
        assert error <= rtol, f"{name}: {error:.1e}"


LOSSES = ["kl_div", "tv", "nla", "lk_hybrid", '{"kl_div": 0.5, "tv": 2.0}', '{"ce": 0.5, "rkl": 0.2, "jsd": 1.0}']


@pytest.mark.parametrize("norm_output", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_training_is_the_same(loss, norm_output):
    theirs = make_model(norm_output)
    ours = speculators.apply(copy.deepcopy(theirs), **SMALL)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]
    hits = 0
    for step in range(3):
        batch = make_batch(step)
        expected = run(theirs, batch, loss)
        assert_same(run(ours, batch, loss), expected)
        hits += int(expected[0][2]["full_acc_0_sum"])
        for optimizer in optimizers:
            optimizer.step()
    assert hits > 0


@pytest.mark.parametrize(
    ("model_options", "batch_options"),
    [
        ({"draft_size": V_TARGET}, {}),
        ({"train_head": False}, {}),
        ({}, {"mask": False}),
        ({}, {"size": STEPS}),
        ({}, {"mask": False, "ttt_steps": 1}),
    ],
)
def test_other_configurations(model_options, batch_options):
    model, batch = make_model(**model_options), make_batch(**batch_options)
    expected = run(model, batch)
    assert_same(run(speculators.apply(model), batch), expected)
    assert model_options.get("train_head", True) == ("lm_head.weight" in expected[1])


def test_nothing_supervised():
    model, batch = make_model(), make_batch()
    batch["loss_mask"] &= False
    expected = run(model, batch)
    assert_same(run(speculators.apply(model), batch), expected)


def test_bfloat16():
    model, batch = make_model(dtype=torch.bfloat16), make_batch(dtype=torch.bfloat16)
    expected = run(model, batch)
    assert_same(run(speculators.apply(model), batch), expected, rtol=2e-2)


def test_autocast():
    """As their trainer runs it: float32 weights, half-precision products."""
    model, batch = make_model(), make_batch()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        expected = run(model, batch)
        assert_same(run(speculators.apply(model), batch), expected, rtol=2e-2)


@pytest.mark.parametrize("implementation", ["eager", "fused"])
def test_every_implementation_is_known(implementation, registered):
    model, batch = make_model(), make_batch()
    expected = run(model, batch)
    assert_same(run(speculators.apply(model), batch, implementation=implementation), expected)
    speculators.unregister()
    assert_same(run(model, batch, implementation=implementation), expected)


def test_default_loss(registered):
    model, batch = make_model(), make_batch()
    expected = run(model, batch, "kl_div")
    loss = speculators.apply(model)(**batch)[1]
    torch.testing.assert_close(loss, expected[0][1])


def test_no_full_logits(monkeypatch):
    """None of draft or target, forward and backward; and the watcher sees them where they are."""
    monkeypatch.setattr(plain, "BLOCK_ELEMENTS", 512)
    model, batch = make_model(), make_batch()
    limit = T * V_DRAFT

    def watch(plant=False):
        with Allocations() as seen:
            run(model, batch)
            if plant:
                torch.empty(T, V_DRAFT)
        return [made for made in seen.at_least(limit) if V_DRAFT in made[1]], seen

    assert watch()[0], "the published forward makes logits"
    speculators.apply(model, **SMALL)
    large, seen = watch()
    assert not large
    assert seen.of_width(V_DRAFT), "tiles of logits are seen"
    assert watch(plant=True)[0]


def test_inference_is_theirs():
    model, batch = make_model(), make_batch()
    del batch["verifier_last_hidden_states"]
    expected = model(**batch)
    assert all(map(torch.equal, speculators.apply(model)(**batch), expected))


def test_evaluation_needs_no_gradient():
    model, batch = make_model(), make_batch()
    config = PEER.utils.resolve_loss_config("lk_hybrid", "eager")
    with torch.no_grad():
        expected = model(**batch, loss_config=config)
        ours = speculators.apply(model)(**batch, loss_config=config)
    assert_same((ours, {}), (expected, {}))


def test_compiled():
    """On a GPU speculators compiles its forward; what replaces it must trace, once."""
    model, batch = make_model(), make_batch()
    expected = run(model, batch)
    speculators.apply(model)
    compiled = torch._dynamo.testing.CompileCounter()
    body = vars(model)["forward"]
    body.forward = torch.compile(body.forward, backend=compiled)
    for _ in range(3):
        assert_same(run(model, batch), expected)
    first = compiled.frame_count
    assert first > 0
    run(model, batch)
    assert compiled.frame_count == first, "recompiled for the same shapes"


def test_unapply_restores():
    model, batch = make_model(), make_batch()
    before, module = dict(vars(model)), dict(vars(PEER.core))
    speculators.apply(model)
    speculators.apply(model, impl="torch")
    run(model, batch)
    hidden = torch.randn(1, 2, H, device=DEVICE)
    assert model.lm_head(hidden).shape == (1, 2, V_DRAFT)
    assert inspect.signature(model.forward) == inspect.signature(PEER.core.Eagle3DraftModel.forward.__get__(model))
    speculators.unapply(model)
    speculators.unapply(model)
    assert vars(model) == before and vars(PEER.core) == module


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_applied_and_independent(copied):
    model, batch = speculators.apply(make_model(), **SMALL), make_batch()
    expected = run(model, batch)
    other = copied(model)
    assert_same(run(other, batch), expected)
    attached = vars(other)["forward"]
    assert attached.model is other and attached.options == SMALL and attached is not vars(model)["forward"]
    torch.nn.init.zeros_(other.lm_head.weight)
    assert run(other, batch)[0][1] != expected[0][1]
    assert_same(run(model, batch), expected)
    assert list(other.state_dict()) == list(make_model().state_dict())


def test_accumulation():
    theirs = make_model()
    ours = speculators.apply(copy.deepcopy(theirs), **SMALL)
    gradients = []
    for model in (ours, theirs):
        for seed in range(3):
            batch = make_batch(seed)
            (model(**batch, loss_config=PEER.utils.resolve_loss_config("lk_hybrid", "eager"))[1] / 3).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, want in gradients[1].items():
        assert (gradients[0][name] - want).abs().max() <= 1e-5 * want.abs().max(), name


class OtherForward(PEER.core.Eagle3DraftModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_refusals(monkeypatch):
    def refused(error, match, model):
        before = dict(vars(model))
        with pytest.raises(error, match=match):
            speculators.apply(model)
        assert vars(model) == before

    model = make_model()
    refused(TypeError, "Eagle3DraftModel", torch.nn.Linear(2, 2))
    handle = model.verifier_lm_head.register_forward_pre_hook(lambda *_: None)
    refused(TypeError, "verifier_lm_head to be a torch.nn.Linear", model)
    handle.remove()
    model.__class__ = OtherForward
    refused(TypeError, "forward as published", model)
    model.__class__ = PEER.core.Eagle3DraftModel
    with monkeypatch.context() as patch:
        patch.setattr(PEER.core.Eagle3DraftModel, "forward", lambda self, hidden_states: self.lm_head(hidden_states))
        refused(RuntimeError, "without compute_metrics, verifier_lm_head", model)
    speculators.apply(model)
    with pytest.raises(ValueError, match="kl_div, rkl, jsd, ce, tv, nla, lk_hybrid"):
        model(**make_batch(), loss_config={"mine": (lambda logits, targets: logits.sum(-1), 1.0)})
    speculators.unapply(model)
    before = dict(PEER.utils._FUSED_LOSS_FN_MAP)
    monkeypatch.setattr(metadata, "version", lambda name: "1.0.0")
    with pytest.warns(UserWarning, match=r"speculators==0\.9\.0, and speculators 1\.0\.0"):
        speculators.apply(model)

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(ImportError, match="no installed speculators"):
        speculators.register()
    assert before == PEER.utils._FUSED_LOSS_FN_MAP
