"""Values and gradients against the eager code that SpecForge and vLLM speculators publish, on random inputs."""

from __future__ import annotations

import peers
import pytest
import torch
import torch.nn.functional as F
from problems import make_vocab

import fused_lk

B, S, H, V_DRAFT, V_TARGET = 2, 7, 6, 53, 83
DEVICE = peers.device()
IMPLS = ["torch", "triton"]
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


class Inputs:
    """A draft head's inputs, a target, and SpecForge's four views of it, in float32."""

    def __init__(self, seed: int = 0, scale: float = 1.5) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(DEVICE)

        self.vocab = make_vocab(V_TARGET, V_DRAFT, generator).to(DEVICE)
        self.hidden, self.weight = randn(B, S, H), randn(V_DRAFT, H)
        self.target_hidden, self.target_weight = randn(B, S, H), randn(V_TARGET, H)
        self.target_logits = self.target_hidden @ self.target_weight.T
        on_draft = self.target_logits[..., self.vocab.target_ids]
        self.on_draft = on_draft
        self.target_p = on_draft.softmax(-1)
        self.target_p_on_draft = (on_draft - self.target_logits.logsumexp(-1, keepdim=True)).exp()
        mask = (torch.rand(B, S, generator=generator) > 0.3).to(DEVICE)
        self.mask = mask
        self.weights = torch.rand(B, S, generator=generator).to(DEVICE) * mask

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()

    def target(self, kind: str, **options: object) -> fused_lk.Target:
        if kind == "hidden":
            head = fused_lk.TargetHead(self.target_weight, self.vocab)
            return fused_lk.Target.from_hidden(self.target_hidden, head, **options)
        if kind == "logits":
            return fused_lk.Target.from_logits(self.target_logits, self.vocab, **options)
        return fused_lk.Target.from_probs(self.target_p_on_draft, self.vocab, **options)


def with_gradients(loss_of, leaves):
    """The loss, and its gradients with respect to the leaves."""
    loss = loss_of(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def from_logits(loss_of_logits):
    """A loss of eager draft logits as one of hidden states and weight."""
    return lambda hidden, weight: loss_of_logits(F.linear(hidden, weight))


def assert_same(ours, theirs, **tolerance):
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, **(tolerance or CLOSE))


