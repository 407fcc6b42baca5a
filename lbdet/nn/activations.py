"""Activation quantizers as modules: they sit at a layer's input and get their range from data.

Like a weight quantizer, one knows no width, and holds a range for each that was selected. A range is set by
`lbdet.calibrate_activations`; before that a forward pass is refused.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lbdet.errors import UserError
from lbdet.nn.version import version
from lbdet.quant import activations, binary, dorefa, uniform

UPDATES = ("learned", "average", "loss", "fixed")
_UNSET = 1
"""stands for the lowest code, which is never positive, until calibration"""
_MOMENTUM = 0.05
"""how far the exponential average moves to the best scale of a batch"""


class ActivationQuantizer(nn.Module):
    """What a layer asks of the number format of its input, and the ranges of formats that have one.

    A range is the log of the scale, a parameter, and the lowest code around zero (value = scale * code), a
    buffer; both `[]`, one of each a width.

    Args:
        objective: what calibration minimises, one of `lbdet.quant.activations.OBJECTIVES`; None = the format
            has no range.
        learned: whether the scale is trained by gradient.
    """

    format: ClassVar[str]
    widths: ClassVar[range]
    clips_negative: ClassVar[bool] = False
    """whether negative inputs become 0"""
    needs_negative: ClassVar[bool] = False
    """whether inputs that are never negative would all become the same"""

    def __init__(self, objective: str | None, learned: bool) -> None:
        super().__init__()
        if objective not in (None, *activations.OBJECTIVES):
            names = ", ".join(activations.OBJECTIVES)
            raise ValueError(f"objective must be one of {names}, got {objective!r}")
        self.objective, self.learned = objective, learned
        self._lows: dict[int, tuple[Tensor, object, int]] = {}

    def prepare(self, bits: int, device: torch.device) -> None:
        """Make the range of a width, not calibrated yet, where there is none."""
        if self.objective is not None and f"low_{bits}" not in self._buffers:
            log_scale = nn.Parameter(torch.zeros((), device=device), self.learned)
            self.register_parameter(f"log_scale_{bits}", log_scale)
            self.register_buffer(f"low_{bits}", torch.tensor(_UNSET, dtype=torch.int32, device=device))

    def calibrated(self, bits: int) -> bool:
        """Return whether the range of a width is known; true for a format without one."""
        return self.objective is None or self._low(bits) != _UNSET

    @torch.no_grad()
    def set_range(self, bits: int, scale: float, low: int) -> None:
        """Take over what calibration found, in place: the scale and the lowest code around zero."""
        self.get_parameter(f"log_scale_{bits}").fill_(math.log(scale))
        self.get_buffer(f"low_{bits}").fill_(low)

    def range(self, bits: int) -> tuple[float, int, int] | None:
        """Return scale, lowest and highest code around zero; None without a (calibrated) range."""
        if self.objective is None or not self.calibrated(bits):
            return None
        low = self._low(bits)
        return self.get_parameter(f"log_scale_{bits}").exp().item(), low, low + (1 << bits) - 1

    def pop_penalty(self) -> Tensor | None:
        """Return the extra loss of the forward passes since the last call, their mean; None without one."""
        return None

    @abstractmethod
    def forward(self, x: Tensor, bits: int, dim: int) -> Tensor:
        """Return the representable values that stand for `x`; `dim` is the dimension of channels."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave what was read from buffers out of copies."""
        return super().__getstate__() | {"_lows": {}}

    def _low(self, bits: int) -> int:
        """Return the lowest code. Reading a buffer makes a GPU wait, so it is kept until that is replaced or
        changed in place.
        """
        buffer = self.get_buffer(f"low_{bits}")
        known, known_version, low = self._lows.get(bits, (None, None, 0))
        if known is not buffer or known_version != version(buffer):
            low = int(buffer)
            self._lows[bits] = buffer, version(buffer), low
        return low

    def _check_calibrated(self, bits: int) -> None:
        if not self.calibrated(bits):
            raise UserError(
                f"{bits}-bit activations are not calibrated; "
                "call lbdet.calibrate_activations with some images"
            )


