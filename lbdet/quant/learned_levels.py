"""Which 2^bits values of any place stand for a layer's weights, if gradient descent may move them?

A weight is a code into a table of K = 2^bits levels, one table a tensor or one a row. Nothing ties the levels
to a grid or to each other but their order; `symmetric` ties them to pairs -l, l.

    bits  K    levels for Gaussian weights of variance 1 (Lloyd-Max)     squared error
    1     2    -.798 .798                                                .363
    2     4    -1.510 -.453 .453 1.510                                   .117
    3     8    -2.152 -1.344 -.756 -.245 ... 2.152                       .0345
    4     16   -2.733 ... -.128 .128 ... 2.733                           .0095

Cells end half way between neighbours; a weight on a border belongs to the upper level. So zero, which lies on
a border of every symmetric table, becomes its smallest positive level.

Training, one update:

    forward    w_q = table[code], code = nearest level of the latent float weight w       `fake_quantize`
    backward   dL/dtable[k] = n_k^-1/2 * sum of dL/dw_q over the n_k weights with code k;  dL/dw = dL/dw_q
    update     any optimizer, on w and on the table
    settle     sort the table, assign every w anew, only then clamp it into its new cell   `settle`

The order of the last step matters: a latent weight that was clamped into the cell of its old code first would
be stopped at that cell's border, however far it had stepped, and keep its code.

Reference:
    Hoang, Do, Nguyen, Cheung 2020, "Direct Quantization for Training Highly Accurate Low Bit-width Deep
    Neural Networks", IJCAI 2020, arXiv 2012.13762.

Differs from the paper:
    The paper's are learnable levels and quantized weights that gradient descent updates directly. Our
    reading are the latent weights with their clamp after the assignment, Lloyd-Max as the start, the scale
    n_k^-1/2 of a level's gradient, the width of the outermost cells, and symmetric tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lbdet.errors import NumericsError
from lbdet.quant import native
from lbdet.quant.rows import as_rows, check_finite, per_row

MIN_BITS, MAX_BITS = 1, 8
_MAX_KNOTS = 1 << 16  # weights of a row that its start looks at
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class LevelsTensor:
    """Weights as integers into a table."""

    codes: Tensor
    """int8, the weight's shape: index of the level - 2^(bits-1)"""
    table: Tensor
    """float32 `[R, 2^bits]`, sorted rows; R = 1 (per tensor) or C (per channel)"""
    bits: int

    @property
    def levels(self) -> Tensor:
        """The sorted representable values, float32 `[K]` of one row, else `[C, K]`; a view of the table."""
        return self.table[0] if len(self.table) == 1 else self.table

    @property
    def level_index(self) -> Tensor:
        """Which of the sorted levels each code stands for, int64, the weight's shape."""
        return self.codes.long() + (1 << (self.bits - 1))

    def dequantize(self) -> Tensor:
        """Return the level of each code, float32, the weight's shape, a new tensor."""
        index = self.codes.long() + (1 << (self.bits - 1))
        return self.table.gather(1, index.reshape(len(self.table), -1)).view(self.codes.shape)


