"""How integrations run a trainer's own code with parts of it replaced."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn

from fused_lk.integrations import seams

SCALE = 2.0


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x, shift=1.0, *, power=1):
        return SCALE * self.head(x) ** power + shift


def test_globals_are_replaced_in_a_copy():
    model, x = Model(), torch.ones(3)
    other = seams.with_globals(Model.forward, SCALE=3.0)
    torch.testing.assert_close(other(model, x) - 1, 1.5 * (model(x) - 1))
    torch.testing.assert_close(other(model, x, 0.0, power=2), 3 * model.head(x) ** 2)
    wrapped = functools.wraps(Model.forward)(lambda *_: None)
    assert torch.equal(seams.with_globals(wrapped, SCALE=3.0)(model, x), other(model, x))
    assert SCALE == 2.0


def test_a_shadow_shares_all_but_its_own():
    model = Model()
    before = dict(vars(model))
    shadow = seams.shadow(model, head=lambda x: x)
    x = torch.ones(3)
    assert torch.equal(shadow.forward(x), SCALE * x + 1) and isinstance(shadow, Model)
    assert [p is q for p, q in zip(shadow.parameters(), model.parameters(), strict=True)] == [True, True]
    assert vars(model) == before and model(x).shape == (2,)


class Tenfold(seams.Forward):
    methods = (("forward", "SCALE", "head"),)
    heads = ("head",)

    def __init__(self, *held):
        super().__init__(*held)
        self.calls = seams.Memo(lambda x: [])  # cannot be pickled, and belongs to one model

    def __call__(self, x):
        self.calls(x).append(self.options)
        return 10 * self.published(self.model, x)


def attach(model, forward=Tenfold, impl="auto", workspace_mb="auto"):
    return seams.attach(model, {f"{__name__}:Model": forward}, impl, workspace_mb)


def test_attached_forward_goes_with_copies():
    """A deep copy and a pickle run on their own parameters, and stay attached; an unattached model has nothing."""
    model, x = Model(), torch.ones(3)
    before, expected = dict(vars(model)), 10 * Model.forward(model, x)
    assert attach(model) is attach(model, impl="torch", workspace_mb=0.5) is model
    assert torch.equal(model(x), expected) and model.forward.options == {"impl": "torch", "workspace_mb": 0.5}
    assert model.forward.of_losses == {**model.forward.options, "keep_mb": 0}
    assert inspect.signature(model.forward) == inspect.signature(Model().forward)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.forward.model is other and other.forward.options == model.forward.options
        assert len(other.forward.calls(x)) == 0 < len(model.forward.calls(x)), "a copy has made nothing yet"
        torch.nn.init.zeros_(other.head.weight)
        assert torch.equal(other(x), 10 * Model.forward(other, x)) and torch.equal(model(x), expected)
        assert seams.unapply(other) is other
        assert torch.equal(other(x), Model.forward(other, x)) and torch.equal(model(x), expected)
    assert seams.unapply(seams.unapply(model)) is model
    assert vars(model) == before


class Other(Model):
    def forward(self, x):
        return x


def test_refused_models_stay_as_they_are():
    def refused(error, match, model, forward=Tenfold, **options):
        before = dict(vars(model))
        with pytest.raises(error, match=match):
            attach(model, forward, **options)
        assert vars(model) == before

    refused(TypeError, "a training model among .*test_seams:Model; got .*:Linear", nn.Linear(3, 2))
    refused(TypeError, "Model.forward as published", Other())
    refused(ValueError, "impl", Model(), impl="cuda")
    refused(RuntimeError, "without tail", Model(), type("Longer", (Tenfold,), {"methods": (("forward", "tail"),)}))
    model = Model()
    model.forward = Model().forward
    refused(TypeError, "or on the instance", model)
    nested = type("Nested", (Tenfold,), {"heads": ("head.0",)})
    model = Model()
    model.head = nn.Sequential(nn.ReLU())
    refused(TypeError, "head to be a torch.nn.Linear .*; got Sequential", model)
    refused(TypeError, "head.0 to be a torch.nn.Linear .*; got ReLU", model, nested)


class Renamed(Model):
    """It changes no method, as a trainer's own subclasses do."""


def test_the_most_derived_class_decides():
    kinds = {f"{__name__}:Model": Tenfold, f"{__name__}:Renamed": type("OfRenamed", (Tenfold,), {})}
    models = [seams.attach(model, kinds, "auto", "auto") for model in (Model(), Renamed())]
    assert [type(model.forward).__name__ for model in models] == ["Tenfold", "OfRenamed"]
    assert type(attach(Renamed()).forward) is Tenfold


def test_an_untested_version_is_a_warning(monkeypatch):
    monkeypatch.setattr(seams.metadata, "version", lambda name: "1.1")
    with pytest.warns(UserWarning, match=r"tested with trainer==1\.0, and trainer 1\.1 is installed"):
        seams.require_version("trainer", ("1.0",))
    monkeypatch.setattr(seams.metadata, "version", lambda name: "1.0")
    with warnings.catch_warnings(action="error"):
        seams.require_version("trainer", ("1.0",))


def test_required_names():
    seams.require_names(Model.forward, "SCALE", "head")
    with pytest.raises(RuntimeError, match="without tail"):
        seams.require_names(Model.forward, "head", "tail")


def test_memo_looks_at_contents():
    made = []
    memo = seams.Memo(lambda x: made.append(x) or len(made))
    x, y = torch.zeros(2), torch.zeros(2)
    assert [memo(x), memo(x), memo(y), memo(y)] == [1, 1, 2, 2]
    y.add_(1)
    assert memo(y) == 3
    by_dtype = seams.Memo(lambda x, dtype: x.to(dtype))
    assert [by_dtype(x, dtype).dtype for dtype in (torch.float16, torch.float64)] == [torch.float16, torch.float64]
