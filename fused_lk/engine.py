"""Who carries out a call: the walks themselves in eager mode, operators of a graph under `torch.compile`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from . import autograd, operators
from .autograd import PairResults
from .call import Call
from .layout import Layout
from .objective import MixRule


class Engine(Protocol):
    """Results come per pair of `layout`."""

    layout: Layout

    def divergences(self) -> PairResults:
        """The primitive, differentiable; logits are made again in the backward."""

    def loss_in_one_pass(self, weights: Tensor, rule: MixRule) -> tuple[Tensor, PairResults]:
        """`sum_i weights_i * token_loss_i`, its gradient made in the forward; the rest is detached."""


def engine(call: Call, *, one_pass: bool = False, wants_target_argmax: bool = False) -> Engine:
    """The engine of this call, eager or traced."""
    make = operators.Traced if torch.compiler.is_compiling() else _Eager
    return make(call, one_pass, wants_target_argmax)


class _Eager:
    def __init__(self, call: Call, one_pass: bool, wants_target_argmax: bool) -> None:
        self.call = call
        self.work = call.work(call.needs_weight_gradient, in_one_pass=one_pass, wants_target_argmax=wants_target_argmax)
        self.layout = self.work.layout

    def divergences(self) -> PairResults:
        return autograd.divergences(self.work, self.call.draft, self.call.tensors)

    def loss_in_one_pass(self, weights: Tensor, rule: MixRule) -> tuple[Tensor, PairResults]:
        return autograd.loss_in_one_pass(self.work, self.call.draft, self.call.tensors, weights, rule)
