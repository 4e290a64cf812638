"""The bytes of the loss that is replaced: LK-lambda from full logits in plain PyTorch, as SpecForge writes it.

A test compares the sums with the accounting of that very loss, which also makes the table of memory.
"""

from __future__ import annotations

from .costs import TargetFacts
from .plan import Facts


def eager_bytes(facts: Facts, target: TargetFacts) -> int:
    """The most bytes of live tensors beyond the inputs, whatever is masked: the eager loss makes every row.

    It holds two float32 targets for all steps, and two float32 softmaxes for each step until the backward. There the
    gradient of a minimum takes two and a half more. A quantised head counts as if its weight were there already.
    """
    steps, rows = facts.num_sources, facts.num_rows // facts.num_sources
    tile = 4 * rows * facts.vocab_size
    logits = facts.dtype.itemsize * rows * facts.vocab_size
    d_weight = facts.needs_weight * facts.dtype.itemsize * facts.vocab_size * facts.hidden_size
    d_hidden = facts.needs_hidden * facts.dtype.itemsize * rows * facts.hidden_size
    held = 2 * tile if d_weight or d_hidden else 0  # of each step
    # p and pt have a row more for each step; probabilities are both as they come, and a top-k is made dense for both
    targets = {"probs": 0, "topk": tile}.get(target.kind, 2 * (tile + 4 * steps * facts.vocab_size))
    moments = [targets + (steps - 1) * held + (3 if held else 2) * tile + logits]
    if target.kind in ("hidden", "logits"):  # the target's logits, in float32 too; then p or pt, and what makes it
        itemsize = target.itemsize if target.kind == "logits" else facts.dtype.itemsize
        narrow = itemsize * rows * target.vocab_size * (target.kind == "hidden")
        wide = 4 * rows * target.vocab_size if itemsize != 4 else 0
        cuts = target.vocab_size != facts.vocab_size
        moments += [narrow + wide, (wide or narrow) + (2 + cuts) * tile]
    if held:
        moments += [targets + steps * held + tile * 5 // 2, d_weight + d_hidden + logits]
        moments.append((targets if steps > 1 else 0) + (steps - 1) * held + 3 * logits)
    if held and steps > 1:  # a gradient of the head, the next step's, and their sum
        moments.append((targets if steps > 2 else 0) + (steps - 2) * held + 3 * d_weight + 2 * d_hidden)
    return max(moments)
