"""A head's weight that stays quantised: a product with it dequantises a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import checks, gemm

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# By dtype: how many values of a row lie in one element, where `hidden_size` does not say.
_PER_ELEMENT = {**dict.fromkeys(_FLOAT8, 1), torch.int8: 1, torch.uint8: 2, torch.int32: 8}
# The blocks of two-dimensional scales, where their number fits.
_BLOCK = 128
# torchao 0.18: W = (qdata - zero_point) * scale. Int4Tensor: W = qdata * scale + zero_point, both transposed.
_TORCHAO = ("Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor", "Int4Tensor")
# compressed-tensors 0.20, and the checkpoints that name an fp8 scale `weight_scale_inv` (it multiplies all the same).
_NAMES = ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_scale_inv", "weight_zero_point")
_DEQUANTIZE = "Dequantise it first, as by weight.dequantize(), and pass the dense weight."


class QuantizedWeight:
    """A weight `[V, H]` of a target's head that stays quantised; `TargetHead` takes it in the place of a tensor.

        W = (values - zero_point) * scale + offset

    A product makes W in blocks of at most 2^23 elements, for each tile of logits. The arithmetic is float32 (float64
    where `scale` or the hidden states are), and W is rounded once, into the dtype of the hidden states. So p is that of
    the dequantised weight. Activations are not quantised, also where the model's own kernel does that.

    Args:
        values: `[V, H]` in float8_e4m3fn, float8_e5m2 or int8. Packed along H: uint8 `[V, H / 2]`, value + 8, the low
            half of a byte first; int32 `[V, H / 8]`, the same, the low byte first (or `[V, H / 4]`, value + 128);
            with `hidden_size` int8 `[V, H / 2]`, two's complement.
        scale: one for the tensor, `[V]` or `[V, 1]` for each row, `[V, G]` for each group of columns, or `[R, C]` for
            each block. Any float dtype, or uint8 exponents e of 2^(e - 127) (MX).
        zero_point, offset: optional, of the scale's shape.
        block: `(rows, columns)` that share a scale. Without it blocks have 128 rows (columns) where their number fits,
            and equal sizes where it does not.
        hidden_size: H, if a row is packed and padded.
        dtype: of `dequantized()`; default: the scale's.

    Attributes:
        shape, dtype, device: of the weight as it would be dequantised.

    Nothing in it receives a gradient.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit.
    """

    def __init__(
        self,
        values: Tensor,
        scale: Tensor,
        zero_point: Tensor | None = None,
        offset: Tensor | None = None,
        *,
        block: Sequence[int] | None = None,
        hidden_size: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.tensor("values", values, ndim=2, dtypes=_PER_ELEMENT)
        checks.not_empty("values", values, vocabulary=0, hidden_size=1)
        if hidden_size is None:
            hidden_size = values.shape[1] * _PER_ELEMENT[values.dtype]
        shape = values.shape[0], checks.integer("hidden_size", hidden_size)
        checks.tensor("scale", scale, dtypes=(*checks.FLOATS, torch.uint8))
        scale = scale.detach()
        if scale.dtype == torch.uint8:
            scale = torch.exp2(scale.float() - 127)
        like = scale.shape
        sizes = _block_sizes(scale, shape, block)
        parts = [_bytes(values.detach(), shape[1]), _per_group(scale, shape, sizes)]
        for name, x in (("zero_point", zero_point), ("offset", offset)):
            if x is None:
                parts.append(scale.new_empty(0))
                continue
            checks.tensor(name, x, dtypes=(*checks.FLOATS, *checks.INTEGERS, *_FLOAT8))
            if x.numel() != scale.numel():
                checks.shape(name, x, tuple(like), "that of the scale")
            x = x.detach().reshape(like)
            parts.append(_per_group(x.float() if x.dtype in _FLOAT8 else x, shape, sizes))
        checks.same_device(values.device, scale=scale, zero_point=zero_point, offset=offset)
        self._set(parts, shape[1], scale.dtype if dtype is None else dtype)

    def _set(self, parts: Sequence[Tensor], hidden_size: int, dtype: torch.dtype) -> QuantizedWeight:
        # Values as bytes or float8, then scales, zero points and offsets `[V, groups]`; what is not there is empty.
        self.parts, self.dtype, self.device = tuple(parts), dtype, parts[0].device
        self.shape = (parts[0].shape[0], hidden_size)
        return self

    @classmethod
    def of(cls, source: Any, prefix: str = "") -> QuantizedWeight:
        """The quantised weight that a model or a checkpoint holds.

        Args:
            source: a tensor of torchao (Float8Tensor, Int8Tensor, Int4Tensor, IntxUnpackedToInt8Tensor), a module, or a
                state dict, with the names of compressed-tensors: `weight` (fp8, int8) or `weight_packed` with
                `weight_shape` (int4, or int8, in int32), `weight_scale` and `weight_zero_point`.
            prefix: of these names in a state dict, as in "lm_head.".

        Raises:
            TypeError, ValueError: another format (fp4, fp6, 2:4 sparse, GPTQ, GGUF, bitsandbytes, transposed or
                shuffled layouts).
        """
        if isinstance(source, Tensor):
            return _of_torchao(source)
        block = None
        if isinstance(source, nn.Module):
            scheme = getattr(getattr(source, "quantization_scheme", None), "weights", None)
            block = getattr(scheme, "block_structure", None)
            source = dict(source.named_parameters(recurse=False)) | dict(source.named_buffers(recurse=False))
        if not isinstance(source, Mapping):
            expected = "a module, a state dict or a tensor of torchao"
            checks.fail(expected, source, "Pass QuantizedWeight(values, scale) of the parts.", TypeError)
        found = {k.removeprefix(prefix): v for k, v in source.items() if k.startswith(prefix)}
        if is_traceable_wrapper_subclass(found.get("weight")):
            return _of_torchao(found["weight"])
        scale = found.get("weight_scale", found.get("weight_scale_inv"))
        packed, zero_point = found.get("weight_packed"), found.get("weight_zero_point")
        values = found.get("weight") if packed is None else packed
        unknown = {k for k in found if k.startswith("weight_")} - {*_NAMES}
        integers = packed is None or (packed.dtype == torch.int32 and "weight_shape" in found)
        if values is None or scale is None or unknown or not integers:
            expected = f"the names {', '.join(_NAMES)}, as compressed-tensors has them for fp8, int8 and packed int4"
            got = ", ".join(f"{k} ({checks.describe(v)})" for k, v in sorted(found.items()) if "." not in k) or "none"
            checks.fail(expected, got, f"Name the prefix, or the format is not known. {_DEQUANTIZE}")
        assert values is not None and scale is not None  # for mypy
        hidden_size = None
        if packed is not None:
            hidden_size = int(found["weight_shape"][1])
            if zero_point is not None:
                rows = _bytes(zero_point.detach().t().contiguous(), packed.shape[0])
                zero_point = _unpacked(rows, packed.shape[0], torch.int8).t()
        return cls(values, scale, zero_point, block=block, hidden_size=hidden_size)

    def __getitem__(self, rows: slice | Tensor) -> QuantizedWeight:
        """Some of the rows, quantised as they are."""
        parts = [x if x.ndim == 1 else x[rows] for x in self.parts]
        return QuantizedWeight.__new__(QuantizedWeight)._set(parts, self.shape[1], self.dtype)

    def to(self, dtype: torch.dtype) -> QuantizedWeight:
        """The same values, to be dequantised into `dtype`. Nothing is copied."""
        return QuantizedWeight.__new__(QuantizedWeight)._set(self.parts, self.shape[1], dtype)

    def dequantized(self) -> Tensor:
        """The whole weight, `[V, H]` in `dtype`."""
        values, scale, zero_point, offset = self.parts
        whole = _unpacked(values, self.shape[1], gemm.wide_dtype(self.dtype, scale.dtype))
        groups = whole.view(*scale.shape, self.shape[1] // scale.shape[1])
        if zero_point.ndim > 1:
            groups.sub_(zero_point.unsqueeze(-1))
        groups.mul_(scale.unsqueeze(-1))
        if offset.ndim > 1:
            groups.add_(offset.unsqueeze(-1))
        return whole.to(self.dtype)

    def linear_into(self, out: Tensor, x: Tensor, bias: Tensor | None) -> None:
        """`gemm.linear_into` with this weight, a block of columns of `out` at a time."""
        step = gemm.block_rows(self.shape[1])
        for start in range(0, self.shape[0], step):
            columns = slice(start, start + step)
            gemm.linear_into(out[:, columns], x, self[columns].dequantized(), None if bias is None else bias[columns])

    def __repr__(self) -> str:
        return f"QuantizedWeight({list(self.shape)} in {self.parts[0].dtype}, {self.dtype}, {self.device})"


def as_weight(name: str, weight: Any) -> Tensor | QuantizedWeight:
    """A head's `weight`, checked: quantised if it is known to be, else a dense tensor without a gradient."""
    if isinstance(weight, QuantizedWeight):
        return weight
    plain = not isinstance(weight, Tensor) or weight.is_nested or hasattr(weight, "full_tensor")
    if not plain and is_traceable_wrapper_subclass(weight):
        return _of_torchao(weight, name)
    if isinstance(weight, Tensor) and weight.dtype in _PER_ELEMENT:
        checks.fail(
            f"{name} of dtype {', '.join(str(x).removeprefix('torch.') for x in checks.FLOATS)}, or with its scales",
            f"{checks.describe(weight)} ({type(weight).__name__})",
            "Pass QuantizedWeight.of(lm_head), QuantizedWeight(values, scale), or the dequantised weight.",
            TypeError,
        )
    checks.tensor(name, weight, ndim=2, dtypes=checks.FLOATS)
    checks.not_empty(name, weight, vocabulary=0, hidden_size=1)
    return weight.detach()


