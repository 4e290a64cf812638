"""The README says nothing that is not so: its Python runs as written, its options and files exist."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fused_lk
from fused_lk.integrations import specforge, speculators

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def training_step():
    torch.manual_seed(0)
    vocab = fused_lk.DraftVocab(torch.arange(9) % 3 > 0)
    hidden = torch.randn(3, 2, 3, 4, requires_grad=True)
    logits = torch.randn(2, 3, 9)
    return {
        "token_ids": logits.topk(4).indices,
        "logits": logits.topk(4).values,
        "log_probs": logits.log_softmax(-1).topk(4).values,
        "logits_lse": (logits / 0.8).logsumexp(-1),
        "vocab": vocab,
        "torch": torch,
        "F": F,
        "fused_lk": fused_lk,
        "draft_hidden": torch.randn(2, 3, 4, requires_grad=True),
        "draft_weight": torch.randn(6, 4, requires_grad=True),
        "target_hidden": torch.randn(2, 3, 5),
        "target_weight": torch.randn(9, 5),
        "t2d": vocab.t2d,
        "target": fused_lk.Target.from_hidden(torch.randn(2, 3, 5), torch.randn(9, 5), vocab=vocab),
        "loss_mask": torch.ones(2, 3, dtype=torch.bool),
        "labels": torch.randint(9, (2, 3)),
        "confidence": torch.randn(2, 3),
        **{f"hidden_{k}": hidden[k] for k in range(3)},
    }


def specforge_model():
    import test_specforge

    return {
        "OnlineEagle3Model": test_specforge.PEER.model.OnlineEagle3Model,
        "draft_model": test_specforge.make_model().draft_model,
    }


def micro_batches():
    """Pieces of uneven masks: `(draft_hidden, target, pairs)`, for one head."""
    step = training_step()
    step["micro_batches"] = []
    for kept in (0.9, 0.2, 0.0):
        mask = torch.rand(2, 3, 4) < kept
        hidden, target = torch.randn(2, 3, 4, 4), fused_lk.Target.from_logits(torch.randn(24, 6))
        rows = torch.arange(24).view(2, 3, 4)
        step["micro_batches"].append((hidden, target, fused_lk.Pairs(mask, rows, position_dim=0)))
    return step


def speculators_model():
    import test_speculators

    return {"model": test_speculators.make_model()}


# What a block takes for granted, by a name that it uses; a training step otherwise.
GRANTED = {
    "integrations import specforge": specforge_model,
    "integrations import speculators": speculators_model,
    "micro_batches": micro_batches,
}


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0] for block in BLOCKS])
def test_python_runs_as_written(block):
    granted = next((make for name, make in GRANTED.items() if name in block), training_step)()
    try:
        exec(compile(block, "README.md", "exec"), granted)
    finally:
        speculators.unregister()
    if "loss =" in block and "out =" in block:  # before and after are the same loss
        torch.testing.assert_close(granted["out"].loss, granted["loss"])
        assert granted["draft_hidden"].grad.abs().sum() > 0
        assert granted["draft_weight"].grad.abs().sum() > 0


def test_micro_batches_are_the_whole_batch():
    (block,) = (block for block in BLOCKS if "micro_batches" in block)
    pieces = micro_batches()
    exec(compile(block, "README.md", "exec"), pieces)
    hidden, _, pairs = zip(*pieces["micro_batches"], strict=True)
    dense = [p.dense(24, torch.device("cpu"))[0].view(p.shape) for p in pairs]
    logits = torch.cat([t.tiles.tensors()[0] for _, t, _ in pieces["micro_batches"]])
    rows = torch.cat([torch.arange(24).view(2, 3, 4) + 24 * i for i in range(3)], 1)
    whole = fused_lk.Pairs(torch.cat(dense, 1), rows, position_dim=0)
    weight = pieces["draft_weight"].detach().requires_grad_()
    out = fused_lk.lk_loss(torch.cat(hidden, 1), weight, fused_lk.Target.from_logits(logits), pairs=whole)
    out.loss.backward()
    torch.testing.assert_close(pieces["draft_weight"].grad, weight.grad)
    assert fused_lk.LKSums.merged(pieces["sums"]).metrics() == pytest.approx(out.metrics())


def test_there_is_python_to_run():
    assert any("out.loss.backward()" in block for block in BLOCKS)


def inline_code():
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


# Options of other projects, and environment variables
FOREIGN = {"fullgraph"}


def known_options():
    found = set()
    for name in fused_lk.__all__:
        value = getattr(fused_lk, name)
        members = [value, *vars(value).values()] if inspect.isclass(value) or inspect.ismodule(value) else [value]
        found |= {p for x in members if callable(getattr(x, "__func__", x)) for p in parameters(x)}
    for function in (specforge.apply, speculators.apply, speculators.register):
        found |= parameters(function)
    return found


def parameters(x):
    try:
        return set(inspect.signature(getattr(x, "__func__", x)).parameters)
    except (TypeError, ValueError):
        return set()


def test_options_exist():
    named = {name for code in inline_code() for name in re.findall(r"\b([a-z]\w*)=(?!=)", code)}
    assert named >= {"impl", "kl_weight", "workspace_mb"}
    assert named <= known_options() | FOREIGN


def test_public_names_exist():
    named = {name for code in inline_code() + BLOCKS for name in re.findall(r"\bfused_lk\.(\w+)", code)}
    named |= {f"Target.{name}" for code in inline_code() for name in re.findall(r"\bTarget\.(\w+)", code)}
    for name in named - {"integrations"}:
        owner, _, member = name.rpartition(".")
        assert hasattr(getattr(fused_lk, owner) if owner else fused_lk, member), name


def test_objectives_are_those_of_the_loss():
    table = re.search(r"^\| objective \|.*?\n\n", TEXT, re.MULTILINE | re.DOTALL)[0]
    named = set(re.findall(r'^\| `"(\w+)"`', table, re.MULTILINE))
    hidden, weight = torch.randn(2, 3), torch.randn(4, 3)
    target = fused_lk.Target.from_logits(torch.randn(2, 4))
    for objective in named:
        assert fused_lk.lk_loss(hidden, weight, target, objective=objective).loss.isfinite()
    with pytest.raises(ValueError) as refused:
        fused_lk.lk_loss(hidden, weight, target, objective="none such")
    assert named == set(re.findall(r"'(\w+)'", str(refused.value).split(";")[0]))


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith(("http", "#"))]
    for link in links:
        assert (ROOT / link.partition("#")[0]).exists(), link
    make = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^ {4}make (\w+)", TEXT, re.MULTILINE)) <= make
