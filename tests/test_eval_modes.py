"""Modes of torch around the losses: evaluation, default dtype and device, determinism, other processes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import pickle
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from allocations import Allocations

import fused_lk

TOKENS, STEPS, H, H_TARGET, V_DRAFT, V_TARGET = 10, 3, 5, 6, 37, 53
IMPLS = ["torch", "triton", "reference"]


def inputs(seed=0):
    """The tensors of a batch, made before any mode is entered."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    t2d = torch.zeros(V_TARGET, dtype=torch.bool)
    t2d[torch.randperm(V_TARGET, generator=generator)[:V_DRAFT]] = True
    step = torch.arange(STEPS).unsqueeze(1)
    rows = torch.arange(TOKENS) + step
    logits = randn(TOKENS, H_TARGET) @ randn(H_TARGET, V_TARGET)
    top = logits.log_softmax(-1).topk(7)
    return {
        "hidden": randn(STEPS, TOKENS, H),
        "weight": randn(V_DRAFT, H),
        "bias": randn(V_DRAFT),
        "states": randn(TOKENS, H_TARGET),
        "head": randn(V_TARGET, H_TARGET),
        "logits": logits,
        "probs": logits.softmax(-1)[:, t2d],
        "top_ids": top.indices,
        "top_log_probs": top.values,
        "t2d": t2d,
        "mask": torch.rand(STEPS, TOKENS, generator=generator) * (torch.rand(STEPS, TOKENS, generator=generator) > 0.3),
        "target_rows": torch.where(rows < TOKENS, rows, -1),
        "positions": step.expand(STEPS, TOKENS).contiguous(),
    }


def targets(x, impl):
    """One of each kind."""
    vocab = fused_lk.DraftVocab(x["t2d"])
    assert torch.equal(fused_lk.DraftVocab.from_d2t(vocab.d2t, V_TARGET).t2d, x["t2d"])
    streams = {"impl": "torch" if impl == "reference" else impl}
    head = fused_lk.TargetHead(x["head"], vocab)
    made = {
        "hidden": fused_lk.Target.from_hidden(x["states"], head, x["states"][:, 0] < 9, **streams),
        "cached": fused_lk.Target.from_hidden(x["states"], head, cache=True, **streams),
        "shared": fused_lk.Target.from_hidden(x["states"], x["head"][:V_DRAFT]),
        "logits": fused_lk.Target.from_logits(x["logits"], vocab, **streams),
        "probs": fused_lk.Target.from_probs(x["probs"], vocab),
        "topk": fused_lk.Target.from_topk(x["top_ids"], x["top_log_probs"], vocab),
    }
    return {"hidden": made["hidden"]} if impl == "triton" else made  # the interpreter takes its time


def work_lists(x):
    rows = {name: x[name] for name in ("mask", "target_rows", "positions")}
    return (
        fused_lk.Pairs(**rows, num_positions=STEPS),
        fused_lk.Pairs(**rows, num_positions=STEPS, skip_masked=False),
    )


OPTIONS = (
    {"objective": "alpha"},  # gradient in the forward
    {"objective": "lambda", "reduction": "position"},
    {"objective": "lambda", "reduction": "none", "lambda_per": "token"},
    {"objective": "kl", "plan": "recompute", "workspace_mb": 0.001, "denominator": 4.0},
)


def everything(x, impl="torch"):
    """Results and gradients with every target, work list and kind of loss, each a tensor."""
    results = []
    hidden, weight, bias = (x[name].detach().clone().requires_grad_() for name in ("hidden", "weight", "bias"))
    losses = itertools.cycle([*OPTIONS, {"kl_weight": 0.3, "position_decay": 0.8}])
    for k, target in enumerate(targets(x, impl).values()):
        of_all = fused_lk.lk_loss(hidden[k % STEPS], weight, target, impl=impl, **next(losses))  # nothing masked
        results += tensors_of(of_all)
        results += [y for y in (target.log_normalizer, target.token_ids, target.in_draft_vocab) if y is not None]
        for pairs in work_lists(x):
            out = fused_lk.lk_loss(hidden, weight, target, bias=bias, pairs=pairs, impl=impl, **next(losses))
            d = fused_lk.lk_divergences(list(hidden), weight, target, pairs=pairs, impl=impl)
            results += [*tensors_of(out), *tensors_of(d), fused_lk.expected_acceptance_length(d.acceptance)]
            results += [torch.tensor(list(out.metrics().values()), dtype=torch.float64, device="cpu")]
            if torch.is_grad_enabled():
                results += torch.autograd.grad(out.loss.sum() + d.kl.sum(), (hidden, weight, bias))
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return results + tensors_of(fused_lk.lk_loss_from_logits(logits, target, pairs=pairs, impl=impl))


