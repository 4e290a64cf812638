"""Targets from hidden states, and the pass over the full vocabulary that finds their normaliser and their argmax."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, gemm
from ..impls import row_ops
from ..opaque import opaque
from ..rows.interface import Normalizer, Transform, accumulation_dtype
from .head import TargetHead
from .logits import LogitsTiles, unwritten
from .quantized import QuantizedWeight, of_parts, parts
from .tiles import Made, Tiles, flat_constant, flat_ids, given_normalizer


class HiddenTiles(Tiles):
    """Logits that are made from hidden states `[N, H]` and the draft vocabulary's rows (and biases) of a head.

    The tensors are the hidden states, the `parts` of the weight (one, or four if it is quantised), and a bias if there
    is one. Logits have the dtype that the products are computed in. With `exact`, they are the products' own float32
    results.
    """

    of_product = True

    def __init__(self, tensors: Sequence[Tensor], vocab_size: int, exact: bool = False) -> None:
        self.kind = "exact_hidden" if exact else "hidden"
        biased = len(tensors) in (3, 6)
        self.hidden, self.bias = tensors[0], tensors[-1] if biased else None
        self.weight = of_parts(tensors[1 : len(tensors) - biased], self.hidden)
        super().__init__(tensors, vocab_size, _logits_dtype(self.hidden, exact))

    def write(self, t: Tensor, rows: slice | Tensor, columns: slice) -> None:
        bias = None if self.bias is None else self.bias[columns]
        _linear_into(t, self.hidden[rows], self.weight[columns], bias)

    def dense(self) -> Tensor:
        weight = self.weight if isinstance(self.weight, Tensor) else self.weight.dequantized()
        of_head = (weight,) if self.bias is None else (weight, self.bias)
        logits = F.linear(*(x.to(self.dtype) for x in (self.hidden, *of_head)))
        return logits.to(accumulation_dtype(logits))


def of_hidden(
    hidden: Tensor,
    head: TargetHead,
    mask: Tensor | None,
    log_normalizer: Tensor | None,
    token_ids: Tensor | None,
    cache: bool,
    transform: Transform,
    renormalize: bool,
    impl: str,
    budget: int | None,
    exact: bool,
) -> Made:
    """The target of `Target.from_hidden`."""
    checks.tensor("hidden", hidden, min_ndim=1, dtypes=checks.FLOATS)
    checks.is_constant("hidden", hidden)
    checks.same_device(head.weight.device, hidden=hidden)
    head, hidden = head.in_compute_dtype(hidden), hidden.to(gemm.compute_dtype(hidden))
    remedy = "Pass hidden.to(lm_head_weight.dtype) or a head of lm_head_weight.to(hidden.dtype), or use torch.autocast."
    checks.tensor("hidden", hidden, dtypes=[head.weight.dtype], remedy=remedy)
    if hidden.shape[-1] != head.weight.shape[1]:
        checks.fail(
            f"hidden with last dimension {head.weight.shape[1]}, the hidden size of the target head",
            hidden,
            "Check that hidden states and head belong to one model.",
        )
    rows, draft_size = hidden.detach().reshape(-1, hidden.shape[-1]), head.draft_weight.shape[0]
    bias = () if head.draft_bias is None else (head.draft_bias,)
    tiles: Tiles = HiddenTiles((rows, *parts(head.draft_weight), *bias), draft_size, exact)
    normalizer = None
    if log_normalizer is not None:
        log_normalizer = flat_constant("log_normalizer", log_normalizer, hidden, checks.FLOATS)
        normalizer = given_normalizer(log_normalizer, tiles.dtype)
    ids = flat_ids(token_ids, hidden, head.weight.shape[0])
    flat_mask = computed = None
    if mask is not None:
        checks.tensor("mask", mask, dtypes=(*checks.MASKS, *checks.FLOATS))
        checks.shape("mask", mask, tuple(hidden.shape[:-1]), "one per row of hidden")
        checks.same_device(hidden.device, mask=mask)
        flat_mask = checks.as_bool("mask", mask).reshape(-1)
        computed = None if torch.compiler.is_compiling() else flat_mask.cpu().numpy().copy()
    checks.finite_rows("hidden", rows, counted=flat_mask)

    t2d, draft_ids = (None, None) if head.vocab is None else (head.vocab.t2d, head.vocab.target_ids)
    how = (*transform, impl, budget, exact)
    stream = partial(stream_hidden, rows, list(parts(head.weight)), head.bias, flat_mask, t2d, draft_ids, *how)
    find = None
    # Over a shared vocabulary a walk finds the normaliser and the argmax in the tiles that it makes anyway.
    if cache or (head.vocab is not None and normalizer is None and not (renormalize and ids is not None)):
        lse, argmax, log_mass, cached = stream(cache)
        tiles = LogitsTiles((cached,), draft_size) if cache else tiles
        ids = argmax if ids is None else ids
        if normalizer is None:
            normalizer = None if head.vocab is None else Normalizer(log_mass, True, 0.0)
            log_normalizer = lse
    elif head.vocab is None or ids is not None:
        find = partial(stream, False)
    full: Tiles | None = None
    if head.vocab is not None:
        of_head = (*parts(head.weight), *(() if head.bias is None else (head.bias,)))
        full = HiddenTiles((rows, *of_head), head.weight.shape[0], exact)
    return Made(tiles, hidden.shape[:-1], head.vocab, normalizer, log_normalizer, ids, find, computed, full)


@opaque(
    "(Tensor hidden, Tensor[] weight, Tensor? bias, Tensor? mask, Tensor? t2d, Tensor? cached_ids, "
    "float scale, float? inner, str impl, int? budget, bool exact, bool cache) -> (Tensor, Tensor, Tensor, Tensor)"
)
def stream_hidden(hidden, weight, bias, mask, t2d, cached_ids, scale, inner, impl, budget, exact, cache):
    """`(logsumexp, argmax, log_mass, cached)` of each row of `hidden @ weight.T + bias`, a workspace at a time.

    `weight` is the list of its `parts`. Between the product and the softmax lies `Transform(scale, inner)`.

    The first three are those of `stream_logits`. Rows outside `mask` are not computed: they are NaN, -1, NaN and 0.
    With `cache`, `cached` holds the columns `cached_ids` (None: all) of the same logits, as the product made them, with
    a padded row stride. Otherwise it has no rows. `exact` logits are the products' own float32 results.
    """
    rows = None if mask is None else mask.nonzero().squeeze(1)
    count = hidden.shape[0] if rows is None else rows.shape[0]
    lse, argmax, log_mass, cached = _unwritten(hidden, weight, t2d, cached_ids, exact, cache)
    results = [lse, argmax] if t2d is None else [lse, argmax, log_mass]
    if rows is not None:
        for x in results:
            x.fill_(float("nan") if x.is_floating_point() else -1)
    ops, transform, weight = row_ops(impl, hidden.device), Transform(scale, inner), of_parts(weight, hidden)
    step = gemm.rows_of_a_tile(weight.shape[0], count, cached.itemsize, hidden.device, budget)
    tile = gemm.tile(step, weight.shape[0], cached.dtype, hidden.device)
    for start in range(0, count, step):
        stop = min(start + step, count)
        at = slice(start, stop) if rows is None else rows[start:stop]
        logits = tile[: stop - start]
        _linear_into(logits, hidden[at], weight, bias)
        found = [x[at] if rows is None else torch.empty_like(x[start:stop]) for x in results]
        ops.lse_argmax(logits, transform, t2d, found[0], None if t2d is None else found[2], found[1])
        if rows is not None:
            for x, of_rows in zip(results, found, strict=True):
                x[at] = of_rows
        if cache:
            cached[at] = logits if cached_ids is None else logits[:, cached_ids]
    return lse, argmax, log_mass, cached


@stream_hidden.register_fake
def _(hidden, weight, bias, mask, t2d, cached_ids, scale, inner, impl, budget, exact, cache):
    return _unwritten(hidden, weight, t2d, cached_ids, exact, cache)


def _unwritten(
    hidden: Tensor, weight: list[Tensor], t2d: Tensor | None, cached_ids: Tensor | None, exact: bool, cache: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns = weight[0].shape[0] if cached_ids is None else cached_ids.shape[0]
    n, dtype = hidden.shape[0] if cache else 0, _logits_dtype(hidden, exact)
    cached = hidden.new_zeros(n, gemm.row_stride(columns), dtype=dtype)[:, :columns]
    return *unwritten(hidden, t2d), cached


def _linear_into(out: Tensor, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> None:
    if isinstance(weight, Tensor):
        gemm.linear_into(out, x, weight, bias)
    else:
        weight.linear_into(out, x, bias)


def _logits_dtype(hidden: Tensor, exact: bool) -> torch.dtype:
    return accumulation_dtype(hidden) if exact else hidden.dtype
