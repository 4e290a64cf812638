"""The roofline model: bytes and flops of operations, and the order that must hold between providers."""

from __future__ import annotations

import pytest
import torch

from bench import roofline
from bench.accounting import Accounting, Work
from bench.memory import PROVIDERS, SHAPES, SPECFORGE, accounted


def test_bytes_read_and_written():
    x, y = torch.zeros(10, 20), torch.zeros(20, 30)
    out, index = torch.zeros(10, 30), torch.tensor([1, 2])
    with Accounting() as seen:
        x.view(-1)[5:].unsqueeze(0).detach()  # views, and no bytes
        torch.empty(1000)
        torch.mm(x, y, out=out)
        torch.add(x, x)
        x[index]
    assert seen.work == [
        Work(2 * 10 * 20 * 30, 4 * (200 + 600 + 300)),
        Work(0, 4 * (200 + 200 + 200)),
        Work(0, 4 * (40 + 40)),
    ]


def test_a_card_takes_the_longer_of_arithmetic_and_memory():
    card = roofline.Card("card", 10.0, 5.0, "made up")
    assert card.seconds([Work(100, 5), Work(0, 20), Work(10, 20)]) == pytest.approx(10 + 4 + 4)


def test_the_order_of_providers():
    shape = SHAPES[0]
    work = {
        "floor": roofline.floor(shape),
        "compiled": roofline.compiled(shape),
        **{name: accounted(shape, prepare).work for name, prepare in PROVIDERS.items()},
    }
    for card in roofline.CARDS:
        seconds = {name: card.seconds(x) for name, x in work.items()}
        assert min(seconds, key=seconds.get) == "floor"
        ours = seconds["fused_lk, one pass"]
        assert ours < 1.25 * seconds["floor"]
        assert ours < seconds["fused_lk, recompute"] < seconds[SPECFORGE]
        assert seconds["compiled"] < seconds[SPECFORGE] < seconds["eager, chunked and checkpointed"]