# SpecForge: alpha from p itself, weighted by the float mask; KL as cross-entropy over rows of the mask, by B * S.


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["hidden", "logits", "probs"])
def test_specforge_acceptance(kind, impl):
    inputs, peer = Inputs(), peers.specforge().lk_loss

    def theirs(index):
        return from_logits(
            lambda logits: peer.compute_acceptance_rate(
                logits=logits, target_probs=inputs.target_p_on_draft, position_mask=inputs.weights.unsqueeze(-1)
            )[index]
        )

    def ours(objective):
        return lambda hidden, weight: (
            fused_lk.lk_loss(
                hidden, weight, inputs.target(kind), objective=objective, mask=inputs.weights, impl=impl
            ).loss
        )

    def tv_of(acceptance):
        return lambda *leaves: 1 - acceptance(*leaves)

    assert_same(with_gradients(ours("tv"), inputs.leaves()), with_gradients(tv_of(theirs(0)), inputs.leaves()))
    log_acceptance = theirs(1)
    assert_same(
        with_gradients(ours("alpha"), inputs.leaves()),
        with_gradients(lambda *leaves: -log_acceptance(*leaves), inputs.leaves()),
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["hidden", "logits", "probs"])
def test_specforge_cross_entropy(kind, impl):
    """Cross-entropy is KL plus the target's entropy: a constant, so gradients are the same."""
    inputs, peer = Inputs(), peers.specforge().loss
    mask = inputs.mask.unsqueeze(-1)

    def ours(hidden, weight):
        return fused_lk.lk_loss(
            hidden, weight, inputs.target(kind), objective="kl", mask=inputs.mask, denominator=float(B * S), impl=impl
        ).loss

    entropy = -(inputs.target_p * inputs.target_p.log()).sum(-1)
    entropy = (entropy * inputs.mask).sum() / (B * S)
    loss, *gradients = with_gradients(ours, inputs.leaves())
    kernels = from_logits(lambda logits: peer.LogSoftmaxLoss.apply(logits, inputs.target_p, mask))
    with torch.compiler.set_stance("force_eager"):
        plain = from_logits(lambda logits: peer._compute_loss(logits, inputs.target_p, mask.float()))
        for theirs in (kernels, plain):
            assert_same([loss + entropy, *gradients], with_gradients(theirs, inputs.leaves()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lk_loss_type", [None, "alpha", "lambda"])
def test_specforge_step_loss(lk_loss_type, impl):
    """One TTT step of `OnlineEagle3Model`, as a composition of the primitive and as `lk_loss`."""
    inputs, peer = Inputs(), peers.specforge().model
    options = {"kl_scale": 0.7, "kl_decay": 2.5}
    entropy = -(inputs.target_p * inputs.target_p.log()).sum(-1)

    def theirs(logits):
        return peer._compute_loss_and_acceptance_rate(
            logits=logits,
            target_p=inputs.target_p,
            target_p_on_draft=inputs.target_p_on_draft,
            position_mask=inputs.weights.unsqueeze(-1),
            lk_loss_type=lk_loss_type,
            **options,
        )[1]

    def composed(hidden, weight):
        mask = inputs.weights
        d = fused_lk.lk_divergences(hidden, weight, inputs.target("hidden"), mask=mask, impl=impl)
        cross_entropy = (d.kl + entropy * (mask != 0)).sum() / (B * S)
        acceptance = (mask * d.acceptance).sum() / mask.sum()
        if lk_loss_type is None:
            return cross_entropy
        if lk_loss_type == "alpha":
            return -(mask * d.log_acceptance).sum() / mask.sum()
        lam = options["kl_scale"] * torch.exp(-options["kl_decay"] * acceptance.detach())
        return lam * cross_entropy + (1 - lam) * (1 - acceptance)

    expected = with_gradients(from_logits(theirs), inputs.leaves())
    assert_same(with_gradients(composed, inputs.leaves()), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_specforge_lambda_is_lambda_per_position(impl):
    """Where every row counts 1, SpecForge's normalisations are one, and `lk_loss` is theirs up to the entropy."""
    inputs, peer = Inputs(), peers.specforge().model
    entropy = -(inputs.target_p * inputs.target_p.log()).sum(-1).mean()

    def theirs(logits):
        return peer._compute_loss_and_acceptance_rate(
            logits=logits,
            target_p=inputs.target_p,
            target_p_on_draft=inputs.target_p_on_draft,
            position_mask=torch.ones_like(inputs.weights).unsqueeze(-1),
            lk_loss_type="lambda",
            kl_scale=0.7,
            kl_decay=2.5,
        )[1]

    def ours(hidden, weight):
        out = fused_lk.lk_loss(hidden, weight, inputs.target("hidden"), eta=2.5, kl_scale=0.7, impl=impl)
        return out.loss + out.kl_weight[0] * entropy

    assert_same(with_gradients(ours, inputs.leaves()), with_gradients(from_logits(theirs), inputs.leaves()))


# vLLM speculators: everything renormalised on the draft vocabulary, lambda per token.

SPECULATORS = {
    "kl": "kl_div_loss",
    "tv": "tv_loss",
    "alpha": "neg_log_acceptance_loss",
    "lambda": "lk_hybrid_loss",
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["hidden", "logits", "draft logits", "probs"])
@pytest.mark.parametrize("objective", SPECULATORS)
def test_speculators_per_token(objective, kind, impl):
    inputs = Inputs()
    peer = getattr(peers.speculators().eager, SPECULATORS[objective])

    def target():
        if kind == "draft logits":
            return fused_lk.Target.from_logits(inputs.on_draft, renormalize=True)
        return inputs.target(kind, renormalize=True)

    def ours(hidden, weight):
        return fused_lk.lk_loss(
            hidden, weight, target(), objective=objective, lambda_per="token", reduction="none", impl=impl
        ).loss

    def theirs(logits):
        return peer(logits, inputs.on_draft)

    per_token = F.linear(inputs.hidden, inputs.weight)
    torch.testing.assert_close(ours(inputs.hidden, inputs.weight), theirs(per_token), **CLOSE)
    upstream = torch.linspace(0.5, 2, B * S, device=DEVICE).view(B, S)
    assert_same(
        with_gradients(lambda *leaves: (upstream * ours(*leaves)).sum(), inputs.leaves()),
        with_gradients(from_logits(lambda logits: (upstream * theirs(logits)).sum()), inputs.leaves()),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("objective", SPECULATORS)
def test_speculators_logits_in_hand(objective, impl):
    inputs = Inputs()
    peer = getattr(peers.speculators().eager, SPECULATORS[objective])
    logits = F.linear(inputs.hidden, inputs.weight)

    def ours(z):
        target = fused_lk.Target.from_logits(inputs.on_draft, renormalize=True)
        options = {"objective": objective, "lambda_per": "token", "reduction": "sum", "impl": impl}
        return fused_lk.lk_loss_from_logits(z, target, **options).loss

    assert_same(
        with_gradients(ours, [logits.clone().requires_grad_()]),
        with_gradients(lambda z: peer(z, inputs.on_draft).sum(), [logits.clone().requires_grad_()]),
    )


@pytest.mark.parametrize("objective", SPECULATORS)
def test_speculators_reduction(objective):
    """Their masked mean with TTT decay: the sum over the mask, divided by its count plus 1e-5."""
    inputs, peer = Inputs(), peers.speculators()
    mask, step, gamma = inputs.mask[:1], 2, 0.8
    positions = torch.full((1, S), step, device=DEVICE)

    def theirs(logits):
        return peer.utils.loss_function(
            logits[:1],
            inputs.on_draft[:1],
            mask,
            positions,
            loss_fn=getattr(peer.eager, SPECULATORS[objective]),
            decay_fn=lambda pos_idx, **_: peer.utils.exp_loss_decay(pos_idx, gamma),
        )

    def ours(hidden, weight):
        target = fused_lk.Target.from_logits(inputs.target_logits[:1], inputs.vocab, renormalize=True)
        return fused_lk.lk_loss(
            hidden[:1],
            weight,
            target,
            objective=objective,
            lambda_per="token",
            pairs=fused_lk.Pairs(mask, positions=positions, num_positions=step + 1),
            position_decay=gamma,
            denominator=float(mask.sum()) + 1e-5,
        ).loss

    assert_same(with_gradients(ours, inputs.leaves()), with_gradients(from_logits(theirs), inputs.leaves()))


# Where the published code gives up.


def test_disjoint_distributions():
    """Theirs: a zero gradient below the clamp, or NaN; ours: that of log space, as float64 autograd has it."""
    draft = torch.zeros(1, 1, V_DRAFT, device=DEVICE)
    draft[..., 0] = 200.0
    target = torch.zeros(1, 1, V_DRAFT, device=DEVICE)
    target[..., 1] = 200.0
    theirs = draft.clone().requires_grad_()
    peers.speculators().eager.neg_log_acceptance_loss(theirs, target).sum().backward()
    assert not theirs.grad.any()

    theirs = draft.clone().requires_grad_()
    peer = peers.specforge().lk_loss
    mask = torch.ones(1, 1, 1, device=DEVICE)
    peer.compute_acceptance_rate(logits=theirs, target_probs=target.softmax(-1), position_mask=mask)[1].backward()
    assert theirs.grad.isnan().any()

    truth = draft.double().requires_grad_()
    exact = fused_lk.Target.from_logits(target.double())
    fused_lk.lk_loss_from_logits(truth, exact, objective="alpha", impl="reference").loss.backward()
    ours = draft.clone().requires_grad_()
    fused_lk.lk_loss_from_logits(ours, fused_lk.Target.from_logits(target), objective="alpha").loss.backward()
    assert truth.grad.abs().max() > 0.4
    torch.testing.assert_close(ours.grad, truth.grad.float(), rtol=1e-6, atol=1e-7)
