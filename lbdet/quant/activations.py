"""Over which range shall a layer's input be quantized to equally spaced values?

    value = scale * clamp(round(x / scale), low, high),    low <= 0 <= high,    high - low = 2^bits - 1

One scale and one integer `low` a tensor. Zero is always a level: padding is zero.

    bits  ReLU       Hardswish     a Gaussian
    1     0 .. 1     0 .. 1        -1 .. 0, or 0 .. 1
    2     0 .. 3     0 .. 3        -1 .. 2, or -2 .. 1
    4     0 .. 15    -2 .. 13      -7 .. 8, or -8 .. 7
    8     0 .. 255   -21 .. 234    about -128 .. 127

(Two bits are better spent on the positive side of Hardswish alone.) What is to be least:

    "mse"            mean of (x - value)^2 over all elements / variance of all elements (a constant)
    "channel_aware"  mean over channels of (mean of (x - value)^2 / variance), each of the channel

Under "mse" a few channels of high variance decide the range, and the others round to zero; under
"channel_aware" it suits the majority of channels.

The search. R+(t) = sum w relu(x - t) is the excess of the positive values over t, R-(t) = sum w relu(-x - t)
that of the negative ones. With each border (k - 1/2) scale that it crosses, a value lowers its squared error
by 2 scale times its excess:

    sum w x^2 - sum w (x - value)^2 = 2 scale * (sum_{k = 1 .. high} R+((k - 1/2) scale)
                                                 + sum_{k = 1 .. -low} R-((k - 1/2) scale))

So for one scale two cumulative sums give the gain of every `low`, and only the scale is searched. The best
is at most max|x|, and at least (best gain so far) / (2 (high - low) sum w |x|).

R needs neither sorting nor a range beforehand: elements are summed in buckets by the first 15 bits of their
float32 (sign, exponent, 6 bits of the mantissa), each 1/64 to 1/128 of its values wide. R is exact at borders
outside a bucket; for those inside, its values count as spread evenly, with their own mean and variance.

Reference:
    Hoang, Do, Nguyen, Cheung 2020, "Direct Quantization for Training Highly Accurate Low Bit-width Deep
    Neural Networks", IJCAI, arXiv 2012.13762: the second contribution, errors of individual channels.

Differs from the paper:
    It asks that activation quantizers not be biased toward a few channels of high variance. Our reading is
    to divide each channel's error by its variance and weigh all channels alike. The levels are equally
    spaced, two-sided inputs are covered, and the range is found by search instead of learned (`error` is
    there to learn it). A channel that 8 bits cannot resolve, its standard deviation below 1/256 of its
    mean, counts as one without variance: it would outweigh all others, and no range could serve it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from lbdet.errors import NumericsError

OBJECTIVES = ("mse", "channel_aware")
MIN_BITS, MAX_BITS = 1, 8
_RESOLUTION = {"mse": 2.0**-20, "channel_aware": 2.0**-8}  # of the mean; a smaller deviation counts as none
_FLOAT32 = torch.finfo(torch.float32)
_BUCKETS = 1 << 14  # of each sign
_INFINITE = 255 << 6  # the bucket of infinity; those of nan follow
_CHUNK = 1 << 22  # elements that are held in float64 at once
_TIE = 1e-12  # gains are equal that differ by less, relatively: the rounding of their sums
_FACTORS = tuple(k / 4 * math.log(2) for k in (0, 1, -1, 2, -2))  # of equally good ones the first is taken
_SAMPLE, _SAMPLE_OF_CHANNEL = 1 << 14, 32
_STRIDES = tuple(math.sqrt(prime) for prime in (2, 3, 5, 7))  # of the dimensions, modulo their size


def steps(bits: int) -> int:
    """Return high - low = 2^bits - 1.

    Raises:
        ValueError: `bits` is not in 1..8.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"activations have widths {MIN_BITS} to {MAX_BITS}, got {bits}")
    return (1 << bits) - 1


