"""Heads whose weight stays quantised: p is that of the dequantised weight, which is never made whole."""

from __future__ import annotations

import copy
import pickle

import peers
import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations
from problems import make_vocab

import fused_lk
from fused_lk import QuantizedWeight, Target, TargetHead, gemm, reference, wide
from fused_lk.targets.hidden import stream_hidden
from fused_lk.targets.quantized import parts

V, DRAFT, H, N, GROUP = 77, 53, 32, 9, 8
WALKS = {
    "one pass": {"objective": "alpha", "plan": "one_pass"},
    "by rows": {"plan": "recompute"},  # more rows than the vocabulary has, by `many`
    "by vocabulary": {"objective": "alpha", "plan": "recompute"},
}


def nibbles(values, offset):
    """Two of `values` a byte, the low half first."""
    values = (values.long() + offset) & 15
    return values[:, ::2] | (values[:, 1::2] << 4)


def words(x, per_word):
    """`per_word` small numbers an int32, the lowest bits first, rows padded with zeros."""
    x = F.pad(x, (0, -x.shape[1] % per_word)).view(x.shape[0], -1, per_word).long()
    word = (x << torch.arange(0, 32, 32 // per_word)).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def per_group(x, groups):
    return x.repeat_interleave(H // groups, 1)


class Case:
    """One format: the quantised weight, and by its definition the same in float64."""

    def __init__(self, kind, dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)
        groups = H // GROUP if kind in ("int8 groups", "int4", "int4 words", "int4 of torchao") else 1
        int4 = kind.startswith("int4")
        ints = torch.randint(-8 if int4 else -128, 8 if int4 else 128, (V, H), generator=g)
        scale = torch.rand(V, groups, generator=g) / (10 if int4 else 150) + 0.01
        zero = torch.randint(-3, 4, (V, groups), generator=g)
        scale, shift = scale.to(dtype), torch.randn(V, groups, generator=g).to(dtype) / 9
        of_fp8 = torch.float8_e5m2 if "e5m2" in kind else torch.float8_e4m3fn
        float8 = (3 * torch.randn(V, H, generator=g)).to(of_fp8)
        whole = float8.double() if "fp8" in kind else ints.double()
        if kind in ("int8 zero point", "int8 groups", "int4 words"):
            whole = whole - per_group(zero, groups)
        if kind == "fp8 tensor":
            self.quantized, scale = QuantizedWeight(float8, scale[0]), scale[0].expand(V, 1)
        elif kind == "fp8 blocks":
            blocks = torch.rand(-(-V // 16), -(-H // 12), generator=g).to(dtype) / 9 + 0.01
            self.quantized = QuantizedWeight(float8, blocks, block=(16, 12))
            scale = blocks.repeat_interleave(16, 0)[:V].repeat_interleave(12, 1)[:, :H]
        elif kind == "fp8 powers":
            exponents = torch.randint(120, 127, (V, 4), generator=g, dtype=torch.uint8)
            self.quantized = QuantizedWeight(float8, exponents).to(dtype)
            scale = 2.0 ** (exponents.double() - 127)
        else:
            self.quantized = {
                "fp8 rows": lambda: QuantizedWeight(float8, scale[:, 0]),
                "fp8 e5m2 rows": lambda: QuantizedWeight(float8, scale),
                "int8 rows": lambda: QuantizedWeight(ints.to(torch.int8), scale),
                "int8 zero point": lambda: QuantizedWeight(ints.to(torch.int8), scale, zero),
                "int8 groups": lambda: QuantizedWeight(ints.to(torch.int8), scale, zero.to(torch.int8)),
                "int4": lambda: QuantizedWeight(nibbles(ints, 8).to(torch.uint8), scale),
                "int4 words": lambda: QuantizedWeight(words(ints + 8, 8), scale, zero.to(torch.int8)),
                "int8 words": lambda: QuantizedWeight(words(ints + 128, 4), scale, hidden_size=H),
                "int4 of torchao": lambda: QuantizedWeight(
                    nibbles(ints, 0).to(torch.uint8).view(torch.int8), scale, offset=shift, hidden_size=H
                ),
            }[kind]()
        scale = scale.double() if scale.shape[1] == H else per_group(scale.double(), scale.shape[1])
        self.weight = whole * scale + (per_group(shift, groups) if kind == "int4 of torchao" else 0)


KINDS = (
    "fp8 tensor", "fp8 rows", "fp8 e5m2 rows", "fp8 blocks", "fp8 powers", "int8 rows", "int8 zero point",
    "int8 groups", "int8 words", "int4", "int4 words", "int4 of torchao",
)  # fmt: skip


@pytest.fixture
def small_blocks(monkeypatch):
    """Five rows of a head at a time: every product has several blocks, the last of them ragged."""
    monkeypatch.setattr(gemm, "_BLOCK_ELEMENTS", 5 * H)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_rounded_once(kind, dtype):
    case = Case(kind, torch.float64 if dtype == torch.float64 else torch.float32)
    got = case.quantized.to(dtype).dequantized()
    assert got.dtype == dtype
    assert case.quantized.shape == tuple(got.shape) == (V, H)
    # Two roundings of float32 where there is an offset, and that of `dtype`.
    bound = (2 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps + torch.finfo(dtype).eps) / 2
    assert ((got.double() - case.weight).abs() <= bound * (case.weight.abs() + 2)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_stay_quantised(kind):
    quantized = Case(kind).quantized
    whole, ids = quantized.dequantized(), torch.tensor([76, 3, 3, 40])
    for rows in (ids, slice(5, 44), slice(70, 99), slice(0, 0)):
        assert torch.equal(quantized[rows].dequantized(), whole[rows])
    size = sum(x.numel() * x.element_size() for x in quantized[ids].parts)
    assert size < 4 * H * len(ids), "fewer bytes than float32 has"


def setup(kind, dtype, shared, many=1):
    g = torch.Generator().manual_seed(1)
    case = Case(kind, dtype)
    vocab = None if shared else make_vocab(V, DRAFT, g)
    size = V if shared else DRAFT
    hidden, weight, states, bias = (
        torch.randn(*shape, generator=g).to(dtype) for shape in ((many * N, 6), (size, 6), (many * N, H), (V,))
    )
    mask = torch.rand(many * N, generator=g) > 0.2
    return case, vocab, hidden, weight, states, bias, mask


def outcome(head, hidden, weight, states, mask, impl, of_target, walk):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    target = Target.from_hidden(states, head, mask, impl=impl, workspace_mb=0.01, **of_target)
    out = fused_lk.lk_loss(hidden, weight, target, mask=mask, impl=impl, workspace_mb=0.01, **walk)
    return target, out, torch.autograd.grad(out.loss, (hidden, weight))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("of_target", ["truncated", "shared", "cached"])
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize(
    "impl, kind",
    [*(("torch", x) for x in ("fp8 blocks", "int8 zero point", "int4 of torchao")), ("triton", "int4 words")],
)
def test_the_loss_is_that_of_the_dequantised_weight(impl, kind, walk, of_target):
    many = 12 if walk == "by rows" else 1
    case, vocab, hidden, weight, states, bias, mask = setup(kind, torch.float64, of_target == "shared", many)
    how = {"softcap": 20.0, "logit_scale": 0.7}
    given = {"cache": of_target == "cached"}
    dense = TargetHead(case.quantized.to(torch.float64).dequantized(), vocab, bias, **how)
    quantized = TargetHead(case.quantized, vocab, bias, **how)
    calls = [(head, hidden, weight, states, mask, impl, given, WALKS[walk]) for head in (quantized, dense)]
    (target, out, gradients), (expected_target, expected, expected_gradients) = (outcome(*call) for call in calls)
    near = {"rtol": 1e-10, "atol": 1e-11, "equal_nan": True}  # NaN: the normaliser of a masked row
    torch.testing.assert_close(out.loss, expected.loss, **near)
    torch.testing.assert_close(gradients, expected_gradients, **near)
    for name in ("acceptance_rate", "accuracy", "kl"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), **near)
    torch.testing.assert_close(target.dense_log_probs(), expected_target.dense_log_probs(), **near)
    if of_target != "shared":
        torch.testing.assert_close(target.log_normalizer, expected_target.log_normalizer, **near)
        assert torch.equal(target.token_ids, expected_target.token_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_reference(kind):
    """The oracle knows nothing of the quantised weight."""
    case, vocab, hidden, weight, states, _, _ = setup(kind, torch.float64, shared=False)
    log_p = reference.target_log_probs(states @ case.weight.T, vocab.t2d)
    expected = reference.lk_loss(hidden @ weight.T, log_p, objective="alpha")
    out = fused_lk.lk_loss(
        hidden, weight, Target.from_hidden(states, case.quantized, vocab=vocab), objective="alpha", impl="torch"
    )
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=1e-7)  # the scales of some are float32


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exact", [False, True])
def test_the_weight_has_the_dtype_of_the_hidden_states(dtype, exact):
    """Scales in float32, hidden states in any dtype: as with the weight dequantised into it, to the last rounding."""
    case, vocab, hidden, weight, states, bias, mask = setup("int4 words", torch.float32, shared=False)
    hidden, weight, states = hidden.to(dtype), weight.to(dtype), states.to(dtype)
    given = {"logits_dtype": torch.float32} if exact else {}
    dense = TargetHead(case.quantized.to(dtype).dequantized(), vocab, bias.to(dtype))
    quantized = TargetHead(case.quantized, vocab, bias)
    calls = [(head, hidden, weight, states, mask, "torch", given, {}) for head in (quantized, dense)]
    (_, out, gradients), (_, expected, expected_gradients) = (outcome(*call) for call in calls)
    eps = torch.finfo(torch.float32 if exact else dtype).eps
    torch.testing.assert_close(out.loss, expected.loss, rtol=8 * eps, atol=8 * eps)
    torch.testing.assert_close(gradients, expected_gradients, rtol=64 * max(eps, torch.finfo(dtype).eps), atol=8 * eps)


def test_autocast():
    case, vocab, hidden, weight, states, bias, mask = setup("fp8 rows", torch.float32, shared=False)
    dense, quantized = (TargetHead(x, vocab, bias) for x in (case.quantized.dequantized(), case.quantized))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [outcome(x, hidden, weight, states, mask, "torch", {}, {})[1].loss for x in (quantized, dense)]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-3)
    assert quantized.in_compute_dtype(states).weight.dtype == torch.float32, "nothing is left of autocast"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("objective", ["lambda", "alpha"])
def test_compiled(objective, masked):
    torch._dynamo.reset()
    case, vocab, hidden, weight, states, bias, mask = setup("int4 words", torch.float32, shared=False)
    hidden, weight, head = hidden.requires_grad_(), weight.requires_grad_(), TargetHead(case.quantized, vocab, bias)

    def step(hidden, weight, states, mask):
        target = Target.from_hidden(states, head, mask, impl="torch")
        return fused_lk.lk_loss(hidden, weight, target, mask=mask, objective=objective, impl="torch").loss

    given = (hidden, weight, states, mask if masked else None)
    expected, got = step(*given), torch.compile(step, fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(got, expected)
    leaves = (hidden, weight)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves))
    torch._dynamo.reset()


def test_opcheck_of_the_pass():
    case, vocab, _, _, states, bias, _ = setup("int4 words", torch.float32, shared=False)
    given = (states, list(parts(case.quantized)), bias, None, vocab.t2d, vocab.target_ids)
    torch.library.opcheck(stream_hidden.operator, (*given, 1.0, None, "torch", None, False, True))


def test_targets_travel():
    case, vocab, hidden, weight, states, bias, _ = setup("int4 words", torch.float32, shared=False)
    target = Target.from_hidden(states, TargetHead(case.quantized, vocab, bias))
    losses = [fused_lk.lk_loss(hidden, weight, x).loss for x in (target, pickle.loads(pickle.dumps(target)))]
    losses.append(fused_lk.lk_loss(hidden, weight, copy.deepcopy(target)).loss)
    assert losses[0] == losses[1] == losses[2]


def test_made_in_inference_mode():
    case, vocab, hidden, weight, states, _, _ = setup("fp8 rows", torch.float32, shared=False)
    weight.requires_grad_()
    with torch.inference_mode():
        kept = QuantizedWeight(case.quantized.parts[0].clone(), case.quantized.parts[1].clone())
        target = Target.from_hidden(states.clone(), kept, vocab=vocab)
    loss = fused_lk.lk_loss(hidden, weight, target).loss
    expected = fused_lk.lk_loss(hidden, weight, Target.from_hidden(states, case.quantized, vocab=vocab)).loss
    torch.testing.assert_close(torch.autograd.grad(loss, weight), torch.autograd.grad(expected, weight))


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kind", ["fp8 blocks", "int8 groups", "int4 words", "int4 of torchao"])
def test_no_whole_weight_is_made(kind, cache, walk, monkeypatch):
    rows = 5
    monkeypatch.setattr(gemm, "_BLOCK_ELEMENTS", rows * H)
    monkeypatch.setattr("fused_lk.rows.plain.BLOCK_ELEMENTS", V)
    case, vocab, hidden, weight, states, bias, mask = setup(kind, torch.float32, shared=False)
    head = TargetHead(case.quantized, vocab, bias)
    with Allocations() as seen:
        target = Target.from_hidden(states, head, mask, cache=cache, impl="torch", workspace_mb=0.01)
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        fused_lk.lk_loss(hidden, weight, target, impl="torch", mask=mask, **WALKS[walk]).loss.backward()
    of_weight = [made for made in seen.storages if made[1][-1:] == (H,) or made[1][-2:] == (H // 2, 2)]
    assert any(elements == rows * H for elements, *_ in of_weight), "the watcher saw no block"
    most = max(N * H, rows * H)
    assert all(elements <= most for elements, *_ in of_weight)
    with Allocations() as seen:
        case.quantized.dequantized()
    assert seen.at_least(V * H), "the watcher would see it"


@pytest.mark.parametrize("plan", ["one_pass", "recompute"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "device, dtype, wide_products",
    [*(("cuda", torch.bfloat16, x) for x in (("mm", "addmm"), ("mm",), ())), ("cpu", torch.float32, ())],
)
def test_explain_counts_the_blocks(device, dtype, wide_products, frozen, plan, monkeypatch):
    """Whichever products have float32 results there."""
    from bench.accounting import account, full_size

    monkeypatch.setattr(wide, "by_release", lambda product: product in wide_products)

    tokens, h, size, full = 3072, 2048, 8192, 12000
    how = {"plan": plan, "objective": "alpha", "impl": "triton"}
    of_call = {"dtype": dtype, "device": device, "frozen_head": frozen, **how}
    told = fused_lk.explain(tokens, h, size, full, quantized_head=True, **of_call)
    vocab = fused_lk.DraftVocab(torch.arange(full) < size)
    with full_size(device):
        hidden = torch.empty(tokens, h, dtype=dtype).requires_grad_()
        weight = torch.empty(size, h, dtype=dtype).requires_grad_(not frozen)
        states = torch.empty(tokens, h, dtype=dtype)
        head = TargetHead(QuantizedWeight(torch.empty(full, h, dtype=torch.int8), torch.empty(full, h // 128)), vocab)

        def run():
            return fused_lk.lk_loss(hidden, weight, Target.from_hidden(states, head, impl="triton"), **how).loss

        seen = account(run)
    assert told.gemm_flops == seen.gemm_flops
    assert abs(told.peak_bytes - seen.peak) <= 0.03 * seen.peak + 2**20, (told.at_peak, seen.at_peak[:8])


CHECKPOINTS = {
    "fp8": lambda q: {"weight": q.to(torch.float8_e4m3fn), "weight_scale": torch.full((V, 1), 0.5)},
    "fp8, inverse": lambda q: {"weight": q.to(torch.float8_e4m3fn), "weight_scale_inv": torch.full((1, 1), 0.5)},
    "int8": lambda q: {"weight": q.to(torch.int8), "weight_scale": torch.tensor([0.5])},
    "int4": lambda q: {
        "weight_packed": words(q + 8, 8), "weight_scale": torch.full((V, 4), 0.5), "weight_shape": torch.tensor([V, H]),
    },
    "int4, zero point": lambda q: {
        "weight_packed": words(q + 8 - 1, 8), "weight_scale": torch.full((V, 4), 0.5),
        "weight_shape": torch.tensor([V, H]),
        "weight_zero_point": words(torch.full((4, V), 8 - 1), 8).t(),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("as_module", [False, True])
def test_checkpoints(kind, as_module):
    """The names and the layouts of compressed-tensors."""
    values = torch.randint(-7, 8, (V, H))
    named = {**CHECKPOINTS[kind](values), "bias": torch.zeros(V)}
    if as_module:
        source, prefix = torch.nn.Module(), ""
        for name, x in named.items():
            source.register_buffer(name, x)
    else:
        source, prefix = (
            {f"lm_head.{name}": x for name, x in named.items()} | {"other.weight": torch.zeros(1)},
            "lm_head.",
        )
    assert torch.equal(QuantizedWeight.of(source, prefix).dequantized(), values * 0.5)


class Float8Tensor(torch.Tensor):
    """A stand-in for torchao's, of the same name and attributes."""

    @staticmethod
    def __new__(cls, qdata, scale, **others):
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=torch.bfloat16, device=qdata.device)

    def __init__(self, qdata, scale, **others):
        self.qdata, self.scale, self.block_size = qdata, scale, [1, qdata.shape[1]]
        self.__dict__.update(others)

    def __tensor_flatten__(self):
        return ["qdata", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return Float8Tensor(**inner)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.detach.default, f"{func} would have to dequantise"
        return args[0]


class NVFP4Tensor(Float8Tensor):
    pass


def test_a_tensor_of_torchao():
    case = Case("fp8 rows")
    weight = Float8Tensor(case.quantized.parts[0], case.quantized.parts[1])
    head = TargetHead(weight)
    assert head.weight.dtype == torch.bfloat16
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    for got in (head.weight, QuantizedWeight.of(weight), QuantizedWeight.of(module)):
        assert torch.equal(got.dequantized(), case.quantized.to(torch.bfloat16).dequantized())
    target = Target.from_hidden(torch.randn(N, H), weight)
    assert target.dense_log_probs().shape == (N, V)


# By name: the format of compressed-tensors, its arguments, and the shape of the scale of a weight [256, 320].
PUBLISHED = {
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, (1,)),
    "fp8 rows": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, (256, 1)),
    "fp8 blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        (2, 3),
    ),
    "fp8 powers": (
        "mxfp8-quantized",
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        (256, 10),
    ),
    "int8 rows": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, (256, 1)),
    "int8 zero point": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, (256, 1)),
    "int4 words": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 64}, (256, 5)),
    "int4 zero point": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False},
        (256, 5),
    ),
    "int8 words": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, (256, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PUBLISHED)
def test_what_compressed_tensors_keeps(name, dtype):
    """Their own compressor, and their decompressed weight, to the last bit; of a module and of a state dict."""
    packer, arguments, of_scale = PUBLISHED[name]
    compressors = peers.compressed_tensors()
    weights = compressors.quantization.QuantizationArgs(**arguments)
    scheme = compressors.quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = compressors.compressors.BaseCompressor.get_value_from_registry(packer)
    g = torch.Generator().manual_seed(0)
    scale = (torch.rand(of_scale, generator=g) + 0.5) / (100 if "fp8" in name else 30)
    if packer.startswith("mx"):
        scale = torch.exp2(scale.log2().round())
    state = {"weight": torch.randn(256, 320, generator=g).to(dtype), "weight_scale": scale.to(dtype)}
    if not weights.symmetric:
        state["weight_zero_point"] = torch.randint(-3, 4, of_scale, generator=g).to(torch.int8)
    state = compressor.compress(state, scheme)
    want = compressor.decompress(state, scheme)["weight"]
    module = torch.nn.Module()
    module.quantization_scheme = scheme
    for key, value in state.items():
        module.register_buffer(key, value)
    for got in (
        QuantizedWeight.of(module),
        QuantizedWeight.of({f"lm_head.{k}": v for k, v in state.items()}, "lm_head."),
    ):
        assert torch.equal(got.to(want.dtype).dequantized(), want)


@pytest.mark.parametrize("kind", ["Float8WeightOnlyConfig", "Int8WeightOnlyConfig", "IntxWeightOnlyConfig"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_torchao_keeps(kind, dtype):
    ao = peers.torchao()
    module = torch.nn.Linear(256, 128, bias=False, dtype=dtype)
    ao.quantize_(module, getattr(ao, kind)())
    assert type(module.weight).__name__ in ("Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor")
    assert torch.equal(TargetHead(module.weight).weight.dequantized(), module.weight.dequantize())


def raw(dtype=torch.int8, rows=4, width=8):
    return torch.zeros(rows, width).to(dtype)


def of(**named):
    return lambda: QuantizedWeight.of(named)


REFUSED = [
    (lambda: TargetHead(raw()), TypeError, r"with its scales; got a int8 .*QuantizedWeight\(values, scale\)"),
    (lambda: TargetHead(raw(torch.float8_e4m3fn)), TypeError, "with its scales; got a float8_e4m3fn"),
    (lambda: Target.from_hidden(torch.zeros(2, 8), raw(torch.uint8)), TypeError, "with its scales; got a uint8"),
    (lambda: TargetHead(NVFP4Tensor(raw(), raw())), TypeError, r"got a NVFP4Tensor .*weight\.dequantize\(\)"),
    (lambda: TargetHead(Float8Tensor(raw(), raw(), act_pre_scale=raw())), TypeError, "with an act_pre_scale"),
    (lambda: QuantizedWeight(torch.zeros(4, 8), torch.ones(4)), TypeError, "values of dtype float8_e4m3fn"),
    (lambda: QuantizedWeight(raw(), torch.ones(4).long()), TypeError, "scale of dtype float16"),
    (lambda: QuantizedWeight(raw(), torch.ones(3)), ValueError, r"blocks of a weight of shape \(4, 8\)"),
    (lambda: QuantizedWeight(raw(), torch.ones(4, 3)), ValueError, r"block=\(rows, columns\)"),
    (lambda: QuantizedWeight(raw(), torch.ones(2, 4), block=(2, 3)), ValueError, r"in blocks of \(2, 3\)"),
    (lambda: QuantizedWeight(raw(), torch.ones(4, 1, 1)), ValueError, "scales for the tensor"),
    (lambda: QuantizedWeight(raw(), torch.ones(4), torch.ones(3)), ValueError, "zero_point of shape"),
    (lambda: QuantizedWeight(raw(), torch.ones(4), hidden_size=9), ValueError, "a row of 9 values"),
    (lambda: QuantizedWeight(raw(torch.float8_e5m2), torch.ones(4), hidden_size=16), ValueError, "a row of 16 values"),
    (lambda: QuantizedWeight(raw(torch.int32), torch.ones(4), hidden_size=40), ValueError, "a row of 40 values"),
    (lambda: QuantizedWeight(raw(rows=0), torch.ones(1)), ValueError, "vocabulary of at least 1"),
    (lambda: QuantizedWeight(raw(), torch.ones(4, device="meta")), ValueError, "scale to have contents"),
    (lambda: QuantizedWeight.of(7), TypeError, "a module, a state dict or a tensor of torchao"),
    (lambda: QuantizedWeight.of(raw()), TypeError, "one of torchao's"),
    (lambda: QuantizedWeight.of(torch.nn.Linear(3, 4)), ValueError, r"got bias \(a float32 .*, weight \(a float32"),
    (of(weight=raw()), ValueError, "weight_scale"),
    (of(qweight=raw(torch.int32), qzeros=raw(torch.int32), scales=raw(torch.half)), ValueError, "got qweight"),
    (of(weight_packed=raw(torch.uint8), weight_scale=torch.ones(4, 1)), ValueError, "got weight_packed"),
    (of(weight=raw(), weight_scale=torch.ones(4), weight_g_idx=torch.ones(8)), ValueError, "weight_g_idx"),
    (
        of(weight_packed=raw(torch.int32), weight_scale=torch.ones(4, 1), weight_shape=torch.tensor([4, 100])),
        ValueError,
        "a row of 100 values",
    ),
    (
        lambda: Target.from_hidden(torch.zeros(2, 9), QuantizedWeight(raw(), torch.ones(4))),
        ValueError,
        "hidden with last dimension 8",
    ),
    (
        lambda: TargetHead(QuantizedWeight(raw(), torch.ones(4)), bias=torch.ones(5)),
        ValueError,
        r"bias of shape \(4,\)",
    ),
]


@pytest.mark.parametrize("call, error, message", REFUSED, ids=[x[2] for x in REFUSED])
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