class UniformActivation(ActivationQuantizer):
    """Equally spaced values with an exact zero, one scale a tensor, see `lbdet.quant.uniform`.

    Args:
        objective: what calibration and updates minimise: "mse", or "channel_aware", in which every channel
            counts the same (see `lbdet.quant.activations`).
        update: how the scale goes on after calibration: "learned" by the task's gradient (LSQ), "loss" by the
            objective's gradient (an extra loss, kept until `pop_penalty` takes it), "average" as an
            exponential average of the best scales of batches, or "fixed". The lowest code stays.
    """

    format = "uniform"
    widths = range(1, uniform.MAX_BITS + 1)

    def __init__(self, objective: str = "mse", update: str = "learned") -> None:
        super().__init__(objective, update in ("learned", "loss"))
        if update not in UPDATES:
            raise ValueError(f"update must be one of {', '.join(UPDATES)}, got {update!r}")
        self.update = update
        self.penalties: list[Tensor] = []
        """of each use of the layer in a forward pass"""

    def pop_penalty(self) -> Tensor | None:
        found, self.penalties = self.penalties, []
        return sum(found[1:], found[0]) / len(found) if found else None

    def forward(self, x: Tensor, bits: int, dim: int) -> Tensor:
        self._check_calibrated(bits)
        low = self._low(bits)
        high = low + (1 << bits) - 1
        log_scale = self.get_parameter(f"log_scale_{bits}")
        if self.training and x.numel():
            self._follow_data(x.detach(), log_scale, low, high, dim)
        if self.update != "learned":
            return uniform.fake_quantize(x, log_scale.detach().exp(), low, high)
        features = math.prod(x.shape[min(1, dim % x.ndim) :])  # of one image, batched or not
        gradient_scale = uniform.lsq_gradient_scale(max(features, 1), high)
        return uniform.fake_quantize_learned(x, log_scale, low, high, gradient_scale)

    def extra_repr(self) -> str:
        return f"objective={self.objective!r}, update={self.update!r}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave penalties, which hang on a graph, out of copies."""
        return super().__getstate__() | {"penalties": []}

    def _follow_data(self, x: Tensor, log_scale: Tensor, low: int, high: int, dim: int) -> None:
        assert self.objective is not None
        if self.update == "average":
            with torch.no_grad():
                step = activations.follow(x, log_scale.exp(), low, high, self.objective, dim)
                log_scale.add_(step, alpha=_MOMENTUM)
        elif self.update == "loss":
            x = activations.sample(x, dim)  # [positions, C]
            quantized = uniform.fake_quantize(x, log_scale.exp(), low, high)
            self.penalties.append(activations.error(x, quantized, self.objective, -1))


class DorefaActivation(ActivationQuantizer):
    """Equally spaced values between 0 and a clip, see `lbdet.quant.dorefa`: made for inputs behind a ReLU.

    Args:
        clip: 1 in DoReFa; "learned" is PACT's, which starts from calibration.
    """

    format = "dorefa"
    widths = range(1, dorefa.MAX_BITS + 1)
    clips_negative = True

    def __init__(self, clip: float | str = 1.0) -> None:
        super().__init__("mse" if clip == "learned" else None, clip == "learned")
        if clip != "learned" and (isinstance(clip, str) or not 0 < clip < math.inf):
            raise ValueError(f"clip must be positive or 'learned', got {clip!r}")
        self.clip = clip

    def forward(self, x: Tensor, bits: int, dim: int) -> Tensor:
        self._check_calibrated(bits)
        if isinstance(self.clip, str):
            steps = math.log((1 << bits) - 1)
            clip = uniform.positive(self.get_parameter(f"log_scale_{bits}") + steps)
        else:
            clip = torch.tensor(self.clip, device=x.device)
        return dorefa.fake_quantize_activation(x, clip, bits)

    def extra_repr(self) -> str:
        return f"clip={self.clip!r}"


class BinaryActivation(ActivationQuantizer):
    """The sign, see `lbdet.quant.binary`: the one format without a zero, and of no use behind a ReLU."""

    format = "binary"
    widths = range(1, 2)
    needs_negative = True

    def __init__(self) -> None:
        super().__init__(None, False)

    def forward(self, x: Tensor, bits: int, dim: int) -> Tensor:
        return binary.fake_quantize_activation(x)
