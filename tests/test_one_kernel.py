"""Statistics and gradient in one launch: the same numbers as in two, whatever the loss is made of."""

from __future__ import annotations

import hard_rows
import pytest
import torch
from fused_lk.kernels import launch

from fused_lk.objective import Objective
from fused_lk.rows.interface import MEASURED, TERMS, LogitRows, Normalizer, Transform
from fused_lk.walk.plan import empty_statistics

SIZE = 301 if launch.INTERPRETED else 10_301  # blocks of columns, and the rest of one
LOSSES = {
    **{name: {"mix": ((name, 1.0),)} for name in ("kl", "tv", "alpha")},
    "lambda per token": {"mix": (("lambda", 0.7),), "kl_scale": 0.8},
    "lambda given": {"mix": (("lambda", 1.0), ("kl", 0.2), ("tv", 0.3)), "kl_weight": 0.9},
    "all": {"mix": tuple((name, 0.1 * (i + 1)) for i, name in enumerate(("lambda", "alpha", *TERMS[1:])))},
}
OPTIONS = {
    "plain": {},
    "softcap": {"z_transform": Transform(2.0, 0.4), "t_transform": Transform(1.5, 0.5)},
    "scales": {"z_transform": Transform(0.7), "t_transform": Transform(1 / 0.7), "jsd_beta": 0.2},
    "rows shared": {"t_index": torch.tensor([0, 0, 1, 1, 2, 2, 3])},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("kind", LOSSES)
def test_it_is_that_of_two(kind, how, dtype, monkeypatch):
    if launch.INTERPRETED:
        monkeypatch.setattr(launch, "INTERPRETER_BLOCK_V", 128)
    z, t = (x.to(dtype) for x in hard_rows.make("normal", 7, SIZE))
    t[1] = -torch.inf
    rows = LogitRows(z, t, None, None, Transform(), Transform())._replace(**OPTIONS[how])
    if how == "plain":
        value = t.float().logsumexp(1) + 0.5
        rows = rows._replace(normalizer=Normalizer(value, False, 1e-6), labels=torch.tensor([3, -1, 0, 300, 7, 8, 9]))
    options = {"eta": 2.5, "kl_scale": 1.0, "kl_weight": None, **LOSSES[kind]}
    if options["kl_weight"] is not None:
        options["kl_weight"] = torch.linspace(0, options["kl_weight"], 7)
    terms = TERMS if kind == "all" else MEASURED
    weights = torch.tensor([1.0, 0.5, 0.25, 0.0, 1.0, 0.125, 1.0])
    loss = Objective(terms=terms, weights=weights, **options)

    results = []
    launched = []
    run = launch._launch
    monkeypatch.setattr(launch, "_launch", lambda name, *x, **how: (launched.append(name), run(name, *x, **how)))
    for one in (False, True):
        monkeypatch.setattr(launch, "ONE_KERNEL", one)
        stats = empty_statistics(7, terms, torch.float32, z.device, target_argmax=True)
        own = rows._replace(z=z.clone())
        launch.stats_and_gradient(own, terms, stats, loss, own.z)
        results.append((*stats, own.z.float()))
    assert launched == ["row_stats", "row_grad", "row_pass"]
    *stats, gradient = results[0]
    *same, other = results[1]
    for x, y in zip(stats, same, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())
    # The derivatives of the terms are made in another order, and their products cancel. Half precision rounds last, so
    # that a number may be the next one.
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 0.0
    allowed = rounding * gradient.abs() + 2.0**-19 * gradient.abs().amax(1, keepdim=True)
    assert ((other - gradient).abs() <= allowed).all()
    assert not other[3].any()  # its weight is 0
    assert other.any(1).sum() == 5
