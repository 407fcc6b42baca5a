"""How long does it take to quantize a network's weights exactly, compared with copying them?

    python benchmarks/quantize.py                       # 26 million weights, as many as a ResNet-50 has
    python benchmarks/quantize.py --eager               # and how long without the C code

Prints, for every width and granularity, the time of `lbw.fake_quantize` over that of `clone()`. The weights
are Gaussian convolutions [512, 512, 3, 3]. Copies and quantizations take turns, so that a change of clock
slows both; medians of the repeats. Threads are torch's (OMP_NUM_THREADS sets them). Writes nothing.

Both allocate their result. Where the C library returns memory to the system and has to ask for it again, that
is most of the time of a copy, and the ratio flatters. With glibc this keeps the memory:

    export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor

from lbdet.quant import lbw, native
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


def compare(
    weights: Sequence[Tensor], bits: int, granularity: str, repeats: int, eager: bool = False
) -> list[float]:
    """Return the median times in seconds of quantizing and of copying all weights, measured in turns, and
    where `eager` says so of quantizing without the C code.
    """

    def quantize() -> None:
        for weight in weights:
            lbw.fake_quantize(weight, bits, granularity=granularity)

    def copy() -> None:
        for weight in weights:
            weight.clone()

    def quantize_without_c() -> None:
        with patch.object(native, "_functions", return_value=None):
            quantize()

    works = [quantize, copy, quantize_without_c] if eager else [quantize, copy]
    for work in works:
        work()  # the first calls compile and allocate
    turns = [[seconds(work) for work in works] for _ in range(repeats)]
    return [median(times) for times in zip(*turns, strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one line a width and granularity."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights", type=int, default=26_000_000, help="number of weights (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="measurements of each case (default: %(default)s)"
    )
    parser.add_argument(
        "--eager", action="store_true", help="measure without the C code, too: 20 times as slow"
    )
    options = parser.parse_args(arguments)
    if min(options.weights, options.repeats) < 1:
        parser.error("--weights and --repeats must be at least 1")
    weights = make_weights(options.weights)
    count = sum(weight.numel() for weight in weights)
    threads = torch.get_num_threads()
    how = "in C" if native._functions() else "without the C code: there is no compiler"
    print(f"{count} weights in {len(weights)} layers, {threads} threads, torch {torch.__version__}, {how}")
    title = "granularity  bits  quantize [ms]  clone [ms]  ratio"
    print(title + ("   GB/s  eager [ms]  ratio" if options.eager else ""))
    for granularity in reversed(GRANULARITIES):
        for bits in range(lbw.MIN_BITS, lbw.MAX_BITS + 1):
            quantizing, copying, *rest = compare(weights, bits, granularity, options.repeats, options.eager)
            line = f"{granularity:11}  {bits:4}  {1e3 * quantizing:13.2f}  {1e3 * copying:10.2f}"
            line += f"  {quantizing / copying:5.1f}"
            for eager in rest:
                line += f"  {8e-9 * count / quantizing:5.1f}  {1e3 * eager:10.2f}  {eager / copying:5.1f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
