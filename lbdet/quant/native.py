"""The quantizers' inner loops in C (`native.c`), for float tensors on a CPU.

Every function here gives what the PyTorch code of its caller would, bit for bit (sums of gradients up to
their order in float64), or None where the C code does not apply: no compiler, another device or dtype, a
tensor with gaps, operations that are being recorded, or an argument that is to be refused. Callers read

    found = native.some_function(x) or _the_same_in_pytorch(x)

Large tensors are shared among as many threads as PyTorch uses. They are Python's, and wait while there is no
work: OpenMP's would fight with those of the OpenMP that PyTorch brings along.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_double, c_float, c_int, c_int64, c_void_p
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack

from lbdet.quant.native_build import library

_ARGUMENTS = {
    "lbw": (c_void_p, c_int64, c_int64, c_int, c_double, c_void_p, c_void_p, c_void_p),
    "round_rows": (c_void_p, c_int64, c_int64, c_int, c_void_p, c_float, c_float, c_void_p),
    "gradient_rows": (
        c_void_p, c_void_p, c_int64, c_int64, c_int, c_void_p, c_float, c_float, c_int, c_void_p, c_void_p,
    ),
    "nearest_of_table": (c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p),
    "sums_of_levels": (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p),
}  # fmt: skip
"""of the functions in native.c"""
_WORTH_A_THREAD = 1 << 17
"""elements, at least 50 us of work; handing it over takes 10"""
_PLAIN = (Tensor, nn.Parameter)
Result = TypeVar("Result")


class _Part(NamedTuple):
    """Some rows of a tensor, or a piece of its only row: the share of a thread."""

    slot: int
    """of the results: the first row, or the number of the piece"""
    start: int
    """the first element"""
    rows: int
    length: int
    """of a row"""

    def of(self, x: Tensor) -> int:
        """Return the address of the part in a tensor of the whole shape."""
        return x.data_ptr() + self.start * x.element_size()

    def result(self, x: Tensor, width: int = 1) -> int:
        """Return the address of the part's results, `width` numbers a slot."""
        return x.data_ptr() + self.slot * width * x.element_size()


def lbw(
    weight: Tensor, magnitudes: int, ratio: float, granularity: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Return the nearest weights `2^s Q` (dtype float32) or their codes (int8), of the weight's shape and
    strides, and s, int32 `[R]`; all new. Ratio 0 is the exact solver.
    """
    c = _code_for(weight)
    if c is None:
        return None
    rows = 1 if granularity == "per_tensor" else weight.shape[0]
    parts = _parts(weight, rows) if rows > 1 else [_Part(0, 0, 1, weight.numel())]
    found, s = torch.empty_like(weight, dtype=dtype), weight.new_empty(rows, dtype=torch.int32)

    def solve(p: _Part) -> int:
        value, code = (p.of(found), None) if dtype == torch.float32 else (None, p.of(found))
        return c.lbw(p.of(weight), p.rows, p.length, magnitudes, ratio, value, code, p.result(s))

    return None if any(_each(solve, parts)) else (found, s)


def round_rows(x: Tensor, scale: Tensor, low: object, high: object) -> Tensor | None:
    """Return scale * clamp(round(x / scale), low, high), new, of x's shape, dtype and strides."""
    c = _code_for(x, half=True)
    if c is None or not (isinstance(low, int) and isinstance(high, int) and _is_scale_of(x, scale)):
        return None
    rows, half, y = scale.numel(), x.dtype == torch.bfloat16, torch.empty_like(x)
    parts = _parts(x, rows)
    scales = _for_parts(scale, rows, parts)

    def round_part(p: _Part) -> None:
        c.round_rows(p.of(x), p.rows, p.length, half, p.result(scales), low, high, p.of(y))

    _each(round_part, parts)
    return y


def round_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, low: object, high: object
) -> tuple[Tensor, Tensor] | None:
    """Return the gradients of `round_rows`: of x, and of the scale, float64 of its shape; both new."""
    if not (isinstance(low, int) and isinstance(high, int)):
        return None
    return _gradients(grad, x, scale, low, high, clips=False)


def clip_gradients(grad: Tensor, x: Tensor, clip: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the gradients of x rounded within [0, clip]: of x, and of the clip, float64 of its shape."""
    return _gradients(grad, x, clip, 0, 1, clips=True)


def nearest_of_table(weight: Tensor, table: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the level nearest to each weight, new, and its index, uint8; of the weight's shape and strides.

    Args:
        table: `[1, K]` or `[C, K]`, K up to 256.
    """
    c = _code_for(weight)
    if c is None or _code_for(table) is None:
        return None
    value, index = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.uint8)
    rows, k = table.shape
    parts = _parts(weight, rows)
    tables = _for_parts(table, rows, parts)

    def search(p: _Part) -> int:
        outputs = p.of(value), p.of(index)
        return c.nearest_of_table(p.of(weight), p.rows, p.length, p.result(tables, k), k, *outputs)

    return None if any(_each(search, parts)) else (value, index)


