"""What an output holds and prints: acceptance per token, sums per position and per block, and how they add up."""

from __future__ import annotations

import peers
import pytest
import torch
from problems import make_problem

import fused_lk

IMPLS = ("torch", "reference")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("work", ["identity", "shifted", "kept"])
@pytest.mark.parametrize("objective", ["lambda", "alpha"])
def test_acceptance_of_each_token(work, objective, impl):
    problem = make_problem(work=work)
    out, _ = problem.run(impl=impl, objective=objective)
    d, _ = problem.run(fused_lk.lk_divergences, lambda d: d.kl.sum(), impl="reference")
    torch.testing.assert_close(out.token_acceptance, d.acceptance)
    assert not out.token_acceptance.requires_grad
    if work != "identity":
        ignored = d.acceptance == 0
        assert ignored.any()
        assert (out.token_log_acceptance.exp()[ignored] == 1).all()  # why there is a field of its own


def test_a_record_prints_in_one_line():
    """Of 3,000 tokens nothing is printed but shapes, and no gradient function."""
    problem = make_problem(work="shifted", num_tokens=1000)
    out, _ = problem.run(impl="torch")
    d, _ = problem.run(fused_lk.lk_divergences, lambda d: d.kl.sum(), impl="torch")
    for record in (out, d):
        assert len(repr(record)) < 1200
        assert "grad_fn" not in repr(record)
        assert "\n" not in repr(record)
        assert "draft_token_ids=(3, 1000) int64" in str(record)
    assert f"loss={out.loss.detach()!r}" in repr(out)
    assert f"acceptance_sum={out.acceptance_sum!r}" in repr(out)
    unreduced, _ = problem.run(impl="torch", reduction="none")
    assert "loss=(3, 1000) float64" in repr(unreduced)


def test_printing_reads_only_what_it_shows(monkeypatch):
    problem = make_problem(work="shifted", num_tokens=1000)
    out, _ = problem.run(impl="torch")
    read, text_of = [], torch.Tensor.__repr__
    monkeypatch.setattr(torch.Tensor, "__repr__", lambda x, **how: read.append(x) or text_of(x, **how))
    repr(out)
    assert 0 < len({id(x) for x in read}) < 16  # with a default device set, each comes twice
    assert max(x.numel() for x in read) <= 16


def length_by_hand(acceptance, counts):
    """Of one chain, token by token."""
    length, reached = 1.0, 1.0
    for alpha, count in zip(acceptance, counts, strict=True):
        if count:
            reached *= alpha
            length += reached
    return length


def test_a_position_without_tokens_does_not_end_the_chain():
    given = fused_lk.expected_acceptance_length(torch.tensor([0.0, 1.0, 1.0, 1.0]), counts=torch.tensor([0, 9, 9, 9]))
    assert given == 4
    assert fused_lk.expected_acceptance_length(torch.tensor([0.0, 1.0, 1.0, 1.0])) == 1  # nobody said that it is none
    acceptance, counts = torch.rand(4, 5, 3, dtype=torch.float64), torch.rand(4, 5, 3) > 0.4
    acceptance[1, 2, 0] = float("nan")
    counts[1, 2, 0] = False
    for mask in (counts, counts.long() * 3, counts[:, 0, 0]):
        full = mask.bool() if mask.ndim == 3 else mask.view(4, 1, 1).expand(4, 5, 3)
        got = fused_lk.expected_acceptance_length(acceptance, mask)
        for i in range(5):
            for j in range(3):
                by_hand = length_by_hand(acceptance[:, i, j].tolist(), full[:, i, j].tolist())
                assert got[i, j].item() == pytest.approx(by_hand, nan_ok=True)


