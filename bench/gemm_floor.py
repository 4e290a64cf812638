"""The floor: matrix products that nobody can avoid, as bare `torch.mm` into memory that exists already.

    normaliser given     z = h W^T, dH = g W, dW = g^T h for each of K draft steps, t = h_t W_t[D]^T once    3 + 1/K
    from hidden states   the pass over the full target vocabulary instead of t                     3 + (V_t / V_d) / K

in units of one draft product over all K steps. Rows that no pair uses are left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .shapes import Inputs

FLOORS = ("normaliser_given", "from_hidden")


def floors(inputs: Inputs) -> dict[str, Callable[[], None]]:
    """The two floors as callables; their outputs are allocated here."""
    weight = inputs.draft_weight.detach()
    draft = []
    used = torch.zeros(inputs.shape.num_tokens, dtype=torch.bool, device=weight.device)
    for k, h in enumerate(inputs.draft_hidden):
        rows = inputs.step_mask(k).nonzero().squeeze(1)
        used[rows + k] = True
        draft.append(h.detach()[rows])
    target_hidden = inputs.target_hidden[used]
    most = max(len(h) for h in draft)
    # Both targets and all steps share one tile of logits: what is timed are products, not memory.
    columns = max(weight.shape[0], inputs.target_weight.shape[0])
    tile = weight.new_empty(max(most, len(target_hidden)) * columns)
    d_hidden, d_weight = weight.new_empty(most, weight.shape[1]), torch.empty_like(weight)

    def logits(rows: int, size: int) -> torch.Tensor:
        return tile[: rows * size].view(rows, size)

    def draft_products() -> None:
        for h in draft:
            z = logits(len(h), len(weight))
            torch.mm(h, weight.t(), out=z)
            torch.mm(z, weight, out=d_hidden[: len(h)])
            torch.mm(z.t(), h, out=d_weight)

    def target_product(target_weight: torch.Tensor) -> None:
        torch.mm(target_hidden, target_weight.t(), out=logits(len(target_hidden), len(target_weight)))

    def normaliser_given() -> None:
        target_product(inputs.target_draft_weight)
        draft_products()

    def from_hidden() -> None:
        target_product(inputs.target_weight)
        draft_products()

    return {"normaliser_given": normaliser_given, "from_hidden": from_hidden}
