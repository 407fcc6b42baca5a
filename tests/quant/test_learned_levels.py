"""Learned levels against plain loops: Lloyd's iteration, every level for every weight, each gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lbdet.errors import NumericsError
from lbdet.quant import learned_levels as ll

WIDTHS = range(ll.MIN_BITS, ll.MAX_BITS + 1)
GRANULARITIES = ("per_tensor", "per_channel")
FLOAT32_MAX = torch.finfo(torch.float32).max


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(n: int) -> Tensor:
    """Evenly spaced numbers in (0, 1): with an inverse distribution function, a sample without chance."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def mixed_rows() -> Tensor:
    rows = gaussian(6, 50) * torch.tensor([1.0, 0.0, 2.0**-140, 2.0**100, 1e-3, 7.0])[:, None]
    rows[5, 1:] = 0
    return rows


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "gaussian": lambda: gaussian(4, 8, 3, 3) * 0.02,
    "depthwise": lambda: gaussian(20, 1, 3, 3),
    "integers": lambda: (gaussian(4, 60) * 2).round(),
    "off centre": lambda: gaussian(2, 100) * 1e-3 + 100,
    "two heaps": lambda: torch.cat([gaussian(2, 60) - 20, gaussian(2, 60, seed=1) * 0.1 + 5], 1),
    "wide range": lambda: gaussian(3, 80) * 2.0 ** (20 * gaussian(3, 80, seed=2)),
    "subnormal": lambda: gaussian(3, 60) * 2.0**-130,
    "huge": lambda: gaussian(3, 60).clamp(-2, 2) * 2.0**126,
    "float32 max": lambda: torch.tensor([[FLOAT32_MAX, -FLOAT32_MAX, 1e38, 1.0]]),
    "one element": lambda: torch.tensor([[-0.3]]),
    "equal": lambda: torch.full((2, 30), 0.7),
    "zeros": lambda: torch.tensor([[0.0, -0.0, 0.0], [-0.0, -0.0, 0.0]]),
    "one outlier": lambda: torch.cat([torch.tensor([[1000.0]]), gaussian(1, 200)], 1),
    "mixed rows": mixed_rows,
}


def rows_of(weight: Tensor, granularity: str) -> Tensor:
    return weight.reshape(1, -1) if granularity == "per_tensor" else weight.reshape(len(weight), -1)


def exact(x: float) -> int:
    """Return x as a multiple of 2^-149, which every float32 is."""
    assert (x * 2.0**149).is_integer()
    return int(x * 2.0**149)


def nearest_index(weight: float, levels: Sequence[float]) -> int:
    """Try every level in exact arithmetic; of two as near the upper one."""
    distances = [abs(exact(weight) - exact(level)) for level in levels]
    best = min(distances)
    return max(i for i, distance in enumerate(distances) if distance == best)


def lloyd_by_loops(row: Sequence[float], levels: Sequence[float], iterations: int) -> list[float]:
    """Assign each weight to its nearest level, move each level to the mean of its weights, repeat."""
    moved = list(levels)
    for _ in range(iterations):
        borders = [(a + b) / 2 for a, b in itertools.pairwise(moved)]
        cells: list[list[float]] = [[] for _ in moved]
        for w in row:
            cells[sum(w >= border for border in borders)].append(w)
        moved = [math.fsum(cell) / len(cell) if cell else old for cell, old in zip(cells, moved, strict=True)]
    return moved


def error_of(weight: Tensor, table: Tensor) -> float:
    return oracles.squared_error(weight, ll.fake_quantize(weight, table))


# Lloyd-Max


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits, error", [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_reaches_the_known_error_on_gaussian_weights(bits: int, error: float, symmetric: bool) -> None:
    weight = torch.special.ndtri(spread(100_000)).float()
    found = error_of(weight, ll.lloyd_max(weight, bits, symmetric=symmetric)) / len(weight)
    assert found == pytest.approx(error, rel=0.005)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits, error", [(1, 0.5), (2, 0.1762), (3, 0.0545), (4, 0.0154)])
