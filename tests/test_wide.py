"""Products of half precision with float32 results: a device's answer decides, and a refusal costs time, not digits."""

from __future__ import annotations

import pytest
import torch
from allocations import Allocations
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion

from fused_lk import gemm, wide

HALF = [torch.float16, torch.bfloat16]


def mm(a, b, dtype, *, out):
    return out.copy_(a.to(dtype) @ b.to(dtype))


def addmm(total, a, b, dtype, *, out):
    return out.copy_(total + a.to(dtype) @ b.to(dtype))


def refuses(total, a, b, dtype, *, out):
    raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")


def absent(*_, **__):
    raise NotImplementedError("Could not run 'aten::addmm.dtype_out' with arguments from the 'CPU' backend.")


def forgets_the_total(total, a, b, dtype, *, out):
    return mm(a, b, dtype, out=out)


def adds_twice(total, a, b, dtype, *, out):
    out.copy_(total)
    return out.add_(total + a.to(dtype) @ b.to(dtype))


def rounds(total, a, b, dtype, *, out):
    return out.copy_(total + (a @ b).to(dtype))


def crosswise(total, a, b, dtype, *, out):
    return out.copy_(total + (a.to(dtype) @ b.to(dtype)).t().flip(0))


# What the releases have, on CUDA: by the text of their libraries, as nothing of it runs on a CPU.
RELEASES = {
    "2.6.0": (None, None),
    "2.7.1": (None, None),
    "2.8.0": (mm, refuses),
    "2.9.1": (mm, refuses),
    "2.10.0": (mm, addmm),
    "2.13.0": (mm, addmm),
    "2.15.0": (mm, addmm),
}
FAKE_TENSORS_ADD = ("2.13.0", "2.15.0")


@pytest.fixture
def device(monkeypatch):
    """`device(mm, addmm)` gives the CPU these two overloads."""
    monkeypatch.setattr(wide, "_ANSWERS", {})

    def make(**overloads):
        wide._ANSWERS.clear()
        calls, made = [], {}
        for name, overload in overloads.items():

            def called(*arguments, _of=overload, _name=name, **out):
                calls.append(_name)
                return _of(*arguments, **out)

            made[name] = overload and called
        monkeypatch.setattr(wide, "overload", made.get)
        return calls

    return make


def asked(product="addmm", dtype=torch.bfloat16):
    return wide.gives_float32(product, torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("overload", [refuses, absent, forgets_the_total, adds_twice, rounds, crosswise, None])
def test_an_overload_that_does_not_do_the_work_is_not_used(overload, dtype, device):
    device(mm=mm, addmm=overload)
    assert asked("mm", dtype) is True
    assert asked("addmm", dtype) is False


@pytest.mark.parametrize("dtype", HALF)
def test_one_that_does_is_used_and_asked_once(dtype, device):
    calls = device(mm=mm, addmm=addmm)
    assert [asked(dtype=dtype) for _ in range(3)] == [True] * 3
    assert calls == ["addmm"]
    assert not asked(dtype=torch.float32)


def test_this_machine_answers_as_it_would(monkeypatch):
    """PyTorch's own overloads: a CPU has neither."""
    monkeypatch.setattr(wide, "_ANSWERS", {})
    assert (asked("mm"), asked("addmm")) == (False, False)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("release", RELEASES)
def test_the_sums_of_every_release(release, dtype, device, monkeypatch):
    """Products and totals in float32, whatever is there, and no more scratch than is accounted."""
    of_mm, of_addmm = RELEASES[release]
    calls = device(mm=of_mm, addmm=of_addmm)
    monkeypatch.setattr(gemm, "_BLOCK_ELEMENTS", 60)
    gen = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=gen).to(dtype) for shape in ((17, 31), (17, 10)))
    a = a.t()  # as the gradient of a tile is for dW
    exact = a.double() @ b.double()
    for total in (torch.rand(31, 10, generator=gen), torch.rand(31, 16, generator=gen)[:, :10]):
        expected = total.double() + exact
        gemm.accumulate(total, a, b)  # asks
        calls.clear()
        total.copy_(expected - exact)
        with Allocations() as seen:
            gemm.accumulate(total, a, b)
        torch.testing.assert_close(total.double(), expected, rtol=0, atol=2e-5)
        assert set(calls) == {"addmm"} if of_addmm is addmm else set(calls) == ({"mm"} if of_mm else set())
        made = [n for n, _, name in seen.storages if of_mm is None or "new_empty" in name]  # not what a stand-in makes
        scratch = gemm.accumulate_scratch(31, 17, 10, dtype, torch.float32, a.device)
        assert (sum(made) if of_mm else max(made, default=0)) * 4 <= scratch <= 2 * 4 * 60
        assert (scratch == 0) is (of_addmm is addmm)
    into = torch.full((31, 10), float("nan"))
    gemm.product_into(into, a, b)
    torch.testing.assert_close(into.double(), exact, rtol=0, atol=2e-5)
    tile = torch.full((31, 64), float("nan"))[:, :17]
    gemm.linear_into(tile, b.new_ones(31, 10), b, None)
    torch.testing.assert_close(tile.double(), b.double().sum(1).expand(31, 17), rtol=0, atol=2e-5)


@pytest.mark.parametrize("release", RELEASES)
def test_where_nothing_can_be_run_the_release_decides(release, device, monkeypatch):
    calls = device(mm=mm, addmm=addmm)
    # A build for CUDA asks the driver for a fake tensor too, where it is told that there is a card.
    pretends = torch.version.cuda is None or torch.cuda.is_available()
    monkeypatch.setattr(torch, "__version__", TorchVersion(release))
    expected = (RELEASES[release][0] is mm, release in FAKE_TENSORS_ADD)

    def decided():
        return tuple(wide.gives_float32(x, torch.device("cuda"), torch.bfloat16) for x in ("mm", "addmm"))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert decided() == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert decided() == expected
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with monkeypatch.context() as m:
        m.setattr(torch.compiler, "is_compiling", lambda: True)
        assert decided() == expected
    if pretends:
        with FakeTensorMode():
            assert decided() == expected
            assert not asked()
    assert not wide.gives_float32("mm", torch.device("meta"), torch.bfloat16)
    assert not calls
    assert not wide._ANSWERS  # no guess is remembered: a later call may ask


def test_a_device_without_memory_gives_no_answer(device):
    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    device(mm=mm, addmm=full)
    with pytest.raises(torch.OutOfMemoryError):
        asked()
    device(mm=mm, addmm=addmm)
    assert asked()
