"""What the host does beside launching work: where no row is left out (`skip_masked=False`) nothing is read back."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_lk
from bench.accounting import full_size

TOKENS, STEPS, H, DRAFT, TARGET = 96, 3, 32, 400, 640
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "masked_select", "unique_dim"}
READS |= {"_unique2", "unique_consecutive", "bincount", "repeat_interleave"}


class NoHost(TorchDispatchMode):
    """It raises where the host would wait for a number or a size, or would send one. (`.numpy()` needs no operation:
    fake tensors refuse it.)"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name.startswith(("index", "_unsafe_index")) and any(
            x.dtype == torch.bool for x in tree_leaves(args[1:2]) if isinstance(x, torch.Tensor)
        )
        if name in READS or by_mask or name == "lift_fresh":
            raise RuntimeError(f"{func} waits for the device, or sends to it")
        return func(*args, **(kwargs or {}))


PLANTED = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "write by mask": lambda x: x.__setitem__(x > 0, x[0]),
    "select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "to the host": lambda x: x.cpu().numpy(),
    "from the host": lambda x: x + torch.tensor([1.0]),
}


@pytest.mark.parametrize("what", PLANTED)
def test_the_watcher_sees(what):
    with full_size("cuda"), NoHost(), pytest.raises(Exception, match=r"waits|[Ff]ake|numpy|storage"):
        PLANTED[what](torch.empty(4))


TARGETS = {
    "hidden": lambda x, vocab: fused_lk.Target.from_hidden(x(TOKENS, H), x.head(vocab), impl="triton"),
    "shared": lambda x, vocab: fused_lk.Target.from_hidden(x(TOKENS, H), x(DRAFT, H), impl="triton"),
    "logits": lambda x, vocab: fused_lk.Target.from_logits(x(TOKENS, TARGET), vocab, impl="triton"),
    "probs": lambda x, vocab: fused_lk.Target.from_probs(x(TOKENS, DRAFT), vocab),
    "topk": lambda x, vocab: fused_lk.Target.from_topk(x(TOKENS, 8).long(), x(TOKENS, 8), vocab),
}
CALLS = {
    "one pass": {"objective": "alpha"},
    "token": {"lambda_per": "token", "reduction": "sum"},
    "default": {},
    "kept": {"keep_mb": 0.1},
    "terms": {"objective": {"ce": 0.1, "l1": 0.9}, "terms": ("jsd",)},
    "position": {"reduction": "position", "position_decay": 0.8},
    "none": {"reduction": "none", "logit_scale": 0.5, "softcap": 30.0},
}


class _Make:
    def __call__(self, *shape):
        return torch.empty(*shape, dtype=torch.bfloat16)

    def head(self, vocab):
        return fused_lk.TargetHead(self(TARGET, H), vocab)


def call(kind, options, weights):
    """One training step; the work list and the head are part of it, the vocabulary is not."""
    make = _Make()
    vocab = fused_lk.DraftVocab(torch.arange(TARGET) % 8 < 5)
    with full_size("cuda"):
        hidden = [make(TOKENS, H).requires_grad_() for _ in range(STEPS)]
        weight = make(DRAFT, H).requires_grad_()
        mask = torch.empty(STEPS, TOKENS, dtype=torch.float32 if weights else torch.bool)
        rows = torch.empty(STEPS, TOKENS, dtype=torch.long)
        target_of = TARGETS[kind]
        with NoHost():
            pairs = fused_lk.Pairs(mask, rows, position_dim=0, skip_masked=False)
            target = target_of(make, vocab)
            out = fused_lk.lk_loss(hidden, weight, target, pairs=pairs, impl="triton", workspace_mb=0.2, **options)
            out.loss.sum().backward()
            assert hidden[0].grad is not None and weight.grad is not None


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("options", CALLS)
def test_nothing_waits_where_no_row_is_left_out(options, kind):
    call(kind, CALLS[options], weights=options in ("default", "terms"))


def test_a_compacted_work_list_is_read_once():
    with pytest.raises(Exception, match=r"numpy|[Ff]ake"), full_size("cuda"), NoHost():
        fused_lk.Pairs(torch.empty(4, dtype=torch.bool))
