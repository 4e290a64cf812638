"""What does not fit is refused: ValueError or TypeError with expected, got and remedy; nothing of the caller's changes.

Each row of a table is a good call with something changed. It is tried on every public entry that has the changed
options; `test_the_unchanged_calls_are_good` keeps the tables honest.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from refusals import INF, NAN, V_TARGET, Given, H, K, N, V, elsewhere, from_hidden, meta, refuse

import fused_lk
from fused_lk import DraftVocab, Pairs, Target
from fused_lk.impls import row_ops

ENTRIES = {
    "lk_loss": fused_lk.lk_loss,
    "lk_loss_from_logits": fused_lk.lk_loss_from_logits,
    "lk_divergences": fused_lk.lk_divergences,
    "lk_divergences_from_logits": fused_lk.lk_divergences_from_logits,
}

# (name, changed arguments, error, part of the message)
CALLS = [
    ("target of no kind", lambda g: {"target": g.target_logits}, TypeError, "target to be a fused_lk.Target"),
    ("target elsewhere", lambda g: {"target": Target.from_logits(elsewhere(N, V))}, ValueError, "a target on cpu"),
    ("vocabularies", lambda g: {"target": Target.from_logits(g.target_logits)}, ValueError, "target on 9 draft tokens"),
    ("fewer targets", lambda g: {"target": Target.from_probs(g.probs[:4])}, ValueError, "as many target rows"),
    ("no pairs: rows", lambda g: {"target": Target.from_probs(g.probs[:2])}, ValueError, r"Pairs\.ttt.*steps=3"),
    ("no pairs: blocks", lambda g: {"target": Target.from_probs(g.probs[:2])}, ValueError, r"Pairs\.blocks\("),
    ("no pairs: any rows", lambda g: {"target": Target.from_probs(g.probs[:4])}, ValueError, r"target_rows=\.\.\.\)"),
    ("no pairs: steps", lambda g: {"draft_hidden": [g.hidden] * 2}, ValueError, r"12.*got 6 .*steps=2"),
    ("no pairs: steps of logits", lambda g: {"draft_logits": [g.logits] * 2}, ValueError, r"12.*got 6 .*steps=2"),
    (
        "pairs: steps in the batch",
        lambda g: {"pairs": Pairs.ttt(torch.ones(1, 3) > 0, 2)},
        ValueError,
        r"\(6,\); got pairs of shape \(2, 1, 3\).*draft_\w+\.view\(2, 1, 3, -1\)\.",
    ),
    ("logits: rank", lambda g: {"draft_logits": torch.tensor(1.0)}, ValueError, "at least 1 dimension"),
    ("logits: dtype", lambda g: {"draft_logits": g.ids}, TypeError, "draft_logits of dtype"),
    ("hidden: rank", lambda g: {"draft_hidden": torch.tensor(1.0)}, ValueError, "at least 1 dimension"),
    ("hidden: dtype", lambda g: {"draft_hidden": torch.ones(N, H, dtype=torch.long)}, TypeError, "of dtype float16"),
    ("hidden: module", lambda g: {"draft_hidden": torch.nn.ReLU()}, TypeError, "got a ReLU. Pass what it returns"),
    ("hidden: output", lambda g: {"draft_hidden": Output(g.hidden)}, TypeError, r"\.last_hidden_state"),
    ("hidden: output in a list", lambda g: {"draft_hidden": [Output(g.hidden)]}, TypeError, r"\.last_hidden_state"),
    ("hidden: meta", lambda g: {"draft_hidden": meta(N, H)}, ValueError, "draft_hidden to have contents"),
    ("hidden: sparse", lambda g: {"draft_hidden": g.hidden.to_sparse()}, TypeError, r"dense.*\.to_dense\(\)"),
    ("hidden: nested", lambda g: {"draft_hidden": nested(torch.strided)}, TypeError, "Pad it"),
    ("hidden: jagged", lambda g: {"draft_hidden": nested(torch.jagged)}, TypeError, "Pad it"),
    ("logits: meta", lambda g: {"draft_logits": meta(N, V)}, ValueError, "draft_logits to have contents"),
    ("logits: nested", lambda g: {"draft_logits": [nested(torch.jagged)]}, TypeError, "Pad it"),
    ("logits: no tokens", lambda g: {"draft_logits": g.logits[:, :0]}, ValueError, "vocabulary of at least 1"),
    ("hidden: no tensor", lambda g: {"draft_hidden": "hidden"}, TypeError, "a tensor or a non-empty list"),
    ("hidden: empty list", lambda g: {"draft_hidden": []}, TypeError, "non-empty list"),
    ("hidden: list of numbers", lambda g: {"draft_hidden": [1.0]}, TypeError, r"draft_hidden\[0\] to be a torch"),
    ("hidden: shapes", lambda g: {"draft_hidden": [g.hidden, g.hidden[1:]]}, ValueError, r"draft_hidden\[1\] of shape"),
    (
        "hidden: dtypes",
        lambda g: {"draft_hidden": [g.hidden, g.hidden.half()]},
        TypeError,
        r"of dtype float32; .* draft_hidden\[1\]\.to\(torch\.float32\)",
    ),
    (
        "hidden: devices",
        lambda g: {"draft_hidden": [g.hidden, elsewhere(N, H)]},
        ValueError,
        r"draft_hidden\[1\] on cpu",
    ),
    ("hidden: size", lambda g: {"draft_hidden": torch.randn(N, H + 1)}, ValueError, "last dimension 4, the hidden"),
    ("weight: rank", lambda g: {"draft_lm_head_weight": g.weight[0]}, ValueError, "2 dimension"),
    ("weight: dtype", lambda g: {"draft_lm_head_weight": g.weight.long()}, TypeError, "draft_lm_head_weight of dtype"),
    ("weight: another", lambda g: {"draft_lm_head_weight": g.weight.half()}, TypeError, "of draft_hidden's dtype"),
    (
        "weight: half of it",
        lambda g: {"draft_lm_head_weight": g.weight.half()},
        TypeError,
        r"draft_hidden\.to\(draft_lm_head_weight\.dtype\) or draft_lm_head_weight\.to\(draft_hidden\.dtype\)",
    ),
    (
        "hidden: half of them",
        lambda g: {"draft_hidden": [g.hidden.bfloat16()]},
        TypeError,
        r"draft_lm_head_weight\.to\(draft_hidden\[0\]\.dtype\)",
    ),
    ("weight: device", lambda g: {"draft_lm_head_weight": elsewhere(V, H)}, ValueError, "draft_lm_head_weight on cpu"),
    (
        "weight: module",
        lambda g: {"draft_lm_head_weight": torch.nn.Linear(H, V)},
        TypeError,
        r"a torch.Tensor; got a Linear\. .*lm_head\.weight",
    ),
    (
        "weight: module with a bias",
        lambda g: {"draft_lm_head_weight": torch.nn.Linear(H, V)},
        TypeError,
        r"as draft_lm_head_weight, as in lm_head\.weight, and its bias as bias=\.",
    ),
    (
        "weight: module without one",
        lambda g: {"draft_lm_head_weight": torch.nn.Linear(H, V, bias=False)},
        TypeError,
        r"as in lm_head\.weight\.$",
    ),
    (
        "weight: whole model",
        lambda g: {"draft_lm_head_weight": torch.nn.Sequential(torch.nn.Linear(H, V))},
        TypeError,
        r"a Sequential\. .*output layer .* model\.lm_head\.weight",
    ),
    ("hidden: head", lambda g: {"draft_hidden": torch.nn.Linear(H, V)}, TypeError, "a Linear. Pass what it returns"),
    (
        "low rank: module",
        lambda g: {"low_rank": (g.hidden[:, :2], torch.nn.Embedding(V, 2))},
        TypeError,
        r"a Embedding\. Pass its weight as low_rank\[1\]",
    ),
    ("weight: no tokens", lambda g: {"draft_lm_head_weight": g.weight[:0]}, ValueError, "vocabulary of at least 1"),
    (
        "weight: no width",
        lambda g: {"draft_lm_head_weight": g.weight[:, :0], "draft_hidden": g.hidden[:, :0]},
        ValueError,
        "hidden size of at least 1",
    ),
    ("weight: meta", lambda g: {"draft_lm_head_weight": meta(V, H)}, ValueError, "to have contents"),
    ("weight: sparse", lambda g: {"draft_lm_head_weight": g.weight.to_sparse()}, TypeError, r"dense.*\.to_dense\(\)"),
    ("weight: CSR", lambda g: {"draft_lm_head_weight": csr(g.weight)}, TypeError, r"dense.*\.to_dense\(\)"),
    ("weight: quantised", lambda g: {"draft_lm_head_weight": quantised(V, H)}, TypeError, r"\.dequantize\(\)"),
    ("bias: shape", lambda g: {"bias": g.bias[1:]}, ValueError, r"bias of shape \(9,\)"),
    ("bias: dtype", lambda g: {"bias": g.bias.double()}, TypeError, "bias of draft_hidden's dtype"),
    ("bias: device", lambda g: {"bias": elsewhere(V)}, ValueError, "bias on cpu"),
    ("bias: no tensor", lambda g: {"bias": [0.0] * V}, TypeError, "bias to be a torch.Tensor"),
    ("mask: shape", lambda g: {"mask": g.mask[1:]}, ValueError, r"mask of shape \(6,\)"),
    ("mask: dtype", lambda g: {"mask": g.mask.to(torch.complex64)}, TypeError, "mask of dtype bool"),
    ("mask: integers", lambda g: {"mask": g.rows}, ValueError, "an integer mask of 0 and 1"),
    ("mask: device", lambda g: {"mask": elsewhere(N)}, ValueError, "mask on cpu"),
    ("mask: no tensor", lambda g: {"mask": [True] * N}, TypeError, "mask to be a torch.Tensor"),
    ("mask: negative", lambda g: {"mask": g.mask.index_fill(0, torch.tensor([2]), -1)}, ValueError, "finite and >= 0"),
    ("mask: NaN", lambda g: {"mask": g.mask.index_fill(0, torch.tensor([2]), NAN)}, ValueError, "finite and >= 0"),
    ("mask: inf", lambda g: {"mask": g.mask.index_fill(0, torch.tensor([2]), INF)}, ValueError, "finite and >= 0"),
    ("pairs: no Pairs", lambda g: {"pairs": [(0, 0)]}, TypeError, "pairs to be a fused_lk.Pairs"),
    ("pairs: shape", lambda g: {"pairs": Pairs(g.mask[1:])}, ValueError, "pairs of the draft's shape"),
    ("pairs: beside mask", lambda g: {"pairs": Pairs(g.mask), "mask": g.mask}, ValueError, "mask or pairs, not both"),
    (
        "pairs: device",
        lambda g: {"pairs": Pairs(elsewhere(N, dtype=torch.bool), skip_masked=False)},
        ValueError,
        "pairs on cpu",
    ),
    ("pairs: too far", lambda g: {"pairs": Pairs(target_rows=g.rows + 1)}, ValueError, "target_rows below 6"),
    (
        "pairs: kept, too far",
        lambda g: {"pairs": Pairs(target_rows=g.rows + 1, skip_masked=False)},
        ValueError,
        "target_rows below 6",
    ),
    ("temperature 0", lambda g: {"draft_temperature": 0.0}, ValueError, "draft_temperature to be a finite number > 0"),
    ("temperature < 0", lambda g: {"draft_temperature": -1}, ValueError, "draft_temperature"),
    ("temperature NaN", lambda g: {"draft_temperature": NAN}, ValueError, "draft_temperature"),
    ("temperature: tensor", lambda g: {"draft_temperature": torch.ones(1)}, TypeError, "draft_temperature"),
    ("impl", lambda g: {"impl": "cuda"}, ValueError, "impl to be one of 'auto', 'triton', 'torch', 'reference'"),
    ("impl: array", lambda g: {"impl": np.array(["auto", "torch"])}, ValueError, "impl to be one of"),
    ("impl: no name", lambda g: {"impl": None}, ValueError, "impl to be one of"),
    ("workspace 0", lambda g: {"workspace_mb": 0}, ValueError, "workspace_mb to be a finite number > 0"),
    ("workspace < 0", lambda g: {"workspace_mb": -1.0}, ValueError, "workspace_mb"),
    ("workspace NaN", lambda g: {"workspace_mb": NAN}, ValueError, "workspace_mb"),
    ("workspace: a word", lambda g: {"workspace_mb": "256"}, TypeError, 'workspace_mb to be "auto" or a number'),
    ("workspace: bool", lambda g: {"workspace_mb": True}, TypeError, "workspace_mb"),
    ("keep < 0", lambda g: {"keep_mb": -1.0}, ValueError, "keep_mb"),
    ("keep: a word", lambda g: {"keep_mb": "all"}, TypeError, 'keep_mb to be "auto" or a number'),
    ("logits_dtype", lambda g: {"logits_dtype": "float32"}, ValueError, "logits_dtype to be"),
    ("logits_dtype: half", lambda g: {"logits_dtype": torch.float16}, ValueError, "logits_dtype to be"),
    ("objective", lambda g: {"objective": "hinge"}, ValueError, "objective to be one of 'kl', 'tv', 'alpha', 'lambda'"),
    ("lambda_per", lambda g: {"lambda_per": "batch"}, ValueError, "lambda_per to be one of 'position', 'token'"),
    ("reduction", lambda g: {"reduction": "batchmean"}, ValueError, "reduction to be one of 'mean', 'position'"),
    ("plan", lambda g: {"plan": "fast"}, ValueError, "plan to be one of 'auto', 'one_pass', 'recompute'"),
    ("one pass: lambda", lambda g: {"plan": "one_pass"}, ValueError, 'lambda_per="position" without kl_weight'),
    (
        "one pass: none",
        lambda g: {"plan": "one_pass", "objective": "kl", "reduction": "none"},
        ValueError,
        'reduction="none"',
    ),
    (
        "one pass: position",
        lambda g: {"plan": "one_pass", "kl_weight": 0.5, "reduction": "position"},
        ValueError,
        'reduction="position"',
    ),
    ("eta < 0", lambda g: {"eta": -1e-9}, ValueError, "eta to be a finite number >= 0"),
    ("eta NaN", lambda g: {"eta": NAN}, ValueError, "eta"),
    ("eta: word", lambda g: {"eta": "3"}, TypeError, "eta"),
    ("kl_scale < 0", lambda g: {"kl_scale": -0.5}, ValueError, "kl_scale to be a finite number >= 0"),
    ("kl_scale inf", lambda g: {"kl_scale": INF}, ValueError, "kl_scale"),
    ("kl_scale NaN", lambda g: {"kl_scale": NAN}, ValueError, "kl_scale"),
    ("decay < 0", lambda g: {"position_decay": -0.1}, ValueError, "position_decay"),
    ("decay: bool", lambda g: {"position_decay": True}, TypeError, "position_decay"),
    ("kl_weight < 0", lambda g: {"kl_weight": -0.1}, ValueError, "kl_weight to be a finite number >= 0"),
    ("kl_weight inf", lambda g: {"kl_weight": INF}, ValueError, "kl_weight"),
    ("kl_weight: objective", lambda g: {"kl_weight": 0.1, "objective": "kl"}, ValueError, 'with objective="lambda"'),
    ("kl_weight: list", lambda g: {"kl_weight": [0.5]}, TypeError, "kl_weight"),
    ("kl_weight: ids", lambda g: {"kl_weight": g.positions}, TypeError, "kl_weight of dtype"),
    ("kl_weight: shape", lambda g: {"kl_weight": torch.ones(4)}, ValueError, r"kl_weight of shape \(1,\)"),
    ("kl_weight: device", lambda g: {"kl_weight": elsewhere(1)}, ValueError, "kl_weight on cpu"),
    ("kl_weight: tokens' device", lambda g: {"kl_weight": elsewhere(N)}, ValueError, "kl_weight on cpu"),
    ("kl_weight: tensor < 0", lambda g: {"kl_weight": torch.tensor([-0.1])}, ValueError, "kl_weight .*>= 0"),
    ("kl_weight: tensor NaN", lambda g: {"kl_weight": torch.tensor(NAN)}, ValueError, "kl_weight .*>= 0"),
    ("denominator < 0", lambda g: {"denominator": -1.0}, ValueError, "denominator to be a finite number > 0"),
    ("denominator 0", lambda g: {"denominator": 0}, ValueError, r"number > 0; got 0 .*max\(denominator, 1\)"),
    ("denominator 0.0", lambda g: {"denominator": 0.0}, ValueError, "denominator to be a finite number > 0"),
    ("denominator: tensor 0", lambda g: {"denominator": torch.zeros(())}, ValueError, r"denominator\.clamp\(min=1\)"),
    ("denominator: count 0", lambda g: {"denominator": torch.tensor(0)}, ValueError, "denominator .*> 0"),
    ("denominator: bool", lambda g: {"denominator": torch.tensor([True])}, TypeError, "denominator of dtype"),
    ("denominator NaN", lambda g: {"denominator": NAN}, ValueError, "denominator"),
    ("denominator: shape", lambda g: {"denominator": torch.ones(2)}, ValueError, r"denominator of shape \(1,\)"),
    ("denominator: device", lambda g: {"denominator": elsewhere(1)}, ValueError, "denominator on cpu"),
    ("denominator: tensor < 0", lambda g: {"denominator": torch.tensor([-2.0])}, ValueError, "denominator .*>= 0"),
    ("denominator: tensor NaN", lambda g: {"denominator": torch.tensor([NAN])}, ValueError, "denominator .*>= 0"),
    ("group: no group", lambda g: {"group": "world"}, TypeError, r"group to be a torch\.distributed\.ProcessGroup"),
]


class Output(dict):
    """As a model of transformers returns it."""

    @property
    def last_hidden_state(self):
        return self["last_hidden_state"]

    def __init__(self, hidden):
        super().__init__(last_hidden_state=hidden)


def nested(layout):
    return quietly(torch.nested.nested_tensor, [torch.randn(2, H), torch.randn(4, H)], layout=layout)


def csr(x):
    return quietly(x.detach().to_sparse_csr)


def quantised(*shape):
    return quietly(torch.quantize_per_tensor, torch.randn(*shape), 0.1, 0, torch.qint8)


def quietly(make, *arguments, **options):
    """What `make` makes, without its warnings that such tensors are new, or old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*arguments, **options)