def test_lloyd_reaches_the_known_error_on_laplace_weights(bits: int, error: float, symmetric: bool) -> None:
    u = spread(100_000) - 0.5
    weight = (-u.sign() * (1 - 2 * u.abs()).log() / math.sqrt(2)).float()
    found = error_of(weight, ll.lloyd_max(weight, bits, symmetric=symmetric)) / len(weight)
    assert found == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("bits", [6, 8])
def test_many_levels_start_at_the_limit_for_many_levels_and_do_not_get_worse(bits: int) -> None:
    weight = torch.special.ndtri(spread(200_000)).float()
    limit = math.sqrt(3) * math.pi / 2 / 4**bits  # Panter and Dite's, of a Gaussian
    start, end = (error_of(weight, ll.lloyd_max(weight, bits, iterations=i)) / len(weight) for i in (0, 100))
    assert start < 1.05 * limit
    assert 0.95 * limit < end < 1.005 * limit
    assert end < start


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [1, 2, 3, 5])
@pytest.mark.parametrize("name", WEIGHTS)
def test_lloyd_equals_plain_loops_from_the_better_start(name: str, bits: int, granularity: str) -> None:
    weight = WEIGHTS[name]()
    for iterations in (0, 1, 4):
        table = ll.lloyd_max(weight, bits, granularity, iterations=iterations)
        for row, found in zip(rows_of(weight, granularity), table, strict=True):
            x = row.double().sort()[0][None]
            starts = [start(x, 2**bits)[0].tolist() for start in (ll._companded, ll._quantiles)]
            ends = [torch.tensor([lloyd_by_loops(row.tolist(), s, iterations)]).float() for s in starts]
            best = min(error_of(row, end) for end in ends)
            assert error_of(row, found[None]) == pytest.approx(best, rel=1e-6, abs=0)
            atol = 1e-9 * row.abs().max().item()
            assert any(torch.allclose(found.double(), e[0].double(), rtol=1e-6, atol=atol) for e in ends)


def companded_by_loops(row: list[float], k: int) -> list[float]:
    """Walk along the sorted weights at speed gap^(-1/3), a gap taking the time of one level at most."""
    gaps = [b - a for a, b in itertools.pairwise(row)]
    times = [(gap / (row[-1] - row[0])) ** (2 / 3) for gap in gaps]
    for _ in range(4):
        one_level = sum(times) / k
        times = [min(t, one_level) for t in times]
    levels = []
    for i in range(k):
        left, j = sum(times) * (i + 0.5) / k, 0
        while left > times[j]:
            left, j = left - times[j], j + 1
        levels.append(row[j] + gaps[j] * left / times[j])
    return levels


@pytest.mark.parametrize("bits", [1, 3, 6])
@pytest.mark.parametrize("name", ["gaussian", "depthwise", "off centre", "two heaps", "one outlier"])
def test_the_companded_start_equals_plain_loops(name: str, bits: int) -> None:
    row = WEIGHTS[name]()[0].flatten().double().sort()[0]
    expected = torch.tensor(companded_by_loops(row.tolist(), 2**bits), dtype=torch.float64)
    torch.testing.assert_close(ll._companded(row[None], 2**bits)[0], expected, rtol=1e-9, atol=1e-9)


def test_the_other_start_takes_the_weights_in_the_middle_of_equal_parts() -> None:
    x = torch.arange(12, dtype=torch.float64)[None]
    assert ll._quantiles(x, 4).tolist() == [[1.0, 4.0, 7.0, 10.0]]
    assert ll._quantiles(x[:, :3], 8).tolist() == [[0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 2.0]]


def assert_every_used_level_is_the_mean_of_its_cell(row: Tensor, levels: Tensor) -> None:
    sums_round = 2.0**-50 * row.double().abs().sum().item()  # sums of all smaller weights, in float64
    cells: dict[int, list[float]] = {}
    for w in row.tolist():
        cells.setdefault(nearest_index(w, levels.tolist()), []).append(w)
    for i, cell in cells.items():
        atol = 1e-6 * max(abs(w) for w in cell) + 2.0**-149 + sums_round
        assert levels[i].item() == pytest.approx(math.fsum(cell) / len(cell), rel=1e-6, abs=atol)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("name", WEIGHTS)
