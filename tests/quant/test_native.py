"""The C code gives what the PyTorch code gives, bit for bit, and only where it may be used."""

from __future__ import annotations

import ctypes
import math
import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from lbdet.errors import NumericsError
from lbdet.quant import dorefa, lbw, learned_levels, native, native_build, uniform

WIDTHS = range(lbw.MIN_BITS, lbw.MAX_BITS + 1)
GRANULARITIES = ("per_tensor", "per_channel")
SMALLEST, FLOAT32_MAX = 2.0**-149, torch.finfo(torch.float32).max
needs_compiler = pytest.mark.skipif(native_build.library() is None, reason="there is no C compiler")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits_of(x: Tensor) -> Tensor:
    """The bits of floats, so that -0.0 differs from 0.0 and nan equals itself."""
    return x.detach().contiguous().view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


def order_of(x: Tensor) -> list[int]:
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert (found.shape, found.dtype, order_of(found)) == (expected.shape, expected.dtype, order_of(expected))
    assert torch.equal(bits_of(found), bits_of(expected))


# --------------------------------------------------------------------------------------------------- LBW


def mixed_rows() -> Tensor:
    factors = torch.tensor([1.0, 0.0, 2.0**-140, 2.0**100, 1e-3, -0.0, 7.0])
    return gaussian(7, 50) * factors[:, None]


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "3 x 3": lambda: gaussian(6, 8, 3, 3) * 0.02,
    "depthwise": lambda: gaussian(60, 1, 3, 3),
    "1 x 1, channels last": lambda: gaussian(5, 6, 1, 1).to(memory_format=torch.channels_last),
    "3 x 3, channels last": lambda: gaussian(5, 6, 3, 3).to(memory_format=torch.channels_last),
    "linear": lambda: gaussian(9, 31),
    "one less than a block": lambda: gaussian(2, 1023),
    "one more than two blocks": lambda: gaussian(2, 2049),
    "heavy tails": lambda: gaussian(4, 1500) / gaussian(4, 1500, seed=1),
    "two clusters": lambda: torch.cat([torch.tensor([1.0, 0.5, 0.5, 0.5]), 0.015 + gaussian(8000) / 2000])[
        None
    ],
    "wide range": lambda: gaussian(5, 400) * 2.0 ** (20 * gaussian(5, 400, seed=2)),
    "subnormal": lambda: gaussian(4, 60) * 2.0**-130,
    "smallest subnormal": lambda: torch.tensor([[1.0, 3.0, -2.0, 0.0]]) * SMALLEST,
    "huge": lambda: gaussian(4, 60).clamp(-2, 2) * 2.0**126,
    "float32 max": lambda: torch.tensor(
        [[FLOAT32_MAX, -FLOAT32_MAX, 1e38, 1.0], [2e38, SMALLEST, 0.0, -0.0]]
    ),
    "zeros": lambda: torch.tensor([[0.0, -0.0], [-0.0, 0.0]]),
    "one element": lambda: torch.tensor([[-0.3]]),
    "equal": lambda: torch.full((2, 30), 0.75),
    "a vector": lambda: gaussian(7),
    "mixed rows": mixed_rows,
}


def assert_lbw_is_the_same(weight: Tensor, bits: int, granularity: str, ratio: float) -> None:
    arguments = weight, lbw.magnitudes(bits), ratio, granularity
    values, codes = native.lbw(*arguments, torch.float32), native.lbw(*arguments, torch.int8)
    assert values is not None
    assert codes is not None
    assert_same(values[0], lbw._values(*arguments))
    expected, s = lbw._codes(*arguments)
    assert (codes[0].dtype, codes[1].dtype, s.dtype) == (torch.int8, torch.int32, torch.int32)
    assert codes[0].stride() == weight.stride()
    assert torch.equal(codes[0], expected)
    assert torch.equal(codes[1], s)
    assert torch.equal(values[1], s)