def sums_of_levels(grad: Tensor, index: Tensor, table: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return of each level the sum of gradients and the number of weights that have it, float64 `[R, K]`."""
    c = _code_for(grad)
    if c is None or not _in_order_of(grad, index):
        return None
    rows, k = table.shape
    parts = _parts(grad, rows)
    sums, uses = (torch.empty_like(_for_parts(table, rows, parts), dtype=torch.float64) for _ in range(2))

    def add(p: _Part) -> None:
        outputs = p.result(sums, k), p.result(uses, k)
        c.sums_of_levels(p.of(grad), p.of(index), p.rows, p.length, k, *outputs)

    _each(add, parts)
    return sums.sum_to_size(rows, k), uses.sum_to_size(rows, k)


def _gradients(
    grad: Tensor, x: Tensor, scale: Tensor, low: int, high: int, clips: bool
) -> tuple[Tensor, Tensor] | None:
    c = _code_for(x, grad, half=True)
    if c is None or not _is_scale_of(x, scale):
        return None
    rows, half, grad_x = scale.numel(), x.dtype == torch.bfloat16, torch.empty_like(x)
    parts = _parts(x, rows)
    scales = _for_parts(scale, rows, parts)
    slopes = torch.empty_like(scales, dtype=torch.float64)

    def differentiate(p: _Part) -> None:
        inputs = p.of(x), p.of(grad), p.rows, p.length, half, p.result(scales)
        c.gradient_rows(*inputs, low, high, clips, p.of(grad_x), p.result(slopes))

    _each(differentiate, parts)
    return grad_x, slopes if scales is scale else slopes.sum().view(scale.shape)


def _code_for(x: Tensor, *others: Tensor, half: bool = False) -> ctypes.CDLL | None:
    """Return the C code if it may read the tensors: plain, alike, and dense with rows one behind the other,
    while nobody records, transforms or differentiates operations.
    """
    if torch.compiler.is_compiling() or _get_tracing_state() is not None:
        return None
    if _len_torch_dispatch_stack() or _are_functorch_transforms_active():
        return None
    if not (x.dtype == torch.float32 or (half and x.dtype == torch.bfloat16)) or x.numel() == 0:
        return None
    records = torch.is_grad_enabled()
    for t in (x, *others):
        if type(t) not in _PLAIN or not t.is_cpu or (records and t.requires_grad):
            return None
        if t.dtype != x.dtype or not _in_order_of(x, t):
            return None
    return _functions()


def _in_order_of(x: Tensor, other: Tensor) -> bool:
    """Return whether both are dense and have their elements in the same order in memory."""
    if other.shape != x.shape:
        return False
    if x.is_contiguous():
        return other.is_contiguous()
    last = torch.channels_last
    return x.ndim == 4 and x.is_contiguous(memory_format=last) and other.is_contiguous(memory_format=last)


def _is_scale_of(x: Tensor, scale: Tensor) -> bool:
    """Return whether `scale` is one number, or one for each index of x's dimension 0, that C can read."""
    one = scale.numel() == 1 and scale.ndim <= x.ndim
    each = 0 < scale.ndim == x.ndim and scale.shape[0] == x.shape[0] == scale.numel()
    readable = type(scale) in _PLAIN and scale.dtype == torch.float32 and scale.is_contiguous()
    return (one or each) and readable and scale.is_cpu


def _parts(x: Tensor, rows: int) -> list[_Part]:
    """Cut a tensor of so many rows for the threads."""
    length, count = x.numel() // rows, min(torch.get_num_threads(), x.numel() // _WORTH_A_THREAD)
    if count <= 1:
        return [_Part(0, 0, rows, length)]
    if rows == 1:
        step = -(-length // count)
        starts = range(0, length, step)
        return [_Part(i, start, 1, min(step, length - start)) for i, start in enumerate(starts)]
    step = -(-rows // count)
    return [_Part(row, row * length, min(step, rows - row), length) for row in range(0, rows, step)]


def _for_parts(parameters: Tensor, rows: int, parts: list[_Part]) -> Tensor:
    """Return what each row has of its own; of an only row once for each piece, `[pieces, width]`."""
    if rows > 1 or len(parts) == 1:
        return parameters
    return parameters.reshape(1, -1).repeat(len(parts), 1)


def _each(work: Callable[[_Part], Result], parts: list[_Part]) -> list[Result]:
    if len(parts) == 1:
        return [work(parts[0])]
    return list(_pool(os.getpid(), torch.get_num_threads()).map(work, parts))


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the threads; a forked process has none of its parent's, and makes its own."""
    return ThreadPoolExecutor(threads, "lbdet")


@functools.cache
def _functions() -> ctypes.CDLL | None:
    found = library()
    if found is not None:
        for name, types in _ARGUMENTS.items():
            getattr(found, name).argtypes = types
    return found
