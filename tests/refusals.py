"""Good input of each kind, and the check that a call with something wrong in it is refused as it should be."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from fused_lk import DraftVocab, Target, TargetHead

NAN, INF = float("nan"), float("inf")
N, H, V, V_TARGET, H_TARGET, K = 6, 4, 9, 12, 3, 2
THREE_PARTS = r"(?s)^expected .+; got .+\. .+"


class Given:
    """Good input: one tensor of each kind."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.t2d = torch.arange(V_TARGET) % 4 != 1
        self.vocab = DraftVocab(self.t2d)
        self.hidden = torch.randn(N, H, requires_grad=True)
        self.weight = torch.randn(V, H, requires_grad=True)
        self.bias = torch.randn(V, requires_grad=True)
        self.logits = torch.randn(N, V, requires_grad=True)
        self.states = torch.randn(N, H_TARGET)
        self.target_weight = torch.randn(V_TARGET, H_TARGET, requires_grad=True)
        self.target_bias = torch.randn(V_TARGET)
        self.target_logits = torch.randn(N, V_TARGET)
        self.probs = torch.rand(N, V) / V
        self.ids = torch.arange(N * K).view(N, K) % V_TARGET
        self.log_probs = torch.full((N, K), 0.5).log()
        self.mask = torch.tensor([1.0, 0.5, 0.0, 1.0, 1.0, 1.0])
        self.rows = torch.tensor([0, 1, -1, 2, 2, 5])
        self.positions = torch.tensor([0, 0, 0, 1, 1, 1])
        self.d2t = self.vocab.d2t
        self.head = TargetHead(self.target_weight, self.vocab, self.target_bias)
        self.target = Target.from_logits(self.target_logits, self.vocab)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}

    def arguments(self, entry: str) -> dict:
        """The good call of `entry`."""
        if entry.endswith("from_logits"):
            return {"draft_logits": self.logits, "target": self.target}
        return {"draft_hidden": self.hidden, "draft_lm_head_weight": self.weight, "target": self.target}


def elsewhere(*shape, dtype=torch.float32):
    """A tensor on another device than the rest, which need not exist."""
    with FakeTensorMode():
        return torch.empty(*shape, dtype=dtype, device="cuda")


def meta(*shape, dtype=torch.float32):
    """A tensor without contents."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def readable(x):
    """Whether `x` is a tensor whose contents can be compared."""
    dense = isinstance(x, torch.Tensor) and not (x.is_nested or x.is_quantized) and x.layout == torch.strided
    return dense and x.device.type == "cpu"


def refuse(given, call, changes, error, match):
    """`call(**changes)` raises, says so in three parts, and leaves everything as it was."""
    owned = {**given.tensors(), **{f"changed {i}": x for i, x in enumerate(tree_leaves(changes))}}
    owned = {name: x for name, x in owned.items() if readable(x)}
    before = {name: (x.detach().clone(), x._version, x.requires_grad) for name, x in owned.items()}
    with pytest.raises(error, match=match) as raised:
        call()
    assert type(raised.value) in (ValueError, TypeError)
    assert re.match(THREE_PARTS, str(raised.value)), str(raised.value)
    for name, x in owned.items():
        content, version, requires_grad = before[name]
        assert torch.equal(torch.nan_to_num(x.detach()), torch.nan_to_num(content)), name
        assert (x._version, x.requires_grad) == (version, requires_grad), name
        assert not x.is_leaf or x.grad is None, name


def from_hidden(given, **options):
    return Target.from_hidden(given.states, given.head, **options)