def test_levels_are_the_means_of_the_cells_between_midpoints(name: str, bits: int, granularity: str) -> None:
    weight = WEIGHTS[name]()
    table = ll.lloyd_max(weight, bits, granularity)
    for row, levels in zip(rows_of(weight, granularity), table, strict=True):
        assert_every_used_level_is_the_mean_of_its_cell(row, levels)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=12),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
)
def test_any_row_gets_finite_sorted_levels_that_are_means(
    weights: list[float], bits: int, symmetric: bool
) -> None:
    row = torch.tensor(weights)
    table = ll.lloyd_max(row[None], bits, symmetric=symmetric)
    assert torch.isfinite(table).all()
    assert (table.diff(dim=1) >= 0).all()
    if symmetric:
        assert torch.equal(table, -table.flip(1))
        assert_every_used_level_is_the_mean_of_its_cell(row.abs(), table[0, 2 ** (bits - 1) :])
    else:
        assert_every_used_level_is_the_mean_of_its_cell(row, table[0])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_no_iteration_makes_the_error_larger(name: str, symmetric: bool) -> None:
    weight = WEIGHTS[name]()
    tables = [ll.lloyd_max(weight, 3, symmetric=symmetric, iterations=i) for i in (0, 1, 2, 5, 100)]
    errors = [error_of(weight, table) for table in tables]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))


def test_iterations_stop_where_no_border_passes_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    means, moves = ll._means, []
    monkeypatch.setattr(ll, "_means", lambda *args: moves.append(0) or means(*args))
    weight = gaussian(3, 50)
    table = ll.lloyd_max(weight, 3, "per_channel", iterations=1000)
    assert len(moves) < 100
    assert torch.equal(table, ll.lloyd_max(weight, 3, "per_channel", iterations=100))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_levels_are_finite_and_sorted_for_every_row(
    name: str, bits: int, symmetric: bool, granularity: str
) -> None:
    weight = WEIGHTS[name]()
    table = ll.lloyd_max(weight, bits, granularity, symmetric)
    assert table.dtype == torch.float32
    assert table.shape == (1 if granularity == "per_tensor" else len(weight), 2**bits)
    assert torch.isfinite(table).all()
    assert (table[:, 1:] >= table[:, :-1]).all()
    if symmetric:
        assert torch.equal(table, -table.flip(1))


@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_of_no_more_weights_than_levels_are_kept_exactly(bits: int) -> None:
    weight = gaussian(50, 2**bits if bits < 6 else 33)
    assert torch.equal(ll.fake_quantize(weight, ll.lloyd_max(weight, bits, "per_channel")), weight)


def test_rows_with_fewer_distinct_weights_than_levels_are_kept_exactly() -> None:
    weight = torch.tensor([[3.0, 3.0, 3.0, 3.0, 3.0, 3.0], [0.1, 0.1, 0.1, -5.0, 0.7, 0.7]]).repeat(1, 20)
    assert torch.equal(ll.fake_quantize(weight, ll.lloyd_max(weight, 2, "per_channel")), weight)
    assert not ll.fake_quantize(torch.zeros(2, 9), ll.lloyd_max(torch.zeros(2, 9), 4, symmetric=True)).any()


def test_an_outlier_takes_one_level_and_leaves_the_others_where_the_weights_are() -> None:
    table = ll.lloyd_max(WEIGHTS["one outlier"](), 4)
    assert table[0, -1] == 1000
    assert table[0, -2] < 4


