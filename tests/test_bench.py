"""The benchmark itself: its peers are what is published, its parity gate catches what is wrong, its files are sound."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import peers
import pytest
import torch
import torch.nn.functional as F

from bench import eager, exactness, gate, parity, report, truncation
from bench.gemm_floor import FLOORS, floors
from bench.providers import PROVIDERS, Provider, available, clear_gradients
from bench.shapes import LARGE, SERIES, SHAPES, SMALL, make_inputs, series, tiny
from bench.timing import Cell, Job, Measured, measure, measure_in_fresh_process, peak_of_allocations

STRUCTURES = ["cpu-gate", "cpu-ttt3-masked"]
COMPILED = ("specforge-compiled", "liger-chunked")


@pytest.fixture(autouse=True)
def eager_only():
    """What compilation changes is speed; compiling here would take most of a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", [name for name, provider in PROVIDERS.items() if not provider.gpu])
def test_parity_gate_passes(name, structure):
    assert PROVIDERS[name] in available(gpu=False)
    assert parity.disagreement(PROVIDERS[name], SHAPES[structure]) == ""


WRONG = {
    "loss": lambda loss, inputs: loss + 1e-3,
    "gradient": lambda loss, inputs: loss + 1e-3 * (inputs.draft_weight - inputs.draft_weight.detach()).sum(),
    "missing": lambda loss, inputs: (loss - loss.detach() * 0).detach() + 0 * inputs.draft_weight.sum(),
    "nan": lambda loss, inputs: loss * float("nan"),
}


@pytest.mark.parametrize("how", WRONG)
def test_parity_gate_catches(how):
    def loss(inputs):
        return WRONG[how](eager.specforge(inputs), inputs)

    wrong = Provider("wrong", "wrong", lambda inputs: partial(loss, inputs), "specforge", "")
    assert parity.disagreement(wrong, SHAPES["cpu-ttt3-masked"]) != ""


def test_semantics_differ():
    """An oracle that could not tell one loss from another would prove nothing."""
    for semantics in set(parity.ORACLES) - {"speculators"}:
        assert parity.disagreement(replace(PROVIDERS["speculators-eager"], semantics=semantics), SHAPES["cpu-eagle3"])


def test_specforge_is_as_published():
    inputs = make_inputs(tiny(SHAPES["cpu-ttt3-masked"]))
    peer, steps = peers.specforge(), len(inputs.draft_hidden)
    target_logits = F.linear(inputs.target_hidden, inputs.target_weight).unsqueeze(0)
    loss_mask = inputs.mask.long().view(1, -1, 1)
    p, p_on_draft, _, mask = peer.model._compute_target_p_padded(target_logits, inputs.t2d, loss_mask, steps)
    mask = F.pad(mask, (0, 0, 0, steps))
    n, total = inputs.shape.num_tokens, 0.0
    for k, h in enumerate(inputs.draft_hidden):
        logits = F.linear(h, inputs.draft_weight).unsqueeze(0)
        at = slice(k, k + n)
        rates = peer.lk_loss.compute_acceptance_rate(
            logits=logits, target_probs=p_on_draft[:, at], position_mask=mask[:, at]
        )
        kl = peer.loss._compute_loss(logits, p[:, at], mask[:, at])
        total = total + peer.lk_loss.compute_lk_loss(
            kl_loss=kl,
            acceptance_rate=rates[0],
            log_acceptance_rate=rates[1],
            lk_loss_type="lambda",
            kl_scale=1.0,
            kl_decay=3.0,
        )
    assert_same(eager.specforge(inputs), total, inputs)


def test_speculators_is_as_published():
    inputs = make_inputs(tiny(SHAPES["cpu-ttt3-masked"]))
    peer, total = peers.speculators(), 0.0
    targets = F.linear(inputs.target_hidden, inputs.target_draft_weight)
    for k, h in enumerate(inputs.draft_hidden):
        total = total + peer.utils.loss_function(
            F.linear(h, inputs.draft_weight).unsqueeze(0),
            F.pad(targets[k:], (0, 0, 0, k)).unsqueeze(0),
            inputs.step_mask(k).unsqueeze(0),
            torch.zeros(1, inputs.shape.num_tokens),
            loss_fn=peer.eager.lk_hybrid_loss,
        )
    assert_same(eager.speculators(inputs), total, inputs)


