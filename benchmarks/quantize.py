"""How long does it take to quantize a network's weights exactly, compared with copying them?

    python benchmarks/quantize.py                       # 26 million weights, as many as a ResNet-50 has

Prints, for every width and granularity, the time of `lbw.fake_quantize` over that of `clone()`, eager. The
weights are Gaussian convolutions [512, 512, 3, 3]. Copies and quantizations take turns, so that a change of
clock slows both; medians of the repeats. Threads are torch's (OMP_NUM_THREADS sets them). Writes nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

from lbdet.quant import lbw
from lbdet.quant.rows import GRANULARITIES

ROW = 512 * 3 * 3
CHANNELS = 512


def make_weights(count: int) -> list[Tensor]:
    """Return Gaussian convolutions `[up to 512, 512, 3, 3]` of `count` weights, in whole channels."""
    generator = torch.Generator().manual_seed(0)
    channels = -(-count // ROW)
    layers = [min(CHANNELS, channels - first) for first in range(0, channels, CHANNELS)]
    return [0.02 * torch.randn(c, 512, 3, 3, generator=generator) for c in layers]


def seconds(work: Callable[[], object]) -> float:
    """Return the wall-clock time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(weights: Sequence[Tensor], bits: int, granularity: str, repeats: int) -> tuple[float, float]:
    """Return the median times in seconds of quantizing and of copying all weights, measured in turns."""

    def quantize() -> None:
        for weight in weights:
            lbw.fake_quantize(weight, bits, granularity=granularity)

    def copy() -> None:
        for weight in weights:
            weight.clone()

    quantize(), copy()  # the first calls allocate
    pairs = [(seconds(quantize), seconds(copy)) for _ in range(repeats)]
    quantizing, copying = zip(*pairs, strict=True)
    return median(quantizing), median(copying)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one line a width and granularity."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights", type=int, default=26_000_000, help="number of weights (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="measurements of each case (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if min(options.weights, options.repeats) < 1:
        parser.error("--weights and --repeats must be at least 1")
    weights = make_weights(options.weights)
    count = sum(weight.numel() for weight in weights)
    threads = torch.get_num_threads()
    print(f"{count} weights in {len(weights)} layers, {threads} threads, torch {torch.__version__}")
    print("granularity  bits  quantize [ms]  clone [ms]  ratio")
    for granularity in reversed(GRANULARITIES):
        for bits in range(lbw.MIN_BITS, lbw.MAX_BITS + 1):
            quantizing, copying = compare(weights, bits, granularity, options.repeats)
            times = f"{1e3 * quantizing:13.2f}  {1e3 * copying:10.2f}  {quantizing / copying:5.1f}"
            print(f"{granularity:11}  {bits:4}  {times}", flush=True)


if __name__ == "__main__":
    main()