def parts(weight: Tensor | QuantizedWeight) -> tuple[Tensor, ...]:
    """The tensors of a weight: one if it is dense, four if it is quantised."""
    return (weight,) if isinstance(weight, Tensor) else weight.parts


def of_parts(tensors: Sequence[Tensor], hidden: Tensor) -> Tensor | QuantizedWeight:
    """The weight of these `parts`, for products with `hidden`."""
    if len(tensors) == 1:
        return tensors[0]
    return QuantizedWeight.__new__(QuantizedWeight)._set(tensors, hidden.shape[1], hidden.dtype)


def _of_torchao(weight: Any, name: str = "the weight") -> QuantizedWeight:
    kind = type(weight).__name__
    if kind not in _TORCHAO or getattr(weight, "act_pre_scale", None) is not None or weight.ndim != 2:
        got = f"a {kind} of shape {tuple(weight.shape)}"
        got += " with an act_pre_scale" if getattr(weight, "act_pre_scale", None) is not None else ""
        expected = f"{name} to be a plain tensor `[V, H]`, or one of torchao's {', '.join(_TORCHAO)}"
        checks.fail(expected, got, _DEQUANTIZE, TypeError)
    how: dict[str, Any] = {"block": weight.block_size or None, "hidden_size": weight.shape[1], "dtype": weight.dtype}
    if kind == "Int4Tensor":
        return QuantizedWeight(weight.qdata.view(torch.int8), weight.scale.t(), offset=weight.zero_point.t(), **how)
    return QuantizedWeight(weight.qdata, weight.scale, getattr(weight, "zero_point", None), **how)