@needs_compiler
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_lbw_is_the_same(name: str, bits: int) -> None:
    for granularity in GRANULARITIES:
        for ratio in (0.0, 0.4, 0.75, 1.5, 1e30):
            assert_lbw_is_the_same(WEIGHTS[name](), bits, granularity, ratio)


finite_bits = st.integers(0, 2**32 - 1).filter(lambda b: (b >> 23) & 0xFF != 0xFF)


@needs_compiler
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(finite_bits, min_size=1, max_size=24),
    st.integers(0, 254),
    st.sampled_from(list(WIDTHS)),
    st.sampled_from([0.0, 0.75]),
)
def test_lbw_is_the_same_for_any_float32(patterns: list[int], exponent: int, bits: int, ratio: float) -> None:
    anywhere = torch.tensor(patterns, dtype=torch.int64)
    together = anywhere & 0x807FFFFF | (exponent + (anywhere >> 23) % 5).clamp_max(254) << 23
    for chosen in (anywhere, together):  # of any magnitude, which s can never fit, and within five octaves
        weight = chosen.to(torch.int32).view(torch.float32)[None]
        assert_lbw_is_the_same(weight, bits, "per_channel", ratio)


@needs_compiler
@pytest.mark.parametrize("bits", WIDTHS)
def test_lbw_is_the_same_at_ties_between_scales_and_between_levels(bits: int) -> None:
    ties = torch.tensor([[4.0, 2.0, 2.0, 2.0, 2.0], [4.0, 2.0, 0.0, 0.0, 0.0], [6.0, 3.0, 1.5, 0.75, 0.375]])
    around = torch.cat([ties, ties.nextafter(torch.tensor(9.0)), ties.nextafter(torch.tensor(0.0))])
    for ratio in (0.0, 0.75):
        assert_lbw_is_the_same(around, bits, "per_channel", ratio)


@needs_compiler
@pytest.mark.parametrize("position", [0, 1022, 1024, 2048])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_lbw_refuses_what_is_not_finite_as_pytorch_does(bad: float, position: int) -> None:
    weight = gaussian(3, 2049)
    weight[1, position] = bad
    for solver in ("exact", "semi"):
        assert native.lbw(weight, 4, solver == "semi", "per_channel", torch.float32) is None
        with pytest.raises(NumericsError, match="a weight has values that are not finite"):
            lbw.fake_quantize(weight, 4, solver)
        with pytest.raises(NumericsError, match="a weight has values that are not finite"):
            lbw.quantize(weight, 4, solver)


# ------------------------------------------------------------------------------- equally spaced levels


def activations(scale: float, dtype: torch.dtype) -> Tensor:
    """More than two blocks, with values next to every border, and what is not finite."""
    borders = (torch.arange(-150, 150) + 0.5) * scale
    around = [borders, *(borders.nextafter(torch.tensor(end)) for end in (-math.inf, math.inf))]
    special = torch.tensor([0.0, -0.0, SMALLEST, math.inf, -math.inf, math.nan, FLOAT32_MAX])
    ends = torch.cat([*around, special])
    x = 12 * scale * gaussian(2, 3, 20, 31)
    x.view(-1)[: len(ends)] = ends
    return x.to(dtype)


def layouts(x: Tensor) -> Iterator[Tensor]:
    yield x
    yield x.to(memory_format=torch.channels_last)
    yield x.flatten()
    yield x[0, 0, 0, :1]


SCALES = [0.25, 0.003, 1 + 2**-8, 1e-30]
"""1 + 2^-8 is half way between two numbers of bfloat16"""
RANGES = [(0, 1), (0, 3), (-1, 0), (-2, 13), (-7, 7), (-128, 127)]
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@needs_compiler
@both_types
@pytest.mark.parametrize("low, high", RANGES)
@pytest.mark.parametrize("scale", SCALES)
def test_rounding_is_the_same(low: int, high: int, scale: float, dtype: torch.dtype) -> None:
    step = torch.tensor(scale)
    for x in layouts(activations(scale, dtype)):
        found = native.round_rows(x, step, low, high)
        assert found is not None
        expected = uniform._rounded(x, step, low, high)
        assert found.stride() == expected.stride() == x.stride()
        assert torch.equal(found.nan_to_num(7e30), expected.nan_to_num(7e30))
        assert torch.equal(found.isnan(), expected.isnan())