def test_one_symmetric_bit_is_plus_and_minus_the_mean_magnitude() -> None:
    weight = gaussian(5, 40) + 0.3
    mean = weight.double().abs().mean(1).float()
    expected = torch.stack([-mean, mean], 1)
    torch.testing.assert_close(ll.lloyd_max(weight, 1, "per_channel", True), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_symmetric_levels_are_those_of_the_magnitudes_with_one_bit_less(bits: int) -> None:
    weight = gaussian(3, 90)
    half = ll.lloyd_max(weight.abs(), bits - 1, "per_channel")
    assert torch.equal(ll.lloyd_max(weight, bits, "per_channel", True), torch.cat([-half.flip(1), half], 1))


@pytest.mark.parametrize("k", [-20, 3])
@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_scale_with_the_weights_by_powers_of_two(bits: int, k: int) -> None:
    weight = gaussian(4, 300)
    assert torch.equal(ll.lloyd_max(weight * 2.0**k, bits), ll.lloyd_max(weight, bits) * 2.0**k)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_per_channel_equals_stacked_per_tensor(bits: int, symmetric: bool) -> None:
    weight = torch.cat([mixed_rows(), gaussian(3, 50, seed=1)])
    table = ll.lloyd_max(weight, bits, "per_channel", symmetric)
    one_by_one = [ll.lloyd_max(row, bits, "per_tensor", symmetric) for row in weight]
    assert torch.equal(table, torch.cat(one_by_one))
    q = ll.quantize(weight, table, bits)
    rows = [ll.quantize(row, t, bits) for row, t in zip(weight, one_by_one, strict=True)]
    assert torch.equal(q.codes, torch.stack([r.codes for r in rows]))
    assert torch.equal(q.dequantize(), torch.stack([r.dequantize() for r in rows]))
    moved = weight * 3
    settled = ll.settle(moved, table, symmetric)
    each = [ll.settle(row, t, symmetric) for row, t in zip(moved, one_by_one, strict=True)]
    assert torch.equal(settled[0], torch.stack([w for w, _ in each]))
    assert torch.equal(settled[1], torch.cat([t for _, t in each]))


# Codes


def next_to(level: float, steps: int) -> float:
    for _ in range(steps):
        level = torch.nextafter(torch.tensor(level), torch.tensor(math.inf)).item()
    return level


TABLES = {
    "gaussian": gaussian(8).sort()[0].tolist(),
    "many": gaussian(256).sort()[0].tolist(),
    "neighbours in float32": [next_to(0.3, i) for i in range(4)],
    "neighbours with the other parity": [next_to(0.3, i) for i in range(1, 5)],
    "negative neighbours": sorted(-next_to(0.3, i) for i in range(4)),
    "an odd number of steps apart": [next_to(1.0, i) for i in (0, 1, 4, 11)],
    "subnormal": [2.0**-149 * i for i in (-7, -1, 0, 1, 2, 5, 10, 11)],
    "wide": [-1e7, -1.0, -1e-5, 1e-9, 1e-3, 1.0, 3.0, 1e6],
    "huge": [-FLOAT32_MAX, FLOAT32_MAX],
    "equal pairs": [-1.0, -1.0, 0.25, 0.25],
    "all equal": [0.5, 0.5],
    "symmetric": [-2.0, -0.5, 0.5, 2.0],
}


@pytest.mark.parametrize("name", TABLES)
def test_every_weight_next_to_every_border_gets_the_nearest_level(name: str) -> None:
    levels = torch.tensor(TABLES[name]).tolist()
    bits = len(levels).bit_length() - 1
    borders = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(levels)], dtype=torch.float64).float()
    centre = torch.cat([borders, torch.tensor([*levels, 0.0, -0.0, FLOAT32_MAX, -FLOAT32_MAX])])
    weight = torch.cat([centre, *torch.nextafter(centre, torch.tensor([-3e38, 3e38])[:, None])])
    q = ll.quantize(weight, torch.tensor([levels]), bits)
    expected = [nearest_index(w, levels) for w in weight.tolist()]
    assert q.dequantize().tolist() == [levels[i] for i in expected]
    if len(set(levels)) == len(levels):
        assert q.codes.tolist() == [i - len(levels) // 2 for i in expected]


def test_a_weight_half_way_between_two_levels_goes_to_the_upper_one() -> None:
    table = torch.tensor([[-3.0, -1.0, 1.0, 3.0]])
    assert ll.quantize(torch.tensor([-2.0, 0.0, -0.0, 2.0]), table, 2).codes.tolist() == [-1, 0, 0, 1]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_quantized_weights_are_the_nearest_of_all_levels(granularity: str, bits: int) -> None:
    weight = gaussian(3, 2, 3, 3)
    table = ll.lloyd_max(gaussian(3, 500, seed=1), bits, granularity)
    q = ll.quantize(weight, table, bits)
    assert (q.codes.dtype, q.codes.shape) == (torch.int8, weight.shape)
    assert q.dequantize().dtype == torch.float32
    assert torch.equal(ll.fake_quantize(weight, table), q.dequantize())
    tables = table.expand(len(rows_of(weight, granularity)), -1)
    for row, levels, found in zip(
        rows_of(weight, granularity), tables, rows_of(q.dequantize(), granularity), strict=True
    ):
        assert found.tolist() == [levels[nearest_index(w, levels.tolist())].item() for w in row.tolist()]


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_count_the_levels_from_minus_half_their_number(bits: int) -> None:
    levels = gaussian(2, 2**bits).sort(1)[0]
    q = ll.quantize(levels, levels, bits)
    half = 2 ** (bits - 1)
    assert q.codes.tolist() == [list(range(-half, half))] * 2
    assert torch.equal(q.dequantize(), levels)
    assert torch.equal(ll.fake_quantize(q.dequantize(), levels), levels)


def test_the_levels_of_one_row_are_a_vector_and_of_several_a_matrix() -> None:
    weight = gaussian(5, 20)
    one, many = (ll.quantize(weight, ll.lloyd_max(weight, 3, g), 3) for g in GRANULARITIES)
    assert (one.levels.shape, many.levels.shape) == ((8,), (5, 8))
    assert torch.equal(one.levels, one.table[0])
    assert torch.equal(many.levels, many.table)


def test_a_quantized_weight_does_not_follow_its_table() -> None:
    table = torch.tensor([[-1.0, 1.0]])
    q = ll.quantize(torch.tensor([-0.5, 0.5]), table, 1)
    table.zero_()
    assert q.dequantize().tolist() == [-1.0, 1.0]


# The gradient


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_levels_gradient_is_the_sum_over_its_weights_divided_by_the_root_of_their_number(
    granularity: str, bits: int
) -> None:
    weight = gaussian(3, 4, 5).requires_grad_()
    table = ll.lloyd_max(weight, bits, granularity).requires_grad_()
    grad = gaussian(3, 4, 5, seed=7)
    ll.fake_quantize(weight, table).backward(grad)
    assert weight.grad is not None
    assert table.grad is not None
    assert torch.equal(weight.grad, grad)
    rows = zip(rows_of(weight, granularity), rows_of(grad, granularity), strict=True)
    for r, (row, g) in enumerate(rows):
        of_level: dict[int, list[float]] = {}
        for w, dw in zip(row.tolist(), g.tolist(), strict=True):
            of_level.setdefault(nearest_index(w, table[r].tolist()), []).append(dw)
        expected = [
            math.fsum(of_level.get(k, [])) / math.sqrt(len(of_level.get(k, [0]))) for k in range(2**bits)
        ]
        torch.testing.assert_close(table.grad[r], torch.tensor(expected), rtol=1e-6, atol=1e-7)


def test_a_level_without_weights_has_no_gradient() -> None:
    table = torch.tensor([[-9.0, -1.0, 1.0, 9.0]], requires_grad=True)
    ll.fake_quantize(torch.tensor([-1.2, 0.7, 0.8]), table).sum().backward()
    assert table.grad is not None
    assert table.grad.tolist() == [[0.0, 1.0, pytest.approx(2 / math.sqrt(2)), 0.0]]


def test_large_gradients_that_cancel_do_not_swallow_a_small_one() -> None:
    table = torch.tensor([[0.0, 1.0]], requires_grad=True)
    ll.fake_quantize(torch.ones(4), table).backward(torch.tensor([1e8, 1.0, -1e8, 0.0]))
    assert table.grad is not None
    assert table.grad.tolist() == [[0.0, 0.5]]


def test_the_half_of_a_symmetric_table_gets_the_upper_gradient_minus_the_lower() -> None:
    half = torch.tensor([[0.5, 2.0]], requires_grad=True)
    weight = torch.tensor([-2.2, -1.9, -0.4, 0.3, 0.6, 3.0])
    ll.fake_quantize(weight, ll.mirror(half)).backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]))
    assert half.grad is not None
    expected = [24 / math.sqrt(2) - 4, 32 - 3 / math.sqrt(2)]
    assert half.grad[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_the_gradient_is_the_same_bit_for_bit_on_any_number_of_threads() -> None:
    weight, threads = gaussian(2, 40_000), torch.get_num_threads()
    for granularity in GRANULARITIES:
        table = ll.lloyd_max(weight, 2, granularity).requires_grad_()
        grads = []
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            (grad,) = torch.autograd.grad(ll.fake_quantize(weight, table), table, gaussian(2, 40_000, seed=1))
            grads.append(grad)
        torch.set_num_threads(threads)
        assert torch.equal(grads[0], grads[1])
        assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_kept_forward_and_backward(dtype: torch.dtype) -> None:
    weight = gaussian(4, 9).to(dtype).requires_grad_()
    table = ll.lloyd_max(weight, 2, "per_channel").requires_grad_()
    result = ll.fake_quantize(weight, table)
    result.sum().backward()
    assert result.dtype == dtype
    expected = ll.quantize(weight, table, 2).dequantize().to(dtype)
    assert torch.equal(result, expected)
    assert weight.grad is not None
    assert table.grad is not None
    assert (weight.grad.dtype, table.grad.dtype) == (dtype, torch.float32)
    settled, _ = ll.settle(weight, table)
    assert settled.dtype == dtype


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda w: w,
    "channels last": lambda w: w.to(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(1, 3),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_kept_and_do_not_matter(layout: str, granularity: str) -> None:
    weight = LAYOUTS[layout](gaussian(4, 3, 2, 5))
    table = (ll.lloyd_max(weight, 3, granularity) * 0.3).requires_grad_()
    grad = gaussian(4, 3, 2, 5, seed=5).reshape(weight.shape)
    for w, g in ((weight, grad.to(memory_format=torch.channels_last)), (weight.contiguous(), grad)):
        result = ll.fake_quantize(w, table)
        settled, _ = ll.settle(w * 2, table)
        assert result.stride() == settled.stride() == w.stride()
        (found,) = torch.autograd.grad(result, table, g)
        expected = ll.fake_quantize(weight.clone(memory_format=torch.contiguous_format), table)
        assert torch.equal(result, expected)
        assert torch.equal(found, torch.autograd.grad(expected, table, grad)[0])


@pytest.mark.filterwarnings("error")
def test_every_second_channel_of_a_weight_can_be_quantized() -> None:
    weight = gaussian(6, 10)[::2]
    table = ll.lloyd_max(weight, 2, "per_channel")
    assert torch.equal(ll.fake_quantize(weight, table), ll.fake_quantize(weight.clone(), table))


@pytest.mark.parametrize("symmetric", [False, True])
def test_arguments_are_not_changed_and_results_are_new(symmetric: bool) -> None:
    weight, table = gaussian(4, 9), torch.tensor([[-0.2, -0.1, 0.1, 0.2]]).repeat(4, 1)
    before = weight.clone(), table.clone()
    ll.lloyd_max(weight, 2, "per_channel", symmetric)
    ll.quantize(weight, table, 2)
    results = [ll.fake_quantize(weight, table), *ll.settle(weight, table, symmetric)]
    for result in results:
        result.fill_(7)
    assert torch.equal(weight, before[0])
    assert torch.equal(table, before[1])


# settle


def settled_by_loops(row: Sequence[float], levels: Sequence[float]) -> list[float]:
    """Assign each weight to its nearest level, then clamp it into that level's cell."""
    levels = sorted(levels)
    gaps = [b - a for a, b in itertools.pairwise(levels)]
    result = []
    for w in row:
        i = nearest_index(w, levels)
        low = levels[i] - gaps[max(i - 1, 0)] / 2
        high = levels[i] + gaps[min(i, len(gaps) - 1)] / 2
        result.append(w if levels[0] == levels[-1] else min(max(w, low), high))
    return result


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_settled_weights_lie_in_the_cell_of_their_nearest_sorted_level(bits: int) -> None:
    weight, table = gaussian(4, 60) * 3, gaussian(4, 2**bits, seed=1)
    settled, levels = ll.settle(weight, table)
    assert torch.equal(levels, table.sort(1)[0])
    for row, t, found in zip(weight, table, settled, strict=True):
        expected = torch.tensor(settled_by_loops(row.tolist(), t.tolist()))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    inside = (weight >= levels[:, :1]) & (weight <= levels[:, -1:])
    assert torch.equal(settled[inside], weight[inside])
    assert not torch.equal(settled, weight)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_settling_changes_no_code_and_a_second_time_nothing_at_all(symmetric: bool, bits: int) -> None:
    weight, table = gaussian(4, 60) * 3, gaussian(4, 2**bits, seed=1)
    settled, levels = ll.settle(weight, table, symmetric)
    again, levels_again = ll.settle(settled, levels, symmetric)
    assert torch.equal(again, settled)
    assert torch.equal(levels_again, levels)
    assert torch.equal(ll.quantize(settled, levels, bits).codes, ll.quantize(weight, levels, bits).codes)


def test_two_levels_have_cells_as_wide_outward_as_inward() -> None:
    settled, _ = ll.settle(torch.tensor([-9.0, -1.5, 0.0, 2.5, 9.0]), torch.tensor([[1.0, -1.0]]))
    assert settled.tolist() == [-2.0, -1.5, 0.0, 2.0, 2.0]


def test_a_weight_that_steps_past_a_midpoint_changes_its_code_unless_it_is_clamped_first() -> None:
    table = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    before = torch.tensor([0.9, 0.6, 1.9])
    stepped = before - torch.tensor([0.7, 0.2, 2.5])  # past a midpoint: 0.2, 0.4, -0.6
    codes_before = ll.quantize(before, table, 2).codes
    settled, levels = ll.settle(stepped, table)
    assert codes_before.tolist() == [0, 0, 1]
    assert ll.quantize(settled, levels, 2).codes.tolist() == [-1, -1, -2]
    assert torch.equal(settled, stepped)
    old_level = ll.quantize(before, table, 2).dequantize()
    clamped_first = stepped.clamp(old_level - 0.5, old_level + 0.5)
    assert torch.equal(ll.quantize(clamped_first, table, 2).codes, codes_before)


def test_a_weight_pushed_outward_for_long_comes_back_within_two_levels_width() -> None:
    weight, table = torch.tensor([0.9, -0.9]), torch.tensor([[-1.0, 1.0]])
    for _ in range(100):
        weight, table = ll.settle(weight + torch.tensor([1.0, 0.0]), table)
    weight, table = ll.settle(weight - torch.tensor([2.1, 0.0]), table)
    assert ll.quantize(weight, table, 1).codes.tolist() == [-1, -1]


def test_a_symmetric_table_stays_symmetric_sorted_and_keeps_its_magnitudes() -> None:
    half = torch.tensor([[0.7, -0.2, 0.1, 3.0], [-1.0, -2.0, -3.0, 0.0]])
    _, table = ll.settle(gaussian(2, 30), ll.mirror(half), symmetric=True)
    upper = torch.tensor([[0.1, 0.2, 0.7, 3.0], [0.0, 1.0, 2.0, 3.0]])
    assert torch.equal(table, torch.cat([-upper.flip(1), upper], 1))


def test_settling_symmetrically_makes_any_table_symmetric() -> None:
    _, table = ll.settle(torch.zeros(3), torch.tensor([[-3.0, -1.0, 2.0, 5.0]]), symmetric=True)
    assert table.tolist() == [[-4.0, -1.5, 1.5, 4.0]]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 3])