def entries(changes):
    """The public entries that have all the changed arguments."""
    return [name for name, f in ENTRIES.items() if set(changes) <= set(inspect.signature(f).parameters)]


TRIED = [(entry, *row) for row in CALLS for entry in entries(row[1](Given()))]


@pytest.mark.parametrize(("entry", "name", "change", "error", "match"), TRIED, ids=[f"{r[1]}-{r[0]}" for r in TRIED])
def test_calls(entry, name, change, error, match):
    given = Given()
    changes = change(given)
    refuse(given, lambda: ENTRIES[entry](**{**given.arguments(entry), **changes}), changes, error, match)


def test_every_row_is_tried():
    assert {name for _, name, *_ in TRIED} == {name for name, *_ in CALLS}
    assert len({name for name, *_ in CALLS}) == len(CALLS)


def test_the_unchanged_calls_are_good():
    """Everything that the tables change has a good value, and none of it is a reason to refuse."""
    given = Given()
    pairs = {"pairs": Pairs(given.mask, given.rows, given.positions, K)}
    for entry, call in ENTRIES.items():
        rich = {"kl_weight": torch.tensor([0.0, 1.0])} if "kl_weight" in inspect.signature(call).parameters else {}
        for more in ({}, {"mask": given.mask}, {**pairs, **rich}, {"workspace_mb": 1, "draft_temperature": 2}):
            call(**given.arguments(entry), **more)
    fused_lk.lk_loss(given.hidden, given.weight, given.target, bias=given.bias, denominator=torch.tensor([3]))
    known = {"log_normalizer": given.mask, "token_ids": given.rows.clamp(min=0)}
    for options in ({}, known, {"mask": given.mask > 0, "temperature": 0.7, "workspace_mb": 1}):
        from_hidden(given, **options)
    Target.from_hidden(given.states, given.target_weight, vocab=given.vocab, bias=given.target_bias)
    Target.from_probs(given.probs, given.vocab, given.rows.clamp(min=0))
    Target.from_topk(given.ids, given.log_probs, given.vocab)
    assert torch.equal(DraftVocab(given.t2d, given.d2t).target_ids, given.vocab.target_ids)
    assert torch.equal(DraftVocab.from_d2t(given.d2t, V_TARGET).t2d, given.t2d)


