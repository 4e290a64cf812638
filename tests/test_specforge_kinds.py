"""SpecForge's block drafters and P-EAGLE, trained with and without the integration."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import peers
import pytest
import test_specforge as eagle3
import torch
import torch.nn.functional as F
from allocations import Allocations
from test_specforge import SMALL, assert_gradients_agree
from torch import nn
from torch.nn.attention.flex_attention import create_mask
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_map
from transformers import LlamaConfig, Qwen3Config

from bench.accounting import Accounting
from fused_lk.integrations import specforge
from fused_lk.integrations.specforge.rows import Rows
from fused_lk.rows import plain

PEER = peers.specforge()
DEVICE = peers.device()
# No other size is a multiple of a vocabulary.
B, S, H, BLOCK, ANCHORS, V_DRAFT, V_TARGET = 2, 26, 16, 4, 7, 109, 151
MARKOV = {"markov_rank": 5, "enable_confidence_head": True, "confidence_head_with_markov": True}


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """Uncompiled, as in `test_specforge`. FlexAttention has no backward on a CPU: P-EAGLE gets the same attention."""

    def attention(query, key, value, block_mask, enable_gqa, **_):
        mask = create_mask(block_mask.mask_mod, 1, 1, query.shape[2], key.shape[2], device=query.device)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=enable_gqa)
        return mixed.nan_to_num()  # padding attends to nothing

    if DEVICE.type == "cpu":
        monkeypatch.setattr(PEER.peagle_draft, "compile_friendly_flex_attention", attention)
    with torch.compiler.set_stance("force_eager"):
        yield


# What a kind is made of: draft class, training model, and the options of the draft's head.
FAMILY = {
    "dflash": (PEER.dflash.DFlashDraftModel, PEER.blocks.OnlineDFlashModel, {}),
    "domino": (PEER.domino.DominoDraftModel, PEER.blocks.OnlineDominoModel, {"emb_dim": 6, "gru_hidden_dim": 5}),
    "dspark": (PEER.dspark.DSparkDraftModel, PEER.blocks.OnlineDSparkModel, {}),
}
# name: kind, options of the draft's head, of the training model, and of a call
CASES = {
    "dflash": ("dflash", {}, {}, {}),
    "dflash, decay": ("dflash", {}, {"loss_decay_gamma": 3.0}, {}),
    "dflash, sliding window": ("dflash", {"sliding_window": 6}, {}, {}),
    "dpace": ("dflash", {}, {"loss_type": "dpace", "dpace_alpha": 0.3}, {}),
    "dpace, confidence": ("dflash", {}, {"loss_type": "dpace-cumulative-confidence-only"}, {}),
    "dpace, continuation": ("dflash", {}, {"loss_type": "dpace-continuation-value-only", "dpace_alpha": 0.0}, {}),
    "domino": ("domino", {}, {"loss_decay_gamma": 3.0}, {"lambda_base": 0.3}),
    "domino, final alone": ("domino", {"pure_draft_prefix_len": 1}, {}, {"lambda_base": 0.0}),
    "domino, base alone": ("domino", {}, {}, {"lambda_base": 1.0}),
    "domino, shifted": ("domino", {"shift_label": True}, {"loss_decay_gamma": 3.0}, {"lambda_base": 0.3}),
    "dspark": ("dspark", {}, {"loss_decay_gamma": 3.0}, {}),
    "dspark, vanilla": ("dspark", MARKOV, {"loss_decay_gamma": 3.0}, {}),
    "dspark, gated": ("dspark", {**MARKOV, "markov_head_type": "gated"}, {"dspark_ce_loss_alpha": 0.0}, {}),
    "dspark, rnn": ("dspark", {**MARKOV, "markov_head_type": "rnn"}, {"dspark_l1_loss_alpha": 0.0}, {}),
    "dspark, labels alone": (
        "dspark",
        {"markov_rank": 5},
        {"dspark_l1_loss_alpha": 0.0, "dspark_confidence_head_alpha": 0.0},
        {"target_last_hidden_states": None},
    ),
    "peagle": ("peagle", {}, {}, {}),
    "peagle, packed": ("peagle", {}, {"num_depths": 5}, {"lengths": torch.tensor([11, 9])}),
    "peagle, one vocabulary": ("peagle", {"draft_vocab_size": V_TARGET}, {}, {}),
}
ONE_OF_EACH = ["dflash", "dpace", "domino", "dspark, rnn", "peagle"]


def make_model(case, dtype=torch.float32, **more):
    kind, of_head, of_model, _ = CASES[case]
    torch.manual_seed(0)
    model = make_peagle(**of_head, **of_model) if kind == "peagle" else make_blocks(kind, of_head, {**of_model, **more})
    for name, p in model.named_parameters():  # heads that are sure of something
        if "lm_head" in name or "markov_w2" in name or "embed_proj.2" in name:
            nn.init.normal_(p, std=0.4)
    return model.to(DEVICE, dtype)


def make_blocks(kind, of_head, of_model):
    of_draft, of_training, of_kind = FAMILY[kind]
    window = of_head.get("sliding_window")
    config = Qwen3Config(
        vocab_size=V_DRAFT, hidden_size=H, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, use_sliding_window=window is not None,
        sliding_window=window, layer_types=["full_attention", "sliding_attention" if window else "full_attention"],
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    config.num_target_layers, config.block_size = 4, BLOCK
    config.dflash_config = {"mask_token_id": 1, "target_layer_ids": [1, 2], **of_kind, **of_head}
    options = {"block_size": BLOCK, "attention_backend": "sdpa", "num_anchors": ANCHORS, "objective_chunk_blocks": 3}
    options |= {"shift_label": of_head.get("shift_label", False)} if kind == "domino" else {}
    head, words = nn.Linear(H, V_DRAFT, bias=False), nn.Embedding(V_DRAFT, H)  # as TargetEmbeddingsAndHead has them
    head.requires_grad_(False), words.requires_grad_(False)
    return of_training(of_draft(config), head, words, mask_token_id=1, **{**options, **of_model})


def make_peagle(draft_vocab_size=V_DRAFT, num_depths=3):
    config = LlamaConfig(
        vocab_size=V_TARGET, hidden_size=H, intermediate_size=32, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    config.draft_vocab_size = draft_vocab_size
    draft = PEER.peagle_draft.PEagleDraftModel(config)
    ids = torch.randperm(V_TARGET)[:draft_vocab_size].sort().values
    draft.t2d.zero_()[ids] = True
    draft.d2t.copy_(ids - torch.arange(draft_vocab_size))
    return PEER.peagle.OnlinePEagleModel(draft, mask_token_id=1, num_depths=num_depths)


def make_batch(case, seed=0, dtype=torch.float32, supervised=0.8):
    """Prompts, padding, and gaps inside blocks lie outside the loss mask."""
    kind, _, _, of_call = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    b, size = (1, V_TARGET) if kind == "peagle" else (B, V_DRAFT)
    loss_mask = (torch.rand(b, S, generator=generator) < supervised).long()
    loss_mask[0, :3], loss_mask[-1, S - 5 :] = 0, 0
    batch = {"input_ids": torch.randint(size, (b, S), generator=generator), "loss_mask": loss_mask}
    layers = 3 if kind == "peagle" else 2
    batch["hidden_states"] = torch.randn(b, S, layers * H, generator=generator).to(dtype)
    if kind == "dspark":
        batch["target_last_hidden_states"] = torch.randn(b, S, H, generator=generator).to(dtype)
    if kind == "peagle":
        batch["loss_mask"] = loss_mask.unsqueeze(-1)
        batch |= {"attention_mask": torch.ones(b, S), "lengths": torch.tensor([S - 3])}
        batch["target"] = (2 * torch.randn(b, S, V_TARGET, generator=generator)).to(dtype)
    return tree_map(lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x, {**batch, **of_call})


def run(model, batch, seed=0):
    """What the model returns, and the gradients. Anchors and samples are drawn anew with the same seed."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(**batch)
    out[0].backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, rtol=1e-5, rtol_of_gradients=None, **how):
    assert tree_flatten(ours[0])[1] == tree_flatten(theirs[0])[1]
    for (path, x), y in zip(tree_flatten_with_path(ours[0])[0], tree_flatten(theirs[0])[0], strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-6, equal_nan=True, msg=f"{path}: {x} for {y}", **how)
        assert x.requires_grad == y.requires_grad, path
    assert_gradients_agree(ours[1], theirs[1], rtol if rtol_of_gradients is None else rtol_of_gradients)


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same(case):
    theirs = make_model(case)
    ours = specforge.apply(copy.deepcopy(theirs), **SMALL, keep_mb=0.02)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.2) for model in (ours, theirs)]
    for step in range(2):
        batch = make_batch(case, step)
        expected = run(theirs, batch, step)
        assert_same(run(ours, batch, step), expected)
        assert expected[0][0] > 0 and len(expected[1]) > 10
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("case", [*ONE_OF_EACH, "dspark, vanilla", "dspark, labels alone", "peagle, one vocabulary"])
def test_no_full_logits(case, monkeypatch):
    """None of draft or target, forward and backward; and the watcher sees them where they are."""
    monkeypatch.setattr(plain, "BLOCK_ELEMENTS", 1024)
    is_peagle = case.startswith("peagle")
    model, batch = make_model(case, **({} if is_peagle else {"objective_chunk_blocks": 0})), make_batch(case)
    rows = S if is_peagle else B * ANCHORS * BLOCK

    def logits(model, plant=False):
        with Allocations() as seen:
            run(model, batch)
            if plant:
                torch.empty(rows, V_DRAFT)
        vocabularies = {n * v for n in range(1, 9) for v in (V_DRAFT, V_TARGET)}
        wide = [made for made in seen.storages if vocabularies.intersection(made[1]) and made[1][-1] != H]
        assert wide, "tiles of logits are seen"
        return [made for made in wide if made[0] >= rows * V_DRAFT // 2]

    assert logits(model), "the published forward makes logits"
    specforge.apply(model, **SMALL)
    assert not logits(model)
    assert logits(model, plant=True)


@pytest.mark.parametrize("case", ONE_OF_EACH)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_every_implementation(case, impl):
    model, batch = make_model(case, **({} if case == "peagle" else {"num_anchors": 3})), make_batch(case)
    expected = run(model, batch)
    assert_same(run(specforge.apply(model, impl=impl), batch), expected)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_sure_rows(case):
    """A draft that is sure (of the right and of the wrong): float32 agrees with the float64 of the published model."""
    model = make_model(case)
    heads = [p for name, p in model.named_parameters() if "lm_head" in name]
    for p in heads:
        p.data.mul_(12)
    batch = make_batch(case)
    ours = run(specforge.apply(copy.deepcopy(model)), batch)
    theirs = run(model, batch)
    wide = tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, batch)
    if case == "peagle":  # their kernel has no float64
        return assert_same(ours, theirs, rtol_of_gradients=1e-4)
    (loss, _, _), gradients = run(model.double(), wide)
    assert loss > 4
    torch.testing.assert_close(ours[0][0].double(), loss, rtol=1e-6, atol=0)
    for name, want in gradients.items():
        scale = want.abs().max()
        error, eager = ((x[1][name] - want).abs().max() / scale for x in (ours, theirs))
        assert error <= 1.5 * eager + 1e-5, name


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_bfloat16(case):
    """The published cross-entropies are bfloat16 here, and ours float32."""
    model, batch = make_model(case, torch.bfloat16), make_batch(case, dtype=torch.bfloat16)
    expected = run(model, batch)
    assert_same(run(specforge.apply(model), batch), expected, 1e-2, 4e-2, check_dtype=False)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_autocast(case):
    model, batch = make_model(case), make_batch(case)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        expected = run(model, batch)
        ours = run(specforge.apply(model), batch)
    assert_same(ours, expected, 1e-2, 4e-2, check_dtype=False)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_evaluation_needs_no_gradient(case):
    model, batch = make_model(case), make_batch(case)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(**batch)
        torch.manual_seed(0)
        assert_same((specforge.apply(model)(**batch), {}), (expected, {}))


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_copies_and_unapply(case):
    model, batch = specforge.apply(make_model(case), **SMALL), make_batch(case)
    before = run(specforge.unapply(make_model(case)), batch)
    expected = run(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(run(other, batch), expected)
        assert vars(other)["forward"].model is other
    assert "forward" not in vars(specforge.unapply(model))
    assert_same(run(model, batch), before)


@pytest.mark.parametrize("case", ["dflash", "dspark"])
def test_rows_that_do_not_count_are_not_read(case):
    """Infinite hidden states outside the mask: NaN there, and the same as without them here."""
    model, batch = make_model(case), make_batch(case)
    draft_blocks = model._forward_draft_blocks

    def poisoned(**given):
        anchors, kept, hidden = draft_blocks(**given)
        ignored = torch.zeros(hidden.shape[:2], dtype=torch.bool)
        # The last label of a block at the end of the sequence does not exist.
        ends = (anchors + BLOCK > S - 1) | ~kept
        ignored.view(B, -1, BLOCK)[..., -1] = ends if case == "dspark" else ~kept
        assert ignored.any()
        return anchors, kept, hidden.masked_fill(ignored.unsqueeze(-1), float("inf"))

    specforge.apply(model)
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    batch["loss_mask"][0, 4:], batch["loss_mask"][1, 20:24] = 1, 1  # fewer anchors in the second sequence
    expected = run(model, batch)
    model._forward_draft_blocks = poisoned
    assert_same(run(model, batch), expected)
    assert run(specforge.unapply(model), batch)[0][0].isnan()


@pytest.mark.parametrize("case", ["dflash, decay", "dpace", "domino"])
def test_masks_with_weights(case):
    """A token counts by its weight in the loss, and from 0.5 on in the accuracy."""
    model, batch = make_model(case), make_batch(case)
    weights = torch.rand(B, S, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    batch["loss_mask"] = batch["loss_mask"] * (0.2 + 0.8 * weights)
    expected = run(model, batch)
    assert_same(run(specforge.apply(model), batch), expected)


@pytest.mark.parametrize("supervised", [1.0, 0.0])
def test_masks_of_peagle(supervised):
    model, batch = make_model("peagle"), make_batch("peagle", supervised=supervised)
    expected = run(model, batch)
    assert_same(run(specforge.apply(model), batch), expected)


def make_strategy(kind, seed=0):
    """The trainer's step, with a target head, and its batch of captured hidden states."""
    if kind == "peagle":
        model, step, size, b = make_model("peagle"), PEER.strategies.PEagleTrainStrategy, H, 1
    else:
        model, step, size, b = eagle3.make_model("lambda"), PEER.strategies.Eagle3TrainStrategy, eagle3.H_TARGET, B
    words = model.draft_model.t2d.numel()
    head = object.__new__(PEER.target_head.TargetHead)  # its __init__ reads a checkpoint
    nn.Module.__init__(head)
    generator = torch.Generator().manual_seed(seed)
    head.fc = nn.Linear(size, words, bias=False).requires_grad_(False)
    head.fc.weight.copy_(torch.randn(words, size, generator=generator))
    tensors = {
        "input_ids": torch.randint(words, (b, S), generator=generator),
        "attention_mask": torch.ones(b, S, dtype=torch.long),
        "loss_mask": (torch.rand(b, S, generator=generator) < 0.8).long(),
        "hidden_state": torch.randn(b, S, 3 * size, generator=generator),
        "target": torch.randn(b, S, size, generator=generator),
    }
    batch = SimpleNamespace(
        tensors={k: x.to(DEVICE) for k, x in tensors.items()}, metadata={"target_repr": "hidden_state"}
    )
    return step(model, target_head=head.to(DEVICE)), batch


def run_strategy(strategy, batch):
    model = strategy.trainable_module()
    model.zero_grad()
    torch.manual_seed(0)
    out = strategy.forward_loss(batch)
    out.loss.backward()
    return (out.loss, out.metrics), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
def test_target_head_hands_over_hidden_states(kind, monkeypatch):
    """The trainer's own step is the same, and target logits exist neither in the model nor before it."""
    monkeypatch.setattr(plain, "BLOCK_ELEMENTS", 1024)
    strategy, batch = make_strategy(kind)
    model, head = strategy.trainable_module(), strategy.target_head
    expected = run_strategy(strategy, batch)
    specforge.apply(model, **SMALL, target_head=head)
    with Allocations() as seen:
        ours = run_strategy(strategy, batch)
    assert_same(ours, expected)
    words = head.fc.out_features
    wide = [made for made in seen.storages if made[1] and made[1][-1] == words]
    assert wide and max(made[0] for made in wide) < S * words // 2
    other = copy.deepcopy(strategy)
    assert_same(run_strategy(other, batch), ours)
    assert other.target_head is vars(other.trainable_module())["forward"].target_head
    specforge.apply(model)
    assert_same(run_strategy(strategy, batch), expected)
    specforge.apply(model, target_head=head)
    assert "forward" not in vars(specforge.unapply(model)) and "forward" not in vars(head)
    assert_same(run_strategy(strategy, batch), expected)


def test_target_heads_that_cannot_be_taken():
    model = make_model("dflash")
    with pytest.raises(TypeError, match="EAGLE-3 or P-EAGLE model"):
        specforge.apply(model, target_head=model.lm_head)
    assert "forward" not in vars(model)
    model = make_model("peagle")
    with pytest.raises(TypeError, match="TargetHead; got"):
        specforge.apply(model, target_head=nn.Linear(H, V_TARGET))
    assert "forward" not in vars(model)


def test_domino_without_base_does_no_more_than_it_has_to():
    """The base takes a product in the forward, and none in the backward."""
    count = {}
    for case in ("domino", "domino, final alone"):
        model, batch = specforge.apply(make_model(case)), make_batch(case)
        with Accounting() as seen:
            run(model, batch)
        count[case] = len([x for x in seen.gemms if (x.n, x.k) == (V_DRAFT, H)])
    assert count == {"domino": 4, "domino, final alone": 3}


class OwnHead(PEER.domino.DominoDraftModel):
    def apply_logits_head(self, base_logits, **given):
        return 0.5 * super().apply_logits_head(base_logits, **given)


class OwnMarkov(PEER.dspark.VanillaMarkovHead):
    pass


def test_refusals():
    def refused(match, model):
        with pytest.raises(TypeError, match=match):
            specforge.apply(model)
        assert "forward" not in vars(model)

    model = make_model("domino")
    model.draft_model.__class__ = OwnHead
    refused("OwnHead.apply_logits_head", model)
    model = make_model("domino")
    model.draft_model.embed_proj[2] = nn.Identity()
    refused("embed_proj.2 to be a torch.nn.Linear", model)
    model.draft_model.embed_proj[2] = nn.Linear(6, V_DRAFT)
    refused("embed_proj.2 without a bias", model)
    model = make_model("dspark, vanilla")
    model.draft_model.markov_head.__class__ = OwnMarkov
    refused("OwnMarkov", model)
    model = make_model("dspark, vanilla")
    model.draft_model.markov_head.markov_w2.register_forward_hook(lambda *_: None)
    refused("without forward hooks", model)
    model.draft_model.markov_head.markov_w2 = nn.Linear(5, V_DRAFT)
    refused("markov_w2 without a bias", model)
    for case in ONE_OF_EACH:
        model = make_model(case)
        owner = model.draft_model if case == "peagle" else model
        owner.lm_head = nn.Sequential(owner.lm_head)
        refused("lm_head to be a torch.nn.Linear", model)


def test_what_rows_answer():
    """Numbers of the rows, in the shape that is asked for, and nothing else."""
    ids = torch.arange(6).view(2, 3)
    rows = Rows((2, 3, 5), {("argmax",): ids, ("softmax", "max", "values"): ids + 0.5})
    assert torch.equal(rows.reshape(-1, rows.shape[-1]).argmax(dim=-1), ids.reshape(-1))
    assert torch.equal(torch.argmax(rows.reshape_as(torch.empty(3, 2, 5)), dim=-1), ids.view(3, 2))
    assert torch.equal(torch.softmax(rows.float(), dim=-1).max(dim=-1).values, ids + 0.5)
    for wrong in (
        lambda: rows.argmax(dim=1),
        lambda: rows.sum(dim=-1),
        lambda: F.cross_entropy(rows.reshape(-1, 5), ids.reshape(-1), reduction="none"),
        lambda: torch.softmax(rows, dim=-1) - rows,
        lambda: rows * 2,
    ):
        with pytest.raises(TypeError):
            wrong()
    rows = SimpleNamespace(of=Rows((4, 5), {("cross_entropy",): ids.float()[:, :2].reshape(-1)}))
    with pytest.raises(TypeError, match="cross_entropy"):
        F.cross_entropy(rows.of, torch.zeros(4, dtype=torch.long))