def test_a_row_of_equal_levels_leaves_its_weights_as_they_are(bits: int, symmetric: bool) -> None:
    weight = torch.tensor([[0.0, -0.3, 0.3], [5.0, -5.0, 0.5]])
    table = torch.zeros(2, 2**bits)
    table[1, 0], table[1, -1] = -1, 1
    settled, levels = ll.settle(weight, table, symmetric)
    assert torch.equal(settled[0], weight[0])
    assert torch.equal(levels[0], torch.zeros(2**bits))
    assert settled[1].abs().max() < 5


def test_huge_and_subnormal_levels_settle_without_nan() -> None:
    for scale in (FLOAT32_MAX, 2.0**-149):
        weight, table = torch.tensor([[-scale, 0.0, scale]]), torch.tensor([[scale, -scale]])
        for symmetric in (False, True):
            settled, levels = ll.settle(weight, table, symmetric)
            assert torch.equal(settled, weight)
            assert levels.tolist() == [[-scale, scale]]


def test_settled_tensors_carry_no_gradient() -> None:
    weight, table = gaussian(2, 5).requires_grad_(), gaussian(2, 4).requires_grad_()
    for symmetric in (False, True):
        assert not any(result.requires_grad for result in ll.settle(weight, table, symmetric))


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_descent_finds_the_levels_and_the_codes_of_a_target(symmetric: bool) -> None:
    values = torch.tensor([-1.3, -0.2, 0.2, 1.3] if symmetric else [-1.3, -0.2, 0.6, 0.9])
    target = values[torch.randint(4, (200,), generator=torch.Generator().manual_seed(0))]
    weight = target + 0.5 * gaussian(200)
    table = ll.lloyd_max(weight, 2, symmetric=symmetric)
    first = (ll.fake_quantize(weight, table) - target).square().sum().item()
    for _ in range(300):
        weight.requires_grad_()
        trained = (table[:, 2:] if symmetric else table).clone().requires_grad_()
        levels = ll.mirror(trained) if symmetric else trained
        loss = (ll.fake_quantize(weight, levels) - target).square().sum()
        weight_grad, table_grad = torch.autograd.grad(loss, (weight, trained))
        trained = trained.detach() - 0.01 * table_grad
        table = ll.mirror(trained) if symmetric else trained
        weight, table = ll.settle(weight.detach() - 0.02 * weight_grad, table, symmetric)
    assert first > 10
    assert (ll.fake_quantize(weight, table) - target).square().sum().item() < 1e-3 * first
    torch.testing.assert_close(table[0], values, rtol=0, atol=0.01)