def lloyd_max(
    weight: Tensor, bits: int, granularity: str = "per_tensor", symmetric: bool = False, iterations: int = 100
) -> Tensor:
    """Find levels of small squared error: means of their cells (Lloyd 1982, Max 1960).

    A local minimum, the better of two starts for each row (see `_companded`, `_quantiles`). A level whose
    cell is empty stays where it is, so rows of few distinct values have levels that no weight uses.

    Args:
        weight: float tensor `[C, ...]`, finite; solved in float32 with sums in float64.
        bits: 1 to 8.
        granularity: "per_tensor", or "per_channel" (one row of levels for each index of dimension 0).
        symmetric: levels are pairs -l, l, with l >= 0 solved for |w|; at 1 bit +-mean|w|.
        iterations: at most so many; fewer when no border passes a weight any more. 0 returns the start.

    Returns:
        float32 `[1, 2^bits]` or `[C, 2^bits]`, rows sorted (levels may be equal), a new tensor.

    Raises:
        ValueError: an argument out of its range.
        NumericsError: the weight has values that are not finite.

    >>> lloyd_max(torch.tensor([[0.0, 1.0, 7.0, 9.0]]), bits=1)
    tensor([[0.5000, 8.0000]])
    """
    k = _number_of_levels(bits)
    rows = as_rows(weight.detach(), granularity).float()
    check_finite(rows)
    return mirror(_lloyd(rows.abs(), k // 2, iterations)) if symmetric else _lloyd(rows, k, iterations)


def mirror(half: Tensor) -> Tensor:
    """Return the symmetric table -half, half of the upper halves `[R, K/2]`, `[R, K]`, a new tensor.

    Gradient:
        Of each pair the upper level's minus the lower level's.

    >>> mirror(torch.tensor([[1.0, 3.0]]))
    tensor([[-3., -1.,  1.,  3.]])
    """
    return torch.cat([-half.flip(1), half], 1)


def quantize(weight: Tensor, table: Tensor, bits: int) -> LevelsTensor:
    """Find the code of each weight's nearest level, of two as near the upper one.

    Args, Raises:
        As in `fake_quantize`; bits 1 to 8, with K = 2^bits.

    Returns:
        A `LevelsTensor`, new, that holds a copy of the table.
    """
    if table.shape[1] != _number_of_levels(bits):
        raise ValueError(f"learned_levels: {bits} bits have {1 << bits} levels, got {table.shape[1]}")
    _, index = _nearest(weight.detach(), table.detach())
    codes = (index.short() - (1 << (bits - 1))).to(torch.int8)
    return LevelsTensor(codes, table.detach().float().clone(), bits)


def fake_quantize(weight: Tensor, table: Tensor) -> Tensor:
    """Return each weight's nearest level, of two as near the upper one.

    Args:
        weight: float tensor `[C, ...]`, finite; compared in float32.
        table: float `[1, K]` or `[C, K]`, K = 2 to 256, finite, rows sorted; `mirror` makes symmetric ones.

    Returns:
        The weight's shape, dtype and strides, a new tensor.

    Raises:
        ValueError: a table of another shape or not sorted (`settle` keeps it so after an update).
        NumericsError: the weight or the table has values that are not finite.

    Gradient:
        The weight gets the gradient at the quantized weight, everywhere. A level gets the sum of it over the
        n weights that use it, times 1 / sqrt(n); 0 if none does. The sum alone is the true gradient, but its
        variance grows as n where the weights' gradients are independent; the scale keeps it at the size of
        one weight's, so that one learning rate suits both. Summed in float64, on a CPU in a fixed order.
    """
    return _NearestLevel.apply(weight, table)


def settle(weight: Tensor, table: Tensor, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Put table and latent weights in order after an optimizer's update.

    The table is sorted, then each weight is clamped into the cell of its nearest new level. Cells end half
    way between levels, where no clamp can bind; so this only stops weights that leave the outermost cells,
    which are as wide outward as inward (half the gap to the neighbour). Without it a weight could run so far
    from the levels that it never comes back to change its code. Where all levels of a row are equal, cells
    have no width and the row's weights are left as they are.

    Args:
        weight: latent float weights `[C, ...]`.
        table: `[1, K]` or `[C, K]`, in any order.
        symmetric: the table is `mirror(half)`, and becomes that of the sorted absolute values of the half.
            A table that is not symmetric counts as the mean of itself and its mirror image.

    Returns:
        The weight (its shape, dtype and strides) and the table, new tensors without gradient. What is not
        finite is left to the next `fake_quantize` to refuse.
    """
    table = table.detach()
    if symmetric:
        lower, upper = table.double().chunk(2, 1)
        table = mirror((upper - lower.flip(1)) / 2).to(table.dtype)
    table = table.sort(1)[0]  # of a mirrored table too: sorting its pairs -l, l sorts |l|
    wide = table.double()
    margin, unequal = wide.diff(dim=1) / 2, wide[:, -1] > wide[:, 0]
    low = torch.where(unequal, wide[:, 0] - margin[:, 0], -torch.inf).float()
    high = torch.where(unequal, wide[:, -1] + margin[:, -1], torch.inf).float()
    if len(table) == 1:
        low, high = low[0], high[0]
    clamped = torch.maximum(weight.detach(), per_row(low, weight.ndim))  # half the time of clamp
    torch.minimum(clamped, per_row(high, weight.ndim), out=clamped)
    return clamped.to(weight.dtype), table


class _NearestLevel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, table: Tensor) -> Tensor:
        value, index = _nearest(weight, table)
        ctx.save_for_backward(index, table)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        index, table = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return grad, None
        sums, uses = native.sums_of_levels(grad, index, table) or _sums_of_levels(grad, index, table)
        return grad, (sums / uses.clamp_min(1).sqrt()).to(table.dtype)


def _number_of_levels(bits: int) -> int:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"format 'learned_levels' has widths {MIN_BITS} to {MAX_BITS}, got {bits}")
    return 1 << bits


def _nearest(weight: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return each weight's nearest level, with its dtype and strides, and the level's index, uint8, both of
    its shape; after a look at both arguments.
    """
    rows, k = table.shape
    if rows not in (1, weight.shape[0]) or not 2 <= k <= 1 << MAX_BITS:
        shapes = f"{list(table.shape)} for a weight {list(weight.shape)}"
        raise ValueError(f"learned_levels: the table must have shape [1 or C, 2 to 256], got {shapes}")
    return native.nearest_of_table(weight, table) or _nearest_of_table(weight, table)


def _nearest_of_table(weight: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    rows = weight.reshape(len(table), -1)
    finite = torch.isfinite(torch.stack([*rows.aminmax(), *table.aminmax()])).all()
    in_order = (table[:, 1:] >= table[:, :-1]).all()
    if bool(finite & in_order):
        index = torch.searchsorted(_borders(table), rows.float().contiguous(), right=True)
        value = torch.empty_like(weight).copy_(table.gather(1, index).view(weight.shape))
        return value, index.to(torch.uint8).view(weight.shape)
    if bool(finite):
        raise ValueError("learned_levels: the levels of each row must be sorted; settle them after an update")
    raise NumericsError("a weight or its levels have values that are not finite")


def _sums_of_levels(grad: Tensor, index: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return of each level the sum of gradients and the number of weights that have it, float64 `[R, K]`."""
    zeros = torch.zeros_like(table, dtype=torch.float64)
    index = index.reshape(len(table), -1).long()
    flat = grad.reshape(index.shape).double()
    return zeros.scatter_add(1, index, flat), zeros.scatter_add(1, index, torch.ones_like(flat))


def _borders(table: Tensor) -> Tensor:
    """Return where the nearest level changes, `[R, K]` -> float32 `[R, K-1]`.

    Each is the least float32 not below the midpoint, so that `w >= border` is exact for a float32 w (up to
    the rounding of the midpoint to float64, where one level is 2^29 times the other).
    """
    middle = (table[:, 1:].double() + table[:, :-1].double()) / 2
    border = middle.float()
    above = torch.nextafter(border, torch.full_like(border, torch.inf))
    return torch.where(border.double() < middle, above, border)


def _lloyd(rows: Tensor, k: int, iterations: int) -> Tensor:
    """Return the better levels of the two starts for each row, float32 `[R, N]` -> `[R, k]`, sorted."""
    x = rows.sort(1)[0].double()
    sums = pad(x.cumsum(1), (1, 0))
    found = [_iterate(x, sums, start(x, k), iterations).float() for start in (_companded, _quantiles)]
    error, other = (_squared_error(x, levels) for levels in found)
    return torch.where(other < error * (1 - 1e-9), found[1], found[0])  # a tie by rounding is a tie


def _iterate(x: Tensor, sums: Tensor, levels: Tensor, iterations: int) -> Tensor:
    """Move levels to the means of their cells until no cell changes, at most `iterations` times; float64."""
    before = None
    for _ in range(iterations):
        ends = torch.searchsorted(x, (levels[:, 1:] + levels[:, :-1]) / 2)
        if before is not None and torch.equal(ends, before):
            break
        before, levels = ends, _means(x, sums, ends, levels)
    return levels


def _means(x: Tensor, sums: Tensor, ends: Tensor, levels: Tensor) -> Tensor:
    """Return each cell's mean, or the old level of an empty one; `sums[:, i]` adds up the first i of x."""
    n = x.shape[1]
    first, last = pad(ends, (1, 0)), pad(ends, (0, 1), value=n)
    mean = (sums.gather(1, last) - sums.gather(1, first)) / (last - first)
    smallest, largest = x.gather(1, first.clamp_max(n - 1)), x.gather(1, (last - 1).clamp_min(0))
    mean = mean.maximum(smallest).minimum(largest)  # a difference of long sums may lie just outside
    return torch.where(last > first, mean, levels)


def _squared_error(x: Tensor, levels: Tensor) -> Tensor:
    """Return the error of each row at its nearest levels, float64 `[R, 1]`."""
    index = torch.searchsorted((levels[:, 1:].double() + levels[:, :-1].double()) / 2, x, right=True)
    return (x - levels.double().gather(1, index)).square().sum(1, keepdim=True)


def _companded(x: Tensor, k: int) -> Tensor:
    """Spread k levels as the cube root of the density, the best spread of many levels (Panter, Dite 1951).

    The gaps between sorted weights are 1 / (N * density), so the sum of gap^(2/3) grows along x as the
    integral of density^(1/3). A gap counts for one level at most: no outlier draws more. On 10^5 Gaussian or
    Laplace weights 100 iterations from here end within .8 % of 3000 iterations at 1 to 8 bits; at 8 bits they
    end 2.5 and 4.7 times as high from equal steps between the extremes, 4.3 and 10 times from quantiles.
    """
    at = torch.linspace(0, x.shape[1] - 1, max(2, min(x.shape[1], _MAX_KNOTS)), dtype=torch.float64)
    knots = x[:, at.round().long().to(x.device)]
    gaps = knots.diff(dim=1)
    growth = (gaps / (knots[:, -1:] - knots[:, :1]).clamp_min(_TINY)) ** (2 / 3)
    for _ in range(4):  # capping lowers the sum, which lowers the cap
        growth = growth.minimum(growth.cumsum(1)[:, -1:] / k)
    total = growth.cumsum(1)
    goal = total[:, -1:] * (torch.arange(k, dtype=torch.float64, device=x.device) + 0.5) / k
    i = torch.searchsorted(total, goal)
    beyond = (total.gather(1, i) - goal) / growth.gather(1, i).clamp_min(_TINY)
    return (knots.gather(1, i + 1) - gaps.gather(1, i) * beyond).sort(1)[0]  # rounding may swap equal ones


def _quantiles(x: Tensor, k: int) -> Tensor:
    """Take k weights of equally spaced ranks.

    Often better for few weights: with 9 Gaussian weights a row, as in 3 x 3 depthwise kernels, and 3 bits the
    two starts together end at a quarter of the error of `_companded` alone, and at 0 where N <= k.
    """
    rank = (torch.arange(k, device=x.device) * 2 + 1) * x.shape[1] // (2 * k)
    return x[:, rank]