def error(x: Tensor, quantized: Tensor, objective: str, dim: int) -> Tensor:
    """Compute the objective on one tensor.

    Args:
        x: float tensor, `[N, C, H, W]` with dim 1 or `[..., F]` with dim -1.
        quantized: what stands for it, the same shape.
        objective: one of `OBJECTIVES`.
        dim: the dimension of channels.

    Returns:
        float32 `[]`; 0 where nothing has variance, and for no elements.

    Raises:
        ValueError: an unknown objective.

    Gradient:
        The formula's, to `quantized` and to `x`; the variance counts as a constant. To train the quantizer
        alone, detach `x` before it is quantized.
    """
    x, quantized = torch.atleast_2d(x.float()), torch.atleast_2d(quantized.float())
    dims = _pooled(x, objective, dim)
    if x.numel() == 0:
        return quantized.sum()
    variance, mean = torch.var_mean(x.detach(), dims, correction=0)
    return _relative((quantized - x).square().mean(dims), variance, mean, objective)


def _empty() -> Tensor:
    return torch.zeros(0, dtype=torch.float64)


@dataclass
class ChannelStatistics:
    """First pass: moments and range of each channel, merged over batches in any order and cut.

    Reference: Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979.
    """

    count: int = 0
    """elements a channel"""
    mean: Tensor = field(default_factory=_empty)
    """float64 `[C]`, as the next three; `[0]` before the first batch"""
    squares: Tensor = field(default_factory=_empty)
    """sum of squared differences from `mean`"""
    minimum: Tensor = field(default_factory=_empty)
    maximum: Tensor = field(default_factory=_empty)

    @torch.no_grad()
    def update(self, x: Tensor, dim: int) -> None:
        """Add the elements of a batch (args as in `error`); one without elements is ignored.

        Raises:
            NumericsError: an element is not finite, or beyond float32.
        """
        for part in _parts(x, dim):
            dims = _pooled(part, "channel_aware", dim)
            minimum, maximum = part.amin(dims).double(), part.amax(dims).double()
            _refuse_unless((torch.maximum(-minimum, maximum) <= _FLOAT32.max).all())
            mean = part.mean(dims, keepdim=True, dtype=torch.float64)
            squares = (part.double() - mean).square_().sum(dims)
            self._merge(part.numel() // len(squares), mean.flatten(), squares, minimum, maximum)

    def _merge(self, count: int, mean: Tensor, squares: Tensor, minimum: Tensor, maximum: Tensor) -> None:
        total = self.count + count
        if self.count:
            delta = mean - self.mean
            mean = self.mean + delta * (count / total)
            squares = self.squares + squares + delta.square() * (self.count * count / total)
            minimum, maximum = self.minimum.minimum(minimum), self.maximum.maximum(maximum)
        self.count, self.mean, self.squares, self.minimum, self.maximum = (
            total,
            mean,
            squares,
            minimum,
            maximum,
        )

    def variance(self) -> Tensor:
        """Return the mean squared difference from the mean, float64 `[C]`."""
        return self.squares / max(self.count, 1)

    def weights(self, objective: str) -> Tensor:
        """Return what a squared error counts in each channel, float64 `[C]`.

        1 for "mse". For "channel_aware" 1 / (variance * count), or 0 where the channel has no variance; where
        none has (a single pixel seen), 1 as well, as a range is needed all the same.

        Raises:
            ValueError: an unknown objective.
        """
        _check(objective)
        varies = _varies(self.variance(), self.mean, objective)
        if objective == "mse" or not bool(varies.any()):
            return torch.ones_like(self.mean)
        return torch.where(varies, 1 / self.squares, 0.0)


@dataclass
class BucketSums:
    """Second pass: the sums of weight, weight * x and weight * x^2 in each bucket of floats."""

    weights: Tensor
    """float64 `[C]`, see `ChannelStatistics.weights`; on the activations' device"""
    sums: Tensor = field(init=False)
    """float64 `[3, 2, 16384]`: the three sums; 0 for positive and 1 for negative; in the order of |x|"""

    def __post_init__(self) -> None:
        self.sums = self.weights.new_zeros(3, 2, _BUCKETS, dtype=torch.float64)

    @torch.no_grad()
    def update(self, x: Tensor, dim: int) -> None:
        """Add the elements of a batch (args as in `error`); one without elements is ignored.

        Raises:
            NumericsError: an element is not finite, or beyond float32.
        """
        for part in _parts(x, dim):
            values = part.float()
            bucket = (values.view(torch.int32).reshape(-1) >> 17) & (2 * _BUCKETS - 1)
            _refuse_unless((bucket & (_BUCKETS - 1)).amax() < _INFINITE)
            shape = [-1 if d == dim % part.ndim else 1 for d in range(part.ndim)]
            term, values = self.weights.view(shape).expand_as(values).reshape(-1), values.reshape(-1)
            for total in self.sums.view(3, -1):
                total.index_add_(0, bucket, term)
                term = term * values


def fit_range(sums: BucketSums, bits: int) -> tuple[float, int]:
    """Find the range of least weighted squared error.

    Args:
        sums: of all calibration batches.
        bits: 1 to 8.

    Returns:
        The scale, a positive normal number of float32, and `low`. Of equally good ranges that of the largest
        scale, then of the highest low. (1, 0) where nothing but zeros was seen.

    Raises:
        ValueError: `bits` is not in 1..8.
    """
    n = steps(bits)
    on_cpu = sums.sums.cpu()
    positive, negative = _side(on_cpu[:, 0]), _side(on_cpu[:, 1])
    total, top = float(on_cpu[1].abs().sum()), max(float(positive[0].max()), float(negative[0].max()))
    if top == 0:
        return 1.0, 0
    octave = torch.exp2(-torch.arange(16, dtype=torch.float64) / 16)
    scale, low, gain = _best(positive, negative, top * octave, n)
    while n * top * total > gain:  # a scale of the octave below, at most top / 2, may be better
        top /= 2
        below = _best(positive, negative, top * octave, n)
        if below[2] * (1 - _TIE) > gain:
            scale, low, gain = below
    for span in (1 / 16, 1 / 512):  # of an octave
        around = scale * torch.exp2(torch.linspace(span, -span, 65, dtype=torch.float64))
        scale, low, _ = _best(positive, negative, around, n)
    return min(max(scale, _FLOAT32.tiny), _FLOAT32.max), low


def direct_range(x: Tensor, bits: int, objective: str, dim: int) -> tuple[float, int]:
    """Find the range for one tensor: both passes and the search.

    Args, Returns: as in `error` and `fit_range`.

    Raises:
        ValueError: an argument out of its range.
        NumericsError: an element is not finite, or beyond float32.

    >>> scale, low = direct_range(torch.tensor([[-0.2, 0.0, 0.2, 0.4]]), bits=2, objective="mse", dim=-1)
    >>> round(scale, 3), low
    (0.2, -1)
    """
    statistics = ChannelStatistics()
    statistics.update(x, dim)
    sums = BucketSums(statistics.weights(objective))
    sums.update(x, dim)
    return fit_range(sums, bits)


def sample(x: Tensor, dim: int) -> Tensor:
    """Take some positions of a batch with all their channels, about 16 k elements, for estimates in training.

    The positions (32 at least) go through every dimension in an irrational stride of its own, so they are
    spread evenly and no size of map puts them all in one column.

    Args:
        x, dim: as in `error`.

    Returns:
        `[positions, C]`, x's dtype: a new tensor, or a view where `x` is small enough to be taken whole.

    Gradient:
        That of a selection.
    """
    x = torch.atleast_2d(x).movedim(dim, -1)
    *sizes, channels = x.shape
    wanted = max(_SAMPLE // max(channels, 1), _SAMPLE_OF_CHANNEL)
    if math.prod(sizes) > wanted:
        i = torch.arange(wanted, dtype=torch.float64, device=x.device)
        pairs = zip(sizes, _STRIDES, strict=False)  # dimensions beyond the strides are taken whole
        x = x[tuple(((i * stride).frac() * size).long() for size, stride in pairs)]
    return x.reshape(-1, channels)


@torch.no_grad()
def follow(
    x: Tensor, scale: Tensor | float, low: int | Tensor, high: int | Tensor, objective: str, dim: int
) -> Tensor:
    """Tell which way a training batch pulls the scale.

    Of the factors 2^(k/4), k = -2 .. 2, the best on a `sample` of the batch. The few largest values are
    mostly not in it, so with many bits the scale settles somewhat below that of `fit_range`.

    Args:
        x, objective, dim: as in `error`.
        scale: positive, `[]`.
        low, high: the range in units of the scale.

    Returns:
        float32 `[]`, the factor's natural logarithm, for `log_scale += momentum * follow(...)`. 0 where the
        scale is best as it is, and for a batch that is empty, not finite or without variance; the least
        factor where every candidate rounds all to zero.

    Raises:
        ValueError: an unknown objective.

    Gradient:
        None.
    """
    _check(objective)
    if x.numel() == 0:
        return x.new_zeros((), dtype=torch.float32)
    values = sample(x, dim).float()
    values = values.reshape(-1, 1) if objective == "mse" else values
    factors = torch.tensor(_FACTORS, device=x.device)
    low, high = torch.as_tensor(low, device=x.device), torch.as_tensor(high, device=x.device)
    candidates = (scale * factors.exp())[:, None, None]
    quantized = (values / candidates).round_().clamp_(low, high) * candidates
    variance, mean = torch.var_mean(values, 0, correction=0)
    errors = _relative((quantized - values).square_().mean(1), variance, mean, objective)
    lost = (quantized == 0).all() & (errors[0] > 0)
    return torch.where(lost, factors[-1], factors.take(errors.argmin()))


def _check(objective: str) -> None:
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")


def _refuse_unless(finite: Tensor) -> None:
    if not bool(finite):
        raise NumericsError("an activation has values that are not finite")


def _pooled(x: Tensor, objective: str, dim: int) -> list[int]:
    """Return the dimensions over which the objective takes means."""
    _check(objective)
    return [d for d in range(x.ndim) if objective == "mse" or d != dim % x.ndim]


def _parts(x: Tensor, dim: int) -> Sequence[Tensor]:
    """Cut a batch into views of about `_CHUNK` elements, along its first dimension; none of an empty one."""
    x = torch.atleast_2d(x)
    if x.numel() == 0:
        return ()
    return (x,) if dim % x.ndim == 0 else x.split(max(1, _CHUNK * len(x) // x.numel()))


def _varies(variance: Tensor, mean: Tensor, objective: str) -> Tensor:
    """Tell which variances `[C]` to divide by: neither rounding errors nor below float32."""
    return variance > (_RESOLUTION[objective] * mean).square().clamp_min(_FLOAT32.tiny)


def _relative(squared: Tensor, variance: Tensor, mean: Tensor, objective: str) -> Tensor:
    """Average squared errors `[..., C]` over variances `[C]`; both `[]` for a whole tensor."""
    varies = _varies(variance, mean, objective)
    relative = squared * torch.where(varies, 1 / variance, 0.0)
    return relative if varies.ndim == 0 else relative.sum(-1) / varies.sum().clamp_min(1)


def _side(sums: Tensor) -> Tensor:
    """Tabulate the used buckets of one sign, by growing |x|; `[3, 16384]` -> `[5, B + 1]`.

    Rows: the end of the interval over which a bucket is spread and half the interval's width, the weight, and
    sums of weight and weight * |x| over all larger buckets. The last column is for what exceeds all.
    """
    used = sums[0] > 0
    weight, first, second = sums[:, used].abs()
    border = (torch.arange(_BUCKETS, dtype=torch.int32) << 17).view(torch.float32).double()
    mean = first / weight
    half = (3 * (second / weight - mean.square()).clamp_min(0)).sqrt()
    half = half.minimum(mean - border[used]).minimum(border.roll(-1)[used] - mean).clamp_min(0)
    from_here = torch.stack([weight, first]).flip(-1).cumsum(-1).flip(-1)
    return torch.cat([pad(torch.stack([mean + half, half, weight]), (0, 1)), pad(from_here, (0, 2))[:, 1:]])


def _excess(side: Tensor, t: Tensor) -> Tensor:
    """Compute R(t) = sum w relu(|x| - t) over one sign, in the shape of t."""
    bucket = torch.searchsorted(side[0, :-1], t, right=True)
    end, half, weight, weight_above, sum_above = side[:, bucket]
    reach = (end - t).clamp_min(0)
    inside = torch.where(reach < 2 * half, reach.square() / (4 * half), reach - half)
    return (sum_above - t * weight_above).clamp_min(0) + weight * inside


def _best(positive: Tensor, negative: Tensor, scales: Tensor, n: int) -> tuple[float, int, float]:
    """Pick the best of some falling scales `[S]`, each with its best low: scale, low and gain."""
    borders = scales[:, None] * (torch.arange(n, dtype=torch.float64) + 0.5)
    up, down = (pad(_excess(side, borders).cumsum(-1), (1, 0)) for side in (positive, negative))
    gains = 2 * scales[:, None] * (up.flip(-1) + down)  # [S, n + 1]: column j has low = -j
    gain = gains.amax(-1)
    i = int(gain.argmax())  # the first, so the largest scale
    return float(scales[i]), -int(gains[i].argmax()), float(gain[i])