def tensors_of(record):
    assert is_dataclass(record)
    return [y for y in (getattr(record, field.name) for field in fields(record)) if isinstance(y, torch.Tensor)]


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for x, y in zip(got, expected, strict=True):
        assert (x.dtype, x.device, x.shape) == (y.dtype, y.device, y.shape)
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    """In this mode torch also fills what is allocated and not written with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "meta context": lambda: torch.device("meta"),
    "deterministic": deterministic,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
def test_global_modes_change_nothing(impl, mode):
    x = inputs()
    with MODES[mode]():
        got = everything(x, impl)
    assert_equal(got, without_modes(impl))


@functools.cache
def without_modes(impl):
    return everything(inputs(), impl)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("impl", IMPLS)
def test_evaluation_is_the_same(impl, mode):
    """As without a mode where nothing requires a gradient, bit for bit; and as in training, where sums are ordered
    otherwise."""
    x = inputs()
    plain = work_lists(x)[0]
    target = targets(x, impl)["hidden"]
    for options in OPTIONS:
        results = []
        for context, trains in ((mode, True), (torch.enable_grad, False), (torch.enable_grad, True)):
            with context():
                weight = x["weight"].clone().requires_grad_(trains)
                out = fused_lk.lk_loss(x["hidden"], weight, target, pairs=plain, impl=impl, **options)
            results.append(out)
        evaluated, frozen, trained = results
        assert not evaluated.loss.requires_grad and trained.loss.requires_grad
        assert_equal(tensors_of(evaluated), tensors_of(frozen))
        torch.testing.assert_close(evaluated.loss, trained.loss, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_evaluation_allocates_nothing_for_gradients(impl, options, mode):
    """Neither dW nor dH, nor a second tile for the gradient; training is seen to make them."""
    x = inputs()
    weight, hidden = x["weight"].requires_grad_(), x["hidden"].requires_grad_()
    bias = x["bias"].requires_grad_()
    target, pairs = targets(x, impl)["hidden"], work_lists(x)[0]

    def elements(context, backward):
        with context(), Allocations() as seen:
            out = fused_lk.lk_loss(hidden, weight, target, bias=bias, pairs=pairs, impl=impl, **options)
            if backward:
                out.loss.sum().backward()
        return out, [shape for _, shape, _ in seen.storages]

    gradient_shapes = {tuple(weight.shape), (STEPS * TOKENS, H)}
    out, evaluated = elements(mode, False)
    assert not out.loss.requires_grad
    assert not gradient_shapes & set(evaluated)
    _, trained = elements(torch.enable_grad, True)
    assert gradient_shapes <= set(trained)
    tiles = [n for n in evaluated if len(n) == 2 and n[1] >= V_DRAFT + 1 and n[1] % 64 == 0]
    assert 0 < len(tiles) <= 2, "the draft's tile and the target's"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["hidden", "cached", "shared", "logits", "probs", "topk"])
def test_training_on_what_inference_mode_made(kind, options):
    """Target states, targets and pairs may come out of an evaluation, with what they keep; only the draft may not."""
    x = inputs()

    def gradients(made_in):
        with made_in():
            copies = {name: y.clone() for name, y in x.items()}
            target, lists = targets(copies, "torch")[kind], work_lists(copies)
            for pairs in lists:  # and used there, so that what they keep is made there too
                fused_lk.lk_loss(list(x["hidden"]), x["weight"], target, pairs=pairs, **options)
        hidden, weight = (x[name].clone().requires_grad_() for name in ("hidden", "weight"))
        results = []
        for pairs in lists:
            loss = fused_lk.lk_loss(list(hidden), weight, target, pairs=pairs, **options).loss.sum()
            d = fused_lk.lk_divergences(hidden, weight, target, pairs=pairs)
            results += torch.autograd.grad(loss + d.acceptance.sum() + d.kl.sum(), (hidden, weight))
        return results

    assert_equal(gradients(torch.inference_mode), gradients(torch.no_grad))


def test_objects_pickle():
    """As a data loader's workers send them; without what they had cached."""
    x = inputs()
    loss = fused_lk.LKLoss("lambda", eta=2.0)
    for target in targets(x, "torch").values():
        for pairs in work_lists(x):
            expected = loss(x["hidden"], x["weight"], target, pairs=pairs)
            other = pickle.loads(pickle.dumps((loss, target, pairs)))
            assert_equal(tensors_of(other[0](x["hidden"], x["weight"], other[1], pairs=other[2])), tensors_of(expected))


PROCESSES = """
import sys
import torch
import torch.multiprocessing as mp
import test_eval_modes as tests

def child(queue):
    torch.set_num_threads(1)  # libgomp's threads do not survive a fork
    queue.put([x.detach().numpy() for x in tests.everything(tests.inputs())])

if __name__ == "__main__":
    torch.set_num_threads(1)
    method = sys.argv[1]
    context = mp.get_context(method)
    x = tests.inputs()
    with torch.no_grad():  # autograd's threads do not survive a fork either
        tests.everything(x)
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,), daemon=True)
    process.start()
    got = [torch.from_numpy(x) for x in queue.get()]
    process.join(60)
    tests.assert_equal(got, [x.detach() for x in tests.everything(x)])
    assert process.exitcode == 0 and len(got) > 100
    print("equal")
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(method, tmp_path):
    """A child, forked from a parent that has used the losses or started afresh, computes what the parent does."""
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    path = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, script, method],
        cwd=path,
        env={"PYTHONPATH": f"{path}:{path.parent}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"
