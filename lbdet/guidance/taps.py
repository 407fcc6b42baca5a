"""Hints on feature maps: a tap is a module, by its name in both models, whose output is compared.

    L_features = mean over maps of ||s - q(t)||^2 / ((||s||^2 + ||q(t)||^2) / 2)

with the student's map s and the teacher's t; the denominator counts as a constant. It is a relative squared
error, so the weight has no unit: 0 for equal maps, 0.4 where the one is twice the other, 2 for unrelated
(orthogonal) ones or where one is zero, 4 at most, for opposite ones. Divided by the teacher's map alone it
would have no bound: a low-bit model's maps can die or grow by orders of magnitude, and in joint training
either model is a teacher.

q is the identity, or rounds the map to a few bits first: the student's maps are low-bit, and what it cannot
represent need not pull on it.

Reference:
    Zhuang, Shen, Tan, Liu, Reid 2018, "Towards effective low-bitwidth convolutional neural networks", arXiv
    1711.00205: its guided training takes the squared distance of the student's maps and the teacher's
    quantized ones.

Differs from the paper:
    The distance is relative, as above. It quantizes the teacher's map as its method quantizes activations, to
    a clip of its own; our reading is the uniform range of least squared error, found on this very map at this
    step (on a sample of about 16 k elements, spread evenly).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lbdet.errors import UserError, closest
from lbdet.guidance.hints import Divisor
from lbdet.quant import activations, uniform


class Taps:
    """Keeps what some modules of two models put out last.

    A module that ran several times has the maps of its last run. A map that the model changes in place counts
    as changed: batch norm before an in-place ReLU gives what comes out of the ReLU.

    Args:
        student, teacher: watched from now on, until `close`.
        names: as in `named_modules`; each must be a module of both.

    Raises:
        UserError: a name that is no module.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, names: Sequence[str]) -> None:
        modules = [{name: m for name, m in model.named_modules() if name} for model in (student, teacher)]
        for name in names:
            for known in modules:
                if name not in known:
                    raise UserError(
                        f"guidance.taps: must name modules of the model, got {name!r}{closest(name, known)}"
                    )
        self._names = tuple(names)
        self._seen: tuple[dict[str, object], ...] = ({}, {})
        self._handles = [
            _output_of(known[name], name, seen)
            for known, seen in zip(modules, self._seen, strict=True)
            for name in names
        ]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return all maps of the student's last pass, each beside the teacher's, with their graphs.

        Raises:
            UserError: a tap that was not run, put no maps out, or maps of other shapes in the teacher.
        """
        pairs = []
        for name in self._names:
            student, teacher = (_maps(name, seen) for seen in self._seen)
            if [m.shape for m in student] != [m.shape for m in teacher]:
                raise UserError(
                    f"guidance.taps: maps must have one shape in both models, got {_shapes(student)} and "
                    f"{_shapes(teacher)} of {name!r}; name one of the backbone"
                )
            pairs += zip(student, teacher, strict=True)
        return pairs

    def close(self) -> None:
        """Stop watching both models."""
        for handle in self._handles:
            handle.remove()
        for seen in self._seen:
            seen.clear()


def features_loss(student: Tensor, teacher: Tensor, divisor: Divisor = torch.clamp_min) -> Tensor:
    """Return L_features of one map of any shape, float32 `[]`; 0 where both are zero or empty.

    Gradient:
        The numerator's, to both; detach the one that is not to learn.
    """
    s, t = student.float(), teacher.float()
    power = (s.detach().square().sum() + t.detach().square().sum()) / 2
    return (s - t).square().sum() / divisor(power, torch.finfo(torch.float32).tiny)


@torch.no_grad()
def rounded(x: Tensor, bits: int | None) -> Tensor:
    """Return a map at `bits` bits, of one scale, that are nearest to it; without gradient.

    Args:
        x: float tensor of any shape, dimension 1 for channels.
        bits: 2 to 8; None = the map as it is.

    Returns:
        x's shape and dtype, a new tensor with at most 2^bits values, 0 among them; `x` itself, detached, for
        None.

    Raises:
        NumericsError: the map has values that are not finite.
    """
    if bits is None:
        return x.detach()
    scale, low = activations.direct_range(activations.sample(x, 1).cpu(), bits, "mse", -1)
    return uniform.fake_quantize(x, torch.tensor(scale, device=x.device), low, low + activations.steps(bits))


def _output_of(module: nn.Module, name: str, seen: dict[str, object]) -> RemovableHandle:
    return module.register_forward_hook(lambda _, __, output: seen.__setitem__(name, output))


def _maps(name: str, seen: dict[str, object]) -> list[Tensor]:
    if name not in seen:
        raise UserError(
            f"guidance.taps: must name modules that both models run, got {name!r}; name one of the backbone"
        )
    maps = _tensors(seen[name])
    if not maps:
        raise UserError(
            f"guidance.taps: a module's output must hold float tensors, got {type(seen[name]).__name__} of "
            f"{name!r}; name a layer, a block or the backbone"
        )
    return maps


def _tensors(output: object) -> list[Tensor]:
    """Return the float tensors in a tensor, or in nested dicts, lists and tuples, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = (
        output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    )
    return [tensor for value in values for tensor in _tensors(value)]


def _shapes(maps: list[Tensor]) -> list[list[int]]:
    return [list(m.shape) for m in maps]