def assert_same(ours, theirs, inputs):
    for got, want in zip((ours, *gradients(ours, inputs)), (theirs, *gradients(theirs, inputs)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs.leaves)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_floor_counts_products(structure):
    """2 flops a multiply-add: 3 draft products of the rows that count, one of the target rows that are used."""
    inputs = make_inputs(tiny(SHAPES[structure]))
    shape = inputs.shape
    pairs = sum(int(inputs.step_mask(k).sum()) for k in range(shape.ttt_steps))
    used = int(inputs.step_mask(0).sum())
    for name, vocab in zip(FLOORS, (shape.draft_vocab_size, shape.target_vocab_size), strict=True):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counted:
            floors(inputs)[name]()
        want = 2 * shape.hidden_size * (3 * pairs * shape.draft_vocab_size + used * vocab)
        assert counted.get_total_flops() == want


def test_peak_of_allocations_is_exact():
    def run():
        a = torch.empty(1000, dtype=torch.uint8)
        del a
        b, c = torch.empty(300_000, dtype=torch.uint8), torch.empty(500_000, dtype=torch.uint8)
        return b, c

    assert peak_of_allocations(run) == 800_000


def test_rows_survive_the_csv(tmp_path):
    shape = tiny(SHAPES["cpu-ttt3-masked"])
    torch_threads = torch.get_num_threads()
    (measured,) = measure(Job([Cell(shape, "ours-default")], rounds=3, warmup=1, threads=torch_threads))
    assert all(len(times) == 3 for times in (*measured.times.values(), *measured.floors.values()))
    assert measured.peak_bytes > 4 * shape.draft_vocab_size * shape.hidden_size  # dW at the least
    origin = dict.fromkeys(("device", "cpu", "threads", "python", "versions", "commit", "date"), "x")
    provider = PROVIDERS["ours-default"]
    rows = report.rows_of("", shape, provider, measured, "ok", origin)
    rows += report.rows_of("", shape, PROVIDERS["liger-chunked"], None, "disagrees with the oracle: by much", origin)
    rows += report.rows_of("", shape, PROVIDERS["checkpointed"], Measured({}, {}, error="exit code 1: x"), "ok", origin)
    report.write_csv(tmp_path / "x.csv", rows)
    assert report.read_csv(tmp_path / "x.csv") == rows
    assert [row.status for row in rows[::2]] == ["ok", "disagrees with the oracle: by much", "exit code 1: x"]
    table = report.markdown(rows)
    assert "disagrees with the oracle" in table
    assert f"{rows[1].ratio_from_hidden:.2f}" in table
    (tmp_path / "old.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns of schema"):
        report.read_csv(tmp_path / "old.csv")


def test_worker_reports_a_crash():
    (result,) = measure_in_fresh_process(Job([Cell(tiny(SHAPES["cpu-gate"]), "nobody")], rounds=1))
    assert "nobody" in result.error


def test_shapes():
    assert len(SHAPES) == len(LARGE) + len(SMALL)
    assert (SHAPES["cpu-gate"].num_tokens, SHAPES["cpu-gate"].hidden_size) == (1024, 256)
    for kind in ("cpu", "gpu"):
        points = list(series(kind))
        assert len({shape for _, shape in points}) >= len(points) - len(SERIES[kind])  # the base shape recurs
        for name, shape in points:
            assert shape.draft_vocab_size <= shape.target_vocab_size
            assert getattr(shape, name) in SERIES[kind][name]


def test_masked_share_and_shift():
    inputs = make_inputs(tiny(SHAPES["cpu-ttt3-masked"]))
    n = inputs.shape.num_tokens
    assert int(inputs.mask.sum()) == n - round(inputs.shape.masked_share * n)
    assert torch.equal(inputs.step_mask(2)[: n - 2], inputs.mask[2:])
    assert not inputs.step_mask(2)[n - 2 :].any()
    assert inputs.pairs().position_dim == 0  # so that blocks have metrics


def test_gate_arithmetic():
    def of(milliseconds):
        return Measured({"forward_backward": [milliseconds] * 3}, {"from_hidden": [100.0] * 3})

    times = {
        "one pass": 130,
        "default": 190,
        "kept": 180,
        "one pass, half masked": 70,
        "default, half masked": 120,
        "eager": 390,
        "compiled eager": 130,
        "l1": 150,
        "mix": 180,
    }
    got = gate.ratios({name: of(float(x)) for name, x in times.items()})
    holds = {g.name: g.holds(got[g.name], g.limit) for g in gate.GATES}
    assert holds == {
        "one pass / floor": True,
        "default / floor": True,
        "kept / default": False,
        "eager / one pass": True,
        "one pass / compiled eager": False,
        "one pass, half masked / one pass": True,
        "default, half masked / default": False,
        "mix / l1": False,
    }
    assert all(g.holds(got[g.name], g.ci_limit) or not holds[g.name] for g in gate.GATES)


def test_float32_logits_are_more_exact():
    rows = {row.method: row for row in exactness.measure(0.99, 24, 32, 500, repeats=1, device="cpu")}
    eager_row, compute, exact = rows.values()
    assert abs(exact.alpha - 0.99) < 0.005
    for name in ("alpha_mean_error", "kl_gradient_error", "alpha_gradient_error"):
        assert getattr(exact, name) < 0.5 * getattr(eager_row, name)
        assert getattr(compute, name) < 1.5 * getattr(eager_row, name)


def test_gradients_are_cleared():
    inputs = make_inputs(tiny(SHAPES["cpu-gate"]))
    eager.specforge(inputs).backward()
    clear_gradients(inputs)
    assert all(x.grad is None for x in inputs.leaves)


def test_truncation_is_what_the_docs_say():
    """Its table, row for row; and the laws that its prose states."""
    page = (truncation.DATA.parents[2] / "docs" / "targets.md").read_text()
    table = re.search(r"^\| draft and target \| k \|.*?\n\n", page, re.MULTILINE | re.DOTALL)[0]
    printed = [[x.strip() for x in line.split("|")[2:-1]] for line in table.splitlines()[2:-1]]
    measured = []
    for logits in (truncation.smollm2(), truncation.zipf()):
        *of_k, full = [truncation.measure("", *logits, k) for k in (*truncation.SIZES, None)]
        assert all(full.alpha - (1 - row.mass) <= row.alpha <= full.alpha for row in of_k)
        measured += [*of_k, full]
    for (k, *shown), row in zip(printed, measured, strict=True):
        assert k == str(row.k or "all")
        for text, value in zip(shown, row[2:], strict=True):
            assert abs(float(text) - value) <= 0.5001 * 10 ** -len(text.partition(".")[2]), (k, text, value)
    _, target = truncation.smollm2()
    same = truncation.measure("", target, target, 16)
    log_mass = target.log_softmax(-1).topk(16).values.logsumexp(-1)
    assert same.kl == pytest.approx(-log_mass.mean().item())
    assert (same.kl_restricted, same.alpha_restricted) == pytest.approx((0.0, 1.0))


def test_plots_are_for_readers():
    """No provider's key, and no letter below 11 pixels where the figure is 800 wide."""
    plots = pytest.importorskip("bench.plots")
    assert set(plots.STYLE) == set(PROVIDERS)
    path = Path(__file__).parents[1] / "bench" / "results" / "amd-epyc-2-cores.csv"
    drawn = plots.figures(report.read_csv(path))
    assert set(drawn) == {"ratio", "scaling"}
    for figure in drawn.values():
        texts = [x for x in figure.findobj(plots.matplotlib.text.Text) if x.get_text()]
        assert {PROVIDERS["ours-one-pass"].title} <= {x.get_text() for x in texts}
        for text in texts:
            assert not any(name in text.get_text() for name in PROVIDERS if "-" in name)
            assert text.get_fontsize() / 72 * 800 / figure.get_size_inches()[0] >= 11, text