def test_a_pair_outside_the_targets_own_mask():
    given = Given()
    target = from_hidden(given, mask=torch.tensor([True] * 5 + [False]))
    for work in ({}, {"pairs": Pairs(None, given.rows)}, {"pairs": Pairs(given.mask)}):
        call = lambda work=work: fused_lk.lk_loss(given.hidden, given.weight, target, **work)  # noqa: E731
        refuse(given, call, work, ValueError, r"inside the target's own mask; got 1 pair\(s\) outside")


def test_one_pass_serves_what_auto_serves_in_one_pass():
    given = Given()
    for options in ({"objective": "kl"}, {"lambda_per": "token"}, {"kl_weight": 0.5}, {"objective": "tv"}):
        fused_lk.lk_loss(given.hidden, given.weight, given.target, plan="one_pass", **options)


def test_kl_scale_above_one_warns_and_names_the_caller():
    given = Given()
    with pytest.warns(UserWarning, match="kl_scale=1.5 can make lambda exceed 1") as caught:
        fused_lk.lk_loss(given.hidden, given.weight, given.target, kl_scale=1.5)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_lk.lk_loss(given.hidden, given.weight, given.target, kl_scale=1.0)


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # what `import triton` then finds is an ImportError
    row_ops.cache_clear()  # of what earlier tests found
    given = Given()
    for entry, call in ENTRIES.items():
        arguments = given.arguments(entry)
        refuse(given, lambda call=call, a=arguments: call(**a, impl="triton"), (), ValueError, "Triton installed")
        call(**arguments, impl="auto")
    refuse(given, lambda: from_hidden(given, impl="triton"), (), ValueError, "Triton installed")


CANNOT_RUN = """
import torch, fused_lk
hidden, weight = torch.randn(3, 2, requires_grad=True), torch.randn(5, 2)
target = fused_lk.Target.from_logits(torch.randn(3, 5))
fused_lk.lk_loss(hidden, weight, target)
for call in (
    lambda: fused_lk.lk_loss(hidden, weight, target, impl="triton"),
    lambda: fused_lk.lk_divergences(hidden, weight, target, impl="triton"),
    lambda: fused_lk.Target.from_hidden(
        torch.randn(3, 2), weight, vocab=fused_lk.DraftVocab(torch.ones(5) > 0), impl="triton"
    ),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_triton_that_cannot_run_on_the_device():
    """In a process without the interpreter, which is chosen once, when Triton is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CANNOT_RUN], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    messages = done.stdout.splitlines()
    assert len(messages) == 3
    for message in messages:
        assert message.startswith('expected a GPU (CUDA, ROCm, XPU) for impl="triton"; got tensors on cpu. ')
        assert 'impl="torch"' in message
        assert "TRITON_INTERPRET=1" in message