# Mistakes


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_and_levels_that_are_not_finite_are_refused(bad: float) -> None:
    weight, table = gaussian(3, 4), torch.tensor([[-1.0, 1.0]]).repeat(3, 1)
    bad_weight, bad_table = weight.clone(), table.clone()
    bad_weight[1, 2], bad_table[1, 1] = bad, bad
    for granularity in GRANULARITIES:
        with pytest.raises(NumericsError, match="a weight has values that are not finite"):
            ll.lloyd_max(bad_weight, 4, granularity)
    for w, t in ((bad_weight, table), (weight, bad_table)):
        with pytest.raises(NumericsError, match="a weight or its levels have values that are not finite"):
            ll.fake_quantize(w, t)
        with pytest.raises(NumericsError, match="a weight or its levels have values that are not finite"):
            ll.quantize(w, t, 1)


def test_a_step_to_nan_is_refused_after_settling() -> None:
    for settled, table in (
        ll.settle(torch.tensor([math.nan, 0.0]), torch.tensor([[-1.0, 1.0]])),
        ll.settle(torch.tensor([0.0, 0.0]), torch.tensor([[-1.0, math.nan]])),
    ):
        with pytest.raises(NumericsError, match="not finite"):
            ll.fake_quantize(settled, table)


@pytest.mark.parametrize("bits", [0, 9])
def test_a_width_outside_the_range_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"format 'learned_levels' has widths 1 to 8, got {bits}"):
        ll.lloyd_max(torch.ones(1, 1), bits)
    with pytest.raises(ValueError, match=f"format 'learned_levels' has widths 1 to 8, got {bits}"):
        ll.quantize(torch.ones(1, 1), torch.ones(1, 2**bits), bits)


def test_a_table_that_does_not_fit_the_weight_or_the_width_is_refused() -> None:
    weight = gaussian(3, 4)
    with pytest.raises(ValueError, match=r"shape \[1 or C, 2 to 256\], got \[2, 4\] for a weight \[3, 4\]"):
        ll.fake_quantize(weight, torch.zeros(2, 4))
    for k in (1, 257):
        with pytest.raises(ValueError, match=rf"\[1 or C, 2 to 256\], got \[1, {k}\]"):
            ll.fake_quantize(weight, torch.zeros(1, k))
    with pytest.raises(ValueError, match="3 bits have 8 levels, got 4"):
        ll.quantize(weight, torch.zeros(1, 4), 3)


def test_a_table_out_of_order_is_refused() -> None:
    with pytest.raises(ValueError, match="levels of each row must be sorted; settle them after an update"):
        ll.fake_quantize(gaussian(2, 4), torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(ValueError, match="granularity must be one of per_tensor, per_channel, got 'row'"):
        ll.lloyd_max(gaussian(2, 4), 2, "row")