def _block_sizes(scale: Tensor, shape: tuple[int, int], block: Sequence[int] | None) -> list[int]:
    """The rows and the columns that share a scale."""
    counts = (scale.numel(), 1) if scale.ndim < 2 else tuple(scale.shape)
    sizes = []
    for i, (size, count) in enumerate(zip(shape, counts, strict=False)):
        known = (_BLOCK, size // max(count, 1)) if block is None else (int(block[i]),)
        fits = [min(x, size) for x in known if x > 0 and -(-size // x) == count and scale.ndim < 3]
        if not fits:
            expected = f"scales for the tensor, for rows, groups or blocks of a weight of shape {shape}"
            expected += "" if block is None else f", in blocks of {tuple(block)}"
            checks.fail(expected, scale, "Pass block=(rows, columns), or hidden_size= if rows are padded.")
        sizes.append(fits[0])
    return sizes


def _per_group(x: Tensor, shape: tuple[int, int], sizes: Sequence[int]) -> Tensor:
    """A number per block as one per row and group of columns, `[V, groups]`, in groups that divide a row."""
    x = x.reshape(-1, 1) if x.ndim < 2 else x
    group = math.gcd(sizes[1], shape[1])
    if sizes[1] != group:
        x = x.repeat_interleave(sizes[1] // group, 1)[:, : shape[1] // group]
    if x.shape[0] != shape[0]:
        x = x.repeat_interleave(sizes[0], 0)[: shape[0]] if x.shape[0] > 1 else x.expand(shape[0], -1)
    return x.contiguous()


def _bytes(values: Tensor, size: int) -> Tensor:
    """Rows of `size` values, without padding: int32 words as the bytes that they consist of."""
    width = values.shape[1]
    if values.dtype == torch.int32:
        fits = [per_word for per_word in (8, 4) if -(-size // per_word) == width]
        values, wanted = values.contiguous().view(torch.uint8), [-(-size // (x // 4)) for x in fits]
    else:
        wanted = [x for x in (size, -(-size // 2)) if x == width and (x == size or values.dtype not in _FLOAT8)]
    if not wanted:
        expected = f"a row of {size} values: one an element, or packed as int4 (in int32 also int8)"
        checks.fail(expected, f"{width} elements a row", f"Check hidden_size. {_DEQUANTIZE}")
    return values[:, : wanted[0]]


def _unpacked(values: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """`[rows, size]` integers or float8 in a new tensor of another `dtype`."""
    signed = values.dtype != torch.uint8
    if values.shape[1] == size:
        whole = values.to(dtype, memory_format=torch.contiguous_format)
        return whole if signed else whole.sub_(128)
    whole = torch.empty(*values.shape, 2, dtype=dtype, device=values.device)
    whole[..., 0] = (values << 4) >> 4 if signed else values & 15
    whole[..., 1] = values >> 4
    whole = whole.flatten(1)[:, :size].contiguous()
    return whole if signed else whole.sub_(8)
