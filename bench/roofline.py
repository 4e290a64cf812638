"""A model of the least time a step can take on a GPU: `python -m bench.roofline`. Nothing here was measured.

Each operation takes its arithmetic at the card's peak or its bytes at the card's bandwidth, whichever is longer, and
the operations follow one another; launches, synchronisation and caches cost and save nothing. Operations, flops and
bytes are those that the accounting sees at full size (`bench.accounting`), so each provider is modelled as it is
written. The compiled eager loss has the matrix products of the eager one, and reads logits as often as a fused kernel
must: twice forward and once backward for draft and target, one write of the gradient.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .accounting import Gemm, Work
from .memory import PROVIDERS, SHAPES, SPECFORGE, Shape, accounted, providers_of
from .tables import print_markdown, write_csv


class Card(NamedTuple):
    """Peak of dense bf16 matrix arithmetic in flops a second, memory bandwidth in bytes a second, and who says so."""

    name: str
    flops: float
    bandwidth: float
    source: str

    def seconds(self, work: Sequence[Work]) -> float:
        return sum(max(x.flops / self.flops, x.bytes / self.bandwidth) for x in work)


CARDS = (
    Card("A100", 312e12, 2.039e12, "NVIDIA A100 datasheet, 80 GB SXM"),
    Card("H100", 989.4e12, 3.35e12, "NVIDIA H100 datasheet, SXM; half of the figure with sparsity"),
    Card("H200", 989.4e12, 4.8e12, "NVIDIA H200 datasheet, SXM; half of the figure with sparsity"),
    Card("B200", 2250e12, 8e12, "NVIDIA DGX B200 datasheet, an eighth; bf16 a quarter of FP8 with sparsity"),
)


def product(x: Gemm, size: int) -> Work:
    """A matrix product that reads its factors and writes its result once, in numbers of `size` bytes."""
    return Work(x.flops, size * x.batch * (x.m * x.k + x.k * x.n + x.m * x.n))


def floor(shape: Shape) -> list[Work]:
    """The products that nobody can avoid, and no other byte: draft forward and gradients, target over its full
    vocabulary once."""
    rows, h, v = shape.ttt_steps * shape.num_tokens, shape.hidden_size, shape.draft_vocab_size
    products = [Gemm(rows, v, h), Gemm(rows, h, v), *([] if shape.frozen_head else [Gemm(v, h, rows)])]
    if not shape.probs:
        products.append(Gemm(shape.num_tokens, shape.target_vocab_size, h))
    return [Work(x.flops, 0) for x in products]


def compiled(shape: Shape) -> list[Work]:
    """The eager loss, as SpecForge writes it, fused as far as a compiler can around its matrix products."""
    seen, size = accounted(shape, PROVIDERS[SPECFORGE]), shape.torch_dtype.itemsize
    products = [product(x, size) for x in (*seen.forward_gemms, *seen.backward_gemms)]
    tile = shape.ttt_steps * shape.num_tokens * shape.draft_vocab_size
    of_target = 4 if shape.probs else size
    normalizer = 0 if shape.probs else shape.num_tokens * shape.target_vocab_size * size
    return [*products, Work(0, tile * (3 * (size + of_target) + size) + normalizer)]


def modelled() -> Iterator[tuple[Shape, str, list[Work]]]:
    for shape in SHAPES:
        yield shape, "floor: the matrix products alone", floor(shape)
        yield shape, "eager, compiled", compiled(shape)
        for name, prepare in providers_of(shape).items():
            yield shape, name, list(accounted(shape, prepare).work)


def rows() -> Iterator[list[str]]:
    for shape, name, work in modelled():
        flops, moved = sum(x.flops for x in work), sum(x.bytes for x in work)
        times = [f"{1000 * card.seconds(work):.1f}" for card in CARDS]
        yield [shape.name, name, f"{flops / 1e12:.1f}", f"{moved / 1e9:.0f}", *times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write the table here as well")
    path = parser.parse_args().csv
    header = ["shape", "provider", "Tflop", "GB moved", *(f"{card.name} ms (model)" for card in CARDS)]
    table = list(rows())
    print("A model, not a measurement: each operation at the peak or the bandwidth of the card.\n")
    print_markdown(header, table)
    print()
    for card in CARDS:
        print(
            f"- {card.name}: {card.flops / 1e12:g} Tflop/s dense bf16, {card.bandwidth / 1e12:g} TB/s ({card.source})"
        )
    if path is not None:
        write_csv(path, header, table)


if __name__ == "__main__":
    main()