@pytest.mark.parametrize("skip_masked", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_length_with_a_given_anchor(impl, skip_masked):
    """A DFlash block: slot 0 is the anchor, which is given; a draft that is the target then has 3 + 1 tokens."""
    logits = torch.randn(4, 7)
    pairs = fused_lk.Pairs(torch.arange(4) > 0, positions=torch.arange(4), num_positions=4, skip_masked=skip_masked)
    out = fused_lk.lk_loss_from_logits(logits, fused_lk.Target.from_logits(logits), pairs=pairs, impl=impl)
    assert out.num_tokens.tolist() == [0, 1, 1, 1]
    assert out.metrics()["expected_acceptance_length"] == pytest.approx(4, abs=1e-5)


def make_call(pattern, seed=0, **options):
    """`(call, pairs)` of K = 3 positions over 2 sequences of 9 tokens, with a mask that has gaps."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 9, generator=generator) > 0.4
    target_logits = 2 * torch.randn(18, 13, generator=generator, dtype=torch.float64)
    target = fused_lk.Target.from_logits(target_logits)
    anchors = torch.tensor([[0, 3, 7, -1], [2, 5, 6, 8]])
    pairs = {
        "steps": lambda: fused_lk.Pairs.ttt(mask, 3, **options),
        "blocks": lambda: fused_lk.Pairs.blocks(anchors, 3, mask, **options),
        "given": lambda: fused_lk.Pairs(
            torch.rand(4, 3, 6, generator=generator) * (torch.rand(4, 3, 6, generator=generator) > 0.4),
            torch.randint(-1, 18, (4, 3, 6), generator=generator),
            position_dim=1,
            **options,
        ),
    }[pattern]()
    # the target's logits and some noise, so that greedy runs are longer than 0
    rows = pairs.dense(torch.Size(pairs.shape).numel(), torch.device("cpu"))[1]
    draft = (target_logits[rows] + torch.randn(len(rows), 13, generator=generator)).view(*pairs.shape, 13)
    draft.requires_grad_()
    given = list(draft) if pattern == "steps" else draft
    return lambda **how: fused_lk.lk_loss_from_logits(given, target, pairs=pairs, **how), pairs, draft, target


CHAINS = {  # the flat draft rows of each block
    "steps": [[k * 18 + i for k in range(3)] for i in range(18)],
    "blocks": [[i * 3 + k for k in range(3)] for i in range(8)],
    "given": [[(a * 3 + k) * 6 + b for k in range(3)] for a in range(4) for b in range(6)],
}


@pytest.mark.parametrize("skip_masked", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pattern", CHAINS)
def test_sums_over_blocks(pattern, impl, skip_masked):
    call, pairs, draft, target = make_call(pattern, skip_masked=skip_masked)
    out = call(impl=impl)
    weights, rows, _ = pairs.dense(draft[..., 0].numel(), draft.device)
    right = (draft.flatten(0, -2).argmax(-1) == target.token_ids[rows]).tolist()
    alpha, counts = out.token_acceptance.flatten().tolist(), (weights > 0).tolist()
    likely, greedy, blocks = [0.0] * 3, [0.0] * 3, 0
    for chain in CHAINS[pattern]:
        reached, run = 1.0, 1.0
        for k, row in enumerate(chain):
            if counts[row]:
                reached, run = reached * alpha[row], run * right[row]
                likely[k], greedy[k] = likely[k] + reached, greedy[k] + run
        blocks += any(counts[row] for row in chain)
    assert 0 < blocks < len(CHAINS[pattern])
    assert greedy[1] > 0
    assert out.prefix_acceptance_sum.tolist() == pytest.approx(likely)
    assert out.prefix_accuracy_sum.tolist() == greedy
    assert out.num_blocks == blocks
    metrics = out.metrics()
    assert metrics["acceptance_length"] == pytest.approx(1 + sum(likely) / blocks)
    assert metrics["greedy_acceptance_length"] == pytest.approx(1 + sum(greedy) / blocks)
    assert metrics["acceptance_length"] != pytest.approx(metrics["expected_acceptance_length"], rel=1e-3)


def test_as_speculators_counts_blocks():
    """Its masks have no gaps inside a block, beside slot 0: then both count the same."""
    metrics = peers.speculators().metrics
    target_logits, noise = torch.randn(6 * 4, 11), torch.randn(6 * 4, 11)
    length = torch.tensor([0, 3, 2, 1, 3, 3]).unsqueeze(1)
    mask = (torch.arange(4) > 0) & (torch.arange(4) <= length)
    pairs = fused_lk.Pairs(mask, position_dim=1)
    draft = (target_logits + 0.5 * noise).view(6, 4, 11)
    out = fused_lk.lk_loss_from_logits(draft, fused_lk.Target.from_logits(target_logits), pairs=pairs)
    correct = draft.argmax(-1) == target_logits.view(6, 4, 11).argmax(-1)
    total, count = metrics.compute_accepted_length_counts(correct[:, 1:], mask[:, 1:])
    assert out.num_blocks == count == 5
    assert 1 < out.greedy_acceptance_length == total / count


@pytest.mark.parametrize("impl", IMPLS)
def test_which_rows_are_a_block(impl):
    logits = torch.randn(2, 3, 7)
    target = fused_lk.Target.from_logits(logits.flatten(0, 1))
    draft = torch.randn(2, 3, 7)

    def run(draft, **how):
        return fused_lk.lk_loss_from_logits(draft, target, impl=impl, **how)

    single = run(draft)  # one position: every token is a block
    assert single.num_blocks == 6
    assert torch.equal(single.prefix_acceptance_sum, single.acceptance_sum)
    of_list = run(list(draft))
    assert of_list.num_blocks == 3
    expected = (1 + single.token_acceptance.cumprod(0).sum(0)).mean()
    torch.testing.assert_close(of_list.acceptance_length, expected)
    masked = run(list(draft), mask=torch.tensor([[1, 0, 0], [1, 0, 1]]))
    assert masked.num_blocks == 2
    assert run(list(draft), pairs=fused_lk.Pairs()).num_blocks == 6  # one position
    step = torch.arange(2).view(2, 1).expand(2, 3)
    unsaid = run(draft, pairs=fused_lk.Pairs(positions=step, num_positions=2))
    assert unsaid.num_blocks == 0
    assert unsaid.prefix_acceptance_sum.isnan().all()
    assert unsaid.acceptance_length.isnan() and unsaid.greedy_acceptance_length.isnan()
    said = run(draft, pairs=fused_lk.Pairs(torch.ones(2, 3), position_dim=0))
    for name in ("prefix_acceptance_sum", "prefix_accuracy_sum", "num_blocks", "acceptance_sum", "num_tokens"):
        assert torch.equal(getattr(said, name), getattr(of_list, name)), name


MASK = torch.ones(2, 3)
REFUSED = {
    "both": ({"mask": MASK, "position_dim": 0, "positions": MASK.long(), "num_positions": 2}, "position_dim, or pos"),
    "number": ({"mask": MASK, "position_dim": 0, "num_positions": 2}, "position_dim, or positions"),
    "no shape": ({"position_dim": 0}, "a mask or target_rows with position_dim"),
    "after": ({"mask": MASK, "position_dim": 2}, r"position_dim in \[-2, 2\)"),
    "before": ({"mask": MASK, "position_dim": -3}, "position_dim to be an int >= -2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_dimensions(name):
    arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        fused_lk.Pairs(**arguments)


@pytest.mark.parametrize("skip_masked", [True, False])
@pytest.mark.parametrize("pattern", CHAINS)
def test_the_weights_are_known_before_any_forward(pattern, skip_masked):
    call, pairs, _, _ = make_call(pattern, skip_masked=skip_masked)
    assert pairs.weight_sum.dtype == torch.float32
    torch.testing.assert_close(pairs.weight_sum, call().weight_sum.float())


def test_weights_of_other_pairs():
    assert fused_lk.Pairs(torch.ones(3, dtype=torch.float64) / 4).weight_sum.tolist() == [0.75]
    assert fused_lk.Pairs(torch.ones(601, dtype=torch.bfloat16)).weight_sum.tolist() == [601]  # 600 in bfloat16
    assert fused_lk.Pairs(positions=torch.tensor([0, 2, 2]), num_positions=3).weight_sum.tolist() == [1, 0, 2]
    assert fused_lk.Pairs(torch.zeros(3)).weight_sum.tolist() == [0]
    with pytest.raises(ValueError, match="pairs that were made for a shape"):
        fused_lk.Pairs().weight_sum  # noqa: B018


def gradient(loss, draft):
    return torch.autograd.grad(loss, draft)[0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("objective", ["kl", "tv", "alpha", "lambda"])
def test_micro_batches_add_up(objective, impl):
    """Losses, gradients and metrics of pieces are those of the whole, with the whole's weights and lambda."""
    generator = torch.Generator().manual_seed(0)
    logits, noise = (torch.randn(3, 10, 9, dtype=torch.float64, generator=generator) for _ in range(2))
    mask = torch.rand(3, 10, generator=generator) * (torch.rand(3, 10, generator=generator) > 0.5)
    mask[0] = 0  # a position without tokens: DFlash's anchor
    mask[:, 6:] = 0  # a piece without tokens
    draft = (logits + noise).requires_grad_()

    def run(columns, **how):
        pairs = fused_lk.Pairs(mask[:, columns], position_dim=0)
        target = fused_lk.Target.from_logits(logits[:, columns].flatten(0, 1))
        how = {"objective": objective, "impl": impl, "position_decay": 0.8, **how}
        return fused_lk.lk_loss_from_logits(draft[:, columns], target, pairs=pairs, **how), pairs

    whole, _ = run(slice(None))
    pieces = [slice(0, 5), slice(5, 6), slice(6, 10)]
    denominator = sum(fused_lk.Pairs(mask[:, columns], position_dim=0).weight_sum for columns in pieces)
    assert denominator[0] == 0
    lam = {}
    if objective == "lambda":
        with torch.no_grad():
            first = fused_lk.LKSums.merged(run(columns)[0] for columns in pieces)
        lam = {"kl_weight": torch.exp(-3 * first.acceptance_rate)}
    parts = [run(columns, denominator=denominator, **lam)[0] for columns in pieces]
    loss = sum(part.loss for part in parts)
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(gradient(loss, draft), gradient(whole.loss, draft))
    merged = fused_lk.LKSums.merged(parts)
    assert merged.metrics() == pytest.approx(whole.metrics(), rel=1e-6)
    assert merged.metrics()["loss"] == pytest.approx(whole.loss.item(), rel=1e-6)
    assert fused_lk.LKSums.merged([merged]).metrics() == merged.metrics()


def test_what_does_not_merge():
    steps, blocks = (make_call(pattern)[0]() for pattern in ("steps", "blocks"))
    one = fused_lk.lk_loss_from_logits(torch.randn(2, 5), fused_lk.Target.from_logits(torch.randn(2, 5)))
    fused_lk.LKSums.merged([steps, blocks])
    other_decay = make_call("steps")[0](position_decay=0.5)
    for parts, got in (([], "none"), ([steps, one], "1 with"), ([steps, other_decay], "position_decay=0.5")):
        with pytest.raises(ValueError, match=f"same number of positions.*{got}"):
            fused_lk.LKSums.merged(parts)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "position"])
@pytest.mark.parametrize("objective", ["alpha", "lambda"])
def test_a_denominator_of_0_is_for_positions_without_tokens(objective, reduction, impl):
    logits = torch.randn(2, 4, 9)
    target = fused_lk.Target.from_logits(logits.flatten(0, 1))
    draft = [torch.randn(4, 9, requires_grad=True) for _ in range(2)]
    mask = torch.tensor([[False], [True]]).expand(2, 4)

    def run(denominator):
        how = {"objective": objective, "reduction": reduction, "impl": impl}
        return fused_lk.lk_loss_from_logits(draft, target, mask=mask, denominator=denominator, **how).loss

    assert run(torch.tensor([0, 4])).isfinite().all()
    assert torch.equal(run(torch.tensor([0, 4])), run(None))
    assert run(torch.tensor([4, 0])).isnan().any()
