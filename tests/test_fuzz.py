"""Random shapes, strides, dtypes, values and work lists against float64, in memory that shows every stray access.

Every buffer, input or output, is a slice of poisoned storage: a lane outside a row that is read makes a result NaN, one
that is written is seen in the guard zones. The same examples in every run.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from fused_lk.kernels import launch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_lk import reference
from fused_lk.rows import plain
from fused_lk.rows.interface import MEASURED, TERMS, LogitRows, Normalizer, RowStats, Transform, tie_width

NAN, NEG_INF = float("nan"), float("-inf")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CANARY = -7
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPS = {"triton": launch, "torch": plain}
ONE_TERM = [(name,) for name in TERMS]
# Where log q ends in this dtype: below the first q is 0, above the second it is not.
UNDERFLOW = {torch.float32: (-110.0, -80.0), torch.float64: (-760.0, -700.0)}
# The interpreter loops over tiles of 16 or 64 columns here; on the CPU another argmax starts at 1,024.
SIZES = {"triton": st.integers(1, 70), "torch": st.integers(1, 70) | st.sampled_from([1023, 1024, 1031, 1152, 1279])}


class Guarded:
    """A tensor of `shape` inside poisoned storage, `step` apart in its last dimension, and what surrounds it."""

    def __init__(self, *shape, dtype, gap=5, offset=3, step=1, column_major=False):
        order = shape[::-1] if column_major else shape
        *rows, columns = order
        poison = NAN if dtype.is_floating_point else CANARY
        self.storage = torch.full((*(n + 2 for n in rows), columns * step + gap + offset), poison, dtype=dtype)
        self.storage = self.storage.to(DEVICE)
        inside = self.storage[tuple(slice(1, -1) for _ in rows)][..., offset : offset + columns * step : step]
        self.view = inside.t() if column_major else inside
        self.ours = torch.zeros_like(self.storage, dtype=torch.bool)
        self.ours[tuple(slice(1, -1) for _ in rows)][..., offset : offset + columns * step : step] = True

    def fill(self, values):
        self.view.copy_(values)
        self.before = self.storage.clone()
        return self.view

    def assert_guards_hold(self):
        around = self.storage[~self.ours]
        assert (around.isnan() if around.is_floating_point() else around == CANARY).all(), "written outside"

    def assert_untouched(self):
        assert torch.equal(self.storage.nan_to_num(1e30), self.before.nan_to_num(1e30)), "an input was written"


@st.composite
def rows_of_logits(draw, sizes):
    """Everything that one call of the row operations depends on."""
    size = draw(sizes, label="V")
    n, m = draw(st.integers(1, 5), label="n"), draw(st.integers(1, 4), label="m")
    dtype = draw(st.sampled_from(DTYPES), label="dtype")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20), label="seed"))
    has_index = draw(st.booleans(), label="index")
    rows = m if has_index else n

    def logits(count):
        x = torch.randn(count, size, dtype=torch.float64, generator=generator)
        x = x * draw(st.sampled_from([0.01, 1.0, 20.0, 200.0]), label="spread")
        if draw(st.booleans(), label="rounded"):  # ties, for the argmax
            x = x.round()
        if draw(st.booleans(), label="peak"):  # the maximum at a chosen place, often the last
            x[:, draw(st.sampled_from([0, size // 2, size - 1]))] = x.max() + 1
        return x.to(dtype)

    z, t = logits(n), logits(rows)
    index = torch.randint(m, (n,), generator=generator) if has_index else None
    if draw(st.booleans(), label="impossible tokens"):
        t[torch.rand(rows, size, generator=generator) < 0.4] = NEG_INF
    if draw(st.booleans(), label="a row without an answer"):
        t[-1] = NEG_INF
    if draw(st.booleans(), label="identical") and not has_index:
        t = z.clone()
    scales = draw(st.sampled_from([(1.0, 1.0), (1 / 0.7, 1.0), (1.0, 0.9), (1 / 3, 1 / 0.7)]), label="scales")
    labels = torch.randint(-1, size, (n,), generator=generator) if draw(st.booleans(), label="labels") else None
    return {
        **{"z": z, "t": t, "index": index, "scales": scales, "generator": generator},
        "has_normalizer": draw(st.booleans(), label="normalizer"),
        "terms": draw(
            st.sampled_from([MEASURED, MEASURED, MEASURED[::-1], *ONE_TERM, TERMS, TERMS[::-1]]), label="terms"
        ),
        **{"labels": labels, "beta": draw(st.sampled_from([0.5, 0.1, 0.97]), label="beta")},
        "wants_target_argmax": draw(st.booleans(), label="target argmax"),
        "gap": draw(st.sampled_from([1, 8, 64]), label="gap"),
        "offset": draw(st.sampled_from([0, 1, 8]), label="offset"),
        "columns": draw(st.sampled_from(["adjacent", "adjacent", "apart", "column major"]), label="columns"),
        "tile": draw(st.sampled_from([16, 64, 2**19]), label="tile"),
        "in_place": draw(st.booleans(), label="in place"),
        "blocks": draw(st.integers(1, 3), label="blocks"),
    }


class Truth:
    """float64 statistics and gradients on the very numbers that the operations read."""

    def __init__(self, z, t, index, normalizer, scales, acc, labels, beta):
        self.z = (z.double() * scales[0]).requires_grad_()
        rows = t if index is None else t[index]
        self.t = rows.double() * scales[1]
        self.target_lse = self.t.logsumexp(1)
        self.supported = self.target_lse > NEG_INF
        normalizer = self.target_lse if normalizer is None else normalizer.double()
        log_p = self.t - torch.where(self.supported, normalizer, 0).unsqueeze(1)
        # What q cannot say in `acc` costs no reverse KL; what it can just say may cost it or not.
        excluded = self.t.isneginf() & self.supported.unsqueeze(1)
        said = self.z.detach().log_softmax(1).masked_fill(~excluded, NEG_INF)
        lowest, highest = UNDERFLOW[acc]
        gone = excluded & (said <= lowest)
        self.undecided = ((said > lowest) & (said < highest)).any(1)
        further = reference.further_divergences(self.z, log_p, labels, beta)
        with_gone = torch.where(gone, NEG_INF, self.z)
        further["rkl"] = reference.further_divergences(with_gone, log_p)["rkl"]
        self.values = dict(zip(MEASURED, reference.divergences(self.z, log_p), strict=True)) | further
        self.log_alpha, self.kl = (self.values[name] for name in MEASURED)
        with torch.no_grad():
            self.draft_lse = self.z.logsumexp(1)
            log_q = self.z - self.draft_lse.unsqueeze(1)
            # Rounding of x * scale, of the normaliser, of their difference, each relative to the largest number in it
            finite = torch.where(self.t > NEG_INF, self.t, 0).abs().amax(1)
            magnitude = self.z.abs().amax(1) + finite + torch.where(self.supported, normalizer, 0).abs() + 8
            self.error = 4 * torch.finfo(acc).eps * magnitude
            r = (log_q - torch.where(self.supported, self.log_alpha, 0).unsqueeze(1)).exp().clamp(max=1)
            self.q, supported = log_q.exp(), self.supported.unsqueeze(1)
            self.sigma = torch.where(supported & (log_q < log_p), r, 0).sum(1)
            # where rounding decides a tie, any subgradient is right
            log_pt = (self.t - torch.where(self.supported, self.target_lse, 0).unsqueeze(1)).masked_fill(~supported, 0)
            width = 2 * self.error.unsqueeze(1) + tie_width(acc)
            self.slack = torch.where(supported & ((log_q - log_p).abs() <= width), r, 0)
            self.slack_of_l1 = torch.where(supported & ((log_q - log_pt).abs() <= width), 2 * self.q, 0)
            surprise = torch.where((self.q > 0) & (log_pt > NEG_INF), self.q * (log_q - log_pt).abs(), 0)
            # The largest factor of a gradient is d * exp(x), whose relative error is the absolute error of x.
            self.factor = dict.fromkeys(TERMS, 2.0) | {"rkl": 4 + 2 * surprise.sum(1)}
            self.factor |= dict.fromkeys(("jsd", "skl", "l1"), 4.0)

    def allowed(self, name):
        """The error of a value."""
        return self.error * (self.factor[name] if name in ("jsd", "skl", "l1", "rkl") else 1 + self.values[name].abs())

    def gradient(self, d, scale):
        """Of the sum of `d[name]` times the value, and its error."""
        values = {name: torch.where(self.supported, self.values[name], 0) for name in d}
        total = sum((torch.where(x.isfinite(), d[name] * x, x.detach())).sum() for name, x in values.items())
        gradient = torch.autograd.grad(total, self.z)[0] * scale
        error = sum(self.error * self.factor[name] * x for name, x in d.items()).unsqueeze(1)
        for name, slack in (("log_acceptance", self.slack), ("l1", self.slack_of_l1)):
            if name in d:
                error = error + (slack + self.q * slack.sum(1, keepdim=True)) * d[name].unsqueeze(1)
        return gradient, error * scale


def assert_within(name, got, want, allowed):
    same = (got.double() == want) | ((got.double() - want).abs() <= allowed)
    assert same.all(), f"{name}: {got[~same].tolist()} is not {want[~same].tolist()}"


@pytest.mark.parametrize("impl", OPS)
@settings(max_examples=100)
@given(data=st.data())
def test_row_operations(impl, data):
    case = data.draw(rows_of_logits(SIZES[impl]))
    z, t, index, scales, generator = (case[name] for name in ("z", "t", "index", "scales", "generator"))
    ops, dtype, (n, size) = OPS[impl], z.dtype, z.shape
    acc = torch.promote_types(dtype, torch.float32)
    layout = {"gap": case["gap"], "offset": case["offset"]}
    if case["columns"] == "apart":
        layout["step"] = 2
    layout["column_major"] = case["columns"] == "column major"

    rows = t if index is None else t[index]
    lse = (rows.double() * scales[1]).logsumexp(1)
    normalizer = torch.where(lse > NEG_INF, lse + 0.3, NEG_INF).to(acc) if case["has_normalizer"] else None
    d_values = torch.rand(len(case["terms"]), n, dtype=torch.float64, generator=generator).to(acc)

    def matrix(like, wider):
        """Row strides differ, so that one cannot stand for another."""
        return Guarded(*like.shape, dtype=dtype, **{**layout, "gap": case["gap"] + wider})

    guards = {"z": matrix(z, 0), "t": matrix(t, 1)}
    guards["z"].fill(z)
    guards["t"].fill(t)
    terms, labels, beta = (case[name] for name in ("terms", "labels", "beta"))
    truth = Truth(z, t, index, normalizer, scales, acc, lowest_argmax(rows) if labels is None else labels, beta)
    if "rkl" in terms:
        d_values[terms.index("rkl"), truth.undecided] = 0
    for name, values in (("index", index), ("normalizer", normalizer), ("d_values", d_values), ("labels", labels)):
        if values is not None:
            guards[name] = Guarded(*values.shape, dtype=values.dtype, step=2)
            guards[name].fill(values)
    view = {name: guard.view for name, guard in guards.items()}
    given = None if normalizer is None else Normalizer(view["normalizer"], False, 0.0)
    wants_target_argmax = case["wants_target_argmax"] or ("ce" in terms and labels is None)
    shapes = {"base": (5, n), "values": (len(terms), n), "saved": (2, len(terms), n)}
    argmaxes = ["draft_argmax", "target_argmax"][: 1 + wants_target_argmax]
    outputs = {name: Guarded(*shape, dtype=acc, offset=1, gap=gap) for gap, (name, shape) in enumerate(shapes.items())}
    outputs |= {name: Guarded(n, dtype=torch.long, offset=1, gap=1) for name in argmaxes}
    stats = RowStats(**{name: guard.view for name, guard in outputs.items()})
    outputs["gradient"] = guards["z"] if case["in_place"] else matrix(z, 2)
    g = outputs["gradient"].view

    transforms = [Transform(x) for x in scales]
    of_terms = {"labels": view.get("labels"), "jsd_beta": beta}
    with (
        mock.patch.object(launch, "INTERPRETER_BLOCK_V", case["tile"]),
        mock.patch.object(plain, "BLOCK_ELEMENTS", 2 * size),
    ):
        ops.stats(LogitRows(view["z"], view["t"], view.get("index"), given, *transforms, **of_terms), terms, stats)
        for guard in guards.values():
            guard.assert_untouched()
        for part in torch.arange(size).chunk(case["blocks"]):
            columns = slice(int(part[0]), int(part[-1]) + 1)
            parts = view["z"][:, columns], view["t"][:, columns], view.get("index"), None
            block = LogitRows(*parts, *transforms, columns.start, **of_terms)
            ops.gradient(block, terms, stats, view["d_values"], g[:, columns])

    for guard in guards.values():
        if guard is not outputs["gradient"]:
            guard.assert_untouched()
    for guard in outputs.values():
        guard.assert_guards_hold()
    supported = truth.supported
    for name, scale in zip(("draft", "target"), scales, strict=True):
        lse = getattr(stats, f"{name}_top").double() * scale + getattr(stats, f"{name}_log_total")
        assert_within(name, lse, getattr(truth, f"{name}_lse"), truth.error)
    for i, name in enumerate(terms):
        decided = ~truth.undecided if name == "rkl" else slice(None)
        got, want, allowed = (x[decided] for x in (stats.values[i], truth.values[name], truth.allowed(name)))
        assert_within(name, got, want, allowed)
    if "log_acceptance" in terms:
        sigma, slack = stats.saved[0, terms.index("log_acceptance")], truth.slack.sum(1) + 2 * truth.error
        assert_within("sigma", sigma[supported], truth.sigma[supported], slack[supported])
    assert torch.equal(stats.draft_argmax, lowest_argmax(z))
    if wants_target_argmax:
        assert torch.equal(stats.target_argmax, lowest_argmax(rows))
    gradient, allowed = truth.gradient(dict(zip(terms, d_values.double(), strict=True)), scales[0])
    rounding = torch.finfo(dtype).eps * gradient.abs() + torch.finfo(dtype).smallest_normal
    assert_within("gradient", g, gradient, allowed + rounding)
    assert not g[~supported].any()
    assert not stats.saved[..., ~supported].any()


def lowest_argmax(x):
    return (x == x.amax(1, keepdim=True)).int().argmax(1)


@pytest.mark.parametrize("impl", OPS)
@settings(max_examples=50)
@given(data=st.data(), share=st.sampled_from([None, 0.1, 0.9, 1.0]))
def test_lse_argmax(impl, data, share):
    case = data.draw(rows_of_logits(SIZES[impl]))
    x, scale = case["t"], case["scales"][1]
    acc = torch.promote_types(x.dtype, torch.float32)
    step = 2 if case["columns"] == "apart" else 1
    source = Guarded(*x.shape, dtype=x.dtype, gap=case["gap"], offset=case["offset"], step=step)
    lse, mass, argmax = (Guarded(len(x), dtype=dtype, gap=1) for dtype in (acc, acc, torch.long))
    inside = None if share is None else torch.rand(x.shape[1], generator=case["generator"]) < share
    with (
        mock.patch.object(launch, "INTERPRETER_BLOCK_V", case["tile"]),
        mock.patch.object(plain, "BLOCK_ELEMENTS", 2 * x.shape[1]),
    ):
        marks = None if inside is None else inside.to(DEVICE)
        OPS[impl].lse_argmax(
            source.fill(x),
            Transform(scale),
            marks,
            lse.view,
            None if inside is None else mass.view,
            argmax.view,
        )
    source.assert_untouched()
    lse.assert_guards_hold()
    mass.assert_guards_hold()
    argmax.assert_guards_hold()
    assert torch.equal(argmax.view, lowest_argmax(x))
    scaled = x.double() * scale
    exact = scaled.logsumexp(1)
    error = (
        4 * torch.finfo(acc).eps * (exact.abs().nan_to_num(posinf=0) + scaled.abs().nan_to_num(posinf=0).amax(1) + 8)
    )
    assert_within("lse", lse.view, exact, error)
    if inside is None:
        assert mass.view.isnan().all()
        return
    some = exact > NEG_INF  # a row of -inf alone has no share that means anything
    share_of = scaled.masked_fill(~inside, NEG_INF).logsumexp(1) - exact
    assert_within("log mass", mass.view[some], share_of[some], error[some])