@needs_compiler
def test_no_nan_becomes_a_number() -> None:
    longest = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    found = native.round_rows(torch.ones(20, dtype=torch.bfloat16), longest, -7, 7)
    assert found is not None
    assert found.isnan().all()


def inputs_and_gradients(scale: float, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Without nan, whose gradient in PyTorch depends on its place."""
    x = activations(scale, dtype).nan_to_num(0.0, math.inf, -math.inf)
    return zip(layouts(x), layouts(gaussian(*x.shape, seed=1).to(dtype)), strict=True)


def assert_gradients_are_the_same(
    found: tuple[Tensor, Tensor] | None, expected: tuple[Tensor, Tensor | None]
) -> None:
    assert found is not None
    assert expected[1] is not None
    assert_same(found[0], expected[0])
    assert found[1].shape == expected[1].shape
    assert torch.equal(found[1].float(), expected[1].float())  # in float64 their order may show


@needs_compiler
@both_types
@pytest.mark.parametrize("low, high", RANGES)
@pytest.mark.parametrize("scale", SCALES)
def test_gradients_are_the_same(low: int, high: int, scale: float, dtype: torch.dtype) -> None:
    step = torch.tensor(scale)
    for x, grad in inputs_and_gradients(scale, dtype):
        found = native.round_gradients(grad, x, step, low, high)
        assert_gradients_are_the_same(found, uniform._gradients(grad, x, step, low, high, True))


@needs_compiler
@both_types
@pytest.mark.parametrize("clip", [0.25, 1.0, 2.7])
def test_the_gradients_of_a_clip_are_the_same(clip: float, dtype: torch.dtype) -> None:
    end = torch.tensor(clip)
    for x, grad in inputs_and_gradients(clip, dtype):
        found = native.clip_gradients(grad, x, end)
        assert_gradients_are_the_same(found, dorefa._gradients(grad, x, end, True))


@needs_compiler
@pytest.mark.parametrize("name", [name for name in WEIGHTS if name not in ("huge", "float32 max")])
def test_rounding_at_one_scale_a_channel_is_the_same(name: str) -> None:
    weight = WEIGHTS[name]()
    scale = 0.1 * (1 + gaussian(len(weight), *[1] * (weight.ndim - 1), seed=2).abs())
    grad = torch.empty_like(weight).copy_(gaussian(*weight.shape, seed=3))
    found = native.round_rows(weight, scale, -7, 7)
    assert found is not None
    assert torch.equal(found, uniform._rounded(weight, scale, -7, 7))
    gradients = native.round_gradients(grad, weight, scale, -7, 7)
    assert_gradients_are_the_same(gradients, uniform._gradients(grad, weight, scale, -7, 7, True))


# ------------------------------------------------------------------------------------- levels of any place


def table_for(weight: Tensor, rows: int, k: int) -> Tensor:
    """Sorted levels in the weight's range, some of them equal, after which some weights are on borders."""
    table = (gaussian(rows, k, seed=4).clamp(-3, 3) * weight.abs().max().clamp_max(1e38)).sort(1)[0]
    table[:, k // 2 :] = table[:, k // 2 :].maximum(table[:, k // 2, None])
    flat = weight.view(-1) if weight.is_contiguous() else weight[0, 0].view(-1)
    middle = ((table[0, 1:].double() + table[0, :-1].double()) / 2).float()[: len(flat)]
    flat[: len(middle)] = middle
    return table


@needs_compiler
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_nearest_of_a_table_and_the_sums_of_its_levels_are_the_same(name: str, granularity: str) -> None:
    weight = WEIGHTS[name]()
    grad = torch.empty_like(weight).copy_(gaussian(*weight.shape, seed=3))
    for k in (2, 3, 4, 5, 16, 17, 256):
        table = table_for(weight, 1 if granularity == "per_tensor" else len(weight), k)
        found, expected = (
            native.nearest_of_table(weight, table),
            learned_levels._nearest_of_table(weight, table),
        )
        assert found is not None
        assert_same(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        sums = native.sums_of_levels(grad, found[1], table)
        assert sums is not None
        assert_sums_are_the_same(sums, learned_levels._sums_of_levels(grad, found[1], table))


def assert_sums_are_the_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(found[1], expected[1])


@needs_compiler
@pytest.mark.parametrize("position", [0, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_tables_and_weights_that_pytorch_refuses_are_left_to_it(bad: float, position: int) -> None:
    weight, table = gaussian(3, 50), torch.tensor([[-1.0, 0.5, 0.7]])
    for where in (weight, table):
        spoilt = where.clone()
        spoilt[0, position] = bad
        arguments = (spoilt, table) if where is weight else (weight, spoilt)
        assert native.nearest_of_table(*arguments) is None
        with pytest.raises(NumericsError, match="a weight or its levels have values that are not finite"):
            learned_levels.fake_quantize(*arguments)
    assert native.nearest_of_table(weight, table.flip(1)) is None
    with pytest.raises(ValueError, match="must be sorted"):
        learned_levels.fake_quantize(weight, table.flip(1))


# ----------------------------------------------------------------------------------------- where it is used


class Calls:
    """The C code, and the names of its functions that were called."""

    def __init__(self, code: ctypes.CDLL) -> None:
        self.code, self.names = code, []

    def __getattr__(self, name: str) -> Callable[..., int]:
        self.names.append(name)
        return getattr(self.code, name)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    code = native._functions()
    assert code is not None
    found = Calls(code)
    monkeypatch.setattr(native, "_functions", lambda: found)
    return found


WEIGHT, TABLE, ONE = gaussian(4, 3, 3, 3), torch.tensor([[-1.0, -0.2, 0.4, 1.0]]), torch.tensor(0.3)
PUBLIC: dict[str, Callable[[Tensor], Tensor]] = {
    "lbw": lambda w: lbw.fake_quantize(w, 4),
    "round_rows": lambda w: uniform.fake_quantize(w, ONE, -7, 7),
    "nearest_of_table": lambda w: learned_levels.fake_quantize(w, TABLE),
}


@needs_compiler
def test_the_quantizers_use_it_forward_and_backward(calls: Calls) -> None:
    weight, scales = nn.Parameter(WEIGHT.clone()), nn.Parameter(torch.zeros(4))
    clip, table = nn.Parameter(torch.tensor(1.0)), nn.Parameter(TABLE.clone())
    lbw.quantize(weight, 4)
    lbw.fake_quantize(weight, 4, "semi").sum().backward()
    uniform.fake_quantize_learned(weight, scales, -7, 7, 1.0).square().sum().backward()
    dorefa.fake_quantize_activation(weight, clip, 4).square().sum().backward()
    learned_levels.fake_quantize(weight, table).square().sum().backward()
    equally_spaced = ["round_rows", "gradient_rows"]
    assert calls.names == ["lbw", "lbw", *equally_spaced * 2, "nearest_of_table", "sums_of_levels"]


@needs_compiler
@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize(
    "weight",
    [
        WEIGHT.double(),
        WEIGHT.half(),
        WEIGHT.transpose(0, 1),
        WEIGHT[:, :, ::2],
        WEIGHT.permute(2, 3, 0, 1),
        WEIGHT.as_subclass(type("Special", (Tensor,), {})),
    ],
    ids=["float64", "float16", "transposed", "strided", "permuted", "subclass"],
)
def test_it_reads_nothing_but_plain_dense_float32(weight: Tensor, name: str, calls: Calls) -> None:
    found = PUBLIC[name](weight)
    assert calls.names == []
    plain = weight.as_subclass(Tensor).float().contiguous()
    expected = PUBLIC[name](plain).to(weight.dtype)
    assert calls.names == [name]
    torch.testing.assert_close(found.as_subclass(Tensor), expected)


@needs_compiler
def test_a_gradient_of_another_order_in_memory_is_read_by_pytorch(calls: Calls) -> None:
    weight, last = nn.Parameter(WEIGHT.clone()), WEIGHT.to(memory_format=torch.channels_last)
    for grad in (last, torch.ones(()).expand(WEIGHT.shape)):
        weight.grad = None
        uniform.fake_quantize(weight, ONE, -100, 100).backward(grad)
        assert weight.grad is not None
        assert torch.equal(weight.grad, grad)
    assert calls.names == ["round_rows"] * 2


def compiled(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    found = torch.compile(function, backend="eager", fullgraph=True)
    found(x)
    return found


@needs_compiler
@pytest.mark.parametrize(
    "record",
    [
        lambda f, x: make_fx(f)(x),
        lambda f, x: torch.jit.trace(f, x, check_trace=False),
        compiled,
    ],
    ids=["make_fx", "jit.trace", "torch.compile"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
def test_what_is_recorded_holds_operations_and_no_numbers(record: Callable, calls: Calls) -> None:
    recorded = record(PUBLIC["round_rows"], WEIGHT)
    assert calls.names == []
    assert torch.equal(recorded(2 * WEIGHT), PUBLIC["round_rows"](2 * WEIGHT))


@needs_compiler
def test_a_gradient_that_is_differentiated_again_is_pytorchs(calls: Calls) -> None:
    x = torch.tensor([0.2, 0.7, 1.5], requires_grad=True)
    y = dorefa.fake_quantize_activation(x, torch.tensor(1.0), 2)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert grad.requires_grad
    assert calls.names == ["round_rows"]


# --------------------------------------------------------------------------------------------------- threads


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(native, "_WORTH_A_THREAD", 100)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 1000), (2, 500), (7, 301), (1000, 9), (64, 8, 3, 3)])
def test_three_threads_give_what_one_gives(shape: tuple[int, ...], three_threads: None, calls: Calls) -> None:
    weight, grad = gaussian(*shape), gaussian(*shape, seed=1)
    scales = torch.rand(len(weight), *[1] * (len(shape) - 1)) + 0.1
    table = torch.linspace(-2, 2, 7)[None]
    for granularity in GRANULARITIES:
        assert_lbw_is_the_same(weight, 4, granularity, 0.0)
    for scale in (ONE, scales):
        found = native.round_rows(weight, scale, -7, 7)
        assert found is not None
        assert torch.equal(found, uniform._rounded(weight, scale, -7, 7))
        gradients = native.round_gradients(grad, weight, scale, -7, 7)
        assert_gradients_are_the_same(gradients, uniform._gradients(grad, weight, scale, -7, 7, True))
    for tables in (table, table * scales.view(-1, 1)):
        nearest, expected = (
            native.nearest_of_table(weight, tables),
            learned_levels._nearest_of_table(weight, tables),
        )
        assert nearest is not None
        assert torch.equal(nearest[0], expected[0])
        sums = native.sums_of_levels(grad, nearest[1], tables)
        assert sums is not None
        assert_sums_are_the_same(sums, learned_levels._sums_of_levels(grad, nearest[1], tables))
    assert calls.names.count("round_rows") > 3  # several parts


@needs_compiler
def test_a_forked_process_waits_for_no_thread_of_its_parent(three_threads: None) -> None:
    weight = gaussian(30, 50)
    lbw.fake_quantize(weight, 4)  # makes the threads
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends it if it waits
        lbw.fake_quantize(weight, 4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
