"""The target's `lm_head`."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from .. import checks
from ..gemm import compute_dtype
from .quantized import QuantizedWeight, as_weight
from .vocab import DraftVocab, check_vocab


class TargetHead:
    """The target's `lm_head`, with the draft vocabulary's rows sliced once; keep it across batches.

    Args:
        lm_head_weight: `[V_target, H_target]`; detached, it never receives a gradient. Or a `QuantizedWeight`, or a
            quantised tensor of torchao: it stays quantised, and so does its slice.
        vocab: the draft vocabulary; None: both models share one vocabulary (nothing is copied).
        bias: optional `[V_target]`.
        logit_scale, softcap: what the model does to the logits of this head, both > 0:
            `logit_scale * z`, and with a softcap `softcap * tanh(logit_scale * z / softcap)`.

    Rows of the weight that are no tokens (padding) would have a share of p. Pass a view without them,
    `weight[:vocab_size]` and `bias[:vocab_size]`.

    The slice is a copy: make a new head after the weight has changed. Under `torch.autocast` so is the whole head, if
    it is of another dtype; the copy is made once and kept.
    """

    def __init__(
        self,
        lm_head_weight: Tensor | QuantizedWeight,
        vocab: DraftVocab | None = None,
        bias: Tensor | None = None,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        checks.softmax("temperature", 1.0, logit_scale, softcap)
        self.logit_scale, self.softcap = logit_scale, softcap
        weight, bias = as_weight("lm_head_weight", checks.weight_here(lm_head_weight)), checks.weight_here(bias)
        check_vocab(vocab, weight.shape[0], "lm_head_weight")
        if bias is not None:
            checks.tensor("bias", bias, dtypes=[weight.dtype] if isinstance(weight, Tensor) else checks.FLOATS)
            checks.shape("bias", bias, (weight.shape[0],), "one per row of lm_head_weight")
            checks.same_device(weight.device, bias=bias)
        self.weight = weight
        self.bias = None if bias is None else bias.detach()
        self.vocab = None if vocab is None else vocab.to(self.weight.device)
        ids = None if self.vocab is None else self.vocab.target_ids
        self.draft_weight = self.weight if ids is None else self.weight[ids]
        self.draft_bias = self.bias if ids is None or self.bias is None else self.bias[ids]
        self._in_compute_dtype: TargetHead | None = None

    def in_compute_dtype(self, hidden: Tensor) -> TargetHead:
        """This head in the dtype that a linear layer with its weight would compute in, here and now.

        A quantised weight is dequantised into the dtype of the hidden states.
        """
        dtype = compute_dtype(self.weight if isinstance(self.weight, Tensor) else hidden)
        if all(x is None or x.dtype == dtype for x in (self.weight, self.bias)):
            return self
        kept = self._in_compute_dtype
        if kept is None or kept.weight.dtype != dtype:
            kept = copy.copy(self)
            kept.weight = self.weight.to(dtype)
            kept.draft_weight = kept.weight if self.vocab is None else self.draft_weight.to(dtype)
            kept.bias, kept.draft_bias = (x if x is None else x.to(dtype) for x in (self.bias, self.draft_bias))
            self._in_compute_dtype = kept
        return kept


def as_head(
    head: Any, vocab: DraftVocab | None, bias: Tensor | None, logit_scale: float, softcap: float | None
) -> TargetHead:
    """A `TargetHead` as it is, or the head of a bare weight with its vocabulary, bias and options."""
    if isinstance(head, (Tensor, QuantizedWeight)):
        return TargetHead(head, vocab, bias, logit_scale=logit_scale, softcap=softcap)
    if not isinstance(head, TargetHead):
        remedy = checks.instead("head", head, "Build TargetHead(weight, vocab).")
        checks.fail("head to be a TargetHead or a weight tensor", head, remedy, TypeError)
    if not (vocab is None and bias is None and logit_scale == 1.0 and softcap is None):
        expected = "vocab, bias, logit_scale and softcap inside the TargetHead"
        checks.fail(expected, "one of them beside it", "Pass them to TargetHead.")
    return head
